"""Forward contexts nest, are checked, and schedules never drop what they were asked."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from pydantic import ValidationError

import polyattn
from polyattn.context import current_context, dense_phase, nothing_sparse
from polyattn.contract import ScheduledConfig, TextSpan
from polyattn.errors import InputError
from polyattn.reporting import Report, Row, ranges


def test_contexts_nest_and_inherit() -> None:
    assert current_context() is None
    with polyattn.forward_context(num_steps=4, grid=(2, 3, 4)) as run:
        run.state["seen"] = 1
        with polyattn.forward_context(step=1, layer=2, role="cross", text=TextSpan(0, 3)) as inner:
            assert (inner.step, inner.num_steps, inner.grid) == (1, 4, (2, 3, 4))
            assert inner.state == {}
            inner.state["learned"] = True
        with polyattn.forward_context(step=2, layer=2, role="cross") as later:
            assert later.state == {"learned": True}, "what was learned lives as long as the run"
        assert current_context() is run
    assert current_context() is None
    with polyattn.forward_context() as other:
        assert other.state == {}, "a new outermost context is a new run"


def test_a_context_is_left_when_the_block_raises() -> None:
    with pytest.raises(RuntimeError), polyattn.forward_context(step=0):
        raise RuntimeError
    assert current_context() is None


def test_threads_do_not_share_a_context() -> None:
    seen: list[Any] = []
    with polyattn.forward_context(step=3):
        thread = threading.Thread(target=lambda: seen.append(current_context()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": -1},
        {"step": 1.5},
        {"step": True},
        {"step": 5, "num_steps": 5},
        {"num_steps": 0},
        {"layer": 3, "num_layers": 2},
        {"grid": (1, 2)},
        {"grid": (0, 2, 3)},
        {"grid": (1.0, 2, 3)},
        {"grid": 24},
        {"role": ""},
        {"branch": 3},
        {"text": (0, 3)},
        {"text": TextSpan(0, 3.0)},
        {"text": TextSpan(0.5, 3)},
        {"text": TextSpan(-1, 3)},
        {"text": TextSpan(0, -3)},
        {"text": TextSpan(0, True)},
        {"text": TextSpan(0, 3, 4)},
        {"text": TextSpan(0, 3, -1)},
        {"text": TextSpan(0, 3, 1.5)},
        {"text": TextSpan(0, 0, 5)},
    ],
)
def test_impossible_contexts(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError), polyattn.forward_context(**wrong):
        pass
    assert current_context() is None


def test_an_impossible_text_says_which_of_its_numbers_is_wrong() -> None:
    with pytest.raises(InputError, match="length of a TextSpan .* found 3.0 in"):
        with polyattn.forward_context(text=TextSpan(0, 3.0)):  # type: ignore[arg-type]
            pass
    with pytest.raises(InputError, match="a text of 0 tokens cannot have 5 valid ones"):
        with polyattn.forward_context(text=TextSpan(0, 0, 5)):
            pass


def phase(config: dict[str, Any], **context: Any) -> str | None:
    with polyattn.forward_context(**context) as current:
        return dense_phase(ScheduledConfig(**config), current)


def test_schedules() -> None:
    assert dense_phase(ScheduledConfig(), None) is None
    assert phase({"dense_steps": 2}, step=1) == "dense_steps"
    assert phase({"dense_steps": 2}, step=2) is None
    assert phase({"dense_steps": 0.2}, step=9, num_steps=50) == "dense_steps"
    assert phase({"dense_steps": 0.2}, step=10, num_steps=50) is None
    assert phase({"dense_steps": 1.0}, step=49, num_steps=50) == "dense_steps"
    assert phase({"dense_layers": 1}, layer=0) == "dense_layers"
    assert phase({"dense_layers": 0.03}, layer=0, num_layers=30) is None, "0.03 of 30 is none"
    assert phase({"dense_layers": 0.05}, layer=0, num_layers=30) == "dense_layers"


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"dense_steps": 2}, {}),
        ({"dense_steps": 0.2}, {"step": 1}),
        ({"dense_layers": 2}, {"step": 1}),
    ],
)
def test_a_schedule_is_never_dropped(config: dict[str, Any], context: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="forward_context"):
        phase(config, **context)


def test_a_schedule_without_any_context() -> None:
    with pytest.raises(InputError, match="needs to know the step"):
        dense_phase(ScheduledConfig(dense_steps=1), None)


class OwnWords(ScheduledConfig):
    def key_of(self, option: str) -> str:
        return {"dense_steps": "first_full_step"}.get(option, option)


def test_a_schedule_is_named_as_its_method_names_it() -> None:
    config = OwnWords(dense_steps=12)
    with pytest.raises(InputError) as caught:
        dense_phase(config, None)
    assert caught.value.message.startswith("first_full_step=12 needs to know the step")
    assert "first_full_step=0" in (caught.value.hint or "")
    with polyattn.forward_context(step=0, num_steps=20) as context:
        assert dense_phase(config, context) == "first_full_step"


@pytest.mark.parametrize(
    ("config", "context", "told"),
    [
        ({}, {"num_steps": 5, "num_layers": 2}, None),
        ({"dense_steps": 12}, {}, None),
        ({"dense_steps": 12}, {"num_steps": 13}, None),
        ({"dense_steps": 12}, {"num_steps": 12}, "=12 leaves none of the run's 12 steps sparse"),
        ({"dense_steps": 0.9}, {"num_steps": 9}, None),
        ({"dense_steps": 1.0}, {"num_steps": 9}, "=1.0 leaves none of the run's 9 steps sparse"),
        ({"dense_steps": 1, "dense_layers": 3}, {"num_steps": 9, "num_layers": 2},
         "dense_layers=3 leaves none of the run's 2 layers sparse"),
    ],
)  # fmt: skip
def test_schedules_that_leave_nothing_sparse(
    config: dict[str, Any], context: dict[str, Any], told: str | None
) -> None:
    with polyattn.forward_context(**context) as current:
        found = nothing_sparse(ScheduledConfig(**config), current)
    assert (found is None) if told is None else (found or "").endswith(told)


@pytest.mark.parametrize("wrong", [-1, 1.5, -0.1, "3"])
def test_schedules_are_counts_or_shares(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        ScheduledConfig.model_validate({"dense_steps": wrong}, strict=True)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([]) == ""


def test_a_row_averages_numbers_and_collects_words() -> None:
    row = Report().row(("key",), Row("self", None, "x", "automatic", "why", "shape"))
    row.count(None, {"density": 0.1, "kernel": "a"})
    row.count(None, {"density": 0.3, "kernel": "b"})
    row.count(None, {"density": 0.2, "kernel": "a"})
    assert row.facts["density"] == pytest.approx(0.2)
    assert row.facts["kernel"] == "a, b"
    assert row.calls == 3


def test_a_report_reads_role_by_role_and_tells_the_density_of_all_steps() -> None:
    report = Report()
    for role, why, calls, facts in (
        ("self", "dense_steps of x", 6, {"kernel": "flash"}),
        ("cross", "cross-attention stays dense", 8, None),
        ("self", "requested", 2, {"density": 0.25}),
    ):
        row = report.row((role, why), Row(role, "x", "used", "model", why, "shape"))
        for _ in range(calls):
            row.count(None, facts)
        if row.why != "requested":
            assert report.density is None
            assert "density" not in str(report)
    assert [row.role for row in report.rows] == ["self", "self", "cross"]
    assert report.density == pytest.approx((6 + 2 * 0.25) / 8)
    assert str(report).splitlines()[-1] == "density of self-attention over the run: 0.812"
