"""Triton kernels of :mod:`polyattn_vmoba.routed`: marks, lists of pairs, partial results, joining.

Imported only to launch one. Log-sum-exps between kernels are in units of log 2. Nothing is added
up by atomics, so equal inputs give equal bits.
"""

# Triton's compiler reads the annotations of parameters and knows only its own, so its kernels
# annotate nothing but compile-time constants.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803 - compile-time constants are upper case, as in every Triton kernel

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_pairs", "count_marks", "join_pairs", "mark_lists", "mark_share", "place_pairs"]


@triton.jit(do_not_specialize=["queries", "chunks", "blocks"])  # type: ignore[untyped-decorator]
def mark_share(
    scores,
    own,
    sizes,
    marks,
    share,
    sizes_stride_b,
    pitch,
    heads,
    queries,
    chunks,
    blocks,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chunks of one query that hold a share, as `select_share` says; blocks past them too."""
    pid = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    exists = number < chunks
    score = tl.load(scores + pid * chunks + number, mask=exists, other=0.0)
    size = tl.load(sizes + pid // queries // heads * sizes_stride_b + number, mask=exists, other=0)
    is_own = number == tl.load(own + pid % queries)
    infinity = float("inf")
    valid = exists & (size > 0) & (tl.abs(score) < infinity)  # False for NaN too
    low = tl.min(tl.where(valid, score, infinity))
    high = tl.max(tl.where(valid, score, -infinity))
    flat = high - low <= 1e-6  # also where nothing is valid
    span = tl.where(flat, 1.0, high - low)
    # What is valid has some mass, so that it can be selected.
    mass = tl.maximum(tl.where(flat, 0.0, (score - low) / span), 1e-30)
    mass = tl.where(valid, mass, 0.0)
    others = tl.where(is_own, 0.0, mass)
    of_own = tl.sum(tl.where(is_own, mass, 0.0))
    needed = share * (tl.sum(others) + of_own) - of_own
    # The best other chunk is taken in any case.
    needed = tl.maximum(needed, tl.max(others))
    # Numbers that are not negative are ordered as their bits are; 1 has 30 of them.
    key = others.to(tl.int32, bitcast=True)
    cut = tl.zeros([], tl.int32)
    step = tl.full([], 1 << 29, tl.int32)
    for _ in range(30):
        enough = tl.sum(tl.where(key >= cut + step, others, 0.0)) >= needed
        cut = tl.where(enough, cut + step, cut)
        step = step >> 1
    above = tl.sum(tl.where(key > cut, others, 0.0))
    tied = (key == cut) & (others > 0)
    # Of chunks tied at the cut the first ones, as long as something is still needed.
    before = above + (tl.cumsum(tied.to(tl.int32), 0) - 1).to(tl.float32) * cut.to(
        tl.float32, bitcast=True
    )
    kept = ((key > cut) & (others > 0)) | (tied & (before < needed))
    if ALL:
        kept = others > 0
    # NaN or infinite: it has to show, and a row of NaN may as well have all.
    poisoned = exists & (size > 0) & ((score != score) | (score == infinity))
    whole = flat | (tl.max(poisoned.to(tl.int32)) > 0)
    kept = tl.where(whole, exists, kept) | is_own | (number >= chunks)
    tl.store(marks + pid * pitch + number, kept.to(tl.uint8), mask=number < blocks)


@triton.jit(do_not_specialize=["capacity"])  # type: ignore[untyped-decorator]
def mark_lists(indices, counts, marks, pitch, capacity, BLOCK: tl.constexpr):
    """The listed blocks of one query, in marks that are zero."""
    pid = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + pid)
    one = tl.full([BLOCK], 1, tl.uint8)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        block = tl.load(indices + pid * capacity + entry, mask=entry < count, other=0)
        tl.store(marks + pid * pitch + block, one, mask=entry < count)


@triton.jit(do_not_specialize=["queries", "blocks", "groups"])  # type: ignore[untyped-decorator]
def count_marks(
    marks,
    of_blocks,
    of_queries,
    pitch,
    queries,
    blocks,
    groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Marks of a group of queries: of each block ``[I, blocks, groups]``, of each query."""
    group = tl.program_id(0)
    instance = tl.program_id(1).to(tl.int64)
    query = group * GROUP + tl.arange(0, GROUP)
    rows = marks + (instance * queries + query)[:, None] * pitch
    total = tl.zeros([GROUP], tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        mask = (query < queries)[:, None] & (block < blocks)[None, :]
        mark = tl.load(rows + block[None, :], mask=mask, other=0).to(tl.int32)
        tl.store(
            of_blocks + (instance * blocks + block) * groups + group,
            tl.sum(mark, 0),
            mask=block < blocks,
        )
        total += tl.sum(mark, 1)
    tl.store(of_queries + instance * queries + query, total, mask=query < queries)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["queries", "blocks", "groups", "capacity"]
)
def place_pairs(
    marks,
    starts,
    pairs,
    pitch,
    queries,
    blocks,
    groups,
    capacity,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The pairs of a group of queries, each at its block's place: query * capacity + entry."""
    group = tl.program_id(0)
    instance = tl.program_id(1).to(tl.int64)
    query = group * GROUP + tl.arange(0, GROUP)
    rows = marks + (instance * queries + query)[:, None] * pitch
    pair = query * capacity
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        mask = (query < queries)[:, None] & (block < blocks)[None, :]
        mark = tl.load(rows + block[None, :], mask=mask, other=0).to(tl.int32)
        first = tl.load(
            starts + (instance * blocks + block) * groups + group, mask=block < blocks, other=0
        )
        place = first[None, :] + tl.cumsum(mark, 0) - 1
        number = pair[:, None] + tl.cumsum(mark, 1) - 1
        tl.store(pairs + place, number, mask=mark > 0)
        pair += tl.sum(mark, 1)


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


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["queries", "capacity", "blocks", "bins", "offsets_stride_b", "base", "turn"]
)
def attend_pairs(
    q,
    k,
    v,
    partial,
    partial_lse,
    pairs,
    firsts,
    lasts,
    tile_ends,
    tile_bins,
    starts,
    offsets,
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
    heads,
    group,
    queries,
    capacity,
    blocks,
    bins,
    base,
    turn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of up to ROWS pairs of one key block: the attention of each query to it alone.

    A bin is the pairs of one turn, instance and key block. A fixed number of programs share a
    turn's tiles, since only the device knows how many there are; each takes tiles that follow one
    another, so that those which run at one time read the same few heads and blocks.
    """
    begin = tl.load(tile_ends + turn * bins - 1, mask=turn > 0, other=0)
    end = tl.load(tile_ends + (turn + 1) * bins - 1)
    each = tl.cdiv(end - begin, tl.num_programs(0))
    begin += tl.program_id(0) * each
    end = tl.minimum(end, begin + each)
    column = tl.arange(0, BLOCK_D)
    exists = column < D
    within = tl.arange(0, KEYS)
    for tile in tl.range(begin, end, num_stages=1):
        place = tl.load(tile_bins + tile)
        tiles_before = tl.load(tile_ends + place - 1, mask=place > 0, other=0)
        entry = tl.load(firsts + place) + (tile - tiles_before) * ROWS + tl.arange(0, ROWS)
        listed = entry < tl.load(lasts + place)
        pair = tl.load(pairs + entry, mask=listed, other=0)
        block = place % blocks
        instance = (place % bins // blocks).to(tl.int64)
        batch = instance // heads
        head = instance % heads
        rows = pair // capacity
        slot = tl.load(starts + instance * queries + rows, mask=listed, other=0)
        slot = (slot + pair % capacity - base).to(tl.int64)
        if WIDE:
            rows = rows.to(tl.int64)
        query = tl.load(
            q
            + batch * q_stride_b
            + head * q_stride_h
            + (rows[:, None] * q_stride_s + column[None, :]),
            mask=listed[:, None] & exists[None, :],
            other=0.0,
        )
        start = tl.load(offsets + batch * offsets_stride_b + block)
        length = tl.load(offsets + batch * offsets_stride_b + block + 1) - start
        first = start.to(tl.int64)
        key_head = head // group
        key_base = k + batch * k_stride_b + key_head * k_stride_h + first * k_stride_s
        value_base = v + batch * v_stride_b + key_head * v_stride_h + first * v_stride_s
        # Finite, so that a block without keys gives no NaN; every score is above it, or -inf.
        maximum = tl.full([ROWS], -1.0e38, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for position in tl.range(0, length, KEYS, num_stages=STAGES):
            token = position + within
            visible = token < length
            if WIDE:
                token = token.to(tl.int64)
            keys = tl.load(
                key_base + (token[None, :] * k_stride_s + column[:, None]),
                mask=visible[None, :] & exists[:, None],
                other=0.0,
            )
            values = tl.load(
                value_base + (token[:, None] * v_stride_s + column[None, :]),
                mask=visible[:, None] & exists[None, :],
                other=0.0,
            )
            accumulator, total, maximum = _absorb(
                query, keys, values, accumulator, total, maximum, scale, visible, PRECISION
            )
        seen = length > 0
        result = accumulator / tl.where(seen, total, 1.0)[:, None]
        log_sum = tl.where(seen, maximum + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
        tl.store(
            partial + slot[:, None] * D + column[None, :],
            result.to(partial.dtype.element_ty),
            mask=listed[:, None] & exists[None, :],
        )
        tl.store(partial_lse + slot, log_sum, mask=listed)


@triton.jit(do_not_specialize=["queries", "groups", "base", "turn"])  # type: ignore[untyped-decorator]
def join_pairs(
    partial,
    partial_lse,
    starts,
    turns,
    out,
    lse,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    heads,
    queries,
    groups,
    base,
    turn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The results of one query's pairs, weighed by their log-sum-exps, in float32."""
    pid = tl.program_id(0).to(tl.int64)
    instance = pid // queries
    row = pid % queries
    place = instance * groups + row // GROUP
    if (place < tl.load(turns + turn)) | (place >= tl.load(turns + turn + 1)):
        return
    column = tl.arange(0, BLOCK_D)
    exists = column < D
    lane = tl.arange(0, ENTRIES)
    begin = tl.load(starts + pid)
    count = tl.load(starts + pid + 1) - begin
    first = (begin - base).to(tl.int64)
    # Each lane has a softmax of its own, so that lanes meet only once, after the loop.
    maximum = tl.full([ENTRIES], -1.0e38, tl.float32)
    total = tl.zeros([ENTRIES], tl.float32)
    accumulator = tl.zeros([ENTRIES, BLOCK_D], tl.float32)
    for start in range(0, count, ENTRIES):
        entry = start + lane
        listed = entry < count
        log_sum = tl.load(partial_lse + first + entry, mask=listed, other=-float("inf"))
        part = tl.load(
            partial + (first + entry)[:, None] * D + column[None, :],
            mask=listed[:, None] & exists[None, :],
            other=0.0,
        ).to(tl.float32)
        highest = tl.maximum(maximum, log_sum)
        kept = tl.exp2(maximum - highest)
        weight = tl.exp2(log_sum - highest)
        total = total * kept + weight
        accumulator = accumulator * kept[:, None] + part * weight[:, None]
        maximum = highest
    overall = tl.max(maximum, 0)
    factor = tl.exp2(maximum - overall)
    total_of_all = tl.sum(total * factor, 0)
    seen = total_of_all > 0
    divisor = tl.where(seen, total_of_all, 1.0)
    result = tl.sum(accumulator * factor[:, None], 0) / divisor
    batch = instance // heads
    head = instance % heads
    tl.store(
        out + batch * out_stride_b + head * out_stride_h + row * out_stride_s + column,
        result.to(out.dtype.element_ty),
        mask=exists,
    )
    log_two = 0.6931471805599453
    logarithm = tl.where(seen, (overall + tl.log2(divisor)) * log_two, -float("inf"))
    tl.store(lse + batch * lse_stride_b + head * lse_stride_h + row, logarithm)
