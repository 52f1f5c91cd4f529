"""Whether the Triton kernels of this package can run here; imports Triton only to launch one.

``provider="auto"`` takes Triton on a GPU and torch everywhere else. ``"torch"`` and ``"triton"``
are obeyed or refused, never replaced.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

from polyattn_kernels.errors import ProviderError

__all__ = [
    "TESTED_TRITON",
    "choose_provider",
    "is_tested_triton",
    "triton_reasons",
    "triton_version",
]

TESTED_TRITON = ("3.6",)  # with which Triton's experimental parts were run on a GPU


def triton_reasons(*tensors: torch.Tensor, interpretable: bool = True) -> list[str]:
    """Why Triton cannot serve these tensors (empty = it can). No host synchronisation.

    ``interpretable=False`` is for kernels that Triton's interpreter cannot run: tensors on a CPU
    are then no matter of this function.
    """
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed; pip install triton")
    device = tensors[0].device.type
    if interpretable and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(
            f"Triton kernels need CUDA or ROCm tensors, found {device}; set TRITON_INTERPRET=1 "
            "before the first import of Triton to interpret them on the CPU"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reasons.append("the Triton kernels have no gradient; use torch.no_grad() or the torch path")
    if tensors[0].dtype is torch.float64:
        reasons.append("the Triton kernels accumulate in float32, found float64")
    return reasons


def choose_provider(provider: str, *tensors: torch.Tensor) -> str:
    """``"torch"`` or ``"triton"`` for ``provider``, which may also be ``"auto"``.

    ProviderError when the named provider is unknown or cannot serve the tensors.
    """
    if provider == "torch":
        return "torch"
    if provider == "auto":
        usable = tensors[0].device.type == "cuda" and not triton_reasons(*tensors)
        return "triton" if usable else "torch"
    if provider != "triton":
        raise ProviderError(f'provider must be "auto", "torch" or "triton", found {provider!r}')
    reasons = triton_reasons(*tensors)
    if reasons:
        raise ProviderError(f'provider="triton" cannot run: {"; ".join(reasons)}')
    return "triton"


@functools.lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The installed release, from the metadata of either name it is published under."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_tested_triton() -> bool:
    """Whether the installed release is one that Triton's experimental parts were run with."""
    version = triton_version()
    return version is not None and version.startswith(tuple(f"{each}." for each in TESTED_TRITON))
