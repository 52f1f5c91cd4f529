"""Triton kernels over tokens: move rows, average blocks, find the nearest centroid.

Imported only to launch one. Every kernel takes ``[B, S, H, D]`` tensors by their strides, reads
nothing outside them whatever an index says, and gives the same bits in every run: no atomics.
Indices are widened to 64 bits before they meet a stride.
"""

# Triton's compiler reads the annotations of parameters and knows only its own, so its kernels
# annotate nothing but compile-time constants.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 - compile-time constants are upper case, as in every Triton kernel

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["average_blocks", "move_rows", "nearest_centroids"]


@triton.jit  # type: ignore[untyped-decorator]
def _move_rows_kernel(
    source,
    target,
    index,
    source_stride_b,
    source_stride_s,
    source_stride_h,
    source_stride_d,
    target_stride_b,
    target_stride_s,
    target_stride_h,
    index_stride_b,
    index_stride_h,
    heads,
    rows,
    limit,
    width,
    SCATTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Gather: target[p] = source[index[p]]. Scatter: target[index[p]] = source[p]."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    pid = tl.program_id(0)
    batch_head = pid // row_blocks
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    position = (pid % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)).to(tl.int64)
    entry = tl.load(
        index + batch * index_stride_b + head * index_stride_h + position,
        mask=position < rows,
        other=-1,
    )
    known = (entry >= 0) & (entry < limit)
    wide = column[None, :] < width
    source_row = position if SCATTER else entry
    target_row = entry if SCATTER else position
    from_rows = source + batch * source_stride_b + head * source_stride_h
    value = tl.load(
        from_rows
        + source_row.to(tl.int64)[:, None] * source_stride_s
        + column[None, :] * source_stride_d,
        mask=known[:, None] & wide,
        other=0.0,
    )
    # A gathered row without a source is zero and is written; a scattered row without a target
    # has no place to go.
    written = known if SCATTER else position < rows
    to_rows = target + batch * target_stride_b + head * target_stride_h
    tl.store(
        to_rows + target_row.to(tl.int64)[:, None] * target_stride_s + column[None, :],
        value,
        mask=written[:, None] & wide,
    )


def move_rows(
    source: torch.Tensor, target: torch.Tensor, index: torch.Tensor, *, scatter: bool
) -> None:
    """Copy rows of source into target (``[B, *, H, W]``, last stride 1) by index ``[B|1,H|1,P]``.

    Without ``scatter``, row p of target is row index[p] of source, or zero where the index is
    outside source. With it, row index[p] of target is row p of source.
    """
    batch, _, heads, width = source.shape
    rows = index.shape[-1]
    if not rows or not source.numel() + target.numel():
        return
    index = index.expand(batch, heads, rows)
    block_width = min(triton.next_power_of_2(width), 512)
    block_rows = max(1, 4096 // block_width)
    grid = (triton.cdiv(rows, block_rows) * batch * heads, triton.cdiv(width, block_width))
    _move_rows_kernel[grid](
        source,
        target,
        index,
        *source.stride(),
        *target.stride()[:3],
        *index.stride()[:2],
        heads,
        rows,
        (target if scatter else source).shape[1],
        width,
        SCATTER=scatter,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _merge_states_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    a_stride_b,
    a_stride_s,
    a_stride_h,
    b_stride_b,
    b_stride_s,
    b_stride_h,
    heads,
    tokens,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Rows of two states weighed by their shares; out and all lse are contiguous."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    batch_head = (pid // blocks).to(tl.int64)
    batch = batch_head // heads
    head = batch_head % heads
    token = (pid % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = token < tokens
    place = batch_head * tokens + token
    first = tl.load(lse_a + place, mask=inside, other=0.0)
    second = tl.load(lse_b + place, mask=inside, other=0.0)
    # A NaN in either must come out; the maximum of a number and a NaN may be the number.
    top = tl.where(second != second, second, tl.maximum(first, second))
    top = tl.where(first != first, first, top)
    origin = tl.where(top == -float("inf"), 0.0, top)
    weight_a = tl.exp(first - origin)
    weight_b = tl.exp(second - origin)
    total = weight_a + weight_b
    tl.store(lse + place, origin + tl.log(total), mask=inside)
    total = tl.where(total == 0, 1.0, total)
    share_a = weight_a / total
    share_b = weight_b / total
    column = tl.arange(0, BLOCK_WIDTH)
    wanted = inside[:, None] & (column < width)[None, :]
    row = token.to(tl.int64)[:, None]
    # A part of no weight is not read: it may hold NaN.
    part_a = tl.load(
        out_a + batch * a_stride_b + head * a_stride_h + row * a_stride_s + column[None, :],
        mask=wanted & (share_a != 0)[:, None],
        other=0.0,
    )
    part_b = tl.load(
        out_b + batch * b_stride_b + head * b_stride_h + row * b_stride_s + column[None, :],
        mask=wanted & (share_b != 0)[:, None],
        other=0.0,
    )
    merged = part_a.to(tl.float32) * share_a[:, None] + part_b.to(tl.float32) * share_b[:, None]
    target = out + ((batch * tokens + row) * heads + head) * width + column[None, :]
    tl.store(target, merged.to(out.dtype.element_ty), mask=wanted)


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the state of both parts; ``[B, S, H, D]`` with last stride 1, lse ``[B, H, S]``."""
    batch, tokens, heads, width = out.shape
    if not out.numel():
        return
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, 4096 // block_width)
    _merge_states_kernel[(triton.cdiv(tokens, block_rows) * batch * heads,)](
        out_a,
        lse_a,
        out_b,
        lse_b,
        out,
        lse,
        *out_a.stride()[:3],
        *out_b.stride()[:3],
        heads,
        tokens,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _average_blocks_kernel(
    x,
    means,
    moved,
    offsets,
    lengths,
    permutation,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    x_stride_d,
    means_stride_b,
    means_stride_m,
    means_stride_h,
    moved_stride_b,
    moved_stride_s,
    moved_stride_h,
    offsets_stride_b,
    offsets_stride_h,
    lengths_stride_b,
    lengths_stride_h,
    permutation_stride_b,
    permutation_stride_h,
    heads,
    blocks,
    block,
    walk,
    tokens,
    width,
    HAS_OFFSETS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_PERMUTATION: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One program per block: the float32 mean of its tokens, summed in ascending order.

    With ``KEEP``, which is for uniform blocks, all rows of the walk go to ``moved``, zeros where
    no token is.
    """
    pid = tl.program_id(0)
    batch_head = pid // blocks
    which = pid % blocks
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    if HAS_OFFSETS:
        boundary = offsets + batch * offsets_stride_b + head * offsets_stride_h + which
        start = tl.maximum(tl.load(boundary), 0)
        end = tl.load(boundary + 1)
    else:
        start = which * block
        end = start + block
        if HAS_LENGTHS:
            valid = tl.load(lengths + batch * lengths_stride_b + head * lengths_stride_h + which)
            end = start + tl.minimum(valid, block)
    end = tl.minimum(end, walk)
    last = end
    if KEEP:  # rows that are in no mean are moved all the same
        last = tl.minimum(start + block, walk)
    column = tl.arange(0, BLOCK_WIDTH)
    rows = x + batch * x_stride_b + head * x_stride_h
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
    for base in range(start, last, BLOCK_ROWS):
        position = base + tl.arange(0, BLOCK_ROWS)
        inside = position < last
        token = position
        if HAS_PERMUTATION:
            token = tl.load(
                permutation + batch * permutation_stride_b + head * permutation_stride_h + position,
                mask=inside,
                other=-1,
            )
        inside = inside & (token >= 0) & (token < tokens)
        value = tl.load(
            rows + token.to(tl.int64)[:, None] * x_stride_s + column[None, :] * x_stride_d,
            mask=inside[:, None] & (column[None, :] < width),
            other=0.0,
        )
        if KEEP:
            tl.store(
                moved
                + batch * moved_stride_b
                + head * moved_stride_h
                + position.to(tl.int64)[:, None] * moved_stride_s
                + column[None, :],
                value,
                mask=(position < last)[:, None] & (column[None, :] < width),
            )
            # Chosen and not multiplied: what is in no mean may be NaN.
            value = tl.where((position < end)[:, None], value, 0.0)
        total += value.to(tl.float32)
    count = tl.maximum(end - start, 1).to(tl.float32)
    mean = tl.sum(total, axis=0) / count
    tl.store(
        means
        + batch * means_stride_b
        + which.to(tl.int64) * means_stride_m
        + head * means_stride_h
        + column,
        mean.to(means.dtype.element_ty),
        mask=column < width,
    )


def average_blocks(
    x: torch.Tensor,
    means: torch.Tensor,
    *,
    block: int | None,
    lengths: torch.Tensor | None,
    offsets: torch.Tensor | None,
    permutation: torch.Tensor | None,
    moved: torch.Tensor | None = None,
) -> None:
    """Write the mean of every block of x ``[B, S, H, D]`` into means ``[B, M, H, D]``.

    And the walk itself into ``moved`` ``[B, P, H, D]``, if there is one: for uniform blocks.
    """
    batch, tokens, heads, width = x.shape
    blocks = means.shape[1]
    if not means.numel():
        return

    def operand(tensor: torch.Tensor | None) -> tuple[torch.Tensor, int, int]:
        """The tensor and its strides over batch and head; x stands in for one that is absent."""
        if tensor is None:
            return x, 0, 0
        tensor = tensor.expand(batch, heads, tensor.shape[-1])
        return tensor, tensor.stride(0), tensor.stride(1)

    operands = [operand(tensor) for tensor in (offsets, lengths, permutation)]
    block_width = triton.next_power_of_2(width)
    _average_blocks_kernel[(blocks * batch * heads,)](
        x,
        means,
        means if moved is None else moved,
        *(tensor for tensor, _, _ in operands),
        *x.stride(),
        *means.stride()[:3],
        *(means if moved is None else moved).stride()[:3],
        *(stride for _, *strides in operands for stride in strides),
        heads,
        blocks,
        block or 0,
        tokens if permutation is None else permutation.shape[-1],
        tokens,
        width,
        HAS_OFFSETS=offsets is not None,
        HAS_LENGTHS=lengths is not None,
        HAS_PERMUTATION=permutation is not None,
        KEEP=moved is not None,
        BLOCK_ROWS=max(1, 4096 // block_width),
        BLOCK_WIDTH=block_width,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_centroids_kernel(
    x,
    centroids,
    half_norms,
    labels,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    x_stride_d,
    heads,
    tokens,
    clusters,
    width,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """label = argmax over c of x.c - |c|^2 / 2, which is the nearest centroid.

    Each lane keeps the best tile it has met; lanes are compared once, at the end, so the loop
    holds no reduction. A comparison with NaN is false, so a NaN score never wins.
    """
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    pid = tl.program_id(0)
    batch_head = (pid // token_blocks).to(tl.int64)
    batch = batch_head // heads
    head = batch_head % heads
    token = (pid % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_WIDTH)
    lane = tl.arange(0, BLOCK_CLUSTERS)
    value = tl.load(
        x
        + batch * x_stride_b
        + head * x_stride_h
        + token.to(tl.int64)[:, None] * x_stride_s
        + column[None, :] * x_stride_d,
        mask=(token < tokens)[:, None] & (column < width)[None, :],
        other=0.0,
    )
    best = tl.full([BLOCK_TOKENS, BLOCK_CLUSTERS], float("-inf"), dtype=tl.float32)
    best_base = tl.zeros([BLOCK_TOKENS, BLOCK_CLUSTERS], dtype=tl.int32)
    centroid_rows = centroids + batch_head * clusters * width
    norm_row = half_norms + batch_head * clusters
    for base in range(0, clusters, BLOCK_CLUSTERS):
        cluster = base + lane
        exists = cluster < clusters
        transposed = tl.load(
            centroid_rows + cluster[None, :] * width + column[:, None],
            mask=exists[None, :] & (column < width)[:, None],
            other=0.0,
        )
        half_norm = tl.load(norm_row + cluster, mask=exists, other=float("inf"))
        score = tl.dot(value, transposed, input_precision=PRECISION) - half_norm[None, :]
        better = score > best
        best = tl.where(better, score, best)
        best_base = tl.where(better, base, best_base)
    winner = tl.max(best, axis=1)
    # Equal scores: the lowest index. Lanes beyond the last centroid never left -inf, and where
    # every score is -inf or NaN lane 0 of the first tile, that is label 0, answers.
    candidate = tl.where(best == winner[:, None], best_base + lane[None, :], 2147483647)
    label = tl.min(candidate, axis=1)
    tl.store(labels + batch_head * tokens + token, label, mask=token < tokens)


def nearest_centroids(
    x: torch.Tensor, centroids: torch.Tensor, half_norms: torch.Tensor, labels: torch.Tensor
) -> None:
    """Write the nearest centroid of every token of x ``[B, S, H, D]`` into labels ``[B, H, S]``.

    centroids ``[B, H, C, D]`` in x's dtype and half_norms ``[B, H, C]`` float32 are contiguous.
    """
    batch, tokens, heads, width = x.shape
    if not labels.numel():
        return
    if x.device.type == "cpu" and x.dtype is torch.bfloat16:
        # Triton's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        x, centroids = x.float(), centroids.float()
    half = x.dtype in (torch.float16, torch.bfloat16)
    block_width = max(16, triton.next_power_of_2(width))
    block_tokens = 128 if half and block_width <= 128 else 64
    options = {"num_warps": 8 if block_tokens == 128 else 4, "num_stages": 2}
    if half and torch.version.hip is None:  # AMD has less shared memory and no maxnreg
        options["num_stages"] = 3
        # It fits without spilling, and lets one program multiply while another compares.
        options["maxnreg"] = 128
    _nearest_centroids_kernel[(triton.cdiv(tokens, block_tokens) * batch * heads,)](
        x,
        centroids,
        half_norms,
        labels,
        *x.stride(),
        heads,
        tokens,
        centroids.shape[2],
        width,
        PRECISION="tf32" if half else "ieee",  # of no effect on half precision operands
        BLOCK_TOKENS=block_tokens,
        BLOCK_CLUSTERS=64 if half else 32,
        BLOCK_WIDTH=block_width,
        **options,
    )
