"""Windows of tiles: what a window means on a tile grid, and which ones are worth a search.

A window (t, h, w) is counted in tiles. On an axis of C tiles the query's tile is the centre, moved
inward until the window fits, so that a window at an edge keeps its size. A window of even width has
no middle and counts as one wider; a window that is wider than the axis is the whole axis. Nothing
here imports torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

__all__ = [
    "Extent",
    "counted",
    "default_candidates",
    "exceeds",
    "first_visible",
    "is_full",
    "tile_density",
    "tiles_along",
    "visible_widths",
    "words",
]

Extent = tuple[int, int, int]

# Most of the tile grid that a candidate chosen without being told may cover.
CANDIDATE_DENSITY = 0.2


def tiles_along(grid: Extent, tile: Extent) -> Extent:
    """Tiles along (T, H, W): tile index = coordinate // tile size, the last tile may be short."""
    time, height, width = (-(-side // size) for side, size in zip(grid, tile, strict=True))
    return time, height, width


def visible_widths(window: Extent, tiles: Extent) -> Extent:
    """Tiles that a query sees along each axis, the same for every query."""
    time, height, width = (
        min(side // 2 * 2 + 1, most) for side, most in zip(window, tiles, strict=True)
    )
    return time, height, width


def first_visible(width: int, tiles: int) -> list[int]:
    """For each tile of an axis the first tile that it sees, of ``width`` = ``visible_widths``."""
    return [min(max(tile - width // 2, 0), tiles - width) for tile in range(tiles)]


def is_full(window: Extent, tiles: Extent) -> bool:
    """Whether every query sees every tile."""
    return visible_widths(window, tiles) == tiles


def exceeds(window: Extent, tiles: Extent) -> bool:
    """Whether the window is wider than the tile grid, as one for another resolution may be."""
    return any(side > most for side, most in zip(window, tiles, strict=True))


def tile_density(window: Extent, tiles: Extent) -> float:
    """Share of the tiles that a query sees."""
    return math.prod(visible_widths(window, tiles)) / math.prod(tiles)


def words(window: Sequence[int]) -> str:
    """``3x6x10``."""
    return "x".join(map(str, window))


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def default_candidates(tiles: Extent) -> tuple[Extent, ...]:
    """Windows of different shapes, for a search on this tile grid.

    For every choice of axes that are seen whole: the window that covers most of the tile grid
    without exceeding a fifth of it, and of those the one most alike in its proportions to the grid.
    Densities differ, since sides are odd or whole: from 0.1 to 0.19 on 3 x 6 x 10 tiles.
    Where nothing is that small, the smallest window; on a grid of one tile, none.
    """
    axes = range(3)
    found: list[Extent] = []
    for count in (2, 1, 0):
        for whole in itertools.combinations(axes, count):
            times, heights, widths = (_widths(tiles[axis], axis in whole) for axis in axes)
            shapes = [
                shape
                for shape in itertools.product(times, heights, widths)
                if tile_density(shape, tiles) <= CANDIDATE_DENSITY
            ]
            if shapes:
                found.append(max(shapes, key=lambda shape: _preference(shape, tiles)))
    if not found and math.prod(tiles) > 1:
        found = [(1, 1, 1)]
    return tuple(dict.fromkeys(found))


def _widths(tiles: int, whole: bool) -> Iterable[int]:
    """Widths of an axis that is seen whole, or only in part."""
    return (tiles,) if whole or tiles == 1 else range(1, tiles, 2)


def _preference(shape: Extent, tiles: Extent) -> tuple[float, ...]:
    shares = (side / most for side, most in zip(shape, tiles, strict=True))
    return (math.prod(shape), *sorted(shares))
