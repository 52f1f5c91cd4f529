"""``video_sparse_attn``: each tile of the video attends to the tiles it scores highest.

Video Sparse Attention (Zhang et al., arXiv 2505.13389) cuts the video into tiles of 4 x 4 x 4
tokens, short ones where the grid ends. A tile scores another by the means of its own queries and of
the other's keys, and its tokens attend to the tokens of the highest ones: the *fine* branch. The
softmax of the scores over all tiles, applied to the means of the values, is the *coarse* branch. It
gives all tokens of a tile one vector, which a trained gate weighs: ``out = coarse * gate + fine``.

Promised beyond the contract: scores are float32 (float64 for float64) whatever the dtype of q. A
token that is hidden reaches no mean, be it as key, value or query. Text is in no tile and has no
coarse branch: everybody sees it, and it sees everything. Heads and batch items do not meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn.errors import InputError
from polyattn.video import VideoSequence, video_sequence
from polyattn_kernels import (
    BlockSelection,
    BlockSparsePlan,
    Tiling,
    block_sparse_attention,
    gather_tokens,
    pool_blocks,
    select_top_k,
    which_provider,
)
from polyattn_kernels.pooling import gather_and_pool
from polyattn_kernels.tiling import tiling
from polyattn_vsa.config import VsaConfig

__all__ = ["build"]

TILE = (4, 4, 4)
BLOCK = math.prod(TILE)


def build(config: VsaConfig, request: AttentionRequest, environment: Environment) -> Implementation:
    """The implementation for one request; it keeps nothing but the parameters.

    Raises :class:`~polyattn.errors.InputError` for a gate that does not fit q: here, and not when
    it is used, so that it is told before the steps that are dense.
    """
    for name, (shape, dtype) in zip(request.extras, request.extra_forms, strict=False):
        if name == "gate":
            _check_gate(shape, dtype, request)
    return VsaAttention(config)


def _check_gate(shape: tuple[int, ...], dtype: str, request: AttentionRequest) -> None:
    wanted = (request.batch, request.query_length, request.heads, request.head_dim)
    if shape != wanted:
        raise InputError(
            "the gate has a number for each number of the output, [B, S, H, D] = "
            f"{list(wanted)}; found {list(shape)}",
            hint="gate = to_gate_compress(hidden_states).unflatten(-1, (H, D))",
        )
    if dtype != request.dtype:
        raise InputError(
            f"the gate shares q's dtype {request.dtype}, found {dtype}", hint="gate.to(q.dtype)"
        )


class VsaAttention:
    """See :class:`polyattn.contract.Implementation`; ``extras["gate"]`` is ``[B, S, H, D]``.

    Raises :class:`~polyattn.errors.InputError` for what :func:`~polyattn.video.video_sequence`
    refuses.
    """

    def __init__(self, config: VsaConfig) -> None:
        self.config = config

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        video = video_sequence(q, k, call)
        gate = call.extras.get("gate")
        has_coarse = self.config.has_coarse_branch(gate is not None)
        layout, heads = _layout(video, q.device), q.shape[2]
        tiles = len(layout.tiling.tile_blocks)
        kept = min(max(math.ceil((1 - self.config.sparsity) * tiles), 1), tiles)

        coarse = selection = None
        scored = has_coarse or kept < tiles
        means_q = _tile_means(q, layout) if scored else None
        padded_k, means_k = _arrange(k, layout, pooled=scored)
        padded_v, means_v = _arrange(v, layout, pooled=has_coarse)
        if means_q is not None and means_k is not None:
            scores = (means_q * call.scale) @ _per_query_head(means_k, heads).transpose(-1, -2)
            if means_v is not None:
                coarse = _coarse_branch(scores, _per_query_head(means_v, heads), layout, v.dtype)
            if kept < tiles:
                selection = _select(scores, kept, layout)
        plan = layout.full_plan() if selection is None else _sparse_plan(selection, layout)
        out, lse = _attend(q, padded_k, padded_v, plan, call)
        if selection is not None and layout.text is not None:
            _attend_text(out, lse, q, padded_k, padded_v, layout, call)
        if coarse is not None:
            _add_coarse(out, coarse, gate, layout)
        call.facts = {
            "density": 1.0 if selection is None else plan.density() + video.text / video.length,
            "kept": f"{kept} of {tiles} tiles",
            "coarse_branch": _coarse_words(self.config, gate is not None),
            "provider": which_provider(plan, q, padded_k, padded_v).name,
        }
        return out if lse is None else (out, lse)


# --- where tokens lie -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layout:
    """The padded layout of one sequence: every tile and every 64 tokens of text take 64 rows.

    A block's visible tokens come first, then its hidden ones, then rows that are no tokens. Keys
    and values are moved into the layout; queries and results stay where they are, and a plan says
    which row is which token.
    """

    tiling: Tiling
    slot_tokens: torch.Tensor
    """int32 ``[B|1, 1, rows]``: the token in each row, -1 for none."""
    visible: torch.Tensor | None
    """int32 ``[B|1, 1, blocks]``: visible tokens of each block; None: every row of every block."""
    may_be_empty: bool
    """Whether a tile may be without any visible token."""

    @property
    def rows(self) -> int:
        return self.tiling.padded_length

    @property
    def text(self) -> slice | None:
        """The tokens of the text, which lies on one side of the video; None without text."""
        before, after = self.tiling.text_before, self.tiling.text_after
        if not before and not after:
            return None
        return slice(0, before) if before else slice(self.tiling.length - after, None)

    @property
    def visible_of_tiles(self) -> torch.Tensor | None:
        """:attr:`visible` of the video's tiles only, ``[B|1, 1, tiles]``."""
        blocks = self.tiling.tile_blocks
        return None if self.visible is None else self.visible[..., blocks.start : blocks.stop]

    @property
    def lengths(self) -> torch.Tensor | None:
        """Tokens of each block, hidden ones too; None: every row of every block."""
        return None if self.rows == self.tiling.length else self.tiling.lengths

    def geometry(self) -> dict[str, Any]:
        """How a plan of all tokens is cut into blocks."""
        return {
            "query_length": self.tiling.length,
            "key_length": self.rows,
            "query_block": BLOCK,
            "key_block": BLOCK,
            "query_lengths": self.lengths,
            "key_lengths": self.visible,
            "query_permutation": self.slot_tokens,
        }

    def full_plan(self) -> BlockSparsePlan:
        """Everybody sees everything that is visible."""
        return BlockSparsePlan.full(device=self.slot_tokens.device, **self.geometry())

    def text_plan(self) -> BlockSparsePlan:
        """The queries of the text see everything that is visible."""
        geometry = {
            **self.geometry(),
            "query_length": self.tiling.text_before + self.tiling.text_after,
            "query_lengths": None,
            "query_permutation": None,
        }
        return BlockSparsePlan.full(device=self.slot_tokens.device, **geometry)


def _layout(video: VideoSequence, device: torch.device) -> Layout:
    """The layout of a call; without a mask it is that of all calls with the same grid and text."""
    if video.visible is None:
        return _static_layout(
            video.grid, video.text_before, video.text_after, video.valid_text, device
        )
    built = tiling(
        video.grid, TILE, text_before=video.text_before, text_after=video.text_after, device=device
    )
    shown = video.visible_keys(device)
    assert shown is not None
    slot_tokens, visible = built.visible_first(shown)
    return Layout(built, slot_tokens, visible, may_be_empty=True)


@lru_cache(maxsize=64)
def _static_layout(
    grid: tuple[int, int, int],
    text_before: int,
    text_after: int,
    valid_text: int,
    device: torch.device,
) -> Layout:
    built = tiling(grid, TILE, text_before=text_before, text_after=text_after, device=device)
    visible: torch.Tensor | None = built.lengths
    if valid_text < text_before + text_after:  # padding follows the text: it is at the end of rows
        blocks = built.text_before_blocks or built.text_after_blocks
        starts = torch.arange(len(blocks), dtype=torch.int32, device=device) * BLOCK
        visible = built.lengths.clone()
        visible[..., blocks.start : blocks.stop] = (valid_text - starts).clamp(0, BLOCK)
    elif built.padded_length == built.length:
        visible = None
    return Layout(built, built.slot_tokens, visible, may_be_empty=False)


# --- the two branches -----------------------------------------------------------------------------


def _arrange(
    x: torch.Tensor, layout: Layout, *, pooled: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x in padded rows, and the means of :func:`_tile_means`, if asked, in the same pass."""
    if not pooled:
        return gather_tokens(x, layout.slot_tokens), None
    rows, means = gather_and_pool(
        x, layout.slot_tokens, block=BLOCK, lengths=layout.visible, dtype=_precise(x)
    )
    return rows, _of_tiles(means, layout)


def _tile_means(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The mean of each tile's visible tokens, ``[B, H, tiles, D]``, 0 for a tile without any."""
    means, _ = pool_blocks(
        x,
        block=BLOCK,
        lengths=layout.visible,
        permutation=layout.slot_tokens,
        dtype=_precise(x),
    )
    return _of_tiles(means, layout)


def _of_tiles(means: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Of all blocks' means ``[B, blocks, H, D]`` those of the tiles, ``[B, H, tiles, D]``."""
    blocks = layout.tiling.tile_blocks
    return means[:, blocks.start : blocks.stop].transpose(1, 2)


def _precise(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _per_query_head(means: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, Hkv, tiles, D]`` as ``[B, H, tiles, D]``: consecutive query heads share a key head."""
    shared = heads // means.shape[1]
    return means if shared == 1 else means.repeat_interleave(shared, dim=1)


def _coarse_branch(
    scores: torch.Tensor, means_v: torch.Tensor, layout: Layout, dtype: torch.dtype
) -> torch.Tensor:
    """One vector for each tile, ``[B, tiles, H, D]`` in v's dtype.

    Every tile weighs the same, however many tokens it has.
    """
    if layout.may_be_empty:
        assert layout.visible_of_tiles is not None
        empty = (layout.visible_of_tiles == 0).unsqueeze(2)
        # Not -inf: where all tiles are empty, their values, which are zeros, are averaged.
        scores = scores.masked_fill(empty, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ means_v).transpose(1, 2).to(dtype)


def _select(scores: torch.Tensor, kept: int, layout: Layout) -> BlockSelection:
    """The ``kept`` tiles of highest score for each tile; ``scores`` is overwritten."""
    # A NaN that may be seen is selected, and shows in the result as it does in dense attention.
    scores = scores.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    sizes = layout.visible_of_tiles if layout.may_be_empty else None
    return select_top_k(scores, kept, key_sizes=sizes)


def _sparse_plan(selection: BlockSelection, layout: Layout) -> BlockSparsePlan:
    """Tiles see their selection and all text; text sees nothing here, see :func:`_attend_text`."""
    lists, counts = selection.key_indices, selection.key_counts
    tiles = layout.tiling.tile_blocks
    before, after = len(layout.tiling.text_before_blocks), len(layout.tiling.text_after_blocks)
    if before:
        text = torch.arange(before, dtype=torch.int32, device=lists.device)
        lists = torch.cat([text.expand(*counts.shape, before), lists + before], -1)
    if after:
        entries = counts.unsqueeze(-1) + torch.arange(after, device=lists.device)
        text = torch.arange(tiles.stop, tiles.stop + after, dtype=torch.int32, device=lists.device)
        lists = F.pad(lists, (0, after)).scatter_(-1, entries, text.expand_as(entries))
    if before or after:
        lists = F.pad(lists, (0, 0, before, after))
        counts = F.pad(counts + before + after, (before, after))
    return BlockSparsePlan(key_counts=counts, key_indices=lists, **layout.geometry())


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    result = block_sparse_attention(q, k, v, plan, scale=call.scale, return_lse=call.return_lse)
    return result if isinstance(result, tuple) else (result, None)


def _attend_text(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    call: AttentionCall,
) -> None:
    """Write the dense attention of text queries into their places in ``out`` and ``lse``.

    On its own, because in one plan with the tiles every list would have room for all blocks.
    """
    text = layout.text
    assert text is not None
    out[:, text], text_lse = _attend(q[:, text], k, v, layout.text_plan(), call)
    if lse is not None and text_lse is not None:
        lse[..., text] = text_lse


def _add_coarse(
    out: torch.Tensor, coarse: torch.Tensor, gate: torch.Tensor | None, layout: Layout
) -> None:
    """Add each tile's coarse vector, times the gate, to its tokens in ``out`` [B, S, H, D]."""
    built = layout.tiling
    video = slice(built.text_before, built.length - built.text_after)
    tile_of_token = built.slots[..., video] // BLOCK - built.tile_blocks.start
    spread = gather_tokens(coarse, tile_of_token)
    if gate is None:
        out[:, video].add_(spread)
    else:
        out[:, video].addcmul_(spread, gate[:, video])


def _coarse_words(config: VsaConfig, has_gate: bool) -> str:
    """What became of the coarse branch, for the report."""
    if config.has_coarse_branch(has_gate):
        return "on (times the gate)" if has_gate else "on (without a gate)"
    if has_gate:
        return "off (the gate is not used)"
    return "off (no gate)" if config.coarse_branch == "auto" else "off"
