"""A plan in which every query has its own list of key blocks, run at the cost of what is listed.

Tiles of queries that are neighbours would have to walk every block that any of them lists. Here
the pairs (query, listed block) are sorted by block instead; a tile is up to 64 pairs of one block,
whose queries are gathered, and its results, one for each pair, are kept apart. A second pass joins
the results of each query by their log-sum-exps. Both passes are Triton kernels.

Costs: 4 D operations for each pair and key of its block; memory traffic of 3 D elements for each
pair (a query read, a partial result written and read). Room is taken for ``capacity`` partial
results of every query; what is not listed is not touched. Sorting the pairs takes some 25 bytes
for each query, head and key block.
"""

from __future__ import annotations

import math

import torch

from polyattn_kernels import BlockSparsePlan
from polyattn_kernels.providers.triton import gather_config

__all__ = ["routed_attention"]


def routed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[B, n, H, D]`` over k and v ``[B, S, Hkv, D]`` by a plan of single queries.

    The plan's query block i is query i; its lists have B and H entries, its key blocks offsets and
    a permutation. Returns out ``[B, n, H, D]`` and lse ``[B, H, n]`` float32, zeros and -inf where
    a query sees no key. Nothing waits for the device.
    """
    from polyattn_vmoba import _routed_kernels as kernels

    assert plan.key_offsets is not None
    assert plan.key_permutation is not None
    batch, queries, heads, width = q.shape
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    nvidia = q.device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(q.device) if nvidia else (0, 0)
    config = gather_config(width, q.dtype, capability)
    pairs, pair_ends = _pairs_by_block(plan)
    blocks = plan.num_key_blocks
    group_sizes = pair_ends.diff(dim=-1, prepend=torch.zeros_like(pair_ends[..., :1]))
    tile_ends = ((group_sizes + config.rows - 1) // config.rows).cumsum(-1, dtype=torch.int32)
    # Only the device knows how many tiles there are; this is the most there can be.
    tiles = (queries * plan.capacity + blocks * (config.rows - 1)) // config.rows
    partial = q.new_empty(batch, heads, queries, plan.capacity, width)
    partial_lse = q.new_empty(partial.shape[:-1], dtype=torch.float32)
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    offsets = plan.key_offsets.expand(batch, 1, -1)
    permutation = plan.key_permutation.expand(batch, 1, -1)
    with torch.cuda.device(q.device if q.device.type == "cuda" else -1):
        kernels.attend_pairs[(tiles, batch * heads)](
            q,
            k,
            v,
            partial,
            partial_lse,
            pairs,
            pair_ends,
            tile_ends,
            offsets,
            permutation,
            scale * math.log2(math.e),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            offsets.stride(0),
            permutation.stride(0),
            heads,
            heads // k.shape[2],
            queries,
            plan.capacity,
            blocks,
            D=width,
            BLOCK_D=max(16, 1 << (width - 1).bit_length()),
            ROWS=config.rows,
            KEYS=config.keys,
            SEARCH=blocks.bit_length(),
            STAGES=config.stages,
            WIDE=plan.key_length * max(abs(each.stride(1)) for each in (k, v)) >= 2**31,
            PRECISION="tf32x3" if q.dtype is torch.float32 and capability >= (8, 0) else "ieee",
            num_warps=config.warps,
            num_stages=config.stages,
        )
        rows = 16
        kernels.join_pairs[(-(-queries // rows), batch * heads)](
            partial,
            partial_lse,
            plan.key_counts.expand(batch, heads, -1).contiguous(),
            out,
            lse,
            *out.stride()[:3],
            heads,
            queries,
            plan.capacity,
            D=width,
            BLOCK_D=max(16, 1 << (width - 1).bit_length()),
            ROWS=rows,
            num_warps=4,
        )
    return out, lse


def _pairs_by_block(plan: BlockSparsePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of a query and a listed block, sorted by block, then by query.

    A pair is ``query * capacity + entry of its list``. Returns them int32 ``[B, H, at least P]``,
    and where each block's pairs end, int32 ``[B, H, Mk]``.
    """
    batch, heads, queries, capacity = plan.key_indices.shape
    blocks = plan.num_key_blocks
    entries = torch.arange(capacity, dtype=torch.int32, device=plan.device)
    listed = entries < plan.key_counts[..., None]
    # The pair of each block and query, if there is one; what is not listed goes to a row cut off.
    where = plan.key_indices.where(listed, blocks).long().transpose(2, 3)
    starts = torch.arange(queries, dtype=torch.int32, device=plan.device) * capacity
    numbers = (starts[None] + entries[:, None]).expand(where.shape)
    pair = numbers.new_full((batch, heads, blocks + 1, queries), -1).scatter_(2, where, numbers)
    pair = pair[:, :, :blocks]
    exists = pair >= 0
    counts = exists.sum(-1, dtype=torch.int32)
    ends = counts.cumsum(-1, dtype=torch.int32)
    # Counted within each block first: one long row per head would be one program's work on a GPU.
    place = exists.cumsum(-1, dtype=torch.int32) + (ends - counts - 1)[..., None]
    # Sorted by counting: each pair goes to its place, all else to one place past the end.
    room = queries * capacity
    pairs = pair.new_empty(batch, heads, room + 1)
    place = place.masked_fill_(~exists, room).flatten(2).long()
    pairs.scatter_(-1, place, pair.flatten(2))
    return pairs, ends
