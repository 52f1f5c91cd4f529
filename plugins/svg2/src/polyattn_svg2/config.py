"""Parameters of ``sparse_video_gen_2_attn``, each with and without the prefix ``svg2_``.

Defaults are those with which the authors run Wan at 720p. Those of their command-line parsers
cannot run: they ask for no iteration of k-means.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from polyattn.contract import ScheduledConfig

__all__ = ["Svg2Config"]

LAYER_KEYS = ("first_layers_fp", "svg2_first_layers_fp")
STEP_KEYS = ("first_times_fp", "svg2_first_times_fp")


def _spelt(name: str) -> AliasChoices:
    return AliasChoices(name, f"svg2_{name}")


class Svg2Config(ScheduledConfig):
    """How tokens are clustered, which clusters are attended to, and what stays dense."""

    num_q_centroids: int = Field(
        300,
        ge=1,
        validation_alias=_spelt("num_q_centroids"),
        description="Clusters of queries, per head; as many as there are video tokens at most.",
    )
    num_k_centroids: int = Field(
        1000,
        ge=1,
        validation_alias=_spelt("num_k_centroids"),
        description="Clusters of keys, per head; as many as there are video tokens at most.",
    )
    top_p_kmeans: float = Field(
        0.9,
        gt=0,
        le=1,
        validation_alias=_spelt("top_p_kmeans"),
        description="Share of the estimated softmax mass that a cluster of queries attends to.",
    )
    min_kc_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        validation_alias=_spelt("min_kc_ratio"),
        description="Share of the clusters of keys that is attended to at least, the heaviest.",
    )
    kmeans_iter_init: int = Field(
        50,
        ge=1,
        validation_alias=_spelt("kmeans_iter_init"),
        description="Iterations of k-means from random tokens: a layer's first call in a run.",
    )
    kmeans_iter_step: int = Field(
        2,
        ge=1,
        validation_alias=_spelt("kmeans_iter_step"),
        description="Iterations of k-means from the layer's centroids of the step before.",
    )
    zero_step_kmeans_init: bool = Field(
        False,
        validation_alias=_spelt("zero_step_kmeans_init"),
        description="Cluster in the dense phase too. Only false: see the README.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        validation_alias=_spelt("seed"),
        description="Which random tokens k-means starts from; the same for every head and layer.",
    )
    variant: Literal["exact", "tiled"] = Field(
        "exact",
        validation_alias=_spelt("variant"),
        description="exact: the paper's blocks, which are the clusters. tiled: another method, in "
        "which tokens sorted by cluster are cut into equal tiles and the tiles are chosen.",
    )
    tile_size: Literal[64, 128] | None = Field(
        None,
        validation_alias=_spelt("tile_size"),
        description="Tokens of a tile, with variant=tiled only; 128 if not given.",
    )
    dense_steps: int | float = Field(
        0.2,
        ge=0,
        validation_alias=AliasChoices("dense_steps", *STEP_KEYS),
        description="First denoising steps that run dense: a count, or a share (0.2).",
    )
    dense_layers: int | float = Field(
        0.03,
        ge=0,
        validation_alias=AliasChoices("dense_layers", *LAYER_KEYS),
        description="First layers that run dense: a count, or a share (0.03).",
    )

    @model_validator(mode="before")
    @classmethod
    def _first_of_all(cls, data: Any) -> Any:
        """The authors' keys: up to 1 a share, even as an integer; above, a count of layers."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for key in (*LAYER_KEYS, *STEP_KEYS):
            value = data.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                continue  # absent, or for the field itself to refuse
            if value <= 1:
                data[key] = float(value)
            elif key in STEP_KEYS:
                raise ValueError(
                    f"{key}={value}: a share of the steps is at most 1.0, and a threshold on the "
                    "timestep is not known here; for a count of steps write dense_steps=N"
                )
            elif float(value).is_integer():
                data[key] = int(value)
        return data

    def key_of(self, option: str) -> str:
        if isinstance(getattr(self, option), int):  # the authors' keys read 1 as a share
            return option
        return {"dense_steps": "first_times_fp", "dense_layers": "first_layers_fp"}[option]

    @field_validator("zero_step_kmeans_init")
    @classmethod
    def _dense_phase_is_core_s(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "dense steps run on the dense backend alone, so nothing is clustered in them; the "
                "first sparse step starts with kmeans_iter_init iterations (write false)"
            )
        return value

    @model_validator(mode="after")
    def _tiles_are_of_the_tiled_variant(self) -> Svg2Config:
        if self.tile_size is not None and self.variant != "tiled":
            raise ValueError(
                f"tile_size={self.tile_size} is a parameter of variant=tiled, found "
                f"variant={self.variant}"
            )
        return self
