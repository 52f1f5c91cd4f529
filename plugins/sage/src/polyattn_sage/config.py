"""Parameters of ``sage_attn`` and ``sage_attn_3``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CheckFinite", "Kernel", "Sage3Config", "SageConfig"]

Kernel = Literal["auto", "triton", "fp16_cuda", "fp8_cuda", "fp8_cuda_sm90"]
CheckFinite = Literal["first_step", "always", "never"]


class FiniteConfig(BaseModel):
    """What both backends share: when the output is searched for NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check_finite: CheckFinite = Field(
        "first_step",
        description="When NaN or infinity in the output is an error: first_step (step 0 of a run, "
        "and the first call of every shape), always, or never. The check waits for the GPU.",
    )


class SageConfig(FiniteConfig):
    """Which of SageAttention's kernels runs, and how it rounds. None: the safe default."""

    kernel: Kernel = Field(
        "auto",
        description="SageAttention's kernel: auto takes the one for the GPU; a named one runs or "
        "is an error. sageattention 1.0.6 has triton only.",
    )
    qk_quant_gran: Literal["per_warp", "per_thread"] | None = Field(
        None,
        description="How many rows of q and k share an int8 scale (CUDA kernels of "
        "sageattention 2).",
    )
    pv_accum_dtype: Literal["fp16", "fp16+fp32", "fp32", "fp32+fp32", "fp32+fp16"] | None = Field(
        None,
        description="Accumulator of P V (CUDA kernels of sageattention 2): fp32, fp16+fp32 or "
        "fp16 for fp16_cuda; fp32+fp32, fp32 or fp32+fp16 for fp8_cuda; fp32+fp32 for "
        "fp8_cuda_sm90.",
    )


class Sage3Config(FiniteConfig):
    """How SageAttention 3 smooths the queries."""

    per_block_mean: bool = Field(
        True,
        description="Subtract the mean of each 128 queries (more accurate; needs B*H*(Sq/128)*Sk*4 "
        "bytes) instead of one mean per head.",
    )
