"""The Triton kernels of a GPU's path, interpreted on the CPU, against the same plan run plainly.

What only a GPU can tell (compiled code, bfloat16, speed) is not tested here.
"""

from __future__ import annotations

import math
import os
import random

import pytest
import torch

from polyattn_kernels import BlockSparsePlan, block_sparse_attention
from polyattn_vmoba.routed import _pairs_by_block, routed_attention

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


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_sorted_by_block(seed: int) -> None:
    """Each listed pair once, at its block's place, in the order of queries."""
    draw = random.Random(seed)
    plan = random_plan(draw, 2, 2, draw.randint(1, 40), 30, shared=False)
    pairs, ends = _pairs_by_block(plan)
    capacity = plan.capacity
    for batch in range(2):
        for head in range(2):
            indices, counts = plan.key_indices[batch, head], plan.key_counts[batch, head]
            expected = [
                [
                    query * capacity + entry
                    for query in range(plan.query_length)
                    for entry in range(int(counts[query]))
                    if int(indices[query, entry]) == block
                ]
                for block in range(plan.num_key_blocks)
            ]
            flat = [pair for group in expected for pair in group]
            assert pairs[batch, head, : len(flat)].tolist() == flat
            sizes = torch.tensor([len(group) for group in expected])
            assert ends[batch, head].tolist() == sizes.cumsum(0).tolist()


@needs_triton
@pytest.mark.parametrize("seed", range(24))
def test_equals_the_plain_provider(seed: int) -> None:
    """On random plans, with NaN in all that nobody lists, strided tensors and grouped heads."""
    draw = random.Random(seed)
    batch, queries, keys = (
        draw.choice([1, 2]),
        draw.choice([1, 7, 90, 200]),
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
    found = routed_attention(q, k, v, plan, scale)
    for one, other in zip(found, expected, strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@needs_triton
def test_the_whole_method_on_the_routed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that a GPU makes gives what the call of a CPU gives, and says which it was."""
    import polyattn
    from polyattn.reporting import Report, reporting_to
    from polyattn_kernels import ProviderChoice
    from polyattn_vmoba import attention as implementation

    config = {
        "spatial_layer": 0, "st_layer": 0, "temporal_chunk_size": 1.5, "first_full_step": 0,
    }  # fmt: skip
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
    monkeypatch.setattr(implementation, "TURN_BYTES", 200_000)
    out, lse, provider = run()
    assert provider == "triton (routed by chunk)"
    torch.testing.assert_close(out, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, plain_lse, atol=1e-4, rtol=1e-4)
