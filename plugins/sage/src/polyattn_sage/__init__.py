"""The backends ``sage_attn`` (SageAttention 1 and 2) and ``sage_attn_3`` (SageAttention 3).

Importing this module imports neither torch nor a kernel; :mod:`polyattn_sage.attention` does.
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
from polyattn.contract import Requirement as Needs
from polyattn.environment import Environment
from polyattn.hooks import hookimpl
from polyattn.probing import (
    capability_reasons,
    default_availability_reasons,
    default_platform_reasons,
)
from polyattn_sage.config import Sage3Config, SageConfig
from polyattn_sage.installation import sage3_package_reasons, sage_package_reasons
from polyattn_sage.kernels import (
    ARCHITECTURES_2,
    INSTALL_1,
    INSTALL_2,
    INSTALL_3,
    RANGE,
    RANGE_WORDS,
    installed_version,
    sage3_request_reasons,
    sage_platform_reasons,
    sage_request_reasons,
)

__all__ = ["SAGE", "SAGE_3", "polyattn_backends"]

TORCH = Needs(distribution="torch", specifier=">=2.8", hint='pip install "torch>=2.8"')


def _sage_platform(environment: Environment) -> list[Reason]:
    return default_platform_reasons(SAGE, environment) or sage_platform_reasons(environment)


def _sage_availability(environment: Environment) -> list[Reason]:
    reasons = []
    for each in default_availability_reasons(SAGE, environment):
        if str(RANGE) in each.message:
            message = each.message.replace(str(RANGE), RANGE_WORDS)
            each = each.model_copy(update={"message": message, "hint": _install(environment)})
        reasons.append(each)
    return reasons + sage_package_reasons(environment)


def _install(environment: Environment) -> str:
    """The version in range for this machine: whoever has 2 is not sent back to 1 without need."""
    version = installed_version(environment)
    if version is None or version.major < 2:
        return 'pip install "polyattn-sage[kernel]"'
    return INSTALL_2 if environment.arch in ARCHITECTURES_2 else INSTALL_1


def _sage_request(
    request: AttentionRequest, config: SageConfig, environment: Environment
) -> list[Reason]:
    """What one command mends keeps it as its hint; where another reason would stay, none has."""
    reasons = sage_request_reasons(request, config, environment)
    if capability_reasons(SAGE, request) or len({each.hint for each in reasons}) > 1:
        return [each.model_copy(update={"hint": None}) for each in reasons]
    return reasons


def _sage3_availability(environment: Environment) -> list[Reason]:
    return default_availability_reasons(SAGE_3, environment) + sage3_package_reasons(environment)


SAGE = BackendSpec(
    name="sage_attn",
    aliases=["sage"],
    summary="SageAttention 1 and 2: int8 QK with fp16 or fp8 PV",
    documentation="https://github.com/thu-ml/SageAttention",
    kind="quantized",
    capabilities=Capabilities(
        platforms={"cuda": Architectures(minimum="8.0")},
        dtypes=("float16", "bfloat16"),
        head_dims=HeadDims(minimum=32, maximum=128),
        masks=("key_padding", "boolean", "additive"),
        causal=True,
        gqa=True,
        cross_attention=True,
        custom_scale=True,
        lse=True,
        deterministic=True,
        accuracy="quantized",
    ),
    config=SageConfig,
    # The range is that of the extra `kernel`; given here because the other backend has another one.
    requirements=(
        TORCH,
        Needs(
            distribution="sageattention",
            specifier=str(RANGE),
            hint='pip install "polyattn-sage[kernel]"',
        ),
    ),
    probe_platform=_sage_platform,
    probe_availability=_sage_availability,
    probe_request=_sage_request,
    implementation="polyattn_sage.attention:build",
    footnotes={"cuda": "what is served depends on the version of sageattention"},
)

SAGE_3 = BackendSpec(
    name="sage_attn_3",
    aliases=["sage3"],
    summary="SageAttention 3: fp4 QK and PV on Blackwell",
    documentation="https://github.com/thu-ml/SageAttention/tree/main/sageattention3_blackwell",
    kind="quantized",
    capabilities=Capabilities(
        # The package builds for 10.0 too, and its kernel then refuses to run there.
        platforms={"cuda": Architectures(only=("12.0", "12.1"))},
        dtypes=("float16", "bfloat16"),
        head_dims=HeadDims(only=(64, 128)),
        causal=True,
        cross_attention=True,
        deterministic=True,
        accuracy="quantized",
    ),
    config=Sage3Config,
    requirements=(TORCH, Needs(distribution="sageattn3", specifier=">=1.0,<2", hint=INSTALL_3)),
    probe_availability=_sage3_availability,
    probe_request=sage3_request_reasons,
    implementation="polyattn_sage.attention:build_3",
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SAGE, SAGE_3]
