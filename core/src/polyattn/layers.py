"""Attention as a module: a layer that carries its wishes and resolves a backend by selection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyattn.dispatch import Output, _traced, attend, call_site
from polyattn.naming import resolve_name

__all__ = ["LocalAttention"]


class LocalAttention(torch.nn.Module):
    """Attention over tensors that are whole on this device.

    ``backend`` and ``config`` are this layer's own wishes (None: selection decides), ``role`` and
    ``layer`` tell where it sits in its model, and ``required_backend`` pins a backend without which
    the layer would be wrong: whatever contradicts it is an error. Called with q ``[B, Sq, H, D]``
    and k, v ``[B, Sk, Hkv, D]``; returns what :func:`polyattn.attention` returns. Works under
    ``torch.compile(fullgraph=True)`` and does not recompile from step to step.
    """

    def __init__(
        self,
        backend: str | None = None,
        *,
        config: Any = None,
        role: str = "self",
        layer: int | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        required_backend: str | None = None,
    ) -> None:
        super().__init__()
        for name in (backend, required_backend):
            if name not in (None, "auto"):
                resolve_name(name, source="LocalAttention")
        self._site = call_site(
            backend,
            config,
            scope="layer",
            role=role,
            layer=layer,
            required_backend=required_backend,
        )
        self._site_text = self._site.text
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def extra_repr(self) -> str:
        return f"backend={self._site.backend!r}, role={self._site.role!r}"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None = None,
        return_lse: bool = False,
        extras: Mapping[str, torch.Tensor] | None = None,
    ) -> Output:
        """Attention of q over k and v; see :func:`polyattn.attention`."""
        if torch.compiler.is_compiling():
            return _traced(
                self._site_text, q, k, v, attn_mask, self.is_causal, self.scale, self.enable_gqa,
                return_lse, None, extras,
            )  # fmt: skip
        return attend(
            self._site, q, k, v, attn_mask, self.is_causal, self.scale, self.enable_gqa,
            return_lse, extras,
        )  # fmt: skip
