"""sparse_video_gen_2_attn against the conformance kit, in both variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyattn.testing import BackendConformance


class TestSvg2(BackendConformance):
    """Fewer clusters than the kit's 64 tokens, so that clusters have several tokens."""

    backend = "sparse_video_gen_2_attn"
    configs = (
        {"num_q_centroids": 6, "num_k_centroids": 20, "top_p_kmeans": 0.6, "kmeans_iter_init": 3},
        {"num_q_centroids": 5, "num_k_centroids": 9, "variant": "tiled", "kmeans_iter_init": 2},
        {"kmeans_iter_init": 2},
    )
    dense_config: ClassVar[Mapping[str, Any]] = {
        "num_q_centroids": 7,
        "num_k_centroids": 11,
        "top_p_kmeans": 1.0,
    }


class TestSvg2Tiled(BackendConformance):
    """Tiles of the tokens sorted by cluster; two of them on this grid."""

    backend = "sparse_video_gen_2_attn"
    grid = (2, 6, 10)
    configs = (
        {
            "num_q_centroids": 6,
            "num_k_centroids": 6,
            "variant": "tiled",
            "tile_size": 64,
            "top_p_kmeans": 0.3,
            "kmeans_iter_init": 2,
        },
    )
    dense_config: ClassVar[Mapping[str, Any]] = {
        "variant": "tiled",
        "tile_size": 64,
        "top_p_kmeans": 1.0,
    }
