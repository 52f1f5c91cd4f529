"""Block-sparse attention by torch's FlexAttention, compiled to Triton by torch itself.

The blocks of a plan are passed as *full* blocks, whose scores FlexAttention does not mask; with
lengths they are passed as partial ones, with a mask function that looks the lengths up.

Two of FlexAttention's ways to be wrong are shut out. Run eagerly it looks at the mask function only
and would attend to everything, so it is compiled with ``fullgraph=True``: what cannot be compiled
is an error and never falls back. Its FlashAttention-4 engine (``BACKEND="FLASH"``) gave wrong
results for lists of full blocks and is never asked for.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

import torch

from polyattn_kernels.plan import BlockSparsePlan

__all__ = ["NAME", "reasons", "run"]

NAME = "flex"


def reasons(plan: BlockSparsePlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Why FlexAttention cannot serve these tensors; empty if it can."""
    why = []
    if q.device.type != "cuda":
        why.append(f"runs compiled on CUDA only, found {q.device.type}")
    if torch.__version__ < "2.9":
        why.append(f"needs torch 2.9 or newer, found {torch.__version__}")
    if q.dtype is torch.float64:
        why.append("takes float16, bfloat16 and float32, found float64")
    if q.shape[-1] < 16:
        why.append(f"takes head dimensions from 16, found {q.shape[-1]}")
    for side in ("query", "key"):
        block = getattr(plan, f"{side}_block")
        if block is None or block % 128:
            found = "variable blocks" if block is None else f"blocks of {block}"
            why.append(f"takes uniform {side} blocks of multiples of 128, found {found}")
        if getattr(plan, f"{side}_permutation") is not None:
            why.append(f"takes no {side} permutation")
    if plan.key_lengths is not None and plan.key_lengths.shape[1] > 1 and q.shape[2] != k.shape[2]:
        why.append("takes no key lengths per query head where query heads share keys")
    return why


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :class:`~polyattn_kernels.providers.Provider`."""
    if plan.key_lengths is not None:
        # Hidden keys get weight zero, but zero times NaN is NaN: their values must be finite.
        padding = (plan.blocks_of_positions("key") < 0).mT.unsqueeze(-1)
        v = v.masked_fill(padding, 0)
    tensors = [q, k, v, *plan.tensors().values()]
    configuration = (
        plan.query_block,
        plan.key_block,
        tuple(plan.tensors()),
        return_lse,
        q.device,
        q.dtype,
        tuple((tuple(each.shape), each.stride()) for each in tensors),
    )
    attend = _compiled(configuration)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    result = attend(q, k, v, _block_mask(plan), scale, return_lse)
    out, lse = (result[0], result[1].lse) if return_lse else (result, None)
    out = out.transpose(1, 2)
    if plan.query_lengths is not None:
        # Nor may NaN in a value that the tokens of a block see reach the block's other rows.
        out = out.masked_fill((plan.blocks_of_positions("query") < 0).mT.unsqueeze(-1), 0)
    return out, lse


@lru_cache(maxsize=64)
def _compiled(configuration: tuple[Any, ...]) -> Any:
    """FlexAttention compiled for one combination of shapes and dtype.

    torch counts the compilations of a function by its code object and gives up after a few, so
    every combination gets a code object of its own.
    """
    from torch.nn.attention import flex_attention

    function: Any = flex_attention.flex_attention  # its overloads do not tell a choice made late
    aux = flex_attention.AuxRequest(lse=True)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: Any, scale: float, lse: bool
    ) -> Any:
        return function(
            q,
            k,
            v,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # not its kernels for decoding
            return_aux=aux if lse else None,
        )

    code = attend.__code__.replace(co_name=f"attend_{abs(hash(configuration))}")
    own = FunctionType(code, attend.__globals__, code.co_name, None, attend.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _block_mask(plan: BlockSparsePlan) -> Any:
    """The plan as FlexAttention's ``BlockMask``, without lists of queries per key block."""
    from torch.nn.attention.flex_attention import BlockMask

    # The kernel finds both by one offset, so they must be shared over the same dimensions.
    counts, indices = plan.key_counts, plan.key_indices
    batch = max(counts.shape[0], indices.shape[0])
    heads = max(counts.shape[1], indices.shape[1])
    counts = counts.expand(batch, heads, -1).contiguous()
    indices = indices.expand(batch, heads, -1, -1).contiguous()
    none = torch.zeros_like(counts), torch.zeros_like(indices)
    lists: tuple[torch.Tensor, ...]
    if plan.query_lengths is None and plan.key_lengths is None:
        lists, mask_mod = (*none, counts, indices), None
    else:
        lists, mask_mod = (counts, indices, *none), _within_lengths(plan)
    return BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=(plan.query_block or 0, plan.key_block or 0),
        mask_mod=mask_mod,
        seq_lengths=(plan.query_length, plan.key_length),
        compute_q_blocks=False,
    )


def _within_lengths(plan: BlockSparsePlan) -> Any:
    """FlexAttention's mask function for a plan with lengths: both rows are tokens."""
    assert plan.query_block is not None
    assert plan.key_block is not None
    sides = []
    for block, lengths in (
        (plan.query_block, plan.query_lengths),
        (plan.key_block, plan.key_lengths),
    ):
        if lengths is None:
            # One entry that every row of every block is below.
            lengths = torch.full((1, 1, 1), block, dtype=torch.int32, device=plan.device)
        sides.append((block, lengths))
    (query_block, query_lengths), (key_block, key_lengths) = sides

    def seen(lengths: torch.Tensor, batch: Any, head: Any, row: Any, block: Any) -> Any:
        batches, heads, blocks = lengths.shape
        return (
            row % block
            < lengths[
                batch if batches > 1 else 0,
                head if heads > 1 else 0,
                row // block if blocks > 1 else 0,
            ]
        )

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return seen(query_lengths, batch, head, query, query_block) & seen(
            key_lengths, batch, head, key, key_block
        )

    return mask_mod
