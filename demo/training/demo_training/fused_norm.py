"""Root-mean-square norm over the channels, then SiLU, in one Triton kernel each way.

The VAE has few channels (16 to 48) and very many pixels, so its norms are bound by memory: one
read and one write in place of the half dozen that separate operations take. Only for CUDA and
channels-last tensors; `checked_norm_silu` compares it with the plain version before it is trusted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from demo_training.parallel_vae import NormSilu, rms_norm_silu

_TILE = 4096  # elements a program handles: pixels times channels
_EPSILON = 1e-8


@triton.jit
def _forward_kernel(x_ptr, gamma_ptr, out_ptr, pixels, channels: tl.constexpr,
                    width: tl.constexpr, rows: tl.constexpr, epsilon: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    valid = (row < pixels)[:, None] & (column < channels)[None, :]
    place = row[:, None] * channels + column[None, :]
    x = tl.load(x_ptr + place, valid, 0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column, column < channels, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / channels + epsilon)
    u = x * scale[:, None] * gamma[None, :]
    tl.store(out_ptr + place, (u * tl.sigmoid(u)).to(out_ptr.dtype.element_ty), valid)


@triton.jit
def _backward_kernel(x_ptr, gamma_ptr, dout_ptr, dx_ptr, dgamma_ptr, pixels,
                     channels: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
                     epsilon: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    valid = (row < pixels)[:, None] & (column < channels)[None, :]
    place = row[:, None] * channels + column[None, :]
    x = tl.load(x_ptr + place, valid, 0.0).to(tl.float32)
    dout = tl.load(dout_ptr + place, valid, 0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column, column < channels, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / channels + epsilon)
    unit = x * scale[:, None]
    u = unit * gamma[None, :]
    gate = tl.sigmoid(u)
    du = dout * gate * (1.0 + u * (1.0 - gate))
    # Each program leaves its own share of gamma's gradient; the shares are added up afterwards.
    tl.store(dgamma_ptr + program * width + column, tl.sum(du * unit, 0))
    dunit = du * gamma[None, :]
    along = tl.sum(dunit * unit, 1) / channels
    dx = scale[:, None] * (dunit - unit * along[:, None])
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), valid)


def _channels_last(x: Tensor) -> Tensor:
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=layout)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        x = _channels_last(x)
        channels = x.shape[1]
        pixels = x.numel() // channels
        width = triton.next_power_of_2(channels)
        rows = _TILE // width
        flat_gamma = gamma.reshape(-1).float().contiguous()
        out = torch.empty_like(x)
        grid = (triton.cdiv(pixels, rows),)
        _forward_kernel[grid](x, flat_gamma, out, pixels, channels, width, rows, _EPSILON)
        ctx.save_for_backward(x, flat_gamma)
        ctx.gamma_shape = gamma.shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, gamma = ctx.saved_tensors
        dout = _channels_last(dout)
        channels = x.shape[1]
        pixels = x.numel() // channels
        width = triton.next_power_of_2(channels)
        rows = _TILE // width
        programs = triton.cdiv(pixels, rows)
        dx = torch.empty_like(x)
        shares = torch.empty(programs, width, device=x.device)
        _backward_kernel[(programs,)](
            x, gamma, dout, dx, shares, pixels, channels, width, rows, _EPSILON
        )
        return dx, shares.sum(0)[:channels].reshape(ctx.gamma_shape)


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    out: Tensor = _NormSilu.apply(x, gamma)
    return out


def checked_norm_silu(device: torch.device) -> NormSilu:
    """The fused kernel, once its output and gradients agree with the plain version's."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, 24, 3, 20, 20, device=device, generator=generator).bfloat16()
    gamma = torch.rand(24, 1, 1, 1, device=device, generator=generator) + 0.5
    dout = torch.randn(x.shape, device=device, generator=generator).bfloat16()
    results = []
    for function in (rms_norm_silu, norm_silu):
        inputs = [_channels_last(x).requires_grad_(), gamma.clone().requires_grad_()]
        out = function(*inputs)
        out.backward(_channels_last(dout))
        results.append([out, *(tensor.grad for tensor in inputs)])
    for plain, fused in zip(*results, strict=True):
        difference = (plain.detach().float() - fused.detach().float()).norm()
        error = float(difference / plain.detach().float().norm())
        if not error < 2e-2:
            raise RuntimeError(f"the fused norm is off by {error:.3g}")
    return norm_silu
