"""Triton kernel of :mod:`polyattn_kernels.selection`: one program selects the blocks of one row.

A float becomes an integer of the same order, and the score of the n-th best block is found bit by
bit: 32 counts over a row that stays in registers, instead of a sort. Imported only to launch.
"""

# Triton's compiler reads the annotations of parameters and knows only its own, so its kernels
# annotate nothing but compile-time constants.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 - compile-time constants are upper case, as in every Triton kernel

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["select_blocks"]

RULES = {"top_k": 0, "top_p": 1, "threshold": 2}


@triton.jit
def _cut(key, mass, total, target):
    """An integer t such that all keys >= t have a mass of at least target, and those > t less.

    Or of exactly target: the search ends there, which it mostly does half-way. ``total`` is the
    mass of all keys, at least target.
    """
    held = tl.sum(tl.where(key >= 0, mass, 0))
    cut = tl.where(held >= target, 0, -2147483648).to(tl.int32)
    held = tl.where(held >= target, held, total)
    step = tl.full([], 1 << 30, dtype=tl.int32)
    while (step != 0) & (held != target):
        candidate = cut + step
        above = tl.sum(tl.where(key >= candidate, mass, 0))
        cut = tl.where(above >= target, candidate, cut)
        held = tl.where(above >= target, above, held)
        step = step >> 1
    return cut


@triton.jit  # type: ignore[untyped-decorator]
def _select_blocks_kernel(
    scores,
    key_sizes,
    key_indices,
    key_counts,
    scores_stride_b,
    scores_stride_h,
    scores_stride_m,
    sizes_stride_b,
    sizes_stride_h,
    heads,
    rows,
    blocks,
    value,
    minimum,
    capacity,
    RULE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALL_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // rows // heads
    head = pid // rows % heads
    number = tl.arange(0, BLOCK)
    exists = number < blocks
    start = scores + batch * scores_stride_b + head * scores_stride_h
    logit = tl.load(
        start + (pid % rows) * scores_stride_m + number, mask=exists, other=float("-inf")
    )
    if HAS_SIZES:
        size = tl.load(
            key_sizes + batch * sizes_stride_b + head * sizes_stride_h + number,
            mask=exists,
            other=0,
        )
        if WEIGHTED:
            logit += tl.log(tl.maximum(size, 1).to(tl.float32))
        logit = tl.where(size > 0, logit, float("-inf"))
    # False for NaN too. Zeros of both signs are equal, so they must be one integer.
    selectable = logit > float("-inf")
    logit = tl.where(selectable & (logit != 0), logit, 0.0)
    bits = logit.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(selectable, key, -2147483648)
    one = selectable.to(tl.int32)
    available = tl.sum(one)
    wanted = available
    if RULE == 1 and not ALL_MASS:
        bounded = tl.minimum(logit, 3.4028234663852886e38)
        highest = tl.max(tl.where(selectable, bounded, -3.4028234663852886e38))
        mass = tl.exp(tl.where(selectable, bounded - highest, float("-inf")))
        total = tl.sum(mass)
        target = value * total
        cut = _cut(key, mass, total, target)
        above = tl.sum(tl.where(key > cut, mass, 0.0))
        tied = (key == cut) & selectable
        ties = tl.sum(tied.to(tl.int32))
        each = tl.max(tl.where(tied, mass, 0.0))
        # Of the blocks tied at the cut, those that still leave something to be reached.
        before = above + (tl.cumsum(tied.to(tl.int32)) - 1).to(tl.float32) * each
        needed = tl.sum((tied & (before < target)).to(tl.int32))
        wanted = tl.sum((key > cut).to(tl.int32)) + tl.minimum(needed, ties)
    if RULE == 2:
        # -inf was replaced above, so a threshold of -inf compares selectable blocks alone.
        wanted = tl.sum((selectable & (logit >= value)).to(tl.int32))
    count = tl.minimum(tl.minimum(tl.maximum(wanted, minimum), capacity), available)
    cut = _cut(key, one, available, count)
    above = tl.sum((selectable & (key > cut)).to(tl.int32))
    tied = (key == cut) & selectable
    tie_rank = tl.cumsum(tied.to(tl.int32)) - 1
    kept = (selectable & (key > cut)) | (tied & (tie_rank < count - above))
    place = tl.cumsum(kept.to(tl.int32)) - 1
    row = key_indices + pid * capacity
    tl.store(row + place, number, mask=kept)
    tl.store(row + number, tl.zeros_like(number), mask=(number >= count) & (number < capacity))
    tl.store(key_counts + pid, count)


def select_blocks(
    scores: torch.Tensor,
    key_sizes: torch.Tensor | None,
    weighted: bool,
    rule: str,
    value: float,
    minimum: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists ``[B, H, Mq, capacity]`` and counts ``[B, H, Mq]``, int32, for float32 scores."""
    batch, heads, rows, blocks = scores.shape
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    indices = scores.new_empty(batch, heads, rows, capacity, dtype=torch.int32)
    counts = scores.new_zeros(batch, heads, rows, dtype=torch.int32)
    if not counts.numel() or not blocks:
        return indices, counts
    sizes = scores  # stands in for sizes that are absent
    size_strides = (0, 0)
    if key_sizes is not None:
        sizes = key_sizes.contiguous().expand(batch, heads, blocks)
        size_strides = (sizes.stride(0), sizes.stride(1))
    block = max(32, triton.next_power_of_2(blocks))
    _select_blocks_kernel[(batch * heads * rows,)](
        scores,
        sizes,
        indices,
        counts,
        *scores.stride()[:3],
        *size_strides,
        heads,
        rows,
        blocks,
        value,
        minimum,
        capacity,
        RULE=RULES[rule],
        HAS_SIZES=key_sizes is not None,
        WEIGHTED=weighted,
        ALL_MASS=rule == "top_p" and value == 1,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return indices, counts
