"""The parts of the demo model, built small enough that all weights stay under 20 MB.

Every part is an ordinary diffusers or transformers class with a tiny configuration, so that the
saved folder is loaded by the code that loads any `WanPipeline` folder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from polyattn_demo.clips import vocabulary

LATENT_CHANNELS = 16
TEXT_WIDTH = 128
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_PROMPT_TOKENS = 24  # the longest two-object prompt takes 16, its end mark included
MODEL_MAX_LENGTH = 512
FLOW_SHIFT = 4.0  # of the sampler; training draws its noise levels with TRAIN_SHIFT
TRAIN_SHIFT = 5.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the demo's prompts; capital letters do not matter."""
    words = [PAD, END, UNKNOWN, *vocabulary()]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MODEL_MAX_LENGTH,
        padding_side="right",
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], device: torch.device
) -> Tensor:
    """Token ids [B, MAX_PROMPT_TOKENS]."""
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt"
    )
    return batch.input_ids.to(device)


def build_text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=64,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def build_vae(base_dim: int = 16) -> AutoencoderKLWan:
    """8 x 8 x 4 compression into 16 channels, as in the large Wan models."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer(num_layers: int = 8) -> WanTransformer3DModel:
    """Four heads of 64 over 9 x 16 x 16 tokens; starts out predicting zero everywhere.

    With modulation, cross-attention and output at zero the first steps change one thing at a time,
    which makes a short training run stable.
    """
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=512,
        num_layers=num_layers,
        rope_max_seq_len=64,
    )
    for layer in (model.condition_embedder.time_proj, model.proj_out):
        _zero(layer)
    nn.init.zeros_(model.scale_shift_table)
    for block in model.blocks:
        nn.init.zeros_(block.scale_shift_table)
        _zero(block.attn2.to_out[0])
    return model


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def build_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
        solver_order=2,
    )


def latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, shaped to broadcast over [B, C, T, H, W]."""
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=device).view(shape)
    return mean, std
