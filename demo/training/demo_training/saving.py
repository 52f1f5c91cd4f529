"""Write the pipeline folder: half-precision weights in small files, no trace of the machine."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from demo_training.networks import build_scheduler
from polyattn_demo import DEFAULTS_FILE
from polyattn_demo.clips import FRAMES, SIZE

# How the model is meant to be run, and how its quality is measured. The guidance is mild because
# strong guidance is known to over-saturate small models; 32 tokens hold every prompt.
GENERATION_DEFAULTS: dict[str, Any] = {
    "prompt": "a red circle moving right",
    "width": SIZE,
    "height": SIZE,
    "num_frames": FRAMES,
    "fps": 16,
    "num_inference_steps": 20,
    "guidance_scale": 2.5,
    "max_sequence_length": 32,
}

# transformers 5 writes the name of its new base class, which version 4 does not know.
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_TRACES_OF_THE_MACHINE = ("_name_or_path",)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Replace `folder` by the pipeline, with the weights given.

    The text encoder stays in float32: transformers would otherwise load it in half precision where
    no dtype is asked for, while diffusers loads the other parts in float32.
    """
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_copied(text_encoder, torch.float32),
        vae=_copied(vae, torch.float16),
        scheduler=build_scheduler(),
        transformer=_copied(transformer, torch.float16),
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size="8MB")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o644)  # weights are written for their owner alone
        if path.suffix == ".json" and path.name != "tokenizer.json":
            _tidy(path)
    _write_json(folder / DEFAULTS_FILE, GENERATION_DEFAULTS)


def _copied(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(module).to("cpu", dtype)


def _tidy(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    _write_json(path, _tidied(content))


def _tidied(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _TRACES_OF_THE_MACHINE}
        return {k: _tidied(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    if isinstance(value, str):
        return _TOKENIZER_CLASSES.get(value, value)
    return value


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
