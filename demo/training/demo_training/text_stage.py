"""Stage of the text encoder: trained on prompts alone, before any video is seen.

In the state of every word two things must be readable: which word it is, and whether it speaks of
the first or the second object. Left to the diffusion loss, the encoder never learns the second: as
long as the transformer draws one object at a time, words that look at their neighbours are only
noise to it, attention closes on the word itself, and no gradient opens it again. So the states are
given: a vector for each word, and one more that is added for the words of the second object.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from demo_training.networks import (
    TEXT_WIDTH,
    build_text_encoder,
    build_tokenizer,
    tokenize,
)
from demo_training.runtime import constant_then_linear, log, set_learning_rate, warmup
from polyattn_demo.clips import SINGLE_SCENES, Scene, draw_scene


@dataclass(frozen=True)
class TextSettings:
    steps: int = 3000
    batch: int = 96
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_from: float = 0.5
    pair_share: float = 0.7
    seed: int = 3


def word_states(
    tokenizer: PreTrainedTokenizerFast, known: UMT5EncoderModel | None, seed: int
) -> Tensor:
    """The state of each word of the first object, [words, TEXT_WIDTH].

    With `known`, an encoder whose states do not look at the neighbours, these are its own, so that
    a transformer trained on them still understands the prompt. Otherwise they are drawn at random.
    """
    if known is None:
        return torch.randn(
            len(tokenizer), TEXT_WIDTH, generator=torch.Generator().manual_seed(seed)
        )
    with torch.no_grad():
        return known(torch.arange(len(tokenizer))[:, None]).last_hidden_state[:, 0]


def example(scene: Scene | None) -> tuple[str, list[bool]]:
    """A prompt and, for each of its tokens and the end mark: is it a word of the second object?

    Without a scene it is the empty prompt, which has the end mark alone.
    """
    if scene is None:
        return "", [False]
    words = len(scene.things[0].phrase.split())
    total = len(scene.prompt.split())
    return scene.prompt, [words < i < total for i in range(total + 1)]


def train_text(
    settings: TextSettings, device: torch.device, known: UMT5EncoderModel | None = None
) -> tuple[UMT5EncoderModel, dict[str, Any]]:
    """The trained encoder in eval mode on `device`, and the record of its training."""
    torch.manual_seed(settings.seed)
    tokenizer, encoder = build_tokenizer(), build_text_encoder().to(device)
    first = word_states(tokenizer, known, settings.seed).to(device)
    shift = torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(settings.seed + 1))
    second = first + shift.to(device) * first.square().mean().sqrt()
    second = second * (first.norm(dim=1) / second.norm(dim=1))[:, None]
    rng = random.Random(settings.seed)

    def error(scenes: list[Scene | None]) -> Tensor:
        """Mean squared error over the mean square of the wanted states."""
        examples = [example(scene) for scene in scenes]
        tokens = tokenize(tokenizer, [prompt for prompt, _ in examples], device)
        later = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (_, flags) in enumerate(examples):
            later[row, : len(flags)] = torch.tensor(flags)
        wanted = torch.where(later[..., None].to(device), second[tokens], first[tokens])
        present = tokens != encoder.config.pad_token_id
        states = encoder(tokens, present.long()).last_hidden_state
        return F.mse_loss(states[present], wanted[present]) / wanted[present].square().mean()

    optimizer = torch.optim.AdamW(encoder.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    history: list[list[float]] = []
    for step in range(settings.steps):
        rate = settings.learning_rate * warmup(step, settings.warmup_steps)
        rate *= constant_then_linear(step / settings.steps, settings.decay_from)
        set_learning_rate(optimizer, rate)
        scenes = [draw_scene(rng, pair_share=settings.pair_share) for _ in range(settings.batch)]
        loss = error([None, *scenes])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0:
            history.append([step, round(float(loss.detach()), 6)])
            log("text", *history[-1])
    encoder.eval().requires_grad_(False)
    checked = {
        "error_single": float(error(list(SINGLE_SCENES))),
        "error_pair": float(error([draw_scene(rng, pair_share=1.0) for _ in range(1000)])),
        "error_empty": float(error([None])),
    }
    log("text done", checked)
    return encoder, {"settings": asdict(settings), "history": history, **checked}
