"""Block-sparse attention in plain Triton: the tier that runs wherever Triton does.

Two kernels serve every plan. *Uniform* blocks without permutations are read as tiles, through TMA
descriptors where the GPU has them. Everything else (variable blocks, permutations, one side of
each) is *gathered*: the selected runs of keys are packed one after another, without padding, and
fetched row by row; queries are gathered and results scattered in the kernel, so no permuted copy of
q, k, v or the output is ever made.

Nothing here waits for the device. Lists and work items are built on it, by upper bounds where only
the device knows a size. Whatever a wrong plan says, no kernel reads or writes outside its tensors:
entries are moved into range (see :func:`run`), and what is wrong is named by
:meth:`~polyattn_kernels.plan.BlockSparsePlan.validate`.

The order of blocks, tile sizes and stages follow measurements on an H100; ``PERFORMANCE.md``
beside this package holds them. Importing this module does not import Triton.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyattn_kernels._triton_support import is_tested_triton, triton_reasons
from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers._lists import (
    TOKEN_LIST_BYTES,
    TokenLists,
    in_walk_order,
    is_tiled,
    leading_strides,
    lse_shape,
    nothing_attended,
    on_device,
    partition,
)

__all__ = [
    "NAME",
    "TileConfig",
    "attend_gathered",
    "attend_uniform",
    "gather_config",
    "reasons",
    "run",
    "uniform_config",
]

NAME = "triton"

WARP_SPECIALIZE_VARIABLE = "POLYATTN_KERNELS_WARP_SPECIALIZE"
LARGEST_STRIDE = 2**24  # between tokens: a tile's offsets, 128 rows of it, are 32-bit numbers
_ALIGNMENT = 16  # bytes, of a descriptor's base and row stride

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut and compiled."""

    rows: int
    """Queries per program."""
    keys: int
    """Keys per step of the loop."""
    warps: int
    stages: int
    """Triton's ``num_stages``. The lookup of a block in its list takes some of them: keys and
    values get two buffers for 2 to 4, and three for 5."""
    descriptors: bool = False
    """Read keys and values through TMA descriptors (compute capability 9.0 and later)."""
    warp_specialize: bool = False
    """Let the compiler split the warps into producers and consumers; needs descriptors."""


def reasons(plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Why these kernels cannot serve the call (empty = they can). Looks at no value."""
    found = triton_reasons(q, k, v)
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        found.append("Triton's interpreter multiplies bfloat16 as if its bits were integers")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(1) >= LARGEST_STRIDE:
            found.append(
                f"the stride between tokens of {name} must be below {LARGEST_STRIDE}, "
                f"found {tensor.stride(1)}"
            )
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

    Call it when :func:`reasons` has none. Matrix products are float32 sums of products of the
    tensors' own dtype; float32 tensors are multiplied in three tf32 passes where the GPU has tf32,
    and exactly elsewhere. The softmax is float32.

    List entries outside 0 to Mk - 1, offsets outside the sequence and permutation entries outside
    it are moved to the nearest number inside, so that a wrong plan gives wrong numbers but never
    touches memory of others. Where the last dimension of q, k or v is not contiguous, a contiguous
    copy is made.
    """
    if not q.numel() or not plan.key_length:
        return nothing_attended(q, return_lse)
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    longer = plan.query_positions > plan.query_length
    if plan.query_permutation is not None and (is_tiled(plan) or longer):
        return in_walk_order(run, q, k, v, plan, scale, return_lse)
    if is_tiled(plan):
        assert plan.query_block is not None
        assert plan.key_block is not None
        config = uniform_config(
            plan.query_block,
            plan.key_block,
            q.shape[-1],
            q.dtype,
            _capability(q.device),
            _describable(q, k, v),
        )
        if _may_warp_specialize(q, k, plan, config):
            config = _WARP_SPECIALIZED
        return attend_uniform(q, k, v, plan, scale, return_lse, config)
    config = gather_config(q.shape[-1], q.dtype, _capability(q.device))
    return attend_gathered(q, k, v, plan, scale, return_lse, config)


# --- configurations ---------------------------------------------------------------------------


def uniform_config(
    query_block: int,
    key_block: int,
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    describable: bool = True,
) -> TileConfig:
    """The tiles of the uniform kernel.

    ``capability`` is CUDA's; (0, 0) for anything else. ``describable``: TMA descriptors can read
    the tensors, where the GPU has them.
    """
    rows = _row_tile(query_block)
    # The largest power of two that cuts a key block evenly: no tile then straddles two blocks.
    even = key_block & -key_block
    width = _padded(head_dim)
    hopper = capability >= (9, 0)
    descriptors = hopper and describable and width == head_dim and dtype.itemsize == 2
    if dtype is torch.float32 or width > 128:
        config = TileConfig(min(rows, 64), min(even, 64), 4, stages=2, descriptors=descriptors)
    elif rows < 128:
        stages = 5 if hopper else 3
        config = TileConfig(rows, min(even, 64), warps=4, stages=stages, descriptors=descriptors)
    elif descriptors:
        # Four warps of 128 rows: registers spill a little, but two programs fit on a
        # multiprocessor, and one computes while the other exponentiates.
        config = TileConfig(rows, min(even, 64), warps=4, stages=2, descriptors=True)
    else:
        config = TileConfig(rows, min(even, 128 if hopper else 64), warps=8, stages=3)
    return _fitted(config, width, dtype, capability)


def gather_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfig:
    """The tiles of the gathering kernel."""
    width = _padded(head_dim)
    if dtype is torch.float32 or width > 128:
        config = TileConfig(64, 32, warps=4, stages=2)
    else:
        config = TileConfig(64, 64, warps=4, stages=5 if capability >= (9, 0) else 3)
    return _fitted(config, width, dtype, capability)


def _fitted(
    config: TileConfig, width: int, dtype: torch.dtype, capability: tuple[int, int]
) -> TileConfig:
    """The configuration, cut down until its tiles fit into the GPU's shared memory."""
    while _shared_bytes(config, width, dtype) > _shared_memory(capability):
        if config.stages > 2:
            config = replace(config, stages=2)
        elif config.keys > 16:
            config = replace(config, keys=config.keys // 2)
        elif config.rows > 16:
            config = replace(config, rows=config.rows // 2)
        else:
            return replace(config, stages=1)
    return config


def _shared_bytes(config: TileConfig, width: int, dtype: torch.dtype) -> int:
    """Of q and of the buffers of keys and values, as compiled code has them on Hopper."""
    buffers = 3 if config.stages >= 5 else 2
    if dtype is torch.float32:
        buffers += 1  # three passes of tf32 keep a second, low part of a tile
    return (config.rows + 2 * buffers * config.keys) * width * dtype.itemsize


_WARP_SPECIALIZED = TileConfig(128, 128, warps=4, stages=2, descriptors=True, warp_specialize=True)


def _row_tile(query_block: int) -> int:
    """Rows of a tile: 128 unless 64 pads less; below 64, the next power of two."""
    if query_block <= 64:
        return _padded(query_block)
    padded = {rows: -(-query_block // rows) * rows for rows in (64, 128)}
    return 64 if padded[64] < padded[128] else 128


def _padded(size: int) -> int:
    """The next power of two, and at least 16: what matrix products take."""
    return max(16, 1 << (size - 1).bit_length())


def _shared_memory(capability: tuple[int, int]) -> int:
    """Bytes that one program may use; a small GPU's where nothing is known."""
    large = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
    return large.get(capability, 64 if capability < (8, 0) else 99) * 1024


def _capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) on ROCm and in the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _precision(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """How products of float32 are taken; other dtypes have one way only."""
    if dtype is not torch.float32:
        return "tf32"  # Triton's default; it means nothing for 16-bit operands
    return "tf32x3" if capability >= (8, 0) else "ieee"


# --- uniform blocks ---------------------------------------------------------------------------


def attend_uniform(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
    config: TileConfig,
    *,
    checked: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`run` for a plan of uniform blocks without permutations, with tiles of one's choice.

    ``checked=False`` trusts the lists: without descriptors, an entry out of range then reads memory
    of others. With them it reads nothing of others in any case, and the check is made only where
    it was measured to cost nothing (``PERFORMANCE.md``).

    ValueError if ``config`` does not fit the plan or the tensors.
    """
    from polyattn_kernels.providers import _triton_kernels as kernels

    assert plan.query_block is not None
    assert plan.key_block is not None
    batch, query_length, heads, head_dim = q.shape
    width = _padded(head_dim)
    if plan.key_block % config.keys:
        raise ValueError(
            f"tiles of {config.keys} keys do not cut key blocks of {plan.key_block} evenly"
        )
    if config.descriptors and not _describable(q, k, v):
        raise ValueError(
            "descriptors need head dimensions that are a power of two and at least 16, 16-byte "
            "aligned rows and heads that lie in rows or in columns of one matrix; found head "
            f"dimension {head_dim}, strides of k {k.stride()} and of v {v.stride()}"
        )
    if config.warp_specialize and not config.descriptors:
        raise ValueError("warp_specialize needs descriptors=True")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device=q.device)
    partitioned = plan.key_lengths is not None
    ragged = partitioned or plan.key_length % plan.key_block != 0
    if plan.key_lengths is None:
        indices, counts, clean_counts, lengths = plan.key_indices, plan.key_counts, None, None
    else:
        indices, counts, clean_counts = partition(plan, plan.key_lengths)
        lengths = plan.key_lengths.expand(batch, heads, -1)
    indices = indices.expand(batch, heads, -1, -1)
    counts = counts.expand(batch, heads, -1)
    if clean_counts is not None:
        clean_counts = clean_counts.expand(batch, heads, -1)
    query_lengths = None
    if plan.query_lengths is not None:
        query_lengths = plan.query_lengths.expand(batch, heads, -1)

    read, descriptors = kernels.POINTERS, [None, None]
    if config.warp_specialize:
        read = kernels.DEVICE_DESCRIPTORS
        _provide_scratch_memory()
    elif config.descriptors:
        read = kernels.HOST_DESCRIPTORS
        descriptors = [_descriptor(each, config.keys) for each in (k, v)]
    # Without descriptors these numbers are not read.
    views = [_matrix_view(each) or (0, 0, 0, 0, 0) for each in (q, k, v)]
    row_tiles = -(-plan.query_block // config.rows)
    grid = (batch * heads * plan.num_query_blocks * row_tiles,)
    with on_device(q):
        kernels.uniform_attention[grid](
            q,
            k,
            v,
            out,
            lse,
            *descriptors,
            indices,
            counts,
            clean_counts,
            lengths,
            query_lengths,
            scale * math.log2(math.e),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *indices.stride()[:2],
            *counts.stride()[:2],
            *leading_strides(lengths),
            *leading_strides(query_lengths),
            *(number for view in views for number in view),
            heads,
            heads // k.shape[2],
            query_length,
            plan.key_length,
            plan.num_query_blocks,
            plan.num_key_blocks,
            plan.capacity,
            D=head_dim,
            BLOCK_D=width,
            QUERY_BLOCK=plan.query_block,
            KEY_BLOCK=plan.key_block,
            ROWS=config.rows,
            KEYS=config.keys,
            STAGES=config.stages,
            READ=read,
            WARP_SPECIALIZE=config.warp_specialize,
            PARTITIONED=partitioned,
            RAGGED=ragged,
            QUERY_LENGTHS=query_lengths is not None,
            CHECKED=(not config.descriptors or ragged) if checked is None else checked,
            STORE_LSE=return_lse,
            PRECISION=_precision(q.dtype, _capability(q.device)),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out, lse if return_lse else None


# --- descriptors ------------------------------------------------------------------------------


def _matrix_view(x: torch.Tensor) -> tuple[int, int, int, int, int] | None:
    """``[B, S, H, D]`` as a matrix with a row per ``stride(1)``; None where that is impossible.

    (rows from one batch item to the next, rows from one head to the next, columns from one head to
    the next, rows, columns). Heads lie side by side in a row, or are whole rows apart.
    """
    batch, length, heads, dim = x.shape
    stride_b, stride_s, stride_h, _ = x.stride()
    if stride_s < dim:
        return None
    row_b, rest = divmod(stride_b, stride_s) if batch > 1 else (0, 0)
    if rest:
        return None
    row_h, column_h = divmod(stride_h, stride_s) if heads > 1 else (0, 0)
    if row_h and column_h:
        return None
    rows = (batch - 1) * row_b + (heads - 1) * row_h + length
    columns = (heads - 1) * column_h + dim
    return (row_b, row_h, column_h, rows, columns) if columns <= stride_s else None


def _describable(*tensors: torch.Tensor) -> bool:
    """Whether TMA descriptors can read all of these."""
    for each in tensors:
        dim = each.shape[-1]
        aligned = each.data_ptr() % _ALIGNMENT == 0
        aligned = aligned and each.stride(1) * each.element_size() % _ALIGNMENT == 0
        if dim != _padded(dim) or not aligned or _matrix_view(each) is None:
            return False
    return True


def _descriptor(x: torch.Tensor, keys: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    view = _matrix_view(x)
    assert view is not None
    return TensorDescriptor(x, [view[3], view[4]], [x.stride(1), 1], [keys, x.shape[-1]])


def _provide_scratch_memory() -> None:
    """Give Triton torch's allocator: descriptors made inside a kernel live in global memory."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)


# --- gathered blocks --------------------------------------------------------------------------


def attend_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
    config: TileConfig,
    *,
    token_list_bytes: int = TOKEN_LIST_BYTES,
    sort_by_cost: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`run` for any plan, fetching queries and keys row by row.

    The tokens that a query block attends to are listed once, for all its programs. A list is as
    long as the device says, so its room is that of all keys; plan heads are served a few at a time
    so that no more than ``token_list_bytes`` of lists exist. Where not even one head's lists fit,
    programs find their tokens in the table of runs instead: no lists, but a search in every step.

    ``sort_by_cost`` starts each head's most expensive programs first.
    """
    from polyattn_kernels.providers import _triton_kernels as kernels

    _, query_length, heads, head_dim = q.shape
    # Every position of a valid plan's walk is written, unless the plan has padding in q.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(lse_shape(q), -math.inf, dtype=torch.float32, device=q.device)
    lists = TokenLists.of(plan, q, k)
    items, _ = lists.items(config.rows, sort_by_cost=sort_by_cost)
    num_items = items.shape[1]
    widest = max(abs(each.stride(1)) for each in (k, v))
    for turn in lists.turns(token_list_bytes):
        with on_device(q):
            kernels.gathered_attention[(turn.number * lists.replicas * num_items,)](
                q,
                k,
                v,
                out,
                lse,
                items,
                lists.query_permutation,
                turn.tokens,
                lists.token_counts,
                lists.indices,
                lists.counts,
                lists.key_starts,
                lists.key_permutation,
                lists.run_ends,
                scale * math.log2(math.e),
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *out.stride()[:3],
                *leading_strides(lists.query_permutation),
                *lists.indices.stride()[:2],
                *lists.counts.stride()[:2],
                *lists.key_starts.stride()[:2],
                *leading_strides(lists.key_permutation),
                turn.first,
                lists.heads,
                lists.replicas,
                lists.head_replicas,
                heads,
                heads // k.shape[2],
                num_items,
                query_length,
                plan.key_length,
                plan.num_query_blocks,
                plan.num_key_blocks,
                plan.capacity,
                D=head_dim,
                BLOCK_D=_padded(head_dim),
                ROWS=config.rows,
                KEYS=config.keys,
                STAGES=config.stages,
                WIDE=plan.key_length * widest >= 2**31,
                LISTED=turn.listed,
                SEARCH=lists.search,
                QUERIES_PERMUTED=lists.query_permutation is not None,
                KEYS_PERMUTED=lists.key_permutation is not None,
                STORE_LSE=return_lse,
                PRECISION=_precision(q.dtype, _capability(q.device)),
                num_warps=config.warps,
                num_stages=config.stages,
            )
    return out, lse if return_lse else None


# --- warp specialisation ----------------------------------------------------------------------


def _may_warp_specialize(
    q: torch.Tensor, k: torch.Tensor, plan: BlockSparsePlan, config: TileConfig
) -> bool:
    """Whether the compiler's warp specialisation is wanted, fits the call, and computes right."""
    if os.environ.get(WARP_SPECIALIZE_VARIABLE, "1") == "0" or not is_tested_triton():
        return False
    assert plan.query_block is not None
    assert plan.key_block is not None
    fits = (
        config.descriptors
        and _capability(q.device)[0] == 9
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in (64, 128)
        and plan.query_block % 128 == plan.key_block % 128 == 0
        # Tiles that may be short are read by pointers, which the specialiser cannot split.
        and plan.key_length % plan.key_block == 0
        and plan.key_lengths is None
        and plan.query_lengths is None
    )
    if not fits:
        return False
    case = (q.dtype, q.shape[-1], str(q.device))
    if case not in _specialized_rightly:
        if torch.cuda.is_current_stream_capturing():
            return False  # a case cannot be tried while a CUDA graph is captured
        _specialized_rightly[case] = _warp_specialization_is_right(*case)
    return _specialized_rightly[case]


_specialized_rightly: dict[tuple[torch.dtype, int, str], bool] = {}


def _warp_specialization_is_right(dtype: torch.dtype, head_dim: int, device: str) -> bool:
    """Run a small case with and without it; a wrong or failing compilation is told and not used.

    Some Triton releases specialise some tile shapes into kernels that give NaN without an error.
    """
    generator = torch.Generator(device).manual_seed(0)
    length, heads, blocks = 2048, 4, 16
    make: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    q, k, v = (torch.randn(1, length, heads, head_dim, **make) for _ in range(3))
    scores = torch.rand(1, heads, blocks, blocks, device=device, generator=generator)
    indices = scores.topk(5, dim=-1).indices.sort(-1).values.to(torch.int32)
    counts = torch.full((1, heads, blocks), 5, dtype=torch.int32, device=device)
    plan = BlockSparsePlan(
        query_length=length,
        key_length=length,
        query_block=128,
        key_block=128,
        key_counts=counts,
        key_indices=indices.contiguous(),
    )
    plain = uniform_config(128, 128, head_dim, dtype, _capability(q.device))
    scale = head_dim**-0.5
    try:
        expected, expected_lse = attend_uniform(q, k, v, plan, scale, True, plain)
        found, found_lse = attend_uniform(q, k, v, plan, scale, True, _WARP_SPECIALIZED)
        assert expected_lse is not None
        assert found_lse is not None
        distance = (found - expected).float().norm() / expected.float().norm()
        # Not "greater than": a NaN must fail.
        right = bool(distance < 5e-3) and bool((found_lse - expected_lse).abs().max() < 1e-3)
        problem = f"it differs by {float(distance):.1e}"
    except Exception as failure:
        right, problem = False, f"{type(failure).__name__}: {failure}"[:300]
    if not right:
        _log.warning(
            "Triton's warp specialisation does not work for %s and head dimension %d on %s (%s): "
            "the plain kernel is used",
            dtype, head_dim, device, problem,
        )  # fmt: skip
    return right
