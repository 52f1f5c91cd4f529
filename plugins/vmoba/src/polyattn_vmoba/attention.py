"""``vmoba_attn``: each token attends to the chunks of the video whose mean keys it scores best.

V-MoBA (arXiv 2506.23858) cuts the video into chunks, in one of three ways by turns over the layers.
A chunk is scored by the product of a query with the mean of its keys, in float32 (float64 for
float64) and unscaled; :mod:`~polyattn_vmoba.selection` picks chunks by the scores; the softmax over
all tokens of the picked chunks and of the query's own is exact. Text is in no chunk: everybody sees
it, and it sees everything. Hidden keys reach neither a mean nor the result. Batch items never meet,
and heads only in the pools that say so.

What is picked is a plan in which every query is a block of its own and the chunks are the blocks
of keys. On the CPU that plan runs as it is. A kernel that works on tiles of queries would waste all
rows of a tile but one, so on a GPU :mod:`~polyattn_vmoba.routed` runs the same plan. Queries are
served a stretch at a time, so that a call needs a bounded amount of memory, whatever is picked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

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
from polyattn_vmoba.routed import routed_attention
from polyattn_vmoba.selection import select_share, select_topk

__all__ = ["build"]

# Of all that is held for the queries that are served at one time.
TURN_BYTES = 2 * 2**30

Extent = tuple[int, int, int]
Lists = tuple[torch.Tensor, torch.Tensor]


def build(
    config: VmobaConfig, request: AttentionRequest, environment: Environment
) -> Implementation:
    """The implementation for one configuration; it keeps nothing but the parameters."""
    return VmobaAttention(config)


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
        first, provider, densities = sequence.text_before, "", []
        for begin, end, lists in self._selected(q[:, first : first + sequence.video], k, chunks):
            part = slice(first + begin, first + end)
            plan = chunks.plan_of_lists(end - begin, *lists)
            out[:, part], lse[..., part], provider = _attend(q[:, part], k, v, plan, call.scale)
            densities.append(plan.density() * (end - begin))
        call.facts = {
            "kind": rule.kind,
            "chunks": chunks.number,
            "density": chunks.density_of_all(torch.stack(densities).sum(), sequence),
            "provider": provider,
        }
        return (out, lse) if call.return_lse else out

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
        step = _queries_per_turn(q, chunks, whole)
        for begin in range(0, queries, step):
            end = min(begin + step, queries)
            if whole is None:
                yield begin, end, select(begin, end)
            else:
                yield begin, end, (whole[0][:, :, begin:end], whole[1][:, :, begin:end])


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Attention by a plan of single queries: out, lse, and who computed it."""
    provider = which_provider(plan, q, k, v).name
    if provider == "reference":
        out, lse = block_sparse_attention(q, k, v, plan, scale=scale, return_lse=True)
        return out, lse, provider
    return *routed_attention(q, k, v, plan, scale), "triton (routed by chunk)"


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


def _queries_per_turn(q: torch.Tensor, chunks: _Chunks, whole: Lists | None) -> int:
    """How many queries fit into TURN_BYTES: the scores and maps of their chunks, and the partial
    results of as many chunks as a query can get."""
    topk = chunks.rule.topk
    most = chunks.number if whole is not None or not topk else min(topk, chunks.number)
    partial = (most + 1) * (q.shape[3] * q.element_size() + 48)
    each = q.shape[0] * q.shape[2] * (partial + (chunks.number + 1) * 48)
    return max(1, TURN_BYTES // each)


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

    def plan_of_lists(
        self, queries: int, indices: torch.Tensor, counts: torch.Tensor
    ) -> BlockSparsePlan:
        """Each query attends to the chunks of its list, and to the text."""
        if self.has_text:
            # The text is the block after the last chunk, so the lists stay ascending.
            room = torch.zeros_like(indices[..., :1])
            indices = torch.cat((indices, room), dim=-1)
            indices.scatter_(-1, counts.long()[..., None], self.number)
            counts = counts + 1
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
