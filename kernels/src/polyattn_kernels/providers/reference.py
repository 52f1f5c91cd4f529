"""Block-sparse attention in plain torch: right for every plan, on every device.

On a CPU, where a plan's lists can simply be read, each query block is multiplied with the keys of
its list and nothing else. Elsewhere, and where blocks hold few queries, scores of *all* pairs are
computed, a bounded number of queries at a time, and a plan's pairs are selected from them: the cost
of dense attention, and nothing that waits for the device. Made of differentiable operations only:
:func:`run` can be called directly where a gradient is wanted.
"""

from __future__ import annotations

import math

import torch

from polyattn_kernels.plan import BlockSparsePlan, Side, mask_of_rows

__all__ = ["NAME", "reasons", "run"]

NAME = "reference"

# Scores held at a time, all batch items and heads together. On a CPU they should fit into a cache.
MOST_SCORES = 1 << 24
MOST_SCORES_ON_A_CPU = 1 << 20
FEW_QUERIES = 16  # per block: below, one product for each block is slower than all scores


def reasons(plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Always empty: whatever :func:`~polyattn_kernels.block_sparse_attention` accepts is served."""
    return []


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax over each query's keys, computed in float64 for float64 and in float32 otherwise.

    What a query does not attend to is taken out before anything is multiplied by it. A non-finite
    key that a query does attend to makes its result NaN; non-finite values give their channel what
    dense attention gives: those of one sign and of weight above zero that infinity, others NaN.

    Raises:
        PlanError: on a CPU, where asking waits for nothing, for wrong values in the plan.
    """
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        plan.validate()
    if on_cpu and plan.query_length >= FEW_QUERIES * plan.num_query_blocks:
        return _run_block_by_block(q, k, v, plan, scale, return_lse)
    compute = torch.float64 if q.dtype is torch.float64 else torch.float32
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    k, bad_keys = _without_non_finite(k.transpose(1, 2).to(compute))
    raw_v = v.transpose(1, 2).to(compute)
    v, bad_values = _without_non_finite(raw_v)
    block_mask = plan.to_block_mask()
    query_blocks, key_blocks = plan.blocks_of_tokens("query"), plan.blocks_of_tokens("key")

    def by_kv_head(x: torch.Tensor) -> torch.Tensor:
        """[B, H, rows, n] as [B, Hkv, groups * rows, n]: the heads that share keys, stacked."""
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    outs, lses = [], []
    most = MOST_SCORES_ON_A_CPU if on_cpu else MOST_SCORES
    rows = max(1, most // (batch * heads * keys))
    for start in range(0, queries, rows):
        part = q[:, start : start + rows].transpose(1, 2).to(compute)
        mask = mask_of_rows(block_mask, query_blocks[..., start : start + rows], key_blocks)
        mask = mask.expand(batch, heads, -1, -1)
        blind = ~mask.any(-1, keepdim=True)
        part = part.masked_fill(blind, 0)
        scores = (by_kv_head(part) @ k.transpose(-1, -2)).view(mask.shape) * scale
        if bad_keys is not None:
            bad = bad_keys.any(-1).repeat_interleave(heads // kv_heads, dim=1).unsqueeze(2)
            scores = scores.masked_fill(bad, math.nan)
        # All scores of a blind row become zero: its softmax, and the gradient of it, stay finite.
        scores = scores.masked_fill(~mask, -math.inf).masked_fill(blind, 0)
        weights = by_kv_head(scores.softmax(-1).masked_fill(blind, 0))
        out = weights @ v
        if bad_values is not None:
            out = _with_non_finite(out, weights, by_kv_head(mask), raw_v, bad_values)
        outs.append(out.view(batch, heads, -1, dim).transpose(1, 2).to(q.dtype))
        if return_lse:
            lse = scores.logsumexp(-1, keepdim=True).masked_fill(blind, -math.inf)
            lses.append(lse.squeeze(-1).float())
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2) if return_lse else None


def _run_block_by_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    compute = torch.float64 if q.dtype is torch.float64 else torch.float32
    batch, queries, heads, _ = q.shape
    group = heads // k.shape[2]
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((batch, heads, queries), -math.inf) if return_lse else None
    counts, indices = (
        each.expand(batch, heads, *each.shape[2:]) for each in (plan.key_counts, plan.key_indices)
    )
    for item in range(batch):
        for head in range(heads):
            rows_of, columns_of = (_tokens(plan, side, item, head) for side in ("query", "key"))
            queries_here = q[item, :, head].to(compute)
            keys, values = (x[item, :, head // group].to(compute) for x in (k, v))
            lists = zip(
                rows_of, counts[item, head].tolist(), indices[item, head].tolist(), strict=True
            )
            for rows, count, blocks in lists:
                if not len(rows) or not count:
                    continue
                columns = torch.cat([columns_of[block] for block in blocks[:count]])
                if not len(columns):
                    continue
                scores = queries_here[rows] @ keys[columns].T * scale
                out[item, rows, head] = (scores.softmax(-1) @ values[columns]).to(q.dtype)
                if lse is not None:
                    lse[item, head, rows] = scores.logsumexp(-1).float()
    return out, lse


def _tokens(plan: BlockSparsePlan, side: str, item: int, head: int) -> list[torch.Tensor]:
    """The tokens of each block of a side, for one batch item and head."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[item if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0]

    name: Side = "query" if side == "query" else "key"
    starts, sizes = of(plan.block_starts(name)).tolist(), of(plan.block_sizes(name)).tolist()
    order: torch.Tensor | None = getattr(plan, f"{side}_permutation")
    length: int = getattr(plan, f"{side}_length")
    walk = torch.arange(length) if order is None else of(order).long()
    return [walk[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _with_non_finite(
    out: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    v: torch.Tensor,
    bad: torch.Tensor,
) -> torch.Tensor:
    """Put into ``out`` what the values add that are not finite, and that its rows may see."""

    def count(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return rows.to(out.dtype) @ of.to(out.dtype)

    seen = count(mask, bad)
    result = out.masked_fill(seen > 0, math.nan)
    for infinity in (math.inf, -math.inf):
        # Zero times infinity is NaN, and so is the sum of two of different signs.
        alone = (seen > 0) & (count(weights > 0, v == infinity) == seen)
        result = result.masked_fill(alone, infinity)
    return result


def _without_non_finite(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x with zeros for what is not finite, and where that was; None if it is known to be nowhere.

    Zero times NaN is NaN: a matrix product must not meet a value that some rows may not see.
    """
    bad = ~x.isfinite()
    if x.device.type == "cpu" and not bad.any():  # elsewhere, asking would wait for the device
        return x, None
    return x.masked_fill(bad, 0), bad
