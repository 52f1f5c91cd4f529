"""Parameters of ``vmoba_attn``, by their documented names, flat or nested under ``moba_config``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AliasPath, Field, model_validator

from polyattn.contract import ScheduledConfig

__all__ = ["Kind", "LayerRule", "Pool", "VmobaConfig"]

Kind = Literal["temporal", "spatial", "spatiotemporal"]
Pool = Literal["query_head", "block", "head_global", "overall"]
Tokens = Annotated[int, Field(ge=1)]

# What the error about a missing parameter shows; the size of the method's published examples.
EXAMPLES = {
    "temporal_chunk_size": "2",
    "temporal_topk": "3",
    "spatial_chunk_size": "[3,4]",
    "spatial_topk": "20",
    "st_chunk_size": "[4,6,4]",
    "st_topk": "15",
}


def _spelled(*names: str) -> AliasChoices:
    """Each name, and each name nested under ``moba_config``."""
    return AliasChoices(*names, *(AliasPath("moba_config", name) for name in names))


@dataclass(frozen=True)
class LayerRule:
    """What one layer of the cycle does."""

    kind: Kind
    chunk: tuple[float, ...]
    """Frames, (height, width), or (frames, height, width), in tokens of the grid."""
    topk: int
    """Chunks of each query in topk mode; 0 in threshold mode."""


class VmobaConfig(ScheduledConfig):
    """How the video is cut into chunks, layer by layer, and which chunks a query attends to."""

    temporal_chunk_size: int | float | None = Field(
        None,
        gt=0,
        validation_alias=_spelled("temporal_chunk_size"),
        description="Frames (of tokens) in a chunk of a temporal layer; 1.5 is a frame and a half.",
    )
    temporal_topk: int | None = Field(
        None,
        ge=1,
        validation_alias=_spelled("temporal_topk"),
        description="Chunks a query attends to in a temporal layer, its own among them (mode topk "
        "only).",
    )
    spatial_chunk_size: tuple[Tokens, Tokens] | None = Field(
        None,
        validation_alias=_spelled("spatial_chunk_size"),
        description="Tokens (height, width) of a chunk of a spatial layer; it runs through all "
        "frames.",
    )
    spatial_topk: int | None = Field(
        None,
        ge=1,
        validation_alias=_spelled("spatial_topk"),
        description="Chunks a query attends to in a spatial layer, its own among them (mode topk "
        "only).",
    )
    st_chunk_size: tuple[Tokens, Tokens, Tokens] | None = Field(
        None,
        validation_alias=_spelled("st_chunk_size"),
        description="Tokens (frames, height, width) of a chunk of a spatiotemporal layer.",
    )
    st_topk: int | None = Field(
        None,
        ge=1,
        validation_alias=_spelled("st_topk"),
        description="Chunks a query attends to in a spatiotemporal layer, its own among them (mode "
        "topk only).",
    )
    moba_select_mode: Literal["threshold", "topk"] = Field(
        "threshold",
        validation_alias=_spelled("moba_select_mode"),
        description="threshold: the best chunks that hold a share of the similarity; topk: a "
        "number of chunks.",
    )
    moba_threshold: float = Field(
        0.25,
        ge=0,
        le=1,
        validation_alias=_spelled("moba_threshold"),
        description="Share of the pool's summed similarity, scaled to 0 to 1, that the attended "
        "chunks hold (mode threshold). 1 keeps every chunk.",
    )
    moba_threshold_type: Pool = Field(
        "query_head",
        validation_alias=_spelled("moba_threshold_type"),
        description="Which pairs of a query and a chunk compete: those of one query and head "
        "(query_head), of one chunk (block, mode threshold only), of one head (head_global), or "
        "all of a batch item (overall).",
    )
    dense_steps: int | float = Field(
        12,
        ge=0,
        validation_alias=_spelled("dense_steps", "first_full_step"),
        description="First denoising steps with full attention: a count, or a share (0.2). The "
        "documented name is first_full_step.",
    )
    dense_layers: int | float = Field(
        0,
        ge=0,
        validation_alias=_spelled("dense_layers", "first_full_layer"),
        description="First layers with full attention, a count or a share; the cycle of kinds "
        "starts after them. The documented name is first_full_layer.",
    )
    temporal_layer: int = Field(
        1,
        ge=0,
        validation_alias=_spelled("temporal_layer"),
        description="Temporal layers in a cycle; they come first.",
    )
    spatial_layer: int = Field(
        1,
        ge=0,
        validation_alias=_spelled("spatial_layer"),
        description="Spatial layers in a cycle, after the temporal ones.",
    )
    st_layer: int = Field(
        1,
        ge=0,
        validation_alias=_spelled("st_layer"),
        description="Spatiotemporal layers in a cycle; they come last.",
    )

    @model_validator(mode="after")
    def _hangs_together(self) -> VmobaConfig:
        if not self.cycle:
            raise ValueError(
                "temporal_layer, spatial_layer and st_layer are all 0; a cycle needs a layer"
            )
        if self.moba_select_mode == "topk" and self.moba_threshold_type == "block":
            raise ValueError(
                "moba_select_mode=topk has no pool moba_threshold_type=block: a chunk is not "
                "given a number of queries; take query_head, head_global or overall"
            )
        return self

    def key_of(self, option: str) -> str:
        return {"dense_steps": "first_full_step", "dense_layers": "first_full_layer"}[option]

    @property
    def cycle(self) -> dict[Kind, int]:
        """The kinds that a cycle uses, in order, and how many layers of each."""
        layers: dict[Kind, int] = {
            "temporal": self.temporal_layer,
            "spatial": self.spatial_layer,
            "spatiotemporal": self.st_layer,
        }
        return {kind: number for kind, number in layers.items() if number}

    def kind_of(self, place: int) -> Kind:
        """The kind of the layer at a place counted from the first cycle's start, maybe negative."""
        place %= sum(self.cycle.values())
        for kind, number in self.cycle.items():
            if place < number:
                return kind
            place -= number
        raise AssertionError("a cycle has as many places as layers")

    def missing(self) -> dict[str, str]:
        """Parameters that the cycle needs and that were not given, each with an example."""
        wanted = ["chunk_size"] + (["topk"] if self.moba_select_mode == "topk" else [])
        return {
            name: EXAMPLES[name]
            for kind in ("temporal", "spatial", "st")
            for name in (f"{kind}_{what}" for what in wanted)
            if getattr(self, f"{kind}_layer") and getattr(self, name) is None
        }

    def unread(self) -> list[str]:
        """Parameters that were given and that moba_select_mode has no use for.

        No error: the published configurations hold those of both modes.
        """
        if self.moba_select_mode == "topk":
            default = type(self).model_fields["moba_threshold"].default
            return ["moba_threshold"] if self.moba_threshold != default else []
        names = ("temporal_topk", "spatial_topk", "st_topk")
        return [name for name in names if getattr(self, name) is not None]

    def rule(self, kind: Kind) -> LayerRule:
        """The parameters of one kind of layer, none of which is missing."""
        prefix = "st" if kind == "spatiotemporal" else kind
        chunk: Any = getattr(self, f"{prefix}_chunk_size")
        topk = getattr(self, f"{prefix}_topk") if self.moba_select_mode == "topk" else 0
        return LayerRule(kind, tuple(chunk) if isinstance(chunk, Sequence) else (chunk,), topk)
