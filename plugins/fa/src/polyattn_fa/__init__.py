"""The backend ``fa``: FlashAttention 2, 3 and 4 behind one name.

Importing this module imports neither torch nor a kernel; :mod:`polyattn_fa.attention` does.
"""

from __future__ import annotations

from polyattn.contract import Architectures, BackendSpec, Capabilities, HeadDims
from polyattn.hooks import hookimpl
from polyattn_fa.config import FaConfig
from polyattn_fa.generations import availability_reasons, request_reasons

__all__ = ["SPEC", "polyattn_backends"]

FALLBACK = "falls back to torch_sdpa where no FlashAttention is installed"

SPEC = BackendSpec(
    name="fa",
    aliases={f"fa{version}": {"version": version} for version in (2, 3, 4)},
    summary="FlashAttention 2, 3 or 4: the generation that is installed and fits the GPU",
    documentation="https://github.com/Dao-AILab/flash-attention",
    kind="exact",
    capabilities=Capabilities(
        platforms={"cuda": Architectures(minimum="8.0"), "rocm": Architectures()},
        dtypes=("bfloat16", "float16"),  # in the order to offer: fa3-fwd takes no float16
        head_dims=HeadDims(minimum=8, maximum=256, multiple_of=8),
        masks=("key_padding",),
        causal=True,
        gqa=True,
        cross_attention=True,
        custom_scale=True,
        lse=True,
        deterministic=True,
        cuda_graphs=True,
    ),
    config=FaConfig,
    priority=10,  # automatic selection prefers it to torch_sdpa, which has priority 0
    falls_back_to="torch_sdpa",
    probe_availability=availability_reasons,
    probe_request=request_reasons,
    implementation="polyattn_fa.attention:build",
    footnotes={"cuda": FALLBACK, "rocm": FALLBACK},
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
