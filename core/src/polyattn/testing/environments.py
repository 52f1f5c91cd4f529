"""Machines that are not here: the grid of environments and requests on which probes are asked.

The grid holds every platform core knows, one it does not know, GPUs from before and after what most
kernels need, the architectures a spec names itself, and software that is missing or has an odd
version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from polyattn.contract import AttentionRequest, BackendSpec
from polyattn.environment import KNOWN_PLATFORMS, Accelerator, Environment

__all__ = ["UNKNOWN_PLATFORM", "accelerators", "environments", "requests", "whole_requests"]

UNKNOWN_PLATFORM = "polyattn_unknown"
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ROCM_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100")
TORCH_VERSIONS = (None, "2.8.0", "2.13.0a0+git0123abc", "not a version")
REQUIREMENT_VERSIONS = (None, "0.0.1", "2.8.3", "999!1.0", "not a version")


def accelerators(spec: BackendSpec) -> list[Accelerator]:
    """Devices old and new, those the spec names, and some whose architecture is unknown."""
    found = [
        *(Accelerator(platform="cuda", arch=arch) for arch in CUDA_ARCHITECTURES),
        *(Accelerator(platform="rocm", arch=arch) for arch in ROCM_ARCHITECTURES),
        *(Accelerator(platform=platform) for platform in (*KNOWN_PLATFORMS, UNKNOWN_PLATFORM)),
    ]
    for platform, allowed in spec.capabilities.platforms.items():
        named = [*allowed.only, *([allowed.minimum] if allowed.minimum else [])]
        found += [Accelerator(platform=platform, arch=arch) for arch in named]
        found.append(Accelerator(platform=platform))
    return list(dict.fromkeys(found))


def environments(spec: BackendSpec) -> Iterator[Environment]:
    """Every device with every state of the software."""
    for accelerator in accelerators(spec):
        for torch_version in TORCH_VERSIONS:
            for version in REQUIREMENT_VERSIONS:
                yield _machine(spec, accelerator, torch_version, version)


def _machine(
    spec: BackendSpec, accelerator: Accelerator, torch_version: str | None, version: str | None
) -> Environment:
    distributions = {each.distribution: version for each in spec.requirements if version}
    distributions.pop("torch", None)
    if torch_version is not None:
        distributions["torch"] = torch_version
    return Environment(
        accelerator=accelerator,
        torch=torch_version,
        cuda="12.8" if accelerator.platform == "cuda" and torch_version else None,
        hip="6.4" if accelerator.platform == "rocm" and torch_version else None,
        distributions=distributions,
    )


WHOLE = AttentionRequest(
    batch=1,
    query_length=1024,
    key_length=1024,
    heads=8,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    device="cuda",
)


def whole_requests() -> list[AttentionRequest]:
    """Requests in which every fact is known."""
    return [
        WHOLE,
        replace(WHOLE, head_dim=64, dtype="float16"),
        replace(WHOLE, dtype="float32"),
        replace(WHOLE, is_causal=True),
        replace(WHOLE, mask="key_padding"),
        replace(WHOLE, query_length=77, role="cross"),
        replace(WHOLE, grid=(4, 16, 16)),
    ]


def requests() -> list[AttentionRequest]:
    """Requests known in full, in part, and not at all (planning knows only some fields)."""
    return [
        AttentionRequest(),
        AttentionRequest(is_causal=True),
        AttentionRequest(is_causal=True, query_length=77),
        AttentionRequest(head_dim=64),
        AttentionRequest(dtype="float32", mask="additive", needs_lse=True),
        AttentionRequest(role="cross", key_length=120, mask="key_padding"),
        AttentionRequest(heads=8, kv_heads=2, needs_grad=True, scale=0.3),
        AttentionRequest(head_dim=1000, dtype="float16", mask="boolean", grid=(2, 4, 8)),
        *whole_requests(),
    ]
