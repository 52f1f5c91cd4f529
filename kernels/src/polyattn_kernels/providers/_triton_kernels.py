"""Triton kernels of block-sparse attention: uniform tiles, gathered tokens, and their lists.

Imported only to launch one. What every kernel here keeps:

* The softmax is online, in base 2 and float32; queries that meet no key give zeros and a
  log-sum-exp of -inf.
* A loop over tiles that are known to be full holds no mask. Tiles that may not be full have a loop
  of their own; there, rows that are no tokens are never loaded: a NaN in padding cannot reach a
  product.
* Products of a row and a stride are taken in 64 bits wherever 32 could overflow.
"""

# Triton's compiler looks up the annotations of parameters and knows none but its own: only
# compile-time constants, which it requires to be annotated, are.
# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803, N806 - compile-time constants are upper case, as in every Triton kernel

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "gathered_attention",
    "list_parts",
    "list_tokens",
    "partition_lists",
    "sum_runs",
    "uniform_attention",
]

LN_2 = tl.constexpr(0.6931471805599453)

# Numbers that kernels are not compiled anew for. By default Triton compiles for a number being 1, a
# multiple of 16 or neither. That pays for the strides of q, k, v and out, whose alignment decides
# how wide loads are; a plan's sizes change from call to call and decide nothing.
PLAN_NUMBERS = (
    "heads", "group", "query_length", "key_length", "num_query_blocks", "num_key_blocks",
    "capacity", "num_items", "first_instance", "plan_heads", "replicas", "head_replicas",
    *(
        f"{tensor}_stride_{dim}"
        for tensor in (
            "counts", "indices", "key_lengths", "key_permutation",
            "lengths", "permutation", "query_lengths", "query_permutation",
            "sizes", "starts",
        )
        for dim in "bh"
    ),
    *(f"{tensor}_{number}" for tensor in "qkv" for number in ("row_b", "row_h", "column_h")),
)  # fmt: skip

# Ways to read keys and values, as `uniform_attention` takes them.
POINTERS = tl.constexpr(0)
HOST_DESCRIPTORS = tl.constexpr(1)
DEVICE_DESCRIPTORS = tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(
    q,
    keys,
    values,
    accumulator,
    total,
    maximum,
    scale,
    visible,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: a tile of keys ``[D, KEYS]`` and of values ``[KEYS, D]``.

    ``scale`` is not negative and holds the factor log2(e); ``maximum`` is in base 2.
    """
    scores = tl.dot(q, keys, input_precision=PRECISION)
    if MASKED:
        # Scaled before the mask: with a scale of 0, -inf would turn into NaN.
        scores = tl.where(visible[None, :], scores * scale, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has met no key yet: -inf minus -inf would be NaN.
        reference = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        weights = tl.math.exp2(scores - reference[:, None])
    else:
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        reference = new_maximum
        weights = tl.math.exp2(scores * scale - reference[:, None])
    decay = tl.math.exp2(maximum - reference)
    total = total * decay + tl.sum(weights, 1)
    accumulator = accumulator * decay[:, None]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision=PRECISION)
    return accumulator, total, new_maximum


@triton.jit
def _clamp(index, count):
    """``index`` moved into 0 to ``count - 1``."""
    return tl.minimum(tl.maximum(index, 0), count - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    out,
    lse,
    accumulator,
    total,
    maximum,
    rows,
    stored,
    valid,
    out_stride_s,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STORE_LSE: tl.constexpr,
):
    """Rows ``stored`` of out, and of lse if asked; those that are not ``valid`` saw no key."""
    column = tl.arange(0, BLOCK_D)
    # Compared with zero and not tested for being positive: a NaN must come out as a NaN.
    seen = valid & (total != 0)
    result = tl.where(seen[:, None], accumulator / tl.where(seen, total, 1.0)[:, None], 0.0)
    mask = stored[:, None] & (column < D)[None, :]
    target = out + rows.to(tl.int64)[:, None] * out_stride_s + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)
    if STORE_LSE:
        natural = (maximum + tl.math.log2(tl.where(seen, total, 1.0))) * LN_2
        tl.store(lse + rows, tl.where(seen, natural, -float("inf")), mask=stored)


@triton.jit(do_not_specialize=PLAN_NUMBERS)  # type: ignore[untyped-decorator]
def uniform_attention(
    q,
    k,
    v,
    out,
    lse,
    key_descriptor,
    value_descriptor,
    key_indices,
    key_counts,
    clean_counts,
    key_lengths,
    query_lengths,
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
    out_stride_b,
    out_stride_s,
    out_stride_h,
    indices_stride_b,
    indices_stride_h,
    counts_stride_b,
    counts_stride_h,
    key_lengths_stride_b,
    key_lengths_stride_h,
    query_lengths_stride_b,
    query_lengths_stride_h,
    q_row_b,
    q_row_h,
    q_column_h,
    q_rows,
    q_columns,
    k_row_b,
    k_row_h,
    k_column_h,
    k_rows,
    k_columns,
    v_row_b,
    v_row_h,
    v_column_h,
    v_rows,
    v_columns,
    heads,
    group,
    query_length,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    READ: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PARTITIONED: tl.constexpr,
    RAGGED: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr,
    CHECKED: tl.constexpr,
    STORE_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS queries of one block against the key blocks of its list; KEYS must divide KEY_BLOCK.

    Programs are ordered head by head, so that those that run together share keys and values in L2.

    ``PARTITIONED``: lists come from :func:`partition_lists`: ``clean_counts`` full blocks, then
    those with padding; without it, only the last block may be short (``RAGGED``), and as lists
    ascend it can only be a list's last entry. ``CHECKED``: entries of lists that
    :func:`partition_lists` has not seen are moved into range, so that a wrong plan computes
    something wrong but reads nothing that is not its own. Descriptors need no check: whatever the
    place, they read nothing outside of their matrix and give zeros instead.

    Descriptors see a tensor as a matrix whose rows are one ``stride_s`` apart: batch item and head
    move ``row_b`` and ``row_h`` rows and ``column_h`` columns.
    """
    ROW_TILES: tl.constexpr = (QUERY_BLOCK + ROWS - 1) // ROWS
    KEY_TILES: tl.constexpr = KEY_BLOCK // KEYS
    tiles = num_query_blocks * ROW_TILES
    pid = tl.program_id(0)
    slot = pid // tiles
    tile = pid % tiles
    batch = slot // heads
    head = slot % heads
    key_head = head // group
    block = tile // ROW_TILES
    within = (tile % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    rows = block * QUERY_BLOCK + within
    stored = (within < QUERY_BLOCK) & (rows < query_length)
    valid = stored
    first = (tile % ROW_TILES) * ROWS
    limit = tl.minimum(QUERY_BLOCK, query_length - block * QUERY_BLOCK)
    if QUERY_LENGTHS:
        length = tl.load(
            query_lengths
            + batch.to(tl.int64) * query_lengths_stride_b
            + head.to(tl.int64) * query_lengths_stride_h
            + block
        )
        limit = tl.minimum(limit, length)
        valid = stored & (within < limit)

    batch_wide = batch.to(tl.int64)
    head_wide = head.to(tl.int64)
    plan_row = batch_wide * counts_stride_b + head_wide * counts_stride_h + block
    count = tl.minimum(tl.maximum(tl.load(key_counts + plan_row), 0), capacity)
    count = tl.where(first < limit, count, 0)
    entries = (
        key_indices
        + batch_wide * indices_stride_b
        + head_wide * indices_stride_h
        + block.to(tl.int64) * capacity
    )

    column = tl.arange(0, BLOCK_D)
    within_keys = tl.arange(0, KEYS)
    if READ == DEVICE_DESCRIPTORS:
        # Rows that are not this block's are some other rows, or zeros past the end; each row of a
        # product depends on its own row of q alone, and they are not stored.
        q_descriptor = tl.make_tensor_descriptor(
            q, [q_rows, q_columns], [q_stride_s, 1], [ROWS, BLOCK_D]
        )
        keys_from = tl.make_tensor_descriptor(
            k, [k_rows, k_columns], [k_stride_s, 1], [KEYS, BLOCK_D]
        )
        values_from = tl.make_tensor_descriptor(
            v, [v_rows, v_columns], [v_stride_s, 1], [KEYS, BLOCK_D]
        )
        q_row = batch * q_row_b + head * q_row_h + block * QUERY_BLOCK + first
        queries = q_descriptor.load([q_row, head * q_column_h])
    else:
        keys_from = key_descriptor
        values_from = value_descriptor
        queries = tl.load(
            q
            + batch_wide * q_stride_b
            + head_wide * q_stride_h
            + rows.to(tl.int64)[:, None] * q_stride_s
            + column[None, :],
            mask=valid[:, None] & (column < D)[None, :],
            other=0.0,
        )
    key_row = batch * k_row_b + key_head * k_row_h
    key_column = key_head * k_column_h
    value_row = batch * v_row_b + key_head * v_row_h
    value_column = key_head * v_column_h
    key_pointers = (
        k
        + batch_wide * k_stride_b
        + key_head.to(tl.int64) * k_stride_h
        + within_keys[None, :] * k_stride_s
        + column[:, None]
    )
    value_pointers = (
        v
        + batch_wide * v_stride_b
        + key_head.to(tl.int64) * v_stride_h
        + within_keys[:, None] * v_stride_s
        + column[None, :]
    )

    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)

    full_blocks = key_length // KEY_BLOCK
    clean = count
    if PARTITIONED:
        clean = tl.where(first < limit, tl.load(clean_counts + plan_row), 0)
    elif RAGGED:
        last = tl.load(entries + count - 1, mask=count > 0, other=-1)
        clean = tl.where(last >= full_blocks, count - 1, count)
    if CHECKED and not PARTITIONED:
        clean = tl.where(full_blocks > 0, clean, 0)

    for step in tl.range(0, clean * KEY_TILES, num_stages=STAGES, warp_specialize=WARP_SPECIALIZE):
        key_block = tl.load(entries + step // KEY_TILES)
        if CHECKED and not PARTITIONED:
            key_block = _clamp(key_block, full_blocks)
        start = key_block * KEY_BLOCK + (step % KEY_TILES) * KEYS
        if READ == POINTERS:
            key_tile = key_pointers + start.to(tl.int64) * k_stride_s
            value_tile = value_pointers + start.to(tl.int64) * v_stride_s
            if BLOCK_D == D:
                keys = tl.load(key_tile)
                values = tl.load(value_tile)
            else:
                keys = tl.load(key_tile, mask=(column < D)[:, None], other=0.0)
                values = tl.load(value_tile, mask=(column < D)[None, :], other=0.0)
        else:
            keys = keys_from.load([key_row + start, key_column]).T
            values = values_from.load([value_row + start, value_column])
        accumulator, total, maximum = _absorb(
            queries, keys, values, accumulator, total, maximum, scale, None, False, PRECISION
        )

    # After the clean loop and not before it: what only these tiles need then takes no registers in
    # the loop that counts.
    if RAGGED:
        for step in tl.range(clean * KEY_TILES, count * KEY_TILES, num_stages=1):
            key_block = tl.load(entries + step // KEY_TILES)
            if CHECKED:
                key_block = _clamp(key_block, num_key_blocks)
            length = tl.minimum(KEY_BLOCK, key_length - key_block * KEY_BLOCK)
            if PARTITIONED:
                told = tl.load(
                    key_lengths
                    + batch_wide * key_lengths_stride_b
                    + head_wide * key_lengths_stride_h
                    + key_block
                )
                length = tl.minimum(length, told)
            offset = (step % KEY_TILES) * KEYS
            start = (key_block * KEY_BLOCK + offset).to(tl.int64)
            visible = within_keys < length - offset
            keys = tl.load(
                key_pointers + start * k_stride_s,
                mask=visible[None, :] & (column < D)[:, None],
                other=0.0,
            )
            values = tl.load(
                value_pointers + start * v_stride_s,
                mask=visible[:, None] & (column < D)[None, :],
                other=0.0,
            )
            accumulator, total, maximum = _absorb(
                queries, keys, values, accumulator, total, maximum, scale, visible, True, PRECISION
            )

    _store(
        out + batch_wide * out_stride_b + head_wide * out_stride_h,
        lse + slot.to(tl.int64) * query_length,
        accumulator,
        total,
        maximum,
        rows,
        stored,
        valid,
        out_stride_s,
        D,
        BLOCK_D,
        STORE_LSE,
    )


@triton.jit(do_not_specialize=PLAN_NUMBERS)  # type: ignore[untyped-decorator]
def partition_lists(
    key_indices,
    key_counts,
    key_lengths,
    partitioned,
    clean_counts,
    all_counts,
    indices_stride_b,
    indices_stride_h,
    counts_stride_b,
    counts_stride_h,
    lengths_stride_b,
    lengths_stride_h,
    plan_heads,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    KEY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each list with its full key blocks first, then those with padding, both still ascending.

    Blocks without any token are left out, and entries out of range are moved into it. Writes
    contiguous lists ``[..., Mq, capacity]``, the number of full blocks, and the number of blocks.
    """
    pid = tl.program_id(0)
    instance = pid // num_query_blocks
    block = pid % num_query_blocks
    batch = (instance // plan_heads).to(tl.int64)
    head = (instance % plan_heads).to(tl.int64)
    count = tl.load(key_counts + batch * counts_stride_b + head * counts_stride_h + block)
    count = tl.minimum(tl.maximum(count, 0), capacity)
    source = (
        key_indices
        + batch * indices_stride_b
        + head * indices_stride_h
        + block.to(tl.int64) * capacity
    )
    target = partitioned + pid.to(tl.int64) * capacity
    lengths = key_lengths + batch * lengths_stride_b + head * lengths_stride_h

    clean = 0
    for first in range(0, count, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        listed = entry < count
        key_block = _clamp(tl.load(source + entry, mask=listed, other=0), num_key_blocks)
        room = tl.minimum(KEY_BLOCK, key_length - key_block * KEY_BLOCK)
        length = tl.minimum(tl.load(lengths + key_block), room)
        clean += tl.sum((listed & (length == KEY_BLOCK)).to(tl.int32), 0)
    tl.store(clean_counts + pid, clean)

    next_full = 0
    next_padded = clean
    for first in range(0, count, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        listed = entry < count
        key_block = _clamp(tl.load(source + entry, mask=listed, other=0), num_key_blocks)
        room = tl.minimum(KEY_BLOCK, key_length - key_block * KEY_BLOCK)
        length = tl.minimum(tl.load(lengths + key_block), room)
        full = (listed & (length == KEY_BLOCK)).to(tl.int32)
        padded = (listed & (length < KEY_BLOCK) & (length > 0)).to(tl.int32)
        place = tl.where(
            full == 1,
            next_full + tl.cumsum(full, 0) - 1,
            next_padded + tl.cumsum(padded, 0) - 1,
        )
        tl.store(target + place, key_block, mask=(full + padded) == 1)
        next_full += tl.sum(full, 0)
        next_padded += tl.sum(padded, 0)
    tl.store(all_counts + pid, next_padded)


@triton.jit(do_not_specialize=PLAN_NUMBERS)  # type: ignore[untyped-decorator]
def list_parts(
    key_indices,
    key_counts,
    key_lengths,
    full_indices,
    full_counts,
    part_entries,
    part_counts,
    indices_stride_b,
    indices_stride_h,
    counts_stride_b,
    counts_stride_h,
    lengths_stride_b,
    lengths_stride_h,
    plan_heads,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    KEY_BLOCK: tl.constexpr,
    PART: tl.constexpr,
    LENGTH_BITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each list as its full key blocks, ascending, and the parts of others that hold tokens.

    A part is PART keys of a block. Its entry holds its number among all parts of the sequence,
    above LENGTH_BITS bits for its tokens. Writes contiguous lists ``[..., Mq, capacity]`` and
    ``[..., Mq, capacity * KEY_BLOCK / PART]``, and their counts; nothing in them is out of range.
    """
    PARTS: tl.constexpr = KEY_BLOCK // PART
    pid = tl.program_id(0)
    instance = pid // num_query_blocks
    block = pid % num_query_blocks
    batch = (instance // plan_heads).to(tl.int64)
    head = (instance % plan_heads).to(tl.int64)
    count = tl.load(key_counts + batch * counts_stride_b + head * counts_stride_h + block)
    count = tl.minimum(tl.maximum(count, 0), capacity)
    source = (
        key_indices
        + batch * indices_stride_b
        + head * indices_stride_h
        + block.to(tl.int64) * capacity
    )
    target = full_indices + pid.to(tl.int64) * capacity
    part_target = part_entries + pid.to(tl.int64) * capacity * PARTS
    next_full = 0
    next_part = 0
    for first in range(0, count, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        listed = entry < count
        key_block = _clamp(tl.load(source + entry, mask=listed, other=0), num_key_blocks)
        length = tl.minimum(KEY_BLOCK, key_length - key_block * KEY_BLOCK)
        if LENGTHS:
            told = tl.load(
                key_lengths + batch * lengths_stride_b + head * lengths_stride_h + key_block
            )
            length = tl.minimum(length, told)
        full = (listed & (length == KEY_BLOCK)).to(tl.int32)
        place = next_full + tl.cumsum(full, 0) - 1
        tl.store(target + place, key_block, mask=full == 1)
        next_full += tl.sum(full, 0)
        # A length may be wrong, and below zero.
        parts = tl.where(listed & (full == 0), (tl.maximum(length, 0) + PART - 1) // PART, 0)
        place = next_part + tl.cumsum(parts, 0) - parts
        for number in tl.static_range(PARTS):
            tokens = tl.minimum(length - number * PART, PART)
            packed = ((key_block * PARTS + number) << LENGTH_BITS) + tokens
            tl.store(part_target + place + number, packed, mask=number < parts)
        next_part += tl.sum(parts, 0)
    tl.store(full_counts + pid, next_full)
    tl.store(part_counts + pid, next_part)


@triton.jit(do_not_specialize=PLAN_NUMBERS)  # type: ignore[untyped-decorator]
def sum_runs(
    key_indices,
    key_counts,
    key_sizes,
    run_ends,
    token_counts,
    indices_stride_b,
    indices_stride_h,
    counts_stride_b,
    counts_stride_h,
    sizes_stride_b,
    sizes_stride_h,
    plan_heads,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    CHUNK: tl.constexpr,
):
    """Where each selected run of keys ends once the runs of a list are packed one after another.

    Writes contiguous ``run_ends`` ``[..., Mq, capacity]`` and ``token_counts`` ``[..., Mq]``, never
    more than ``key_length``.
    """
    pid = tl.program_id(0)
    instance = pid // num_query_blocks
    block = pid % num_query_blocks
    batch = (instance // plan_heads).to(tl.int64)
    head = (instance % plan_heads).to(tl.int64)
    count = tl.load(key_counts + batch * counts_stride_b + head * counts_stride_h + block)
    count = tl.minimum(tl.maximum(count, 0), capacity)
    source = (
        key_indices
        + batch * indices_stride_b
        + head * indices_stride_h
        + block.to(tl.int64) * capacity
    )
    sizes = key_sizes + batch * sizes_stride_b + head * sizes_stride_h
    end = 0
    for first in range(0, count, CHUNK):
        entry = first + tl.arange(0, CHUNK)
        listed = entry < count
        key_block = _clamp(tl.load(source + entry, mask=listed, other=0), num_key_blocks)
        size = tl.load(sizes + key_block, mask=listed, other=0)
        ends = end + tl.cumsum(size, 0)
        tl.store(run_ends + pid.to(tl.int64) * capacity + entry, ends, mask=listed)
        end += tl.sum(size, 0)
    tl.store(token_counts + pid, tl.minimum(tl.maximum(end, 0), key_length))


@triton.jit  # type: ignore[untyped-decorator]
def _find_tokens(
    position,
    ends,
    entries,
    starts,
    permutation,
    count,
    num_key_blocks,
    key_length,
    SEARCH: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """The token at each packed position, which must be below the last of ``ends``.

    A binary search of SEARCH steps finds the first run that ends past the position.
    """
    low = position * 0
    high = low + count - 1
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        passed = tl.load(ends + _clamp(middle, count)) <= position
        low = tl.where(passed, middle + 1, low)
        high = tl.where(passed, high, middle)
    entry = _clamp(low, count)
    before = tl.load(ends + entry - 1, mask=entry > 0, other=0)
    start = tl.load(starts + _clamp(tl.load(entries + entry), num_key_blocks))
    token = _clamp(start + position - before, key_length)
    if PERMUTED:
        token = _clamp(tl.load(permutation + token), key_length)
    return token


@triton.jit(do_not_specialize=PLAN_NUMBERS)  # type: ignore[untyped-decorator]
def list_tokens(
    key_indices,
    key_counts,
    key_starts,
    key_permutation,
    run_ends,
    token_counts,
    tokens,
    indices_stride_b,
    indices_stride_h,
    counts_stride_b,
    counts_stride_h,
    starts_stride_b,
    starts_stride_h,
    permutation_stride_b,
    permutation_stride_h,
    first_instance,
    plan_heads,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    SEARCH: tl.constexpr,
    PERMUTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The tokens of each query block's key blocks, packed: ``tokens`` ``[instances, Mq, Sk]``.

    Instances are the plan's (batch item, head) pairs from ``first_instance`` on. Only the first
    ``token_counts`` entries of a row are written.
    """
    pid = tl.program_id(0)
    instance = first_instance + pid // num_query_blocks
    block = pid % num_query_blocks
    batch = (instance // plan_heads).to(tl.int64)
    head = (instance % plan_heads).to(tl.int64)
    row = instance.to(tl.int64) * num_query_blocks + block
    count = tl.load(key_counts + batch * counts_stride_b + head * counts_stride_h + block)
    count = tl.minimum(tl.maximum(count, 0), capacity)
    entries = (
        key_indices
        + batch * indices_stride_b
        + head * indices_stride_h
        + block.to(tl.int64) * capacity
    )
    starts = key_starts + batch * starts_stride_b + head * starts_stride_h
    permutation = key_permutation  # None unless PERMUTED
    if PERMUTED:
        permutation += batch * permutation_stride_b + head * permutation_stride_h
    length = tl.load(token_counts + row)
    target = tokens + pid.to(tl.int64) * key_length
    for first in range(tl.program_id(1) * CHUNK, length, tl.num_programs(1) * CHUNK):
        position = first + tl.arange(0, CHUNK)
        token = _find_tokens(
            tl.minimum(position, length - 1),
            run_ends + row * capacity,
            entries,
            starts,
            permutation,
            count,
            num_key_blocks,
            key_length,
            SEARCH,
            PERMUTED,
        )
        tl.store(target + position, token, mask=position < length)


@triton.jit(do_not_specialize=PLAN_NUMBERS)  # type: ignore[untyped-decorator]
def gathered_attention(
    q,
    k,
    v,
    out,
    lse,
    items,
    query_permutation,
    tokens,
    token_counts,
    key_indices,
    key_counts,
    key_starts,
    key_permutation,
    run_ends,
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
    out_stride_b,
    out_stride_s,
    out_stride_h,
    query_permutation_stride_b,
    query_permutation_stride_h,
    indices_stride_b,
    indices_stride_h,
    counts_stride_b,
    counts_stride_h,
    starts_stride_b,
    starts_stride_h,
    key_permutation_stride_b,
    key_permutation_stride_h,
    first_instance,
    plan_heads,
    replicas,
    head_replicas,
    heads,
    group,
    num_items,
    query_length,
    key_length,
    num_query_blocks,
    num_key_blocks,
    capacity,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    LISTED: tl.constexpr,
    SEARCH: tl.constexpr,
    QUERIES_PERMUTED: tl.constexpr,
    KEYS_PERMUTED: tl.constexpr,
    STORE_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to ROWS queries of one variable block against the packed tokens of its key blocks.

    ``items`` ``[instances, num_items, 3]`` holds a query block, the first position of the walk and
    the number of queries (0: nothing to do) of each program. A plan instance that serves several
    (batch item, head) pairs runs once for each of its ``replicas``.

    ``LISTED``: tokens are read from :func:`list_tokens`'s lists; otherwise they are found in the
    table of runs, tile by tile. ``WIDE``: a token times a stride needs 64 bits.
    """
    pid = tl.program_id(0)
    slot = pid // num_items
    instance = first_instance + slot // replicas
    replica = slot % replicas
    batch = instance // plan_heads + replica // head_replicas
    head = instance % plan_heads + replica % head_replicas
    plan_batch = (instance // plan_heads).to(tl.int64)
    plan_head = (instance % plan_heads).to(tl.int64)
    item = items + (instance.to(tl.int64) * num_items + pid % num_items) * 3
    block = tl.load(item)
    first = tl.load(item + 1)
    number = tl.load(item + 2)
    if number == 0:
        return

    within = tl.arange(0, ROWS)
    rows = first + within
    valid = (within < number) & (rows >= 0) & (rows < query_length)
    if QUERIES_PERMUTED:
        rows = tl.load(
            query_permutation
            + plan_batch * query_permutation_stride_b
            + plan_head * query_permutation_stride_h
            + rows,
            mask=valid,
            other=-1,
        )
        valid = valid & (rows >= 0) & (rows < query_length)
    column = tl.arange(0, BLOCK_D)
    batch_wide = batch.to(tl.int64)
    head_wide = head.to(tl.int64)
    key_head = (head // group).to(tl.int64)
    queries = tl.load(
        q
        + batch_wide * q_stride_b
        + head_wide * q_stride_h
        + rows.to(tl.int64)[:, None] * q_stride_s
        + column[None, :],
        mask=valid[:, None] & (column < D)[None, :],
        other=0.0,
    )

    plan_row = instance.to(tl.int64) * num_query_blocks + block
    length = tl.load(token_counts + plan_row)
    listed = tokens + ((slot // replicas).to(tl.int64) * num_query_blocks + block) * key_length
    ends = run_ends + plan_row * capacity
    entries = (
        key_indices
        + plan_batch * indices_stride_b
        + plan_head * indices_stride_h
        + block.to(tl.int64) * capacity
    )
    count = tl.load(key_counts + plan_batch * counts_stride_b + plan_head * counts_stride_h + block)
    count = tl.minimum(tl.maximum(count, 0), capacity)
    starts = key_starts + plan_batch * starts_stride_b + plan_head * starts_stride_h
    permutation = key_permutation  # None unless KEYS_PERMUTED
    if KEYS_PERMUTED:
        permutation += plan_batch * key_permutation_stride_b + plan_head * key_permutation_stride_h

    key_base = k + batch_wide * k_stride_b + key_head * k_stride_h + column[:, None]
    value_base = v + batch_wide * v_stride_b + key_head * v_stride_h + column[None, :]
    within_keys = tl.arange(0, KEYS)
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, BLOCK_D], tl.float32)

    partial = length % KEYS
    if partial > 0:
        position = tl.minimum(within_keys, partial - 1)
        if LISTED:
            token = tl.load(listed + position)
        else:
            token = _find_tokens(
                position,
                ends,
                entries,
                starts,
                permutation,
                count,
                num_key_blocks,
                key_length,
                SEARCH,
                KEYS_PERMUTED,
            )
        if WIDE:
            token = token.to(tl.int64)
        visible = within_keys < partial
        keys = tl.load(
            key_base + token[None, :] * k_stride_s,
            mask=visible[None, :] & (column < D)[:, None],
            other=0.0,
        )
        values = tl.load(
            value_base + token[:, None] * v_stride_s,
            mask=visible[:, None] & (column < D)[None, :],
            other=0.0,
        )
        accumulator, total, maximum = _absorb(
            queries, keys, values, accumulator, total, maximum, scale, visible, True, PRECISION
        )

    for start in tl.range(partial, length, KEYS, num_stages=STAGES):
        position = start + within_keys
        if LISTED:
            token = tl.load(listed + position)
        else:
            token = _find_tokens(
                position,
                ends,
                entries,
                starts,
                permutation,
                count,
                num_key_blocks,
                key_length,
                SEARCH,
                KEYS_PERMUTED,
            )
        if WIDE:
            token = token.to(tl.int64)
        if BLOCK_D == D:
            keys = tl.load(key_base + token[None, :] * k_stride_s)
            values = tl.load(value_base + token[:, None] * v_stride_s)
        else:
            keys = tl.load(
                key_base + token[None, :] * k_stride_s, mask=(column < D)[:, None], other=0.0
            )
            values = tl.load(
                value_base + token[:, None] * v_stride_s, mask=(column < D)[None, :], other=0.0
            )
        accumulator, total, maximum = _absorb(
            queries, keys, values, accumulator, total, maximum, scale, None, False, PRECISION
        )

    _store(
        out + batch_wide * out_stride_b + head_wide * out_stride_h,
        lse + (batch_wide * heads + head) * query_length,
        accumulator,
        total,
        maximum,
        rows,
        valid,
        valid,
        out_stride_s,
        D,
        BLOCK_D,
        STORE_LSE,
    )
