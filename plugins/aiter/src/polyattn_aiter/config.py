"""Parameters of ``aiter``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ROUNDINGS", "AiterConfig", "Rounding"]

Rounding = Literal["nearest_even", "nearest_away", "truncate"]

# The vendor's numbers for them, the values of its parameter ``how_v3_bf16_cvt``.
ROUNDINGS: dict[Rounding, int] = {"nearest_even": 0, "nearest_away": 1, "truncate": 2}


class AiterConfig(BaseModel):
    """How the gfx942 kernel rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bf16_rounding: Rounding | None = Field(
        None,
        description="How the assembly kernel of gfx942 rounds weights to bfloat16; it changes the "
        "result's bits. By default the vendor's choice, nearest_away in the versions known. A "
        "named one is used or is an error.",
    )
