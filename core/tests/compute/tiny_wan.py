"""Wan pipelines of a few thousand random weights, built from diffusers' own classes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

WORDS = ("a", "red", "green", "circle", "square", "moving", "left", "right")
SIZE = {"height": 32, "width": 48, "num_frames": 5}
GRID = (2, 2, 3)  # 5 frames make 2 latent frames; 32x48 make 4x6 latents; patches of 2x2
LAYERS = 2
HEADS = 2
HEAD_DIM = 12


def tiny_transformer(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": LAYERS,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def tiny_vae() -> Any:
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512, padding_side="right",
    )  # fmt: skip


def tiny_text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(2)
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            use_cache=False, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def tiny_pipeline(*, two_stages: bool = False, unipc: bool = True) -> Any:
    """Wan 2.1, or with ``two_stages`` Wan 2.2: a second transformer below the boundary."""
    scheduler = (
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                flow_shift=3.0)
        if unipc
        else FlowMatchEulerDiscreteScheduler(shift=3.0)
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        scheduler=scheduler,
        transformer=tiny_transformer(),
        transformer_2=tiny_transformer(seed=7) if two_stages else None,
        boundary_ratio=0.7 if two_stages else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline_of(kind: Any, transformer: Any) -> Any:
    """Another of the Wan pipelines, e.g. from image to video, around this transformer."""
    parts = dict(tiny_pipeline().components)
    parts |= {"transformer": transformer}
    wanted = inspect.signature(kind.__init__).parameters
    optional = {name: None for name in ("image_encoder", "image_processor") if name in wanted}
    pipe = kind(**{name: part for name, part in parts.items() if name in wanted}, **optional)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, *, steps: int = 3, guidance: float = 3.0, **changes: Any) -> torch.Tensor:
    """The latents of one generation from text, with a fixed seed."""
    return call(pipe, steps=steps, guidance=guidance, **{**SIZE, **changes})


def call(pipe: Any, *, steps: int, guidance: float = 3.0, **changes: Any) -> torch.Tensor:
    """The latents of one generation from whatever the pipeline takes."""
    arguments: dict[str, Any] = {
        "prompt": "a red circle moving left",
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "max_sequence_length": 16,
        **changes,
    }
    latents = pipe(**arguments).frames
    assert isinstance(latents, torch.Tensor)
    return latents
