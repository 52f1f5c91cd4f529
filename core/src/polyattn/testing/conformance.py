"""The conformance kit: one class that every plugin's tests subclass.

It reads the backend's own spec: what is declared is exercised, what is not must be refused. Tests
cannot be dropped quietly: one that is overridden or deleted fails a guard unless it is listed, with
a reason, in ``known_failures``, and a listed one must fail. The last test holds the counts: a group
that applies and ran nothing is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from polyattn.testing.declarations import (
    ConfigTests,
    LazinessTests,
    MetadataTests,
    ProbeTests,
)
from polyattn.testing.ledger import GROUPS_ANYWHERE, GROUPS_ON_DEVICE, LEDGERS, Ledger, require
from polyattn.testing.numerics import NumericsTests
from polyattn.testing.running import CompileTests, ThreadTests
from polyattn.testing.semantics import RefusalTests, SemanticsTests

__all__ = ["BackendConformance"]


class BackendConformance(
    ThreadTests,
    CompileTests,
    RefusalTests,
    SemanticsTests,
    NumericsTests,
    ConfigTests,
    ProbeTests,
    LazinessTests,
    MetadataTests,
):
    """What every backend must pass. Subclass it, name it ``Test...``, and set ``backend``.

    See :class:`polyattn.testing.subject.Subject` for what else can be set. (pytest runs the tests
    of base classes from the last base to the first, and this class's own tests after them.)
    """

    ledger: ClassVar[Ledger] = Ledger("BackendConformance")

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.ledger = Ledger(f"{cls.backend or 'no backend'} ({cls.__name__})")
        LEDGERS.append(cls.ledger)
        for name in GUARDS & set(vars(cls)):
            raise TypeError(f"{cls.__name__} may not replace {name}, which guards the kit")

    @pytest.fixture(autouse=True)
    def _expect_known_failures(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """A listed test must fail: the day it passes, the list is out of date and says so."""
        reason = self.known_failures.get(request.function.__name__)
        if reason is not None:
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        yield

    def test_kit_is_whole(self) -> None:
        """No test of the kit was overridden or deleted without a listed reason."""
        require(self.backend, f"{type(self).__name__} names no backend")
        known = kit_tests()
        for name, reason in self.known_failures.items():
            require(name in known, f"known_failures lists {name!r}, which is no test of the kit")
            require(reason.strip(), f"known_failures gives no reason for {name}")
        replaced = [
            name
            for name in known
            if getattr(type(self), name, None) is not getattr(BackendConformance, name)
            and name not in self.known_failures
        ]
        require(not replaced, f"overrides or deletes tests of the kit: {', '.join(replaced)}")

    def test_no_group_is_empty(self) -> None:
        """Every group that applies ran cases (judged when the whole class ran in this process)."""
        known = kit_tests()
        missing = set(known) - self.ledger.started - set(self.known_failures)
        if missing:
            pytest.skip(f"only a part of the kit ran: {len(missing)} tests were left out")
        groups = list(GROUPS_ANYWHERE)
        if self.usable_device() is not None:
            groups += GROUPS_ON_DEVICE
        expected_to_fail = {
            group
            for group in groups
            if all(name in self.known_failures for name in known if known[name] == group)
        }
        empty = [
            group
            for group in groups
            if not self.ledger.cases[group] and group not in expected_to_fail
        ]
        require(not empty, f"nothing was tested of: {', '.join(empty)}; {self.ledger}")


GUARDS = frozenset({"test_kit_is_whole", "test_no_group_is_empty", "_expect_known_failures"})


def kit_tests() -> dict[str, str]:
    """The kit's tests (without the two guards) and the group of each."""
    return {
        name: function.kit_group
        for name in dir(BackendConformance)
        if hasattr(function := getattr(BackendConformance, name), "kit_group")
    }
