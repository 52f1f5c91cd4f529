"""Joining attention over two disjoint sets of keys into attention over both.

The identity is that of online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867): each part
counts by the exponential of its log-sum-exp.
"""

from __future__ import annotations

import math

import torch

from polyattn_kernels._triton_support import choose_provider
from polyattn_kernels.errors import AttentionInputError

__all__ = ["merge_attention_states"]


def merge_attention_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    provider: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both parts, which must not share any.

    Args:
        out_a: ``[B, S, H, D]``, any floating dtype.
        lse_a: ``[B, H, S]`` float32, natural logarithm; -inf where the part has no key for a query.
        out_b: as ``out_a``, of the same shape and dtype.
        lse_b: as ``lse_a``.
        provider: ``"auto"``, ``"torch"``, which is differentiable, or ``"triton"``, which is one
            pass over memory.

    Returns:
        ``out`` in the dtype of the parts (weighed in float32, or float64 for float64) and ``lse``
        float32. A part whose weight is zero is not read, so it may hold NaN where its lse is -inf.
        Where both are -inf, the result is zeros and -inf. A NaN in an lse reaches the result, and
        an lse of +inf, which attention over finite scores does not give, makes NaN.

    Raises:
        AttentionInputError: for shapes, dtypes or devices that do not fit together.
        ProviderError: where the named provider is unknown or cannot run.
    """
    _check(out_a, lse_a, out_b, lse_b)
    if choose_provider(provider, out_a, lse_a, out_b, lse_b) == "triton":
        from polyattn_kernels._token_kernels import merge_states

        out = out_a.new_empty(out_a.shape)
        lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
        parts = (each if each.stride(-1) == 1 else each.contiguous() for each in (out_a, out_b))
        part_a, part_b = parts
        merge_states(part_a, lse_a.contiguous(), part_b, lse_b.contiguous(), out, lse)
        return out, lse
    compute = torch.float64 if out_a.dtype is torch.float64 else torch.float32
    top = torch.maximum(lse_a, lse_b)
    origin = top.masked_fill(top == -math.inf, 0)
    weight_a, weight_b = ((each - origin).to(compute).exp() for each in (lse_a, lse_b))
    total = weight_a + weight_b  # at least 1, or 0 where neither part has a key
    lse = (origin + total.log()).float()
    total = total.masked_fill(total == 0, 1)

    def share(out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        part = (weight / total).transpose(1, 2).unsqueeze(-1)
        return (out.to(compute) * part).masked_fill(part == 0, 0)

    return (share(out_a, weight_a) + share(out_b, weight_b)).to(out_a.dtype), lse


def _check(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> None:
    if out_a.dim() != 4 or out_a.shape != out_b.shape or out_a.dtype is not out_b.dtype:
        raise AttentionInputError(
            "out_a and out_b must be [B, S, H, D] of one shape and dtype, found "
            f"{out_a.dtype} {list(out_a.shape)} and {out_b.dtype} {list(out_b.shape)}"
        )
    batch, tokens, heads, _ = out_a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != (batch, heads, tokens) or lse.dtype is not torch.float32:
            raise AttentionInputError(
                f"{name} must be float32 [B, H, S] = [{batch}, {heads}, {tokens}], found "
                f"{lse.dtype} {list(lse.shape)}"
            )
    if len({each.device for each in (out_a, lse_a, out_b, lse_b)}) > 1:
        raise AttentionInputError("out_a, lse_a, out_b and lse_b must be on one device")
