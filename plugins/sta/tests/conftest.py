"""What the tests of sliding_tile_attn share: the method in plain Python, and how to call it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import polyattn
from polyattn import testing
from polyattn.testing import default_settings
from polyattn.testing import oracle as dense_oracle
from polyattn.testing.plugin import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def dense_backend() -> Iterator[str]:
    """The backend of the dense phase, also where this plugin is installed alone."""
    with testing.dense_backend() as name:
        yield name


@pytest.fixture(autouse=True)
def _nobody_configured_anything() -> Iterator[None]:
    with default_settings():
        yield


class Method:
    """Sliding Tile Attention token by token, from its definition and from nobody's code."""

    @staticmethod
    def sees(query_tile: Sequence[int], key_tile: Sequence[int], window: Any, tiles: Any) -> bool:
        """The published rule: the centre is clamped, and keys lie within half a window of it."""
        for query, key, side, count in zip(query_tile, key_tile, window, tiles, strict=True):
            radius = side // 2
            centre = min(max(query, radius), count - 1 - radius)
            if abs(centre - key) > radius:
                return False
        return True

    @classmethod
    def mask(
        cls,
        grid: Sequence[int],
        tile: Sequence[int],
        windows: Sequence[Sequence[int]],
        text: polyattn.TextSpan | None = None,
    ) -> torch.Tensor:
        """Which keys each query of each head sees: bool [H, S, S]."""
        tiles = [-(-side // size) for side, size in zip(grid, tile, strict=True)]
        places: list[Any] = [
            (t // tile[0], h // tile[1], w // tile[2])
            for t in range(grid[0])
            for h in range(grid[1])
            for w in range(grid[2])
        ]
        if text is not None:
            valid = text.length if text.valid_length is None else text.valid_length
            words = ["text"] * valid + ["padding"] * (text.length - valid)
            places = words + places if text.start == 0 else places + words
        known: dict[Any, list[bool]] = {}
        for window in map(tuple, windows):
            for query in set(places):
                known[window, query] = [
                    key != "padding"
                    and (
                        isinstance(query, str)
                        or key == "text"
                        or cls.sees(query, key, window, tiles)
                    )
                    for key in places
                ]
        return torch.tensor([[known[tuple(each), q] for q in places] for each in windows])

    @staticmethod
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        visible: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp in float64; ``visible`` [B, S] hides keys besides."""
        mask = mask[None] if visible is None else mask[None] & visible[:, None, None]
        mask = mask.expand(q.shape[0], -1, -1, -1)
        result = dense_oracle.attention(q, k, v, mask=mask, scale=scale, return_lse=True)
        assert isinstance(result, tuple)
        return result


@pytest.fixture(scope="session")
def method() -> type[Method]:
    return Method


def tensors(
    length: int, heads: int, *, batch: int = 1, kv_heads: int | None = None, dim: int = 8,
    seed: int = 0, dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, length, count, dim, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads or heads, kv_heads or heads)
    )


@pytest.fixture(scope="session")
def draw() -> Any:
    """q, k and v: ``draw(length, heads, batch=1, ...)``."""
    return tensors


@pytest.fixture
def strategy_file(tmp_path: Path) -> Any:
    """Write ``windows(step, layer, head)`` over a box as a strategy; returns the path."""

    def write(windows: Any, steps: int, layers: int, heads: int, name: str = "mask.json") -> str:
        entries = {
            f"{step}_{layer}_{head}": list(windows(step, layer, head))
            for step in range(steps)
            for layer in range(layers)
            for head in range(heads)
        }
        (tmp_path / name).write_text(json.dumps(entries))
        return str(tmp_path / name)

    return write
