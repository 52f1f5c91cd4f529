"""Gluon kernels of block-sparse attention for compute capability 9.0.

Warps do not march in step: one producer fetches keys and values into a ring of shared memory; one
or two consumer warpgroups of 64 queries each multiply and exponentiate. Between them there are only
mbarriers:

* ``*_full[b]``: buffer b holds a tile; ``*_free[b]``: every consumer is done with it. Phases
  alternate with each trip round the ring, so that one running count of tiles says them all.
* The product with values of one tile runs under the softmax of the next. With two consumers, the
  tensor cores are handed back and forth (``turn``): one multiplies while the other exponentiates.

What the portable kernels keep is kept here: the softmax is online, in base 2 and float32; queries
that meet no key give zeros and a log-sum-exp of -inf; the loop over full tiles holds no mask; a NaN
in padding reaches no product. Tiles that need a mask come *first*, so that the loop stays clean. Of
key blocks that are not full, only the *parts* of 32 keys that hold tokens are fetched, several to a
tile.

Gluon is marked experimental: :mod:`polyattn_kernels.providers.hopper` names the releases of Triton
this was run with, and runs a small case before it serves one.
"""

# Gluon's compiler looks up the annotations of parameters and knows none but its own.
# mypy: ignore-errors
# ruff: noqa: N803, N806 - compile-time constants are upper case, as in every Triton kernel
# ruff: noqa: SIM102 - a condition known when compiling must not meet one that is not

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["gathered_attention", "uniform_attention"]

LN_2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of one consumer warpgroup
PART = gl.constexpr(32)  # keys of a part of a block
LENGTH_BITS = gl.constexpr(6)  # of an entry in a list of parts: its tokens; above them, its number

# Numbers that kernels are not compiled anew for: sizes and strides of a plan.
PLAN_NUMBERS = (
    "heads", "group", "query_length", "key_length", "num_query_blocks", "capacity", "num_items",
    "first_instance", "plan_heads", "replicas", "head_replicas", "tiles", "end",
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h",
    "parts_stride_b", "parts_stride_h", "part_capacity", "query_lengths_stride_b",
    "query_lengths_stride_h", "query_permutation_stride_b", "query_permutation_stride_h", "walk",
)  # fmt: skip


# --- what both kernels share ------------------------------------------------------------------


@gluon.jit
def _weigh(scores, maximum, total, scale, MASKED: gl.constexpr):
    """One step of the online softmax: weights, the new maximum and total, the decay of the old."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    reference = new_maximum
    if MASKED:
        # A row that has met no key yet: -inf minus -inf would be NaN.
        reference = gl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    weights = gl.exp2(scores * scale - reference[:, None])
    decay = gl.exp2(maximum - reference)
    total = total * decay + gl.sum(weights, 1)
    return weights, new_maximum, total, decay


@gluon.jit
def _is_token(key, lengths):
    """Whether each key of a tile is a token; ``lengths`` are those of its four parts."""
    end = gl.where(key < PART, lengths[0], PART + lengths[1])
    end = gl.where(key < 2 * PART, end, 2 * PART + lengths[2])
    end = gl.where(key < 3 * PART, end, 3 * PART + lengths[3])
    return key < end


@gluon.jit
def _repair(
    values, lengths, repaired, repairs, WARPGROUP: gl.constexpr, CONSUMERS: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Zeros in place of the values that are no tokens: a weight of 0 does not undo a NaN.

    Each consumer writes its share of the rows, and none goes on before all have.
    """
    SHARE: gl.constexpr = KEYS // CONSUMERS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    part = values.slice(WARPGROUP * SHARE, SHARE)
    row = WARPGROUP * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(1, LAYOUT))
    held = part.load(LAYOUT)
    nothing = gl.full([SHARE, BLOCK_D], 0.0, held.dtype, LAYOUT)
    part.store(gl.where(_is_token(row, lengths)[:, None], held, nothing))
    fence_async_shared()
    mbarrier.arrive(repaired, count=1)
    mbarrier.wait(repaired, repairs & 1)


@gluon.jit
def _absorb_tiles(
    queries, keys, values, key_full, key_free, value_full, value_free, turn, repaired,
    query_full, query_phase, number, lengths, masked,
    maximum, total, accumulator, step, turns, repairs, scale,
    WARPGROUP: gl.constexpr, CONSUMERS: gl.constexpr, KEYS: gl.constexpr,
    BLOCK_D: gl.constexpr, BUFFERS: gl.constexpr, FENCE: gl.constexpr, REPAIR: gl.constexpr,
):  # fmt: skip
    """``number`` > 0 tiles; the first has parts of these lengths, the others are full.

    ``step`` counts tiles since the kernel began, ``turns`` the uses of the tensor cores.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    PING_PONG: gl.constexpr = CONSUMERS == 2
    dtype: gl.constexpr = keys.dtype
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, SCORES)

    if PING_PONG:
        mbarrier.wait(turn.index(WARPGROUP), turns & 1)
    mbarrier.wait(key_full.index(step % BUFFERS), (step // BUFFERS) & 1)
    if FENCE:
        fence_async_shared()
    scores = warpgroup_mma(
        queries, keys.index(step % BUFFERS).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    if PING_PONG:
        mbarrier.arrive(turn.index(1 - WARPGROUP), count=1)
        turns += 1
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(key_free.index(step % BUFFERS), count=1)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    scores = gl.where(_is_token(column, lengths)[None, :], scores, -float("inf"))
    weights, maximum, total, decay = _weigh(scores, maximum, total, scale, True)
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    accumulator = accumulator * gl.convert_layout(decay, PER_ROW)[:, None]
    if REPAIR:
        if masked:
            mbarrier.wait(value_full.index(step % BUFFERS), (step // BUFFERS) & 1)
            _repair(
                values.index(step % BUFFERS), lengths, repaired, repairs, WARPGROUP, CONSUMERS,
                KEYS, BLOCK_D,
            )  # fmt: skip
            repairs += 1
    step += 1

    for _ in range(1, number):
        key_buffer = step % BUFFERS
        value_buffer = (step - 1) % BUFFERS
        if PING_PONG:
            mbarrier.wait(turn.index(WARPGROUP), turns & 1)
        mbarrier.wait(key_full.index(key_buffer), (step // BUFFERS) & 1)
        if FENCE:
            fence_async_shared()
        scores = warpgroup_mma(
            queries, keys.index(key_buffer).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        mbarrier.wait(value_full.index(value_buffer), ((step - 1) // BUFFERS) & 1)
        if FENCE:
            fence_async_shared()
        result = warpgroup_mma(operand, values.index(value_buffer), accumulator, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turn.index(1 - WARPGROUP), count=1)
            turns += 1
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(key_free.index(key_buffer), count=1)
        weights, maximum, total, decay = _weigh(scores, maximum, total, scale, False)
        # Long complete. It ends a basic block, or ptxas moves the next wait above the softmax.
        mbarrier.wait(query_full, query_phase)
        accumulator, operand, weights = warpgroup_mma_wait(0, deps=[result, operand, weights])
        mbarrier.arrive(value_free.index(value_buffer), count=1)
        operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
        accumulator = accumulator * gl.convert_layout(decay, PER_ROW)[:, None]
        step += 1

    value_buffer = (step - 1) % BUFFERS
    mbarrier.wait(value_full.index(value_buffer), ((step - 1) // BUFFERS) & 1)
    if FENCE:
        fence_async_shared()
    accumulator = warpgroup_mma(operand, values.index(value_buffer), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=[accumulator])
    mbarrier.arrive(value_free.index(value_buffer), count=1)
    return maximum, total, accumulator, step, turns, repairs


@gluon.jit
def _query_rows(
    first, number, within, query_permutation, instance, plan_heads, walk, query_length,
    query_permutation_stride_b, query_permutation_stride_h, PERMUTED: gl.constexpr,
):  # fmt: skip
    """Tokens of the ``number`` queries from position ``first`` on, and which of them there are.

    ``within`` counts from that position. ``walk``: positions in all; ``query_length``: tokens.
    """
    rows = first + within
    valid = (within < number) & (rows >= 0) & (rows < walk)
    if PERMUTED:
        rows = gl.load(
            query_permutation
            + (instance // plan_heads).to(gl.int64) * query_permutation_stride_b
            + (instance % plan_heads).to(gl.int64) * query_permutation_stride_h
            + rows,
            mask=valid,
            other=-1,
        )
        valid = valid & (rows >= 0) & (rows < query_length)
    return rows, valid


@gluon.jit
def _fetch_queries(
    queries, q, first, query_permutation, instance, plan_heads, walk, query_length,
    query_permutation_stride_b, query_permutation_stride_h, q_stride_s,
    D: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """64 queries by their tokens, 16 bytes per thread and load; zeros where there is none.

    Whoever multiplies by them has to wait for the other threads that write, on a barrier.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows, valid = _query_rows(
        first, ROWS, gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), query_permutation,
        instance, plan_heads, walk, query_length, query_permutation_stride_b,
        query_permutation_stride_h, True,
    )  # fmt: skip
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    held = gl.load(
        q + rows.to(gl.int64)[:, None] * (q_stride_s * 8) + column[None, :],
        mask=valid[:, None] & (column < D)[None, :],
        other=0.0,
    )
    queries.store(held)
    fence_async_shared()


@gluon.jit
def _store(
    out, lse, accumulator, total, maximum, rows, stored, valid, out_stride_s,
    D: gl.constexpr, BLOCK_D: gl.constexpr, STORE_LSE: gl.constexpr,
):  # fmt: skip
    """Rows ``stored`` of out, and of lse if asked; those that are not ``valid`` saw no key."""
    OUT: gl.constexpr = accumulator.type.layout
    PER_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OUT))
    # Compared with zero and not tested for being positive: a NaN must come out as a NaN.
    total = gl.convert_layout(total, PER_ROW)
    seen = valid & (total != 0)
    result = accumulator * (1.0 / gl.where(seen, total, 1.0))[:, None]
    result = gl.where(seen[:, None], result, 0.0)
    mask = stored[:, None] & (column < D)[None, :]
    target = out + rows.to(gl.int64)[:, None] * out_stride_s + column[None, :]
    gl.store(target, result.to(out.dtype.element_ty), mask=mask)
    if STORE_LSE:
        maximum = gl.convert_layout(maximum, PER_ROW)
        natural = (maximum + gl.log2(gl.where(seen, total, 1.0))) * LN_2
        gl.store(lse + rows, gl.where(seen, natural, -float("inf")), mask=stored)


# --- uniform blocks ---------------------------------------------------------------------------


@gluon.jit
def _place(t, tiles, heads, TILES_PER_BLOCK: gl.constexpr):
    """Batch item, head, query block, and tile of that block; heads one after another."""
    slot = t // tiles
    tile = t % tiles
    return slot // heads, slot % heads, tile // TILES_PER_BLOCK, tile % TILES_PER_BLOCK


@gluon.jit
def _list_of(
    t, key_counts, part_counts, query_lengths,
    counts_stride_b, counts_stride_h, query_lengths_stride_b, query_lengths_stride_h,
    tiles, heads, capacity, end,
    QUERY_BLOCK: gl.constexpr, TILE: gl.constexpr, PARTS: gl.constexpr,
    QUERY_LENGTHS: gl.constexpr,
):  # fmt: skip
    """Full blocks in the list of work item ``t``, and parts of others."""
    t = gl.minimum(t, end - 1)  # past the last one: any; it is not used
    batch, head, block, tile = _place(t, tiles, heads, QUERY_BLOCK // TILE)
    row = batch.to(gl.int64) * counts_stride_b + head.to(gl.int64) * counts_stride_h + block
    count = gl.minimum(gl.maximum(gl.load(key_counts + row), 0), capacity)
    parts = count * 0
    if PARTS:
        parts = gl.load(part_counts + row)
    if QUERY_LENGTHS:
        length = gl.load(
            query_lengths
            + batch.to(gl.int64) * query_lengths_stride_b
            + head.to(gl.int64) * query_lengths_stride_h
            + block
        )
        count = gl.where(tile * TILE < length, count, 0)
        parts = gl.where(tile * TILE < length, parts, 0)
    return count, parts


@gluon.jit
def _tiles_of(count, parts, KEYS: gl.constexpr, PACK: gl.constexpr, SPLIT: gl.constexpr):
    """Tiles of parts, tiles of full blocks, and entries missing from the first of the latter."""
    of_parts = (parts * PART + KEYS - 1) // KEYS
    if PACK == 1:
        return of_parts, count * SPLIT, count * 0
    of_blocks = (count + PACK - 1) // PACK
    return of_parts, of_blocks, of_blocks * PACK - count


@gluon.jit
def _part_lengths(entries, parts, tile, KEYS: gl.constexpr):
    """Tokens of the four parts of a tile of parts; 0 past the list's end."""
    first = tile * (KEYS // PART)
    mask: gl.constexpr = (1 << LENGTH_BITS) - 1
    one = gl.where(first < parts, gl.load(entries + gl.minimum(first, parts - 1)) & mask, 0)
    two = gl.where(first + 1 < parts, gl.load(entries + gl.minimum(first + 1, parts - 1)) & mask, 0)
    three = one * 0
    four = one * 0
    if KEYS > 2 * PART:
        three = gl.where(
            first + 2 < parts, gl.load(entries + gl.minimum(first + 2, parts - 1)) & mask, 0
        )
        four = gl.where(
            first + 3 < parts, gl.load(entries + gl.minimum(first + 3, parts - 1)) & mask, 0
        )
    return one, two, three, four


@gluon.jit
def _uniform_consumer(
    queries, shared, WARPGROUP: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr, CONSUMERS: gl.constexpr,
    KEYS: gl.constexpr, BUFFERS: gl.constexpr, PARTS: gl.constexpr, REPAIR: gl.constexpr,
    QUERY_LENGTHS: gl.constexpr, QUERIES_PERMUTED: gl.constexpr, FETCH: gl.constexpr,
    STORE_LSE: gl.constexpr,
):  # fmt: skip
    """64 rows of each work item's query tile."""
    (
        keys, values, key_full, key_free, value_full, value_free, query_full, query_free, turn,
        repaired, out, lse, key_counts, part_entries, part_counts, query_lengths, scale,
        out_stride_b, out_stride_s, out_stride_h, counts_stride_b, counts_stride_h,
        parts_stride_b, parts_stride_h, query_lengths_stride_b, query_lengths_stride_h, heads,
        query_length, capacity, part_capacity, tiles, end, q, query_permutation, q_stride_b,
        q_stride_s, q_stride_h, query_permutation_stride_b, query_permutation_stride_h, walk,
    ) = shared  # fmt: skip
    TILE: gl.constexpr = CONSUMERS * ROWS
    PACK: gl.constexpr = KEYS // KEY_BLOCK if KEY_BLOCK < KEYS else 1
    SPLIT: gl.constexpr = KEY_BLOCK // KEYS if KEY_BLOCK > KEYS else 1
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    PER_SCORE: gl.constexpr = gl.SliceLayout(1, SCORES)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = keys.dtype
    step = 0
    turns = 0
    repairs = 0
    served = 0
    count, parts = _list_of(
        gl.program_id(0), key_counts, part_counts, query_lengths, counts_stride_b,
        counts_stride_h, query_lengths_stride_b, query_lengths_stride_h, tiles, heads, capacity,
        end, QUERY_BLOCK, TILE, PARTS, QUERY_LENGTHS,
    )  # fmt: skip
    for t in range(gl.program_id(0), end, gl.num_programs(0)):
        batch, head, block, tile = _place(t, tiles, heads, QUERY_BLOCK // TILE)
        # Asked for now, needed when this item is done.
        next_count, next_parts = _list_of(
            t + gl.num_programs(0), key_counts, part_counts, query_lengths, counts_stride_b,
            counts_stride_h, query_lengths_stride_b, query_lengths_stride_h, tiles, heads,
            capacity, end, QUERY_BLOCK, TILE, PARTS, QUERY_LENGTHS,
        )  # fmt: skip
        of_parts, of_blocks, absent = _tiles_of(count, parts, KEYS, PACK, SPLIT)
        first = block * QUERY_BLOCK + tile * TILE + WARPGROUP * ROWS
        maximum = gl.full([ROWS], -float("inf"), gl.float32, PER_SCORE)
        total = gl.full([ROWS], 0.0, gl.float32, PER_SCORE)
        accumulator = gl.full([ROWS, BLOCK_D], 0.0, gl.float32, OUT)
        if of_parts + of_blocks > 0:
            query_phase = served & 1
            if FETCH:
                # The last item's are done with: no warp passes the barrier in front of an arrival
                # on query_free before all four have.
                offset = batch.to(gl.int64) * q_stride_b + head.to(gl.int64) * q_stride_h
                _fetch_queries(
                    queries, q + offset * 8, first, query_permutation, batch * heads + head, heads,
                    walk, query_length, query_permutation_stride_b, query_permutation_stride_h,
                    q_stride_s, D, BLOCK_D,
                )  # fmt: skip
                mbarrier.arrive(query_full, count=1)
            mbarrier.wait(query_full, query_phase)
            # The first full tile lacks its first block where their number is odd.
            present = gl.where(absent > 0, 0, PART)
            lengths = (present, present, present * 0 + PART, present * 0 + PART)
            before = count * 0
            if PARTS:
                # Tiles of parts, one thing after another; the last of them opens the pipeline,
                # unless a full tile that needs a mask has to.
                entries = (
                    part_entries
                    + batch.to(gl.int64) * parts_stride_b
                    + head.to(gl.int64) * parts_stride_h
                    + block.to(gl.int64) * part_capacity
                )
                before = gl.where(absent > 0, of_parts, gl.maximum(of_parts - 1, 0))
                zero = gl.full([ROWS, KEYS], 0.0, gl.float32, SCORES)
                column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
                for number in range(before):
                    held = _part_lengths(entries, parts, number, KEYS)
                    buffer = step % BUFFERS
                    phase = (step // BUFFERS) & 1
                    mbarrier.wait(key_full.index(buffer), phase)
                    scores = warpgroup_mma(
                        queries, keys.index(buffer).permute((1, 0)), zero, use_acc=False,
                        is_async=True,
                    )  # fmt: skip
                    scores = warpgroup_mma_wait(0, deps=[scores])
                    mbarrier.arrive(key_free.index(buffer), count=1)
                    scores = gl.where(_is_token(column, held)[None, :], scores, -float("inf"))
                    weights, maximum, total, decay = _weigh(scores, maximum, total, scale, True)
                    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
                    accumulator = accumulator * gl.convert_layout(decay, PER_ROW)[:, None]
                    mbarrier.wait(value_full.index(buffer), phase)
                    if REPAIR:
                        _repair(
                            values.index(buffer), held, repaired, repairs, WARPGROUP, CONSUMERS,
                            KEYS, BLOCK_D,
                        )  # fmt: skip
                        repairs += 1
                    accumulator = warpgroup_mma(
                        operand, values.index(buffer), accumulator, is_async=True
                    )
                    accumulator = warpgroup_mma_wait(0, deps=[accumulator])
                    mbarrier.arrive(value_free.index(buffer), count=1)
                    step += 1
                if before < of_parts:
                    lengths = _part_lengths(entries, parts, before, KEYS)
            maximum, total, accumulator, step, turns, repairs = _absorb_tiles(
                queries, keys, values, key_full, key_free, value_full, value_free, turn, repaired,
                query_full, query_phase, of_parts + of_blocks - before, lengths,
                before < of_parts, maximum, total, accumulator, step, turns, repairs, scale,
                WARPGROUP, CONSUMERS, KEYS, BLOCK_D, BUFFERS, False, REPAIR,
            )  # fmt: skip
            mbarrier.arrive(query_free, count=1)
            served += 1

        row = gl.arange(0, ROWS, layout=PER_ROW)
        rows, stored = _query_rows(
            first, ROWS, row, query_permutation, batch * heads + head, heads, walk, query_length,
            query_permutation_stride_b, query_permutation_stride_h, QUERIES_PERMUTED,
        )  # fmt: skip
        valid = stored
        if QUERY_LENGTHS:
            length = gl.load(
                query_lengths
                + batch.to(gl.int64) * query_lengths_stride_b
                + head.to(gl.int64) * query_lengths_stride_h
                + block
            )
            valid = stored & (tile * TILE + WARPGROUP * ROWS + row < length)
        _store(
            out + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h,
            lse + (batch * heads + head).to(gl.int64) * query_length,
            accumulator, total, maximum, rows, stored, valid, out_stride_s, D, BLOCK_D, STORE_LSE,
        )  # fmt: skip
        count = next_count
        parts = next_parts


@gluon.jit
def _uniform_producer(
    shared, BLOCK_D: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
    CONSUMERS: gl.constexpr, KEYS: gl.constexpr, BUFFERS: gl.constexpr, PARTS: gl.constexpr,
    QUERY_LENGTHS: gl.constexpr, FETCH: gl.constexpr,
):  # fmt: skip
    """Queries, then keys and values: of parts, then of the full blocks from the list's end.

    With ``FETCH`` no queries: the consumers read their own, which lie in no box. Whatever a list
    says, TMA reads nothing outside of its tensor: it gives zeros.
    """
    (
        query_descriptor, key_descriptor, value_descriptor, key_parts, value_parts, first_queries,
        second_queries, keys, values, key_full, key_free, value_full, value_free, query_full,
        query_free, key_indices, key_counts, part_entries, part_counts, query_lengths,
        indices_stride_b, indices_stride_h, counts_stride_b, counts_stride_h,
        parts_stride_b, parts_stride_h, query_lengths_stride_b, query_lengths_stride_h, heads,
        group, capacity, part_capacity, tiles, end,
    ) = shared  # fmt: skip
    TILE: gl.constexpr = CONSUMERS * ROWS
    PACK: gl.constexpr = KEYS // KEY_BLOCK if KEY_BLOCK < KEYS else 1
    SPLIT: gl.constexpr = KEY_BLOCK // KEYS if KEY_BLOCK > KEYS else 1
    BOX: gl.constexpr = KEY_BLOCK if KEY_BLOCK < KEYS else KEYS
    KEY_BYTES: gl.constexpr = KEYS * BLOCK_D * 2
    step = 0
    served = 0
    for t in range(gl.program_id(0), end, gl.num_programs(0)):
        batch, head, block, tile = _place(t, tiles, heads, QUERY_BLOCK // TILE)
        key_head = head // group
        count, parts = _list_of(
            t, key_counts, part_counts, query_lengths, counts_stride_b, counts_stride_h,
            query_lengths_stride_b, query_lengths_stride_h, tiles, heads, capacity, end,
            QUERY_BLOCK, TILE, PARTS, QUERY_LENGTHS,
        )  # fmt: skip
        of_parts, of_blocks, absent = _tiles_of(count, parts, KEYS, PACK, SPLIT)
        if not FETCH:
            if of_parts + of_blocks > 0:
                first_row = block * QUERY_BLOCK + tile * TILE
                mbarrier.wait(query_free, (served & 1) ^ 1)
                mbarrier.expect(query_full, CONSUMERS * ROWS * BLOCK_D * 2)
                tma.async_copy_global_to_shared(
                    query_descriptor, [batch, head, first_row, 0], query_full, first_queries
                )
                if CONSUMERS == 2:
                    tma.async_copy_global_to_shared(
                        query_descriptor, [batch, head, first_row + ROWS, 0], query_full,
                        second_queries,
                    )  # fmt: skip
                served += 1
        if PARTS:
            part_list = (
                part_entries
                + batch.to(gl.int64) * parts_stride_b
                + head.to(gl.int64) * parts_stride_h
                + block.to(gl.int64) * part_capacity
            )
            for number in range(of_parts):
                buffer = step % BUFFERS
                phase = ((step // BUFFERS) & 1) ^ 1
                mbarrier.wait(key_free.index(buffer), phase)
                mbarrier.expect(key_full.index(buffer), KEY_BYTES)
                for place in gl.static_range(KEYS // PART):
                    entry = gl.minimum(number * (KEYS // PART) + place, parts - 1)
                    row = (gl.load(part_list + entry) >> LENGTH_BITS) * PART
                    tma.async_copy_global_to_shared(
                        key_parts, [batch, key_head, row, 0], key_full.index(buffer),
                        keys.index(buffer).slice(place * PART, PART),
                    )  # fmt: skip
                mbarrier.wait(value_free.index(buffer), phase)
                mbarrier.expect(value_full.index(buffer), KEY_BYTES)
                for place in gl.static_range(KEYS // PART):
                    entry = gl.minimum(number * (KEYS // PART) + place, parts - 1)
                    row = (gl.load(part_list + entry) >> LENGTH_BITS) * PART
                    tma.async_copy_global_to_shared(
                        value_parts, [batch, key_head, row, 0], value_full.index(buffer),
                        values.index(buffer).slice(place * PART, PART),
                    )  # fmt: skip
                step += 1
        if of_blocks > 0:
            entries = (
                key_indices
                + batch.to(gl.int64) * indices_stride_b
                + head.to(gl.int64) * indices_stride_h
                + block.to(gl.int64) * capacity
            )
            following = gl.load(entries + count - 1)
            for number in range(of_blocks):
                buffer = step % BUFFERS
                phase = ((step // BUFFERS) & 1) ^ 1
                row = following * KEY_BLOCK + (number % SPLIT) * KEYS
                second_row = row
                if PACK > 1:
                    # The second entry of the tile; where the first is absent, the same again.
                    walk = number * PACK + 1 - absent
                    second_row = gl.load(entries + gl.maximum(count - 1 - walk, 0)) * KEY_BLOCK
                walk = (number + 1) * PACK // SPLIT - absent
                following = gl.load(entries + gl.maximum(count - 1 - walk, 0))
                mbarrier.wait(key_free.index(buffer), phase)
                mbarrier.expect(key_full.index(buffer), KEY_BYTES)
                tma.async_copy_global_to_shared(
                    key_descriptor, [batch, key_head, row, 0], key_full.index(buffer),
                    keys.index(buffer).slice(0, BOX),
                )  # fmt: skip
                if PACK > 1:
                    tma.async_copy_global_to_shared(
                        key_descriptor, [batch, key_head, second_row, 0],
                        key_full.index(buffer), keys.index(buffer).slice(BOX, BOX),
                    )  # fmt: skip
                mbarrier.wait(value_free.index(buffer), phase)
                mbarrier.expect(value_full.index(buffer), KEY_BYTES)
                tma.async_copy_global_to_shared(
                    value_descriptor, [batch, key_head, row, 0], value_full.index(buffer),
                    values.index(buffer).slice(0, BOX),
                )  # fmt: skip
                if PACK > 1:
                    tma.async_copy_global_to_shared(
                        value_descriptor, [batch, key_head, second_row, 0],
                        value_full.index(buffer), values.index(buffer).slice(BOX, BOX),
                    )  # fmt: skip
                step += 1


@gluon.jit
def _barriers(
    BUFFERS: gl.constexpr, CONSUMERS: gl.constexpr, ARRIVALS: gl.constexpr,
    QUERY_ARRIVALS: gl.constexpr,
):  # fmt: skip
    """Rings of barriers; a buffer is full after so many arrivals, or a copy through TMA (1)."""
    key_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    repaired = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(key_full.index(buffer), count=ARRIVALS)
        mbarrier.init(key_free.index(buffer), count=CONSUMERS)
        mbarrier.init(value_full.index(buffer), count=ARRIVALS)
        mbarrier.init(value_free.index(buffer), count=CONSUMERS)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    mbarrier.init(query_full, count=QUERY_ARRIVALS)
    mbarrier.init(query_free, count=CONSUMERS)
    mbarrier.init(repaired, count=CONSUMERS)
    if CONSUMERS == 2:
        mbarrier.arrive(turn.index(0), count=1)  # the first consumer begins
    return (
        key_full, key_free, value_full, value_free, turn, query_full, query_free, repaired
    )  # fmt: skip


@gluon.jit(do_not_specialize=PLAN_NUMBERS)
def uniform_attention(
    query_descriptor, key_descriptor, value_descriptor, key_parts, value_parts, q, out, lse,
    query_permutation, key_indices, key_counts, part_entries, part_counts, query_lengths, scale,
    q_stride_b, q_stride_s, q_stride_h, out_stride_b, out_stride_s, out_stride_h,
    query_permutation_stride_b, query_permutation_stride_h,
    indices_stride_b, indices_stride_h, counts_stride_b, counts_stride_h,
    parts_stride_b, parts_stride_h, query_lengths_stride_b, query_lengths_stride_h,
    heads, group, walk, query_length, capacity, part_capacity, tiles, end,
    D: gl.constexpr, BLOCK_D: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEY_BLOCK: gl.constexpr,
    CONSUMERS: gl.constexpr, KEYS: gl.constexpr, BUFFERS: gl.constexpr, PARTS: gl.constexpr,
    REPAIR: gl.constexpr, QUERY_LENGTHS: gl.constexpr, QUERIES_PERMUTED: gl.constexpr,
    FETCH: gl.constexpr, STORE_LSE: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Work items 0 to ``end - 1`` of ``tiles`` per head: tiles of queries against their lists.

    Descriptors see ``[B, H, S, D]`` in boxes of 64 queries, of min(KEYS, KEY_BLOCK) keys and, for
    parts, of 32. ``PARTS``: lists come from ``list_parts``: full blocks, and parts of others
    (contiguous ``[B, H, Mq, part_capacity]``); without it every block is full. ``REPAIR``: what is
    no token may hold NaN. ``QUERIES_PERMUTED``: results go to the tokens at their positions in the
    walk; the descriptor sees q in the order of the walk. Or, ``FETCH``: not the descriptor but q,
    whose strides count 16 bytes, is read, at the same tokens.
    """
    dtype: gl.constexpr = key_descriptor.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_D], dtype)
    first_queries = gl.allocate_shared_memory(dtype, [ROWS, BLOCK_D], LAYOUT)
    second_queries = first_queries
    if CONSUMERS == 2:
        second_queries = gl.allocate_shared_memory(dtype, [ROWS, BLOCK_D], LAYOUT)
    keys = gl.allocate_shared_memory(dtype, [BUFFERS, KEYS, BLOCK_D], LAYOUT)
    values = gl.allocate_shared_memory(dtype, [BUFFERS, KEYS, BLOCK_D], LAYOUT)
    (
        key_full, key_free, value_full, value_free, turn, query_full, query_free, repaired
    ) = _barriers(BUFFERS, CONSUMERS, 1, CONSUMERS if FETCH else 1)  # fmt: skip
    consumer = (
        keys, values, key_full, key_free, value_full, value_free, query_full, query_free, turn,
        repaired, out, lse, key_counts, part_entries, part_counts, query_lengths, scale,
        out_stride_b, out_stride_s, out_stride_h, counts_stride_b, counts_stride_h,
        parts_stride_b, parts_stride_h, query_lengths_stride_b, query_lengths_stride_h, heads,
        query_length, capacity, part_capacity, tiles, end, q, query_permutation, q_stride_b,
        q_stride_s, q_stride_h, query_permutation_stride_b, query_permutation_stride_h, walk,
    )  # fmt: skip
    producer = (
        query_descriptor, key_descriptor, value_descriptor, key_parts, value_parts, first_queries,
        second_queries, keys, values, key_full, key_free, value_full, value_free, query_full,
        query_free, key_indices, key_counts, part_entries, part_counts, query_lengths,
        indices_stride_b, indices_stride_h, counts_stride_b, counts_stride_h,
        parts_stride_b, parts_stride_h, query_lengths_stride_b, query_lengths_stride_h, heads,
        group, capacity, part_capacity, tiles, end,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_uniform_consumer, (
                    first_queries, consumer, 0, D, BLOCK_D, QUERY_BLOCK, KEY_BLOCK, CONSUMERS,
                    KEYS, BUFFERS, PARTS, REPAIR, QUERY_LENGTHS, QUERIES_PERMUTED, FETCH,
                    STORE_LSE,
                )),
                (_uniform_consumer, (
                    second_queries, consumer, 1, D, BLOCK_D, QUERY_BLOCK, KEY_BLOCK, CONSUMERS,
                    KEYS, BUFFERS, PARTS, REPAIR, QUERY_LENGTHS, QUERIES_PERMUTED, FETCH,
                    STORE_LSE,
                )),
                (_uniform_producer, (
                    producer, BLOCK_D, QUERY_BLOCK, KEY_BLOCK, CONSUMERS, KEYS, BUFFERS, PARTS,
                    QUERY_LENGTHS, FETCH,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_uniform_consumer, (
                    first_queries, consumer, 0, D, BLOCK_D, QUERY_BLOCK, KEY_BLOCK, CONSUMERS,
                    KEYS, BUFFERS, PARTS, REPAIR, QUERY_LENGTHS, QUERIES_PERMUTED, FETCH,
                    STORE_LSE,
                )),
                (_uniform_producer, (
                    producer, BLOCK_D, QUERY_BLOCK, KEY_BLOCK, CONSUMERS, KEYS, BUFFERS, PARTS,
                    QUERY_LENGTHS, FETCH,
                )),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


# --- gathered tokens --------------------------------------------------------------------------


@gluon.jit
def _item(items, first_instance, plan_heads, replicas, head_replicas, num_items):
    """The work item of this program: where it belongs, and what it holds."""
    pid = gl.program_id(0)
    slot = pid // num_items
    instance = first_instance + slot // replicas
    replica = slot % replicas
    batch = instance // plan_heads + replica // head_replicas
    head = instance % plan_heads + replica % head_replicas
    item = items + (instance.to(gl.int64) * num_items + pid % num_items) * 3
    return (
        batch, head, instance, slot // replicas, gl.load(item), gl.load(item + 1),
        gl.load(item + 2),
    )  # fmt: skip


@gluon.jit
def _gathered_consumer(
    queries, shared, WARPGROUP: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, CONSUMERS:
    gl.constexpr, KEYS: gl.constexpr, BUFFERS: gl.constexpr, QUERIES_PERMUTED: gl.constexpr,
    STORE_LSE: gl.constexpr,
):  # fmt: skip
    """64 rows of the program's queries against the packed tokens of their block's list."""
    (
        keys, values, key_full, key_free, value_full, value_free, query_full, turn,
        repaired, out, lse, items, query_permutation, token_counts, scale, out_stride_b,
        out_stride_s, out_stride_h, query_permutation_stride_b, query_permutation_stride_h,
        first_instance, plan_heads, replicas, head_replicas, heads, num_items, query_length,
        num_query_blocks,
    ) = shared  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    PER_SCORE: gl.constexpr = gl.SliceLayout(1, SCORES)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    batch, head, instance, _, block, first, number = _item(
        items, first_instance, plan_heads, replicas, head_replicas, num_items
    )
    if number > 0:
        length = gl.load(token_counts + instance.to(gl.int64) * num_query_blocks + block)
        within = WARPGROUP * ROWS + gl.arange(0, ROWS, layout=PER_ROW)
        maximum = gl.full([ROWS], -float("inf"), gl.float32, PER_SCORE)
        total = gl.full([ROWS], 0.0, gl.float32, PER_SCORE)
        accumulator = gl.full([ROWS, BLOCK_D], 0.0, gl.float32, OUT)
        step = 0
        turns = 0
        repairs = 0
        if length > 0:
            tiles = (length + KEYS - 1) // KEYS
            partial = length - (tiles - 1) * KEYS
            lengths = (
                gl.minimum(partial, PART), gl.minimum(gl.maximum(partial - PART, 0), PART),
                gl.minimum(gl.maximum(partial - 2 * PART, 0), PART),
                gl.minimum(gl.maximum(partial - 3 * PART, 0), PART),
            )  # fmt: skip
            mbarrier.wait(query_full, 0)
            maximum, total, accumulator, step, turns, repairs = _absorb_tiles(
                queries, keys, values, key_full, key_free, value_full, value_free, turn, repaired,
                query_full, 0, tiles, lengths, partial < KEYS,
                maximum, total, accumulator, step, turns, repairs, scale,
                WARPGROUP, CONSUMERS, KEYS, BLOCK_D, BUFFERS, True, False,
            )  # fmt: skip
        rows, valid = _query_rows(
            first, number, within, query_permutation, instance, plan_heads, query_length,
            query_length, query_permutation_stride_b, query_permutation_stride_h, QUERIES_PERMUTED,
        )  # fmt: skip
        _store(
            out + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h,
            lse + (batch * heads + head).to(gl.int64) * query_length,
            accumulator, total, maximum, rows, valid, valid, out_stride_s, D, BLOCK_D, STORE_LSE,
        )  # fmt: skip


@gluon.jit
def _gathered_producer(
    shared, D: gl.constexpr, BLOCK_D: gl.constexpr, CONSUMERS: gl.constexpr, KEYS: gl.constexpr,
    BUFFERS: gl.constexpr, QUERIES_PERMUTED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Rows of q, k and v by their tokens, 16 bytes per thread and copy. The partial tile is first.

    What lies past a list's end repeats its last token, so that unused rows hold finite data.
    Strides of q, k and v count 16 bytes: so the compiler knows that copies may be as wide.
    """
    (
        q, k, v, first_queries, second_queries, keys, values, key_full, key_free,
        value_full, value_free, query_full, items, query_permutation, tokens, token_counts,
        q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b,
        v_stride_s, v_stride_h, query_permutation_stride_b, query_permutation_stride_h,
        first_instance, plan_heads, replicas, head_replicas, group, num_items, query_length,
        key_length, num_query_blocks,
    ) = shared  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    PER_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    # All warps have read the captured arguments before layout conversions may reuse their memory.
    gl.thread_barrier()
    batch, head, instance, turn_of_instance, block, first, number = _item(
        items, first_instance, plan_heads, replicas, head_replicas, num_items
    )
    length = number * 0
    if number > 0:
        length = gl.load(token_counts + instance.to(gl.int64) * num_query_blocks + block)
    if length > 0:
        column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
        held = (column < D)[None, :]
        query_base = (
            q + batch.to(gl.int64) * (q_stride_b * 8) + head.to(gl.int64) * (q_stride_h * 8)
        )
        row = gl.arange(0, ROWS, layout=PER_ROW)
        rows, valid = _query_rows(
            first, number, row, query_permutation, instance, plan_heads, query_length,
            query_length, query_permutation_stride_b, query_permutation_stride_h, QUERIES_PERMUTED,
        )  # fmt: skip
        async_copy.async_copy_global_to_shared(
            first_queries,
            query_base + rows.to(gl.int64)[:, None] * (q_stride_s * 8) + column[None, :],
            mask=valid[:, None] & held,
        )
        if CONSUMERS == 2:
            rows, valid = _query_rows(
                first, number, ROWS + row, query_permutation, instance, plan_heads, query_length,
                query_length, query_permutation_stride_b, query_permutation_stride_h,
                QUERIES_PERMUTED,
            )  # fmt: skip
            async_copy.async_copy_global_to_shared(
                second_queries,
                query_base + rows.to(gl.int64)[:, None] * (q_stride_s * 8) + column[None, :],
                mask=valid[:, None] & held,
            )
        async_copy.mbarrier_arrive(query_full, increment_count=False)
        key_head = (head // group).to(gl.int64)
        key_base = k + batch.to(gl.int64) * (k_stride_b * 8) + key_head * (k_stride_h * 8)
        value_base = v + batch.to(gl.int64) * (v_stride_b * 8) + key_head * (v_stride_h * 8)
        listed = tokens + (
            turn_of_instance.to(gl.int64) * num_query_blocks + block
        ) * key_length  # fmt: skip
        position = gl.arange(0, KEYS, layout=PER_ROW)
        tiles = (length + KEYS - 1) // KEYS
        before = tiles * KEYS - length
        token = gl.load(listed + gl.minimum(position, length - 1))
        if before > 0:
            token = gl.load(listed + gl.minimum(position, KEYS - before - 1))
        for step in range(tiles):
            here = token
            ahead = (step + 1) * KEYS - before + position
            token = gl.load(listed + gl.minimum(ahead, length - 1))
            if WIDE:
                key_offset = here.to(gl.int64)[:, None] * (k_stride_s * 8) + column[None, :]
                value_offset = here.to(gl.int64)[:, None] * (v_stride_s * 8) + column[None, :]
            else:
                key_offset = here[:, None] * (k_stride_s * 8) + column[None, :]
                value_offset = here[:, None] * (v_stride_s * 8) + column[None, :]
            buffer = step % BUFFERS
            phase = ((step // BUFFERS) & 1) ^ 1
            mbarrier.wait(key_free.index(buffer), phase)
            if BLOCK_D == D:
                async_copy.async_copy_global_to_shared(keys.index(buffer), key_base + key_offset)
            else:
                async_copy.async_copy_global_to_shared(
                    keys.index(buffer), key_base + key_offset, mask=held
                )
            async_copy.mbarrier_arrive(key_full.index(buffer), increment_count=False)
            mbarrier.wait(value_free.index(buffer), phase)
            if BLOCK_D == D:
                async_copy.async_copy_global_to_shared(
                    values.index(buffer), value_base + value_offset
                )
            else:
                async_copy.async_copy_global_to_shared(
                    values.index(buffer), value_base + value_offset, mask=held
                )
            async_copy.mbarrier_arrive(value_full.index(buffer), increment_count=False)
        async_copy.wait_group(0)


@gluon.jit(do_not_specialize=PLAN_NUMBERS)
def gathered_attention(
    q, k, v, out, lse, items, query_permutation, tokens, token_counts, scale,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, out_stride_b, out_stride_s, out_stride_h,
    query_permutation_stride_b, query_permutation_stride_h,
    first_instance, plan_heads, replicas, head_replicas, heads, group, num_items, query_length,
    key_length, num_query_blocks,
    D: gl.constexpr, BLOCK_D: gl.constexpr, CONSUMERS: gl.constexpr, KEYS: gl.constexpr,
    BUFFERS: gl.constexpr, QUERIES_PERMUTED: gl.constexpr, WIDE: gl.constexpr,
    STORE_LSE: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One work item per program: up to CONSUMERS * 64 queries of one block, token by token.

    Items, lists of tokens and replicas are those of the portable tier's kernel.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_D], dtype)
    first_queries = gl.allocate_shared_memory(dtype, [ROWS, BLOCK_D], LAYOUT)
    second_queries = first_queries
    if CONSUMERS == 2:
        second_queries = gl.allocate_shared_memory(dtype, [ROWS, BLOCK_D], LAYOUT)
    keys = gl.allocate_shared_memory(dtype, [BUFFERS, KEYS, BLOCK_D], LAYOUT)
    values = gl.allocate_shared_memory(dtype, [BUFFERS, KEYS, BLOCK_D], LAYOUT)
    (
        key_full, key_free, value_full, value_free, turn, query_full, _, repaired
    ) = _barriers(BUFFERS, CONSUMERS, 128, 128)  # fmt: skip
    consumer = (
        keys, values, key_full, key_free, value_full, value_free, query_full, turn, repaired, out,
        lse, items, query_permutation, token_counts, scale, out_stride_b, out_stride_s,
        out_stride_h, query_permutation_stride_b, query_permutation_stride_h, first_instance,
        plan_heads, replicas, head_replicas, heads, num_items, query_length, num_query_blocks,
    )  # fmt: skip
    producer = (
        q, k, v, first_queries, second_queries, keys, values, key_full, key_free, value_full,
        value_free, query_full, items, query_permutation, tokens, token_counts, q_stride_b,
        q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s,
        v_stride_h, query_permutation_stride_b, query_permutation_stride_h, first_instance,
        plan_heads, replicas, head_replicas, group, num_items, query_length, key_length,
        num_query_blocks,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_gathered_consumer, (
                    first_queries, consumer, 0, D, BLOCK_D, CONSUMERS, KEYS, BUFFERS,
                    QUERIES_PERMUTED, STORE_LSE,
                )),
                (_gathered_consumer, (
                    second_queries, consumer, 1, D, BLOCK_D, CONSUMERS, KEYS, BUFFERS,
                    QUERIES_PERMUTED, STORE_LSE,
                )),
                (_gathered_producer, (
                    producer, D, BLOCK_D, CONSUMERS, KEYS, BUFFERS, QUERIES_PERMUTED, WIDE,
                )),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_gathered_consumer, (
                    first_queries, consumer, 0, D, BLOCK_D, CONSUMERS, KEYS, BUFFERS,
                    QUERIES_PERMUTED, STORE_LSE,
                )),
                (_gathered_producer, (
                    producer, D, BLOCK_D, CONSUMERS, KEYS, BUFFERS, QUERIES_PERMUTED, WIDE,
                )),
            ],
            [4],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
