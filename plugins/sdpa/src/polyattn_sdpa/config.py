"""Parameters of ``torch_sdpa``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Kernel", "SdpaConfig"]

Kernel = Literal["auto", "flash", "cudnn", "efficient", "math"]


class SdpaConfig(BaseModel):
    """Which of torch's kernels runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: Kernel = Field(
        "auto",
        description="Torch's kernel: auto takes the fastest that can serve the request; a named "
        "one runs or is an error.",
    )
