"""What the kit really ran: a backend does not pass by testing nothing.

Each conformance class owns a :class:`Ledger`. A test counts its cases as it runs them; one that
ends without having counted any fails, and so does a class in which a group that applies counted
none.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from polyattn.testing.isolation import default_settings

__all__ = ["GROUPS", "LEDGERS", "Ledger", "kit_test", "require"]

# The groups that apply to every backend, and those that need a device the backend runs on.
GROUPS_ANYWHERE = ("metadata", "laziness", "probes", "config")
GROUPS_ON_DEVICE = ("numerics", "semantics", "refusals", "compile", "threads")
GROUPS = (*GROUPS_ANYWHERE, *GROUPS_ON_DEVICE)

Test = TypeVar("Test", bound=Callable[..., None])


class Ledger:
    """Cases run per group, tests started, and why tests were skipped, for one class."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.group = ""  # of the test in progress
        self.cases: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.started: set[str] = set()

    def __str__(self) -> str:
        words = [f"{group} {self.cases[group]}" for group in GROUPS if self.cases[group]]
        line = f"{self.title}: {', '.join(words) or 'no case ran'}"
        for what, counts in (("refused by parameters", self.refused), ("skipped", self.skipped)):
            if counts:
                line += f"; {what}: " + ", ".join(f"{n} x {why}" for why, n in counts.items())
        return line


LEDGERS: list[Ledger] = []


def require(condition: object, message: str) -> None:
    """Fail the test with ``message`` (a plain assert would vanish under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def kit_test(group: str) -> Callable[[Test], Test]:
    """Mark a method as a test of the kit: it must count at least one case of its group."""

    def decorate(function: Test) -> Test:
        @functools.wraps(function)
        def run(self: Any) -> None:
            ledger: Ledger = self.ledger
            ledger.started.add(function.__name__)
            ledger.group = group
            before = ledger.cases[group]
            with default_settings():
                function(self)
            require(
                ledger.cases[group] > before,
                f"{function.__name__} ran no case: the backend refused everything it was asked, "
                f"although its declarations admit it (refused by parameters: "
                f"{dict(ledger.refused)})",
            )

        run.kit_group = group  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate
