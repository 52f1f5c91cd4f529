"""Cut a video's token grid (T, H, W) into tiles, so that neighbours in space become a block.

Tile index = coordinate // tile size on each axis; a tile at the far edge may be short. Tiles come
in raster order, and the tokens inside a tile in raster order too. Text tokens before or after the
grid are cut into blocks of their own, which never mix with tiles.

Two layouts. *Packed*: the tokens of a block are adjacent and nothing else is there, which is a
permutation. *Padded*: every block takes ``block`` rows, its tokens first and zeros after them,
which is what kernels with uniform blocks want. Going in and coming back are one pass over memory
each and exact to the bit.

A tiling depends on four small values and a device, so it is computed once for each and shared;
make it before capturing a CUDA graph, since the first time copies it to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from polyattn_kernels.errors import AttentionInputError, require_int
from polyattn_kernels.permutation import gather_tokens, inverse_permutation

__all__ = ["Tiling", "tiling"]

Extent = tuple[int, int, int]


@dataclass(frozen=True, eq=False, repr=False)
class Tiling:
    """The blocks of one sequence ``[text before | grid in raster order | text after]``.

    Made by :meth:`of`. Index tensors are int32 and shared by all batch items and heads.
    """

    grid: Extent
    """Tokens along (T, H, W)."""
    tile: Extent
    """Tokens of a whole tile along (T, H, W)."""
    text_before: int
    """Tokens before the grid."""
    text_after: int
    """Tokens after the grid."""
    permutation: torch.Tensor
    """``[1, 1, S]``: the token at each position of the packed layout."""
    inverse: torch.Tensor
    """``[1, 1, S]``: the position of each token in the packed layout."""
    offsets: torch.Tensor
    """``[1, 1, M + 1]``: where each block begins in the packed layout; the last entry is S."""
    lengths: torch.Tensor
    """``[1, 1, M]``: tokens in each block, at least 1."""
    slot_tokens: torch.Tensor
    """``[1, 1, M * block]``: the token in each row of the padded layout, -1 for padding."""
    slots: torch.Tensor
    """``[1, 1, S]``: the row of each token in the padded layout."""
    tile_coordinates: torch.Tensor
    """``[tiles, 3]``: the place of each tile in the tile grid, in tiles along (T, H, W)."""

    @staticmethod
    def of(
        grid: Sequence[int],
        tile: Sequence[int],
        *,
        text_before: int = 0,
        text_after: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tiling:
        """Tiles of ``tile`` = (t, h, w) tokens over a ``grid`` = (T, H, W) of tokens.

        A tile may be larger than the grid, which then is one short tile. Text spans are counted in
        tokens and cut into blocks of t * h * w, the last one short. Equal arguments give the same
        object.

        Raises:
            AttentionInputError: for sizes below 1 or negative text.
        """
        return tiling(grid, tile, text_before=text_before, text_after=text_after, device=device)

    def __repr__(self) -> str:
        text = f", text {self.text_before} + {self.text_after}"
        return (
            f"Tiling({self.grid} in tiles of {self.tile}"
            f"{text if self.text_before or self.text_after else ''}: {self.length} tokens in "
            f"{self.num_blocks} blocks of {self.block}; {self.permutation.device})"
        )

    @property
    def block(self) -> int:
        """Rows of a block in the padded layout: the tokens of a whole tile."""
        return self.tile[0] * self.tile[1] * self.tile[2]

    @property
    def length(self) -> int:
        """S: tokens of the sequence, text included."""
        return self.permutation.shape[-1]

    @property
    def padded_length(self) -> int:
        """Rows of the padded layout."""
        return self.slot_tokens.shape[-1]

    @property
    def num_blocks(self) -> int:
        """M: blocks of text and of the grid."""
        return self.lengths.shape[-1]

    @property
    def tile_grid(self) -> Extent:
        """Tiles along (T, H, W)."""
        time, height, width = (
            -(-extent // size) for extent, size in zip(self.grid, self.tile, strict=True)
        )
        return time, height, width

    @property
    def text_before_blocks(self) -> range:
        """Numbers of the blocks that hold the text before the grid."""
        return range(-(-self.text_before // self.block))

    @property
    def tile_blocks(self) -> range:
        """Numbers of the blocks that are tiles; entry i belongs to ``tile_coordinates[i]``."""
        first = len(self.text_before_blocks)
        return range(first, first + self.tile_coordinates.shape[0])

    @property
    def text_after_blocks(self) -> range:
        """Numbers of the blocks that hold the text after the grid."""
        return range(self.tile_blocks.stop, self.num_blocks)

    def pack(self, x: torch.Tensor, *, provider: str = "auto") -> torch.Tensor:
        """x ``[B, S, H, D]`` in the packed layout, same shape."""
        self._check(x, self.length, "tokens")
        return gather_tokens(x, self.permutation, provider=provider)

    def unpack(self, x: torch.Tensor, *, provider: str = "auto") -> torch.Tensor:
        """Packed x ``[B, S, H, D]`` back in token order."""
        self._check(x, self.length, "tokens")
        return gather_tokens(x, self.inverse, provider=provider)

    def pad(self, x: torch.Tensor, *, provider: str = "auto") -> torch.Tensor:
        """x ``[B, S, H, D]`` in the padded layout ``[B, M * block, H, D]``, padding zero."""
        self._check(x, self.length, "tokens")
        return gather_tokens(x, self.slot_tokens, provider=provider)

    def unpad(self, x: torch.Tensor, *, provider: str = "auto") -> torch.Tensor:
        """Padded x ``[B, M * block, H, D]`` back in token order ``[B, S, H, D]``.

        What the padding holds does not matter.
        """
        self._check(x, self.padded_length, "padded rows")
        return gather_tokens(x, self.slots, provider=provider)

    def visible_first(self, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The padded layout of keys some of which are hidden, per batch item.

        Args:
            visible: bool ``[B | 1, S]``, by token: keys that may be attended.

        Returns:
            slot_tokens: int32 ``[B | 1, 1, M * block]``: the token in each row, -1 for padding;
                within a block, visible tokens first. Move keys and values by it, with
                :func:`~polyattn_kernels.permutation.gather_tokens`.
            lengths: int32 ``[B | 1, 1, M]``: visible tokens of each block, for a plan's
                ``key_lengths``.
        """
        if visible.dim() != 2 or visible.shape[1] != self.length or visible.dtype is not torch.bool:
            raise AttentionInputError(
                f"visible must be bool [B, S] with S={self.length}, found {visible.dtype} "
                f"{list(visible.shape)}"
            )
        batch = visible.shape[0]
        slots = self.slot_tokens.expand(batch, 1, -1)
        shown = visible[:, None].gather(-1, slots.long().clamp_min(0)) & (slots >= 0)
        shown = shown.view(batch, 1, self.num_blocks, self.block)
        # Stable, so that visible tokens keep their order, hidden ones too, and padding stays last.
        order = torch.argsort((~shown).int(), dim=-1, stable=True)
        slots = slots.reshape(shown.shape).gather(-1, order).flatten(-2)
        return slots, shown.sum(-1, dtype=torch.int32)

    def _check(self, x: torch.Tensor, length: int, what: str) -> None:
        if x.dim() != 4 or x.shape[1] != length:
            raise AttentionInputError(
                f"this tiling of a {self.grid} grid takes [B, S, H, D] with S={length} {what}, "
                f"found shape {list(x.shape)}"
            )


def tiling(
    grid: Sequence[int],
    tile: Sequence[int],
    *,
    text_before: int = 0,
    text_after: int = 0,
    device: torch.device | str = "cpu",
) -> Tiling:
    """See :meth:`Tiling.of`."""
    require_int("text_before", text_before, 0)
    require_int("text_after", text_after, 0)
    device = torch.device(device)
    if device == torch.device("cuda"):  # no index: the current one, which may change
        device = torch.device("cuda", torch.cuda.current_device())
    return _tiling(_extent(grid, "grid"), _extent(tile, "tile"), text_before, text_after, device)


# Tensors born in inference mode could not be used outside of it, and these are kept.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _tiling(
    grid: Extent, tile: Extent, text_before: int, text_after: int, device: torch.device
) -> Tiling:
    block = tile[0] * tile[1] * tile[2]
    tile_grid = [-(-extent // size) for extent, size in zip(grid, tile, strict=True)]
    axes = [torch.arange(e) // size for e, size in zip(grid, tile, strict=True)]
    in_time, in_height, in_width = torch.meshgrid(*axes, indexing="ij")
    in_grid = ((in_time * tile_grid[1] + in_height) * tile_grid[2] + in_width).flatten()
    blocks_before = -(-text_before // block)
    tiles = tile_grid[0] * tile_grid[1] * tile_grid[2]
    # The block of each token: text, tiles, text. Within a block, token order is raster order.
    of_token = torch.cat(
        [
            torch.arange(text_before) // block,
            in_grid + blocks_before,
            torch.arange(text_after) // block + blocks_before + tiles,
        ]
    )
    blocks = blocks_before + tiles + -(-text_after // block)
    permutation = of_token.argsort(stable=True)
    lengths = torch.bincount(of_token, minlength=blocks)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    of_position = of_token[permutation]
    rank = torch.arange(len(of_token)) - offsets[of_position]
    slot_of_position = of_position * block + rank
    slot_tokens = torch.full((blocks * block,), -1).scatter_(0, slot_of_position, permutation)
    inverse = inverse_permutation(permutation)
    coordinates = torch.cartesian_prod(*(torch.arange(count) for count in tile_grid))

    def shared(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, torch.int32)[None, None]

    return Tiling(
        grid=grid,
        tile=tile,
        text_before=text_before,
        text_after=text_after,
        permutation=shared(permutation),
        inverse=shared(inverse),
        offsets=shared(offsets),
        lengths=shared(lengths),
        slot_tokens=shared(slot_tokens),
        slots=shared(slot_of_position[inverse.long()]),
        tile_coordinates=coordinates.view(-1, 3).to(device, torch.int32),
    )


def _extent(values: Sequence[int], name: str) -> Extent:
    extent = tuple(values)
    if len(extent) != 3 or not all(isinstance(size, int) and size >= 1 for size in extent):
        raise AttentionInputError(
            f"{name} must be three sizes (T, H, W) in tokens, each at least 1, found {values!r}"
        )
    return extent
