"""The backend ``torch_sdpa``: PyTorch's scaled dot-product attention, on every platform.

Importing this module imports neither torch nor a kernel; :mod:`polyattn_sdpa.attention` does.
"""

from __future__ import annotations

from polyattn.contract import Architectures, BackendSpec, Capabilities
from polyattn.environment import KNOWN_PLATFORMS
from polyattn.hooks import hookimpl
from polyattn_sdpa.config import SdpaConfig
from polyattn_sdpa.kernels import kernel_reasons

__all__ = ["SPEC", "polyattn_backends"]

SPEC = BackendSpec(
    name="torch_sdpa",
    aliases=["sdpa", "native"],
    summary="PyTorch scaled_dot_product_attention, with the fastest of torch's kernels",
    documentation="https://docs.pytorch.org/docs/stable/generated/"
    "torch.nn.functional.scaled_dot_product_attention.html",
    kind="exact",
    capabilities=Capabilities(
        platforms={platform: Architectures() for platform in KNOWN_PLATFORMS},
        dtypes=("float16", "bfloat16", "float32", "float64"),
        masks=("key_padding", "boolean", "additive"),
        causal=True,
        gqa=True,
        cross_attention=True,
        custom_scale=True,
        lse=True,
        autograd=True,
        deterministic=True,
        cuda_graphs=True,
    ),
    config=SdpaConfig,
    probe_request=kernel_reasons,
    implementation="polyattn_sdpa.attention:build",
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
