"""What the Triton tiers make of a plan's lists before they attend: partitions, tokens, work items.

Everything is built on the device and waits for nothing: where only the device knows a size, there
is room for the most it can be. Whatever a wrong plan says, no entry that comes from here points
outside of its tensors. Importing this module does not import Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyattn_kernels.permutation import gather_tokens
from polyattn_kernels.plan import BlockSparsePlan

__all__ = [
    "LENGTH_BITS",
    "PART",
    "TOKEN_LIST_BYTES",
    "Parts",
    "TokenLists",
    "Turn",
    "in_walk_order",
    "is_tiled",
    "leading_strides",
    "list_parts",
    "lse_shape",
    "nothing_attended",
    "on_device",
    "partition",
    "work_items",
]

TOKEN_LIST_BYTES = 512 * 2**20  # of packed token lists that exist at one time


def is_tiled(plan: BlockSparsePlan) -> bool:
    """Whether blocks are tiles of k as it lies in memory, and of q in the order of its walk."""
    return plan.is_uniform and plan.key_permutation is None


def in_walk_order(
    run: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``run`` for queries that were put in the order of their walk, and the result back in theirs.

    For kernels that read no permuted queries, or none of a walk that is longer than q.
    """
    order, tokens = plan.query_permutation, plan.query_length
    assert order is not None
    walked = replace(plan, query_length=plan.query_positions, query_permutation=None)
    out, lse = run(gather_tokens(q, order), k, v, walked, scale, return_lse)
    # Positions without a token have a column of their own, which is cut off.
    named = order.where(order >= 0, tokens).clamp_max(tokens).long()
    position = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
    places = order.new_full((*order.shape[:2], tokens + 1), -1)
    places = places.scatter_(-1, named, position.expand_as(order))[..., :tokens].contiguous()
    if lse is not None:
        there = places.clamp_min(0).long().expand(*lse.shape[:2], -1)
        lse = lse.gather(-1, there).masked_fill(places < 0, -math.inf)
    return gather_tokens(out, places), lse


def partition(
    plan: BlockSparsePlan, key_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists with full blocks first, their counts of blocks, and of full blocks."""
    from polyattn_kernels.providers import _triton_kernels as kernels

    batch, heads = (
        max(each.shape[dim] for each in (plan.key_indices, plan.key_counts, key_lengths))
        for dim in (0, 1)
    )
    rows = plan.num_query_blocks
    indices = plan.key_indices.expand(batch, heads, -1, -1)
    counts = plan.key_counts.expand(batch, heads, -1)
    lengths = key_lengths.expand(batch, heads, -1)
    assert plan.key_block is not None
    partitioned = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    clean_counts, all_counts = (
        torch.empty(counts.shape, dtype=torch.int32, device=counts.device) for _ in range(2)
    )
    with on_device(indices):
        kernels.partition_lists[(batch * heads * rows,)](
            indices,
            counts,
            lengths,
            partitioned,
            clean_counts,
            all_counts,
            *indices.stride()[:2],
            *counts.stride()[:2],
            *lengths.stride()[:2],
            heads,
            plan.key_length,
            rows,
            plan.num_key_blocks,
            plan.capacity,
            KEY_BLOCK=plan.key_block,
            CHUNK=_list_chunk(plan.capacity),
            num_warps=1,
        )
    return partitioned, all_counts, clean_counts


PART = 32  # keys of a part of a block
LENGTH_BITS = 6  # of an entry in a list of parts: its tokens; above them, its number


@dataclass(frozen=True)
class Parts:
    """Lists of a plan's full blocks, and of the parts of its other blocks that hold tokens.

    Int32, with the plan's own batch items and heads: full blocks ``[b, h, Mq, capacity]``, parts
    ``[b, h, Mq, capacity * key_block / PART]``, and how many there are of each ``[b, h, Mq]``.
    """

    full_indices: torch.Tensor
    full_counts: torch.Tensor
    entries: torch.Tensor
    counts: torch.Tensor


def list_parts(plan: BlockSparsePlan) -> Parts:
    """What a kernel reads that masks nothing but tiles of parts; key blocks are multiples of 32."""
    from polyattn_kernels.providers import _triton_kernels as kernels

    lists = [plan.key_indices, plan.key_counts]
    lists += [] if plan.key_lengths is None else [plan.key_lengths]
    batch, heads = (max(each.shape[dim] for each in lists) for dim in (0, 1))
    rows = plan.num_query_blocks
    indices = plan.key_indices.expand(batch, heads, -1, -1)
    counts = plan.key_counts.expand(batch, heads, -1)
    # Without lengths the kernel is given any tensor: it compiles to code that does not read it.
    lengths = counts if plan.key_lengths is None else plan.key_lengths.expand(batch, heads, -1)
    assert plan.key_block is not None
    make: dict[str, Any] = {"dtype": torch.int32, "device": plan.device}
    found = Parts(
        full_indices=torch.empty(indices.shape, **make),
        full_counts=torch.empty(counts.shape, **make),
        entries=torch.empty((*counts.shape, plan.capacity * (plan.key_block // PART)), **make),
        counts=torch.empty(counts.shape, **make),
    )
    with on_device(indices):
        kernels.list_parts[(batch * heads * rows,)](
            indices,
            counts,
            lengths,
            found.full_indices,
            found.full_counts,
            found.entries,
            found.counts,
            *indices.stride()[:2],
            *counts.stride()[:2],
            *lengths.stride()[:2],
            heads,
            plan.key_length,
            rows,
            plan.num_key_blocks,
            plan.capacity,
            KEY_BLOCK=plan.key_block,
            PART=PART,
            LENGTH_BITS=LENGTH_BITS,
            LENGTHS=plan.key_lengths is not None,
            CHUNK=_list_chunk(plan.capacity),
            num_warps=1,
        )
    return found


# --- tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """Plan instances ``first`` to ``first + number - 1``, and the tokens of their lists.

    ``tokens`` is ``[number, Mq, Sk]``; where it is not ``listed``, it holds nothing.
    """

    first: int
    number: int
    tokens: torch.Tensor
    listed: bool


@dataclass(frozen=True)
class TokenLists:
    """A plan as gathering kernels read it: for each query block, packed tokens of its key blocks.

    Instances are the plan's own (batch item, head) pairs; each serves ``replicas`` pairs of q.
    """

    plan: BlockSparsePlan
    batch: int
    heads: int
    replicas: int
    head_replicas: int
    indices: torch.Tensor
    counts: torch.Tensor
    key_starts: torch.Tensor
    key_permutation: torch.Tensor | None
    query_permutation: torch.Tensor | None
    run_ends: torch.Tensor
    """``[batch, heads, Mq, capacity]``: where each selected run ends in the packed list."""
    token_counts: torch.Tensor
    """``[batch, heads, Mq]``: tokens of each list, at most Sk."""

    @classmethod
    def of(cls, plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor) -> TokenLists:
        """The lists of a plan for q ``[B, Sq, H, D]``; tokens themselves come in :meth:`turns`."""
        from polyattn_kernels.providers import _triton_kernels as kernels

        batch, heads = plan.batch, plan.heads
        blocks = plan.num_query_blocks
        indices = plan.key_indices.expand(batch, heads, -1, -1)
        counts = plan.key_counts.expand(batch, heads, -1)
        key_starts, key_sizes = _runs(plan, "key", batch, heads)
        key_permutation, query_permutation = (
            None if order is None else order.expand(batch, heads, -1)
            for order in (plan.key_permutation, plan.query_permutation)
        )
        run_ends = torch.empty(indices.shape, dtype=torch.int32, device=q.device)
        token_counts = torch.empty(counts.shape, dtype=torch.int32, device=q.device)
        with on_device(q):
            kernels.sum_runs[(batch * heads * blocks,)](
                indices,
                counts,
                key_sizes,
                run_ends,
                token_counts,
                *indices.stride()[:2],
                *counts.stride()[:2],
                *key_sizes.stride()[:2],
                heads,
                plan.key_length,
                blocks,
                plan.num_key_blocks,
                plan.capacity,
                CHUNK=_list_chunk(plan.capacity),
                num_warps=1,
            )
        return cls(
            plan=plan,
            batch=batch,
            heads=heads,
            replicas=(q.shape[0] // batch) * (q.shape[2] // heads),
            head_replicas=q.shape[2] // heads,
            indices=indices,
            counts=counts,
            key_starts=key_starts,
            key_permutation=key_permutation,
            query_permutation=query_permutation,
            run_ends=run_ends,
            token_counts=token_counts,
        )

    @property
    def search(self) -> int:
        """Steps of a binary search in a list."""
        return self.plan.capacity.bit_length()

    def items(
        self, rows: int, *, short_rows: int = 0, sort_by_cost: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Work items of at most ``rows`` queries: int32 ``[instances, items, 3]``, and short ones.

        Each is (query block, first position of the walk, queries; 0 if there is nothing to do).
        Where a block's last item has no more than ``short_rows`` queries, it is in the second list:
        a kernel with fewer rows serves it. ``sort_by_cost`` puts each instance's most expensive
        blocks first.
        """
        instances = self.batch * self.heads
        starts, sizes = _runs(self.plan, "query", self.batch, self.heads)
        costs = self.token_counts.view(instances, -1) if sort_by_cost else None
        return work_items(
            starts.reshape(instances, -1), sizes.reshape(instances, -1), costs, rows, short_rows,
            self.plan.query_length,
        )  # fmt: skip

    def turns(self, token_list_bytes: int = TOKEN_LIST_BYTES) -> Iterator[Turn]:
        """The instances, so many at a time that no more than these bytes of lists exist.

        Where not even one instance's lists fit, all come at once and without lists.
        """
        from polyattn_kernels.providers import _triton_kernels as kernels

        plan, instances = self.plan, self.batch * self.heads
        blocks = plan.num_query_blocks
        together = min(instances, token_list_bytes // (blocks * plan.key_length * 4))
        listed = together > 0
        together = together if listed else instances
        # Without lists the kernel is given any tensor: it compiles to code that does not read it.
        room = together * blocks * plan.key_length if listed else 1
        tokens = torch.empty(room, dtype=torch.int32, device=self.counts.device)
        for first in range(0, instances, together):
            number = min(together, instances - first)
            if listed:
                chunk = 1024
                splits = min(16, -(-plan.key_length // chunk))
                with on_device(tokens):
                    kernels.list_tokens[(number * blocks, splits)](
                        self.indices,
                        self.counts,
                        self.key_starts,
                        self.key_permutation,
                        self.run_ends,
                        self.token_counts,
                        tokens,
                        *self.indices.stride()[:2],
                        *self.counts.stride()[:2],
                        *self.key_starts.stride()[:2],
                        *leading_strides(self.key_permutation),
                        first,
                        self.heads,
                        plan.key_length,
                        blocks,
                        plan.num_key_blocks,
                        plan.capacity,
                        SEARCH=self.search,
                        PERMUTED=self.key_permutation is not None,
                        CHUNK=chunk,
                        num_warps=4,
                    )
            yield Turn(first, number, tokens, listed)


def _runs(
    plan: BlockSparsePlan, side: str, batch: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each block of a side starts in the walk, and its tokens: int32 ``[batch, heads, M]``.

    Both lie within the sequence, whatever the plan says.
    """
    length: int = getattr(plan, f"{side}_length")
    offsets: torch.Tensor | None = getattr(plan, f"{side}_offsets")
    if offsets is not None:
        inside = offsets.clamp(0, length)
        starts, sizes = inside[..., :-1], (inside[..., 1:] - inside[..., :-1]).clamp_min(0)
    else:
        block: int = getattr(plan, f"{side}_block")
        lengths: torch.Tensor | None = getattr(plan, f"{side}_lengths")
        starts = torch.arange(0, length, block, dtype=torch.int32, device=plan.device)[None, None]
        sizes = (length - starts).clamp_max(block)
        if lengths is not None:
            sizes = torch.minimum(lengths.clamp_min(0), sizes)
    return starts.expand(batch, heads, -1), sizes.expand(batch, heads, -1)


def work_items(
    starts: torch.Tensor,
    sizes: torch.Tensor,
    costs: torch.Tensor | None,
    rows: int,
    short_rows: int,
    query_length: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :meth:`TokenLists.items`; starts, sizes and costs are ``[instances, Mq]``.

    Only the device knows how many items there are; there is room for the most that Mq blocks of Sq
    queries can give, and the rest have no queries.
    """
    instances, blocks = sizes.shape
    if costs is None:
        number = torch.arange(blocks, device=sizes.device).expand(instances, blocks)
    else:
        number = costs.argsort(dim=-1, descending=True, stable=True)
        starts, sizes = starts.gather(-1, number), sizes.gather(-1, number)
    last = sizes % rows  # queries of a block's last item, if it is not a whole one
    chunks = sizes // rows + (last > short_rows)
    ends = chunks.cumsum(-1)
    room = (query_length + blocks * (rows - 1 - short_rows)) // rows
    item = torch.arange(room, device=sizes.device).expand(instances, room).contiguous()
    where = torch.searchsorted(ends, item, right=True).clamp_max(blocks - 1)
    skipped = (item - (ends - chunks).gather(-1, where)) * rows
    queries = (sizes.gather(-1, where) - skipped).clamp(0, rows)
    queries = torch.where(item < ends[:, -1:], queries, 0)
    first = starts.gather(-1, where) + skipped
    items = torch.stack((number.gather(-1, where), first, queries), dim=-1).to(torch.int32)
    if not short_rows:
        return items, None
    queries = torch.where(last <= short_rows, last, 0)
    short = torch.stack((number, starts + sizes - last, queries), dim=-1).to(torch.int32)
    return items, short


def nothing_attended(q: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a kernel would give that has no key, or no query, to look at."""
    lse = torch.full(lse_shape(q), -math.inf, device=q.device) if return_lse else None
    return torch.zeros_like(q, memory_format=torch.contiguous_format), lse


def lse_shape(q: torch.Tensor) -> tuple[int, int, int]:
    return (q.shape[0], q.shape[2], q.shape[1])


def leading_strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _list_chunk(capacity: int) -> int:
    """Entries of a list that one step looks at."""
    return min(1024, max(16, 1 << (capacity - 1).bit_length()))


def on_device(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensors'. No effect on a CPU."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)
