"""What ran: one row per distinct decision, with the layers and steps it served.

The dispatcher records every call. :func:`report` gives the report of the run in progress (the
diffusers bridge opens one per pipeline) or, outside any run, the process's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from polyattn.context import ForwardContext

__all__ = ["Report", "Row", "current_report", "density_words", "ranges", "report", "reporting_to"]

MOST_WAITING = 4096  # numbers of one fact that may wait on a device


@dataclass(slots=True)
class Row:
    """Calls that shared one decision."""

    role: str
    requested: str | None
    used: str
    source: str
    why: str
    shape: str
    calls: int = 0
    steps: set[int] = field(default_factory=set)
    layers: set[int] = field(default_factory=set)
    last_facts: Mapping[str, Any] | None = None
    _words: dict[str, list[Any]] = field(default_factory=dict)
    _sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    _on_device: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What the backend told of itself: numbers averaged over calls, other values collected.

        Numbers that a backend left on a device are fetched now, which waits for it.
        """
        for name in list(self._on_device):
            self._fetch(name)
        words = {
            name: values[0] if len(values) == 1 else ", ".join(map(str, values))
            for name, values in self._words.items()
        }
        means = {name: total / number for name, (total, number) in self._sums.items()}
        return {**words, **means}

    def count(self, context: ForwardContext | None, facts: Mapping[str, Any] | None) -> None:
        """Add one call. A fact may be a float, a tensor of one number, or any other value."""
        self.calls += 1
        if context is not None:
            if context.step is not None:
                self.steps.add(context.step)
            if context.layer is not None:
                self.layers.add(context.layer)
        self.last_facts = facts
        for name, value in (facts or {}).items():
            self._add_fact(name, value)

    def _add_fact(self, name: str, value: Any) -> None:
        if isinstance(value, float):
            total, number = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, number + 1)
        elif hasattr(value, "item"):  # a tensor: reading it now would stall the device
            waiting = self._on_device.setdefault(name, [])
            waiting.append(value)
            if len(waiting) >= MOST_WAITING:
                self._fetch(name)
        else:
            known = self._words.setdefault(name, [])
            if value not in known:
                known.append(value)

    def _fetch(self, name: str) -> None:
        for value in self._on_device.pop(name, ()):
            self._add_fact(name, float(value.item()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "requested": self.requested,
            "used": self.used,
            "source": self.source,
            "why": self.why,
            "shape": self.shape,
            "calls": self.calls,
            "steps": sorted(self.steps),
            "layers": sorted(self.layers),
            **({"facts": facts} if (facts := self.facts) else {}),
        }


class Report:
    """Rows keyed by decision. Safe to read while other threads record."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._lock = threading.Lock()
        # A new object after every clear(): the dispatcher keeps rows between calls, and by this it
        # sees that they are no longer this report's.
        self.epoch = object()

    def row(self, key: tuple[Any, ...], make: Row) -> Row:
        """The row for a decision; ``make`` is used the first time."""
        with self._lock:
            return self._rows.setdefault(key, make)

    @property
    def rows(self) -> list[Row]:
        """Role by role, and of each role in the order in which they began."""
        with self._lock:
            rows = list(self._rows.values())
        roles = list(dict.fromkeys(row.role for row in rows))
        return sorted(rows, key=lambda row: roles.index(row.role))

    @property
    def density(self) -> float | None:
        """Attended share of the pairs, over all calls of self-attention; a call that tells no
        density counts as dense. None where no call tells one."""
        rows = [(row.calls, row.facts.get("density")) for row in self.rows if row.role == "self"]
        told = [(calls, share) for calls, share in rows if isinstance(share, (int, float))]
        if not told:
            return None
        left_out = sum(calls * (1 - share) for calls, share in told)
        return 1 - left_out / sum(calls for calls, _ in rows)

    def clear(self) -> None:
        """Forget what ran so far."""
        with self._lock:
            self._rows.clear()
            self.epoch = object()

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, one mapping per row, ready for JSON."""
        return [row.to_dict() for row in self.rows]

    def __str__(self) -> str:
        return "\n".join([self.rows_text(), *self.density_lines()])

    def density_lines(self) -> list[str]:
        """One line for a person, or none where no call tells a density."""
        density = self.density
        return [] if density is None else [density_words(density)]

    def rows_text(self) -> str:
        """One line per row."""
        if not self.rows:
            return "no attention ran"
        lines = []
        for row in self.rows:
            asked = row.requested or "automatic"
            where = "".join(
                f", {name} {ranges(values)}"
                for name, values in (("steps", row.steps), ("layers", row.layers))
                if values
            )
            facts = "".join(f", {name}={_short(value)}" for name, value in row.facts.items())
            lines.append(
                f"{row.role}: {row.used} (asked: {asked}; {row.why}), {row.calls} calls{where}, "
                f"{row.shape}{facts}"
            )
        return "\n".join(lines)


def density_words(density: float) -> str:
    return f"density of self-attention over the run: {density:.3g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ranges(numbers: Iterable[int]) -> str:
    """``{0, 1, 2, 5}`` as ``0-2,5``."""
    parts: list[str] = []
    ordered = sorted(numbers)
    start = 0
    for index, number in enumerate(ordered):
        if index + 1 < len(ordered) and ordered[index + 1] == number + 1:
            continue
        first = ordered[start]
        parts.append(str(first) if first == number else f"{first}-{number}")
        start = index + 1
    return ",".join(parts)


_process_report = Report()
_current: ContextVar[Report] = ContextVar("polyattn_report", default=_process_report)
current_report = _current.get


def report() -> Report:
    """The report of the run in progress, or the process's own. ``print(polyattn.report())``."""
    return _current.get()


@contextlib.contextmanager
def reporting_to(target: Report) -> Iterator[Report]:
    """Record the calls of this thread or task in ``target``."""
    token = _current.set(target)
    try:
        yield target
    finally:
        _current.reset(token)
