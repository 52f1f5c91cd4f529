"""A correct backend in plain torch, and every way in which the kit's tests break it.

``DEFECT`` names what is wrong with the implementations built from now on; None is correct. The
module is also installed as a plugin of its own by the tests that start another process.
"""

from __future__ import annotations

import math
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polyattn.contract import Architectures, BackendSpec, Capabilities
from polyattn.hooks import hookimpl

DEFECT: str | None = None


class PlainConfig(BaseModel):
    """The parameters of the plain backend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk: int = Field(0, ge=0, description="Queries per slice; 0 takes all of them at once.")


CAPABILITIES = Capabilities(
    platforms={"cpu": Architectures(), "cuda": Architectures(minimum="7.5")},
    dtypes=("float16", "bfloat16", "float32", "float64"),
    masks=("key_padding", "boolean", "additive"),
    causal=True,
    gqa=True,
    cross_attention=True,
    custom_scale=True,
    lse=True,
    autograd=True,
    deterministic=True,
)

SPEC = BackendSpec(
    name="plain",
    aliases={"plain_chunked": {"chunk": 16}},
    summary="Attention written out in torch, for tests",
    kind="exact",
    capabilities=CAPABILITIES,
    config=PlainConfig,
    implementation="plain_backend:build",
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]


def build(config: Any, request: Any, environment: Any) -> Any:
    return PlainAttention(config, DEFECT)


class PlainAttention:
    """Attention of one request; ``defect`` is the one thing that is done wrong."""

    def __init__(self, config: Any, defect: str | None) -> None:
        self.chunk = getattr(config, "chunk", 0)
        self.defect = defect
        self.kept: dict[str, Any] = {}

    def __call__(self, q: Any, k: Any, v: Any, call: Any, /) -> Any:
        q, k, v = self._broken_inputs(q, k, v, call)
        out, lse = self._attend(q, k, v, call)
        out = self._broken_output(out)
        if not call.return_lse or self.defect == "lse_not_returned":
            return out
        return out, self._broken_lse(lse.detach())

    def _attend(self, q: Any, k: Any, v: Any, call: Any) -> tuple[Any, Any]:
        import torch

        defect = self.defect
        compute = torch.float64 if q.dtype is torch.float64 else torch.float32
        queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        visible = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
        bias = None
        if call.mask is not None and defect != "mask_ignored":
            if call.mask.dtype is torch.bool:
                visible = visible & call.mask
            else:
                visible, bias = visible & (call.mask != float("-inf")), call.mask
        if call.mask_kind == "key_padding" and defect != "nan_behind_padding":
            hidden = ~call.mask[:, 0, 0, :, None, None]
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        if call.is_causal:
            offset = 0 if defect == "causal_top_left" else keys - queries
            causal = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(offset)
            visible = visible & causal
        if defect == "gqa_order":
            k, v = k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1)
        else:
            k, v = (each.repeat_interleave(groups, dim=2) for each in (k, v))
        q, k, v = (each.transpose(1, 2).to(compute) for each in (q, k, v))
        scale = 1 / math.sqrt(q.shape[-1]) if defect == "scale_ignored" else call.scale
        scores = (q @ k.transpose(-1, -2)) * scale
        if bias is not None:
            scores = scores + bias.to(compute).masked_fill(~visible, 0)
        blind = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, float("-inf"))
        if defect != "blind_rows_nan":
            scores = scores.masked_fill(blind, 0)
        if defect == "no_maximum_subtracted":
            weights = scores.to(call_dtype(q)).exp()
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = scores.softmax(-1)
        if defect == "denominator":
            total = scores.logsumexp(-1, keepdim=True).exp()
            weights = weights * (total / (total + 1))
        if defect not in ("blind_rows_nan", "blind_rows_mean"):
            weights = weights.masked_fill(blind, 0)
        out = (weights @ v).transpose(1, 2)
        lse = scores.logsumexp(-1)
        if defect != "lse_of_blind_rows":
            lse = lse.masked_fill(blind.squeeze(-1), float("-inf"))
        return out.to(self.dtype), lse.float()

    def _broken_inputs(self, q: Any, k: Any, v: Any, call: Any) -> tuple[Any, Any, Any]:
        import torch

        self.dtype = q.dtype
        defect = self.defect
        if defect == "query_modified":
            q.detach().mul_(0.5)
        elif defect == "key_modified":
            k.detach().sub_(k.detach().mean(1, keepdim=True))
        elif defect == "mask_modified" and call.mask is not None:
            call.mask.detach()[..., 0] = call.mask[..., -1]
        elif defect == "tail_dropped" and k.shape[1] > 64 and call.mask is None:
            kept = k.shape[1] // 64 * 64
            k, v = k[:, :kept], v[:, :kept]
        elif defect == "tail_leaks" and call.mask is None and not call.is_causal:
            missing = -k.shape[1] % 64
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
        elif defect == "batch_leak":
            v = v + 0.05 * v.mean(0, keepdim=True)
        elif defect == "head_leak":
            v = v + 0.05 * v.mean(2, keepdim=True)
        elif defect == "state_kept":
            k = self.kept.setdefault("k", k.clone())
        elif defect == "state_shared_by_threads":
            self.kept["q"] = q
            time.sleep(0.001)
            q = self.kept["q"]
        elif defect == "strides_ignored":
            k = k.as_strided(k.shape, torch.empty(k.shape, device="meta").stride())
        elif defect == "head_dim_rounded_down" and q.shape[3] > 16:
            used = q.shape[3] // 16 * 16
            q, k = q[..., :used], k[..., :used]
        elif defect == "no_gradient":
            q = q.detach()
        return q, k, v

    def _broken_output(self, out: Any) -> Any:
        import torch

        defect = self.defect
        if defect == "output_dtype":
            return out.float() if out.dtype is not torch.float32 else out.double()
        if defect == "output_heads_first":
            return out.transpose(1, 2)
        if defect == "gradient_scaled":
            return out + 0.2 * (out - out.detach())
        if defect == "gradient_random":
            return out + torch.rand(()).item() * (out - out.detach())
        if defect == "random":
            return out * (1 + 1e-6 * torch.rand_like(out)) + 1e-6 * torch.rand_like(out)
        if defect == "half_precision":
            return out.to(torch.bfloat16).to(out.dtype)
        if defect == "quantization_noise":
            return out * (1 + 0.05 * torch.randn_like(out))
        if defect == "heavy_noise":
            return out + 0.4 * out.std() * torch.randn_like(out)
        if defect == "not_finite":
            return out * float("nan")
        return out

    def _broken_lse(self, lse: Any) -> Any:
        if self.defect == "lse_base_two":
            return lse / math.log(2)
        if self.defect == "lse_half":
            return lse.half()
        return lse


def call_dtype(q: Any) -> Any:
    """float32 for the defect that overflows: float64 would take longer to."""
    import torch

    return torch.float32 if q.dtype is torch.float32 else q.dtype
