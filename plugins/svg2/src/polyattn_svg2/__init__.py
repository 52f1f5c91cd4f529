"""The backend ``sparse_video_gen_2_attn``: Sparse VideoGen 2 (SVG2), arXiv 2505.18875.

Importing this module imports neither torch nor a kernel; :mod:`polyattn_svg2.attention` does.
"""

from __future__ import annotations

from polyattn.contract import Architectures, BackendSpec, Capabilities, HeadDims
from polyattn.hooks import hookimpl
from polyattn_svg2.config import Svg2Config

__all__ = ["SPEC", "polyattn_backends"]

SPEC = BackendSpec(
    name="sparse_video_gen_2_attn",
    aliases=["svg2"],
    summary="Sparse VideoGen 2: k-means clusters of queries attend to the clusters that matter",
    documentation="https://arxiv.org/abs/2505.18875",
    kind="sparse",
    capabilities=Capabilities(
        platforms={"cpu": Architectures(), "cuda": Architectures(minimum="8.0")},
        dtypes=("bfloat16", "float16", "float32", "float64"),
        head_dims=HeadDims(minimum=16, maximum=256),
        masks=("key_padding",),
        gqa=True,
        custom_scale=True,
        lse=True,
        deterministic=True,
        needs_grid=True,
        accuracy="approximate",
    ),
    config=Svg2Config,
    implementation="polyattn_svg2.attention:build",
    footnotes={"cpu": "a reference, in plain torch"},
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
