"""A video cut into tiles, and which of them each tile sees, in the form block-sparse kernels take.

Keys and values are moved tile by tile into rows, so that a tile (or as many tokens of text) is a
run of rows with its tokens first; the rows are cut into blocks of one power of two, 128 for the
usual tile of 6 x 8 x 8 = 384. Blocks without a token are in nobody's list, which is what makes
ragged edges cheap. Queries have the same rows, but stay where they are, and so do results: a plan
says which row is which token. Everything that depends on no tensor is computed once for each grid,
window and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from polyattn.errors import ConfigError
from polyattn.video import VideoSequence
from polyattn_kernels import BlockSparsePlan, block_sparse_attention, gather_tokens
from polyattn_kernels.tiling import tiling
from polyattn_sta.windows import Extent, first_visible, tiles_along, visible_widths, words

__all__ = ["Tiles", "WindowPlans", "attend", "tiles_of", "window_plans"]

# Entries in the lists of one window: 512 MiB. Only tiles far too small for their grid need more.
MOST_ENTRIES = 1 << 27


@dataclass(frozen=True)
class Geometry:
    """What rows, blocks and lists depend on, beside windows."""

    grid: Extent
    tile: Extent
    text_before: int
    text_after: int
    valid_text: int
    device: torch.device


def tiles_of(sequence: VideoSequence, tile: Extent, device: torch.device) -> Tiles:
    """The tiles of a sequence; equal arguments give the same object."""
    return _tiles(
        Geometry(
            sequence.grid,
            tile,
            sequence.text_before,
            sequence.text_after,
            sequence.valid_text,
            device,
        )
    )


@lru_cache(maxsize=16)
def _tiles(geometry: Geometry) -> Tiles:
    # Tensors born in inference mode could not be used outside of it, and these are kept.
    with torch.inference_mode(False):
        return Tiles(geometry)


def window_plans(tiles: Tiles, windows: tuple[Extent, ...]) -> WindowPlans:
    """The plans of these windows; equal arguments give the same object."""
    widths = tuple(visible_widths(window, tiles.tile_grid) for window in windows)
    return _window_plans(tiles, widths)


@lru_cache(maxsize=8)
def _window_plans(tiles: Tiles, widths: tuple[Extent, ...]) -> WindowPlans:
    with torch.inference_mode(False):
        return WindowPlans(tiles, widths)


class Tiles:
    """One sequence ``[text before | grid | text after]`` in blocks of rows."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.tile_grid = tiles_along(geometry.grid, geometry.tile)
        # On an axis shorter than the tile a shorter tile gives the same tiles, in fewer rows.
        sides = zip(geometry.tile, geometry.grid, strict=True)
        tile = [min(side, extent) for side, extent in sides]
        texts = {"text_before": geometry.text_before, "text_after": geometry.text_after}
        self.tiling = tiling(geometry.grid, tile, **texts, device=geometry.device)
        self.rows, self.block = _rows_and_block(self.tiling.block)
        self.parts = self.rows // self.block
        self.length = self.tiling.num_blocks * self.rows
        self.slot_tokens = self._widened(self.tiling.slot_tokens)

        tokens = self.tiling.lengths[0, 0].cpu().long()
        self.query_sizes = self._cut(tokens)
        self.key_sizes = self._cut(self._without_padding(tokens))
        self.query_lengths = self._lengths(self.query_sizes)
        self.key_lengths = self._lengths(self.key_sizes)

    @property
    def video(self) -> slice:
        """The tokens of the grid."""
        return slice(self.tiling.text_before, self.tiling.length - self.tiling.text_after)

    def arrange(
        self, k: torch.Tensor, v: torch.Tensor, sequence: VideoSequence
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """k and v ``[B, S, H, D]`` in rows ``[B, R, H, D]``, and the key lengths of the plan.

        Hidden keys go behind the visible ones of their tile, where no length reaches.
        """
        key_tokens, key_lengths = self.slot_tokens, self.key_lengths
        if sequence.visible is not None:
            visible = sequence.visible_keys(k.device)
            assert visible is not None
            key_tokens, tokens = self.tiling.visible_first(visible)
            key_tokens = self._widened(key_tokens)
            key_lengths = self._cut(tokens).int()
        return gather_tokens(k, key_tokens), gather_tokens(v, key_tokens), key_lengths

    def _widened(self, slot_tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of the rows ``[B|1, 1, M * tile]`` with each tile's rows filled up by padding."""
        by_tile = slot_tokens.view(*slot_tokens.shape[:2], -1, self.tiling.block)
        missing = self.rows - self.tiling.block
        return torch.nn.functional.pad(by_tile, (0, missing), value=-1).flatten(-2)

    def _cut(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of tiles ``[..., M]`` as tokens of blocks ``[..., M * parts]``."""
        before = torch.arange(0, self.rows, self.block, device=tokens.device)
        return (tokens.unsqueeze(-1) - before).clamp(0, self.block).flatten(-2)

    def _without_padding(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that are keys: of the text, those that are not padding, which come first."""
        text = [*self.tiling.text_before_blocks, *self.tiling.text_after_blocks]
        left = self.geometry.valid_text - torch.arange(len(text)) * self.tiling.block
        tokens = tokens.clone()
        tokens[text] = tokens[text].minimum(left.clamp_min(0))
        return tokens

    def _lengths(self, sizes: torch.Tensor) -> torch.Tensor | None:
        """Tokens of blocks for a plan, None where all blocks are whole."""
        if bool((sizes == self.block).all()):
            return None
        return sizes.to(self.geometry.device, torch.int32)[None, None]


def _rows_and_block(tokens: int) -> tuple[int, int]:
    """Rows for a tile of so many tokens, and the size of the blocks they are cut into."""
    if tokens <= 64:
        block = max(16, 1 << (tokens - 1).bit_length())
        return block, block
    rows = -(-tokens // 64) * 64
    return rows, 128 if rows % 128 == 0 else 64


class WindowPlans:
    """A plan for each of some windows, and for heads of which each has its own."""

    def __init__(self, tiles: Tiles, widths: Sequence[Extent]) -> None:
        self.tiles = tiles
        found = [_lists(tiles, each) for each in widths]
        self.densities = tuple(_density(tiles, *each) for each in found)
        device = tiles.geometry.device
        self.plans = tuple(
            self._plan(counts.to(device)[None, None], indices.to(device)[None, None])
            for counts, indices in found
        )
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def of_heads(
        self, choices: Sequence[int], index: torch.Tensor
    ) -> tuple[BlockSparsePlan, float]:
        """The plan in which head h has window ``choices[h]``, and its density.

        ``index`` holds the same numbers on the device, so that nothing has to be sent there.
        """
        used = set(choices)
        density = sum(self.densities[choice] for choice in choices) / len(choices)
        if len(used) == 1:
            return self.plans[choices[0]], density
        if self._table is None:
            self._table = self._stacked()
        counts, indices = self._table
        capacity = max(self.plans[choice].capacity for choice in used)
        picked = indices[..., :capacity].index_select(0, index)
        return self._plan(counts.index_select(0, index)[None], picked[None]), density

    def _stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts ``[windows, Mq]`` and indices ``[windows, Mq, capacity]`` of all plans."""
        capacity = max(plan.capacity for plan in self.plans)
        lists = [
            torch.nn.functional.pad(plan.key_indices[0, 0], (0, capacity - plan.capacity))
            for plan in self.plans
        ]
        return torch.cat([plan.key_counts[0] for plan in self.plans]), torch.stack(lists)

    def _plan(self, counts: torch.Tensor, indices: torch.Tensor) -> BlockSparsePlan:
        tiles = self.tiles
        return BlockSparsePlan(
            query_length=tiles.tiling.length,
            key_length=tiles.length,
            query_block=tiles.block,
            key_block=tiles.block,
            key_counts=counts,
            key_indices=indices,
            query_lengths=tiles.query_lengths,
            query_permutation=tiles.slot_tokens,
            key_lengths=tiles.key_lengths,
        )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_lengths: torch.Tensor | None,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of queries to what :meth:`Tiles.arrange` gave, by a plan of the same tiles."""
    if key_lengths is not plan.key_lengths:
        plan = replace(plan, key_lengths=key_lengths)
    result = block_sparse_attention(q, k, v, plan, scale=scale, return_lse=return_lse)
    return result if isinstance(result, tuple) else (result, None)


def _lists(tiles: Tiles, widths: Extent) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts ``[Mq]`` and ascending key blocks ``[Mq, capacity]`` of one window, on the CPU."""
    tiling, parts = tiles.tiling, tiles.parts
    first, last, total = tiling.tile_blocks.start, tiling.tile_blocks.stop, tiling.num_blocks
    text = [*tiling.text_before_blocks, *tiling.text_after_blocks]
    most = total if text else math.prod(widths)
    if total * most * parts**2 > MOST_ENTRIES:
        raise ConfigError(
            f"tile_size {list(tiles.geometry.tile)} cuts the grid {list(tiles.geometry.grid)} into "
            f"{last - first:,} tiles, too many for a window of {words(widths)}",
            hint="a larger tile_size",
        )
    # Every tile sees a box of tiles of the same size; only where it begins differs.
    at = tiling.tile_coordinates.cpu().long()
    starts = [
        torch.tensor(first_visible(width, tiles.tile_grid[axis]))[at[:, axis]]
        for axis, width in enumerate(widths)
    ]
    box = torch.cartesian_prod(*(torch.arange(width) for width in widths))
    time, height, width = (torch.stack(starts, 1)[:, None] + box).unbind(-1)
    numbers = (time * tiles.tile_grid[1] + height) * tiles.tile_grid[2] + width + first
    # Which tiles, or stretches of text, each one sees; -1 for none.
    seen = torch.full((total, most), -1)
    seen[first:last, : numbers.shape[1]] = numbers
    if text:
        seen[first:last, numbers.shape[1] : numbers.shape[1] + len(text)] = torch.tensor(text)
        seen[text] = torch.arange(total)
        seen[first:last] = seen[first:last].sort(descending=False).values
    blocks = (seen.unsqueeze(-1) * parts + torch.arange(parts)).flatten(1)
    there = (blocks >= 0) & (tiles.key_sizes[blocks.clamp_min(0)] > 0)
    counts = there.sum(1)
    if not there.all():
        blocks = blocks.gather(1, (~there).int().argsort(dim=1, stable=True))
    blocks = blocks[:, : max(1, int(counts.max()))].clamp_min(0)
    # All blocks of a tile see the same, but for those that hold no query.
    counts = counts.repeat_interleave(parts)
    counts[tiles.query_sizes == 0] = 0
    return counts.int(), blocks.int().repeat_interleave(parts, 0)


def _density(tiles: Tiles, counts: torch.Tensor, indices: torch.Tensor) -> float:
    """Share of the pairs of tokens that the lists of one window attend to."""
    unused = torch.arange(indices.shape[1]) >= counts.unsqueeze(1)
    seen = tiles.key_sizes[indices.long()].masked_fill(unused, 0).sum(1)
    pairs = int((seen * tiles.query_sizes).sum())
    return pairs / int(tiles.query_sizes.sum() * tiles.key_sizes.sum())
