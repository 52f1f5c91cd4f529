"""vmoba_attn against a token-by-token oracle, its limits, its layers, and its errors."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import polyattn
import polyattn_kernels
import polyattn_vmoba
from polyattn.config import load_config, validate
from polyattn.contract import AttentionCall
from polyattn.discovery import registry
from polyattn.errors import BackendUnavailableError, ConfigError, InputError
from polyattn.reporting import Report, reporting_to
from polyattn_kernels import BlockSparsePlan
from polyattn_vmoba import attention as implementation
from polyattn_vmoba import selection
from polyattn_vmoba.config import VmobaConfig


def _sibling(name: str) -> Any:
    """A module beside this one; tests are imported by path, so there is no package to ask."""
    spec = importlib.util.spec_from_file_location(
        f"vmoba_{name}", Path(__file__).parent / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = _sibling("oracle")
Case = oracle.Case
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
PREFIX = {"temporal": "temporal", "spatial": "spatial", "spatiotemporal": "st"}


def config_of(case: Any) -> dict[str, Any]:
    """A configuration with one kind of layer, for any layer and step."""
    prefix = PREFIX[case.kind]
    config: dict[str, Any] = {f"{each}_layer": int(each == prefix) for each in PREFIX.values()}
    config |= {f"{prefix}_chunk_size": case.chunk, "first_full_step": 0}
    config |= {"moba_select_mode": case.mode, "moba_threshold_type": case.pool}
    if case.mode == "topk":
        return config | {f"{prefix}_topk": case.topk}
    return config | {"moba_threshold": case.share}


def tensors(
    case: Any, *, batch: int = 1, heads: int = 2, kv_heads: int = 0, dim: int = 8, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        shape = (batch, case.length, count, dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads) * 1.5, draw(kv_heads or heads), draw(kv_heads or heads)


def run(
    case: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, valid_text: int | None = None,
    mask: torch.Tensor | None = None, scale: float | None = None,
    config: dict[str, Any] | None = None, **context: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    text = None
    if case.text_before + case.text_after:
        start = 0 if case.text_before else case.video
        text = polyattn.TextSpan(start, case.text_before + case.text_after, valid_text)
    with polyattn.forward_context(grid=case.grid, text=text, **context):
        return polyattn.attention(
            q, k, v, backend="vmoba_attn", config=config or config_of(case), attn_mask=mask,
            scale=scale, enable_gqa=q.shape[2] != k.shape[2], return_lse=True,
        )  # fmt: skip


def visible_keys(case: Any, valid_text: int | None, mask: torch.Tensor | None) -> torch.Tensor:
    visible = torch.ones(1, case.length, dtype=torch.bool)
    if valid_text is not None:
        start = 0 if case.text_before else case.video
        visible[:, start + valid_text : start + case.text_before + case.text_after] = False
    return visible if mask is None else visible & mask


def check(
    case: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, valid_text: int | None = None,
    mask: torch.Tensor | None = None, scale: float | None = None,
) -> None:  # fmt: skip
    """The call as a user makes it against the oracle, NaN planted in every hidden key."""
    batch = q.shape[0]
    visible = visible_keys(case, valid_text, mask).expand(batch, -1)
    hidden = ~visible[..., None, None]
    found, found_lse = run(
        case, q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan),
        valid_text=valid_text, mask=mask, scale=scale,
    )  # fmt: skip
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    sign = math.copysign(1.0, factor)  # a negative scale is one of -q
    for item in range(batch):
        queries, keys, values = (each[item].double().numpy() for each in (q * sign, k, v))
        seen = oracle.mask_of_tokens(case, queries, keys, visible[item].numpy())
        out, lse = oracle.attend(queries, keys, values, seen, abs(factor))
        tolerance = TOLERANCE[q.dtype]
        torch.testing.assert_close(
            found[item].double(),
            torch.from_numpy(out),
            atol=tolerance,
            rtol=tolerance,
            msg=f"{case}",
        )
        torch.testing.assert_close(
            found_lse[item].double(), torch.from_numpy(lse), atol=1e-4 + tolerance, rtol=1e-5
        )


def random_case(seed: int) -> Any:
    """Ragged grids, tiny ones, long thin ones; every mode and pool, often with text."""
    draw = random.Random(seed)
    grids = [(2, 3, 5), (3, 4, 4), (5, 2, 3), (1, 1, 17), (13, 1, 1), (1, 5, 6), (4, 3, 3)]
    grid = draw.choice(grids)
    kind = draw.choice(list(PREFIX))
    chunk: Any
    if kind == "temporal":
        chunk = draw.choice([1, 2, 0.5, 1.3]) if grid[1] * grid[2] > 1 else draw.choice([2, 3])
    else:
        sides = tuple(draw.randint(1, min(3, side + 1)) for side in grid)
        chunk = sides[1:] if kind == "spatial" else sides
    mode = draw.choice(["topk", "threshold"])
    pools = ["query_head", "query_head", "head_global", "overall"] + ["block"] * (mode != "topk")
    text = draw.choice([(0, 0), (0, 0), (6, 0), (0, 5)])
    return Case(
        grid, kind, chunk, mode, draw.choice(pools), topk=draw.randint(1, 4),
        share=draw.choice([0.0, 0.1, 0.25, 0.5, 0.9]), text_before=text[0], text_after=text[1],
    )  # fmt: skip


# --- the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_oracle(seed: int) -> None:
    """On random grids, chunks, modes, pools, text, padding, heads and scales."""
    draw = random.Random(1000 + seed)
    case = random_case(seed)
    batch = draw.choice([1, 1, 2])
    heads, kv_heads = draw.choice([(1, 1), (2, 2), (4, 2), (3, 1)])
    q, k, v = tensors(case, batch=batch, heads=heads, kv_heads=kv_heads, seed=seed)
    text = case.text_before + case.text_after
    valid_text = draw.choice([None, 0, 3]) if text else None
    mask = None
    if draw.random() < 0.4:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(batch, case.length, generator=generator) < draw.choice([0.3, 0.8])
    check(case, q, k, v, valid_text=valid_text, mask=mask, scale=draw.choice([None, 0.9, -0.2]))


def test_random_cases_reach_everything() -> None:
    """The cases above hold every mode with every pool, kind and place of text."""
    cases = [random_case(seed) for seed in range(60)]
    wanted = {("threshold", pool) for pool in ("query_head", "block", "head_global", "overall")}
    wanted |= {("topk", pool) for pool in ("query_head", "head_global", "overall")}
    assert {(case.mode, case.pool) for case in cases} == wanted
    assert {case.kind for case in cases} == set(PREFIX)
    assert {(case.text_before, case.text_after) for case in cases} == {(0, 0), (6, 0), (0, 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_other_dtypes(dtype: torch.dtype, mode: str) -> None:
    """Scores are of float32 whatever q is: in half precision other chunks would be picked."""
    case = Case((4, 4, 6), "spatiotemporal", (2, 2, 2), mode, "query_head", topk=4, text_after=5)
    check(case, *tensors(case, dtype=dtype, dim=32), valid_text=3)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("pool", ["query_head", "head_global"])
def test_turns_change_nothing(mode: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that are served a few at a time get what they get together."""
    case = Case((3, 4, 4), "spatial", (2, 2), mode, pool, topk=2, text_before=4)
    q, k, v = tensors(case, batch=2)
    whole, whole_lse = run(case, q, k, v)
    turns = []
    made = BlockSparsePlan.__init__

    def count(self: BlockSparsePlan, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        turns.append(self.query_length)

    monkeypatch.setattr(BlockSparsePlan, "__init__", count)
    monkeypatch.setattr(implementation, "TURN_BYTES", 20_000)
    parts, parts_lse = run(case, q, k, v)
    assert len(turns) > 3
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_lse, whole_lse)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("pool", ["query_head", "head_global"])
def test_a_slice_of_heads(mode: str, pool: str) -> None:
    """What one rank of a sequence-parallel group computes is what it would be of the whole."""
    case = Case((3, 4, 4), "spatiotemporal", (2, 2, 3), mode, pool, topk=2, text_after=4)
    q, k, v = tensors(case, heads=6, kv_heads=3)
    whole, whole_lse = run(case, q, k, v)
    part, part_lse = run(case, q[:, :, 2:4], k[:, :, 1:2], v[:, :, 1:2])
    torch.testing.assert_close(part, whole[:, :, 2:4])
    torch.testing.assert_close(part_lse, whole_lse[:, 2:4])


def test_strided_inputs() -> None:
    case = Case((3, 4, 4), "spatiotemporal", (2, 2, 3), "topk", "query_head", topk=2, text_after=4)
    packed = torch.randn(2, case.length, 3, 4, 16, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    before = packed.clone()
    strided = run(case, q, k, v)[0]
    torch.testing.assert_close(strided, run(case, *(x.contiguous() for x in (q, k, v)))[0])
    torch.testing.assert_close(packed, before, rtol=0, atol=0)
    check(case, *(x[..., ::2] for x in (q, k, v)))


# --- rules and limits -----------------------------------------------------------------------------


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = (each.transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


MODES_AND_POOLS = [
    *itertools.product(("topk", "threshold"), ("query_head", "head_global", "overall")),
    ("threshold", "block"),  # a pool that topk has not
]


@pytest.mark.parametrize(("mode", "pool"), MODES_AND_POOLS)
@pytest.mark.parametrize("text", [(0, 0), (3, 0), (0, 3)])
def test_everything_picked_is_dense(mode: str, pool: str, text: tuple[int, int]) -> None:
    case = Case((4, 3, 5), "spatiotemporal", (2, 2, 2), mode, pool, 99, 1.0, *text)
    q, k, v = tensors(case)
    torch.testing.assert_close(run(case, q, k, v)[0], dense(q, k, v), atol=1e-12, rtol=1e-12)


def test_one_chunk_is_dense() -> None:
    """A chunk larger than the grid is the grid."""
    for kind, chunk in (("temporal", 1e300), ("spatial", (99, 99)), ("spatiotemporal", (9, 9, 9))):
        case = Case((2, 3, 4), kind, chunk, "topk", "query_head")
        q, k, v = tensors(case)
        torch.testing.assert_close(run(case, q, k, v)[0], dense(q, k, v), atol=1e-12, rtol=1e-12)


def test_topk_of_one_is_the_own_chunk_alone() -> None:
    """The published code attends to everything then; here it is what is asked for."""
    case = Case((4, 2, 3), "temporal", 1, "topk", "query_head", topk=1)
    q, k, v = tensors(case)
    frames = [dense(*(x[:, i : i + 6] for x in (q, k, v))) for i in range(0, 24, 6)]
    torch.testing.assert_close(run(case, q, k, v)[0], torch.cat(frames, 1))


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_a_share_takes_one_other_chunk_at_least(share: float) -> None:
    case = Case((6, 2, 3), "temporal", 1, "threshold", "query_head", share=share)
    scores = torch.randn(1, 1, 36, 6, dtype=torch.float64)
    own = torch.arange(36) // 6
    scores.scatter_(-1, own[None, None, :, None], 10.0)  # the own chunk alone holds the share
    indices, counts = selection.select_share(
        scores, own, torch.full((1, 1, 6), 6), share, case.pool
    )
    assert (counts == 2).all()
    others = scores.masked_fill(scores == 10, -torch.inf).argmax(-1, keepdim=True)
    expected = torch.cat([own[None, None, :, None], others], -1).sort(-1).values
    assert torch.equal(indices[..., :2].long(), expected)


def test_large_shares_keep_most_chunks() -> None:
    """The published code drops all but two other chunks where a share cannot be reached."""
    scores = torch.randn(2, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    own = torch.arange(40) // 5
    sizes = torch.full((1, 1, 8), 5)
    counts = [
        selection.select_share(scores, own, sizes, share, "query_head")[1].float()
        for share in (0.25, 0.9, 0.999, 1.0)
    ]
    means = [each.mean().item() for each in counts]
    assert means == sorted(means)
    assert means[1] > 5
    assert (counts[3] == 8).all()


@pytest.mark.parametrize("pool", ["query_head", "block", "head_global", "overall"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_equal_scores_keep_everything(pool: str, share: float) -> None:
    """A query of zeros scores all chunks alike: there is no share to tell them apart by."""
    case = Case((4, 2, 3), "temporal", 1, "threshold", pool, share=share)
    _, k, v = tensors(case)
    q = torch.zeros_like(k)
    torch.testing.assert_close(run(case, q, k, v)[0], dense(q, k, v))


def test_ties_go_to_the_earlier_chunk() -> None:
    scores = torch.zeros(1, 1, 4, 4)
    own = torch.tensor([0, 1, 2, 3])
    indices, counts = selection.select_topk(scores, own, torch.ones(1, 1, 4), 2, "query_head")
    assert indices.tolist() == [[[[0, 1], [0, 1], [0, 2], [0, 3]]]]
    assert (counts == 2).all()
    indices, counts = selection.select_topk(scores, own, torch.ones(1, 1, 4), 2, "head_global")
    assert counts.tolist() == [[[4, 2, 1, 1]]]
    assert indices[0, 0, 0].tolist() == [0, 1, 2, 3]
    assert indices[0, 0, 1, :2].tolist() == [0, 1]


def test_pools_per_head_leave_heads_apart_and_others_do_not() -> None:
    """What the README says of head_global and overall."""
    for pool, apart in (("head_global", True), ("overall", False), ("block", False)):
        case = Case((4, 3, 3), "temporal", 1, "threshold", pool, share=0.4)
        q, k, v = tensors(case, heads=2)
        first = run(case, q, k, v)[0][:, :, 0]
        q[:, :, 1] *= 5
        assert torch.equal(run(case, q, k, v)[0][:, :, 0], first) == apart


def test_batch_items_do_not_meet_in_any_pool() -> None:
    for pool in ("query_head", "block", "head_global", "overall"):
        case = Case((4, 3, 3), "temporal", 1, "threshold", pool, share=0.4)
        q, k, v = tensors(case, batch=2)
        first = run(case, q, k, v)[0][0]
        q[1] *= 5
        assert torch.equal(run(case, q, k, v)[0][0], first)


def test_hidden_chunks() -> None:
    """Chunks without a visible key: nobody picks them, and who is in one attends to others."""
    for mode, pool in itertools.product(["topk", "threshold"], ["query_head", "head_global"]):
        case = Case((4, 2, 3), "temporal", 1, mode, pool, topk=2, share=0.4)
        mask = torch.ones(1, 24, dtype=torch.bool)
        mask[:, 6:18] = False
        check(case, *tensors(case), mask=mask)
        check(case, *tensors(case), mask=torch.zeros(1, 24, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        *itertools.product(("topk", "threshold"), ("query_head", "head_global", "overall")),
        ("threshold", "block"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_where_dense_attention_shows_it(
    mode: str, pool: str, value: float
) -> None:
    """A key reaches all rows of its head, a query its own row: nobody is routed elsewhere."""
    case = Case((4, 2, 3), "temporal", 1, mode, pool, topk=2, share=0.3, text_after=3)
    q, k, v = tensors(case)
    clean = run(case, q, k, v)[0]
    bad = k.clone()
    bad[0, 13, 0] = math.nan
    out = run(case, q, bad, v)[0]
    assert out[:, :, 0].isnan().all()
    if pool not in ("overall", "block"):  # where heads compete, they may feel it
        assert torch.equal(out[:, :, 1], clean[:, :, 1])
    bad = q.clone()
    bad[0, 7, 0] = value
    out = run(case, bad, k, v)[0]
    assert out[0, 7, 0].isnan().all()
    assert out[0, 8:].isfinite().all()
    if pool == "query_head":
        assert torch.equal(out[0, 8:], clean[0, 8:])
    bad = v.clone()
    bad[0, 13, 0, 2] = value  # who attends to it, and only that channel
    out = run(case, q, k, bad)[0]
    seen = ~out[0, :, 0, 2].isfinite()
    assert seen[12:18].all()
    assert not seen[:24].all()
    assert torch.equal(out[0, ~seen], clean[0, ~seen])
    if value == math.inf:
        assert (out[0, seen, 0, 2] == math.inf).all()


# --- layers and the report ------------------------------------------------------------------------

CYCLE: dict[str, Any] = {
    "temporal_chunk_size": 1,
    "spatial_chunk_size": [2, 2],
    "st_chunk_size": [2, 2, 2],
    "temporal_layer": 2,
    "st_layer": 1,
    "first_full_step": 0,
}


def facts_of(config: dict[str, Any], **context: Any) -> dict[str, Any]:
    case = Case((4, 4, 4), "temporal", 1, "threshold", "query_head")
    with reporting_to(Report()) as report:
        run(case, *tensors(case, dtype=torch.float32), config=config, **context)
    (row,) = report.rows
    return {"used": row.used, **(row.last_facts or {})}


def test_the_cycle_over_layers() -> None:
    kinds = [facts_of(CYCLE, layer=layer)["kind"] for layer in range(6)]
    assert kinds == ["temporal", "temporal", "spatial", "spatiotemporal", "temporal", "temporal"]


def test_the_cycle_starts_after_the_dense_layers(dense_backend: str) -> None:
    config = {**CYCLE, "first_full_layer": 3}
    facts = [facts_of(config, layer=layer) for layer in range(6)]
    assert [each["used"] for each in facts] == [dense_backend] * 3 + ["vmoba_attn"] * 3
    assert [each["kind"] for each in facts[3:]] == ["temporal", "temporal", "spatial"]
    config["first_full_layer"] = 0.5
    facts = [facts_of(config, layer=layer, num_layers=6) for layer in range(6)]
    assert [each.get("kind") for each in facts] == [None] * 3 + ["temporal", "temporal", "spatial"]


def test_a_cycle_of_very_many_layers() -> None:
    config = validate(registry().backends["vmoba_attn"].spec, {"temporal_layer": 10**15})
    assert isinstance(config, VmobaConfig)
    assert config.kind_of(10**15 + 1) == "spatiotemporal"
    assert config.kind_of(-1) == "spatiotemporal"
    assert config.kind_of(-2) == "spatial"


def test_first_steps_are_dense(dense_backend: str) -> None:
    """first_full_step, 12 unless given: dense, and bit by bit what a dense run gives."""
    config = {key: value for key, value in CYCLE.items() if key != "first_full_step"}
    used = [facts_of(config, layer=0, step=step)["used"] for step in (0, 11, 12, 49)]
    assert used == [dense_backend, dense_backend, "vmoba_attn", "vmoba_attn"]
    with pytest.raises(InputError, match=r"(?s)^first_full_step=12 needs.*first_full_step=0, "):
        facts_of(config, layer=0)


def test_a_run_of_few_steps_is_told_that_it_stays_dense(
    dense_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {key: value for key, value in CYCLE.items() if key != "first_full_step"}
    with caplog.at_level("WARNING", "polyattn"):
        assert facts_of(config, layer=0, step=0, num_steps=5)["used"] == dense_backend
    assert "first_full_step=12 leaves none of the run's 5 steps sparse" in caplog.text


def test_report() -> None:
    facts = facts_of({**CYCLE, "moba_threshold": 1.0}, layer=3)
    assert facts["kind"] == "spatiotemporal"
    assert facts["chunks"] == 8
    assert facts["provider"] == "reference"
    assert float(facts["density"]) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(12))
def test_density_is_that_of_the_oracle(seed: int) -> None:
    """Attended pairs over pairs of a query and a visible key, text included."""
    case = replace(random_case(seed), text_before=0, text_after=4)
    q, k, v = tensors(case, batch=2)
    mask = torch.rand(2, case.length, generator=torch.Generator().manual_seed(seed)) < 0.7
    call = AttentionCall(False, 1.0, mask[:, None, None], "key_padding")
    context = polyattn.forward_context(
        grid=case.grid, text=polyattn.TextSpan(case.video, 4, 3), layer=0
    )
    with context as call.context:
        spec = registry().backends["vmoba_attn"].spec
        built = implementation.build(validate(spec, config_of(case)), None, None)
        built(q, k, v, call)
    attended = pairs = 0
    visible = visible_keys(case, 3, mask)
    for item in range(2):
        seen = oracle.mask_of_tokens(case, q[item].numpy(), k[item].numpy(), visible[item].numpy())
        attended += seen.sum()
        pairs += 2 * case.length * visible[item].sum().item()
    assert call.facts is not None
    assert float(call.facts["density"]) == pytest.approx(attended / pairs)


def test_compiled_steps_share_one_graph() -> None:
    """One graph for every step and layer of a cycle, and the numbers of eager calls."""
    case = Case((4, 4, 4), "temporal", 1, "threshold", "query_head")
    q, k, v = tensors(case, dtype=torch.float32)
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return polyattn.attention(
            q, k, v, backend="vmoba_attn", config={**CYCLE, "first_full_step": 1}
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=count)
    for step, layer in itertools.product(range(3), range(4)):
        with polyattn.forward_context(grid=case.grid, step=step, layer=layer):
            torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    assert len(graphs) == 1


@pytest.mark.parametrize(("mode", "pool"), MODES_AND_POOLS)
def test_nothing_waits_for_a_gpu(mode: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that have no values, whatever reads a value back is an error.

    The kernels themselves are left out: the reference provider looks at values, on a CPU.
    """
    launched = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert all(type(size) is int for size in grid)
            return lambda *_, **__: launched.append(self.name)

    def attend(q: Any, *_: Any, **__: Any) -> Any:
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])

    names = ("attend_pairs", "count_marks", "join_pairs", "mark_lists", "mark_share", "place_pairs")
    kernels = SimpleNamespace(**{name: Kernel(name) for name in names})
    monkeypatch.setitem(sys.modules, "polyattn_vmoba._routed_kernels", kernels)
    monkeypatch.setattr(polyattn_vmoba, "_routed_kernels", kernels, raising=False)
    monkeypatch.setattr(implementation, "block_sparse_attention", attend)
    monkeypatch.setattr(
        implementation, "which_provider", lambda *_: polyattn_kernels.ProviderChoice("triton", {})
    )
    case = Case((4, 4, 4), "spatiotemporal", (2, 2, 3), mode, pool, topk=2, text_after=4)
    spec = registry().backends["vmoba_attn"].spec
    built = implementation.build(validate(spec, config_of(case)), None, None)
    # Tried before, which does wait.
    monkeypatch.setattr(built, "_routes_rightly", lambda q: True)
    # What is static is made on the CPU, once for a grid.
    monkeypatch.setattr(
        implementation,
        "_labels",
        lambda grid, rule, before, after, device: (
            torch.empty(64 + before + after, dtype=torch.int64, device=device), 8,
        ),
    )  # fmt: skip
    implementation._visible_chunks.cache_clear()
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 68, 2, 16) for _ in range(3))
        hidden = torch.empty(2, 1, 1, 68, dtype=torch.bool)
        for mask in (None, hidden):
            kind = "none" if mask is None else "key_padding"
            with polyattn.forward_context(grid=case.grid, text=polyattn.TextSpan(64, 4)) as context:
                call = AttentionCall(False, 1.0, mask, kind, context=context)
                out = built(q, k, v, call)
            assert out.shape == q.shape
            with pytest.raises(DataDependentOutputException):
                call.facts["density"].item()
    implementation._visible_chunks.cache_clear()
    fused = (mode, pool) == ("threshold", "query_head")
    first = "mark_share" if fused else "mark_lists"
    assert launched == [first, "count_marks", "place_pairs", "attend_pairs", "join_pairs"] * 2


def test_nothing_is_remembered() -> None:
    case = Case((4, 4, 4), "temporal", 1, "threshold", "query_head")
    with polyattn.forward_context(grid=case.grid, layer=0) as context:
        q, k, v = tensors(case)
        polyattn.attention(q, k, v, backend="vmoba_attn", config=config_of(case))
        assert not any(context.run_state.values())


# --- what is refused ------------------------------------------------------------------------------


def test_missing_chunk_sizes() -> None:
    """Only the kinds of the cycle need theirs, and topk only where it is used."""
    case = Case((4, 4, 4), "temporal", 1, "threshold", "query_head")
    q, k, v = tensors(case)
    topk = {"moba_select_mode": "topk", "spatial_layer": 0}
    for config, wanted in (
        ({"first_full_step": 0}, "temporal_chunk_size, spatial_chunk_size, st_chunk_size for"),
        (topk, "temporal_chunk_size, temporal_topk, st_chunk_size, st_topk for"),
        ({**topk, "st_layer": 0, "temporal_chunk_size": 2}, "needs temporal_topk for"),
    ):
        with pytest.raises(BackendUnavailableError, match=wanted) as caught:
            run(case, q, k, v, config=config, layer=0, step=99)
        # What the error gives to type works, on the command line and in Python.
        forms = re.fullmatch(
            r"--attention-backend-config '(.+)', or config='(.+)'", caught.value.hint or ""
        )
        assert forms is not None
        for text in forms.groups():
            run(case, q, k, v, config={**config, **load_config(text)}, layer=0, step=99)


def test_layer_is_needed_where_kinds_alternate() -> None:
    case = Case((4, 4, 4), "temporal", 1, "threshold", "query_head")
    with pytest.raises(InputError, match=r"(?s)alternate \(temporal, spatial, spat.*layer=i"):
        run(case, *tensors(case), config=CYCLE)
    run(case, *tensors(case))  # one kind only: any layer


def test_a_chunk_needs_a_token() -> None:
    case = Case((4, 2, 2), "temporal", 0.2, "threshold", "query_head")
    with pytest.raises(InputError, match=r"0\.2 frames of 2 x 2 tokens make a chunk of less"):
        run(case, *tensors(case))


def test_grid_is_needed() -> None:
    case = Case((2, 2, 2), "temporal", 1, "threshold", "query_head")
    q, k, v = tensors(case)
    with pytest.raises(BackendUnavailableError, match=r"(?s)token grid.*grid=\(T, H, W\)"):
        polyattn.attention(q, k, v, backend="vmoba_attn", config=config_of(case))
    with pytest.raises(InputError, match="makes 12 tokens, and q has 8"):
        polyattn.attention(q, k, v, backend="vmoba_attn", config=config_of(case), grid=(3, 2, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temporal_chunk_size": 0}, "temporal_chunk_size=0"),
        ({"temporal_chunk_size": "2"}, "temporal_chunk_size"),
        ({"temporal_topk": 0}, "temporal_topk=0"),
        ({"spatial_chunk_size": [3]}, "spatial_chunk_size"),
        ({"spatial_chunk_size": [3, 0]}, "spatial_chunk_size.1=0"),
        ({"spatial_chunk_size": [3, 2.5]}, "spatial_chunk_size.1=2.5"),
        ({"st_chunk_size": [1, 2]}, "st_chunk_size"),
        ({"moba_select_mode": "top_k"}, "'threshold' or 'topk'"),
        ({"moba_threshold": 1.5}, "moba_threshold=1.5"),
        ({"moba_threshold": -0.1}, "moba_threshold=-0.1"),
        ({"moba_threshold_type": "head"}, "'head_global'"),
        ({"moba_select_mode": "topk", "moba_threshold_type": "block"}, "topk has no pool"),
        ({"temporal_layer": 0, "spatial_layer": 0, "st_layer": 0}, "a cycle needs a layer"),
        ({"temporal_layer": -1}, "temporal_layer=-1"),
        ({"first_full_step": -1}, "first_full_step=-1|dense_steps=-1"),
        ({"first_full_step": 2, "dense_steps": 2}, "two spellings"),
        ({"first_full_layer": 2, "moba_config": {"first_full_layer": 2}}, "two spellings"),
        ({"moba_config": {"temporal_topkk": 2}}, "moba_config.temporal_topkk"),
        ({"moba_config": 2}, "moba_config"),
        ({"chunk_size": 2}, "no parameter 'chunk_size'"),
    ],
)
def test_bad_configurations(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(registry().backends["vmoba_attn"].spec, given)


@pytest.mark.parametrize(
    ("given", "unread"),
    [
        ({"moba_select_mode": "threshold", "temporal_topk": 3, "st_topk": 2},
         "moba_select_mode=threshold does not read temporal_topk, st_topk"),
        ({"moba_select_mode": "topk", "temporal_topk": 3, "moba_threshold": 0.5},
         "moba_select_mode=topk does not read moba_threshold"),
        ({"moba_select_mode": "topk", "temporal_topk": 3}, None),
        ({"moba_threshold": 0.5}, None),
    ],
)  # fmt: skip
def test_parameters_of_the_other_mode_are_warned_of_once(
    given: dict[str, Any], unread: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    implementation._warn_of_unread.cache_clear()
    config = {
        "temporal_chunk_size": 1, "spatial_layer": 0, "st_layer": 0, "first_full_step": 0, **given,
    }  # fmt: skip
    for grid in ((4, 2, 2), (5, 2, 2)):
        case = Case(grid, "temporal", 1, "threshold", "query_head")
        run(case, *tensors(case), config=config)
    told = [each.getMessage() for each in caplog.records if "does not read" in each.getMessage()]
    assert told == ([f"vmoba_attn: {unread}"] if unread else [])


def test_documented_names_types_and_defaults() -> None:
    spec = registry().backends["vmoba_attn"].spec
    documented: dict[str, Any] = {
        "temporal_chunk_size": 2, "temporal_topk": 3, "spatial_chunk_size": [3, 4],
        "spatial_topk": 20, "st_chunk_size": [4, 6, 4], "st_topk": 15,
        "moba_select_mode": "threshold", "moba_threshold": 0.25,
        "moba_threshold_type": "query_head", "first_full_step": 12, "first_full_layer": 0,
        "temporal_layer": 1, "spatial_layer": 1, "st_layer": 1,
    }  # fmt: skip
    flat = validate(spec, documented)
    assert validate(spec, {"moba_config": documented}) == flat
    text = ",".join(f"{key}={value}" for key, value in documented.items())
    assert validate(spec, load_config(text)) == flat
    required = [key for key in documented if key.endswith(("chunk_size", "topk"))]
    assert validate(spec, {key: documented[key] for key in required}) == flat
