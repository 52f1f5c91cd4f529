"""The Triton kernels of a GPU's path, interpreted on the CPU, against the same plan run plainly.

What only a GPU can tell (compiled code, bfloat16, speed) is not tested here.
"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import pytest
import torch

from polyattn_kernels import BlockSparsePlan, block_sparse_attention
from polyattn_vmoba import attention, routed
from polyattn_vmoba.config import VmobaConfig
from polyattn_vmoba.selection import select_share

HAS_TRITON = True
try:
    if not torch.cuda.is_available():
        # The kernels' decorators read this when their module is imported, which is later.
        os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401
except ImportError:
    HAS_TRITON = False

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 as if its bits were integers.
TOLERANCE = {torch.float32: 1e-4 if DEVICE == "cuda" else 2e-5, torch.float16: 3e-3}
if DEVICE == "cuda":
    TOLERANCE[torch.bfloat16] = 2e-2
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def random_plan(
    draw: random.Random, batch: int, heads: int, queries: int, keys: int, shared: bool
) -> BlockSparsePlan:
    """Single queries with lists of any length from none on; blocks of any size from none on."""
    generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
    blocks = draw.randint(1, 9)
    edges_of = 1 if shared else batch
    edges = torch.randint(0, keys + 1, (edges_of, 1, blocks - 1), generator=generator)
    ends = torch.tensor([0, keys]).expand(edges_of, 1, 2)
    offsets = torch.cat([ends, edges], -1).sort(-1).values.int()
    order = torch.rand(edges_of, 1, keys, generator=generator).argsort(-1).int()
    share = draw.choice([0.0, 0.3, 0.7, 1.0])
    mask = torch.rand(batch, heads, queries, blocks, generator=generator) < share
    return BlockSparsePlan.from_mask(
        mask.to(DEVICE),
        query_length=queries,
        key_length=keys,
        query_offsets=torch.arange(queries + 1, dtype=torch.int32, device=DEVICE)[None, None],
        key_offsets=offsets.contiguous().to(DEVICE),
        key_permutation=order.to(DEVICE),
    )


def marks_of(plan: BlockSparsePlan, batch: int, heads: int) -> routed.Marks:
    lists = plan.key_indices.expand(batch, heads, -1, -1)
    return routed.mark_lists(lists, plan.key_counts.expand(batch, heads, -1), plan.num_key_blocks)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan, scale: float,
    partial_bytes: int = 2**30,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The routed path for a plan of single queries: out, lse, attended pairs of tokens."""
    batch, _, heads, _ = q.shape
    assert plan.key_permutation is not None
    assert plan.key_offsets is not None
    order = plan.key_permutation[:, 0, :, None, None].long().expand(batch, -1, 1, 1)
    k, v = (each.take_along_dim(order, 1).contiguous() for each in (k, v))
    out = torch.full_like(q, math.nan)
    lse = q.new_full((batch, heads, q.shape[1]), math.nan, dtype=torch.float32)
    attended = routed.attend_marked(
        q, k, v, marks_of(plan, batch, heads), plan.key_offsets, scale, out, lse, partial_bytes
    )
    return out, lse, attended


@needs_triton
@pytest.mark.parametrize("seed", range(8))
def test_pairs_are_sorted_by_block(seed: int) -> None:
    """Each listed pair once, at its block's place, in the order of queries."""
    draw = random.Random(seed)
    plan = random_plan(draw, 2, 2, draw.choice([1, 40, 64, 150]), 30, shared=False)
    marks = marks_of(plan, 2, 2)
    pairs = routed.sorted_pairs(marks)
    expected, ends = [], []
    for batch in range(2):
        for head in range(2):
            indices, counts = plan.key_indices[batch, head], plan.key_counts[batch, head]
            for block in range(plan.num_key_blocks):
                expected += [
                    query * marks.capacity + entry
                    for query in range(plan.query_length)
                    for entry in range(int(counts[query]))
                    if int(indices[query, entry]) == block
                ]
                ends.append(len(expected))
    assert pairs.pairs[: len(expected)].tolist() == expected
    assert pairs.places[:: pairs.groups].tolist() == [0, *ends]
    assert pairs.starts.tolist() == [0, *plan.key_counts.flatten().cumsum(0).tolist()]


@needs_triton
@pytest.mark.parametrize("seed", range(30 if DEVICE == "cuda" else 10))
def test_shares_are_those_of_torch(seed: int) -> None:
    """On scores of few values (ties, rows all equal), hidden chunks, scores that are no numbers."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    chunks, queries, text = draw.choice([1, 2, 7, 33, 70]), 10, draw.choice([0, 1])
    # Sums of quarters are exact, and so are the shares.
    scores = torch.randint(0, draw.choice([2, 5, 17]), (2, 2, queries, chunks), generator=generator)
    scores = scores.float() / 4
    sizes = torch.randint(1, 9, (draw.choice([1, 2]), 1, chunks), generator=generator).int()
    if draw.random() < 0.5:
        sizes[torch.rand(sizes.shape, generator=generator) < 0.3] = 0
        wrong = torch.rand(scores.shape, generator=generator) < 0.1
        scores[wrong] = draw.choice([math.nan, math.inf, -math.inf])
    own = torch.randint(0, chunks, (queries,), generator=generator)
    share = draw.choice([0.0, 0.25, 0.3, 0.6, 0.9, 1.0])
    scores, own, sizes = scores.to(DEVICE), own.to(DEVICE), sizes.to(DEVICE)
    marks = routed.mark_share(scores, own, sizes, share, chunks + text)
    found = marks.marks[..., : marks.blocks].bool()
    assert found[..., chunks:].all()
    indices, counts = select_share(scores, own, sizes, share, "query_head")
    expected = torch.zeros_like(scores, dtype=torch.bool)
    listed = torch.arange(indices.shape[-1], device=DEVICE) < counts[..., None]
    column = indices.long().where(listed, chunks)
    expected = torch.nn.functional.pad(expected, (0, 1)).scatter(-1, column, True)[..., :-1]
    differ = (found[..., :chunks] != expected).any(-1)
    if share in (0.0, 1.0):
        assert not differ.any()
    # Where a share is met exactly, rounding decides whether one more chunk is taken.
    differences = (found[..., :chunks] ^ expected).sum(-1)
    assert differ.float().mean() < 0.15
    assert differences.max() <= 1


@needs_triton
@pytest.mark.parametrize("chunks", [5, 300])
def test_shares_of_random_scores(chunks: int) -> None:
    """Without ties or shares that are met exactly, the sets are equal."""
    generator = torch.Generator().manual_seed(chunks)
    scores = torch.randn(1, 2, 20, chunks, generator=generator).to(DEVICE)
    own = torch.randint(0, chunks, (20,), generator=generator).to(DEVICE)
    sizes = torch.ones(1, 1, chunks, dtype=torch.int32, device=DEVICE)
    found = routed.mark_share(scores, own, sizes, 0.25, chunks).marks[..., :chunks]
    indices, counts = select_share(scores, own, sizes, 0.25, "query_head")
    expected = routed.mark_lists(indices, counts, chunks).marks[..., :chunks]
    assert torch.equal(found, expected)


@needs_triton
@pytest.mark.parametrize("seed", range(24 if DEVICE == "cuda" else 10))
def test_equals_the_plain_provider(seed: int) -> None:
    """On random plans, with NaN in all that nobody lists, strided tensors and grouped heads."""
    draw = random.Random(seed)
    batch, queries, keys = (
        draw.choice([1, 2]),
        draw.choice([1, 7, 70, 130] if DEVICE == "cuda" else [1, 7, 70]),
        draw.choice([1, 50, 170]),
    )
    heads, kv_heads = draw.choice([(1, 1), (2, 2), (4, 2)])
    width = draw.choice([16, 24, 64, 128])
    dtype = draw.choice(list(TOLERANCE))
    plan = random_plan(draw, batch, heads, queries, keys, draw.random() < 0.5)
    generator = torch.Generator().manual_seed(seed)

    def tensor(tokens: int, count: int) -> torch.Tensor:
        values = torch.randn(batch, tokens, 2, count, width, generator=generator)
        return values.to(DEVICE, dtype)[:, :, 1]

    q, k, v = tensor(queries, heads), tensor(keys, kv_heads), tensor(keys, kv_heads)
    seen = plan.to_mask().any(2).unflatten(1, (kv_heads, -1)).any(2)  # [B, Hkv, keys]
    unseen = ~seen.transpose(1, 2)[..., None]
    k, v = k.masked_fill(unseen, math.nan), v.masked_fill(unseen, math.nan)
    scale = draw.choice([0.05, 0.125, 0.5])
    expected = block_sparse_attention(
        q, k, v, plan, scale=scale, return_lse=True, provider="reference"
    )
    out, lse, attended = attend(q, k, v, plan, scale)
    for one, other in zip((out, lse), expected, strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    pairs = batch * heads * queries * keys
    assert float(attended) / pairs == pytest.approx(float(plan.density()))


@needs_triton
def test_turns_by_pairs() -> None:
    """Turns that end within a head, that are empty, and queries without any pair at all."""
    queries, keys, blocks = 64 * 2 + 5, 60, 6
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 2, queries, blocks, generator=generator) < 0.3
    mask[0, 1] = True
    mask[0, 0, 30:] = False
    mask[1, 1, 64:] = False
    offsets = torch.tensor([[[0, 10, 10, 25, 31, 58, 60]]], dtype=torch.int32)
    plan = BlockSparsePlan.from_mask(
        mask.to(DEVICE), query_length=queries, key_length=keys,
        query_offsets=torch.arange(queries + 1, dtype=torch.int32, device=DEVICE)[None, None],
        key_offsets=offsets.to(DEVICE),
        key_permutation=torch.randperm(keys, generator=generator)[None, None].int().to(DEVICE),
    )  # fmt: skip
    q = torch.randn(2, queries, 2, 16, generator=generator).to(DEVICE)
    k, v = (torch.randn(2, keys, 1, 16, generator=generator).to(DEVICE) for _ in range(2))
    expected = block_sparse_attention(
        q, k, v, plan, scale=0.3, return_lse=True, provider="reference"
    )
    whole = attend(q, k, v, plan, 0.3)
    again = attend(q, k, v, plan, 0.3)
    for one, other in zip(again, whole, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    # As many turns as there can be. A pair's result depends on its own row alone, but
    # the interpreter's matrix products round by where in a tile a row is.
    parts = attend(q, k, v, plan, 0.3, partial_bytes=0)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    for one, other in zip(whole, expected, strict=False):
        tolerance = TOLERANCE[torch.float32]
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@needs_triton
@pytest.mark.parametrize("mode", ["threshold", "topk"])
@pytest.mark.parametrize("turn_bytes", [30_000, 2**31])
def test_the_whole_method_on_the_routed_path(
    mode: str, turn_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that a GPU makes gives what the call of a CPU gives, and says which it was."""
    import polyattn
    from polyattn.reporting import Report, reporting_to
    from polyattn_kernels import ProviderChoice
    from polyattn_vmoba import attention as implementation

    config = {
        "spatial_layer": 0, "st_layer": 0, "temporal_chunk_size": 1.5, "first_full_step": 0,
        "moba_select_mode": mode,
    }  # fmt: skip
    if mode == "topk":
        config["temporal_topk"] = 2
    q, k, v = (torch.randn(2, 5 * 12 + 7, 2, 32, device=DEVICE) for _ in range(3))
    mask = torch.rand(2, 67, device=DEVICE) < 0.7

    def run() -> tuple[torch.Tensor, torch.Tensor, str]:
        with polyattn.forward_context(grid=(5, 3, 4), text=polyattn.TextSpan(60, 7)):
            with reporting_to(Report()) as report:
                out, lse = polyattn.attention(
                    q, k, v, backend="vmoba_attn", config=config, attn_mask=mask, return_lse=True
                )
        return out, lse, (report.rows[0].last_facts or {})["provider"]

    monkeypatch.setattr(
        implementation, "which_provider", lambda *_: ProviderChoice("reference", {})
    )
    plain, plain_lse, provider = run()
    assert provider == "reference"
    monkeypatch.setattr(implementation, "which_provider", lambda *_: ProviderChoice("triton", {}))
    monkeypatch.setattr(implementation, "_turn_bytes", lambda device: turn_bytes)
    out, lse, provider = run()
    assert provider == "triton (routed by chunk)"
    torch.testing.assert_close(out, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, plain_lse, atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_a_path_that_computes_wrong_is_not_served(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = VmobaConfig.model_validate(
        {
            "st_chunk_size": [2, 3, 4],
            "st_topk": 3,
            "temporal_layer": 0,
            "spatial_layer": 0,
            "moba_select_mode": mode,
        }
    )
    q = torch.zeros(1, 1, 1, 32, device=DEVICE)
    built = attention.VmobaAttention(config)
    monkeypatch.setattr(attention, "_verdicts", {})
    if DEVICE == "cpu":  # interpreted, which is slow
        monkeypatch.setattr(attention, "TRIAL_GRID", (2, 3, 8))
    assert built._routes_rightly(q)
    real = routed.attend_marked

    def wrong(*arguments: Any) -> torch.Tensor:
        attended = real(*arguments)
        arguments[6].mul_(1.2)  # out
        return attended

    monkeypatch.setattr(attention, "attend_marked", wrong)
    assert built._routes_rightly(q)  # tried once
    attention._verdicts.clear()
    with caplog.at_level("WARNING", logger="polyattn"):
        assert not built._routes_rightly(q)
    assert "differs from the plan" in caplog.text
