"""Block-sparse attention for compute capability 9.0, in Gluon: the fast tier on an H100 or H200.

The plans are those of the portable tier (:mod:`polyattn_kernels.providers.triton`), its lists and
work items too; only the kernels differ, and what they take: 16-bit tensors, head dimensions up to
128, uniform blocks in multiples of 64 (any other plan is gathered token by token).

Gluon ships inside Triton and is marked experimental. So a kernel is served only with releases of
Triton it was run with, and only after a small case of the same kernel, run on the spot, agreed with
the plain torch reference; what fails is told once and passed over. Importing this module does not
import Triton.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from polyattn_kernels._triton_support import (
    TESTED_TRITON,
    is_tested_triton,
    triton_reasons,
    triton_version,
)
from polyattn_kernels.permutation import gather_tokens
from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers import reference
from polyattn_kernels.providers._lists import (
    PART,
    TOKEN_LIST_BYTES,
    TokenLists,
    in_walk_order,
    is_tiled,
    leading_strides,
    list_parts,
    lse_shape,
    nothing_attended,
    on_device,
)

__all__ = [
    "NAME",
    "WarpConfig",
    "attend_gathered",
    "attend_uniform",
    "gather_configs",
    "reasons",
    "run",
    "uniform_config",
]

NAME = "hopper"

WIDEST_HEAD = 128
NARROWEST_HEAD = 16
WARPGROUP_ROWS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarpConfig:
    """How a kernel is cut into warps and buffers."""

    consumers: int
    """Warpgroups that compute, 64 queries each: 1 or 2."""
    keys: int
    """Keys of a tile."""
    buffers: int
    """Tiles of keys, and of values, in shared memory."""
    programs: int = 1
    """Programs on one multiprocessor."""
    consumer_registers: int = 240
    """Per thread, for the second consumer; the first gets what is left."""
    producer_registers: int = 24
    most_registers: int | None = None
    """Per thread, for the whole kernel: so that as many programs fit as there should be."""
    fetch: bool = True
    """Whether permuted queries of uniform blocks are read where they are needed, and not put in
    the order of the walk before.
    """


def uniform_config(query_block: int, key_block: int, head_dim: int) -> WarpConfig:
    """The kernel for uniform blocks, both multiples of 64."""
    narrow = _padded(head_dim) <= 64
    keys = 128 if key_block == 64 or key_block % 128 == 0 else 64
    if query_block % 128:
        # At 128 channels, shared memory holds no more than 64 keys of two programs.
        return WarpConfig(1, keys if narrow else 64, 3, programs=2, most_registers=128)
    return WarpConfig(2, keys, 4 if narrow or keys == 64 else 2)


def gather_configs(head_dim: int) -> tuple[WarpConfig, WarpConfig]:
    """The kernels for gathered tokens: for work items of 65 to 128 queries, and for the others."""
    narrow = _padded(head_dim) <= 64
    # Producers compute addresses, and need registers for it.
    wide = WarpConfig(2, 128, 3 if narrow else 2, consumer_registers=200, producer_registers=104)
    keys, buffers = (128, 2) if narrow else (64, 3)
    return wide, WarpConfig(1, keys, buffers, programs=2, producer_registers=56, most_registers=128)


def reasons(plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Why these kernels cannot serve the call (empty = they can).

    Where nothing else stands in the way, a small case of the same kernel is run the first time,
    which compiles it and waits for the device.
    """
    found = triton_reasons(q, k, v, interpretable=False)
    if q.device.type != "cuda" or torch.version.hip:
        found.append(f"runs on CUDA, found {'ROCm' if torch.version.hip else q.device.type}")
    elif (capability := _capability(q.device)) != (9, 0):
        found.append(f"runs on compute capability 9.0, found {capability[0]}.{capability[1]}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"takes float16 and bfloat16, found {str(q.dtype).removeprefix('torch.')}")
    head_dim = q.shape[-1]
    if head_dim % 8 or not NARROWEST_HEAD <= head_dim <= WIDEST_HEAD:
        found.append(
            f"takes head dimensions of {NARROWEST_HEAD} to {WIDEST_HEAD} in steps of 8, found "
            f"{head_dim}"
        )
    if not is_tested_triton():
        found.append(
            f"was run with Triton {', '.join(TESTED_TRITON)}, whose language for it is "
            f"experimental; found {triton_version()}"
        )
    if not found and (wrong := _variant_of(plan, q).problem()) is not None:
        found.append(wrong)
    return found


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by the plan: out ``[B, Sq, H, D]`` in q's dtype, lse ``[B, H, Sq]`` float32 or None.

    Call it when :func:`reasons` has none. Wrong plans give wrong numbers and touch nothing outside
    of the tensors, as in the portable tier. Where q, k or v do not lie on 16-byte boundaries, a
    contiguous copy is made.
    """
    if not q.numel() or not plan.key_length:
        return nothing_attended(q, return_lse)
    q, k, v = (each if _is_aligned(each) else each.contiguous() for each in (q, k, v))
    if _is_tiled(plan):
        assert plan.query_block is not None
        assert plan.key_block is not None
        config = uniform_config(plan.query_block, plan.key_block, q.shape[-1])
        return attend_uniform(q, k, v, plan, scale, return_lse, config)
    if plan.query_positions > plan.query_length:
        return in_walk_order(run, q, k, v, plan, scale, return_lse)
    return attend_gathered(q, k, v, plan, scale, return_lse, gather_configs(q.shape[-1]))


def _is_tiled(plan: BlockSparsePlan) -> bool:
    """Whether blocks are read as tiles; all other plans are gathered token by token."""
    return is_tiled(plan) and not (plan.query_block or 1) % 64 and not (plan.key_block or 1) % 64


# --- uniform blocks ---------------------------------------------------------------------------


def attend_uniform(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
    config: WarpConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`run` for a plan of uniform blocks as they lie in k, with warps of one's choice."""
    from triton.experimental.gluon import language as gl

    from polyattn_kernels.providers import _hopper_kernels as kernels

    assert plan.query_block is not None
    assert plan.key_block is not None
    batch, query_length, heads, head_dim = q.shape
    rows = config.consumers * WARPGROUP_ROWS
    if plan.query_block % rows or not (
        plan.key_block % config.keys == 0 or 2 * plan.key_block == config.keys
    ):
        raise ValueError(
            f"tiles of {rows} x {config.keys} do not cut blocks of {plan.query_block} x "
            f"{plan.key_block} evenly"
        )
    width = _padded(head_dim)
    layout = gl.NVMMASharedLayout.get_default_for([config.keys, width], _element(q.dtype))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device=q.device)
    indices, counts, parts = plan.key_indices, plan.key_counts, None
    if plan.key_lengths is not None or plan.key_length % plan.key_block:
        parts = list_parts(plan)
        indices, counts = parts.full_indices, parts.full_counts
    indices = indices.expand(batch, heads, -1, -1)
    counts = counts.expand(batch, heads, -1)
    # What a kernel is not compiled to read may be any tensor.
    entries = indices if parts is None else parts.entries.expand(batch, heads, -1, -1)
    part_counts = counts if parts is None else parts.counts.expand(batch, heads, -1)
    query_lengths = counts
    if plan.query_lengths is not None:
        query_lengths = plan.query_lengths.expand(batch, heads, -1)
    order, walked = counts, q
    if plan.query_permutation is not None:
        order = plan.query_permutation.expand(batch, heads, -1)
        if not config.fetch:
            walked = gather_tokens(q, plan.query_permutation)
    tiles = plan.num_query_blocks * (plan.query_block // rows)
    end = batch * heads * tiles
    box = min(config.keys, plan.key_block)
    whole = [_descriptor(each, box, width, layout) for each in (k, v)]
    of_parts = whole
    if parts is not None:
        of_parts = [_descriptor(each, PART, width, layout) for each in (k, v)]
    with on_device(q):
        kernels.uniform_attention[(min(end, config.programs * _multiprocessors(q.device)),)](
            _descriptor(walked, WARPGROUP_ROWS, width, layout),
            *whole,
            *of_parts,
            q,
            out,
            lse,
            order,
            indices,
            counts,
            entries,
            part_counts,
            query_lengths,
            scale * math.log2(math.e),
            *(stride // 8 for stride in q.stride()[:3]),
            *out.stride()[:3],
            *order.stride()[:2],
            *indices.stride()[:2],
            *counts.stride()[:2],
            *entries.stride()[:2],
            *query_lengths.stride()[:2],
            heads,
            heads // k.shape[2],
            plan.query_positions,
            query_length,
            plan.capacity,
            entries.shape[-1],
            tiles,
            end,
            D=head_dim,
            BLOCK_D=width,
            QUERY_BLOCK=plan.query_block,
            KEY_BLOCK=plan.key_block,
            CONSUMERS=config.consumers,
            KEYS=config.keys,
            BUFFERS=config.buffers,
            PARTS=parts is not None,
            # Past the end of a sequence, TMA reads zeros.
            REPAIR=plan.key_lengths is not None,
            QUERY_LENGTHS=plan.query_lengths is not None,
            QUERIES_PERMUTED=plan.query_permutation is not None,
            FETCH=plan.query_permutation is not None and config.fetch,
            STORE_LSE=return_lse,
            **_launch(config),
        )
    return out, lse if return_lse else None


def _descriptor(x: torch.Tensor, rows: int, width: int, layout: Any) -> Any:
    """A TMA descriptor of ``[B, S, H, D]`` as ``[B, H, S, D]``, in boxes of rows of one head."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, length, heads, dim = x.shape
    stride_b, stride_s, stride_h, _ = x.stride()
    aligned = 16 // x.element_size()
    # Of a dimension of size 1 the stride means nothing, and may be anything.
    strides = [stride_b if batch > 1 else aligned, stride_h if heads > 1 else aligned]
    strides += [stride_s if length > 1 else aligned, 1]
    return TensorDescriptor(x, [batch, heads, length, dim], strides, [1, 1, rows, width], layout)


# --- gathered blocks --------------------------------------------------------------------------


def attend_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
    configs: tuple[WarpConfig, WarpConfig],
    *,
    token_list_bytes: int = TOKEN_LIST_BYTES,
    sort_by_cost: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`run` for any plan, fetching queries and keys row by row.

    ``configs``: the kernel for most work items, and the one for a block's last item where that is
    short enough for it. Lists and turns are those of the portable tier, which also serves where
    not even one head's lists fit into ``token_list_bytes``.
    """
    from polyattn_kernels.providers import _hopper_kernels as kernels
    from polyattn_kernels.providers import triton as portable

    _, query_length, heads, head_dim = q.shape
    if plan.num_query_blocks * plan.key_length * 4 > token_list_bytes:
        tiles = portable.gather_config(head_dim, q.dtype, _capability(q.device))
        return portable.attend_gathered(
            q, k, v, plan, scale, return_lse, tiles, token_list_bytes=token_list_bytes
        )
    # Every position of a valid plan's walk is written, unless the plan has padding in q.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(lse_shape(q), -math.inf, dtype=torch.float32, device=q.device)
    lists = TokenLists.of(plan, q, k)
    wide, narrow = configs
    items, short = lists.items(
        wide.consumers * WARPGROUP_ROWS,
        short_rows=narrow.consumers * WARPGROUP_ROWS,
        sort_by_cost=sort_by_cost,
    )
    assert short is not None
    widest_stride = max(abs(each.stride(1)) for each in (k, v))
    for turn in lists.turns(token_list_bytes):
        for config, work in ((wide, items), (narrow, short)):
            with on_device(q):
                kernels.gathered_attention[(turn.number * lists.replicas * work.shape[1],)](
                    q,
                    k,
                    v,
                    out,
                    lse,
                    work,
                    work if lists.query_permutation is None else lists.query_permutation,
                    turn.tokens,
                    lists.token_counts,
                    scale * math.log2(math.e),
                    *(stride // 8 for each in (q, k, v) for stride in each.stride()[:3]),
                    *out.stride()[:3],
                    *leading_strides(lists.query_permutation),
                    turn.first,
                    lists.heads,
                    lists.replicas,
                    lists.head_replicas,
                    heads,
                    heads // k.shape[2],
                    work.shape[1],
                    query_length,
                    plan.key_length,
                    plan.num_query_blocks,
                    D=head_dim,
                    BLOCK_D=_padded(head_dim),
                    CONSUMERS=config.consumers,
                    KEYS=config.keys,
                    BUFFERS=config.buffers,
                    QUERIES_PERMUTED=lists.query_permutation is not None,
                    WIDE=plan.key_length * widest_stride >= 2**31,
                    STORE_LSE=return_lse,
                    **_launch(config),
                )
    return out, lse if return_lse else None


# --- run and compare --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variant:
    """What a kernel is compiled for, as far as the plan and the tensors decide it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_block: int | None
    key_block: int | None
    key_lengths: bool
    query_lengths: bool
    permuted: bool
    ragged: bool

    def problem(self) -> str | None:
        """Why this kernel is not to be trusted here, from a small case of it; None if it is."""
        if self not in _verdicts:
            if torch.cuda.is_current_stream_capturing():
                return "was not called with such a plan before the capture of this CUDA graph"
            try:
                _verdicts[self] = _problem(self)
            except torch.cuda.OutOfMemoryError:
                return "a small case of this kernel found no memory left"  # asked again next time
        return _verdicts[self]


_verdicts: dict[_Variant, str | None] = {}


def _variant_of(plan: BlockSparsePlan, q: torch.Tensor) -> _Variant:
    tiled = _is_tiled(plan)
    in_order = not tiled and plan.query_positions > plan.query_length  # once it is there
    return _Variant(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        query_block=plan.query_block if tiled else None,
        key_block=plan.key_block if tiled else None,
        key_lengths=tiled and plan.key_lengths is not None,
        query_lengths=tiled and plan.query_lengths is not None,
        permuted=plan.query_permutation is not None and not in_order,
        ragged=tiled and plan.key_length % (plan.key_block or 1) != 0,
    )


def _problem(variant: _Variant) -> str | None:
    """Run a small case on the device, with log-sum-exp and without, and hold it against the
    reference; synchronises.
    """
    generator = torch.Generator(variant.device).manual_seed(0)
    make: dict[str, Any] = {"device": variant.device, "generator": generator}
    plan = _small_plan(variant, generator)
    heads = plan.key_counts.shape[1]
    q, k, v = (
        torch.randn(1, length, heads, variant.head_dim, dtype=variant.dtype, **make)
        for length in (plan.query_length, plan.key_length, plan.key_length)
    )
    if plan.key_lengths is not None:  # what is no token must reach no result
        hidden = (plan.blocks_of_positions("key")[0, 0] < 0).nonzero()[:, 0]
        k[:, hidden] = math.nan
        v[:, hidden] = math.nan
    scale = variant.head_dim**-0.5
    try:
        out, lse = run(q, k, v, plan, scale, True)
        clean_q, clean_k, clean_v = (each.nan_to_num().float() for each in (q, k, v))
        expected, expected_lse = reference.run(clean_q, clean_k, clean_v, plan, scale, True)
        assert lse is not None
        assert expected_lse is not None
        distance = (out.float() - expected).norm() / expected.norm()
        seen = ~expected_lse.isneginf()
        # Not "greater than": a NaN must fail.
        right = bool(distance < 2e-2) and torch.equal(lse.isneginf(), ~seen)
        right = right and bool((lse[seen] - expected_lse[seen]).abs().max() < 1e-2)
        alone, _ = run(q, k, v, plan, scale, False)  # a kernel of its own
        right = right and bool((alone.float() - expected).norm() < 2e-2 * expected.norm())
        problem = None if right else f"differs from the reference by {float(distance):.1e}"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:
        problem = f"failed: {type(failure).__name__}: {failure}"[:300].replace("\n", " ")
    if problem is None:
        return None
    _log.warning("polyattn's Hopper kernel %s: a small case of it %s", variant, problem)
    return f"a small case of this kernel {problem}"


def _small_plan(variant: _Variant, generator: torch.Generator) -> BlockSparsePlan:
    """Random lists, all lengths of them; ragged where the variant is."""
    heads, device = 2, variant.device
    fields: dict[str, Any] = {}
    if variant.query_block is None or variant.key_block is None:
        length, blocks = 700, 5
        cuts = torch.tensor([0, 3, 200, 200, 460, length], dtype=torch.int32, device=device)
        offsets = cuts.expand(1, 1, -1).contiguous()
        fields |= {"query_offsets": offsets, "key_offsets": offsets}
        rows = columns = blocks
        query_length = key_length = length
    else:
        query_length = 4 * variant.query_block
        key_length = 8 * variant.key_block - (40 if variant.ragged else 0)
        rows, columns = 4, 8
        fields |= {"query_block": variant.query_block, "key_block": variant.key_block}
        if variant.key_lengths:
            lengths = torch.full((1, 1, columns), variant.key_block, device=device)
            lengths[..., 1::3] -= 7
            lengths[..., 2] = 1
            lengths[..., -1] = min(variant.key_block, key_length - 7 * variant.key_block)
            fields["key_lengths"] = lengths.int()
        if variant.query_lengths:
            lengths = torch.full((1, 1, rows), variant.query_block, device=device)
            lengths[..., 1] = 5
            fields["query_lengths"] = lengths.int()
    if variant.permuted:
        order = torch.arange(query_length, device=device)
        there = order.clone()
        if variant.query_lengths:  # of the second block a few queries without keys, then none
            assert variant.query_block is not None
            there = there[(order < variant.query_block + 15) | (order >= 2 * variant.query_block)]
            query_length = len(there)
            order.fill_(-1)
        order[there] = torch.randperm(query_length, device=device, generator=generator)
        fields["query_permutation"] = order.int()[None, None]
    chosen = torch.rand(1, heads, rows, columns, device=device, generator=generator) < 0.6
    chosen[:, 0, 0] = False
    chosen[:, :, 1] = True
    return BlockSparsePlan.from_mask(
        chosen, query_length=query_length, key_length=key_length, **fields
    )


# --- small things -----------------------------------------------------------------------------


def _launch(config: WarpConfig) -> dict[str, Any]:
    """What a launch passes on of a configuration."""
    options: dict[str, Any] = {
        "CONSUMER_REGISTERS": config.consumer_registers,
        "PRODUCER_REGISTERS": config.producer_registers,
        "num_warps": 4,
    }
    if config.most_registers is not None:
        options["maxnreg"] = config.most_registers
    return options


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether TMA and 16-byte copies can read the tensor as it lies."""
    step = 16 // x.element_size()
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride % step == 0)
            for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        )
    )


def _padded(head_dim: int) -> int:
    """The next power of two: what matrix products and boxes take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _element(dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.bfloat16 if dtype is torch.bfloat16 else gl.float16


@functools.lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
