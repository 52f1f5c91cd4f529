"""What the commands share: options, one value rendered as tables or as JSON, and its wording.

:func:`emit` gets one plain value and a renderer. With ``--json`` the value goes to stdout, alone;
otherwise the renderer writes to a :class:`Page`. On a terminal a page wraps to its width; piped, it
writes no colours, and wraps nothing but columns of prose, so a line can be searched for and a hint
pasted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from polyattn.cli import JSON_WANTED

if TYPE_CHECKING:
    from polyattn.environment import Environment

__all__ = [
    "Data",
    "Page",
    "assume_option",
    "emit",
    "findings_data",
    "json_option",
    "machine",
    "note_broken_plugins",
    "quiet_log",
    "reasons_data",
    "value_words",
]

Data = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])

UNLIMITED_WIDTH = 1_000_000
INSTALL_HINT = 'pip install "polyattn[sdpa]"'


def _remember_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON_WANTED] = value
    return value


def json_option(command: Command) -> Command:
    """``--json``: plain data on stdout, errors included."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_remember_json,
        help="Print plain data as JSON.",
    )(command)


def assume_option(command: Command) -> Command:
    """``--assume``: answer for another machine than this one."""
    return click.option(
        "--assume",
        multiple=True,
        metavar="FACTS",
        help="Plan for another machine, e.g. cuda:9.0,torch:2.11,flash-attn:2.8.3; what is not "
        "mentioned is as on this one.",
    )(command)


def machine(assume: Sequence[str]) -> Environment:
    """This machine, with the given facts assumed of it."""
    from polyattn.environment import Environment
    from polyattn.selection import local_environment

    here = local_environment()
    return Environment.assume(",".join(assume), base=here) if assume else here


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Silence polyattn's log while a decision is only looked at: the answer says what it would."""
    logger = logging.getLogger("polyattn")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def emit(data: Any, as_json: bool, render: Callable[[Page], None]) -> None:
    """Print ``data`` as JSON, or let ``render`` write it for a person."""
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        render(Page())


class Page:
    """Text for a person, on stdout."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(markup=False, emoji=False, highlight=False)
        self.on_terminal = self.console.is_terminal
        if not self.on_terminal:
            self.console.width = UNLIMITED_WIDTH

    def line(
        self, text: str = "", *, indent: int = 0, style: str | None = None, wrap: bool = True
    ) -> None:
        """One paragraph. ``wrap=False`` keeps a line whole, so that it can be copied."""
        for part in _printable(text).splitlines() or [""]:
            pieces = [part]
            if wrap and self.on_terminal:
                pieces = textwrap.wrap(
                    part,
                    max(20, self.console.width - indent),
                    break_long_words=False,
                    break_on_hyphens=False,
                ) or [""]
            for piece in pieces:
                self.console.print(" " * indent + piece, style=style, soft_wrap=True)

    def heading(self, text: str) -> None:
        self.line()
        self.line(text, style="bold")

    def facts(self, facts: Mapping[str, str | None], *, indent: int = 0) -> None:
        """Aligned ``name  value`` lines; a value of None is left out."""
        width = max((len(name) for name in facts), default=0) + 2
        for name, value in facts.items():
            if value is None:
                continue
            room = max(20, self.console.width - indent - width)
            lines = textwrap.wrap(_printable(value), room, break_on_hyphens=False) or [""]
            for index, piece in enumerate(lines):
                label = name if index == 0 else ""
                self.console.print(f"{'':{indent}}{label:{width}}{piece}", soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """A table without lines. The first column is kept whole; the others may fold.

        Columns of prose have ``widths`` beyond which they fold, piped or not.
        """
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for index, column in enumerate(columns):
            most = (widths or {}).get(column)
            table.add_column(column, overflow="fold", no_wrap=index == 0, max_width=most)
        for row in rows:
            table.add_row(*(_printable(cell) for cell in row))
        self.console.print(table)

    def hint(self, hint: str | None, *, indent: int = 0) -> None:
        if hint:
            self.line(f"try: {hint}", indent=indent, style="cyan", wrap=False)

    def reasons(self, reasons: Iterable[Data], *, indent: int) -> None:
        """Every reason, each with its hint underneath."""
        for reason in reasons:
            self.line(f"- {reason['message']}", indent=indent)
            self.hint(reason["hint"], indent=indent + 2)

    def findings(self, findings: Sequence[Data], *, verbose: bool) -> None:
        """What is wrong with plugins, with traceback heads where they are asked for."""
        if not findings:
            return
        self.heading("Findings")
        for finding in findings:
            origin = f"{finding['distribution']} {finding['version']}".strip()
            style = "red" if finding["severity"] == "error" else "yellow"
            what = f"{finding['severity']} at the stage {finding['stage']}"
            self.line(f"{origin}: {what}", style=style)
            self.line(finding["message"], indent=2)
            if verbose and finding["traceback"]:
                self.line(finding["traceback"], indent=4, wrap=False)
        if not verbose and any(finding["traceback"] for finding in findings):
            self.line("(tracebacks: polyattn backends -v)")


def _printable(text: str) -> str:
    """The text with control characters escaped: plugins write names, messages and hints."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def reasons_data(reasons: Iterable[Any]) -> list[Data]:
    """Reasons as plain data."""
    return [reason.model_dump(mode="json") for reason in reasons]


def findings_data() -> list[Data]:
    """What discovery found wrong, as plain data."""
    from polyattn.discovery import registry

    return [finding.model_dump(mode="json") for finding in registry().findings]


def note_broken_plugins() -> None:
    """One line on stderr where a listing is incomplete because a plugin could not be loaded."""
    broken = sum(finding["severity"] == "error" for finding in findings_data())
    if broken:
        click.echo(f"note: {broken} finding(s) about plugins; see: polyattn backends", err=True)


def value_words(value: Any) -> str:
    """A parameter's value as it is written in ``key=value`` text."""
    return value if isinstance(value, str) and value else json.dumps(value)
