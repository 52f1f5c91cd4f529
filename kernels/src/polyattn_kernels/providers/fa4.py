"""Block-sparse attention by FlashAttention 4 (``flash-attn-4``), on compute capability 9.0.

Its function is called by keywords only, since parameters move between its pre-releases. The blocks
of a plan are passed as *full* blocks, beside an empty list of partial ones. FlashAttention 4 walks
a list from its end and looks for the end of the keys in the first block it meets, which is right
because the lists of a plan ascend.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

import torch

from polyattn_kernels.errors import ProviderError
from polyattn_kernels.plan import BlockSparsePlan

__all__ = ["NAME", "reasons", "run"]

NAME = "fa4"

INSTALL = 'pip install "polyattn-kernels[fa4]"'
# The pairs of block sizes its kernels for 9.0 were run with here; 10.x wants query blocks of 256.
BLOCKS = ((128, 128), (64, 64))
MOST_CHANNELS = 128  # above, its key tiles are of sizes that do not divide a block of 128


def reasons(plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Why FlashAttention 4 cannot serve these tensors; empty if it can.

    Only where nothing else stands in the way is the package imported, to learn whether it loads.
    """
    why = []
    if q.device.type != "cuda" or torch.version.hip:  # where 9.0 is the name of another GPU
        why.append(f"runs on CUDA, found {'ROCm' if torch.version.hip else q.device.type}")
    elif (capability := _capability(q.device)) != (9, 0):
        why.append(f"runs on compute capability 9.0, found {capability[0]}.{capability[1]}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        why.append(f"takes float16 and bfloat16, found {str(q.dtype).removeprefix('torch.')}")
    if q.shape[-1] % 8 or q.shape[-1] > MOST_CHANNELS:
        why.append(f"takes head dimensions of 8 to 128 in steps of 8, found {q.shape[-1]}")
    if (plan.query_block, plan.key_block) not in BLOCKS:
        found = f"{plan.query_block or 'variable'} x {plan.key_block or 'variable'}"
        why.append(f"takes blocks of 128 x 128 and 64 x 64, found {found}")
    for field in ("query_lengths", "key_lengths", "query_permutation", "key_permutation"):
        if getattr(plan, field) is not None:
            why.append(f"takes no {field.replace('_', ' ')}")
    package = _package_reason()
    if package is not None:
        why.append(package)
    elif not why and isinstance(functions := _functions(), str):
        why.append(functions)
    return why


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :class:`~polyattn_kernels.providers.Provider`.

    Raises:
        ProviderError: where the package does not load.
    """
    functions = _functions()
    if isinstance(functions, str):
        raise ProviderError(f"provider 'fa4' {functions}", hint=INSTALL)
    attend, block_sparse_tensors = functions
    out, lse = attend(
        _aligned(q),
        _aligned(k),
        _aligned(v),
        softmax_scale=scale,
        causal=False,
        # Packing puts the query heads of a key head into one tile, which has one list of blocks.
        pack_gqa=False,
        block_sparse_tensors=block_sparse_tensors(
            mask_block_cnt=torch.zeros_like(plan.key_counts),
            mask_block_idx=plan.key_indices,  # of a length of zero: never read
            full_block_cnt=plan.key_counts,
            full_block_idx=plan.key_indices,
            block_size=(plan.query_block, plan.key_block),
        ),
        return_lse=return_lse,
    )
    return out, lse if return_lse else None


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def _package_reason() -> str | None:
    """Why the installed package, if any, is not one to call; its metadata alone is read."""
    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return f"needs flash-attn-4, which is not installed ({INSTALL})"
    # Betas before 36 take other arguments. Everything else that starts with 4.0 is newer.
    old_beta = re.match(r"4\.0\.0b(\d+)", version)
    if not version.startswith("4.") or "a" in version or (old_beta and int(old_beta[1]) < 36):
        return f"needs flash-attn-4>=4.0.0b36,<5, found {version} ({INSTALL})"
    return None


@lru_cache(maxsize=1)
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """The package's function and its container for lists of blocks, or why they do not load."""
    try:
        interface = import_module("flash_attn.cute.interface")
        sparsity = import_module("flash_attn.cute.block_sparsity")
        return interface.flash_attn_func, sparsity.BlockSparseTensorsTorch
    except Exception as error:  # whatever a broken package raises
        return (
            f"needs flash-attn-4, which is installed and does not load under torch "
            f"{torch.__version__}: {type(error).__name__}: {error}"
        )


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The kernels read 16 bytes at a time: every row of a head must start at a multiple of that."""
    step = 16 // x.element_size()
    fits = (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % step == 0 for stride in x.stride()[:-1])
    )
    return x if fits else x.contiguous()
