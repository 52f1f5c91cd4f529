"""Why AITER cannot run: what is not installed, and what its kernels do not take.

Nothing here imports torch or the vendor's package. The limits follow ``aiter/ops/mha.py`` and
``csrc`` of https://github.com/ROCm/aiter, releases 0.1.3 to 0.1.9 and the source of August 2026.
"""

from __future__ import annotations

from polyattn.contract import AttentionRequest, Reason
from polyattn.environment import Environment
from polyattn_aiter.config import AiterConfig

__all__ = [
    "ADDRESSABLE_BYTES",
    "DISTRIBUTION",
    "INSTALL_HINT",
    "NAMESAKE",
    "availability",
    "reasons_against",
    "rounding_limits",
]

DISTRIBUTION = "amd-aiter"
NAMESAKE = "aiter"  # iterators for asyncio; it installs a module of the same name
INSTALL_HINT = 'pip install "polyattn-aiter[kernel]"'
TORCH_HINT = "pip install torch --index-url https://download.pytorch.org/whl/rocm6.4"

# The kernels keep byte offsets inside a batch item, and between items, in 32 bits.
ADDRESSABLE_BYTES = 1 << 32
BYTES_PER_VALUE = 2  # float16 or bfloat16


def availability(environment: Environment) -> list[Reason]:
    """Why AITER is not usable as installed; without an AMD GPU nothing that is typed helps."""
    reasons = []
    if environment.platform == "cuda":
        here = environment.describe()
        message = f"needs an AMD GPU with ROCm; this is NVIDIA: {here}"
        reasons.append(Reason(code="nvidia", message=message))
    if environment.version_of(DISTRIBUTION) is None:
        namesake = environment.version_of(NAMESAKE)
        if namesake is not None:
            reasons.append(
                Reason(
                    code="namesake",
                    message=f"found the distribution {NAMESAKE} {namesake}, which is not AMD's: it "
                    "holds iterators for asyncio, and its module has the same name",
                    hint=f"pip uninstall -y {NAMESAKE} && {INSTALL_HINT}",
                )
            )
        reasons.append(
            Reason(
                code="requirement-missing",
                message=f"needs {DISTRIBUTION}, which is not installed",
                hint=INSTALL_HINT,
            )
        )
    if environment.platform != "cuda" and environment.hip is None:
        if environment.torch is None:
            found, hint = "no torch", TORCH_HINT
        elif environment.cuda is not None:
            found, hint = f"torch {environment.torch} built for CUDA {environment.cuda}", None
        else:
            found, hint = f"torch {environment.torch} built without a GPU", None
        message = f"needs a torch built for ROCm (HIP), found {found}"
        reasons.append(Reason(code="hip", message=message, hint=hint))
    if environment.platform != "rocm":
        return [each.model_copy(update={"hint": None}) for each in reasons]
    return reasons


def reasons_against(
    request: AttentionRequest, config: AiterConfig, environment: Environment
) -> list[Reason]:
    """Why the request, with these parameters, is beyond the kernels."""
    reasons = []
    for names, length, heads in (
        ("q", request.query_length, request.heads),
        ("k and v", request.key_length, request.kv_heads),
    ):
        if length is None or heads is None or request.head_dim is None:
            continue
        # The vendor pads the head dimension to a multiple of 8.
        extent = length * heads * (request.head_dim + -request.head_dim % 8) * BYTES_PER_VALUE
        if extent >= ADDRESSABLE_BYTES:
            reasons.append(
                Reason(
                    code="extent",
                    message=f"addresses less than 4 GiB per batch item, and one of {names} has "
                    f"{extent / (1 << 30):.2f} GiB ({length} tokens, {heads} heads)",
                )
            )
    if config.bf16_rounding is not None:
        reasons += [
            Reason(
                code="bf16-rounding",
                message=f"bf16_rounding={config.bf16_rounding} is for {limit}",
            )
            for limit in rounding_limits(request, environment)
        ]
    return reasons


def rounding_limits(request: AttentionRequest, environment: Environment) -> list[str]:
    """Why the kernel whose rounding can be chosen is not the one that serves this request.

    AITER runs its assembly kernel for bfloat16, D = 128 and more than 128 queries in one launch;
    every other kernel ignores the choice without a word, and so does that of gfx950.
    """
    limits = []
    if environment.platform != "rocm" or environment.arch not in (None, "gfx942"):
        limits.append(f"gfx942, found {environment.describe()}")
    if request.dtype not in (None, "bfloat16"):
        limits.append(f"bfloat16, found {request.dtype}")
    if request.head_dim not in (None, 128):
        limits.append(f"a head dimension of 128, found {request.head_dim}")
    rows = [request.query_length, request.key_length if request.is_causal else None]
    known = [length for length in rows if length is not None]
    if known and min(known) <= 128:
        limits.append(f"more than 128 queries that see a key, found {min(known)}")
    if request.is_causal and request.mask != "none":
        limits.append("calls in one launch, and causal attention with a mask takes several")
    return limits
