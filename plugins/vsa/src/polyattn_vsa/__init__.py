"""The backend ``video_sparse_attn``: Video Sparse Attention (VSA), arXiv 2505.13389.

Importing this module imports neither torch nor a kernel; :mod:`polyattn_vsa.attention` does.
"""

from __future__ import annotations

from polyattn.contract import (
    Architectures,
    AttentionRequest,
    BackendSpec,
    Capabilities,
    HeadDims,
    Reason,
)
from polyattn.environment import Environment
from polyattn.hooks import hookimpl
from polyattn_vsa.config import VsaConfig

__all__ = ["SPEC", "polyattn_backends"]


def _request_reasons(
    request: AttentionRequest, config: VsaConfig, environment: Environment
) -> list[Reason]:
    """The log-sum-exp is that of one softmax, and the coarse branch is a second one."""
    if request.needs_lse and config.has_coarse_branch("gate" in request.extras):
        return [
            Reason(
                code="lse",
                message="the sum of the coarse and the fine branch has no log-sum-exp, found "
                f"coarse_branch={config.coarse_branch}"
                + (" and a gate" if "gate" in request.extras else ""),
                hint="config='coarse_branch=off'",
            )
        ]
    return []


SPEC = BackendSpec(
    name="video_sparse_attn",
    aliases=["vsa"],
    summary="Video Sparse Attention: each 4x4x4 tile attends to the tiles it scores highest",
    documentation="https://arxiv.org/abs/2505.13389",
    kind="sparse",
    capabilities=Capabilities(
        platforms={"cpu": Architectures(), "cuda": Architectures(minimum="8.0")},
        dtypes=("bfloat16", "float16", "float32", "float64"),
        head_dims=HeadDims(minimum=1, maximum=256),
        masks=("key_padding",),
        gqa=True,
        custom_scale=True,
        lse=True,
        deterministic=True,
        cuda_graphs=True,
        needs_grid=True,
        extras=("gate",),
        accuracy="approximate",
    ),
    config=VsaConfig,
    probe_request=_request_reasons,
    implementation="polyattn_vsa.attention:build",
    footnotes={"cpu": "a reference, in plain torch"},
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
