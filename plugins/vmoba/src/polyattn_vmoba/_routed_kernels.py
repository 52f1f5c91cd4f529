"""Triton kernels of :mod:`polyattn_vmoba.routed`: partial results of pairs, and their joining.

Imported only to launch one. Log-sum-exps between the two kernels are in units of log 2.
"""

# Triton's compiler reads the annotations of parameters and knows only its own, so its kernels
# annotate nothing but compile-time constants.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 - compile-time constants are upper case, as in every Triton kernel

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_pairs", "join_pairs"]

SIZES = ["queries", "capacity", "blocks", "offsets_stride_b", "permutation_stride_b"]


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(
    queries, keys, values, accumulator, total, maximum, scale, valid, PRECISION: tl.constexpr
):
    """One step of online softmax; scores in units of log 2, of keys that are not valid -inf."""
    scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
    scores = tl.where(valid[None, :], scores, -float("inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    kept = tl.exp2(maximum - highest)
    total = total * kept + tl.sum(weights, 1)
    accumulator = tl.dot(
        weights.to(values.dtype), values, accumulator * kept[:, None], input_precision=PRECISION
    )
    return accumulator, total, highest


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def attend_pairs(
    q,
    k,
    v,
    partial,
    partial_lse,
    pairs,
    pair_ends,
    tile_ends,
    offsets,
    permutation,
    scale,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    offsets_stride_b,
    permutation_stride_b,
    heads,
    group,
    queries,
    capacity,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEARCH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to ROWS pairs of one key block: the attention of each pair's query to that block alone."""
    tile = tl.program_id(0)
    instance = tl.program_id(1).to(tl.int64)
    tile_ends += instance * blocks
    pair_ends += instance * blocks
    if tile >= tl.load(tile_ends + blocks - 1):
        return
    # The first block whose tiles end past this one.
    low = tile * 0
    high = blocks - 1 + low
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        passed = tl.load(tile_ends + middle) <= tile
        low = tl.where(passed, tl.minimum(middle + 1, blocks - 1), low)
        high = tl.where(passed, high, middle)
    block = low
    tiles_before = tl.load(tile_ends + block - 1, mask=block > 0, other=0)
    first = tl.load(pair_ends + block - 1, mask=block > 0, other=0)
    first += (tile - tiles_before) * ROWS
    entry = first + tl.arange(0, ROWS)
    valid = entry < tl.load(pair_ends + block)
    room = queries.to(tl.int64) * capacity
    pair = tl.load(pairs + instance * (room + 1) + entry, mask=valid, other=0)

    batch = instance // heads
    head = instance % heads
    column = tl.arange(0, BLOCK_D)
    exists = column < D
    rows = (pair // capacity).to(tl.int64)
    query = tl.load(
        q + batch * q_stride_b + head * q_stride_h + rows[:, None] * q_stride_s + column[None, :],
        mask=valid[:, None] & exists[None, :],
        other=0.0,
    )
    key_head = head // group
    key_base = k + batch * k_stride_b + key_head * k_stride_h + column[:, None]
    value_base = v + batch * v_stride_b + key_head * v_stride_h + column[None, :]
    start = tl.load(offsets + batch * offsets_stride_b + block)
    length = tl.load(offsets + batch * offsets_stride_b + block + 1) - start
    tokens = permutation + batch * permutation_stride_b + start
    within = tl.arange(0, KEYS)
    # Finite, so that a block without keys gives no NaN; every score is above it, or -inf.
    maximum = tl.full([ROWS], -1.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for position in tl.range(0, length, KEYS, num_stages=STAGES):
        visible = position + within < length
        token = tl.load(tokens + position + within, mask=visible, other=0)
        if WIDE:
            token = token.to(tl.int64)
        keys = tl.load(
            key_base + token[None, :] * k_stride_s,
            mask=visible[None, :] & exists[:, None],
            other=0.0,
        )
        values = tl.load(
            value_base + token[:, None] * v_stride_s,
            mask=visible[:, None] & exists[None, :],
            other=0.0,
        )
        accumulator, total, maximum = _absorb(
            query, keys, values, accumulator, total, maximum, scale, visible, PRECISION
        )
    seen = length > 0
    result = accumulator / tl.where(seen, total, 1.0)[:, None]
    log_sum = tl.where(seen, maximum + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
    target = instance * room + pair
    tl.store(
        partial + target[:, None] * D + column[None, :],
        result.to(partial.dtype.element_ty),
        mask=valid[:, None] & exists[None, :],
    )
    tl.store(partial_lse + target, log_sum, mask=valid)


@triton.jit(do_not_specialize=["queries", "capacity"])  # type: ignore[untyped-decorator]
def join_pairs(
    partial,
    partial_lse,
    counts,
    out,
    lse,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    heads,
    queries,
    capacity,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The results of each query's pairs, weighed by their log-sum-exps, in float32."""
    instance = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < queries
    column = tl.arange(0, BLOCK_D)
    count = tl.load(counts + instance * queries + rows, mask=valid, other=0)
    first = (instance * queries + rows) * capacity
    maximum = tl.full([ROWS], -1.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for entry in range(tl.max(count, 0)):
        listed = entry < count
        log_sum = tl.load(partial_lse + first + entry, mask=listed, other=-float("inf"))
        part = tl.load(
            partial + (first + entry)[:, None] * D + column[None, :],
            mask=listed[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        highest = tl.maximum(maximum, log_sum)
        kept = tl.exp2(maximum - highest)
        weight = tl.exp2(log_sum - highest)
        total = total * kept + weight
        accumulator = accumulator * kept[:, None] + part * weight[:, None]
        maximum = highest
    seen = total > 0
    result = accumulator / tl.where(seen, total, 1.0)[:, None]
    batch = instance // heads
    head = instance % heads
    tl.store(
        out
        + batch * out_stride_b
        + head * out_stride_h
        + rows.to(tl.int64)[:, None] * out_stride_s
        + column[None, :],
        result.to(out.dtype.element_ty),
        mask=valid[:, None] & (column < D)[None, :],
    )
    log_two = 0.6931471805599453
    logarithm = (maximum + tl.log2(tl.where(seen, total, 1.0))) * log_two
    tl.store(lse + instance * queries + rows, tl.where(seen, logarithm, -float("inf")), mask=valid)
