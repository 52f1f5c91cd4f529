"""Parameters of ``sliding_tile_attn``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, Field, field_validator, model_validator
from typing_extensions import Self

from polyattn.contract import ScheduledConfig

__all__ = ["Mode", "StaConfig"]

Mode = Literal["STA_inference", "STA_searching", "STA_tuning", "STA_tuning_cfg"]
Side = Annotated[int, Field(ge=1)]
Sides = tuple[Side, Side, Side]

# Parameters that mean something in some modes only. One that would not be read is an error.
TUNING = ("STA_tuning", "STA_tuning_cfg")
READ_IN = {
    "mask_strategy_file_path": ("STA_inference", *TUNING),
    "window_size": ("STA_inference",),
    "search_output_path": ("STA_searching", *TUNING),
    "candidates": ("STA_searching",),
    "max_density": TUNING,
}


class StaConfig(ScheduledConfig):
    """Which tiles are seen, and when the method stays dense.

    ``skip_time_steps`` and ``dense_steps`` are one parameter under two names: STA's, and that of
    every scheduled backend. A search measures every step unless it is given.
    """

    mask_strategy_file_path: str | None = Field(
        None,
        min_length=1,
        description='JSON file of windows in tiles: {"step_layer_head": [t, h, w]}. Inference '
        "needs it, or window_size. With STA_tuning: where to write it (by default into "
        "search_output_path).",
    )
    sta_mode: Mode = Field(
        "STA_inference",
        validation_alias=AliasChoices("STA_mode", "sta_mode"),
        description="STA_inference: attend. STA_searching: attend fully, and record how far each "
        "candidate window is off. STA_tuning, STA_tuning_cfg: choose windows from such records "
        "(of the prompt's guidance branch, of both), write the strategy, and attend by it.",
    )
    dense_steps: int | float = Field(
        15,
        ge=0,
        validation_alias=AliasChoices("dense_steps", "skip_time_steps"),
        description="First denoising steps with full attention: a count, or a share (0.2); in a "
        "search 0 by default. A single call outside of a run wants 0. The documented name is "
        "skip_time_steps.",
    )
    window_size: Sides | None = Field(
        None,
        description="One window [t, h, w] in tiles for all steps, layers and heads, instead of a "
        "strategy. An even width counts as one more; beyond the grid is the whole axis.",
    )
    tile_size: Sides = Field(
        (6, 8, 8),
        description="Tokens of a tile along [t, h, w]. Smaller tiles suit small grids.",
    )
    search_output_path: str | None = Field(
        None,
        min_length=1,
        description="Folder of search records: STA_searching writes there, STA_tuning reads.",
    )
    candidates: tuple[Sides, ...] | None = Field(
        None,
        min_length=1,
        description="Windows that STA_searching tries; by default up to seven of different shapes "
        "that cover at most a fifth of the tiles.",
    )
    max_density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="STA_tuning leaves out candidates that attend to a larger share of the pairs.",
    )

    @field_validator("sta_mode", mode="before")
    @classmethod
    def _mode_in_any_case(cls, value: Any) -> Any:
        """sglang reads the names of its enumeration (``STA_INFERENCE``) instead of the values."""
        known = {mode.lower(): mode for mode in get_args(Mode)}
        return known.get(value.lower(), value) if isinstance(value, str) else value

    def key_of(self, option: str) -> str:
        return "skip_time_steps" if option == "dense_steps" else option

    @model_validator(mode="after")
    def _a_search_measures_all_steps(self) -> Self:
        if self.sta_mode == "STA_searching" and "dense_steps" not in self.model_fields_set:
            object.__setattr__(self, "dense_steps", 0)
        return self

    @model_validator(mode="after")
    def _nothing_is_left_unread(self) -> Self:
        for name, modes in READ_IN.items():
            if getattr(self, name) is not None and self.sta_mode not in modes:
                raise ValueError(
                    f"{name} is a parameter of {' and '.join(modes)}, and sta_mode is "
                    f"{self.sta_mode}"
                )
        if self.sta_mode != "STA_inference" and self.search_output_path is None:
            raise ValueError(f"{self.sta_mode} needs search_output_path, the folder of records")
        if self.window_size is not None and self.mask_strategy_file_path is not None:
            raise ValueError(
                "window_size is one window for all heads, mask_strategy_file_path has one for each "
                "of them: give one of window_size and mask_strategy_file_path"
            )
        return self
