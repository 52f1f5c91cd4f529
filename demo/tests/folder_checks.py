"""What every saved pipeline folder must be like, the shipped one and one from a smoke run alike."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from polyattn_demo.clips import SINGLE_SCENES, vocabulary

MEGABYTE = 10**6


def check_files(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * MEGABYTE
    assert max(path.stat().st_size for path in files) < 10 * MEGABYTE
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"transformer", "text_encoder", "vae"}
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def check_configs(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    for path in folder.rglob("*.json"):
        text = path.read_text()
        for trace in ("_name_or_path", "/tmp", "/root", "/home", "TokenizersBackend"):
            assert trace not in text, (path, trace)


def check_defaults(folder: Path) -> None:
    defaults = json.loads((folder / "polyattn_defaults.json").read_text())
    assert defaults["width"] == defaults["height"] == 128
    assert defaults["num_frames"] == 33
    assert defaults["num_inference_steps"] == 20
    assert defaults["guidance_scale"] > 1
    assert defaults["prompt"] in {scene.prompt for scene in SINGLE_SCENES}


def check_pipeline(pipeline) -> None:
    """Loaded without a dtype, everything is float32; the tokenizer knows every word."""
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    tokenizer = pipeline.tokenizer
    for word in vocabulary():
        ids = tokenizer(word).input_ids
        assert len(ids) == 2, word  # the word and the end mark
        assert tokenizer.unk_token_id not in ids, word
    longest = "a purple triangle moving down and right and a yellow triangle moving down and left"
    assert len(tokenizer(longest).input_ids) == 16
    assert tokenizer("A RED circle").input_ids == tokenizer("a red circle").input_ids
    assert tokenizer("a red dog").input_ids.count(tokenizer.unk_token_id) == 1
