"""The kit finds what it is there to find: one deliberate defect at a time, and none where none is.

A conformance kit that passes a broken backend is worse than none, so every test of the kit is shown
to fail on some backend that is wrong in exactly one way, and to pass on the same backend once it is
right.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plain_backend
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

import polyattn
from polyattn import discovery, probing, selection, settings
from polyattn.contract import Architectures, BackendSpec, HeadDims, Reason, ScheduledConfig
from polyattn.testing import (
    BackendConformance,
    declarations,
    fake_distribution,
    isolated_registry,
    oracle,
    running,
)
from polyattn.testing.accuracy import QUANTIZED_BUDGET, Errors, budget, excess, measure
from polyattn.testing.conformance import kit_tests
from polyattn.testing.ledger import GROUPS

SOURCE = Path(plain_backend.__file__)
Skipped = pytest.skip.Exception


def kit_for(**attributes: Any) -> Any:
    """An instance of a fresh conformance class for the plain backend."""
    return type("PlainConformance", (BackendConformance,), {"backend": "plain", **attributes})()


def capabilities(**changes: Any) -> Any:
    return plain_backend.CAPABILITIES.model_copy(update=changes)


def spec(**changes: Any) -> BackendSpec:
    return BackendSpec(**{**dict(plain_backend.SPEC), **changes})


def failure(kit: Any, test: str) -> str | None:
    """What a test of the kit says against the backend; None when it passes."""
    try:
        getattr(kit, test)()
    except Skipped as skipped:
        pytest.fail(f"{test} was skipped: {skipped}")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, far slower where cores are shared."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Breaks what is built from now on."""
    yield lambda defect: monkeypatch.setattr(plain_backend, "DEFECT", defect)


# The defect, the tests that must fail for it, and words that each failure must contain.
DEFECTS = {
    "denominator": ("norm", ["test_lengths", "test_head_dims", "test_unequal_lengths"]),
    "mask_ignored": ("oracle", ["test_boolean_mask", "test_additive_mask", "test_masks_broadcast"]),
    "nan_behind_padding": ("not finite", ["test_key_padding"]),
    "scale_ignored": ("oracle", ["test_custom_scale"]),
    "query_modified": ("input q was modified", ["test_inputs_are_not_modified"]),
    "key_modified": ("input k was modified", ["test_inputs_are_not_modified"]),
    "mask_modified": ("input mask was modified", ["test_inputs_are_not_modified"]),
    "tail_dropped": ("oracle", ["test_lengths"]),
    "tail_leaks": ("oracle", ["test_lengths", "test_unequal_lengths"]),
    "causal_top_left": ("oracle", ["test_causal_aligns_to_the_bottom_right"]),
    "gqa_order": ("oracle", ["test_grouped_queries"]),
    "lse_base_two": ("natural logarithm", ["test_log_sum_exp"]),
    "lse_half": ("log-sum-exp", ["test_log_sum_exp"]),
    "lse_not_returned": ("", ["test_log_sum_exp"]),
    "lse_of_blind_rows": ("-inf", ["test_log_sum_exp", "test_boolean_mask", "test_key_padding"]),
    "blind_rows_nan": ("not finite", ["test_boolean_mask", "test_additive_mask"]),
    "blind_rows_mean": ("", ["test_boolean_mask", "test_causal_aligns_to_the_bottom_right"]),
    "batch_leak": ("reaches others", ["test_batch_items_do_not_meet"]),
    "head_leak": ("reaches others", ["test_heads_do_not_meet"]),
    "output_dtype": ("", ["test_output_has_the_form_of_the_query"]),
    "output_heads_first": ("", ["test_output_has_the_form_of_the_query"]),
    "random": ("deterministic", ["test_deterministic"]),
    "state_kept": ("", ["test_calls_share_no_state"]),
    "state_shared_by_threads": ("other threads", ["test_threads_get_their_own_answers"]),
    "strides_ignored": ("packed q, k, v", ["test_strided_views"]),
    "head_dim_rounded_down": ("D=72", ["test_head_dims"]),
    "no_maximum_subtracted": ("NaN or infinity", ["test_large_values"]),
    "no_gradient": ("", ["test_gradients"]),
    "gradient_scaled": ("gradient", ["test_gradients"]),
    "gradient_random": ("differs when compiled", ["test_compiled_gradients_equal_eager"]),
    "half_precision": (
        "oracle",
        ["test_lengths", "test_causal", "test_mask_and_causal_both_apply"],
    ),
    "heavy_noise": ("", ["test_compiled_layer_equals_eager", "test_compiled_call_equals_eager"]),
    "not_finite": ("not finite", ["test_lengths"]),
}


@pytest.mark.parametrize(
    ("defect", "test"), [(defect, test) for defect, (_, tests) in DEFECTS.items() for test in tests]
)
def test_a_broken_kernel_fails(broken: Any, defect: str, test: str) -> None:
    with isolated_registry(plain_backend.SPEC):
        broken(defect)
        said = failure(kit_for(), test)
    assert said is not None, f"{test} passes a kernel whose defect is {defect}"
    assert DEFECTS[defect][0] in said


@pytest.mark.parametrize("test", sorted({test for _, tests in DEFECTS.values() for test in tests}))
def test_the_right_kernel_passes(test: str) -> None:
    """The same tests, on the same backend without a defect."""
    with isolated_registry(plain_backend.SPEC):
        assert failure(kit_for(), test) is None


def test_defects_exist() -> None:
    """A misspelt defect would break nothing, and its test would fail for no reason."""
    source = SOURCE.read_text(encoding="utf-8")
    assert all(f'"{defect}"' in source for defect in DEFECTS)


# --- declarations ---------------------------------------------------------------------------------


class Loose(BaseModel):
    """Parameters of which one takes anything, and none is described."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anything: Any = None


class WrongDefault(BaseModel):
    """A default outside of its own range, which pydantic lets pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(-1, ge=0, description="How many.")


class Required(BaseModel):
    """A parameter without a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=0, description="How many.")


class Forgetful(BaseModel):
    """A parameter that is not written down, so that a report cannot be given back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(1, exclude=True, description="How many.")


def reason(environment: Any) -> list[Reason]:
    return [Reason(code="never", message="never")]


def raising(*_: Any) -> list[Reason]:
    raise KeyError("cuda")


def printing(*_: Any) -> list[Reason]:
    print("looking around")
    return []


def silent_message(*_: Any) -> list[Reason]:
    return [Reason(code="x", message=" ")]


def fickle(*_: Any, counter: list[int] = [0]) -> list[Reason]:  # noqa: B006 - kept on purpose
    counter[0] += 1
    return [Reason(code="count", message=str(counter[0]))]


def strict_about_lengths(request: Any, config: Any, environment: Any) -> list[Reason]:
    known = request.query_length is not None and request.query_length == request.key_length
    return [] if known else reason(environment)


AGREES = "test_platform_probe_agrees_with_declarations"
ANSWERS = "test_probes_answer_about_any_machine"
DECLARATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("test_discovery_finds_nothing_wrong", {"colour": "red"}, "colour"),
    ("test_summary_and_documentation", {"summary": " "}, "empty"),
    ("test_summary_and_documentation", {"summary": "one\ntwo"}, "one line"),
    ("test_summary_and_documentation", {"summary": "x" * 121}, "121"),
    ("test_summary_and_documentation", {"documentation": "the manual"}, "link"),
    ("test_implementation_resolves", {"implementation": "plain_backend:gone"}, "gone"),
    ("test_implementation_resolves", {"implementation": "plain_backend:SOURCE"}, ""),
    ("test_names_resolve", {"aliases": {"plain_x": {"chunks": 1}}}, "chunks"),
    ("test_falls_back_to_another_backend", {"falls_back_to": "plain"}, "itself"),
    ("test_falls_back_to_another_backend", {"falls_back_to": "Not A Name"}, "not a name"),
    (
        "test_capabilities_are_useful",
        {"capabilities": capabilities(head_dims=HeadDims(only=(40,)))},
        "neither 64 nor 128",
    ),
    (
        "test_capabilities_are_useful",
        {"capabilities": capabilities(platforms={"cpu": Architectures(), "tpu": Architectures()})},
        "tpu",
    ),
    (
        "test_capabilities_are_useful",
        {"capabilities": capabilities(platforms={"cuda": Architectures(minimum="sm90")})},
        "sm90",
    ),
    ("test_capabilities_are_useful", {"kind": "quantized"}, "quantized"),
    ("test_every_parameter_is_described", {"config": Loose}, "no description"),
    ("test_values_of_the_wrong_type_are_refused", {"config": Loose}, "takes anything"),
    ("test_defaults_are_valid", {"config": WrongDefault}, "not valid"),
    ("test_defaults_are_valid", {"config": Required}, "required parameter"),
    ("test_parameters_survive_json", {"config": Forgetful}, "not written down"),
    (ANSWERS, {"probe_availability": raising}, "raises KeyError"),
    (ANSWERS, {"probe_platform": printing}, "prints"),
    (ANSWERS, {"probe_platform": silent_message}, "no message"),
    (ANSWERS, {"probe_availability": fickle}, "asked twice"),
    (ANSWERS, {"probe_availability": lambda environment: ["no"]}, "not a list of Reason"),
    (AGREES, {"probe_platform": lambda environment: []}, "leave out"),
    (AGREES, {"probe_platform": reason}, "accepts no such machine"),
    ("test_request_probe_answers_any_request", {"probe_request": raising}, "raises KeyError"),
    (
        "test_unknown_facts_are_not_held_against_the_backend",
        {"probe_request": strict_about_lengths},
        "length is unknown",
    ),
]


@pytest.mark.parametrize(("test", "changes", "words"), DECLARATIONS)
def test_a_broken_declaration_fails(test: str, changes: dict[str, Any], words: str) -> None:
    aliases = changes.get("aliases", {} if "config" in changes else plain_backend.SPEC.aliases)
    with isolated_registry(spec(**{**changes, "aliases": aliases})):
        said = failure(kit_for(), test)
    assert said is not None, f"{test} passes a spec with {changes}"
    assert words in said


@pytest.mark.parametrize("test", sorted({test for test, _, _ in DECLARATIONS}))
def test_the_right_declaration_passes(test: str) -> None:
    with isolated_registry(plain_backend.SPEC):
        assert failure(kit_for(), test) is None


def test_parameters_that_are_required_can_be_given() -> None:
    with isolated_registry(spec(config=Required, aliases={})):
        kit = kit_for(configs=({"count": 3},))
        for test in ("test_defaults_are_valid", "test_parameters_survive_json", "test_lengths"):
            assert failure(kit, test) is None
    with isolated_registry(spec(config=Required, aliases={"plain_x": {}, "plain_2": {"count": 2}})):
        kit = kit_for(configs=({"count": 3},))
        assert failure(kit, "test_names_resolve") is None


def test_a_backend_may_be_named_by_its_alias() -> None:
    bare = spec(capabilities=capabilities(**BARE), aliases=["another_name"])
    with isolated_registry(bare):
        found = outcomes(kit_for(backend="another_name"))
    assert {test: said for test, said in found.items() if said not in ("passed", "skipped")} == {}
    assert found["test_undeclared_capabilities_are_refused"] == "passed"


def test_a_taken_name_is_a_finding() -> None:
    with isolated_registry(plain_backend.SPEC, spec(name="other")) as found:
        assert [each.stage for each in found.findings] == ["conflict"] * 2
        said = failure(kit_for(), "test_discovery_finds_nothing_wrong")
    assert said is not None
    assert "plain_chunked" in said


def test_a_backend_that_is_not_there_fails() -> None:
    with isolated_registry(spec(name="other", aliases={})):
        said = failure(kit_for(), "test_summary_and_documentation")
    assert said is not None
    assert "no usable backend 'plain'" in said
    assert "other" in said


# --- what is declared, what is refused, what is counted -------------------------------------------

BARE = {
    "masks": (),
    "causal": False,
    "gqa": False,
    "cross_attention": False,
    "custom_scale": False,
    "lse": False,
    "autograd": False,
    "dtypes": ("float32",),
    "head_dims": HeadDims(minimum=32, maximum=128, multiple_of=8),
}


def test_what_is_not_declared_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated_registry(spec(capabilities=capabilities(**BARE))):
        kit = kit_for()
        assert failure(kit, "test_undeclared_capabilities_are_refused") is None
        assert kit.ledger.cases["refusals"] == 13
    # A dispatcher that no longer holds requests against the declarations is caught.
    monkeypatch.setattr(probing, "capability_reasons", lambda spec, request: [])
    with isolated_registry(spec(capabilities=capabilities(**BARE))):
        for test in (
            "test_undeclared_capabilities_are_refused",
            "test_undeclared_extras_are_refused",
        ):
            said = failure(kit_for(), test)
            assert said is not None
            assert "not refused" in said


def test_what_is_declared_must_be_served() -> None:
    """Parameters may refuse a combination, but not everything that was declared."""

    def no_causal(request: Any, config: Any, environment: Any) -> list[Reason]:
        return reason(environment) if request.is_causal else []

    with isolated_registry(spec(probe_request=no_causal)):
        kit = kit_for()
        assert failure(kit, "test_lengths") is None
        said = failure(kit, "test_causal")
        assert said is not None
        assert "ran no case" in said
        assert kit.ledger.refused["never"] > 0


def test_an_empty_group_fails() -> None:
    with isolated_registry(plain_backend.SPEC):
        kit = kit_for()
        kit.ledger.started.update(kit_tests())
        kit.ledger.cases.update(dict.fromkeys(GROUPS, 1))
        kit.test_no_group_is_empty()
        kit.ledger.cases["numerics"] = 0
        with pytest.raises(AssertionError, match="nothing was tested of: numerics"):
            kit.test_no_group_is_empty()
        kit.ledger.started.remove("test_lengths")
        with pytest.raises(Skipped, match="1 tests were left out"):
            kit.test_no_group_is_empty()


def test_tests_cannot_be_dropped_quietly() -> None:
    def empty(self: Any) -> None: ...

    kit_for().test_kit_is_whole()
    for attributes, words in (
        ({"test_lengths": empty}, "test_lengths"),
        ({"test_lengths": None}, "test_lengths"),
        ({"known_failures": {"test_length": "misspelt"}}, "'test_length'"),
        ({"known_failures": {"test_lengths": ""}}, "no reason"),
        ({"backend": ""}, "names no backend"),
    ):
        with pytest.raises(AssertionError, match=words):
            kit_for(**attributes).test_kit_is_whole()
    kit_for(test_lengths=None, known_failures={"test_lengths": "why"}).test_kit_is_whole()
    with pytest.raises(TypeError, match="guards the kit"):
        kit_for(test_kit_is_whole=empty)


def test_a_backend_that_cannot_run_here_is_skipped_with_its_reasons() -> None:
    elsewhere = capabilities(platforms={"npu": Architectures()})
    with isolated_registry(spec(capabilities=elsewhere)):
        kit = kit_for()
        with pytest.raises(Skipped, match="platform"):
            kit.test_lengths()
        kit.ledger.started.update(kit_tests())
        kit.ledger.cases.update(("metadata", "laziness", "probes", "config"))
        kit.test_no_group_is_empty()  # the groups that need a device do not apply


# --- what only a broken core could get wrong ------------------------------------------------------


def test_an_entry_point_that_is_gone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated_registry(plain_backend.SPEC):
        assert failure(kit_for(), "test_entry_point_resolves") is None
        with monkeypatch.context() as patch:  # undone before the block ends and restores its own
            patch.setattr(discovery, "installed_entry_points", list)
            said = failure(kit_for(), "test_entry_point_resolves")
    assert said is not None
    assert "0 times" in said


def test_dropped_parameters_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated_registry(plain_backend.SPEC):
        assert failure(kit_for(), "test_unknown_parameters_are_refused") is None
        monkeypatch.setattr(declarations, "validate", lambda spec, config: spec.config())
        said = failure(kit_for(), "test_unknown_parameters_are_refused")
    assert said is not None
    assert "chunkx=1 is accepted" in said


def test_recompilation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(polyattn.LocalAttention):
        calls = 0

        def forward(self, *tensors: Any, **arguments: Any) -> Any:
            self.calls = min(self.calls + 1, 3)
            return super().forward(*tensors, **arguments) * (1 if self.calls else 0)

    with isolated_registry(plain_backend.SPEC):
        assert failure(kit_for(), "test_steps_do_not_recompile") is None
        monkeypatch.setattr(running, "LocalAttention", Counting)
        said = failure(kit_for(), "test_steps_do_not_recompile")
    assert said is not None
    assert "graphs instead of one" in said


def test_forcing_the_whole_process_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated_registry(plain_backend.SPEC):
        assert failure(kit_for(), "test_forced_backends_do_not_meet") is None

        @contextlib.contextmanager
        def force_everyone(backend: str) -> Iterator[None]:
            yield polyattn.configure(backend)

        monkeypatch.setattr(running, "force_backend", force_everyone)
        said = failure(kit_for(), "test_forced_backends_do_not_meet")
    assert said is not None
    assert "expected 'force'" in said


def test_running_without_the_grid_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated_registry(SPARSE):
        assert failure(kit_for(), "test_missing_grid_is_refused") is None
    monkeypatch.setattr(probing, "capability_reasons", lambda spec, request: [])
    with isolated_registry(SPARSE):
        said = failure(kit_for(), "test_missing_grid_is_refused")
    assert said is not None
    assert "ran without one" in said


def test_declared_extra_tensors_must_be_given() -> None:
    with isolated_registry(spec(capabilities=capabilities(extras=("gate",)))):
        said = failure(kit_for(), "test_extras_are_taken")
        assert said is not None
        assert "make_extras" in said
        kit = kit_for(make_extras=lambda self, q, k, v: {"gate": q.sigmoid()})
        assert failure(kit, "test_extras_are_taken") is None
        assert kit.ledger.cases["semantics"] > 0


# Shown to fail in tests of their own, here and below.
ALSO_SHOWN = {
    "test_entry_point_resolves",
    "test_unknown_parameters_are_refused",
    "test_steps_do_not_recompile",
    "test_forced_backends_do_not_meet",
    "test_missing_grid_is_refused",
    "test_extras_are_taken",
    "test_undeclared_capabilities_are_refused",
    "test_undeclared_extras_are_refused",
    "test_approximation_is_finite",
    "test_listing_loads_no_kernel",
}
NEEDS_A_GPU = {"test_cuda_graphs"}


def test_every_test_of_the_kit_is_shown_to_fail() -> None:
    shown = {test for _, tests in DEFECTS.values() for test in tests} | ALSO_SHOWN
    shown |= {test for test, _, _ in DECLARATIONS}
    assert shown | NEEDS_A_GPU == set(kit_tests())


# --- the oracle -----------------------------------------------------------------------------------


def by_hand(q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """Attention one query at a time, in Python's own floats."""
    batch, queries, heads, head_dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full((batch, heads, queries), float("-inf"), dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        scores = {}
        for j in range(keys):
            bias = 0.0 if mask is None or mask.dtype is torch.bool else mask[b, h, i, j].item()
            hidden = mask is not None and mask.dtype is torch.bool and not mask[b, h, i, j]
            if hidden or bias == float("-inf") or (is_causal and j > i + keys - queries):
                continue
            pairs = zip(q[b, i, h].tolist(), k[b, j, h // group].tolist(), strict=True)
            scores[j] = scale * sum(x * y for x, y in pairs) + bias
        if not scores:
            continue
        total = sum(math.exp(score) for score in scores.values())
        lse[b, h, i] = math.log(total)
        for d in range(head_dim):
            out[b, i, h, d] = sum(
                math.exp(score) / total * v[b, j, h // group, d].item()
                for j, score in scores.items()
            )
    return out, lse


@pytest.mark.parametrize("mask_kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 5), (5, 3)])
def test_the_oracle_agrees_with_attention_by_hand(
    mask_kind: str, is_causal: bool, queries: int, keys: int
) -> None:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(2, queries, 4, 3, generator=generator)
    k, v = (torch.randn(2, keys, 2, 3, generator=generator) for _ in range(2))
    mask = None
    if mask_kind != "none":
        mask = torch.rand(2, 4, queries, keys, generator=generator) < 0.6
        mask[:, :, 1] = False
    if mask_kind == "additive":
        bias = torch.randn(2, 4, queries, keys, generator=generator)
        mask = bias.masked_fill(~mask, float("-inf"))
    arguments: Any = {"mask": mask, "is_causal": is_causal, "scale": 0.7}
    expected, expected_lse = by_hand(q, k, v, **arguments)
    out, lse = oracle.attention(q, k, v, return_lse=True, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    plain, plain_lse = oracle.same_precision_attention(q, k, v, **arguments)
    torch.testing.assert_close(plain.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_lse.double(), expected_lse, rtol=1e-4, atol=1e-5)


def test_the_oracle_never_touches_hidden_keys() -> None:
    """NaN behind a mask [B, Sk] changes neither the result nor the gradients."""
    q, k, v = (torch.randn(2, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    allowed = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    hidden = ~allowed[:, :, None, None]
    planted = [each.masked_fill(hidden, float("nan")) for each in (k, v)]
    out = oracle.attention(q, *planted, mask=allowed)
    short = oracle.attention(q[:1], k[:1, :3], v[:1, :3])
    torch.testing.assert_close(out[:1], short)
    assert (out[1] == 0).all()
    assert all(each.isfinite().all() for each in torch.autograd.grad(out.sum(), (q, k, v)))


def test_each_measure_sees_what_it_is_for() -> None:
    expected = torch.randn(2, 50, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    assert measure(expected, expected) == Errors(0, 0, 0, measure(expected, expected).cosine)
    assert measure(expected, expected).cosine < 1e-12
    scaled = measure(expected * 1.05, expected)
    assert scaled.cosine < 1e-12, "cosine alone does not see a wrong denominator"
    assert math.isclose(scaled.norm, 0.05, rel_tol=1e-6)
    one_row = expected.clone()
    one_row[1, 7, 2] = 0
    assert measure(one_row, expected).worst_row > 0.99
    assert measure(one_row, expected).relative_l1 < 0.01
    assert measure(-expected, expected).cosine > 1.99
    allowed = budget("exact", torch.float32, measure(expected, expected))
    assert excess(measure(expected, expected), allowed) is None
    assert "norm" in str(excess(scaled, allowed))
    assert excess(measure(expected * float("nan"), expected), allowed) is not None
    assert excess(measure(torch.zeros_like(expected), expected), QUANTIZED_BUDGET) is not None


# --- other kinds of backend -----------------------------------------------------------------------

NOT_IN_THIS_PROCESS = {"test_listing_loads_no_kernel"}  # it asks a process that has no such plugin


def outcomes(kit: Any) -> dict[str, str]:
    """Every kit test but those that need an installed plugin: passed, skipped or what it says."""
    found = {}
    for test in sorted(set(kit_tests()) - NOT_IN_THIS_PROCESS):
        try:
            getattr(kit, test)()
            found[test] = "passed"
        except Skipped:
            found[test] = "skipped"
        except Exception as error:
            found[test] = f"{type(error).__name__}: {error}"
    return found


def test_quantized_backends_have_their_own_budget(broken: Any) -> None:
    quantized = spec(
        kind="quantized", capabilities=capabilities(accuracy="quantized", deterministic=False)
    )
    with isolated_registry(quantized):
        broken("quantization_noise")
        for test in ("test_lengths", "test_boolean_mask", "test_grouped_queries", "test_causal"):
            assert failure(kit_for(), test) is None
    for defect, test in (
        ("heavy_noise", "test_lengths"),
        ("denominator", "test_lengths"),
        ("mask_ignored", "test_boolean_mask"),
        ("gqa_order", "test_grouped_queries"),
    ):
        with isolated_registry(quantized):
            broken(defect)
            assert failure(kit_for(), test) is not None, defect


SPARSE = spec(
    kind="sparse",
    capabilities=capabilities(**{**BARE, "needs_grid": True, "accuracy": "approximate"}),
)


def test_sparse_backends_are_tested_on_their_grid(broken: Any) -> None:
    with isolated_registry(SPARSE):
        kit = kit_for(dense_config={"chunk": 0})
        found = outcomes(kit)
        assert {
            test: said for test, said in found.items() if said not in ("passed", "skipped")
        } == {}
        assert found["test_approximation_is_finite"] == "passed"
        assert found["test_lengths"] == "skipped"
        assert found["test_missing_grid_is_refused"] == "passed"
        kit.ledger.started.update(NOT_IN_THIS_PROCESS)
        kit.ledger.cases["laziness"] = 1
        kit.test_no_group_is_empty()
    for defect, dense in (("not_finite", None), ("denominator", {"chunk": 0})):
        with isolated_registry(SPARSE):
            broken(defect)
            said = failure(kit_for(dense_config=dense), "test_approximation_is_finite")
            assert said is not None, defect


class AlwaysDense(ScheduledConfig):
    """A schedule that never leaves the dense phase."""

    dense_steps: int | float = Field(1.0, ge=0, description="All of them.")


def test_another_backend_in_its_place_does_not_count() -> None:
    """The kit looks at what ran, not only at what came out."""
    exact = spec(name="other", aliases={})
    with isolated_registry(SPARSE.model_copy(update={"config": AlwaysDense}), exact):
        said = failure(kit_for(), "test_approximation_is_finite")
        assert said is not None
        assert "served by ['other']" in said
        kit = kit_for(configs=({"dense_steps": 3, "dense_layers": 0.9},))
        assert failure(kit, "test_approximation_is_finite") is None


# --- whole runs, in processes of their own --------------------------------------------------------


def run_pytest(folder: Path, source: str, *arguments: str) -> tuple[int, str]:
    """pytest in a fresh process that finds what is in ``folder``; the exit code and its output."""
    (folder / "test_inner.py").write_text(source, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "polyattn.testing.plugin",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, *arguments, "-rA", "--tb=line", "test_inner.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def install_plain(folder: Path, source: str | None = None, **fields: Any) -> Path:
    return fake_distribution(
        folder,
        "polyattn-plain",
        "1.0",
        {"plain": "plain_backend"},
        source if source is not None else SOURCE.read_text(encoding="utf-8"),
        **fields,
    )


INNER = """
from polyattn.testing import BackendConformance

class TestPlain(BackendConformance):
    backend = "plain"
    configs = ({}, {"chunk": 32})
"""


def test_the_right_backend_passes_everything(tmp_path: Path) -> None:
    """An installed, correct backend: nothing fails, every group that applies is counted."""
    code, output = run_pytest(install_plain(tmp_path), INNER)
    assert code == 0, output
    summary = next(line for line in output.splitlines() if line.startswith("plain (TestPlain): "))
    counts = dict(re.findall(r"(\w+) (\d+)[,;]", f"{summary.partition(';')[0]};"))
    assert set(counts) == set(GROUPS), summary
    assert int(counts["numerics"]) > 100
    assert int(counts["semantics"]) > 200
    passed = set(re.findall(r"PASSED \S+::(test_\w+)", output))
    skippable = {"test_approximation_is_finite", "test_extras_are_taken", "test_cuda_graphs",
                 "test_missing_grid_is_refused"}  # fmt: skip
    assert set(kit_tests()) - passed == skippable
    assert "test_no_group_is_empty" in passed


KNOWN = """
from polyattn.testing import BackendConformance

class TestListed(BackendConformance):
    backend = "plain"
    known_failures = {"test_summary_and_documentation": "the summary is still to be written"}
"""


@pytest.mark.parametrize(("summary", "code", "word"), [(" ", 0, "XFAIL"), ("Fine", 1, "FAILED")])
def test_known_failures_must_fail(tmp_path: Path, summary: str, code: int, word: str) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    source = source.replace("Attention written out in torch, for tests", summary)
    found, output = run_pytest(install_plain(tmp_path, source), KNOWN, "-k", "metadata or summary")
    assert found == code, output
    assert re.search(rf"{word} \S*test_summary_and_documentation", output), output


EAGER_PLUGINS = {
    "import torch": "imports torch",
    "import json; print('hello')": "hello",
    "import heavy_kernel": "imports heavy_kernel",
}


@pytest.mark.parametrize("line", [None, *EAGER_PLUGINS])
def test_listing_must_stay_lazy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str | None
) -> None:
    """torch, the required distributions, and prints: none of them while a backend is listed."""
    source = SOURCE.read_text(encoding="utf-8")
    if line is not None:
        source = source.replace("import math\n", f"import math\n{line}\n", 1)
    install_plain(tmp_path, source, requires=["Heavy-Kernel-Dist>=1"])
    fake_distribution(tmp_path, "Heavy.Kernel_Dist", "2.0", {}, {"heavy_kernel": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    discovery.registry.cache_clear()
    try:
        said = failure(kit_for(), "test_listing_loads_no_kernel")
    finally:
        monkeypatch.undo()
        discovery.registry.cache_clear()
    if line is None:
        assert said is None
    else:
        assert said is not None
        assert EAGER_PLUGINS[line] in said


# --- isolation ------------------------------------------------------------------------------------


def test_isolation_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = discovery.registry()
    saved = settings.current_settings()
    monkeypatch.setenv("POLYATTN_PLUGINS", "")
    with pytest.raises(RuntimeError, match="in the block"):
        with isolated_registry(plain_backend.SPEC) as found:
            assert list(found.backends) == ["plain"]
            assert discovery.registry() is found
            assert found.backends["plain"].distribution == "polyattn-plain"
            polyattn.configure("plain")
            polyattn.force_backend("plain")
            assert selection.select(head_dim=64).chosen == "plain"
            with isolated_registry() as nothing:
                assert not nothing.backends
                assert settings.forced() is None
            assert settings.forced() == "plain"
            assert list(discovery.registry().backends) == ["plain"]
            assert os.environ["POLYATTN_PLUGINS"] == ""
            raise RuntimeError("in the block")
    monkeypatch.undo()
    discovery.registry.cache_clear()
    assert list(discovery.registry().backends) == list(before.backends)
    assert settings.current_settings() is saved
    assert settings.forced() is None


def test_decisions_do_not_outlive_the_registry(broken: Any) -> None:
    q = torch.ones(1, 4, 1, 64)
    results = []
    for defect in (None, "not_finite"):
        with isolated_registry(plain_backend.SPEC):
            broken(defect)
            results.append(bool(polyattn.attention(q, q, q).isfinite().all()))
    assert results == [True, False]


def test_a_fake_distribution_counts_as_installed(tmp_path: Path) -> None:
    """In a bare process, with nothing but PYTHONPATH: version, requirements and modules."""
    install_plain(tmp_path, requires=["some-kernel>=2,<3"])
    program = (
        "from polyattn.discovery import registry\n"
        "found = registry().backends['plain']\n"
        "print(found.distribution, found.version, *found.spec.requirements)\n"
        "import importlib_metadata\n"
        "print(importlib_metadata.packages_distributions()['plain_backend'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "POLYATTN_PLUGINS": "plain"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("polyattn-plain 1.0 distribution='some-kernel' specifier='<3,>=2'")
    assert second == "['polyattn-plain']"


def test_a_fake_distribution_of_several_modules(tmp_path: Path) -> None:
    modules = {"inner_package.plugin": "X = 1\n", "other": "Y = 2\n"}
    fake_distribution(tmp_path, "many", "1", {"a": "inner_package.plugin", "b": "other"}, modules)
    assert (tmp_path / "inner_package" / "__init__.py").exists()
    with pytest.raises(ValueError, match="one module"):
        fake_distribution(tmp_path, "unclear", "1", {"a": "one", "b": "two"}, "")
