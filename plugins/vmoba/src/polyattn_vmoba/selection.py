"""Which chunks each query attends to, from the scores of its gate.

Six rules: a number of chunks (topk) or a share of the similarity (threshold), each within a pool of
pairs (query, chunk) that compete. A query's own chunk always comes first, takes part in the count
or the share, and is attended whatever the scores say. A chunk without visible keys, and a score
that is not a finite number, takes no part. But where such a score is NaN or infinity, the chunk is
attended, so that the result is NaN as that of dense attention is, and not that of other chunks. Of
equal scores the earlier chunk wins (in a pool of more than one query: the earlier pair, queries
first).

The threshold rules, for a pool with scores g: n = (g - min g) / (max g - min g) is summed; of the
pairs that are no query's own, the best are taken until they and the own ones hold the share tau of
the sum, and at least one. Where tau cannot be reached, and where all of g are equal up to 1e-6, all
are taken. Nothing here waits for the device.
"""

from __future__ import annotations

import torch

from polyattn_kernels import select_top_k, select_top_p
from polyattn_vmoba.config import Pool

__all__ = ["select_share", "select_topk"]

EPSILON = 1e-6  # as published: ranges below it are none, and shares are of the sum and it
TINY = 1e-30  # in place of the logarithm of 0


def select_topk(
    scores: torch.Tensor, own: torch.Tensor, sizes: torch.Tensor, topk: int, pool: Pool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``topk`` best chunks of a query, or as many pairs of a larger pool as it has queries.

    Args:
        scores: ``[B, H, n, C]``, float32 or float64, of n queries and C chunks.
        own: int64 ``[n]``, the chunk that each query lies in.
        sizes: ``[B | 1, 1, C]``, visible keys of each chunk.
        topk: chunks per query, its own one of them.
        pool: ``query_head``; ``head_global`` gives each head ``topk * n`` pairs; ``overall`` each
            batch item ``topk * n * H``.

    Returns:
        indices int32 ``[B, H, n, at most C]``, ascending, and counts int32 ``[B, H, n]``.
    """
    batch, heads, queries, chunks = scores.shape
    is_own = _own_entries(own, chunks)
    first = torch.finfo(scores.dtype).max
    poisoned = _poisoned(scores, sizes)
    ranked = scores.masked_fill(~_in_pool(scores, sizes), -torch.inf)
    topk = min(topk, chunks)
    if pool == "query_head":  # a row of NaN has no use for its other places
        ranked = ranked.masked_fill(poisoned, first).masked_fill(is_own, torch.inf)
        selected = select_top_k(ranked, topk)
        return selected.key_indices, selected.key_counts
    flat = ranked.masked_fill(is_own, first).flatten(1 if pool == "overall" else 2)
    best, order = flat.sort(dim=-1, descending=True, stable=True)
    taken = best > -torch.inf
    taken[..., topk * queries * (heads if pool == "overall" else 1) :].fill_(False)
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, order, taken)
    return _lists(mask.view(batch, heads, queries, chunks) | poisoned)


def select_share(
    scores: torch.Tensor, own: torch.Tensor, sizes: torch.Tensor, share: float, pool: Pool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best chunks that hold ``share`` of a pool's similarity; arguments as for topk."""
    chunks = scores.shape[-1]
    is_own = _own_entries(own, chunks).expand_as(scores)
    valid = _in_pool(scores, sizes)
    if pool == "query_head":
        return _select_share_of_queries(scores, is_own, valid, _poisoned(scores, sizes), share)
    # One row per pool; float64, since a pool may sum up a hundred million numbers.
    dims = {"block": (0, 3, 1, 2), "head_global": (0, 1, 2, 3), "overall": (0, 1, 2, 3)}[pool]
    start = 1 if pool == "overall" else 2
    rows, own_rows, valid_rows = (
        each.permute(dims).flatten(start) for each in (scores.double(), is_own, valid)
    )
    normal, flat = _normalised(rows, valid_rows)
    total = normal.sum(-1, keepdim=True) + EPSILON
    needed = share - (normal * own_rows).sum(-1, keepdim=True) / total
    others = normal.masked_fill(own_rows | ~valid_rows, -1)
    best, order = others.sort(dim=-1, descending=True, stable=True)
    held = best.clamp_min(0).cumsum(-1) / total
    # The prefix that first holds enough: the entries before which something is still needed.
    taken = ((held - best.clamp_min(0) / total) < needed) | flat | (share == 1)
    taken[..., 0].fill_(True)
    taken &= best >= 0
    mask = torch.zeros_like(taken).scatter_(-1, order, taken) | own_rows
    shape = [scores.shape[dim] for dim in dims]
    back = [dims.index(dim) for dim in range(4)]
    return _lists(mask.view(shape).permute(back) | _poisoned(scores, sizes))


def _select_share_of_queries(
    scores: torch.Tensor,
    is_own: torch.Tensor,
    valid: torch.Tensor,
    poisoned: torch.Tensor,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool per query, by the smallest set that holds a share p, the same for all queries.

    With R the sum of the other chunks and o the similarity of the own one, others of the sum
    ``share * (R + o) - o`` are needed. Give the own chunk the mass R + 2 o instead of o: then it
    is the heaviest, so it comes first, and what is missing to (1 + share) / 2 of all mass is that.
    """
    chunks = scores.shape[-1]
    normal, flat = _normalised(scores, valid)
    normal = normal.clamp_min(TINY).masked_fill(~valid, 0)  # log(0): never selected
    own = (normal * is_own).sum(-1, keepdim=True)
    others = normal.masked_fill(is_own, 0).sum(-1, keepdim=True)
    mass = torch.where(is_own, (others + 2 * own).clamp_min(TINY), normal)
    selected = select_top_p(mass.log(), (1 + share) / 2, minimum_count=min(2, chunks))
    indices, counts = selected.key_indices, selected.key_counts
    every = torch.arange(chunks, dtype=torch.int32, device=scores.device)
    whole = flat | poisoned.any(-1, keepdim=True)  # a row of NaN may as well have all
    return torch.where(whole, every, indices), counts.masked_fill(whole[..., 0], chunks)


def _in_pool(scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return scores.isfinite() & (sizes > 0).unsqueeze(2)


def _poisoned(scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Scores that dense attention would make NaN of a row: NaN and infinity, of visible chunks."""
    return ~(scores < torch.inf) & (sizes > 0).unsqueeze(2)


def _own_entries(own: torch.Tensor, chunks: int) -> torch.Tensor:
    """bool ``[n, C]``: the chunk that each query lies in."""
    return own[:, None] == torch.arange(chunks, device=own.device)


def _normalised(rows: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid entries of each row brought to 0 .. 1, others 0; and where all of a row are equal."""
    low = rows.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = rows.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    flat = ~(high - low > EPSILON)  # also where nothing is valid
    normal = (rows - low) / (high - low).masked_fill(flat, 1)
    return normal.masked_fill(~valid | flat, 0), flat


def _lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending numbers of the True entries of each row, and how many there are."""
    indices = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    return indices.int(), mask.sum(-1, dtype=torch.int32)
