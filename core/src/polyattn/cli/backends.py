"""``polyattn backends``: every installed backend, whether it can run here, and all reasons."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from polyattn.cli.output import (
    INSTALL_HINT,
    Data,
    Page,
    assume_option,
    emit,
    findings_data,
    json_option,
    machine,
    reasons_data,
)

if TYPE_CHECKING:
    from polyattn.environment import Environment

__all__ = ["backend_list", "backends", "limits"]


@click.command()
@assume_option
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback heads of broken plugins.")
@json_option
def backends(assume: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """List the installed backends, and why each can or cannot run.

    Plugins that cannot be loaded are listed as findings below. The exit code is 0 whatever is
    found, nothing included: a list was asked for, and it was given. For a verdict, use
    `polyattn doctor`.
    """
    environment = machine(assume)
    data = {
        "machine": environment.describe(),
        "backends": backend_list(environment),
        "findings": findings_data(),
        "limited_by": limits(),
    }
    emit(data, as_json, lambda page: _render(page, data, verbose))


def limits() -> dict[str, str]:
    """The environment variables that leave plugins out, where they are set."""
    names = ("POLYATTN_PLUGINS", "POLYATTN_DISABLE")
    return {name: os.environ[name] for name in names if name in os.environ}


def backend_list(environment: Environment) -> list[Data]:
    """Every installed backend as plain data, in the order automatic selection prefers."""
    from polyattn import selection

    return [
        {
            "name": status.name,
            "aliases": list(status.aliases),
            "kind": status.kind,
            "summary": status.summary,
            "distribution": status.distribution,
            "version": status.version,
            "usable": status.usable,
            "reasons": reasons_data(status.reasons),
        }
        for status in selection.backends(environment)
    ]


def _render(page: Page, data: Data, verbose: bool) -> None:
    listed: list[Data] = data["backends"]
    if listed:
        page.line(f"On {data['machine']}:")
        page.table(
            ["backend", "aliases", "kind", "from", "usable"],
            [
                [
                    each["name"],
                    ", ".join(each["aliases"]) or "-",
                    each["kind"],
                    f"{each['distribution']} {each['version']}",
                    "yes" if each["usable"] else "no",
                ]
                for each in listed
            ],
        )
    else:
        _render_none(page, data)
    for each in listed:
        if not each["usable"]:
            page.heading(f"{each['name']} cannot run here:")
            page.reasons(each["reasons"], indent=2)
    page.findings(data["findings"], verbose=verbose)
    if listed or data["findings"]:
        for name, value in data["limited_by"].items():
            page.line()
            page.line(f"{name}={value} limits what is loaded.")


def _render_none(page: Page, data: Data) -> None:
    limited_by = data["limited_by"]
    if any(finding["severity"] == "error" for finding in data["findings"]):
        page.line("No backend could be loaded; the findings below say why.")
    elif limited_by:
        words = " and ".join(f"{name}={value!r}" for name, value in limited_by.items())
        page.line(f"No backend is loaded, because of {words}.")
        page.hint(f"unset {' '.join(limited_by)}", indent=2)
    else:
        page.line("No attention backend is installed; polyattn itself contains none.")
        page.hint(INSTALL_HINT, indent=2)
