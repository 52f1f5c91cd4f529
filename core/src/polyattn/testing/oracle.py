"""What attention is, in float64: the answer every backend is held against.

:func:`attention` shares no code with the dispatcher or any backend. It keeps the semantics of the
contract: bottom-right causal alignment, zeros and a log-sum-exp of -inf for a query that sees no
key, and keys that nobody may see never touch the result, NaN or not.
:func:`same_precision_attention` is the plainest possible kernel in the tensors' own dtype; how far
it is from the oracle says what error the dtype alone explains.
"""

from __future__ import annotations

import math

import torch

__all__ = ["attention", "same_precision_attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of q ``[B, Sq, H, D]`` over k, v ``[B, Sk, Hkv, D]`` in float64; differentiable.

    ``mask`` is boolean (True = may attend) or additive; a boolean ``[B, Sk]`` hides keys per batch
    item, any other mask broadcasts from the right to ``[B, H, Sq, Sk]``. Returns out
    ``[B, Sq, H, D]`` and, when asked, the natural log-sum-exp ``[B, H, Sq]``, both float64.
    """
    q, k, v = (_float64(tensor) for tensor in (q, k, v))
    visible, bias = _visibility(q, k, mask, is_causal)
    k, v = _without_unseen_keys(k, v, visible)
    scores = q.transpose(1, 2) @ _per_query_head(k, q).transpose(-1, -2)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.masked_fill(~visible, 0)
    blind = ~visible.any(-1, keepdim=True)
    # Scores of a blind row are all set to zero: the softmax, and its gradient, then stay finite.
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(blind, 0)
    out = (weights @ _per_query_head(v, q)).transpose(1, 2)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).masked_fill(blind.squeeze(-1), float("-inf"))


def same_precision_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and log-sum-exp by matrix products in the tensors' dtype and a float32 softmax."""
    dtype = q.dtype
    softmax_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    visible, bias = _visibility(q, k, mask, is_causal)
    k, v = _without_unseen_keys(k, v, visible)
    scores = (q.transpose(1, 2) @ _per_query_head(k, q).transpose(-1, -2)).to(softmax_dtype)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(softmax_dtype).masked_fill(~visible, 0)
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(blind, 0).to(dtype)
    out = (weights @ _per_query_head(v, q)).transpose(1, 2)
    return out, scores.logsumexp(-1).masked_fill(blind.squeeze(-1), float("-inf"))


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where a device has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _per_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``[B, Sk, Hkv, D]`` as ``[B, H, Sk, D]``: consecutive query heads share a key head."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2)


def _visibility(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which keys each query may see, ``[B, H, Sq, Sk]``, and what is added to their scores."""
    batch, queries, heads, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    full = (batch, heads, queries, keys)
    visible = torch.ones(full, dtype=torch.bool, device=q.device)
    bias = None
    if mask is not None:
        mask = mask.to(q.device)
        if mask.dtype is torch.bool:
            per_item = mask.dim() == 2 and mask.shape == (batch, keys)
            visible = (mask[:, None, None, :] if per_item else mask).expand(full)
        else:
            bias = mask.to(q.dtype).expand(full)
            visible = bias != float("-inf")
    if is_causal:
        last = torch.arange(queries, device=q.device) + (keys - queries)
        visible = visible & (torch.arange(keys, device=q.device) <= last[:, None])
    return visible, bias


def _without_unseen_keys(
    k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that no query of their batch item sees count for nothing, whatever they hold."""
    unseen = ~visible.any(2).any(1)[:, :, None, None]
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
