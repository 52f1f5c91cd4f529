"""Block-sparse attention against a token-level oracle, and the choice among providers."""

from __future__ import annotations

import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from strategies import oracle, plans, random_plan, random_tensors, token_mask

import polyattn_kernels
from polyattn_kernels import (
    AttentionInputError,
    BlockSparsePlan,
    PlanError,
    ProviderError,
    attention,
    block_sparse_attention,
    which_provider,
)
from polyattn_kernels._triton_support import triton_reasons
from polyattn_kernels.providers import fa4, flex, reference

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def hold(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    *,
    scale: float | None = None,
    run: Callable[..., Any] = block_sparse_attention,
) -> None:
    """Out and lse of a call are those of the oracle, on the same rounded inputs."""
    expected, expected_lse = oracle(q, k, v, plan, scale=scale)
    out, lse = run(q, k, v, plan, scale=scale, return_lse=True)
    assert out.dtype is q.dtype
    assert out.is_contiguous()
    assert lse.dtype is torch.float32
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-6)
    blind = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert out[blind.transpose(1, 2)].count_nonzero() == 0
    alone = run(q, k, v, plan, scale=scale)
    assert torch.equal(alone, out)


# --- numbers --------------------------------------------------------------------------------------


@given(
    plan=plans(),
    seed=st.integers(0, 1 << 20),
    batch=st.integers(1, 2),
    groups=st.sampled_from((1, 2, 4)),
    dtype=st.sampled_from(tuple(TOLERANCE)),
    head_dim=st.sampled_from((1, 32, 80)),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_every_kind_of_plan(
    plan: BlockSparsePlan,
    seed: int,
    batch: int,
    groups: int,
    dtype: torch.dtype,
    head_dim: int,
    strided: bool,
) -> None:
    heads = plan.heads if plan.heads > 1 else groups
    q, k, v = random_tensors(
        plan,
        seed,
        batch=plan.batch if plan.batch > 1 else batch,
        heads=heads,
        kv_heads=heads // groups if heads % groups == 0 else heads,
        head_dim=head_dim,
        dtype=dtype,
        strided=strided,
    )
    given_tensors = [each.clone() for each in (q, k, v)]
    hold(q, k, v, plan)
    for now, before in zip((q, k, v), given_tensors, strict=True):
        torch.testing.assert_close(now, before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dimensions(head_dim: int, dtype: torch.dtype) -> None:
    plan = random_plan(head_dim, queries="ragged", keys="variable", heads=2, permute_keys=True)
    q, k, v = random_tensors(
        plan, heads=4 if plan.heads == 1 else 2, head_dim=head_dim, dtype=dtype
    )
    hold(q, k, v, plan)


@pytest.mark.parametrize("magnitude", [1e-6, 1e3, 1e5])
def test_tiny_and_huge_scores(magnitude: float) -> None:
    plan = random_plan(5, keys="ragged", density=0.5)
    q, k, v = random_tensors(plan, magnitude=magnitude, dtype=torch.float64)
    hold(q, k, v, plan)
    # In float32, scores of this size differ by more than their rounding only where one key wins.
    out = block_sparse_attention(q.float(), k.float(), v.float(), plan)
    assert out.isfinite().all()


@pytest.mark.parametrize("scale", [0.3, 1, -0.7, 0.0, -1e-30, 50.0])
def test_scales_of_any_sign(scale: float) -> None:
    plan = random_plan(6, keys="ragged", density=0.5, batch=2)
    q, k, v = random_tensors(plan, batch=2, dtype=torch.float64)
    hold(q, k, v, plan, scale=scale)


def test_one_token() -> None:
    plan = BlockSparsePlan.full(query_length=1, key_length=1, query_block=16, key_block=16)
    q, k, v = random_tensors(plan)
    out, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse[0, 0, 0], (q * k).sum() / math.sqrt(32))


def test_a_plan_that_attends_to_nothing_gives_zeros() -> None:
    plan = BlockSparsePlan.from_mask(
        torch.zeros(1, 1, 2, 2, dtype=torch.bool),
        query_length=32,
        key_length=32,
        query_block=16,
        key_block=16,
    )
    q, k, v = (torch.full((1, 32, 2, 8), math.nan) for _ in range(3))
    out, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
    assert out.count_nonzero() == 0
    assert (lse == -math.inf).all()


def test_a_non_finite_key_or_value_reaches_those_who_attend_to_it_and_nobody_else() -> None:
    plan = random_plan(11, density=0.4, empty_rows=False)
    q, k, v = random_tensors(plan, heads=1, poison=False)
    clean = block_sparse_attention(q, k, v, plan)
    sees = token_mask(plan, 1, 1)[0, 0, :, 20]
    assert sees.any()
    assert not sees.all()
    k[0, 20] = math.nan
    out = block_sparse_attention(q, k, v, plan)[0, :, 0]
    assert out[sees].isnan().all()
    torch.testing.assert_close(out[~sees], clean[0, ~sees, 0])
    k[0, 20] = 0
    v[0, 20, 0, 3] = math.inf
    out = block_sparse_attention(q, k, v, plan)[0, :, 0]
    assert torch.equal(~out.isfinite(), sees[:, None] & (torch.arange(32) == 3))


@pytest.mark.parametrize("block_by_block", [False, True])
def test_infinite_values_are_those_of_dense_attention(
    block_by_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both ways of the reference: of one sign, of both, with NaN, and of weight zero."""
    monkeypatch.setattr(reference, "FEW_QUERIES", 0 if block_by_block else 1 << 30)
    plan = random_plan(11, density=0.4, empty_rows=False)
    q, k, v = random_tensors(plan, heads=2, kv_heads=1, poison=False, dtype=torch.float64)
    for token, channel, value in (
        (20, 3, math.inf), (20, 4, -math.inf), (20, 5, math.nan), (21, 5, math.inf),
        (20, 6, math.inf), (40, 6, -math.inf), (50, 7, math.inf),
    ):  # fmt: skip
        v[0, token, 0, channel] = value
    q[..., 0] = 1
    k[0, 50, 0] = 0
    k[0, 50, 0, 0] = -1e6  # weighs nothing
    mask = token_mask(plan, 1, 2)
    expected = torch.zeros_like(q)
    for head in range(2):
        for query in range(q.shape[1]):
            seen = mask[0, head, query].nonzero()[:, 0]
            weights = (k[0, seen, 0] @ q[0, query, head] * 32**-0.5).softmax(0)
            expected[0, query, head] = weights @ v[0, seen, 0]
    assert all(each(expected[..., 3:8]).any() for each in (torch.isposinf, torch.isneginf))
    found = block_sparse_attention(q, k, v, plan, provider="reference")
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_reference_gives_the_same_a_few_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = random_plan(7, queries="variable", keys="ragged", heads=4, permute_queries=True)
    q, k, v = random_tensors(plan, heads=4, kv_heads=2)
    whole = block_sparse_attention(q, k, v, plan, return_lse=True)
    monkeypatch.setattr(reference, "MOST_SCORES", 4 * plan.key_length * 3)
    parts = block_sparse_attention(q, k, v, plan, return_lse=True)
    torch.testing.assert_close(parts, whole)


# --- gradients ------------------------------------------------------------------------------------


def test_a_call_that_would_need_a_gradient_is_refused() -> None:
    plan = random_plan(0)
    q, k, v = random_tensors(plan)
    k.requires_grad_()
    with pytest.raises(AttentionInputError, match="forward only"):
        block_sparse_attention(q, k, v, plan)
    with torch.no_grad():
        assert block_sparse_attention(q, k, v, plan).isfinite().all()


def test_the_reference_is_differentiable_by_itself() -> None:
    plan = random_plan(2, queries="ragged", keys="ragged", density=0.3, heads=2)
    q, k, v = random_tensors(plan, heads=2, dtype=torch.float64)
    mask = token_mask(plan, 1, 2)
    dead_queries, dead_keys = ~mask.any(3).transpose(1, 2), ~mask.any(2).transpose(1, 2)
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    out, _ = reference.run(*leaves, plan, 0.2, False)
    weight = torch.randn(out.shape, dtype=torch.float64)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    # The same through dense attention over zeros where nobody looks; blind rows are left out.
    zeros = [
        each.masked_fill(dead.unsqueeze(-1), 0).requires_grad_()
        for each, dead in ((q, dead_queries), (k, dead_keys), (v, dead_keys))
    ]
    scores = zeros[0].transpose(1, 2) @ zeros[1].transpose(1, 2).mT * 0.2
    scores = scores.masked_fill(~mask & mask.any(-1, keepdim=True), -math.inf)
    dense = (scores.softmax(-1) @ zeros[2].transpose(1, 2)).transpose(1, 2)
    weight = weight.masked_fill(dead_queries.unsqueeze(-1), 0)
    expected = torch.autograd.grad((dense * weight).sum(), zeros)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# --- arguments ------------------------------------------------------------------------------------


def short_plan(**rest: Any) -> BlockSparsePlan:
    return random_plan(0, query_length=20, key_length=24, shared=False, **rest)


def tensors(**changes: Any) -> dict[str, Any]:
    plan = short_plan()
    q, k = torch.zeros(2, 20, 4, 8), torch.zeros(2, 24, 2, 8)
    return {"q": q, "k": k, "v": k.clone(), "plan": plan, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(20, 4, 8)}, "q must be .batch, tokens, heads, channels"),
        ({"plan": "a plan"}, "must be a BlockSparsePlan, found str"),
        ({"k": torch.zeros(2, 24, 2, 8).half()}, "share one dtype"),
        ({"q": torch.zeros(2, 20, 4, 8).int()}, "share one dtype"),
        ({"v": torch.zeros(2, 24, 4, 8)}, "do not fit together"),
        ({"q": torch.zeros(2, 20, 4, 9)}, "do not fit together"),
        ({"q": torch.zeros(1, 20, 4, 8)}, "do not fit together"),
        ({"q": torch.zeros(2, 20, 3, 8)}, "a multiple of key heads"),
        ({"q": torch.zeros(2, 21, 4, 8)}, "for 20 queries and 24 keys, found 21 and 24"),
        ({"q": torch.zeros(2, 20, 4, 8, device="meta")}, "q is on meta, the plan on cpu"),
        ({"plan": short_plan(batch=3)}, "3 batch items"),
        ({"plan": short_plan(heads=3)}, "3 heads"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"scale": math.inf}, "scale must be a finite number"),
        ({"scale": 3e38}, "scale must be a finite number, .* found 3e[+]38"),
        ({"scale": "1"}, "scale must be a finite number, found '1'"),
        ({"q": None}, "q must be a tensor, found NoneType"),
        (
            {name: torch.zeros(2, 4, n, 8) for name, n in (("q", 20), ("k", 24), ("v", 24))},
            r"20 queries and 24 keys, found 4 and 4\n  Try: q.transpose\(1, 2\)",
        ),
    ],
)
def test_arguments_that_nobody_could_take_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AttentionInputError, match=said):
        block_sparse_attention(**tensors(**changes))


@pytest.mark.parametrize("dim", [0, 257])
def test_head_dimensions_out_of_range_are_refused(dim: int) -> None:
    q, k = torch.zeros(2, 20, 4, dim), torch.zeros(2, 24, 2, dim)
    with pytest.raises(AttentionInputError, match=f"1 to 256, found {dim}"):
        block_sparse_attention(**tensors(q=q, k=k, v=k))


# --- providers ------------------------------------------------------------------------------------


def test_on_a_cpu_the_reference_runs() -> None:
    arguments = tensors()
    choice = which_provider(arguments["plan"], arguments["q"], arguments["k"], arguments["v"])
    assert (choice.name, dict(choice.passed_over)) == ("reference", {})
    with pytest.raises(AttentionInputError):
        which_provider(arguments["plan"], arguments["q"], arguments["q"], arguments["v"])


def test_a_wrong_plan_is_named_on_a_cpu() -> None:
    plan = random_plan(0, permute_keys=True)
    q, k, v = random_tensors(plan)
    indices = torch.where(plan.key_indices == plan.key_indices[0, 0, 1, 0], 10**6, plan.key_indices)
    with pytest.raises(PlanError, match="key_indices must be .* found 1000000 at"):
        block_sparse_attention(q, k, v, replace(plan, key_indices=indices))
    with pytest.raises(PlanError, match="key_permutation must hold"):
        order = torch.full_like(plan.key_permutation, -7)
        block_sparse_attention(q, k, v, replace(plan, key_permutation=order))


def test_what_the_gradient_error_advises_runs() -> None:
    plan = random_plan(0)
    q, k, v = random_tensors(plan, poison=False)
    with pytest.raises(AttentionInputError) as caught:
        block_sparse_attention(q.requires_grad_(), k, v, plan)
    advice = re.search(r"reference\.run\(q, k, v, plan, (.*), (.*)\)", str(caught.value))
    assert advice is not None
    reference.run(q, k, v, plan, float(advice[1]), advice[2] == "True")[0].sum().backward()
    assert q.grad is not None


def test_a_kernel_that_cannot_be_interpreted_does_not_advise_it() -> None:
    meta = torch.empty(1, device="meta")
    assert any("TRITON_INTERPRET=1" in reason for reason in triton_reasons(meta)) or (
        os.environ.get("TRITON_INTERPRET") == "1"
    )
    assert not any("INTERPRET" in reason for reason in triton_reasons(meta, interpretable=False))


def test_a_name_that_is_no_provider_is_refused_with_those_there_are() -> None:
    with pytest.raises(ProviderError, match="'tritton'; there are auto, reference, hopper, triton"):
        block_sparse_attention(**tensors(provider="tritton"))


@pytest.mark.parametrize("name", ["flex", "fa4"])
def test_a_named_provider_runs_or_gives_all_its_reasons(name: str) -> None:
    with pytest.raises(ProviderError) as caught:
        block_sparse_attention(**tensors(provider=name))
    for part in (f"provider '{name}' cannot serve BlockSparsePlan(", "found cpu", "16"):
        assert part in str(caught.value)


@pytest.fixture
def two_providers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """``auto`` tries ``first`` and then the reference; the dictionary holds why not ``first``."""
    why: dict[str, list[str]] = {"first": []}

    def run(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        return torch.full_like(q, 7), None

    first = SimpleNamespace(NAME="first", reasons=lambda *_: why["first"], run=run)
    monkeypatch.setattr(attention, "automatic_order", lambda *_: ("first", "reference"))
    load = attention.load
    monkeypatch.setattr(attention, "load", lambda name: first if name == "first" else load(name))
    return why


def test_the_first_provider_without_reasons_runs(two_providers: dict[str, list[str]]) -> None:
    arguments = tensors()
    plan, q, k, v = (arguments[name] for name in ("plan", "q", "k", "v"))
    assert which_provider(plan, q, k, v).name == "first"
    assert (block_sparse_attention(**arguments) == 7).all()
    two_providers["first"] = ["too small", "too blue"]
    choice = which_provider(plan, q, k, v)
    assert choice.name == "reference"
    assert dict(choice.passed_over) == {"first": ("too small", "too blue")}
    assert "not first: too small; too blue" in str(choice)
    assert (block_sparse_attention(**arguments) != 7).all()


@pytest.mark.parametrize(("scale", "sign"), [(0.3, 1), (-0.3, -1), (0.0, 0)])
def test_providers_meet_positive_scales_only(
    monkeypatch: pytest.MonkeyPatch, scale: float, sign: int
) -> None:
    met = []

    def run(q: torch.Tensor, k: Any, v: Any, plan: Any, scale: float, lse: bool) -> Any:
        met.append((q, scale))
        return torch.zeros_like(q), None

    monkeypatch.setattr(reference, "run", run)
    arguments = tensors(q=torch.ones(2, 20, 4, 8))
    block_sparse_attention(**arguments, scale=scale)
    ((q, found),) = met
    assert found > 0
    torch.testing.assert_close(q * found, arguments["q"] * scale)
    assert (q.sign() == sign).all()


def test_importing_imports_no_kernel_and_no_dispatcher() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import polyattn_kernels.attention; "
        "from polyattn_kernels.providers import fa4, flex, triton; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = set(found.stdout.split())
    assert "polyattn_kernels" in roots
    assert not roots & {"triton", "flash_attn", "polyattn", "cutlass"}


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
def test_compiles_without_a_graph_break(kind: Any) -> None:
    plan = random_plan(4, queries=kind, keys=kind, heads=2, permute_queries=True, permute_keys=True)
    q, k, v = random_tensors(plan, heads=2)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan) -> Any:
        return block_sparse_attention(q * 2, k, v, plan, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(q, k, v, plan), attend(q, k, v, plan))
    assert len(graphs) == 1
    assert "polyattn_kernels.block_sparse_attention" in graphs[0].print_readable(False)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="older releases of torch.compile drop an error's text (seen with torch 2.11)",
)
def test_errors_are_told_from_inside_a_compiled_function() -> None:
    plan = BlockSparsePlan.full(query_length=100, key_length=100)
    attend = torch.compile(
        lambda q: block_sparse_attention(q, q, q, plan), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="for 100 queries and 100 keys, found 90 and 90"):
        attend(torch.randn(1, 90, 2, 16))
    static = torch.compile(
        lambda q: BlockSparsePlan.from_static(
            [[True]], query_length=16, key_length=16, query_block=16, key_block=16
        ).density(),
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(Exception, match=r"outside of torch\.compile"):
        static(torch.randn(1))


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(AttentionInputError("what", hint="this")))
    assert (str(error), error.message, error.hint) == ("what\n  Try: this", "what", "this")


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_plan_can_be_built_inside_a_compiled_function() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor) -> Any:
        plan = BlockSparsePlan.from_mask(
            scores > 0, query_length=64, key_length=48, query_block=16, key_block=16, capacity=2
        )
        return block_sparse_attention(q, k, v, plan)

    q, k, v = torch.randn(1, 64, 2, 8), torch.randn(1, 48, 2, 8), torch.randn(1, 48, 2, 8)
    scores = torch.randn(1, 2, 4, 3)
    scores[..., 0] = -1
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, scores), attend(q, k, v, scores))
    with pytest.raises(RuntimeError, match="capacity=2"):
        compiled(q, k, v, torch.ones_like(scores))


def test_the_operator_is_what_its_fake_says() -> None:
    plan = random_plan(4, queries="ragged", keys="variable", permute_keys=True, heads=2)
    q, k, v = random_tensors(plan, heads=2, poison=False)
    parts = [getattr(plan, name) for name in attention._PLAN_TENSORS]
    for return_lse in (False, True):
        torch.library.opcheck(
            torch.ops.polyattn_kernels.block_sparse_attention.default,
            (q, k, v, *parts, plan.query_block, plan.key_block, 0.2, return_lse, "auto"),
        )


# --- FlexAttention --------------------------------------------------------------------------------


def on_gpu(
    plan: BlockSparsePlan, *, dtype: torch.dtype = torch.bfloat16, heads: int = 4, dim: int = 128
) -> tuple[Any, Any, Any]:
    """What the reasons of a provider look at of q, k and v on a GPU that is not here."""

    def tensor(length: int, planes: int) -> Any:
        shape = torch.Size((1, length, planes, dim))
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape)

    return tensor(plan.query_length, heads), *(tensor(plan.key_length, 2) for _ in range(2))


def blocks_of(query_block: int, key_block: int, **rest: Any) -> BlockSparsePlan:
    return random_plan(
        3, query_length=300, key_length=400, query_block=query_block, key_block=key_block, **rest
    )


@pytest.mark.parametrize(
    ("plan", "changes", "said"),
    [
        (blocks_of(128, 128), {}, []),
        (blocks_of(128, 256, queries="ragged", keys="ragged"), {}, []),
        (blocks_of(64, 128), {}, ["query blocks of multiples of 128, found blocks of 64"]),
        (blocks_of(128, 64, keys="variable"), {}, ["key blocks .* found variable"]),
        (blocks_of(128, 128, permute_keys=True), {}, ["no key permutation"]),
        (blocks_of(128, 128), {"dtype": torch.float64, "dim": 8}, ["float64", "from 16, found 8"]),
    ],
)
def test_reasons_of_flex(plan: BlockSparsePlan, changes: dict[str, Any], said: list[str]) -> None:
    found = flex.reasons(plan, *on_gpu(plan, **changes))
    assert len(found) == len(said)
    for reason, words in zip(found, said, strict=True):
        assert re.search(words, reason)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.parametrize(
    ("queries", "keys", "kv_heads"),
    [("uniform", "uniform", 2), ("ragged", "ragged", 4), ("uniform", "ragged", 4)],
)
def test_flex_compiled_for_a_cpu(queries: Any, keys: Any, kv_heads: int) -> None:
    # On a CPU torch wants lists with room for every block, and returns no lse.
    plan = blocks_of(
        128, 128, queries=queries, keys=keys, batch=2, heads=4, spare_capacity=9, density=0.5
    )
    q, k, v = random_tensors(plan, batch=2, heads=4, kv_heads=kv_heads)
    expected, _ = oracle(q, k, v, plan, scale=0.2)
    out, lse = flex.run(q, k, v, plan, 0.2, False)
    assert lse is None
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


# --- FlashAttention 4 -----------------------------------------------------------------------------


class BlockSparseTensorsTorch(NamedTuple):
    """The fields, and their order, of the package's container."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: None = None,
    gather_kv_indices: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[None, None] = (None, None),
    learnable_sink: None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlashAttention 4 as of 4.0.0b36: its checks, its tuple, its two kinds of lists."""
    lists = block_sparse_tensors
    assert isinstance(lists, BlockSparseTensorsTorch)
    assert qv is gather_kv_indices is mask_mod is score_mod is None
    assert not causal
    assert pack_gqa is False
    assert lists.block_size in ((128, 128), (64, 64))
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    for each in (q, k, v):
        assert each.data_ptr() % 16 == 0
        assert all(stride * each.element_size() % 16 == 0 for stride in each.stride()[:-1])
    rows, columns = lists.block_size
    for count, index in (lists[0:2], lists[2:4]):
        assert count.dtype is index.dtype is torch.int32
        assert count.shape[2] == index.shape[2] == -(-q.shape[1] // rows)
        assert index.shape[3] <= -(-k.shape[1] // columns)
        for shape in (count.shape, index.shape):
            assert shape[0] in (1, q.shape[0])
            assert shape[1] in (1, q.shape[2])
    assert lists.mask_block_cnt.count_nonzero() == 0
    plan = BlockSparsePlan(
        query_length=q.shape[1],
        key_length=k.shape[1],
        query_block=rows,
        key_block=columns,
        key_counts=lists.full_block_cnt,
        key_indices=lists.full_block_idx,
    )
    out, lse = oracle(q, k, v, plan, scale=softmax_scale)
    return out.to(q.dtype), lse.float() if return_lse else None


@pytest.fixture
def flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package, whatever is installed here, on a GPU of compute capability 9.0."""
    interface = ModuleType("flash_attn.cute.interface")
    interface.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    sparsity = ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch  # type: ignore[attr-defined]
    for module in (ModuleType("flash_attn"), ModuleType("flash_attn.cute"), interface, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fa4.metadata, "version", lambda name: {"flash-attn-4": "4.0.0b36"}[name])
    monkeypatch.setattr(fa4, "_capability", lambda device: (9, 0))
    fa4._functions.cache_clear()
    fa4._package_reason.cache_clear()
    yield
    fa4._functions.cache_clear()
    fa4._package_reason.cache_clear()


@pytest.mark.usefixtures("flash_attention_4")
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("return_lse", [False, True])
def test_fa4_is_called_as_documented(block: int, return_lse: bool) -> None:
    plan = blocks_of(block, block, heads=4)
    q, k, v = random_tensors(
        plan, heads=4, kv_heads=2, head_dim=40, dtype=torch.bfloat16, strided=True
    )
    assert fa4.reasons(plan, *on_gpu(plan)) == []
    out, lse = fa4.run(q, k, v, plan, 0.3, return_lse)
    expected, expected_lse = oracle(q, k, v, plan, scale=0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    assert (lse is None) is not return_lse
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("flash_attention_4")
@pytest.mark.parametrize("channels", [slice(3, 43), slice(0, 40)])
def test_fa4_is_given_rows_that_it_can_read(channels: slice) -> None:
    plan = blocks_of(64, 64)
    q, k, v = random_tensors(plan, head_dim=44, dtype=torch.float16, poison=False)
    q, k, v = (each[..., channels] for each in (q, k, v))
    out, _ = fa4.run(q, k, v, plan, 0.3, False)
    expected, _ = oracle(q, k, v, plan, scale=0.3)
    torch.testing.assert_close(out.double(), expected, atol=3e-3, rtol=3e-3)


@pytest.mark.usefixtures("flash_attention_4")
@pytest.mark.parametrize(
    ("plan", "changes", "said"),
    [
        (blocks_of(128, 64), {}, "found 128 x 64"),
        (blocks_of(128, 128, keys="variable"), {}, "found 128 x variable"),
        (blocks_of(128, 128, keys="ragged"), {}, "takes no key lengths"),
        (blocks_of(64, 64, permute_queries=True), {}, "takes no query permutation"),
        (blocks_of(64, 64), {"dtype": torch.float32}, "found float32"),
        (blocks_of(64, 64), {"dim": 36}, "found 36"),
        (blocks_of(64, 64), {"dim": 192}, "found 192"),
    ],
)
def test_reasons_of_fa4(plan: BlockSparsePlan, changes: dict[str, Any], said: str) -> None:
    (reason,) = fa4.reasons(plan, *on_gpu(plan, **changes))
    assert said in reason


@pytest.mark.usefixtures("flash_attention_4")
def test_fa4_says_which_gpu_and_which_package_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = blocks_of(128, 128)
    monkeypatch.setattr(fa4, "_capability", lambda device: (10, 0))
    assert fa4.reasons(plan, *on_gpu(plan)) == ["runs on compute capability 9.0, found 10.0"]
    monkeypatch.setattr(fa4, "_capability", lambda device: (9, 0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert fa4.reasons(plan, *on_gpu(plan)) == ["runs on CUDA, found ROCm"]
    for version, accepted in (
        ("4.0.0b35", False),
        ("4.0.0b36", True),
        ("4.0.0rc1", True),
        ("4.1.2", True),
        ("5.0", False),
        ("3.0.0", False),
    ):
        monkeypatch.setattr(fa4.metadata, "version", lambda name, found=version: found)
        fa4._package_reason.cache_clear()
        reasons = fa4.reasons(plan, *on_gpu(plan))
        assert (reasons == []) is accepted
        assert accepted or version in reasons[0]


@pytest.mark.usefixtures("flash_attention_4")
def test_a_package_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = blocks_of(128, 128)
    monkeypatch.delattr(sys.modules["flash_attn.cute.interface"], "flash_attn_func")
    fa4._functions.cache_clear()
    (reason,) = fa4.reasons(plan, *on_gpu(plan))
    assert "does not load under torch" in reason
    assert "flash_attn_func" in reason
    with pytest.raises(ProviderError, match="flash_attn_func"):
        fa4.run(*random_tensors(plan), plan, 0.3, False)


def test_without_the_package_fa4_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise fa4.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(fa4.metadata, "version", version)
    fa4._package_reason.cache_clear()
    try:
        plan = blocks_of(128, 128)
        assert 'pip install "polyattn-kernels[fa4]"' in fa4.reasons(plan, *random_tensors(plan))[-1]
    finally:
        fa4._package_reason.cache_clear()


def test_everything_public_is_there() -> None:
    for name in polyattn_kernels.__all__:
        assert getattr(polyattn_kernels, name) is not None
