"""Shows in pytest's terminal what the conformance kit ran, so that a green run can be weighed.

Opt in with ``pytest_plugins = ["polyattn.testing.plugin"]`` in a top-level ``conftest.py``, with
``from polyattn.testing.plugin import pytest_terminal_summary`` in any other, or with
``pytest -p polyattn.testing.plugin``.
"""

from __future__ import annotations

from typing import Any

import pytest

from polyattn.testing.ledger import LEDGERS

__all__ = ["pytest_terminal_summary"]

_shown = pytest.StashKey[bool]()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per conformance class that ran; once, however many conftests ask for it."""
    stash = terminalreporter.config.stash
    ran = [ledger for ledger in LEDGERS if ledger.started]
    if ran and not stash.get(_shown, False):
        stash[_shown] = True
        terminalreporter.section("polyattn conformance")
        for ledger in ran:
            terminalreporter.write_line(str(ledger))
