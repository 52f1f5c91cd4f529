"""The gate projections in a model folder, which diffusers drops when it loads the model.

Only the names in a file are read to see whether there are any; they are in the header of a
safetensors file, or in the index of several.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polyattn.errors import BridgeError
from polyattn.integrations.families import GATE

__all__ = ["saved_gates"]

WEIGHTS = "diffusion_pytorch_model.safetensors"  # what diffusers loads, or its index


def saved_gates(component: Path) -> dict[str, Any]:
    """The tensors of gates in a transformer's folder, by name; mostly none.

    Raises :class:`~polyattn.errors.BridgeError` for an index or a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    gates: dict[str, Any] = {}
    try:
        for file in _files(component):
            with safe_open(file, framework="pt") as tensors:
                names = filter(_is_gate, tensors.keys())
                gates |= {name: tensors.get_tensor(name) for name in names}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise BridgeError(f"cannot look for gates in {component}: {error}") from error
    return gates


def _files(component: Path) -> list[Path]:
    """The files in which there may be gates."""
    index, single = component / f"{WEIGHTS}.index.json", component / WEIGHTS
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({component / file for name, file in places.items() if _is_gate(name)})
    return [single] if single.is_file() else []


def _is_gate(name: str) -> bool:
    return f".{GATE}." in name
