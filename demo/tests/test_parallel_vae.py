"""The all-frames-at-once VAE computes what diffusers' chunked one computes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from demo_training.networks import LATENT_CHANNELS, build_vae
from demo_training.parallel_vae import ParallelVAE, rms_norm, rms_norm_silu


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = build_vae(base_dim=8).eval().requires_grad_(False)
    for parameter in vae.parameters():  # no norm weight may be one, no bias zero
        parameter += 0.05 * torch.randn_like(parameter)
    return vae


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encode_equals_chunked(vae, frames):
    video = torch.rand(2, frames, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, log_variance = ParallelVAE(vae).encode(video)
    wanted = vae.encode(video.transpose(1, 2)).latent_dist
    assert mean.shape == (2, LATENT_CHANNELS, (frames - 1) // 4 + 1, 4, 3)
    assert relative_error(mean, wanted.mean) < 1e-4
    assert relative_error(log_variance, wanted.logvar) < 1e-4


@pytest.mark.parametrize("latent_frames", [1, 2, 5])
def test_decode_equals_chunked(vae, latent_frames):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, LATENT_CHANNELS, latent_frames, 4, 3, generator=generator)
    video = ParallelVAE(vae).decode(latents)
    wanted = vae.decode(latents).sample.transpose(1, 2)
    assert video.shape == wanted.shape == (2, 4 * latent_frames - 3, 3, 32, 24)
    # diffusers clamps its output; compare where that changes nothing, which is nearly everywhere
    inside = wanted.abs() < 1
    assert inside.float().mean() > 0.5
    assert relative_error(video[inside], wanted[inside]) < 1e-4


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    vae = build_vae(base_dim=8)
    fast = ParallelVAE(vae)
    mean, log_variance = fast.encode(torch.rand(1, 9, 3, 16, 16))
    (fast.decode(mean).square().mean() + log_variance.square().mean()).backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in vae.parameters())


def test_norms_against_float64():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    gamma = torch.rand(6, 1, 1, 1, generator=generator, dtype=torch.float64)
    wanted = torch.nn.functional.normalize(x, dim=1) * 6**0.5 * gamma
    assert relative_error(rms_norm(x.float(), gamma.float()), wanted.float()) < 1e-6
    silu = torch.nn.functional.silu(wanted).float()
    assert relative_error(rms_norm_silu(x.float(), gamma.float()), silu) < 1e-6
