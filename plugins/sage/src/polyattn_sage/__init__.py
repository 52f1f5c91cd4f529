"""The backends ``sage_attn`` (SageAttention 1 and 2) and ``sage_attn_3`` (SageAttention 3).

Importing this module imports neither torch nor a kernel; :mod:`polyattn_sage.attention` does.
"""

from __future__ import annotations

from polyattn.contract import Architectures, BackendSpec, Capabilities, HeadDims, Reason
from polyattn.contract import Requirement as Needs
from polyattn.environment import Environment
from polyattn.hooks import hookimpl
from polyattn.probing import default_availability_reasons, default_platform_reasons
from polyattn_sage.config import Sage3Config, SageConfig
from polyattn_sage.installation import sage3_package_reasons, sage_package_reasons
from polyattn_sage.kernels import (
    INSTALL_3,
    sage3_request_reasons,
    sage_platform_reasons,
    sage_request_reasons,
)

__all__ = ["SAGE", "SAGE_3", "polyattn_backends"]

TORCH = Needs(distribution="torch", specifier=">=2.8", hint='pip install "torch>=2.8"')


def _sage_platform(environment: Environment) -> list[Reason]:
    return default_platform_reasons(SAGE, environment) or sage_platform_reasons(environment)


def _sage_availability(environment: Environment) -> list[Reason]:
    return default_availability_reasons(SAGE, environment) + sage_package_reasons(environment)


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
            specifier="!=2.0.*,!=2.1.0,<3,>=1.0.6",
            hint='pip install "polyattn-sage[kernel]"',
        ),
    ),
    probe_platform=_sage_platform,
    probe_availability=_sage_availability,
    probe_request=sage_request_reasons,
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
