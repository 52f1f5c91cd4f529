"""What the bridge knows of each model family of diffusers: one table entry per family.

An entry says which classes belong to the family, which of a model's modules are attention (with the
role and layer of each), and how the token grid and the timestep are read from the arguments of the
model's forward. Nothing else in the bridge depends on a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polyattn.errors import BridgeError

__all__ = ["FAMILIES", "GATE", "AttentionPlace", "Family", "family_of", "supported_words"]

GATE = "to_gate_compress"  # a block's gate projection, as checkpoints trained for VSA name it


@dataclass(frozen=True)
class AttentionPlace:
    """One attention module: its path in the model, the module, its role and its layer.

    ``gate`` is the layer's projection from hidden states to a gate ``[B, S, H * D]``, in models
    trained with one.
    """

    path: str
    module: Any
    role: str
    layer: int
    gate: Any = None


@dataclass(frozen=True)
class Family:
    """How to bridge one family of models.

    ``models`` are class names of diffusers. ``places`` lists the attention modules of a model; the
    layers it numbers run from 0 without gaps. ``grid`` and ``timestep`` take the model and the
    arguments of its forward by name; the timestep is a tensor, a number, or None.
    """

    name: str
    models: tuple[str, ...]
    places: Callable[[Any], list[AttentionPlace]]
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]
    timestep: Callable[[Any, Mapping[str, Any]], Any]


def _wan_places(model: Any) -> list[AttentionPlace]:
    """The blocks' self- and cross-attention; the control blocks of VACE are numbered behind them.

    A control block runs beside the main blocks and learns on its own, so it has a layer number of
    its own. The image keys of image-to-video models are part of ``attn2``.
    """
    blocks = [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
    control = getattr(model, "vace_blocks", ())
    blocks += [(f"vace_blocks.{index}", block) for index, block in enumerate(control)]
    places = []
    for layer, (path, block) in enumerate(blocks):
        gate = getattr(block, GATE, None)
        places += [
            AttentionPlace(f"{path}.attn1", block.attn1, "self", layer, gate),
            AttentionPlace(f"{path}.attn2", block.attn2, "cross", layer),
        ]
    return places


def _patched_video_grid(model: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens in (T, H, W): latents [B, C, T, H, W] divided by the patch size."""
    shape = tuple(arguments["hidden_states"].shape)
    if len(shape) != 5:
        raise BridgeError(
            f"{type(model).__name__} takes latents [B, C, T, H, W], found hidden_states of shape "
            f"{list(shape)}"
        )
    time, height, width = (
        side // patch for side, patch in zip(shape[2:], model.config.patch_size, strict=True)
    )
    return int(time), int(height), int(width)


def _timestep_argument(model: Any, arguments: Mapping[str, Any]) -> Any:
    return arguments.get("timestep")


FAMILIES = (
    Family(
        name="Wan",
        models=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        places=_wan_places,
        grid=_patched_video_grid,
        timestep=_timestep_argument,
    ),
)


def family_of(model: Any) -> Family | None:
    """The family of a model, by its class in diffusers or a subclass of it; None for any other."""
    names = {
        each.__name__
        for each in type(model).__mro__
        if each.__module__.split(".")[0] == "diffusers"
    }
    return next((family for family in FAMILIES if names.intersection(family.models)), None)


def supported_words() -> str:
    """The supported families for messages: ``Wan (WanTransformer3DModel, ...)``."""
    return "; ".join(f"{family.name} ({', '.join(family.models)})" for family in FAMILIES)
