"""sliding_tile_attn against the conformance kit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyattn.testing import BackendConformance


class TestSlidingTileAttention(BackendConformance):
    """On the kit's grid of 2 x 4 x 8 tokens; the default schedule is in the first configuration."""

    backend = "sliding_tile_attn"
    configs = (
        {"window_size": [1, 1, 3], "tile_size": [1, 2, 2]},
        {"window_size": [1, 3, 1], "tile_size": [2, 3, 3], "skip_time_steps": 0},
    )
    # Several tiles, and a window that holds them all.
    dense_config: ClassVar[Mapping[str, Any]] = {
        "window_size": [2, 2, 4],
        "tile_size": [1, 2, 2],
        "skip_time_steps": 0,
    }
