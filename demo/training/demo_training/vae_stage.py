"""Stage one: the video autoencoder, trained on rendered clips.

The loss weighs what a viewer looks at: pixels on and around the objects, and the first frame,
which the autoencoder codes on its own and which is one frame in 33 of an unweighted loss. Bouncing
objects, whose path has corners, are drawn more often than one in ten.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from demo_training.networks import build_vae
from demo_training.parallel_vae import NormSilu, ParallelVAE, rms_norm_silu
from demo_training.runtime import (
    Clock,
    MovingAverage,
    cosine,
    log,
    rounded,
    set_learning_rate,
    warmup,
)
from polyattn_demo.clips import SINGLE_SCENES, draw_scene, render
from polyattn_demo.detector import detect, judge


@dataclass(frozen=True)
class VAESettings:
    seconds: float = 240.0
    batch: int = 8
    render_batch: int = 64  # clips rendered at once; drawing few at a time would hold up the GPU
    base_dim: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    average: float = 0.998
    kl_weight: float = 5e-5
    object_weight: float = 5.0
    first_frame_weight: float = 5.0
    pair_share: float = 0.5
    bounce_share: float = 0.25
    short_share: float = 0.35  # of the time, on windows of `short_frames` frames
    short_frames: int = 17
    statistics_batches: int = 16
    check_clips: int = 64
    seed: int = 1
    log_every: int = 100


@dataclass
class VAERecord:
    settings: dict[str, Any]
    steps: int = 0
    seconds: float = 0.0
    columns: tuple[str, ...] = ("step", "seconds", "reconstruction", "l1", "kl", "gradient")
    history: list[list[float]] = field(default_factory=list)
    check: dict[str, float] = field(default_factory=dict)


def reconstruction_loss(
    output: Tensor, video: Tensor, focus: Tensor, settings: VAESettings
) -> Tensor:
    """L1 plus L2, weighted; the weight of the frames has mean one."""
    error = (output - video).abs()
    by_frame = torch.ones(video.shape[1], device=video.device)
    by_frame[0] = settings.first_frame_weight
    by_frame = by_frame / by_frame.mean()
    weight = (1 + settings.object_weight * focus) * by_frame[None, :, None, None, None]
    return (weight * (error + 2 * error.square())).mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """From the standard normal distribution, for each latent dimension."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def sample(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)


class ClipSource:
    """Endless clips for one stage, from one seed."""

    def __init__(self, settings: VAESettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.scenes = random.Random(settings.seed)
        self.geometry = torch.Generator(device).manual_seed(settings.seed)
        self.ready: list[tuple[Tensor, Tensor]] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """A batch of video in [-1, 1] and its focus."""
        if not self.ready:
            self._render()
        return self.ready.pop()

    def _render(self) -> None:
        settings = self.settings
        scenes = [
            draw_scene(
                self.scenes, pair_share=settings.pair_share, bounce_share=settings.bounce_share
            )
            for _ in range(settings.render_batch)
        ]
        clips = render(scenes, self.geometry, self.device)
        videos = (clips.video * 2 - 1).split(settings.batch)
        self.ready = list(zip(videos, clips.focus.split(settings.batch), strict=True))

    def window(self, video: Tensor, focus: Tensor) -> tuple[Tensor, Tensor]:
        """A random stretch of frames, the same for the whole batch."""
        length = self.settings.short_frames
        start = self.scenes.randint(0, video.shape[1] - length)
        return video[:, start : start + length], focus[:, start : start + length]


def train_vae(
    settings: VAESettings, device: torch.device, norm_silu: NormSilu = rms_norm_silu
) -> tuple[AutoencoderKLWan, VAERecord]:
    """Train from nothing for `settings.seconds`; the result is averaged and in eval mode."""
    torch.manual_seed(settings.seed)
    vae = build_vae(settings.base_dim).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fast = ParallelVAE(vae, dtype, norm_silu)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        fused=device.type == "cuda",
    )
    average = MovingAverage(parameters, settings.average)
    source = ClipSource(settings, device)
    record = VAERecord(asdict(settings))
    clock, step = Clock(settings.seconds), 0
    while clock.share < 1 or step == 0:
        rate = warmup(step, settings.warmup_steps) * cosine(clock.share)
        set_learning_rate(optimizer, settings.learning_rate * rate)
        video, focus = source.next()
        if clock.share < settings.short_share:
            video, focus = source.window(video, focus)
        mean, log_variance = fast.encode(video)
        output = fast.decode(sample(mean, log_variance))
        reconstruction = reconstruction_loss(output, video, focus, settings)
        kl = kl_divergence(mean, log_variance)
        optimizer.zero_grad()
        (reconstruction + settings.kl_weight * kl).backward()
        gradient = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        average.update(step)
        if step % settings.log_every == 0:
            l1 = (output - video).detach().abs().mean()
            row = rounded([step, clock.elapsed, reconstruction, l1, kl, gradient])
            record.history.append(row)
            log("vae", dict(zip(record.columns, row, strict=True)))
    average.copy_to(parameters)
    vae.eval().requires_grad_(False)
    record.steps, record.seconds = step, round(clock.elapsed, 1)
    set_latent_statistics(vae, fast, source)
    record.check = check_reconstructions(vae, settings, device)
    log("vae done", record.steps, "steps", record.seconds, "s", record.check)
    return vae, record


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, fast: ParallelVAE, source: ClipSource) -> None:
    """Write mean and standard deviation of sampled latents into the configuration."""
    latents = []
    for _ in range(source.settings.statistics_batches):
        video, _ = source.next()
        latents.append(sample(*fast.encode(video)).transpose(0, 1).flatten(1))
    values = torch.cat(latents, 1)
    vae.register_to_config(latents_mean=rounded(values.mean(1)), latents_std=rounded(values.std(1)))


@torch.no_grad()
def check_reconstructions(
    vae: AutoencoderKLWan, settings: VAESettings, device: torch.device
) -> dict[str, float]:
    """Fidelity of reconstructions by diffusers' own encode and decode, in float32.

    Half of the clips hold one object (all motions in turn), half hold two.
    """
    rng = random.Random(settings.seed + 1)
    geometry = torch.Generator(device).manual_seed(settings.seed + 1)
    count = settings.check_clips
    scenes = [SINGLE_SCENES[rng.randrange(24) * 10 + i % 10] for i in range(count - count // 2)]
    scenes += [draw_scene(rng, pair_share=1.0) for _ in range(count // 2)]
    error, first_error, right, overlap = 0.0, 0.0, 0, 0.0
    for start in range(0, count, settings.batch):
        chunk = scenes[start : start + settings.batch]
        video = render(chunk, geometry, device).video
        latents = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.sample()
        output = ((vae.decode(latents).sample.transpose(1, 2) + 1) / 2).clamp(0, 1)
        squared = (output - video).square()
        error += float(squared.mean((1, 2, 3, 4)).sum())
        first_error += float(squared[:, 0].mean((1, 2, 3)).sum())
        for scene, clip in zip(chunk, output, strict=True):
            found = detect(clip)
            right += judge(found, scene).all_right
            overlap += found.overlap

    def decibels(squared_error: float) -> float:
        return round(float(-10 * torch.log10(torch.tensor(squared_error / count))), 2)

    return {
        "clips": count,
        "psnr": decibels(error),
        "psnr_first_frame": decibels(first_error),
        "all_right": right,
        "overlap": round(overlap / count, 4),
    }
