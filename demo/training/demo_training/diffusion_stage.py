"""The transformer, by flow matching on the latents of the autoencoder and the encoded prompts.

With clean latents x and noise e, a noisy latent is (1 - t) x + t e, and the network learns the
velocity e - x from it, from t and from the prompt. One prompt in ten is empty, which is what
classifier-free guidance compares with. The text is padded with zeros as `WanPipeline` pads it,
mostly to a short length and now and then to the pipeline's own, so that both work when generating.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from demo_training.networks import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    MAX_PROMPT_TOKENS,
    TRAIN_SHIFT,
    build_tokenizer,
    build_transformer,
    latent_statistics,
    tokenize,
)
from demo_training.parallel_vae import NormSilu, ParallelVAE, rms_norm_silu
from demo_training.runtime import (
    Clock,
    MovingAverage,
    Team,
    constant_then_linear,
    log,
    rounded,
    set_learning_rate,
    warmup,
)
from polyattn_demo.clips import FRAMES, SIZE, Scene, draw_scene, render
from polyattn_demo.detector import detect, judge

LATENT_SHAPE = (LATENT_CHANNELS, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
NOISE_BUCKETS = (0.5, 0.8, 0.95)  # losses are logged apart below, between and above these


@dataclass(frozen=True)
class DiffusionSettings:
    seconds: float = 640.0
    batch: int = 64
    num_layers: int = 8
    learning_rate: float = 1e-3
    muon_factor: float = 2.0  # Muon's learning rate over AdamW's
    weight_decay: float = 0.01
    warmup_steps: int = 200
    decay_from: float = 0.6  # share of the time after which the learning rate falls
    average: float = 0.999
    bank: int = 12288
    encode_batch: int = 32
    refresh_every: int = 8  # steps between two replacements of `encode_batch` clips of the bank
    refresh_until: float = 0.8  # share of the time
    pair_share: float = 0.45
    empty_share: float = 0.1
    context_lengths: tuple[int, int] = (32, 512)
    long_context_every: int = 8  # steps; the other steps use the short length
    checkpoint_every: float = 90.0  # seconds
    preview_at: tuple[float, ...] = (0.4, 0.75)
    preview_scenes: int = 48
    preview_steps: int = 20
    preview_guidance: float = 2.5
    seed: int = 2
    log_every: int = 200


@dataclass
class DiffusionRecord:
    settings: dict[str, Any]
    processes: int = 1
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    columns: tuple[str, ...] = (
        "step", "seconds", "t<.5", "t<.8", "t<.95", "t>=.95", "gradient", "rate",
    )  # fmt: skip
    history: list[list[float]] = field(default_factory=list)
    previews: list[dict[str, float]] = field(default_factory=list)


class LatentBank:
    """Many encoded clips on the device, some of them replaced by new ones now and then.

    Rendering and encoding cost more than they teach when every clip is used once. Mean and spread
    of each latent are kept, so every use draws another sample of it.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        vae: AutoencoderKLWan,
        tokenizer: PreTrainedTokenizerFast,
        device: torch.device,
        norm_silu: NormSilu,
        seed: int,
    ) -> None:
        self.settings, self.device, self.tokenizer = settings, device, tokenizer
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.fast = ParallelVAE(vae, dtype, norm_silu)
        self.mean, self.std = latent_statistics(vae, device)
        self.scenes = random.Random(seed)
        self.geometry = torch.Generator(device).manual_seed(seed)
        shape = (settings.bank, *LATENT_SHAPE)
        self.centre = torch.empty(shape, device=device, dtype=torch.bfloat16)
        self.spread = torch.empty_like(self.centre)
        self.tokens = torch.zeros(settings.bank, MAX_PROMPT_TOKENS, device=device, dtype=torch.long)
        self.next_row = 0
        for _ in range(0, settings.bank, settings.encode_batch):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Replace the oldest clips by new ones."""
        settings = self.settings
        count = min(settings.encode_batch, settings.bank - self.next_row)
        scenes = [draw_scene(self.scenes, pair_share=settings.pair_share) for _ in range(count)]
        clips = render(scenes, self.geometry, self.device)
        mean, log_variance = self.fast.encode(clips.video * 2 - 1)
        rows = slice(self.next_row, self.next_row + count)
        self.centre[rows] = ((mean - self.mean) / self.std).bfloat16()
        self.spread[rows] = (torch.exp(0.5 * log_variance) / self.std).bfloat16()
        self.tokens[rows] = tokenize(self.tokenizer, [s.prompt for s in scenes], self.device)
        self.next_row = (self.next_row + count) % settings.bank

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents in float32 and the token ids of their prompts."""
        rows = torch.randint(0, self.settings.bank, (count,), device=self.device)
        centre, spread = self.centre[rows].float(), self.spread[rows].float()
        return centre + spread * torch.randn_like(centre), self.tokens[rows]


def encode_text(encoder: UMT5EncoderModel, tokens: Tensor, length: int) -> Tensor:
    """Text states with zeros from the end of each prompt up to `length`."""
    mask = tokens != encoder.config.pad_token_id
    states = encoder(tokens, mask).last_hidden_state * mask[..., None]
    return F.pad(states, (0, 0, 0, length - states.shape[1]))


def draw_times(count: int, device: torch.device, shift: float = TRAIN_SHIFT) -> Tensor:
    """Noise levels: half uniform, half around the middle, then pushed towards more noise."""
    uniform = torch.rand(count, device=device)
    middle = torch.sigmoid(torch.randn(count, device=device))
    t = torch.where(torch.rand(count, device=device) < 0.5, uniform, middle)
    return shifted(t, shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


class DiffusionTrainer:
    """The transformer with its optimizers and average, its training step and its preview.

    Autoencoder and text encoder are given and stay as they are.
    """

    def __init__(
        self, settings: DiffusionSettings, vae: AutoencoderKLWan, text_encoder: UMT5EncoderModel,
        team: Team, norm_silu: NormSilu = rms_norm_silu,
    ) -> None:  # fmt: skip
        torch.manual_seed(settings.seed)
        device = team.device
        self.settings, self.device, self.vae, self.team = settings, device, vae, team
        self.tokenizer = build_tokenizer()
        self.transformer = build_transformer(settings.num_layers).to(device)
        self.text_encoder = text_encoder.to(device)
        self.parameters = list(self.transformer.parameters())
        self.average = MovingAverage(self.parameters, settings.average)
        self.optimizers = self._optimizers()
        # The same weights in every process, from here on other clips and other noise.
        own_seed = settings.seed + 1000 * team.rank
        torch.manual_seed(own_seed)
        self.bank = LatentBank(settings, vae, self.tokenizer, device, norm_silu, own_seed)
        self.empty = tokenize(self.tokenizer, [""], device)
        self.bounds = torch.tensor(NOISE_BUCKETS, device=device)
        self.step = 0
        log("bank of", settings.bank, "clips is full")

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the blocks, AdamW for everything else.

        Muon's updates are scaled to the size of AdamW's. Weight decay is for matrices alone.
        """
        settings = self.settings
        hidden = [p for p in self.transformer.blocks.parameters() if p.ndim == 2]
        rest = _without(self.parameters, hidden)
        matrices = [p for p in rest if p.ndim >= 2 and p.shape[-1] > 1]
        others = _without(rest, matrices)
        return [
            torch.optim.Muon(
                hidden,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [
                    {"params": matrices, "weight_decay": settings.weight_decay},
                    {"params": others, "weight_decay": 0.0},
                ],
                lr=settings.learning_rate,
                betas=(0.9, 0.95),
                fused=self.device.type == "cuda",
            ),
        ]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def compile(self) -> None:
        """Compile the transformer's blocks, once for each context length."""
        torch._dynamo.config.recompile_limit = 64
        self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        for length in self.settings.context_lengths:
            self.losses(length)[0].mean().backward()
        self.zero_grad()

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )

    def losses(self, length: int) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity for each sample, and the noise levels they were at."""
        settings = self.settings
        clean, tokens = self.bank.draw(settings.batch)
        dropped = torch.rand(settings.batch, 1, device=self.device) < settings.empty_share
        with torch.no_grad():
            tokens = torch.where(dropped, self.empty, tokens)
            context = encode_text(self.text_encoder, tokens, length)
        t = draw_times(settings.batch, self.device)
        noise = torch.randn_like(clean)
        weight = t.view(-1, 1, 1, 1, 1)
        with self.autocast():
            velocity = self.transformer(
                (1 - weight) * clean + weight * noise, t * 1000, context, return_dict=False
            )[0]
        error = (velocity.float() - (noise - clean)).square().mean((1, 2, 3, 4))
        return error, t

    def train_step(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        short, long = self.settings.context_lengths
        use_long = self.step % self.settings.long_context_every == 0
        error, t = self.losses(long if use_long else short)
        self.zero_grad()
        error.mean().backward()
        self.team.average(self.parameters)
        gradient = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, factor in zip(self.optimizers, (self.settings.muon_factor, 1), strict=True):
            set_learning_rate(optimizer, factor * rate)
            optimizer.step()
        self.step += 1
        self.average.update(self.step)
        return error.detach(), torch.bucketize(t, self.bounds), gradient

    def averaged(self) -> WanTransformer3DModel:
        """A copy of the transformer with averaged weights, in eval mode."""
        transformer = build_transformer(self.settings.num_layers).to(self.device)
        self.average.copy_to(transformer.parameters())
        return transformer.eval().requires_grad_(False)

    @torch.no_grad()
    def generate(self, scenes: Sequence[Scene], seed: int) -> Tensor:
        """Videos [B, T, 3, H, W] in [0, 1] by Euler steps, for a look in between."""
        settings = self.settings
        transformer = self.averaged()
        tokens = tokenize(self.tokenizer, [s.prompt for s in scenes], self.device)
        tokens = torch.cat([tokens, self.empty.expand(len(scenes), -1)])
        context = encode_text(self.text_encoder, tokens, settings.context_lengths[0])
        noise = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(len(scenes), *LATENT_SHAPE, generator=noise, device=self.device)
        grid = torch.linspace(1, 0, settings.preview_steps + 1, device=self.device)
        levels = shifted(grid, FLOW_SHIFT)
        for now, then in pairwise(levels):
            with self.autocast():
                velocity = transformer(
                    torch.cat([x, x]), (now * 1000).expand(2 * len(scenes)), context,
                    return_dict=False,
                )[0].float()  # fmt: skip
            wanted, unguided = velocity.chunk(2)
            guided = unguided + settings.preview_guidance * (wanted - unguided)
            x = x + (then - now) * guided
        x = x * self.bank.std + self.bank.mean
        videos = [self.bank.fast.decode(part) for part in x.split(8)]
        return ((torch.cat(videos) + 1) / 2).clamp(0, 1)

    def preview(self) -> dict[str, float]:
        """Share of all-right videos on scenes and noise of its own, singles and pairs apart."""
        rng = random.Random(self.settings.seed + 100)
        count = self.settings.preview_scenes // 2
        result: dict[str, float] = {"step": self.step}
        for name, share in (("single", 0.0), ("pair", 1.0)):
            scenes = [draw_scene(rng, pair_share=share) for _ in range(count)]
            found = [detect(v) for v in self.generate(scenes, seed=self.settings.seed + 200)]
            verdicts = [judge(d, s) for d, s in zip(found, scenes, strict=True)]
            for key in ("colour", "shape", "motion", "all_right"):
                result[f"{name}_{key}"] = round(sum(getattr(v, key) for v in verdicts) / count, 3)
            result[f"{name}_clean"] = round(sum(d.clean for d in found) / count, 3)
            result[f"{name}_overlap"] = round(sum(d.overlap for d in found) / count, 3)
        return result

    def save(self, path: Path) -> None:
        """Everything that going on needs."""
        state = {
            "step": self.step,
            "transformer": self.transformer.state_dict(),
            "average": self.average.average,
            "optimizers": [each.state_dict() for each in self.optimizers],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from `save`, or from a pipeline folder; weights alone start with new optimizers."""
        if path.is_dir():
            transformer = WanTransformer3DModel.from_pretrained(path / "transformer")
            state: dict[str, Any] = {"transformer": transformer.float().state_dict()}
        else:
            state = torch.load(path, map_location=self.device, weights_only=True)
        self.transformer.load_state_dict(state["transformer"])
        self.step = state.get("step", 0)
        for optimizer, kept in zip(self.optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(kept)
        self.average.average = state.get("average") or [p.detach().clone() for p in self.parameters]


def _without(
    parameters: Sequence[nn.Parameter], left_out: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    known = {id(parameter) for parameter in left_out}
    return [parameter for parameter in parameters if id(parameter) not in known]


def train_diffusion(
    trainer: DiffusionTrainer,
    on_checkpoint: Callable[[DiffusionTrainer], None] | None = None,
) -> DiffusionRecord:
    """Run the whole schedule of `trainer.settings`.

    `on_checkpoint` is called every `checkpoint_every` seconds and once at the end, in the first
    process alone, which also makes the previews and whose losses are the ones recorded.
    """
    settings, device, team = trainer.settings, trainer.device, trainer.team
    record = DiffusionRecord(asdict(settings), processes=team.size)
    first_step = trainer.step
    sums = torch.zeros(len(NOISE_BUCKETS) + 1, device=device)
    counts = torch.zeros_like(sums)
    marks = list(settings.preview_at)
    clock, next_checkpoint = Clock(settings.seconds), settings.checkpoint_every
    while (share := team.agree(clock.share)) < 1 or trainer.step == first_step:
        rate = settings.learning_rate * constant_then_linear(share, settings.decay_from)
        rate *= warmup(trainer.step - first_step, settings.warmup_steps)
        if share < settings.refresh_until and trainer.step % settings.refresh_every == 0:
            trainer.bank.refresh()
        error, bucket, gradient = trainer.train_step(rate)
        sums.index_add_(0, bucket, error)
        counts.index_add_(0, bucket, torch.ones_like(error))
        if not team.leads:
            continue
        if trainer.step % settings.log_every == 0:
            means = sums / counts.clamp(min=1)
            row = rounded([trainer.step, clock.elapsed, *means.tolist(), gradient, rate])
            record.history.append(row)
            log("diffusion", dict(zip(record.columns, row, strict=True)))
            sums.zero_()
            counts.zero_()
        if marks and share > marks[0]:
            marks.pop(0)
            record.previews.append(trainer.preview())
            log("preview at", round(clock.elapsed), "s", record.previews[-1])
        if on_checkpoint is not None and clock.elapsed > next_checkpoint:
            next_checkpoint += settings.checkpoint_every
            on_checkpoint(trainer)
    record.seconds = round(clock.elapsed, 1)
    record.steps = trainer.step - first_step
    record.samples = record.steps * settings.batch * team.size
    if not team.leads:
        return record
    if on_checkpoint is not None:
        on_checkpoint(trainer)
    record.previews.append(trainer.preview())
    log("diffusion done", record.steps, "steps", record.seconds, "s", record.previews[-1])
    return record
