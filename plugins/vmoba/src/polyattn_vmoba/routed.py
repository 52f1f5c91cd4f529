"""Attention in which every query has key blocks of its own, at the cost of what it has.

Tiles of queries that are neighbours would have to walk every block that any of them has. Here the
pairs (query, block) are sorted by block instead; a tile is 64 or 128 pairs of one block, whose
queries are gathered, and its results, one for each pair, are kept apart. A second pass joins the
results of each query, in the order of its blocks, by their log-sum-exps. All of it is Triton
kernels and a few torch operations on small tensors.

What a query has is marked: a byte for each query, head and key block. The pairs are sorted by
counting: marks of each block and group of 64 queries, their running sum, and each pair at its
place. No order depends on chance, so equal inputs give equal bits.

Costs: 4 D operations for each pair and key of its block; memory traffic of 3 D elements for each
pair (a query read, a partial result written and read). Only the device knows how many pairs there
are. So partial results get a fixed number of rows, the queries take turns at them as the counts of
pairs say, and there are as many turns as the most pairs would need; those left over find no work.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from polyattn_kernels.providers.triton import TileConfig, gather_config

__all__ = ["LONGEST_ROW", "Marks", "attend_marked", "mark_lists", "mark_share", "pair_config"]

# Queries whose marks are counted together, and the granularity of turns.
GROUP = 64
# A Triton program holds the scores of one query in registers.
LONGEST_ROW = 8192


@dataclass(frozen=True, eq=False)
class Marks:
    """Which key blocks each query has."""

    marks: torch.Tensor
    """uint8 ``[B, H, n, at least blocks]``: 1 or 0, undefined past the blocks."""
    blocks: int
    capacity: int
    """The most blocks that a query can have."""


def mark_share(
    scores: torch.Tensor, own: torch.Tensor, sizes: torch.Tensor, share: float, blocks: int
) -> Marks:
    """What ``select_share`` selects for pools of one query, and all blocks past the chunks.

    Arguments as there; float32 scores of at most LONGEST_ROW chunks.
    """
    from polyattn_vmoba import _routed_kernels as kernels

    batch, heads, queries, chunks = scores.shape
    marks = _unwritten(scores, blocks)
    block = max(32, 1 << (blocks - 1).bit_length())
    sizes = sizes.contiguous()
    with _on(scores):
        kernels.mark_share[(batch * heads * queries,)](
            scores.contiguous(),
            own,
            sizes,
            marks,
            share,
            0 if sizes.shape[0] == 1 else sizes.stride(0),
            marks.shape[-1],
            heads,
            queries,
            chunks,
            blocks,
            ALL=share == 1,
            BLOCK=block,
            num_warps=min(8, max(1, block // 512)),
        )
    return Marks(marks, blocks, blocks)


def mark_lists(indices: torch.Tensor, counts: torch.Tensor, blocks: int) -> Marks:
    """The marks of lists int32 ``[B, H, n, capacity]`` with counts ``[B, H, n]``."""
    from polyattn_vmoba import _routed_kernels as kernels

    marks = _unwritten(indices, blocks).zero_()
    with _on(indices):
        kernels.mark_lists[(counts.numel(),)](
            indices.contiguous(),
            counts.contiguous(),
            marks,
            marks.shape[-1],
            indices.shape[-1],
            BLOCK=64,
            num_warps=1,
        )
    return Marks(marks, blocks, max(1, min(blocks, indices.shape[-1])))


def attend_marked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    marks: Marks,
    offsets: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    partial_bytes: int,
) -> torch.Tensor:
    """Attention of q ``[B, n, H, D]`` over k and v ``[B, S, Hkv, D]`` by marks of key blocks.

    Args:
        offsets: int32 ``[B | 1, 1, at least blocks + 1]``, where each block begins in k and v.
        out: written, ``[B, n, H, D]``: zeros where a query sees no key.
        lse: written, ``[B, H, n]`` float32: -inf there.
        partial_bytes: of partial results at one time; more where they do not do for 128 queries.

    Returns the number of attended pairs of a query and a key, float64. Nothing waits for the
    device. The last dimension of all tensors but marks must be contiguous.
    """
    from polyattn_vmoba import _routed_kernels as kernels

    batch, queries, heads, width = q.shape
    instances, blocks = batch * heads, marks.blocks
    device = q.device
    config = pair_config(width, q.dtype, k.shape[1] / blocks, device)
    pairs = sorted_pairs(marks)
    groups = pairs.groups
    most = instances * queries * marks.capacity
    row_bytes = width * q.element_size() + 4
    room = GROUP * marks.capacity  # of the last group of a turn
    rows = min(most, max(partial_bytes // row_bytes, 2 * room))
    # A turn begins with the first group whose pairs begin at or past a multiple of ``step``.
    step, turns = (most, 1) if rows == most else (rows - room, -(-most // (rows - room)))
    ends = torch.full((turns + 1,), instances * groups, dtype=torch.int32, device=device)
    if turns > 1:
        begins = pairs.starts[:-1].view(instances, queries)[:, ::GROUP].flatten()
        limits = torch.arange(turns, dtype=torch.int32, device=device) * step
        ends[:-1] = torch.searchsorted(begins, limits, out_int32=True)
    else:
        ends[:-1] = 0
    # Where each bin of a turn, an instance and a block begins and ends among the pairs.
    each = torch.arange(instances, dtype=torch.int32, device=device)
    edges = (ends[:, None] - each * groups).clamp(0, groups)[:, :, None].expand(-1, -1, blocks)
    bins = instances * blocks
    at = edges.reshape(turns + 1, bins) + torch.arange(bins, device=device) * groups
    places = pairs.places[at]
    firsts, lasts = places[:-1].contiguous(), places[1:].contiguous()
    tile_ends = ((lasts - firsts + config.rows - 1) // config.rows).flatten()
    tile_ends = tile_ends.cumsum(0, dtype=torch.int32)
    tiles = most // config.rows + min(most, turns * bins)
    tile_bins = torch.searchsorted(
        tile_ends, torch.arange(tiles, dtype=torch.int32, device=device), right=True, out_int32=True
    )
    partial = q.new_empty(rows, width)
    partial_lse = q.new_empty(rows, dtype=torch.float32)
    programs = min(tiles, _programs(device))
    offsets = offsets.expand(batch, 1, -1)
    block_d = max(16, 1 << (width - 1).bit_length())
    # Few pairs for each query need few lanes and warps; many programs then run at one time.
    entries = 16 if marks.capacity >= 64 else 4
    precise = q.dtype is torch.float32 and _capability(device) >= (8, 0)
    # Offsets within a tensor in 64 bits only where they need it: they cost registers.
    wide = any(each.shape[1] * abs(each.stride(1)) >= 2**31 for each in (q, k, v))
    with _on(q):
        for turn in range(turns):
            kernels.attend_pairs[(programs,)](
                q,
                k,
                v,
                partial,
                partial_lse,
                pairs.pairs,
                firsts,
                lasts,
                tile_ends,
                tile_bins,
                pairs.starts,
                offsets,
                scale * math.log2(math.e),
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                offsets.stride(0),
                heads,
                heads // k.shape[2],
                queries,
                marks.capacity,
                blocks,
                bins,
                turn * step,
                turn,
                D=width,
                BLOCK_D=block_d,
                ROWS=config.rows,
                KEYS=config.keys,
                STAGES=config.stages,
                WIDE=wide,
                PRECISION="tf32x3" if precise else "ieee",
                num_warps=config.warps,
                num_stages=config.stages,
            )
            kernels.join_pairs[(instances * queries,)](
                partial,
                partial_lse,
                pairs.starts,
                ends,
                out,
                lse,
                *out.stride()[:3],
                *lse.stride()[:2],
                heads,
                queries,
                groups,
                turn * step,
                turn,
                D=width,
                BLOCK_D=block_d,
                GROUP=GROUP,
                ENTRIES=entries,
                num_warps=2 if entries == 16 else 1,
            )
    listed = pairs.places[::groups].diff().view(batch, heads, blocks)
    sizes = offsets.diff(dim=-1)[..., :blocks]
    return (listed.double() * sizes).sum()


@dataclass(frozen=True, eq=False)
class SortedPairs:
    """Pairs of a query and a block that it has, by instance (batch item and head), then block."""

    pairs: torch.Tensor
    """int32, query * capacity + entry (which of the query's blocks it is), by rising query."""
    places: torch.Tensor
    """int32 ``[I * blocks * groups + 1]``: where a block's pairs of a group begin."""
    starts: torch.Tensor
    """int32 ``[I * n + 1]``: how many pairs earlier queries have."""
    groups: int


def sorted_pairs(marks: Marks) -> SortedPairs:
    """The pairs of all instances; fewer than 2**31 pairs must be possible."""
    from polyattn_vmoba import _routed_kernels as kernels

    batch, heads, queries, pitch = marks.marks.shape
    instances, blocks = batch * heads, marks.blocks
    groups = -(-queries // GROUP)
    assert instances * queries * marks.capacity < 2**31
    device = marks.marks.device
    # A leading zero, so that the running sums are where each begins.
    of_blocks = torch.zeros(instances * blocks * groups + 1, dtype=torch.int32, device=device)
    of_queries = torch.zeros(instances * queries + 1, dtype=torch.int32, device=device)
    sizes = {
        "GROUP": GROUP,
        "BLOCK": min(64, max(16, 1 << (blocks - 1).bit_length())),
        "num_warps": 4,
    }
    grid = (groups, instances)
    with _on(marks.marks):
        kernels.count_marks[grid](
            marks.marks, of_blocks[1:], of_queries[1:], pitch, queries, blocks, groups, **sizes
        )
        places = of_blocks.cumsum(0, dtype=torch.int32)
        starts = of_queries.cumsum(0, dtype=torch.int32)
        pairs = torch.empty(instances * queries * marks.capacity, dtype=torch.int32, device=device)
        kernels.place_pairs[grid](
            marks.marks, places, pairs, pitch, queries, blocks, groups, marks.capacity, **sizes
        )
    return SortedPairs(pairs, places, starts, groups)


def pair_config(width: int, dtype: torch.dtype, keys: float, device: torch.device) -> TileConfig:
    """The tiles of pairs, for blocks of about so many keys."""
    config = gather_config(width, dtype, _capability(device))
    # Tiles of keys that fit a block ill are mostly padding.
    while config.keys > 32 and math.ceil(keys / config.keys) * config.keys > 1.3 * max(keys, 32):
        config = replace(config, keys=config.keys // 2)
    return replace(config, stages=min(config.stages, 3))


@functools.lru_cache(maxsize=16)
def _programs(device: torch.device) -> int:
    """Many times what a device runs at one time, so that all of it is busy to the end."""
    if device.type != "cuda":
        return 3
    return 32 * torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> tuple[int, int]:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


def _unwritten(like: torch.Tensor, blocks: int) -> torch.Tensor:
    """Marks for the rows of a tensor; a pitch of 16 bytes lets them be read in large words."""
    return like.new_empty(*like.shape[:3], -(-blocks // 16) * 16, dtype=torch.uint8)


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)
