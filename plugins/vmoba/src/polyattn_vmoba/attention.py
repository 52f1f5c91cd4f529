"""``vmoba_attn``: each token attends to the chunks of the video whose mean keys it scores best.

V-MoBA (arXiv 2506.23858) cuts the video into chunks, in one of three ways by turns over the layers.
A chunk is scored by the product of a query with the mean of its keys, in float32 (float64 for
float64) and unscaled; :mod:`~polyattn_vmoba.selection` picks chunks by the scores; the softmax over
all tokens of the picked chunks and of the query's own is exact. Text is in no chunk: everybody sees
it, and it sees everything. Hidden keys reach neither a mean nor the result. Batch items never meet,
and heads only in the pools that say so.

What is picked is a plan in which every query is a block of its own and the chunks are the blocks
of keys. On the CPU that plan runs as it is. A kernel that works on tiles of queries would waste all
rows of a tile but one, so on a GPU :mod:`~polyattn_vmoba.routed` does the same by marks instead of
lists. It is tried on a small case of its own before it serves; where that differs from the plan run
plainly, the plan is what runs, and a warning says so. Queries are served a stretch at a time, so
that a call needs a bounded amount of memory, whatever is picked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn.errors import InputError
from polyattn.video import VideoSequence, video_sequence
from polyattn_kernels import (
    BlockSparsePlan,
    block_sparse_attention,
    group_by_label,
    pool_blocks,
    which_provider,
)
from polyattn_kernels.tiling import tiling
from polyattn_vmoba.config import Kind, LayerRule, VmobaConfig
from polyattn_vmoba.routed import LONGEST_ROW, Marks, attend_marked, mark_lists, mark_share
from polyattn_vmoba.selection import select_share, select_topk

__all__ = ["build"]

# Of all that is held for the queries that are served at one time, on a GPU maybe more.
TURN_BYTES = 2 * 2**30
# One part in so many is for scores and selections, the rest for partial results of the GPU's path.
SELECTED_SHARE = 4

TRIAL_GRID = (4, 6, 8)
TRIAL_RULE = LayerRule("spatiotemporal", (2, 3, 4), 3)

_log = logging.getLogger("polyattn")
_verdicts: dict[tuple[object, ...], bool] = {}

Extent = tuple[int, int, int]
Lists = tuple[torch.Tensor, torch.Tensor]


def build(
    config: VmobaConfig, request: AttentionRequest, environment: Environment
) -> Implementation:
    """The implementation for one configuration; it keeps nothing but the parameters."""
    _warn_of_unread(config)
    return VmobaAttention(config)


@lru_cache(maxsize=64)
def _warn_of_unread(config: VmobaConfig) -> None:
    """Once for each configuration."""
    if unread := config.unread():
        _log.warning(
            "vmoba_attn: moba_select_mode=%s does not read %s",
            config.moba_select_mode, ", ".join(unread),
        )  # fmt: skip


class VmobaAttention:
    """See :class:`polyattn.contract.Implementation`.

    Raises :class:`~polyattn.errors.InputError` without a layer where the cycle needs one, for a
    chunk of less than a token, and for what :func:`~polyattn.video.video_sequence` refuses.
    """

    def __init__(self, config: VmobaConfig) -> None:
        self.config = config

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        sequence = video_sequence(q, k, call)
        rule = self.config.rule(_kind(self.config, call))
        chunks = _chunks(sequence, rule, q.device)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        if sequence.text:
            start = 0 if sequence.text_before else sequence.video
            text = slice(start, start + sequence.text)
            out[:, text], lse[..., text] = block_sparse_attention(
                q[:, text], k, v, chunks.plan_of_all(sequence.text), scale=call.scale,
                return_lse=True,
            )  # fmt: skip
        video = slice(sequence.text_before, sequence.text_before + sequence.video)
        provider, density = self._attend(
            q[:, video], k, v, chunks, call.scale, out[:, video], lse[..., video]
        )
        call.facts = {
            "kind": rule.kind,
            "chunks": chunks.number,
            "density": chunks.density_of_all(density, sequence),
            "provider": provider,
        }
        return (out, lse) if call.return_lse else out

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        chunks: _Chunks,
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[str, torch.Tensor]:
        """Writes out and lse of the video's queries; who computed them, and the sum over queries
        of their density among all keys."""
        provider = which_provider(chunks.plan_of_all(q.shape[1]), q, k, v).name
        if provider == "reference" or not self._routes_rightly(q):
            return provider, self._attend_plainly(q, k, v, chunks, scale, out, lse)
        density = self._attend_routed(q, k, v, chunks, scale, out, lse)
        return "triton (routed by chunk)", density

    def _attend_plainly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: _Chunks, scale: float,
        out: torch.Tensor, lse: torch.Tensor, provider: str = "auto",
    ) -> torch.Tensor:  # fmt: skip
        densities = []
        for begin, end, lists in self._selected(q, k, chunks):
            plan = chunks.plan_of_lists(end - begin, *lists)
            out[:, begin:end], lse[..., begin:end] = block_sparse_attention(
                q[:, begin:end], k, v, plan, scale=scale, return_lse=True, provider=provider
            )
            densities.append(plan.density() * (end - begin))
        return torch.stack(densities).sum()

    def _attend_routed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: _Chunks, scale: float,
        out: torch.Tensor, lse: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        # In the order of the walk, read without looking up where each key lies.
        sorted_k, sorted_v = (chunks.in_order(each) for each in (k, v))
        rows = q if q.stride(-1) == 1 else q.contiguous()
        partial_bytes = _turn_bytes(q.device) - _turn_bytes(q.device) // SELECTED_SHARE
        attended = []
        for begin, end, marks in self._marked(q, k, chunks):
            part = slice(begin, end)
            attended.append(
                attend_marked(
                    rows[:, part], sorted_k, sorted_v, marks, chunks.offsets, scale,
                    out[:, part], lse[..., part], partial_bytes,
                )
            )  # fmt: skip
        return torch.stack(attended).sum() / (q.shape[0] * q.shape[2] * k.shape[1])

    def _routes_rightly(self, q: torch.Tensor) -> bool:
        """Whether the GPU's path gives what the plan gives, on a small case, tried once.

        The case has the device, dtype, head dimension and way of selecting of the call.
        """
        config = self.config
        how = (config.moba_select_mode, config.moba_threshold_type)
        case = (q.device, q.dtype, q.shape[-1], *how)
        if case not in _verdicts:
            try:
                _verdicts[case] = self._try_routed(q)
            except torch.cuda.OutOfMemoryError:
                return False  # asked again next time
        return _verdicts[case]

    def _try_routed(self, q: torch.Tensor) -> bool:
        generator = torch.Generator(q.device).manual_seed(0)
        shape = (1, math.prod(TRIAL_GRID), 2, q.shape[-1])
        q, k, v = (
            torch.randn(shape, dtype=q.dtype, device=q.device, generator=generator) for _ in "qkv"
        )
        chunks = _visible_chunks(TRIAL_GRID, TRIAL_RULE, 0, 0, q.device)
        scale = q.shape[-1] ** -0.5
        outs, words = [], "differs from the plan"
        for attend in (partial(self._attend_plainly, provider="reference"), self._attend_routed):
            out = torch.empty(shape, dtype=q.dtype, device=q.device)
            lse = torch.empty(1, 2, shape[1], dtype=torch.float32, device=q.device)
            try:
                attend(q, k, v, chunks, scale, out, lse)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as failure:
                words = f"failed: {type(failure).__name__}: {failure}"[:300]
                out.fill_(math.nan)
            outs.append(out.float())
        # Not "greater than": a NaN must fail. A share met exactly may round to one chunk more.
        right = bool((outs[1] - outs[0]).norm() < 5e-2 * outs[0].norm())
        if not right:
            _log.warning(
                "vmoba_attn: a small case of its GPU path on %s, %s, head dimension %d %s: plans "
                "are run plainly, which is slower",
                q.device, q.dtype, q.shape[-1], words,
            )  # fmt: skip
        return right

    def _marked(
        self, q: torch.Tensor, k: torch.Tensor, chunks: _Chunks
    ) -> Iterator[tuple[int, int, Marks]]:
        """As :meth:`_selected`, marked: the chunks and the text."""
        config = self.config
        blocks = chunks.number + int(chunks.has_text)
        fused = (config.moba_select_mode, config.moba_threshold_type) == ("threshold", "query_head")
        if not fused or blocks > LONGEST_ROW:
            for begin, end, lists in self._selected(q, k, chunks):
                yield begin, end, mark_lists(*chunks.with_text(*lists), blocks)
            return
        means, queries = _means(k, chunks), q.shape[1]
        # A score, a mark, a pair and parts of counts for each chunk.
        step = _queries_per_turn(q, chunks, 12 * blocks)
        for begin in range(0, queries, step):
            end = min(begin + step, queries)
            scores = _scores(q[:, begin:end], means)
            own = chunks.of_token[begin:end]
            yield begin, end, mark_share(scores, own, chunks.sizes, config.moba_threshold, blocks)

    def _selected(
        self, q: torch.Tensor, k: torch.Tensor, chunks: _Chunks
    ) -> Iterator[tuple[int, int, Lists]]:
        """Stretches of the video's queries (begin, end), and the chunks each query attends to.

        q ``[B, N, H, D]``; the lists are int32 ``[B, H, end - begin, capacity]``, ascending, with
        counts int32 ``[B, H, end - begin]``.
        """
        pool = self.config.moba_threshold_type
        means = _means(k, chunks)
        queries = q.shape[1]

        def select(begin: int, end: int) -> Lists:
            scores = _scores(q[:, begin:end], means)
            own = chunks.of_token[begin:end]
            if self.config.moba_select_mode == "topk":
                return select_topk(scores, own, chunks.sizes, chunks.rule.topk, pool)
            return select_share(scores, own, chunks.sizes, self.config.moba_threshold, pool)

        whole = None if pool == "query_head" else select(0, queries)
        # Scores and what torch makes of them, lists, marks and pairs.
        step = _queries_per_turn(q, chunks, 60 * (chunks.number + 1))
        for begin in range(0, queries, step):
            end = min(begin + step, queries)
            if whole is None:
                yield begin, end, select(begin, end)
            else:
                yield begin, end, (whole[0][:, :, begin:end], whole[1][:, :, begin:end])


def _kind(config: VmobaConfig, call: AttentionCall) -> Kind:
    """What kind of layer this is: its place in the cycle, which starts after the dense layers."""
    if len(config.cycle) == 1:
        return next(iter(config.cycle))
    context = call.context
    layer = None if context is None else context.layer
    if layer is None:
        raise InputError(
            f"the kinds of layers alternate ({', '.join(config.cycle)}), and the forward context "
            "does not say which layer this is",
            hint="with polyattn.forward_context(layer=i): ..., or a configuration with one kind: "
            "temporal_layer=1,spatial_layer=0,st_layer=0",
        )
    first = config.dense_layers
    if isinstance(first, float):
        # A share of the layers; core has refused a call that does not know how many there are.
        assert context is not None
        first = math.floor(first * (context.num_layers or 0))
    return config.kind_of(layer - first)


def _means(k: torch.Tensor, chunks: _Chunks) -> torch.Tensor:
    """The mean of the visible keys of each chunk, ``[B, C, Hkv, D]``, at least float32."""
    dtype = torch.float64 if k.dtype is torch.float64 else torch.float32
    means, _ = pool_blocks(k, offsets=chunks.offsets, permutation=chunks.permutation, dtype=dtype)
    return means[:, : chunks.number]


def _scores(q: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Each query times the mean of each chunk, ``[B, H, n, C]``."""
    group = q.shape[2] // means.shape[2]
    means = means.repeat_interleave(group, dim=2).permute(0, 2, 3, 1)
    return q.transpose(1, 2).to(means.dtype) @ means


def _queries_per_turn(q: torch.Tensor, chunks: _Chunks, each: int) -> int:
    """How many queries' selections fit into their share of a turn, at so many bytes per head.

    Pairs of a query and a block are counted in int32.
    """
    rows = q.shape[0] * q.shape[2]
    room = _turn_bytes(q.device) // SELECTED_SHARE // (rows * each)
    return max(1, min(room, (2**31 - 1) // (rows * (chunks.number + 1))))


def _turn_bytes(device: torch.device) -> int:
    """An eighth of a GPU's memory, used or not, so that it is the same at every call."""
    if device.type != "cuda":
        return TURN_BYTES
    return max(TURN_BYTES, torch.cuda.get_device_properties(device).total_memory // 8)


# --- the chunks of a sequence ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chunks:
    """The keys of a sequence in blocks: C chunks, the text if there is any, what is hidden."""

    rule: LayerRule
    number: int
    """C."""
    has_text: bool
    length: int
    """S: tokens of the sequence."""
    of_token: torch.Tensor
    """int64 ``[N]``: the chunk of each token of the video."""
    permutation: torch.Tensor
    """int32 ``[B | 1, 1, S]``: the key at each position of the walk, block after block."""
    offsets: torch.Tensor
    """int32 ``[B | 1, 1, blocks + 1]``: where each block begins; the last block is hidden."""

    @property
    def sizes(self) -> torch.Tensor:
        """int32 ``[B | 1, 1, C]``: visible keys of each chunk."""
        return self.offsets.diff(dim=-1)[..., : self.number]

    def in_order(self, tokens: torch.Tensor) -> torch.Tensor:
        """A tensor ``[B, S, H, D]`` in the order of the walk."""
        order = self.permutation[:, 0].long()
        if order.shape[0] == 1:
            return tokens.index_select(1, order[0])
        item = torch.arange(order.shape[0], device=order.device)
        return tokens[item[:, None], order].contiguous()

    def with_text(self, indices: torch.Tensor, counts: torch.Tensor) -> Lists:
        """The lists and the text: the block after the last chunk, so they stay ascending."""
        if not self.has_text:
            return indices, counts
        room = torch.zeros_like(indices[..., :1])
        indices = torch.cat((indices, room), dim=-1)
        return indices.scatter_(-1, counts.long()[..., None], self.number), counts + 1

    def plan_of_lists(
        self, queries: int, indices: torch.Tensor, counts: torch.Tensor
    ) -> BlockSparsePlan:
        """Each query attends to the chunks of its list, and to the text."""
        indices, counts = self.with_text(indices, counts)
        each = torch.arange(queries + 1, dtype=torch.int32, device=self.of_token.device)
        return BlockSparsePlan(
            query_length=queries,
            key_length=self.length,
            query_block=None,
            key_block=None,
            key_counts=counts.contiguous(),
            key_indices=indices.contiguous(),
            query_offsets=each[None, None],
            key_offsets=self.offsets,
            key_permutation=self.permutation,
        )

    def plan_of_all(self, queries: int) -> BlockSparsePlan:
        """Each query attends to every visible key."""
        edges = (self.offsets[..., :1], self.offsets[..., -2:])
        return BlockSparsePlan.from_indices(
            torch.zeros(1, 1, -(-queries // 128), 1, dtype=torch.int32, device=self.offsets.device),
            query_length=queries,
            key_length=self.length,
            query_block=128,
            key_offsets=torch.cat(edges, dim=-1),
            key_permutation=self.permutation,
        )

    def density_of_all(self, densities: torch.Tensor, sequence: VideoSequence) -> torch.Tensor:
        """Attended over all pairs of a query and a visible key, from the summed densities of the
        video's queries among all keys; the text's queries attend to every visible one."""
        visible = self.offsets[..., -2].double().mean().clamp_min(1)
        return (densities * self.length / visible + sequence.text) / self.length


def _chunks(sequence: VideoSequence, rule: LayerRule, device: torch.device) -> _Chunks:
    """The chunks of a sequence; those of one without hidden keys are computed once."""
    visible = sequence.visible_keys(device)
    before, after = sequence.text_before, sequence.text_after
    if visible is None:
        return _visible_chunks(sequence.grid, rule, before, after, device)
    labels, number = _labels(sequence.grid, rule, before, after, device)
    hidden = number + (1 if before + after else 0)
    return _grouped(labels.where(visible, hidden), sequence.grid, rule, before, after, number)


@lru_cache(maxsize=64)
def _visible_chunks(
    grid: Extent, rule: LayerRule, before: int, after: int, device: torch.device
) -> _Chunks:
    # Tensors born in inference mode could not be used outside of it, and these are kept.
    with torch.inference_mode(False):
        labels, number = _labels(grid, rule, before, after, device)
        return _grouped(labels[None], grid, rule, before, after, number)


def _grouped(
    labels: torch.Tensor, grid: Extent, rule: LayerRule, before: int, after: int, number: int
) -> _Chunks:
    """The chunks by the block of each token, ``[B | 1, S]``."""
    blocks = number + (2 if before + after else 1)
    groups = group_by_label(labels[:, None].int(), blocks)
    own, _ = _labels(grid, rule, 0, 0, labels.device)
    return _Chunks(
        rule=rule,
        number=number,
        has_text=before + after > 0,
        length=labels.shape[-1],
        of_token=own,
        permutation=groups.permutation,
        offsets=groups.offsets,
    )


@lru_cache(maxsize=64)
def _labels(
    grid: Extent, rule: LayerRule, before: int, after: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """The chunk of each token, int64 ``[S]``, C where it is text; and C."""
    cut, chunk = _chunk(grid, rule)
    with torch.inference_mode(False):
        tiles = tiling(cut, chunk, device=device)
        number = tiles.num_blocks
        of_video = torch.searchsorted(tiles.offsets[0, 0, 1:], tiles.inverse[0, 0], right=True)
        return torch.nn.functional.pad(of_video, (before, after), value=number), number


def _chunk(grid: Extent, rule: LayerRule) -> tuple[Extent, Extent]:
    """The grid to cut, and the size of a chunk in it, no larger than the grid.

    A temporal chunk is a number of tokens in raster order, which a line of tokens has too.
    """
    time, height, width = grid
    if rule.kind == "temporal":
        tokens = time * height * width
        size = int(min(rule.chunk[0] * height * width, tokens))
        if size < 1:
            raise InputError(
                f"temporal_chunk_size={rule.chunk[0]} frames of {height} x {width} tokens make a "
                "chunk of less than one token",
                hint=f"temporal_chunk_size={max(1, time // 10)}",
            )
        return (1, 1, tokens), (1, 1, size)
    frames, rows, columns = (time, *rule.chunk) if rule.kind == "spatial" else rule.chunk
    return grid, (min(int(frames), time), min(int(rows), height), min(int(columns), width))
