"""The backend ``vmoba_attn``: mixture of block attention for video (V-MoBA), arXiv 2506.23858.

Importing this module imports neither torch nor a kernel; :mod:`polyattn_vmoba.attention` does.
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
from polyattn_vmoba.config import VmobaConfig

__all__ = ["SPEC", "polyattn_backends"]


def _request_reasons(
    request: AttentionRequest, config: VmobaConfig, environment: Environment
) -> list[Reason]:
    """Chunk sizes have no defaults: each kind of layer that the cycle uses needs its own."""
    missing = config.missing()
    if not missing:
        return []
    example = ",".join(f"{name}={value}" for name, value in missing.items())
    return [
        Reason(
            code="config",
            message=f"needs {', '.join(missing)} for the cycle of {config.temporal_layer} "
            f"temporal, {config.spatial_layer} spatial and {config.st_layer} spatiotemporal "
            f"layers with moba_select_mode={config.moba_select_mode}; they have no default: "
            "choose them for your grid (a kind of 0 layers needs none)",
            hint=f"--attention-backend-config '{example}', or config='{example}'",
        )
    ]


SPEC = BackendSpec(
    name="vmoba_attn",
    aliases=["vmoba"],
    summary="V-MoBA: each token attends to the chunks of the video whose mean keys it scores best",
    documentation="https://arxiv.org/abs/2506.23858",
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
        needs_grid=True,
        accuracy="approximate",
    ),
    config=VmobaConfig,
    probe_request=_request_reasons,
    implementation="polyattn_vmoba.attention:build",
    footnotes={"cpu": "a reference, in plain torch"},
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
