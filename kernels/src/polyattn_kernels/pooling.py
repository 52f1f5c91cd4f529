"""Means of blocks of tokens, summed in float32 and free of padding.

The same blocks as :class:`~polyattn_kernels.plan.BlockSparsePlan` has: uniform ones with optional
valid lengths, or variable ones between offsets, either over a permuted walk. A token that belongs
to no block is never read into a sum, so it may hold NaN. Equal inputs give equal bits in every
run: no path adds in an order that the hardware chooses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from polyattn_kernels._triton_support import choose_provider
from polyattn_kernels.errors import AttentionInputError, require_int
from polyattn_kernels.permutation import check_index, gather_tokens

__all__ = ["gather_and_pool", "pool_blocks"]

# Float32 elements that the torch path gathers at a time: 256 MiB.
GATHERED_ELEMENTS = 1 << 26


def pool_blocks(
    x: torch.Tensor,
    *,
    block: int | None = None,
    lengths: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    provider: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each block of x ``[B, S, H, D]``, and how many tokens it is the mean of.

    Args:
        block: tokens in a uniform block; block i holds positions ``i * block`` to
            ``min((i + 1) * block, S)``.
        lengths: int32 ``[B|1, H|1, M]``, tokens at the start of each uniform block that count; a
            negative number counts as 0, one that is too large as the rows of the block.
        offsets: int32 ``[B|1, H|1, M + 1]``, variable blocks instead of uniform ones: 0 first, S
            last, never decreasing. A block that ends before it starts has count 0.
        permutation: int32 ``[B|1, H|1, S]``, the token at each position; None: token order. With
            lengths there may be another number of positions, and -1 where no token is.
        dtype: of the means, None for x's. Sums are float32 (float64 for a float64 x).
        provider: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        means ``[B, M, H, D]`` and counts int32 ``[B|1, H|1, M]``, where each leading dimension is 1
        if the blocks are shared along it. A block without tokens has mean 0 and count 0.

    Raises:
        AttentionInputError: both or neither of block and offsets, or tensors that do not fit x.
    """
    counts = _counts(x, block, lengths, offsets, permutation)
    dtype = x.dtype if dtype is None else dtype
    if choose_provider(provider, x) == "triton":
        from polyattn_kernels._token_kernels import average_blocks

        batch, _, heads, width = x.shape
        means = x.new_empty(batch, counts.shape[-1], heads, width, dtype=dtype)
        average_blocks(
            x, means, block=block, lengths=lengths, offsets=offsets, permutation=permutation
        )
        return means, counts
    if block is not None:
        walk = x if permutation is None else gather_tokens(x, permutation, provider="torch")
        sums = _uniform_sums(walk, block, lengths)
    else:
        assert offsets is not None
        sums = _variable_sums(x, offsets, permutation)
    divisor = counts.clamp_min(1).transpose(1, 2)[..., None]
    return (sums / divisor).to(dtype), counts


def gather_and_pool(
    x: torch.Tensor,
    index: torch.Tensor,
    *,
    block: int,
    lengths: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    provider: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~polyattn_kernels.permutation.gather_tokens`, and :func:`pool_blocks` of the result.

    Returns a contiguous ``[B, P, H, D]`` and the means ``[B, M, H, D]``; all arguments are those of
    the two. On a GPU x is read once, for both, and what is gathered is not read again.
    """
    check_index(x, index)
    if choose_provider(provider, x) == "torch":
        moved = gather_tokens(x, index, provider="torch")
        return moved, pool_blocks(
            moved, block=block, lengths=lengths, dtype=dtype, provider="torch"
        )[0]
    from polyattn_kernels._token_kernels import average_blocks

    batch, _, heads, width = x.shape
    blocks = _uniform_counts(x, index.shape[-1], block, lengths).shape[-1]
    moved = x.new_empty(batch, index.shape[-1], heads, width)
    means = x.new_empty(batch, blocks, heads, width, dtype=dtype or x.dtype)
    average_blocks(
        x, means, block=block, lengths=lengths, offsets=None, permutation=index, moved=moved
    )
    return moved, means


def _counts(
    x: torch.Tensor,
    block: int | None,
    lengths: torch.Tensor | None,
    offsets: torch.Tensor | None,
    permutation: torch.Tensor | None,
) -> torch.Tensor:
    """Tokens in each block, int32 ``[B|1, H|1, M]``; refuses arguments that do not fit."""
    if x.dim() != 4:
        raise AttentionInputError(f"x must be [B, S, H, D], found shape {list(x.shape)}")
    if not x.dtype.is_floating_point:
        raise AttentionInputError(f"x must be floating point, found {x.dtype}")
    if (block is None) == (offsets is None):
        raise AttentionInputError(
            "blocks are uniform (block=) or variable (offsets=); found "
            + ("neither" if block is None else "both")
        )
    length = x.shape[1]
    if permutation is not None:
        check_index(x, permutation, "permutation", length if lengths is None else None)
        length = permutation.shape[-1]
    if offsets is not None:
        if lengths is not None:
            raise AttentionInputError("lengths belong to uniform blocks; offsets say it all")
        check_index(x, offsets, "offsets", None)
        if not offsets.shape[-1]:
            raise AttentionInputError("offsets of M blocks have M + 1 entries, found none")
        return offsets.diff(dim=-1).clamp_min(0)
    assert block is not None
    return _uniform_counts(x, length, block, lengths)


def _uniform_counts(
    x: torch.Tensor, length: int, block: int, lengths: torch.Tensor | None
) -> torch.Tensor:
    """Of a walk of ``length`` positions."""
    require_int("block", block)
    blocks = -(-length // block)
    starts = torch.arange(0, length, block, dtype=torch.int32, device=x.device)
    rows = (length - starts).clamp_max(block)[None, None]
    if lengths is None:
        return rows
    check_index(x, lengths, "lengths", blocks)
    return torch.minimum(lengths.clamp_min(0), rows)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _uniform_sums(x: torch.Tensor, block: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """Sums over consecutive blocks of x, ``[B, M, H, D]``."""
    length = x.shape[1]
    if lengths is not None:
        position = torch.arange(length, device=x.device)
        valid = position % block < lengths.repeat_interleave(block, -1)[..., :length]
        x = x.masked_fill(~valid.transpose(1, 2)[..., None], 0)
    whole = length // block
    split = x[:, : whole * block].view(x.shape[0], whole, block, *x.shape[2:])
    sums = split.sum(2, dtype=_accumulator(x))
    if whole * block == length:
        return sums
    rest = x[:, whole * block :].sum(1, keepdim=True, dtype=_accumulator(x))
    return torch.cat([sums, rest], 1)


def _variable_sums(
    x: torch.Tensor, offsets: torch.Tensor, permutation: torch.Tensor | None
) -> torch.Tensor:
    """Sums over blocks between offsets, ``[B, M, H, D]``, a few heads at a time."""
    batch, length, heads, width = x.shape
    # The reduction below trusts its lengths, so they are made to fit, and to cover every token:
    # what lies before the first block or after the last is a segment too, and dropped again.
    inside = offsets.long().clamp(0, length).cummax(-1).values
    ends = F.pad(inside, (0, 1), value=length)
    covered = ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))
    covered = covered.expand(batch, heads, covered.shape[-1])
    sums = []
    for first, last in head_chunks(batch * length * width, heads):
        walk = x[:, :, first:last]
        if permutation is not None:
            order = permutation if permutation.shape[1] == 1 else permutation[:, first:last]
            walk = gather_tokens(walk, order, provider="torch")
        rows = walk.transpose(1, 2).to(_accumulator(x)).reshape(-1, width)
        reduced = torch.segment_reduce(
            rows,
            "sum",
            lengths=covered[:, first:last].flatten(),
            unsafe=True,  # the safe form waits for the device to check the lengths
        )
        sums.append(reduced.view(batch, last - first, -1, width)[:, :, 1:-1])
    return torch.cat(sums, 1).transpose(1, 2)


def head_chunks(elements_per_head: int, heads: int) -> list[tuple[int, int]]:
    """Ranges of heads that hold at most GATHERED_ELEMENTS elements each, or a single head."""
    step = max(1, GATHERED_ELEMENTS // max(1, elements_per_head))
    return [(first, min(first + step, heads)) for first in range(0, heads, step)]
