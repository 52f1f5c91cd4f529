"""Torch's attention kernels: the limits of each, and which one is fastest where.

The limits are those of the fused operators in ATen (``_scaled_dot_product_flash_attention``,
``..._cudnn_attention``, ``..._efficient_attention``, ``..._flash_attention_for_cpu``). Torch-free,
so that a choice can be explained for a machine that is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyattn.contract import AttentionRequest, Reason
from polyattn.environment import Environment
from polyattn_sdpa.config import SdpaConfig

__all__ = ["KERNELS", "Choice", "choose", "kernel_reasons", "limits_of"]

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Limits:
    """What one fused kernel takes. ``minimum_arch`` is a CUDA compute capability."""

    platforms: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dim_multiple: Mapping[str, int]
    maximum_head_dim: int
    masks: bool
    minimum_arch: tuple[int, int] = (0, 0)
    backward: bool = True


KERNELS: Mapping[str, Limits] = {
    "cudnn": Limits(
        platforms=("cuda",),
        dtypes=HALF,
        head_dim_multiple={"float16": 8, "bfloat16": 8},
        maximum_head_dim=128,
        masks=True,
        minimum_arch=(8, 0),
    ),
    "flash": Limits(
        platforms=("cuda", "rocm", "cpu"),
        dtypes=(*HALF, "float32", "float64"),
        head_dim_multiple={"float16": 8, "bfloat16": 8},
        maximum_head_dim=256,
        masks=False,
        minimum_arch=(8, 0),
    ),
    "efficient": Limits(
        platforms=("cuda", "rocm"),
        dtypes=(*HALF, "float32"),
        head_dim_multiple={"float16": 8, "bfloat16": 8, "float32": 4},
        maximum_head_dim=1024,
        masks=True,
        minimum_arch=(5, 0),
    ),
    "math": Limits(
        platforms=("cuda", "rocm", "mps", "npu", "xpu", "cpu"),
        dtypes=(*HALF, "float32", "float64"),
        head_dim_multiple={},
        maximum_head_dim=1 << 20,
        masks=True,
    ),
}


def limits_of(kernel: str, request: AttentionRequest, environment: Environment) -> list[Reason]:
    """Why this one of torch's kernels cannot serve the request (empty = it can)."""
    limits = KERNELS[kernel]
    reasons: list[Reason] = []

    def refuse(code: str, message: str) -> None:
        reasons.append(Reason(code=code, message=f"kernel={kernel} {message}"))

    platform = environment.platform
    if platform not in limits.platforms:
        refuse("platform", f"needs {' or '.join(limits.platforms)}, found {environment.describe()}")
        return reasons
    if platform == "cuda" and environment.arch is not None:
        arch = tuple(int(part) for part in environment.arch.split(".") if part.isdigit())
        if arch < limits.minimum_arch:
            need = ".".join(map(str, limits.minimum_arch))
            refuse(
                "compute-capability", f"needs compute capability {need}, found {environment.arch}"
            )
    on_cpu = platform == "cpu"  # torch's CPU flash kernel has none of the GPU kernels' limits
    if on_cpu:
        return reasons
    dtype = request.dtype
    allowed = HALF if kernel == "flash" else limits.dtypes
    if dtype is not None and dtype not in allowed:
        refuse("dtype", f"takes {' or '.join(allowed)}, found {dtype}")
    if request.head_dim is not None:
        step = limits.head_dim_multiple.get(dtype, 1) if dtype is not None else 1
        if request.head_dim > limits.maximum_head_dim or request.head_dim % step:
            refuse(
                "head-dim",
                f"takes head dimensions up to {limits.maximum_head_dim} in steps of "
                f"{step}, found {request.head_dim}",
            )
    if not limits.masks:
        if request.mask != "none":
            refuse("mask", f"takes no mask, found a {request.mask.replace('_', '-')} mask")
        lengths = (request.query_length, request.key_length)
        if request.is_causal and None not in lengths and lengths[0] != lengths[1]:
            refuse(
                "causal",
                "is causal for equal lengths only; bottom-right alignment of "
                f"{request.query_length} queries to {request.key_length} keys needs a mask",
            )
    return reasons


def kernel_reasons(
    request: AttentionRequest, config: SdpaConfig, environment: Environment
) -> list[Reason]:
    """Why the kernel named in the configuration cannot serve the request."""
    return [] if config.kernel == "auto" else limits_of(config.kernel, request, environment)


@dataclass(frozen=True)
class Choice:
    """A kernel (``default``: whatever torch picks) and the reason for it."""

    kernel: str
    why: str


def choose(request: AttentionRequest, config: SdpaConfig, environment: Environment) -> Choice:
    """The kernel for a request: the configured one, or the one expected to be fastest.

    On compute capability 9.0 cuDNN's kernel is the fastest of torch's from 2,304 queries on, 1.3
    to 1.8 times as fast as flash for D = 40 to 128 (bench/results/sdpa_kernels.md). Torch 2.11
    takes it there by itself, older releases take flash. Everywhere else torch's own choice stands:
    no measurement has shown a better one.
    """
    if config.kernel != "auto":
        return Choice(config.kernel, "configured")
    measured = (
        environment.platform == "cuda"
        and environment.arch == "9.0"
        and request.head_dim is not None
        and 40 <= request.head_dim <= 128
        and request.mask == "none"
        and (request.query_length or 0) >= 2304
    )
    if measured and not limits_of("cudnn", request, environment):
        return Choice("cudnn", "cuDNN on compute capability 9.0 from 2,304 queries")
    return Choice("default", "torch's own choice")
