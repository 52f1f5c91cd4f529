"""SageAttention's kernels: the limits of each version, and which one runs where.

Torch-free, so that a choice can be explained for a machine that is not here. Facts are those of the
vendor's sources: sageattention 1.0.6 from PyPI, https://github.com/thu-ml/SageAttention at v2.2.0
(``sageattention/core.py``) and its folder ``sageattention3_blackwell``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from polyattn.contract import AttentionRequest, Reason
from polyattn.environment import Environment
from polyattn_sage.config import Sage3Config, SageConfig

__all__ = [
    "INSTALL_1",
    "INSTALL_2",
    "INSTALL_3",
    "KERNELS",
    "RANGE",
    "RANGE_WORDS",
    "Choice",
    "choose",
    "sage3_request_reasons",
    "sage_platform_reasons",
    "sage_request_reasons",
]

INSTALL_1 = 'pip install "sageattention==1.0.6"'
REPOSITORY = "git+https://github.com/thu-ml/SageAttention"
INSTALL_2 = f"pip install --no-build-isolation {REPOSITORY}@v2.2.0"
INSTALL_3 = f'pip install --no-build-isolation "{REPOSITORY}#subdirectory=sageattention3_blackwell"'

# That of the extra `kernel`, and in words: between 1.0.6 and 2.1.1 there is no other release.
RANGE = SpecifierSet("!=2.0.*,!=2.1.0,<3,>=1.0.6")
RANGE_WORDS = "1.0.6, or 2.1.1 up to 3"

HEAD_DIMS_1 = (64, 96, 128)
ARCHITECTURES_2 = ("8.0", "8.6", "8.9", "9.0", "12.0", "12.1")
# On compute capability 12.x the fp8 kernels give noise, without an error, somewhere above this many
# keys (https://github.com/thu-ml/SageAttention/issues/388).
LONGEST_FP8_ON_12 = 160_000
OFFSETS = 1 << 31  # element offsets inside the kernels are 32-bit integers


@dataclass(frozen=True)
class Kernel:
    """One entry point of sageattention 2. The first of each option is the safe default."""

    function: str
    architectures: tuple[str, ...]
    granularities: tuple[str, ...] = ()
    accumulators: tuple[str, ...] = ()
    masks: bool = False
    built_flag: str | None = None  # name in sageattention.core that says whether it was compiled


KERNELS: Mapping[str, Kernel] = {
    "triton": Kernel("sageattn_qk_int8_pv_fp16_triton", ("8.0", "8.6", "8.9", "9.0"), masks=True),
    "fp16_cuda": Kernel(
        "sageattn_qk_int8_pv_fp16_cuda",
        ARCHITECTURES_2,
        ("per_thread", "per_warp"),
        ("fp32", "fp16+fp32", "fp16"),
        built_flag="SM80_ENABLED",
    ),
    "fp8_cuda": Kernel(
        "sageattn_qk_int8_pv_fp8_cuda",
        ("8.9", "9.0", "12.0", "12.1"),
        ("per_thread", "per_warp"),
        ("fp32+fp32", "fp32", "fp32+fp16"),
        built_flag="SM89_ENABLED",
    ),
    "fp8_cuda_sm90": Kernel(
        "sageattn_qk_int8_pv_fp8_cuda_sm90",
        ("9.0",),
        ("per_thread", "per_warp"),
        ("fp32+fp32",),
        built_flag="SM90_ENABLED",
    ),
}

# What `kernel=auto` takes on each GPU: the vendor's own dispatch, but with fp32 accumulation of P V
# where the vendor takes fp16. Compute capability 12.x accumulates fp8 products in true fp32 and has
# been run by the vendor with one scale per warp only.
DEFAULTS: Mapping[str, tuple[str, str | None, str | None]] = {
    "8.0": ("fp16_cuda", "per_thread", "fp32"),
    "8.6": ("triton", None, None),
    "8.9": ("fp8_cuda", "per_thread", "fp32+fp32"),
    "9.0": ("fp8_cuda_sm90", "per_thread", "fp32+fp32"),
    "12.0": ("fp8_cuda", "per_warp", "fp32"),
    "12.1": ("fp8_cuda", "per_warp", "fp32"),
}


@dataclass(frozen=True)
class Choice:
    """What runs: ``kernel`` of KERNELS in sageattention ``generation`` 1 or 2, and its options."""

    generation: int
    kernel: str
    function: str
    qk_quant_gran: str | None = None
    pv_accum_dtype: str | None = None
    built_flag: str | None = None


def installed_version(environment: Environment) -> Version | None:
    """The version of sageattention, None where it is absent or not a version."""
    try:
        return Version(environment.version_of("sageattention") or "")
    except InvalidVersion:
        return None


def sage_platform_reasons(environment: Environment) -> list[Reason]:
    """What the declared minimum of 8.0 does not say: sageattention 2 serves listed GPUs only."""
    version, arch = installed_version(environment), environment.arch
    if version is None or version.major < 2 or environment.platform != "cuda" or arch is None:
        return []
    if arch in ARCHITECTURES_2:
        return []
    return [
        Reason(
            code="compute-capability",
            message=f"sageattention {version} serves cuda compute capability "
            f"{', '.join(ARCHITECTURES_2)}, found {environment.describe()}, which 1.0.6 serves "
            "without masks",
            hint=INSTALL_1,
        )
    ]


def choose(
    request: AttentionRequest, config: SageConfig, environment: Environment
) -> Choice | None:
    """The kernel for a request, or None where version or GPU are unknown.

    Whether it can serve the request is another question: :func:`sage_request_reasons`.
    """
    version = installed_version(environment)
    if version is None:
        return None
    if version.major < 2:
        return Choice(1, "triton", "sageattn")
    arch = environment.arch
    if arch is None or arch not in DEFAULTS:
        return None
    usual, granularity, accumulator = DEFAULTS[arch]
    name: str = config.kernel
    if name == "auto":
        name = "triton" if request.mask != "none" else usual
    kernel = KERNELS[name]
    if name != usual:
        granularity = kernel.granularities[0] if kernel.granularities else None
        accumulator = kernel.accumulators[0] if kernel.accumulators else None
        if arch.startswith("12.") and granularity is not None:
            granularity = "per_warp"
    return Choice(
        2,
        name,
        kernel.function,
        config.qk_quant_gran or granularity,
        config.pv_accum_dtype or accumulator,
        kernel.built_flag,
    )


def sage_request_reasons(
    request: AttentionRequest, config: SageConfig, environment: Environment
) -> list[Reason]:
    """Why the installed version, with these parameters, cannot serve the request."""
    reasons = _length_reasons(request)
    version = installed_version(environment)
    if version is None:
        return reasons
    if version.major < 2:
        return reasons + _reasons_1(request, config, environment, version)
    return reasons + _reasons_2(request, config, environment, version)


def _length_reasons(request: AttentionRequest) -> list[Reason]:
    """No kernel of the family aligns causal attention of unequal lengths to the bottom right."""
    lengths = (request.query_length, request.key_length)
    if request.is_causal and None not in lengths and lengths[0] != lengths[1]:
        return [
            Reason(
                code="causal",
                message="is causal for equal lengths only, found "
                f"{lengths[0]} queries and {lengths[1]} keys",
            )
        ]
    return []


def _reasons_1(
    request: AttentionRequest, config: SageConfig, environment: Environment, version: Version
) -> list[Reason]:
    reasons: list[Reason] = []
    distributions = {**environment.distributions, "sageattention": "2.2.0"}
    newer = environment.model_copy(update={"distributions": distributions})
    serves = environment.arch in ARCHITECTURES_2 and not _reasons_2(
        request, config, newer, Version("2.2.0")
    )
    hint = INSTALL_2 if serves else None

    def refuse(code: str, message: str) -> None:
        reasons.append(Reason(code=code, message=f"sageattention {version} {message}", hint=hint))

    if config.kernel not in ("auto", "triton"):
        refuse("kernel", f"has kernel=triton only, found kernel={config.kernel}")
    for name in ("qk_quant_gran", "pv_accum_dtype"):
        value = getattr(config, name)
        if value is not None:
            refuse("parameter", f"has no {name}, found {name}={value}")
    if request.mask != "none":
        refuse("mask", f"takes no mask, found a {request.mask.replace('_', '-')} mask")
    if request.needs_lse:
        refuse("lse", "does not return the log-sum-exp")
    if request.head_dim is not None and request.head_dim not in HEAD_DIMS_1:
        allowed = ", ".join(map(str, HEAD_DIMS_1))
        refuse("head-dim", f"takes head dimensions {allowed}, found {request.head_dim}")
    return reasons


def _reasons_2(
    request: AttentionRequest, config: SageConfig, environment: Environment, version: Version
) -> list[Reason]:
    choice = choose(request, config, environment)
    if choice is None:  # the GPU is unknown, or refused by the platform probe
        return []
    kernel = KERNELS[choice.kernel]
    reasons: list[Reason] = []

    def refuse(code: str, message: str, hint: str | None = None) -> None:
        reasons.append(Reason(code=code, message=f"kernel={choice.kernel} {message}", hint=hint))

    if environment.arch not in kernel.architectures:
        refuse(
            "compute-capability",
            f"of sageattention {version} serves compute capability "
            f"{', '.join(kernel.architectures)}, found {environment.describe()}"
            + (" (masks need this kernel)" if config.kernel == "auto" else ""),
        )
    for name, allowed in (
        ("qk_quant_gran", kernel.granularities),
        ("pv_accum_dtype", kernel.accumulators),
    ):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            what = f"takes {name} {', '.join(allowed)}" if allowed else f"has no {name}"
            refuse("parameter", f"{what}, found {name}={value}")
    if choice.pv_accum_dtype == "fp32+fp16" and version < Version("2.2"):
        refuse(
            "version",
            f"takes pv_accum_dtype=fp32+fp16 from sageattention 2.2.0, found {version}",
            INSTALL_2,
        )
    keys, queries = request.key_length, request.query_length
    if request.mask != "none" and not kernel.masks:
        refuse("mask", f"takes no mask, found a {request.mask.replace('_', '-')} mask; triton does")
    elif request.mask != "none" and request.is_causal:
        refuse("mask", "takes a mask or is causal, not both")
    elif request.mask in ("boolean", "additive") and (keys or 0) * (queries or 0) >= OFFSETS:
        refuse("mask", f"reads masks of fewer than 2**31 entries, found {queries} x {keys}")
    if (
        choice.kernel == "fp8_cuda"
        and (environment.arch or "").startswith("12.")
        and (keys or 0) > LONGEST_FP8_ON_12
    ):
        refuse(
            "length",
            f"is only right up to {LONGEST_FP8_ON_12:,} keys on compute capability 12.x, found "
            f"{keys:,}",
            "config={'kernel': 'fp16_cuda'}",
        )
    return reasons


def sage3_request_reasons(
    request: AttentionRequest, config: Sage3Config, environment: Environment
) -> list[Reason]:
    """Why SageAttention 3 cannot serve the request, beyond what the capabilities say."""
    return _length_reasons(request)
