"""Parameters of ``fa``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

__all__ = ["FaConfig"]


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


class FaConfig(BaseModel):
    """Which generation of FlashAttention runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[Literal[2, 3, 4] | None, BeforeValidator(_auto_is_none)] = Field(
        None,
        description="Preferred generation: 2, 3 or 4; null or auto takes the fastest for the GPU. "
        "Where it cannot serve, the next one does, and the report says why.",
    )
    strict_version: bool = Field(
        False, description="Make it an error where the generation named by version cannot serve."
    )

    @field_validator("strict_version")
    @classmethod
    def _strict_about_something(cls, value: bool, info: ValidationInfo) -> bool:
        # An invalid version is absent from the data, and has its own error.
        if value and info.data.get("version", 0) is None:
            raise ValueError("needs a version to be strict about (version=2, 3 or 4)")
        return value
