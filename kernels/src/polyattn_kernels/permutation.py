"""Reorder tokens by an index, per head, in one pass over memory.

Tensors are ``[B, S, H, D]`` of any strides; an index is int32 ``[B|1, H|1, P]`` on the same
device. The torch path is differentiable and runs everywhere; the Triton path runs on CUDA and
ROCm. Both move the same bits.
"""

from __future__ import annotations

import torch

from polyattn_kernels._triton_support import choose_provider
from polyattn_kernels.errors import AttentionInputError

__all__ = [
    "check_index",
    "gather_tokens",
    "inverse_permutation",
    "inverse_permute_tokens",
    "permute_tokens",
]


def gather_tokens(
    x: torch.Tensor, index: torch.Tensor, *, provider: str = "auto", checked: bool = False
) -> torch.Tensor:
    """``out[b, p, h] = x[b, index[b, h, p], h]``, zeros where the index is -1.

    x ``[B, S, H, D]``, index int32 ``[B|1, H|1, P]``; returns a contiguous ``[B, P, H, D]``.
    ``checked=True`` synchronises with the device and refuses entries outside -1..S-1 with an
    AttentionInputError. Unchecked, entries below -1 give zeros too; those from S up give zeros on
    the Triton path and fail as torch's own indexing does on the torch path. Neither reads outside
    x.
    """
    check_index(x, index)
    if checked:
        _check_entries(index, x.shape[1])
    batch, _, heads, width = x.shape
    positions = index.shape[-1]
    if choose_provider(provider, x) == "triton":
        from polyattn_kernels._token_kernels import move_rows

        out = x.new_empty(batch, positions, heads, width)
        move_rows(*_whole_rows(x, out, index), index, scatter=False)
        return out
    if not x.shape[1]:  # nothing to read: an index may hold only -1
        return x.new_zeros(batch, positions, heads, width)
    out = torch.gather(x, 1, _expanded(index.clamp_min(0), x))
    absent = (index < 0).transpose(1, 2)[..., None]
    return out.masked_fill(absent, 0)


def permute_tokens(
    x: torch.Tensor, permutation: torch.Tensor, *, provider: str = "auto", checked: bool = False
) -> torch.Tensor:
    """``out[b, p, h] = x[b, permutation[b, h, p], h]``: position p of the walk is that token.

    x ``[B, S, H, D]``, permutation int32 ``[B|1, H|1, S]``; returns a contiguous tensor of x's
    shape. ``checked=True`` synchronises and refuses what is not a permutation with an
    AttentionInputError.
    """
    check_index(x, permutation, "permutation", x.shape[1])
    if checked:
        _check_permutation(permutation)
    if choose_provider(provider, x) == "triton":
        return gather_tokens(x, permutation, provider=provider)
    return torch.gather(x, 1, _expanded(permutation, x))


def inverse_permute_tokens(
    x: torch.Tensor, permutation: torch.Tensor, *, provider: str = "auto", checked: bool = False
) -> torch.Tensor:
    """``out[b, permutation[b, h, p], h] = x[b, p, h]``: undoes :func:`permute_tokens`.

    Scatters, so that no inverse has to be computed. Shapes as there. The index has to be a
    permutation: rows that it leaves out would hold arbitrary values. ``checked=True``
    synchronises and refuses one that is not with an AttentionInputError.
    """
    check_index(x, permutation, "permutation", x.shape[1])
    if checked:
        _check_permutation(permutation)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if choose_provider(provider, x) == "triton":
        from polyattn_kernels._token_kernels import move_rows

        move_rows(*_whole_rows(x, out, permutation), permutation, scatter=True)
        return out
    return out.scatter_(1, _expanded(permutation, x), x)


def inverse_permutation(permutation: torch.Tensor) -> torch.Tensor:
    """int32 ``[..., S]`` with ``inverse[..., permutation[..., p]] = p``; no synchronisation."""
    length = permutation.shape[-1]
    positions = torch.arange(length, dtype=torch.int32, device=permutation.device)
    return torch.empty_like(permutation, dtype=torch.int32).scatter_(
        -1, permutation.long(), positions.expand(permutation.shape)
    )


def _expanded(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The index as torch.gather wants it, int64 ``[B, P, H, D]`` without a copy per column."""
    batch, _, heads, width = x.shape
    positions = index.shape[-1]
    per_head = index.transpose(1, 2).long().expand(batch, positions, heads)
    return per_head[..., None].expand(batch, positions, heads, width)


def _whole_rows(
    source: torch.Tensor, target: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target with all heads of a token in one row, where the index and strides allow.

    One order for all heads then moves rows of H * D values instead of H rows of D.
    """
    heads, width = source.shape[2:]
    dense = source.stride(3) == 1 and source.stride(2) == width
    if index.shape[1] == 1 and heads > 1 and dense:
        return source.flatten(2)[:, :, None], target.flatten(2)[:, :, None]
    return source, target


def check_index(
    x: torch.Tensor, index: torch.Tensor, name: str = "index", entries: int | None = None
) -> None:
    """Refuse an index that does not fit x ``[B, S, H, D]``; reads shapes only.

    It is int32 ``[B|1, H|1, entries]`` on x's device, contiguous in its last dimension; ``entries``
    None allows any number. AttentionInputError otherwise.
    """
    if x.dim() != 4:
        raise AttentionInputError(f"x must be [B, S, H, D], found shape {list(x.shape)}")
    if index.dtype is not torch.int32:
        raise AttentionInputError(
            f"{name} must be int32, found {index.dtype}", hint=f"{name}.int()"
        )
    batches, heads = (1, x.shape[0]), (1, x.shape[2])
    fits = index.dim() == 3 and index.shape[0] in batches and index.shape[1] in heads
    if not fits or (entries is not None and index.shape[-1] != entries):
        raise AttentionInputError(
            f"{name} must be [B|1, H|1, {'any' if entries is None else entries}] with "
            f"B={x.shape[0]} and H={x.shape[2]}, found shape {list(index.shape)}"
        )
    if index.device != x.device:
        raise AttentionInputError(
            f"{name} is on {index.device} and x on {x.device}", hint=f"{name}.to(x.device)"
        )
    if index.stride(-1) != 1 and index.shape[-1] > 1:
        raise AttentionInputError(
            f"the last dimension of {name} must be contiguous", hint=f"{name}.contiguous()"
        )


def _check_permutation(permutation: torch.Tensor) -> None:
    length = permutation.shape[-1]
    expected = torch.arange(length, dtype=torch.int32, device=permutation.device)
    wrong = (permutation.sort(-1).values != expected).any(-1)
    if bool(wrong.any()):
        batch, head = wrong.nonzero()[0].tolist()
        raise AttentionInputError(
            f"the index of batch {batch}, head {head} is not a permutation of 0..{length - 1}: "
            "some token is missing and another repeated or out of range"
        )


def _check_entries(index: torch.Tensor, length: int) -> None:
    wrong = (index < -1) | (index >= length)
    if bool(wrong.any()):
        batch, head, position = wrong.nonzero()[0].tolist()
        found = int(index[batch, head, position])
        raise AttentionInputError(
            f"index[{batch}, {head}, {position}] is {found}; entries lie in 0..{length - 1}, or "
            "are -1 for a row of zeros"
        )
