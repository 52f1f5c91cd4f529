"""Backends that compute plain attention and remember where each call came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyattn.context import ForwardContext
from polyattn.contract import (
    Architectures,
    AttentionCall,
    BackendSpec,
    Capabilities,
    ScheduledConfig,
)

CALLS: list[ForwardContext] = []
MASKS: list[torch.Tensor | None] = []
GATES: list[torch.Tensor | None] = []


class Recorder:
    """Plain attention, except that a ``failing`` one raises in the given layer."""

    failing_layer: int | None = None
    facts: Mapping[str, Any] | None = None
    error: BaseException = ValueError("the kernel failed")

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor:
        assert call.context is not None
        CALLS.append(call.context)
        MASKS.append(call.mask)
        GATES.append(call.extras.get("gate"))
        if call.context.layer == Recorder.failing_layer:
            raise Recorder.error
        call.context.state["seen"] = call.context.state.get("seen", 0) + 1
        call.facts = Recorder.facts
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=call.mask, is_causal=call.is_causal, scale=call.scale
        ).transpose(1, 2)


def build(config: Any, request: Any, environment: Any) -> Recorder:
    return Recorder()


def reset() -> None:
    CALLS.clear()
    MASKS.clear()
    GATES.clear()
    Recorder.failing_layer = None
    Recorder.error = ValueError("the kernel failed")


EXACT = BackendSpec(
    name="recorder",
    summary="remembers its calls",
    kind="exact",
    priority=-100,
    capabilities=Capabilities(
        platforms={"cpu": Architectures()}, dtypes=("float32", "float64"), cross_attention=True,
        masks=("boolean", "key_padding", "additive"), custom_scale=True, causal=True,
    ),
    implementation="recording_backend:build",
)  # fmt: skip

SPARSE = BackendSpec(
    name="sparse_recorder",
    aliases=["thin"],
    summary="remembers its calls; video self-attention only",
    kind="sparse",
    capabilities=Capabilities(
        platforms={"cpu": Architectures()}, dtypes=("float32",), needs_grid=True,
        accuracy="approximate",
    ),
    config=ScheduledConfig,
    implementation="recording_backend:build",
)  # fmt: skip

GATED = BackendSpec(
    name="gated_recorder",
    summary="remembers its calls; video self-attention with a gate",
    kind="sparse",
    capabilities=Capabilities(
        platforms={"cpu": Architectures()}, dtypes=("float32", "bfloat16"), needs_grid=True,
        extras=("gate",), accuracy="approximate",
    ),
    config=ScheduledConfig,
    implementation="recording_backend:build",
)  # fmt: skip

GPU_ONLY = BackendSpec(
    name="gpu_only",
    summary="runs nowhere near here",
    kind="exact",
    priority=-200,
    capabilities=Capabilities(
        platforms={"cuda": Architectures(minimum="9.0")}, dtypes=("bfloat16",),
        cross_attention=True,
    ),
    implementation="recording_backend:build",
)  # fmt: skip
