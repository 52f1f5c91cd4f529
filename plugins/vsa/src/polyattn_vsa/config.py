"""Parameters of ``video_sparse_attn``."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from polyattn.contract import ScheduledConfig

__all__ = ["VsaConfig"]


class VsaConfig(ScheduledConfig):
    """How many tiles a query leaves out, and whether the pooled branch is added."""

    sparsity: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        validation_alias=AliasChoices("sparsity", "VSA_sparsity"),
        description="Share of the video's tiles that a query does not attend to, 0.0 to 1.0. Each "
        "query keeps ceil((1 - sparsity) * tiles) of them, at least one. 0.0 leaves nothing out.",
    )
    coarse_branch: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Attention between the means of tiles, added to that of the tokens: auto adds "
        "it where a gate is passed, times the gate; on adds it without a gate too, as it is; off "
        "leaves it out.",
    )

    def has_coarse_branch(self, has_gate: bool) -> bool:
        """Whether a call with a gate, or without one, gets the coarse branch."""
        return self.coarse_branch == "on" or (self.coarse_branch == "auto" and has_gate)
