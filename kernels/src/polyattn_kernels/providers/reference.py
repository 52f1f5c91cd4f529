"""Block-sparse attention in plain torch: right for every plan, on every device, and slow.

Scores of *all* pairs are computed, a bounded number of queries at a time, and a plan's pairs are
selected from them, so the cost is that of dense attention. Nothing waits for the device on a GPU.
Made of differentiable operations only: :func:`run` can be called directly where a gradient is
wanted.
"""

from __future__ import annotations

import math

import torch

from polyattn_kernels.plan import BlockSparsePlan, mask_of_rows

__all__ = ["NAME", "reasons", "run"]

NAME = "reference"

# Scores held at a time, all batch items and heads together: 64 MiB in float32.
MOST_SCORES = 1 << 24


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
    key that a query does attend to makes its result NaN; a non-finite value makes NaN of that
    channel.
    """
    compute = torch.float64 if q.dtype is torch.float64 else torch.float32
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    k, bad_keys = _without_non_finite(k.transpose(1, 2).to(compute))
    v, bad_values = _without_non_finite(v.transpose(1, 2).to(compute))
    block_mask = plan.to_block_mask()
    query_blocks, key_blocks = plan.blocks_of_tokens("query"), plan.blocks_of_tokens("key")

    def by_kv_head(x: torch.Tensor) -> torch.Tensor:
        """[B, H, rows, n] as [B, Hkv, groups * rows, n]: the heads that share keys, stacked."""
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    outs, lses = [], []
    rows = max(1, MOST_SCORES // (batch * heads * keys))
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
            out = out.masked_fill(
                by_kv_head(mask.to(compute)) @ bad_values.to(compute) > 0, math.nan
            )
        outs.append(out.view(batch, heads, -1, dim).transpose(1, 2).to(q.dtype))
        if return_lse:
            lse = scores.logsumexp(-1, keepdim=True).masked_fill(blind, -math.inf)
            lses.append(lse.squeeze(-1).float())
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2) if return_lse else None


def _without_non_finite(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x with zeros for what is not finite, and where that was; None if it is known to be nowhere.

    Zero times NaN is NaN: a matrix product must not meet a value that some rows may not see.
    """
    bad = ~x.isfinite()
    if x.device.type == "cpu" and not bad.any():  # elsewhere, asking would wait for the device
        return x, None
    return x.masked_fill(bad, 0), bad
