"""`AutoencoderKLWan` over all frames of a clip at once, for training.

diffusers walks through a video in chunks and carries feature caches from one to the next: right
for long videos, slow and memory-hungry to train through. Its convolutions are causal, though, so
the same function can be computed on all frames together. What the chunks imply:

* every convolution over time pads with zeros at the front only;
* the first frame skips every convolution that changes the number of frames (`time_conv`). Going
  down, that convolution still sees the first frame as a neighbour; going up, it sees zeros there.

Tensors are [B, C, T, H, W] in channels-last memory, where the frames of a clip can be seen as a
batch of images without copying.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn

NormSilu = Callable[[Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Root-mean-square norm over the channels (dimension 1), in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-8)
    return (wide * scale * gamma.view(1, -1, *[1] * (x.ndim - 2))).to(x.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(rms_norm(x, gamma).float()).to(x.dtype)


def _as_images(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_clips(x: Tensor, batch: int) -> Tensor:
    """[B * T, C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class ParallelVAE:
    """Encode and decode with the weights of `vae`, in `dtype`, with gradients.

    `norm_silu` replaces the norm and activation before each convolution by a fused kernel.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        dtype: torch.dtype = torch.float32,
        norm_silu: NormSilu = rms_norm_silu,
    ) -> None:
        self.vae, self.dtype, self.norm_silu = vae, dtype, norm_silu

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, 3, H, W] in [-1, 1] -> mean and log variance [B, C, T', h, w] in float32."""
        encoder = self.vae.encoder
        x = self._conv(encoder.conv_in, self._enter(video.transpose(1, 2)))
        for layer in encoder.down_blocks:
            step = self._resample if isinstance(layer, WanResample) else self._block
            x = step(layer, x)
        x = self._middle(encoder.mid_block, x)
        x = self._conv(encoder.conv_out, self.norm_silu(x, encoder.norm_out.gamma))
        mean, log_variance = self._conv(self.vae.quant_conv, x).float().chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T', h, w] -> video [B, T, 3, H, W] in float32, not clamped."""
        decoder = self.vae.decoder
        x = self._conv(self.vae.post_quant_conv, self._enter(latents))
        x = self._middle(decoder.mid_block, self._conv(decoder.conv_in, x))
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                x = self._block(block, x)
            if stage.upsamplers is not None:
                x = self._resample(stage.upsamplers[0], x)
        x = self._conv(decoder.conv_out, self.norm_silu(x, decoder.norm_out.gamma))
        return x.transpose(1, 2).float()

    def _enter(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _weights(self, conv: nn.Module) -> tuple[Tensor, Tensor]:
        return conv.weight.to(self.dtype), conv.bias.to(self.dtype)

    def _conv(self, conv: nn.Conv3d, x: Tensor, front: int | None = None) -> Tensor:
        """Causal convolution, with `front` zero frames before the first (default: all it needs)."""
        weight, bias = self._weights(conv)
        time, height, width = conv.kernel_size
        front = time - 1 if front is None else front
        if front:
            x = F.pad(x, (0, 0, 0, 0, front, 0))
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return F.conv3d(x, weight, bias, conv.stride, (0, height // 2, width // 2))

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        same_width = isinstance(block.conv_shortcut, nn.Identity)
        skip = x if same_width else self._conv(block.conv_shortcut, x)
        x = self._conv(block.conv1, self.norm_silu(x, block.norm1.gamma))
        return skip + self._conv(block.conv2, self.norm_silu(x, block.norm2.gamma))

    def _middle(self, middle: nn.Module, x: Tensor) -> Tensor:
        x = self._block(middle.resnets[0], x)
        x = self._attention(middle.attentions[0], x)
        return self._block(middle.resnets[1], x)

    def _attention(self, attention: nn.Module, x: Tensor) -> Tensor:
        """One head over the pixels of each frame."""
        images = _as_images(x)
        count, channels, height, width = images.shape
        qkv = F.conv2d(rms_norm(images, attention.norm.gamma), *self._weights(attention.to_qkv))
        query, key, value = qkv.flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
        mixed = mixed.reshape(count, channels, height, width)
        return x + _as_clips(F.conv2d(mixed, *self._weights(attention.proj)), x.shape[0])

    def _resample(self, layer: WanResample, x: Tensor) -> Tensor:
        grows = layer.mode.startswith("up")
        if layer.mode == "upsample3d" and x.shape[2] > 1:
            first, rest = x[:, :, :1], x[:, :, 1:]
            # Each later frame becomes two: the channels hold them one after the other.
            doubled = self._conv(layer.time_conv, rest).unflatten(1, (2, -1))
            rest = doubled.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([first, rest], 2)
        batch, images = x.shape[0], _as_images(x)
        weight, bias = self._weights(layer.resample[1])
        if grows:
            images = F.interpolate(images, scale_factor=2.0, mode="nearest")
            images = F.conv2d(images, weight, bias, padding=1)
        else:
            images = F.conv2d(F.pad(images, (0, 1, 0, 1)), weight, bias, stride=2)
        x = _as_clips(images, batch)
        if layer.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self._conv(layer.time_conv, x, front=0)], 2)
        return x.contiguous(memory_format=torch.channels_last_3d)
