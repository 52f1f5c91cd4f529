"""Which key blocks each query block attends to: the one description every kernel here consumes.

A :class:`BlockSparsePlan` is a handful of int32 tensors on the device of q. Building one from
tensors never waits for the device: no builder reads a value back, so a plan can be built between
kernels, inside ``torch.compile`` and under CUDA-graph capture. What only the values can tell (an
index out of range, a permutation that repeats a token) is told by :meth:`BlockSparsePlan.validate`,
which does wait. What the shapes can tell is checked when a plan is made.

Two orders of tokens matter. *Token order* is that of q, k and v. The *walk* is the order in which
a kernel visits them: position p of the walk is token ``permutation[p]``, or token p without a
permutation. Blocks are consecutive stretches of the walk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch
import torch.nn.functional as F

from polyattn_kernels.errors import PlanError, require_int
from polyattn_kernels.selection import BlockSelection

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["BlockGeometry", "BlockSparsePlan"]

Side = Literal["query", "key"]


class BlockGeometry(TypedDict, total=False):
    """How the tokens of q and of k are cut into blocks; the fields of :class:`BlockSparsePlan`.

    Each side has either a uniform block size or offsets. What is left out is None.
    """

    query_block: int | None
    key_block: int | None
    query_offsets: torch.Tensor | None
    key_offsets: torch.Tensor | None
    query_lengths: torch.Tensor | None
    key_lengths: torch.Tensor | None
    query_permutation: torch.Tensor | None
    key_permutation: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class BlockSparsePlan:
    """Which key blocks each query block attends to.

    Every tensor is int32, contiguous, and on one device, that of q. Its leading dimensions are
    batch items and *query* heads; either may be 1, which shares the entry among all.

    Uniform blocks: block i holds positions ``i * block`` to ``min((i + 1) * block, S)`` of the
    walk, so the last one may be short. With lengths, only the first ``lengths[i]`` rows of block i
    are tokens; the others may hold anything, NaN included, and reach no result. Variable blocks:
    block i holds positions ``offsets[i]`` to ``offsets[i + 1]``, none if they are equal. One side
    may be uniform while the other is variable.

    A query that attends to no key, and a row that is no token, gives zeros and a log-sum-exp of
    -inf.

    Raises:
        PlanError: from the constructor, for tensors whose dtype, device, layout or shape does not
            fit; :meth:`validate` for values that do not.
    """

    query_length: int
    """Sq: rows of q."""
    key_length: int
    """Sk: rows of k and v."""
    query_block: int | None
    """Tokens in a uniform query block, a multiple of 16; None for variable blocks."""
    key_block: int | None
    """Tokens in a uniform key block, a multiple of 16; None for variable blocks."""
    key_counts: torch.Tensor
    """``[B|1, H|1, Mq]``: number of key blocks each query block attends to."""
    key_indices: torch.Tensor
    """``[B|1, H|1, Mq, capacity]``: their numbers, ascending; what is past the count is ignored."""
    query_offsets: torch.Tensor | None = None
    """``[B|1, H|1, Mq + 1]`` for variable query blocks: 0 first, Sq last, never decreasing."""
    key_offsets: torch.Tensor | None = None
    """``[B|1, H|1, Mk + 1]`` for variable key blocks: 0 first, Sk last, never decreasing."""
    query_lengths: torch.Tensor | None = None
    """``[B|1, H|1, Mq]``: tokens at the start of each uniform query block; None: all its rows."""
    key_lengths: torch.Tensor | None = None
    """``[B|1, H|1, Mk]``: tokens at the start of each uniform key block; None: all its rows."""
    query_permutation: torch.Tensor | None = None
    """``[B|1, H|1, Sq]``: the token of q, and of the output, at each position of the walk.

    With ``query_lengths`` the walk may be longer than q, ``[B|1, H|1, P]``: positions past the
    length of their block may be -1, which is no token, and every token still has its position.
    """
    key_permutation: torch.Tensor | None = None
    """``[B|1, H|1, Sk]``: the token of k and v at each position of the walk."""

    def __post_init__(self) -> None:
        _check_structure(self)

    # --- what the shapes tell ---------------------------------------------------------------------

    @property
    def query_positions(self) -> int:
        """Positions of the walk over queries: Sq, or more if some hold no token."""
        order = self.query_permutation
        return self.query_length if order is None else order.shape[-1]

    @property
    def num_query_blocks(self) -> int:
        """Mq."""
        return self.key_counts.shape[-1]

    @property
    def num_key_blocks(self) -> int:
        """Mk."""
        if self.key_offsets is not None:
            return self.key_offsets.shape[-1] - 1
        assert self.key_block is not None
        return -(-self.key_length // self.key_block)

    @property
    def capacity(self) -> int:
        """The most key blocks that one query block's list can hold."""
        return self.key_indices.shape[-1]

    @property
    def batch(self) -> int:
        """Batch items the plan tells apart: 1 if it is shared among all."""
        return max(tensor.shape[0] for tensor in self.tensors().values())

    @property
    def heads(self) -> int:
        """Query heads the plan tells apart: 1 if it is shared among all."""
        return max(tensor.shape[1] for tensor in self.tensors().values())

    @property
    def is_uniform(self) -> bool:
        """Whether both sides have blocks of one size."""
        return self.query_block is not None and self.key_block is not None

    @property
    def device(self) -> torch.device:
        return self.key_counts.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        values = ((field, getattr(self, field)) for field in _TENSOR_FIELDS)
        return {field: value for field, value in values if value is not None}

    def __repr__(self) -> str:
        """One line, without waiting for the device (so without the density)."""

        def side(name: Side) -> str:
            tokens, block, blocks, offsets = _side(self, name)
            size = f"{blocks} blocks of {block}" if offsets is None else f"{blocks} variable blocks"
            extras = [
                word
                for word, field in (("ragged", "lengths"), ("permuted", "permutation"))
                if getattr(self, f"{name}_{field}") is not None
            ]
            return ", ".join([f"{tokens} in {size}", *extras])

        batch, heads = self.batch, self.heads
        shared = (
            f"batch {batch if batch > 1 else 'shared'}, heads {heads if heads > 1 else 'shared'}"
        )
        return (
            f"BlockSparsePlan(queries: {side('query')}; keys: {side('key')}; "
            f"capacity {self.capacity}; {shared}; {self.device})"
        )

    # --- what the values tell ---------------------------------------------------------------------

    def block_sizes(self, side: Side) -> torch.Tensor:
        """Tokens in each block of a side, ``"query"`` or ``"key"``: int64 ``[B|1, H|1, M]``."""
        tokens, block, blocks, offsets = _side(self, side)
        lengths: torch.Tensor | None = getattr(self, f"{side}_lengths")
        if offsets is not None:
            return offsets.long().diff(dim=-1)
        if lengths is not None:
            return lengths.long()
        starts = torch.arange(blocks, device=self.device) * block
        return (tokens - starts).clamp_max(block)[None, None]

    def block_starts(self, side: Side) -> torch.Tensor:
        """First position of each block in the walk: int64 ``[B|1, H|1, M]``."""
        _, block, blocks, offsets = _side(self, side)
        if offsets is not None:
            return offsets[..., :-1].long()
        return (torch.arange(blocks, device=self.device) * block)[None, None]

    def blocks_of_positions(self, side: Side) -> torch.Tensor:
        """The block at each position of the walk: int64 ``[B|1, H|1, S]``, -1 where no token is."""
        tokens, block, _, offsets = _side(self, side)
        positions = torch.arange(tokens, device=self.device)
        if offsets is not None:
            # The last block that starts at or before the position: empty blocks own none.
            where = positions.expand(*offsets.shape[:2], tokens).contiguous()
            blocks = torch.searchsorted(offsets.long(), where, right=True) - 1
            return blocks.masked_fill(blocks == offsets.shape[-1] - 1, -1)  # ends too early
        blocks = (positions // block)[None, None]
        lengths: torch.Tensor | None = getattr(self, f"{side}_lengths")
        if lengths is None:
            return blocks
        blocks = blocks.expand(*lengths.shape[:2], tokens)
        return blocks.where(positions % block < lengths.gather(-1, blocks), -1)

    def blocks_of_tokens(self, side: Side) -> torch.Tensor:
        """The block of each token of q or k: int64 ``[B|1, H|1, S]``, -1 where it is in none."""
        blocks = self.blocks_of_positions(side)
        permutation: torch.Tensor | None = getattr(self, f"{side}_permutation")
        if permutation is None:
            return blocks
        batch, heads = _common(blocks, permutation)
        blocks = blocks.expand(batch, heads, -1)
        tokens = self.query_length if side == "query" else self.key_length
        # Positions without a token go to a column that is cut off.
        order = permutation.where(permutation >= 0, tokens).long().clamp_max(tokens)
        found = blocks.new_full((batch, heads, tokens + 1), -1)
        return found.scatter_(-1, order.expand(batch, heads, -1), blocks)[..., :tokens]

    def to_block_mask(self) -> torch.Tensor:
        """Which key blocks each query block attends to: bool ``[B|1, H|1, Mq, Mk]``."""
        batch, heads = _common(self.key_counts, self.key_indices)
        entries = torch.arange(self.capacity, device=self.device)
        # Ignored entries go to a column of their own that is cut off: they may hold anything.
        columns = _within(self.key_indices, self.num_key_blocks).where(
            entries < self.key_counts.unsqueeze(-1), self.num_key_blocks
        )
        mask = torch.zeros(
            (batch, heads, self.num_query_blocks, self.num_key_blocks + 1),
            dtype=torch.bool,
            device=self.device,
        )
        return mask.scatter_(-1, columns, True)[..., :-1]

    def to_mask(self) -> torch.Tensor:
        """Which keys each query attends to, in token order: bool ``[B|1, H|1, Sq, Sk]``.

        As large as it looks: for tests, and for kernels that take nothing else.
        """
        return mask_of_rows(
            self.to_block_mask(), self.blocks_of_tokens("query"), self.blocks_of_tokens("key")
        )

    def density(self) -> torch.Tensor:
        """Attended query-key pairs over all pairs of tokens; float64 scalar on the plan's device.

        Exact: rows that are no tokens count on neither side. 0 for a plan without tokens.
        """
        queries, keys = self.block_sizes("query"), self.block_sizes("key")
        batch, heads = self.batch, self.heads
        indices = _within(self.key_indices, self.num_key_blocks).expand(batch, heads, -1, -1)
        entries = torch.arange(self.capacity, device=self.device)
        seen = keys.unsqueeze(2).expand(batch, heads, self.num_query_blocks, -1).gather(-1, indices)
        seen = seen.masked_fill(entries >= self.key_counts.unsqueeze(-1), 0).sum(-1)
        pairs = (queries * seen).sum()
        tokens = (queries.sum(-1) * keys.sum(-1)).expand(batch, heads).sum()
        return pairs.double() / tokens.clamp_min(1).double()

    def validate(self) -> Self:
        """Hold every value against what a kernel relies on; waits for the device. Returns the plan.

        Raises:
            PlanError: naming the first offender by batch item, head and block.
        """
        _check_values(self)
        return self

    # --- other plans of the same attention --------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """The plan with its tensors on another device; itself if they are there already."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        if all(moved[name] is tensor for name, tensor in self.tensors().items()):
            return self
        return replace(self, **moved)  # type: ignore[arg-type]

    def to_variable(self) -> Self:
        """The same attention with offsets on both sides, for kernels that know nothing else.

        A uniform block that is shorter than its rows becomes two blocks: its tokens, and its other
        rows, which attend to nothing and are attended by nobody. ``density()`` of the result counts
        such rows as tokens.

        Raises:
            PlanError: for a walk over more positions than there are queries.
        """
        if self.query_positions != self.query_length:
            raise PlanError("a walk over more positions than queries has no variable blocks")
        counts, indices = self.key_counts, self.key_indices
        changes: dict[str, Any] = {}
        for side in ("query", "key"):
            tokens, block, blocks, offsets = _side(self, side)
            if offsets is not None:
                continue
            starts = torch.arange(blocks, device=self.device, dtype=torch.int32) * block
            end = torch.full((1, 1, 1), tokens, device=self.device, dtype=torch.int32)
            lengths: torch.Tensor | None = getattr(self, f"{side}_lengths")
            if lengths is None:
                edges = starts[None, None]
            else:
                edges = torch.stack((starts.expand_as(lengths), starts + lengths), -1).flatten(-2)
                end = end.expand(*lengths.shape[:2], 1)
                if side == "key":
                    indices = indices * 2
                else:
                    counts = torch.stack((counts, torch.zeros_like(counts)), -1).flatten(-2)
                    indices = indices.repeat_interleave(2, dim=2)
            changes[f"{side}_offsets"] = torch.cat((edges, end), -1)
            changes[f"{side}_block"] = changes[f"{side}_lengths"] = None
        return replace(self, key_counts=counts, key_indices=indices, **changes)

    def with_dense_blocks(
        self,
        key_spans: Sequence[tuple[int, int]] = (),
        query_spans: Sequence[tuple[int, int]] = (),
        *,
        capacity: int | None = None,
    ) -> Self:
        """A plan in which some key blocks are seen by all, and some query blocks see all keys.

        Args:
            key_spans: spans ``(start, stop)`` of tokens of k, such as the text of a joint sequence:
                every query attends to each block that holds one of them.
            query_spans: spans of tokens of q: each block that holds one of them attends to every
                key.
            capacity: of the new lists; Mk if None.

        Attention is by whole blocks: with blocks of 128, the span (0, 77) makes 128 tokens visible.
        Give text blocks of its own where that matters. A block that has no key tokens at all is
        never added for a key span.

        Raises:
            PlanError: for a span that is empty, reversed, or outside of the sequence.
        """
        mask = self.to_block_mask()
        key_touched = _touched_blocks(self, "key", key_spans)
        query_touched = _touched_blocks(self, "query", query_spans)
        mask = mask | key_touched.unsqueeze(2) | query_touched.unsqueeze(3)
        counts, indices = _lists(mask, capacity)
        return replace(self, key_counts=counts, key_indices=indices)

    # --- building ---------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls,
        block_mask: torch.Tensor,
        *,
        query_length: int,
        key_length: int,
        capacity: int | None = None,
        **geometry: Unpack[BlockGeometry],
    ) -> Self:
        """A plan from a map of blocks.

        Args:
            block_mask: bool ``[B|1, H|1, Mq, Mk]``, True where the query block attends.
            query_length: Sq.
            key_length: Sk.
            capacity: room in the lists: a promise that no query block attends to more; Mk if None.
                A broken promise is an error (on a GPU, where nothing waits for the values, an
                assertion on the device).
            **geometry: how tokens are cut into blocks; see :class:`BlockGeometry`.

        Raises:
            PlanError: for shapes that do not fit together.
        """
        _require_tensor("block_mask", block_mask)
        if block_mask.dtype is not torch.bool or block_mask.dim() != 4:
            raise PlanError(
                "block_mask must be bool [B or 1, H or 1, query blocks, key blocks], found "
                f"{_describe(block_mask)}",
                hint="block_mask.bool()" if block_mask.dim() == 4 else None,
            )
        _require_blocks("block_mask", block_mask.shape[2:], query_length, key_length, geometry)
        counts, indices = _lists(block_mask, capacity)
        return _make(cls, query_length, key_length, counts, indices, geometry)

    @classmethod
    def from_selection(
        cls,
        selection: BlockSelection,
        *,
        query_length: int,
        key_length: int,
        **geometry: Unpack[BlockGeometry],
    ) -> Self:
        """A plan from what a rule selected.

        Args:
            selection: of :func:`~polyattn_kernels.select_top_k` or another rule.
            query_length: Sq.
            key_length: Sk.
            **geometry: how tokens are cut into blocks; see :class:`BlockGeometry`.

        Raises:
            PlanError: for a selection among other blocks than the geometry has.
        """
        if not isinstance(selection, BlockSelection):
            raise PlanError(
                f"selection must be a BlockSelection, found a {type(selection).__name__}",
                hint="BlockSparsePlan.from_mask or BlockSparsePlan.from_indices",
            )
        found = (selection.key_counts.shape[-1], selection.num_key_blocks)
        _require_blocks("selection", found, query_length, key_length, geometry)
        return _make(
            cls, query_length, key_length, selection.key_counts, selection.key_indices, geometry
        )

    @classmethod
    def from_indices(
        cls,
        indices: torch.Tensor,
        counts: torch.Tensor | None = None,
        *,
        query_length: int,
        key_length: int,
        **geometry: Unpack[BlockGeometry],
    ) -> Self:
        """A plan from lists of key blocks in any order, such as the result of ``topk``.

        The plan's lists are sorted: that is the order in which :meth:`validate` counts entries.

        Args:
            indices: int32 or int64 ``[B|1, H|1, Mq, capacity]``; each list names a block once.
            counts: int32 or int64 ``[B|1, H|1, Mq]``: how many leading entries are meant; None
                means all of them.
            query_length: Sq.
            key_length: Sk.
            **geometry: how tokens are cut into blocks; see :class:`BlockGeometry`.

        Raises:
            PlanError: for dtypes or shapes that do not fit.
        """
        given = [("indices", indices, 4)]
        if counts is not None:
            given.append(("counts", counts, 3))
        for name, tensor, dims in given:
            _require_tensor(name, tensor)
            if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != dims:
                raise PlanError(
                    f"{name} must be int32 or int64 with {dims} dimensions, found "
                    f"{_describe(tensor)}"
                )
        query_blocks, key_blocks = _numbers_of_blocks(query_length, key_length, geometry)
        if indices.shape[2] != query_blocks or not 1 <= indices.shape[3] <= key_blocks:
            raise PlanError(
                f"indices must be [B or 1, H or 1, {query_blocks}, 1 to {key_blocks}], a list for "
                f"each query block with room for some key blocks, found {list(indices.shape)}"
            )
        if counts is None:
            counts = torch.full_like(indices[..., 0], indices.shape[-1])
        if indices.shape[:-1] != counts.shape:
            sizes = list(zip(indices.shape, counts.shape, strict=False))
            if any(one != other and 1 not in (one, other) for one, other in sizes):
                raise PlanError(
                    f"counts must be [B or 1, H or 1, {query_blocks}] to go with indices "
                    f"{list(indices.shape)}, found {list(counts.shape)}"
                )
            shape = [max(one, other) for one, other in sizes]
            indices, counts = indices.expand(*shape, -1), counts.expand(shape)
        unused = torch.arange(indices.shape[-1], device=indices.device) >= counts.unsqueeze(-1)
        last = torch.iinfo(indices.dtype).max
        indices = indices.masked_fill(unused, last).sort(dim=-1).values.masked_fill(unused, 0)
        return _make(
            cls, query_length, key_length, _int32(counts).contiguous(), _int32(indices), geometry
        )

    @classmethod
    def from_static(
        cls,
        pattern: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | Sequence[Sequence[bool]],
        *,
        query_length: int,
        key_length: int,
        query_block: int,
        key_block: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A plan that depends on no data, built once: equal arguments give the same tensors.

        Args:
            pattern: a table of Mq rows of Mk truth values; or a function of query block numbers
                ``[Mq, 1]`` and key block numbers ``[1, Mk]`` (int64, on the CPU) that returns bool
                ``[Mq, Mk]``, or ``[H, Mq, Mk]`` for a pattern per head, or what broadcasts to it:
                a rule may look at key block numbers alone. Functions are told apart by ``==`` and
                must be hashable: an instance of a frozen dataclass with ``__call__`` is recognised
                by value, a lambda only as the same object.
            query_length: Sq.
            key_length: Sk.
            query_block: tokens in a query block.
            key_block: tokens in a key block.
            device: where the plan's tensors live.

        The lists are as narrow as the pattern allows. The plans used last are kept, up to a number.
        Build static plans outside of ``torch.compile`` and of a CUDA-graph capture: the first time
        copies the lists to the device, which it waits for.

        Raises:
            PlanError: for a pattern of another shape, or one that cannot be hashed.
        """
        if torch.compiler.is_compiling():
            raise PlanError(
                "a static plan is built and kept outside of torch.compile",
                hint="build the plan first and pass it to the compiled function",
            )
        uniform = {"query_block": query_block, "key_block": key_block}
        query_blocks, key_blocks = _numbers_of_blocks(query_length, key_length, uniform)
        if not callable(pattern):
            pattern = _Table.of(pattern)
        device = torch.empty(0, device=device).device  # "cuda" is cuda:0 or whichever is current
        key = (cls, pattern, query_length, key_length, query_block, key_block, device)

        # Tensors born in inference mode could not be used outside of it, and these are kept.
        @torch.inference_mode(False)
        def build() -> BlockSparsePlan:
            mask = _evaluate(pattern, query_blocks, key_blocks)
            capacity = max(1, int(mask.sum(-1).max()))
            counts, indices = _lists(mask, capacity)
            return cls(
                query_length=query_length,
                key_length=key_length,
                query_block=query_block,
                key_block=key_block,
                key_counts=counts.to(device),
                key_indices=indices.to(device),
            )

        return _static_plans.get(key, build)  # type: ignore[return-value]

    @classmethod
    def full(
        cls,
        *,
        query_length: int,
        key_length: int,
        device: torch.device | str | None = None,
        **geometry: Unpack[BlockGeometry],
    ) -> Self:
        """A plan in which every query attends to every key (blocks of 128 if not said otherwise).

        Raises:
            PlanError: for a geometry that does not fit.
        """
        for side in ("query", "key"):
            if geometry.get(f"{side}_block") is None and geometry.get(f"{side}_offsets") is None:
                geometry[f"{side}_block"] = 128  # type: ignore[literal-required]
        query_blocks, key_blocks = _numbers_of_blocks(query_length, key_length, geometry)
        given = [value for value in geometry.values() if isinstance(value, torch.Tensor)]
        if device is None:
            device = given[0].device if given else "cpu"
        counts = torch.full((1, 1, query_blocks), key_blocks, dtype=torch.int32, device=device)
        indices = torch.arange(key_blocks, dtype=torch.int32, device=device)
        indices = indices.repeat(1, 1, query_blocks, 1)
        return _make(cls, query_length, key_length, counts, indices, geometry)

    def draw(self, path: str | PathLike[str], batch: int = 0, head: int = 0) -> None:
        """Write a PNG of one head: queries down, keys across, in the order of the walk.

        A pixel is as dark as the share of its query-key pairs that is attended; at most 1,024
        pixels a side. Waits for the device. Where the plan is shared, ``batch`` and ``head`` may be
        any number: all have this picture.

        Raises:
            PlanError: without Pillow, for a batch item or head the plan does not have, or a path
                that cannot be written.
        """
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise PlanError(
                "drawing a plan needs Pillow, which is not installed",
                hint='pip install "polyattn-kernels[draw]"',
            ) from error

        def of_head(tensor: torch.Tensor) -> torch.Tensor:
            picked = []
            for name, index, size in (
                ("batch item", batch, tensor.shape[0]),
                ("head", head, tensor.shape[1]),
            ):
                most = self.batch if name == "batch item" else self.heads
                if index < 0 or (most > 1 and index >= most):
                    raise PlanError(
                        f"there is no {name} {index}: the plan has {most}, numbered from 0"
                    )
                picked.append(index if size > 1 else 0)
            return tensor[picked[0], picked[1]].cpu()

        def coverage(side: Side, tokens: int) -> torch.Tensor:
            """Share of each pixel that lies in each block: [pixels, M]."""
            edges = torch.linspace(0, tokens, min(tokens, 1024) + 1, dtype=torch.float64)
            start = of_head(self.block_starts(side)).double()
            stop = start + of_head(self.block_sizes(side)).double()
            low = torch.maximum(edges[:-1, None], start)
            high = torch.minimum(edges[1:, None], stop)
            return (high - low).clamp_min(0) / edges.diff()[:, None]

        rows, columns = coverage("query", self.query_positions), coverage("key", self.key_length)
        shade = rows @ of_head(self.to_block_mask()).double() @ columns.T
        pixels = (255 * (1 - shade)).round().to(torch.uint8)
        image = Image.frombytes(
            "L", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist())
        )
        try:
            image.save(path, format="PNG")
        except OSError as error:
            raise PlanError(f"cannot write {path}: {error}") from error


Plan = TypeVar("Plan", bound=BlockSparsePlan)

_TENSOR_FIELDS = [field.name for field in fields(BlockSparsePlan) if "Tensor" in str(field.type)]


def _side(plan: BlockSparsePlan, side: Side) -> tuple[int, int, int, torch.Tensor | None]:
    """Positions, uniform block size (0 if variable), number of blocks, and offsets of one side."""
    if side == "query":
        block, blocks, offsets = plan.query_block, plan.num_query_blocks, plan.query_offsets
        return plan.query_positions, block or 0, blocks, offsets
    return plan.key_length, plan.key_block or 0, plan.num_key_blocks, plan.key_offsets


def _common(*tensors: torch.Tensor) -> tuple[int, int]:
    """Batch items and heads of tensors of which some share theirs."""
    return max(each.shape[0] for each in tensors), max(each.shape[1] for each in tensors)


def _within(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """As int64, moved into 0 to size - 1: a wrong plan must not fail an assertion on a GPU."""
    return numbers.long().clamp(0, size - 1)


def _int32(numbers: torch.Tensor) -> torch.Tensor:
    """As int32; what does not fit becomes the nearest that does, and so stays out of range."""
    if numbers.dtype is torch.int32:
        return numbers
    limits = torch.iinfo(torch.int32)
    return numbers.clamp(limits.min, limits.max).int()


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def mask_of_rows(
    block_mask: torch.Tensor, query_blocks: torch.Tensor, key_blocks: torch.Tensor
) -> torch.Tensor:
    """Which keys some queries attend to.

    ``block_mask`` is bool ``[B|1, H|1, Mq, Mk]``; ``query_blocks [B|1, H|1, rows]`` and
    ``key_blocks [B|1, H|1, Sk]`` are the int64 block of each, -1 for none. Returns bool
    ``[B|1, H|1, rows, Sk]``.
    """
    batch, heads = _common(block_mask, query_blocks, key_blocks)
    rows, columns = query_blocks.unsqueeze(3), key_blocks.unsqueeze(2)
    mask = block_mask.expand(batch, heads, -1, -1)
    mask = mask.gather(2, rows.clamp_min(0).expand(batch, heads, -1, mask.shape[3]))
    mask = mask.gather(3, columns.clamp_min(0).expand(batch, heads, mask.shape[2], -1))
    return mask & (rows >= 0) & (columns >= 0)


# --- building -------------------------------------------------------------------------------------


def _make(
    cls: type[Plan],
    query_length: int,
    key_length: int,
    counts: torch.Tensor,
    indices: torch.Tensor,
    geometry: BlockGeometry,
) -> Plan:
    complete: BlockGeometry = {"query_block": None, "key_block": None, **geometry}
    return cls(
        query_length=query_length,
        key_length=key_length,
        key_counts=counts,
        key_indices=indices.contiguous(),
        **complete,
    )


def _lists(block_mask: torch.Tensor, capacity: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and compact ascending lists of the True columns, without waiting for the device."""
    key_blocks = block_mask.shape[-1]
    if capacity is not None:
        require_int("capacity", capacity, error=PlanError)
    room = key_blocks if capacity is None else min(capacity, key_blocks)
    counts = block_mask.sum(-1, dtype=torch.int32)
    if room < key_blocks:
        _promise((counts <= room).all(), f"a query block attends to more than capacity={capacity}")
    # The n-th True of a row goes to slot n; all that is False goes to a last slot, cut off.
    slots = block_mask.cumsum(-1, dtype=torch.int32) - 1
    slots = slots.masked_fill(~block_mask, room).clamp_max(room).long()
    columns = torch.arange(key_blocks, dtype=torch.int32, device=block_mask.device)
    lists = torch.zeros(
        (*block_mask.shape[:-1], room + 1), dtype=torch.int32, device=block_mask.device
    )
    lists.scatter_(-1, slots, columns.expand_as(slots))
    return counts, lists[..., :room].contiguous()


def _promise(kept: torch.Tensor, message: str) -> None:
    """An error if a condition on values is false: at once on a CPU, on the device elsewhere."""
    if kept.device.type == "cpu" and not torch.compiler.is_compiling():
        if not kept:
            raise PlanError(message, hint="capacity=None, which has room for all key blocks")
    else:
        torch._assert_async(kept, message)


def _touched_blocks(
    plan: BlockSparsePlan, side: Side, spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Which blocks hold a token of the spans: bool [B|1, H|1, M]."""
    _, _, count, _ = _side(plan, side)
    tokens = plan.query_length if side == "query" else plan.key_length
    marked = torch.zeros((1, 1, tokens), dtype=torch.bool, device=plan.device)
    for span in spans:
        if not isinstance(span, (tuple, list)) or len(span) != 2:
            raise PlanError(
                f"{side}_spans is a sequence of spans (start, stop), found {span!r} in it",
                hint=f"{side}_spans=[(start, stop)]",
            )
        start, stop = span
        require_int(f"a bound of {side}_spans", start, 0, PlanError)
        require_int(f"a bound of {side}_spans", stop, 0, PlanError)
        if not start < stop <= tokens:
            raise PlanError(
                f"{side}_spans: the span ({start}, {stop}) needs 0 <= start < stop <= {tokens}, "
                f"the number of {'queries' if side == 'query' else 'keys'}"
            )
        marked[..., start:stop] = True
    permutation: torch.Tensor | None = getattr(plan, f"{side}_permutation")
    if permutation is not None:
        marked = marked.expand(*permutation.shape[:2], -1)
        marked = marked.gather(-1, _within(permutation, tokens))
    blocks = plan.blocks_of_positions(side)
    batch, heads = _common(blocks, marked)
    # Positions that are not marked, or hold no token, are sent to a column that is cut off.
    columns = blocks.where(marked & (blocks >= 0), count).expand(batch, heads, -1)
    touched = torch.zeros((batch, heads, count + 1), dtype=torch.bool, device=plan.device)
    return touched.scatter_(-1, columns, True)[..., :-1]


@dataclass(frozen=True)
class _Table:
    """A static pattern that is written out; hashable by value."""

    rows: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, table: Any) -> _Table:
        try:
            if isinstance(table, torch.Tensor) and table.dim() != 2:
                raise ValueError(f"it has {table.dim()} dimensions")
            return cls(tuple(tuple(bool(each) for each in row) for row in table))
        except (TypeError, ValueError, RuntimeError) as error:
            raise PlanError(
                "a static pattern is a function of block numbers, or a table of Mq rows of Mk "
                f"truth values, found a {type(table).__name__}: {error}",
                hint="BlockSparsePlan.from_mask for a tensor [B or 1, H or 1, Mq, Mk]",
            ) from error

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        rows, columns = queries.shape[0], keys.shape[1]
        if [len(row) for row in self.rows] != [columns] * rows:
            raise PlanError(
                f"a static pattern's table must have {rows} rows of {columns}, found "
                f"{len(self.rows)} rows of {sorted({len(row) for row in self.rows})}"
            )
        return torch.tensor(self.rows, dtype=torch.bool)


def _evaluate(
    pattern: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    query_blocks: int,
    key_blocks: int,
) -> torch.Tensor:
    """A static pattern as bool [1, H|1, Mq, Mk] on the CPU."""
    with torch.device("cpu"):
        mask = pattern(torch.arange(query_blocks)[:, None], torch.arange(key_blocks)[None])
    if isinstance(mask, torch.Tensor) and mask.dtype is torch.bool and mask.dim() <= 3:
        shape = (*(mask.shape[:-2] or (1,)), query_blocks, key_blocks)
        pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
        if shape[0] and all(size in (1, most) for size, most in pairs):
            return mask.broadcast_to(shape)[None]
    found = _describe(mask) if isinstance(mask, torch.Tensor) else repr(mask)
    raise PlanError(
        f"a static pattern of {query_blocks} query blocks and {key_blocks} key blocks must be bool "
        f"[{query_blocks}, {key_blocks}], or that per head, or broadcast to it, found {found}"
    )


class _Cache:
    """The most recently used plans, up to a number, safe between threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._plans: OrderedDict[Any, BlockSparsePlan] = OrderedDict()

    def get(self, key: Any, build: Callable[[], BlockSparsePlan]) -> BlockSparsePlan:
        try:
            hash(key)
        except TypeError as error:
            raise PlanError(
                f"a static pattern must be hashable: {error}",
                hint="make the pattern a frozen dataclass with a __call__ method",
            ) from error
        with self._lock:
            plan = self._plans.get(key)
        # Not under the lock: a pattern is someone else's code, and may build a plan itself.
        built = build() if plan is None else plan
        if type(built.key_indices) is not torch.Tensor:
            return built  # a tracer's stand-in: worthless once the trace is over
        with self._lock:
            self._plans.setdefault(key, built)  # of two threads that built, one is first
            self._plans.move_to_end(key)
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)
            return self._plans[key]


_static_plans = _Cache(most=64)


# --- checking -------------------------------------------------------------------------------------

_GEOMETRY = tuple(BlockGeometry.__annotations__)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise PlanError(
            f"{name} must be a tensor, found {'None' if value is None else type(value).__name__}",
            hint=None if value is None else f"torch.as_tensor({name})",
        )


def _numbers_of_blocks(
    query_length: int, key_length: int, geometry: Mapping[str, Any]
) -> tuple[int, int]:
    """Mq and Mk; refuses parts of a geometry that do not go together."""
    for name in geometry:
        if name not in _GEOMETRY:
            known = ", ".join(_GEOMETRY)
            raise PlanError(f"there is no argument {name}; blocks are given by {known}")
    numbers = []
    for side, tokens in (("query", query_length), ("key", key_length)):
        require_int(f"{side}_length", tokens, error=PlanError)
        block: Any = geometry.get(f"{side}_block")
        offsets: Any = geometry.get(f"{side}_offsets")
        for part in ("offsets", "lengths", "permutation"):
            if (tensor := geometry.get(f"{side}_{part}")) is not None:
                _require_tensor(f"{side}_{part}", tensor)
        if (block is None) == (offsets is None):
            raise PlanError(
                f"{side} blocks are either uniform ({side}_block=...) or variable "
                f"({side}_offsets=...), found {'neither' if block is None else 'both'}",
                hint=f"{side}_block=128" if block is None else f"{side}_block=None",
            )
        if offsets is None:
            require_int(f"{side}_block", block, 16, error=PlanError)
            if block % 16:
                raise PlanError(f"{side}_block must be a positive multiple of 16, found {block}")
            order: Any = geometry.get("query_permutation") if side == "query" else None
            if geometry.get("query_lengths") is not None and order is not None and order.dim() == 3:
                tokens = max(tokens, order.shape[-1])  # the walk may be longer
            numbers.append(-(-tokens // block))
            continue
        if geometry.get(f"{side}_lengths") is not None:
            raise PlanError(
                f"{side}_lengths belong to uniform blocks; variable ones say it by {side}_offsets"
            )
        if offsets.dim() != 3 or offsets.shape[-1] < 2:
            raise PlanError(
                f"{side}_offsets must be int32 [B or 1, H or 1, blocks + 1] with at least one "
                f"block, found {_describe(offsets)}",
                hint=f"{side}_offsets[None, None]" if offsets.dim() == 1 else None,
            )
        numbers.append(offsets.shape[-1] - 1)
    return numbers[0], numbers[1]


def _require_blocks(
    name: str,
    found: Sequence[int],
    query_length: int,
    key_length: int,
    geometry: Mapping[str, Any],
) -> None:
    blocks = _numbers_of_blocks(query_length, key_length, geometry)
    if tuple(found) != blocks:
        raise PlanError(
            f"{name} has {found[0]} query blocks and {found[1]} key blocks; {query_length} queries "
            f"and {key_length} keys make {blocks[0]} and {blocks[1]}"
        )


def _check_structure(plan: BlockSparsePlan) -> None:
    """Everything that can be told without reading a value."""
    geometry = {name: getattr(plan, name) for name in _GEOMETRY}
    query_blocks, key_blocks = _numbers_of_blocks(plan.query_length, plan.key_length, geometry)
    for name in ("key_counts", "key_indices"):
        _require_tensor(name, getattr(plan, name))
    order, positions = plan.query_permutation, plan.query_length
    if plan.query_lengths is not None and order is not None and order.dim() == 3:
        positions = max(positions, order.shape[-1])
    capacity = plan.key_indices.shape[3] if plan.key_indices.dim() == 4 else "capacity"
    tails: dict[str, tuple[Any, ...]] = {
        "key_counts": (query_blocks,),
        "key_indices": (query_blocks, capacity),
        "query_offsets": (query_blocks + 1,),
        "key_offsets": (key_blocks + 1,),
        "query_lengths": (query_blocks,),
        "key_lengths": (key_blocks,),
        "query_permutation": (positions,),
        "key_permutation": (plan.key_length,),
    }
    leading: dict[int, tuple[int, str]] = {}
    for name, tensor in plan.tensors().items():
        tail = tails[name]
        if tensor.device != plan.device:
            raise PlanError(
                f"all of a plan is on one device: {name} is on {tensor.device}, key_counts on "
                f"{plan.device}"
            )
        fits = tensor.dim() == 2 + len(tail) and tuple(tensor.shape[2:]) == tail
        if tensor.dtype is not torch.int32 or not fits:
            integers = not (tensor.is_floating_point() or tensor.is_complex())
            repair = ".int()" if integers and tensor.dtype is not torch.int32 else ""
            repair += "[None, None]" if tuple(tensor.shape) == tail else ""
            raise PlanError(
                f"{name} must be int32 [B or 1, H or 1, {', '.join(map(str, tail))}], found "
                f"{_describe(tensor)}",
                hint=f"{name}{repair}" if repair else None,
            )
        if not tensor.is_contiguous():
            raise PlanError(f"{name} must be contiguous", hint=f"{name}.contiguous()")
        for dim, what in enumerate(("batch items", "heads")):
            size = tensor.shape[dim]
            if size != 1 and leading.setdefault(dim, (size, name))[0] != size:
                most, other = leading[dim]
                raise PlanError(f"{name} has {size} {what}, {other} has {most}; 1 is shared by all")
        if tensor.numel() == 0:
            raise PlanError(f"{name} is empty: {list(tensor.shape)}")
    if plan.capacity > key_blocks:
        raise PlanError(
            f"key_indices has room for {plan.capacity} key blocks in a list (its last dimension); "
            f"there are {key_blocks}"
        )


def _check_values(plan: BlockSparsePlan) -> None:
    """Everything that only the values tell, in the order in which one thing rests on another."""
    for side in ("query", "key"):
        tokens, block, blocks, offsets = _side(plan, side)
        if offsets is not None:
            name = f"{side}_offsets"
            first, last, later = offsets[..., 0], offsets[..., -1], offsets[..., 1:]
            hint = "F.pad(block_sizes.cumsum(-1), (1, 0)).int()"
            _refuse(first != 0, first, f"{name} must start at 0", hint=hint)
            _refuse(last != tokens, last, f"{name} must end at {tokens}", hint=hint)
            _refuse(
                offsets.diff(dim=-1) < 0, later, f"{name} decrease at the end of a block", side,
                hint=hint,
            )  # fmt: skip
        lengths: torch.Tensor | None = getattr(plan, f"{side}_lengths")
        if lengths is not None:
            starts = torch.arange(blocks, device=plan.device) * block
            rows = (tokens - starts).clamp_max(block)
            _refuse(
                (lengths < 0) | (lengths > rows),
                lengths,
                f"{side}_lengths must be between 0 and the rows of the block",
                side,
                rows=rows,
            )
        permutation: torch.Tensor | None = getattr(plan, f"{side}_permutation")
        if permutation is not None:
            name = f"{side}_permutation"
            there = plan.query_length if side == "query" else plan.key_length
            absent = torch.zeros_like(permutation, dtype=torch.bool)
            if tokens > there:
                absent = (permutation == -1) & (plan.blocks_of_positions(side) < 0)
                permutation = permutation.expand_as(absent)
            _refuse(
                ((permutation < 0) & ~absent) | (permutation >= there),
                permutation,
                f"{name} must hold numbers from 0 to {there - 1}"
                + (", or -1 past the length of a block" if tokens > there else ""),
                "position",
            )
            ordered, places = permutation.sort(dim=-1, stable=True)
            again = F.pad((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0), (1, 0))
            _refuse(
                torch.zeros_like(again).scatter_(-1, places, again),
                permutation,
                f"{name} repeats a token",
                "position",
                hint=f"plan.{name}[batch, head].bincount() to see which are missing",
            )
            held = (permutation >= 0).sum(-1)
            _refuse(held != there, held, f"{name} must name each of {there} tokens")
    counts = plan.key_counts
    _refuse(counts < 0, counts, "key_counts must not be negative", "query")
    _refuse(
        counts > plan.capacity,
        counts,
        f"key_counts must not exceed the capacity of the lists, {plan.capacity}",
        "query",
    )
    batch, heads = _common(counts, plan.key_indices)
    indices = plan.key_indices.expand(batch, heads, -1, -1)
    used = torch.arange(plan.capacity, device=plan.device) < counts.unsqueeze(-1)
    _refuse(
        used & ((indices < 0) | (indices >= plan.num_key_blocks)),
        indices,
        f"key_indices must be from 0 to {plan.num_key_blocks - 1}",
        "query",
    )
    steps = F.pad(indices.diff(dim=-1), (1, 0), value=1)
    _refuse(
        used & (steps == 0),
        indices,
        "key_indices name a key block twice",
        "query",
        hint="BlockSparsePlan.from_mask(plan.to_block_mask(), ...), which names each once",
    )
    _refuse(
        used & (steps < 0),
        indices,
        "key_indices must be ascending",
        "query",
        hint="BlockSparsePlan.from_indices(indices, counts, ...), which sorts",
    )


def _refuse(
    wrong: torch.Tensor,
    values: torch.Tensor,
    message: str,
    third: str = "",
    *,
    rows: torch.Tensor | None = None,
    hint: str | None = None,
) -> None:
    """A PlanError for the first True of ``wrong``, with its place and the value found there.

    The dimensions are batch, head, what ``third`` names, and, in lists, the entry. ``rows`` are
    those of each block, to be told too.
    """
    wrong = wrong.expand_as(wrong | (values == 0))
    if not wrong.any():
        return
    first = int(wrong.flatten().int().argmax())
    place = [int(each) for each in torch.unravel_index(torch.tensor(first), wrong.shape)]
    names = ["batch", "head", third if third == "position" else f"{third} block", "entry"]
    where = ", ".join(
        f"{name} {at}" for name, at in zip(names, place, strict=False) if name != " block"
    )
    value = int(values.expand(wrong.shape)[tuple(place)])
    if rows is not None:
        where += f", which has {int(rows[place[2]])} rows"
    raise PlanError(f"{message}: found {value} at {where}", hint=hint)
