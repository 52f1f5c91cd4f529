"""The kernels behind block-sparse attention, one module each, and the order they are tried in.

A provider is a module with

* ``NAME``: what a caller types;
* ``reasons(plan, q, k, v) -> list[str]``: why it cannot serve these tensors, empty if it can. Looks
  at shapes, dtypes, devices and what is installed, never at values. Where nothing else stands in
  the way it may try what it would run on a small case of its own, once;
* ``run(q, k, v, plan, scale, return_lse) -> (out, lse or None)``: q ``[B, Sq, H, D]``, k and v
  ``[B, Sk, Hkv, D]``, ``scale`` positive; out ``[B, Sq, H, D]`` in q's dtype, a tensor of its own,
  and the natural log-sum-exp ``[B, H, Sq]`` in float32 when asked for.

Importing a provider's module imports neither Triton nor a vendor's package.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch

from polyattn_kernels.errors import ProviderError
from polyattn_kernels.plan import BlockSparsePlan

__all__ = ["PROVIDERS", "Provider", "automatic_order", "load"]

PROVIDERS = ("reference", "hopper", "triton", "flex", "fa4")


class Provider(Protocol):
    """The shape of a provider's module."""

    NAME: str

    def reasons(
        self, plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> list[str]: ...

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockSparsePlan,
        scale: float,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


def automatic_order(device_type: str, plan: BlockSparsePlan, head_dim: int) -> tuple[str, ...]:
    """Which providers ``"auto"`` tries, first to last. The last one can serve any call.

    In the order measured on an H100 (``bench/results/block_sparse.md``), the only GPU measured.
    """
    if device_type != "cuda":
        return ("reference",)
    if plan.query_block == plan.key_block == 128 and head_dim in (64, 128):
        return ("fa4", "hopper", "triton", "flex", "reference")
    # Level with the Hopper tier for few heads, up to 25 % ahead for many. Not where blocks are
    # padded: the Hopper tier skips their padding.
    if plan.query_block == plan.key_block == 64 and head_dim == 128 and plan.key_lengths is None:
        return ("triton", "hopper", "fa4", "flex", "reference")
    return ("hopper", "triton", "fa4", "flex", "reference")


def load(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ProviderError: for a name that is none.
    """
    if name not in PROVIDERS:
        raise ProviderError(
            f"no provider is called {name!r}; there are auto, {', '.join(PROVIDERS)}",
            hint='provider="auto"',
        )
    return importlib.import_module(f"polyattn_kernels.providers.{name}")
