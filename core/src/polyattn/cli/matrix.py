"""``polyattn matrix``: which backend supports which platform, from what the plugins declare.

The answer is the same on every machine. ``--markdown`` writes the table for a README.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from polyattn.cli.output import (
    Data,
    Page,
    emit,
    json_option,
    note_broken_plugins,
)
from polyattn.naming import how_to_get_a_backend

if TYPE_CHECKING:
    from polyattn.contract import Architectures, BackendSpec

__all__ = ["matrix", "matrix_data"]

TITLES = {"cuda": "CUDA", "rocm": "ROCm", "mps": "MPS", "npu": "NPU", "xpu": "XPU", "cpu": "CPU"}
KIND_ORDER = ("exact", "quantized", "sparse")


@click.command()
@click.option("--markdown", is_flag=True, help="Write a Markdown table.")
@json_option
def matrix(markdown: bool, as_json: bool) -> None:
    """Show which backend supports which platform.

    Built from what the installed plugins declare, so the answer does not depend on this machine.
    A number such as 8.0+ is the lowest architecture.
    """
    if markdown and as_json:
        raise click.UsageError("--markdown and --json exclude each other.")
    data = matrix_data()
    note_broken_plugins()
    emit(data, as_json, lambda page: (_render_markdown if markdown else _render)(page, data))


def matrix_data() -> Data:
    """The matrix as plain data: platforms in column order, backends in row order."""
    from polyattn.discovery import registry
    from polyattn.environment import KNOWN_PLATFORMS

    specs = [each.spec for each in registry().backends.values()]
    specs.sort(key=lambda spec: (KIND_ORDER.index(spec.kind), -spec.priority, spec.name))
    taught = {platform for spec in specs for platform in spec.capabilities.platforms}
    platforms = [*KNOWN_PLATFORMS, *sorted(taught - set(KNOWN_PLATFORMS))]
    return {"platforms": platforms, "backends": [_row(spec, platforms) for spec in specs]}


def _row(spec: BackendSpec, platforms: list[str]) -> Data:
    declared = spec.capabilities.platforms
    return {
        "name": spec.name,
        "aliases": list(spec.aliases),
        "kind": spec.kind,
        "summary": spec.summary,
        "platforms": {
            platform: _cell(declared.get(platform), spec.footnotes.get(platform))
            for platform in platforms
        },
        # A footnote that belongs to no column is about the backend as a whole.
        "footnotes": [text for key, text in spec.footnotes.items() if key not in platforms],
    }


def _cell(allowed: Architectures | None, footnote: str | None) -> Data:
    return {
        "supported": allowed is not None,
        "minimum": allowed.minimum if allowed is not None else None,
        "only": list(allowed.only) if allowed is not None else [],
        "footnote": footnote,
    }


class _Footnotes:
    """Numbers for footnote texts, in order of appearance; equal texts share one."""

    def __init__(self, mark: Callable[[int], str]) -> None:
        self.numbers: dict[str, int] = {}
        self.mark = mark

    def marks(self, texts: list[str]) -> str:
        numbers = [self.numbers.setdefault(text, len(self.numbers) + 1) for text in texts]
        return "".join(self.mark(number) for number in numbers)


def _cells(row: Data, footnotes: _Footnotes, supported: str, unsupported: str) -> list[str]:
    cells = []
    for platform, cell in row["platforms"].items():
        words = [supported if cell["supported"] else unsupported]
        if cell["minimum"]:
            words.append(f"{cell['minimum']}+")
        texts = []
        if cell["only"]:
            texts.append(f"{TITLES.get(platform, platform)}: only {', '.join(cell['only'])}.")
        if cell["footnote"]:
            texts.append(cell["footnote"])
        if texts:
            words.append(footnotes.marks(texts))
        cells.append(" ".join(words))
    return cells


def _titles(data: Data) -> list[str]:
    return [TITLES.get(platform, platform) for platform in data["platforms"]]


def _render(page: Page, data: Data) -> None:
    if not data["backends"]:
        page.line("No attention backend is installed, so there is nothing to show.")
        page.hint(how_to_get_a_backend(), indent=2)
        return
    footnotes = _Footnotes(lambda number: f"[{number}]")
    rows = []
    for row in data["backends"]:
        name = " ".join(filter(None, (row["name"], footnotes.marks(row["footnotes"]))))
        rows.append([name, *_cells(row, footnotes, "yes", "-")])
    page.table(["backend", *_titles(data)], rows)
    if footnotes.numbers:
        page.line()
    for text, number in footnotes.numbers.items():
        page.line(f"[{number}] {text}")


def _render_markdown(page: Page, data: Data) -> None:
    footnotes = _Footnotes(lambda number: f"<sup>{number}</sup>")
    titles = ["Backend", *_titles(data)]
    lines = [titles, ["---", *(":-:" for _ in titles[1:])]]
    for row in data["backends"]:
        name = f"`{row['name']}`" + footnotes.marks(row["footnotes"])
        lines.append([name, *_cells(row, footnotes, "✅", "❌")])
    for cells in lines:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        page.line(f"| {' | '.join(escaped)} |", wrap=False)
    for text, number in footnotes.numbers.items():
        page.line()
        page.line(f"<sup>{number}</sup> {text}", wrap=False)
