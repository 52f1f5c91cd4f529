"""The backend ``aiter``: exact attention by AMD's AI Tensor Engine for ROCm, on gfx942 and gfx950.

Importing this module imports neither torch nor AITER; :mod:`polyattn_aiter.attention` does.
"""

from __future__ import annotations

from polyattn.contract import (
    Architectures,
    BackendSpec,
    Capabilities,
    HeadDims,
    Reason,
    Requirement,
)
from polyattn.environment import Environment
from polyattn.hooks import hookimpl
from polyattn.probing import default_platform_reasons
from polyattn_aiter.config import AiterConfig
from polyattn_aiter.probes import DISTRIBUTION, INSTALL_HINT, availability, reasons_against

__all__ = ["SPEC", "polyattn_backends"]


def _platform(environment: Environment) -> list[Reason]:
    """NVIDIA GPUs are declared, so :func:`availability` refuses them; here only the rest is."""
    if environment.platform in ("cuda", "rocm"):
        return default_platform_reasons(SPEC, environment)
    found = environment.describe()
    return [Reason(code="platform", message=f"needs an AMD GPU with ROCm, found {found}")]


SPEC = BackendSpec(
    name="aiter",
    summary="AMD's AITER flash attention: assembly and Composable Kernel on MI300 and MI350",
    documentation="https://github.com/ROCm/aiter",
    kind="exact",
    capabilities=Capabilities(
        platforms={"cuda": Architectures(), "rocm": Architectures(only=("gfx942", "gfx950"))},
        dtypes=("bfloat16", "float16"),
        head_dims=HeadDims(minimum=8, maximum=256),
        masks=("key_padding",),
        causal=True,
        gqa=True,
        cross_attention=True,
        custom_scale=True,
        lse=True,
        deterministic=True,
    ),
    config=AiterConfig,
    requirements=(Requirement(distribution=DISTRIBUTION, hint=INSTALL_HINT),),
    # Below torch_sdpa: on ROCm the automatic choice is FlashAttention, then SDPA.
    priority=-10,
    probe_platform=_platform,
    probe_availability=availability,
    probe_request=reasons_against,
    implementation="polyattn_aiter.attention:build",
    footnotes={
        "cuda": "Declared, and refused with a reason on NVIDIA GPUs: AITER needs a ROCm (HIP) "
        "build of torch.",
        "rocm": "Tested against AITER's documented interface, not run on an AMD GPU yet.",
    },
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
