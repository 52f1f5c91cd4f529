"""The embedded demo model of polyattn: where it lies, and how it is meant to be run.

Importing this module needs nothing but the standard library. The renderer (`polyattn_demo.clips`)
and the detector (`polyattn_demo.detector`) import torch and are loaded only when asked for.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["DEFAULTS_FILE", "generation_defaults", "model_path"]

DEFAULTS_FILE = "polyattn_defaults.json"


def model_path() -> Path:
    """Folder of the demo model, in the layout `diffusers.WanPipeline.from_pretrained` loads.

    >>> pipe = WanPipeline.from_pretrained(polyattn_demo.model_path())  # doctest: +SKIP
    """
    folder = Path(str(resources.files(__name__) / "model"))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the demo model is missing from this installation: {folder}")
    return folder


def generation_defaults() -> dict[str, Any]:
    """Size, steps, guidance and the other settings the model was measured with.

    The same file any diffusers folder may carry; the keys are those of the pipeline's call, plus
    `fps` for whoever writes the frames to a file.
    """
    defaults: dict[str, Any] = json.loads((model_path() / DEFAULTS_FILE).read_text("utf-8"))
    return defaults
