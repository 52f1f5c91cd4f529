"""``torch_sdpa``: attention by torch's own kernels, to the letter of polyattn's contract.

What torch leaves open is settled here. A query that sees no key gives zeros (torch's kernels give
NaN, zeros, or a mean of all values). Causal attention of unequal lengths is aligned to the bottom
right (torch aligns to the top left). Keys behind a key-padding mask may hold NaN. The log-sum-exp
comes from the fused kernel where torch has one that returns it, and is computed exactly otherwise.

A kernel is run through its ATen operator, not through ``torch.nn.attention.sdpa_kernel``, which
flips process-wide switches that other threads would see.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn_sdpa.config import SdpaConfig
from polyattn_sdpa.kernels import choose, limits_of

__all__ = ["build"]

aten = torch.ops.aten

# Fused kernel: (q, k, v, bias, is_causal, scale, need_lse) on [B, H, S, D] -> out, lse [B, H, Sq].
Fused = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        "torch.Tensor | None",
        bool,
        float,
        bool,
    ],
    "tuple[torch.Tensor, torch.Tensor]",
]


def build(
    config: SdpaConfig, request: AttentionRequest, environment: Environment
) -> Implementation:
    """The implementation for one request; the kernel is chosen here, once."""
    choice = choose(request, config, environment)
    kernel = choice.kernel
    if kernel == "default" and request.needs_lse:
        kernel = _lse_kernel(request, environment)
    return TorchSdpa(kernel, choice.why, request, on_cpu=environment.platform == "cpu")


def _lse_kernel(request: AttentionRequest, environment: Environment) -> str:
    """The first fused kernel that returns the log-sum-exp of this request, or ``default``."""
    for kernel in ("cudnn", "flash", "efficient"):
        if not limits_of(kernel, request, environment):
            return kernel
    return "default"


class TorchSdpa:
    """One request's attention; see :class:`polyattn.contract.Implementation`."""

    def __init__(self, kernel: str, why: str, request: AttentionRequest, *, on_cpu: bool) -> None:
        self.kernel = kernel
        self.why = why
        self.fused = _fused_kernel(kernel, on_cpu)
        self.aligned_mask = request.is_causal and request.query_length != request.key_length
        self.needs_grad = request.needs_grad
        self.masked = request.mask != "none" or self.aligned_mask
        self.facts: dict[str, object] | None = None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.masked or call.return_lse:
            return self._general(q, k, v, call)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.facts is None:
            self.facts = {"kernel": self._kernel_name(q, k, v, None, call)}
        call.facts = self.facts
        if self.fused is not None:
            q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
            out, _ = self.fused(q, k, v, None, call.is_causal, call.scale, False)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=call.is_causal, scale=call.scale, enable_gqa=call.enable_gqa
            )
        return out.transpose(1, 2)

    def _general(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Masks and the log-sum-exp."""
        mask = call.mask
        is_padding = call.mask_kind == "key_padding"
        if is_padding:
            assert mask is not None
            hidden = ~mask[:, 0, 0, :, None, None]
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        is_causal = call.is_causal
        if is_causal and (mask is not None or self.aligned_mask):
            mask, is_causal = _and_causal(mask, q.shape[1], k.shape[1], q.device), False
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask, visible = self._without_empty_rows(mask, call)
        if is_padding and not call.is_causal and not call.return_lse:
            visible = None  # rows that see no key have averaged values that are all zero
        if self.facts is None:
            self.facts = {"kernel": self._kernel_name(q, k, v, mask, call)}
        call.facts = self.facts
        lse = None
        if self.fused is not None:
            bias = _as_bias(mask, q)
            q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
            out, lse = self.fused(q, k, v, bias, is_causal, call.scale, call.return_lse)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                scale=call.scale,
                enable_gqa=call.enable_gqa,
            )
            if call.return_lse:
                lse = _exact_lse(q, k, mask, is_causal, call.scale)
        if visible is not None:
            out = (
                out.masked_fill(~visible, 0) if out.requires_grad else out.masked_fill_(~visible, 0)
            )
        out = out.transpose(1, 2)
        if not call.return_lse:
            return out
        assert lse is not None
        lse = lse.detach().float()
        if visible is not None:
            lse = lse.masked_fill(~visible.squeeze(-1), -math.inf)
        return out, lse

    def _without_empty_rows(
        self, mask: torch.Tensor | None, call: AttentionCall
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask, and which of its rows see a key at all: the result of the others is put right.

        Until then a row without keys is given all of them wherever a softmax over nothing would
        show: in averaged values, in a log-sum-exp, and in a backward pass.
        """
        if mask is None:
            return None, None
        is_boolean = mask.dtype is torch.bool
        visible = mask.any(-1, keepdim=True) if is_boolean else mask.amax(-1, True) != -math.inf
        if call.mask_kind == "key_padding" or call.return_lse or self.needs_grad:
            mask = mask | ~visible if is_boolean else mask.masked_fill(~visible, 0)
        return mask, visible

    def _kernel_name(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        call: AttentionCall,
    ) -> str:
        """For the report: the kernel, asked of torch where the choice was left to it."""
        if self.kernel != "default":
            return self.kernel
        try:
            picked = torch._fused_sdp_choice(
                q,
                k,
                v,
                mask,
                0.0,
                call.is_causal and not self.aligned_mask,
                scale=call.scale,
                enable_gqa=call.enable_gqa,
            )
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return "torch default"
        return _TORCH_NAMES.get(SDPBackend(picked), "torch default")


_TORCH_NAMES = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}


def _and_causal(
    mask: torch.Tensor | None, queries: int, keys: int, device: torch.device
) -> torch.Tensor:
    """The mask together with a causal one aligned to the bottom right."""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if mask is None:
        return causal[None, None]
    if mask.dtype is torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, -math.inf)


def _as_bias(mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """A mask as the additive bias the fused operators take."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)


def _exact_lse(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> torch.Tensor:
    """The log-sum-exp in float32 (float64 for float64), a slice of queries at a time.

    q is [B, H, Sq, D], k [B, Hkv, Sk, D]; returns [B, H, Sq].
    """
    compute = torch.float64 if q.dtype is torch.float64 else torch.float32
    k = _repeat_heads(k, q.shape[1]).to(compute).transpose(-1, -2)
    queries, keys = q.shape[2], k.shape[-1]
    chunk = max(1, (1 << 24) // (keys * q.shape[0] * q.shape[1]))
    parts = []
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        scores = (q[:, :, rows].to(compute) @ k) * scale
        if is_causal:
            seen = torch.arange(keys, device=q.device) <= torch.arange(
                rows.start, rows.stop, device=q.device
            ).unsqueeze(-1)
            scores = scores.masked_fill(~seen, -math.inf)
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            scores = (
                scores.masked_fill(~part, -math.inf) if part.dtype is torch.bool else scores + part
            )
        parts.append(scores.logsumexp(-1))
    return torch.cat(parts, dim=2)


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The fused operators read each head's D values as one run of memory, and do not check it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _fused_kernel(kernel: str, on_cpu: bool) -> Fused | None:
    if kernel == "default":
        return None
    return {
        "flash": _flash_cpu if on_cpu else _flash,
        "cudnn": _cudnn,
        "efficient": _efficient,
        "math": _math,
    }[kernel]


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    is_causal: bool, scale: float, need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, False, scale=scale
    )
    return out, lse


def _flash_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    is_causal: bool, scale: float, need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    heads = q.shape[1]
    if bias is not None:
        bias = bias.expand(q.shape[0], heads, q.shape[2], k.shape[2])
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, _repeat_heads(k, heads), _repeat_heads(v, heads), 0.0, is_causal,
        attn_mask=bias, scale=scale,
    )  # fmt: skip
    return out, lse


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    is_causal: bool, scale: float, need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    heads = q.shape[1]
    need_lse = need_lse or torch.is_grad_enabled()
    if bias is not None:
        bias = bias.expand(q.shape[0], heads, q.shape[2], k.shape[2])
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, _repeat_heads(k, heads), _repeat_heads(v, heads), bias, need_lse, 0.0, is_causal,
        False, scale=scale,
    )  # fmt: skip
    return out, lse.squeeze(-1) if need_lse else lse


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    is_causal: bool, scale: float, need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    heads = q.shape[1]
    if bias is not None:
        # The kernel reads the bias in aligned rows: lay it out with rows of a multiple of 16.
        keys = k.shape[2]
        bias = F.pad(bias, (0, -keys % 16))[..., :keys]
        bias = bias.expand(q.shape[0], heads, q.shape[2], keys)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, _repeat_heads(k, heads), _repeat_heads(v, heads), bias,
        need_lse or torch.is_grad_enabled(), 0.0, is_causal, scale=scale,
    )  # fmt: skip
    return out, lse[..., : q.shape[2]]  # rounded up to a multiple of 32 by the kernel


def _math(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    is_causal: bool, scale: float, need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    heads = q.shape[1]
    out, _ = aten._scaled_dot_product_attention_math(
        q, _repeat_heads(k, heads), _repeat_heads(v, heads), bias, 0.0, is_causal, scale=scale
    )
    return out, _exact_lse(q, k, bias, is_causal, scale) if need_lse else q.new_empty(0)
