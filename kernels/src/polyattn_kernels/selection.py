"""From scores of key blocks to the ascending lists that a plan holds.

Three rules: the k best, the smallest set with a given share of the softmax mass, and all at or
above a threshold. They share what is easy to get wrong. Of equal scores the lowest block number
goes first. A block whose score is -inf or NaN, or whose size is 0, is never selected, so a row may
get fewer blocks than asked for, or none; ``checked=True`` refuses NaN instead, at the price of a
host synchronisation. Nothing else waits for the device, and equal inputs give equal lists. Scores
are compared in float32 (float64 if they are): half precision would tie blocks that differ.

Scores are ``[B, H, Mq, Mk]``; sizes of key blocks are int32 ``[B|1, H|1, Mk]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from polyattn_kernels._triton_support import choose_provider
from polyattn_kernels.errors import AttentionInputError, ProviderError, require_int

__all__ = ["BlockSelection", "select_threshold", "select_top_k", "select_top_p"]

# A Triton program holds one row of scores in registers.
LONGEST_TRITON_ROW = 8192


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The key blocks of every query block; fields as in a plan, int32."""

    key_indices: torch.Tensor
    """``[B, H, Mq, capacity]``, ascending; entries past the count are 0."""
    key_counts: torch.Tensor
    """``[B, H, Mq]``."""
    num_key_blocks: int
    """Mk."""

    def to_mask(self) -> torch.Tensor:
        """Boolean ``[B, H, Mq, Mk]``; no host synchronisation."""
        capacity = self.key_indices.shape[-1]
        listed = torch.arange(capacity, device=self.key_counts.device) < self.key_counts[..., None]
        # One column more takes the entries past the count.
        column = torch.where(listed, self.key_indices.long(), self.num_key_blocks)
        shape = (*self.key_counts.shape, self.num_key_blocks + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=column.device)
        return mask.scatter_(-1, column, True)[..., :-1]


def select_top_k(
    scores: torch.Tensor,
    k: int,
    *,
    key_sizes: torch.Tensor | None = None,
    provider: str = "auto",
    checked: bool = False,
) -> BlockSelection:
    """The k blocks of highest score in each row, all of them where k exceeds Mk."""
    require_int("k", k)
    rule = _Rule("top_k", 0.0, k, k)
    return _select(scores, rule, key_sizes, weighted=False, provider=provider, checked=checked)


def select_top_p(
    scores: torch.Tensor,
    p: float,
    *,
    key_sizes: torch.Tensor | None = None,
    weighted: bool = True,
    minimum_ratio: float = 0.0,
    minimum_count: int = 1,
    maximum_count: int | None = None,
    provider: str = "auto",
    checked: bool = False,
) -> BlockSelection:
    """The smallest set of blocks that holds at least the share p of each row's softmax mass.

    The mass of block j is ``size_j * exp(score_j)`` over the row's sum, as SVG2 (arXiv 2505.18875)
    weighs clusters; the size drops out without key_sizes or with ``weighted=False``. Blocks are
    taken by falling mass, so the block that crosses p is the last one in; p = 1 takes every
    block that can be selected.

    Args:
        scores: logits, the scale already applied.
        p: in (0, 1].
        minimum_ratio: at least ``int(minimum_ratio * Mk)`` blocks, in [0, 1].
        minimum_count: at least this many blocks.
        maximum_count: at most this many, the heaviest; also the capacity of the lists, which is
            Mk otherwise.
    """
    if not 0 < p <= 1:
        raise AttentionInputError(f"p must lie in (0, 1], found {p}")
    if not 0 <= minimum_ratio <= 1:
        raise AttentionInputError(f"minimum_ratio must lie in [0, 1], found {minimum_ratio}")
    _check_counts(minimum_count, maximum_count)
    minimum = max(minimum_count, int(minimum_ratio * scores.shape[-1]))
    if maximum_count is not None and minimum > maximum_count:
        raise AttentionInputError(
            f"minimum_ratio={minimum_ratio} asks for at least {minimum} of {scores.shape[-1]} "
            f"blocks, maximum_count for at most {maximum_count}"
        )
    rule = _Rule("top_p", p, minimum, maximum_count)
    return _select(scores, rule, key_sizes, weighted=weighted, provider=provider, checked=checked)


def select_threshold(
    scores: torch.Tensor,
    threshold: float,
    *,
    key_sizes: torch.Tensor | None = None,
    minimum_count: int = 0,
    maximum_count: int | None = None,
    provider: str = "auto",
    checked: bool = False,
) -> BlockSelection:
    """The blocks whose score is at least the threshold.

    A row gets its ``minimum_count`` best blocks in any case and at most its ``maximum_count``
    best, which is also the capacity of the lists (Mk if None).
    """
    if math.isnan(threshold):
        raise AttentionInputError("threshold must be a number, found nan")
    _check_counts(minimum_count, maximum_count)
    rule = _Rule("threshold", threshold, minimum_count, maximum_count)
    return _select(scores, rule, key_sizes, weighted=False, provider=provider, checked=checked)


@dataclass(frozen=True)
class _Rule:
    """A rule gives each row a number of blocks, held between two bounds; the best that many win."""

    name: str
    value: float
    minimum: int
    maximum: int | None


def _select(
    scores: torch.Tensor,
    rule: _Rule,
    key_sizes: torch.Tensor | None,
    *,
    weighted: bool,
    provider: str,
    checked: bool,
) -> BlockSelection:
    _check(scores, key_sizes)
    if checked and bool(scores.isnan().any()):
        place = scores.isnan().nonzero()[0].tolist()
        raise AttentionInputError(
            f"the score of [batch, head, query block, key block] {place} is NaN"
        )
    blocks = scores.shape[-1]
    capacity = blocks if rule.maximum is None else min(rule.maximum, blocks)
    minimum = min(rule.minimum, capacity)
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    if provider == "triton" and blocks > LONGEST_TRITON_ROW:
        raise ProviderError(
            f'provider="triton" selects among up to {LONGEST_TRITON_ROW} key blocks, found {blocks}'
        )
    # Lists of block numbers have no gradient, whatever the scores came from.
    scores = scores.detach()
    if choose_provider(provider, scores) == "triton" and blocks <= LONGEST_TRITON_ROW:
        from polyattn_kernels._selection_kernel import select_blocks

        indices, counts = select_blocks(
            scores, key_sizes, weighted, rule.name, rule.value, minimum, capacity
        )
        return BlockSelection(indices, counts, blocks)
    logits = scores.masked_fill(scores.isnan(), float("-inf"))
    if key_sizes is not None:
        sizes = key_sizes[:, :, None]
        if weighted:
            logits = logits + sizes.to(logits.dtype).log()
        logits = logits.masked_fill(sizes <= 0, float("-inf"))
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    selectable = (ordered > float("-inf")).sum(-1)
    if rule.name == "top_p":
        wanted = _blocks_of_mass(ordered, rule.value, selectable)
    elif rule.name == "threshold":
        wanted = ((ordered >= rule.value) & (ordered > float("-inf"))).sum(-1)
    else:
        wanted = selectable
    counts = wanted.clamp(minimum, capacity).minimum(selectable)
    best = torch.arange(blocks, device=scores.device) < counts[..., None]
    chosen = torch.where(best, order, blocks)[..., :capacity].sort(-1).values
    return BlockSelection(_ascending(chosen, counts, capacity), counts.int(), blocks)


def _blocks_of_mass(ordered: torch.Tensor, p: float, selectable: torch.Tensor) -> torch.Tensor:
    """How many of the falling logits it takes to hold the share p of their mass."""
    if p == 1 or not ordered.shape[-1]:  # rounding must not drop the lightest blocks
        return selectable
    # Infinite scores share the mass evenly; a row without a selectable block has none.
    bounded = ordered.clamp_max(torch.finfo(ordered.dtype).max)
    mass = (bounded - bounded[..., :1]).exp().masked_fill(ordered == float("-inf"), 0)
    reached = mass.cumsum(-1)
    # The block that crosses is in: count the blocks that leave something to be reached.
    return (reached < p * reached[..., -1:]).sum(-1) + 1


def _ascending(chosen: torch.Tensor, counts: torch.Tensor, capacity: int) -> torch.Tensor:
    """The first ``counts`` of sorted block numbers as int32 lists, 0 past the count."""
    listed = torch.arange(capacity, device=chosen.device) < counts[..., None]
    return torch.where(listed, chosen[..., :capacity], 0).int()


def _check_counts(minimum_count: int, maximum_count: int | None) -> None:
    require_int("minimum_count", minimum_count, 0)
    if maximum_count is None:
        return
    require_int("maximum_count", maximum_count)
    if maximum_count < minimum_count:
        raise AttentionInputError(
            f"maximum_count must not be below minimum_count, found {maximum_count} and "
            f"{minimum_count}"
        )


def _check(scores: torch.Tensor, key_sizes: torch.Tensor | None) -> None:
    if scores.dim() != 4 or not scores.dtype.is_floating_point:
        raise AttentionInputError(
            "scores must be floating point [B, H, Mq, Mk], found "
            f"{scores.dtype} {list(scores.shape)}"
        )
    if key_sizes is None:
        return
    batch, heads, _, blocks = scores.shape
    shape = key_sizes.shape
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if key_sizes.dtype is not torch.int32 or not fits or shape[2] != blocks:
        raise AttentionInputError(
            f"key_sizes must be int32 [B|1, H|1, Mk] with B={batch}, H={heads} and Mk={blocks}, "
            f"found {key_sizes.dtype} {list(shape)}"
        )
    if key_sizes.device != scores.device:
        raise AttentionInputError(
            f"key_sizes is on {key_sizes.device} and scores on {scores.device}",
            hint="key_sizes.to(scores.device)",
        )
