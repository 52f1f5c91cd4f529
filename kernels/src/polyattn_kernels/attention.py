"""Block-sparse attention: one function, several kernels behind it, and the choice among them.

What is fixed here holds for every provider: which arguments are accepted, that a scale of any sign
is right, that the result is contiguous and shares no memory with the arguments, and that a compiled
graph holds one opaque operator whose body reads the plan when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polyattn_kernels.errors import AttentionInputError, ProviderError
from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers import automatic_order, load

__all__ = ["ProviderChoice", "block_sparse_attention", "which_provider"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_CHANNELS = 256
LARGEST_SCALE = torch.finfo(torch.float32).max / math.log2(math.e)


@dataclass(frozen=True)
class ProviderChoice:
    """The provider that ``"auto"`` takes, and why each one tried before it was passed over."""

    name: str
    passed_over: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        others = (f"{name}: {'; '.join(why)}" for name, why in self.passed_over.items())
        return "\n".join([self.name, *(f"  not {each}" for each in others)])


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    provider: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which each block of queries sees only the blocks of keys its plan names.

    Args:
        q: ``[B, Sq, H, D]``, float16, bfloat16, float32 or float64, D up to 256, any strides.
        k: ``[B, Sk, Hkv, D]``; H is a multiple of Hkv, and query head h uses key head
            ``h // (H // Hkv)``.
        v: as k.
        plan: for Sq queries and Sk keys, B batch items or 1, H heads or 1, on the device of q.
            On a GPU its values are trusted, and wrong ones give wrong numbers;
            :meth:`BlockSparsePlan.validate` checks them.
        scale: what scores are multiplied by, any number that float32 holds as a finite one, and its
            product with log2(e) too; ``1 / sqrt(D)`` if None.
        return_lse: also return the log-sum-exp of the scaled scores.
        provider: ``auto``, or one of ``hopper``, ``triton``, ``fa4``, ``flex``, ``reference``,
            which then runs or is an error. :func:`which_provider` tells what ``auto`` does.

    Returns:
        out ``[B, Sq, H, D]`` in the dtype of q, and with ``return_lse`` also lse ``[B, H, Sq]``
        (float32, natural logarithm). A query without keys gives zeros and -inf. Keys and values
        that no query attends to, and rows that are no tokens, may hold NaN.

    Forward only: a call that would have to be differentiated is an error. Works under
    ``torch.compile(fullgraph=True)`` and, after a first call outside, in a CUDA graph.

    Raises:
        AttentionInputError: for tensors that no provider could take, or that need a gradient.
        PlanError: for wrong values in a plan, where the reference runs on a CPU and checks them.
        ProviderError: for a named provider that cannot serve the call, with all its reasons.
    """
    _check_arguments(q, k, v, plan)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if not isinstance(scale, (int, float)):
        raise AttentionInputError(
            f"scale must be a finite number, found {scale!r}", hint="scale=float(...)"
        )
    if not abs(scale) <= LARGEST_SCALE:
        raise AttentionInputError(
            f"scale must be a finite number, and so its product with log2(e) in float32, found "
            f"{scale}"
        )
    scale = float(scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise AttentionInputError(
            "block_sparse_attention is forward only, and q, k or v needs a gradient",
            hint="with torch.no_grad(): ..., or polyattn_kernels.providers.reference.run(q, k, v, "
            f"plan, {scale}, {return_lse}), which is differentiable and slow",
        )
    if torch.compiler.is_compiling() or type(q) is not torch.Tensor:
        tensors = [getattr(plan, name) for name in _PLAN_TENSORS]
        out, lse = _operator(
            q, k, v, *tensors, plan.query_block, plan.key_block, scale, return_lse, provider
        )
    else:
        out, lse = _attend(q, k, v, plan, scale, return_lse, provider)
    return (out, lse) if return_lse else out


def which_provider(
    plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> ProviderChoice:
    """What ``provider="auto"`` takes for these tensors, and why none of those it tries before.

    Attends to nothing. The first time, a provider may import its package, or compile and run a
    small case of its own, which waits for the device.

    Raises:
        AttentionInputError: for tensors that no provider could take.
    """
    _check_arguments(q, k, v, plan)
    return _choose(plan, q, k, v)


def _choose(
    plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> ProviderChoice:
    passed_over: dict[str, tuple[str, ...]] = {}
    for name in automatic_order(q.device.type, plan, q.shape[-1]):
        why = load(name).reasons(plan, q, k, v)
        if not why:
            return ProviderChoice(name, passed_over)
        passed_over[name] = tuple(why)
    raise AssertionError(f"the last provider refused: {passed_over}")


def _check_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan
) -> None:
    if not isinstance(plan, BlockSparsePlan):
        raise AttentionInputError(f"plan must be a BlockSparsePlan, found {type(plan).__name__}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise AttentionInputError(f"{name} must be a tensor, found {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise AttentionInputError(
                f"{name} must be [batch, tokens, heads, channels], found {list(tensor.shape)}"
            )
        if tensor.dtype is not q.dtype or tensor.dtype not in DTYPES:
            raise AttentionInputError(
                "q, k and v must share one dtype of float16, bfloat16, float32 and float64, found "
                f"{q.dtype}, {k.dtype}, {v.dtype}"
            )
        if tensor.device != plan.device:
            raise AttentionInputError(
                f"{name} is on {tensor.device}, the plan on {plan.device}",
                hint="build the plan on the device of q",
            )
    batch, queries, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise AttentionInputError(
            f"q [B, Sq, H, D], k and v [B, Sk, Hkv, D] do not fit together: {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}"
        )
    lengths = (plan.query_length, plan.key_length)
    if (queries, k.shape[1]) != lengths:
        transposed = (heads, k.shape[2]) == lengths
        raise AttentionInputError(
            f"the plan is for {lengths[0]} queries and {lengths[1]} keys, found {queries} and "
            f"{k.shape[1]}",
            hint="q.transpose(1, 2), and k and v likewise" if transposed else None,
        )
    if not 1 <= dim <= MOST_CHANNELS:
        raise AttentionInputError(f"head dimension must be 1 to {MOST_CHANNELS}, found {dim}")
    if batch < 1 or k.shape[2] < 1 or heads % k.shape[2] or heads < 1:
        raise AttentionInputError(
            f"there must be a batch item, and query heads a multiple of key heads: batch {batch}, "
            f"{heads} query heads, {k.shape[2]} key heads"
        )
    if plan.batch not in (1, batch) or plan.heads not in (1, heads):
        raise AttentionInputError(
            f"the plan has {plan.batch} batch items and {plan.heads} heads; q has {batch} and "
            f"{heads} (1 in a plan is shared by all)"
        )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
    provider: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The call itself; returns an empty lse where none was asked for, as operators must."""
    if provider == "auto":
        chosen = load(_choose(plan, q, k, v).name)
    else:
        chosen = load(provider)
        why = chosen.reasons(plan, q, k, v)
        if why:
            raise ProviderError(
                f"provider {provider!r} cannot serve {plan} with q {list(q.shape)}, k "
                f"{list(k.shape)}, {q.dtype}: {'; '.join(why)}",
                hint='provider="auto"',
            )
    # Kernels find a row's maximum before they scale it, and hide keys by scores of -inf: both are
    # right for positive scales only.
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = q * 0, 1.0
    with torch.no_grad():
        out, lse = chosen.run(q, k, v, plan, scale, return_lse)
    return out.contiguous(), q.new_empty(
        0, dtype=torch.float32
    ) if lse is None else lse.contiguous()


_PLAN_TENSORS = (
    "key_counts",
    "key_indices",
    "query_offsets",
    "key_offsets",
    "query_lengths",
    "key_lengths",
    "query_permutation",
    "key_permutation",
)


@torch.library.custom_op("polyattn_kernels::block_sparse_attention", mutates_args=())
def _operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_counts: torch.Tensor,
    key_indices: torch.Tensor,
    query_offsets: torch.Tensor | None,
    key_offsets: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    query_permutation: torch.Tensor | None,
    key_permutation: torch.Tensor | None,
    query_block: int | None,
    key_block: int | None,
    scale: float,
    return_lse: bool,
    provider: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = BlockSparsePlan(
        query_length=q.shape[1],
        key_length=k.shape[1],
        query_block=query_block,
        key_block=key_block,
        key_counts=key_counts,
        key_indices=key_indices,
        query_offsets=query_offsets,
        key_offsets=key_offsets,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_permutation=query_permutation,
        key_permutation=key_permutation,
    )
    return _attend(q, k, v, plan, scale, return_lse, provider)


@_operator.register_fake
def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_counts: torch.Tensor,
    key_indices: torch.Tensor,
    query_offsets: torch.Tensor | None,
    key_offsets: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    query_permutation: torch.Tensor | None,
    key_permutation: torch.Tensor | None,
    query_block: int | None,
    key_block: int | None,
    scale: float,
    return_lse: bool,
    provider: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    lse = (batch, heads, queries) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)
