"""Batched k-means over tokens, and the plans that clusters make.

Every batch item and head is a problem of its own, clustered by Lloyd's iterations as SVG2 uses
them (arXiv 2505.18875): from given centroids or random tokens, a fixed number of steps, no host
synchronisation, and the same result in every run on the same machine.

The nearest centroid is the one with the largest ``x.c - |c|^2 / 2``; the length of x does not
matter. In half precision a centroid is rounded to x's dtype for that product, and its length is
that of the rounded centroid; products and sums are float32 (float64 for a float64 x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyattn_kernels._triton_support import choose_provider
from polyattn_kernels.errors import AttentionInputError, require_int
from polyattn_kernels.plan import BlockGeometry, BlockSparsePlan
from polyattn_kernels.pooling import pool_blocks
from polyattn_kernels.selection import BlockSelection

__all__ = [
    "KMeans",
    "TokenGroups",
    "assign_to_centroids",
    "group_by_label",
    "kmeans",
    "plan_from_groups",
    "random_centroids",
]

# Scores that the torch path holds at a time: 64 MiB of float32.
SCORE_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Tokens sorted by label, group after group; token order inside a group. int32."""

    permutation: torch.Tensor
    """``[B, H, S]``: the token at each position."""
    offsets: torch.Tensor
    """``[B, H, C + 1]``: where each group begins; the last entry is S."""

    @property
    def sizes(self) -> torch.Tensor:
        """``[B, H, C]``: tokens in each group, possibly 0."""
        return self.offsets.diff(dim=-1)

    @property
    def num_groups(self) -> int:
        """C."""
        return self.offsets.shape[-1] - 1


@dataclass(frozen=True, eq=False)
class KMeans:
    """The result of the last Lloyd iteration.

    Labels were assigned to the centroids *before* the last update, and centroids are the means of
    exactly these labels: sizes, means and members agree with each other, which is what choosing
    blocks by centroid needs. A further assignment (:func:`assign_to_centroids`) may move tokens.
    """

    labels: torch.Tensor
    """int32 ``[B, H, S]``."""
    centroids: torch.Tensor
    """float32 (float64 for a float64 x) ``[B, C, H, D]``; what a warm start takes."""
    groups: TokenGroups
    """The tokens sorted by label."""


def kmeans(
    x: torch.Tensor,
    centroids: torch.Tensor,
    iterations: int,
    *,
    tolerance: float | None = None,
    provider: str = "auto",
) -> KMeans:
    """Lloyd's algorithm on x ``[B, S, H, D]``, separately for each batch item and head.

    One iteration gives every token its nearest centroid (of equally near ones the lowest label),
    then moves each centroid to the mean of its tokens. A cluster without tokens keeps its
    centroid. The number of iterations is fixed, so the device is never waited for.

    Args:
        centroids: ``[B, C, H, D]`` to start from: those of an earlier call, or
            :func:`random_centroids`. Not modified.
        iterations: at least 1.
        tolerance: a problem whose centroids all moved by less than this distance stays as it is in
            the iterations that remain. That settles the result, not the time.
        provider: ``"auto"``, ``"torch"`` or ``"triton"``.

    No gradient flows through clusters. x must be finite: a NaN token gets label 0 and spoils that
    centroid, which then attracts no token but such; other clusters are untouched.

    Raises:
        AttentionInputError: shapes or dtypes that do not fit, iterations below 1, or a tolerance
            that nothing can be below.
    """
    _check_centroids(x, centroids)
    require_int("iterations", iterations)
    if tolerance is not None and not tolerance > 0:
        raise AttentionInputError(f"tolerance must be a distance above 0, found {tolerance}")
    clusters = centroids.shape[1]
    x, centroids = x.detach(), centroids.detach().to(_accumulator(x))
    labels: torch.Tensor | None = None
    settled: torch.Tensor | None = None
    groups = None
    for _ in range(iterations):
        found = assign_to_centroids(x, centroids, provider=provider)
        if labels is not None and settled is not None:
            found = torch.where(settled[..., None], labels, found)
        labels = found
        groups = group_by_label(labels, clusters)
        means, counts = pool_blocks(
            x,
            offsets=groups.offsets,
            permutation=groups.permutation,
            dtype=centroids.dtype,
            provider=provider,
        )
        occupied = (counts > 0).transpose(1, 2)[..., None]
        moved = torch.where(occupied, means, centroids)
        if tolerance is not None:
            # Kept labels have the same means, so that what has settled moves by 0 and stays.
            settled = (moved - centroids).norm(dim=-1).amax(1) < tolerance
        centroids = moved
    assert labels is not None
    assert groups is not None
    return KMeans(labels, centroids, groups)


def random_centroids(
    x: torch.Tensor, clusters: int, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Tokens of x ``[B, S, H, D]`` drawn uniformly with replacement, ``[B, clusters, H, D]``.

    Each batch item and head draws its own. The generator lives on the CPU or on x's device; a
    generator on the CPU with one seed draws the same tokens for every device. float32 (float64 for
    a float64 x).
    """
    if x.dim() != 4 or not x.shape[1]:
        raise AttentionInputError(
            f"x must be [B, S, H, D] with at least one token, found shape {list(x.shape)}"
        )
    require_int("clusters", clusters)
    batch, length, heads, width = x.shape
    device = x.device if generator is None else generator.device
    drawn = torch.randint(length, (batch, clusters, heads), generator=generator, device=device).to(
        x.device
    )
    return x.gather(1, drawn[..., None].expand(-1, -1, -1, width)).to(_accumulator(x))


def assign_to_centroids(
    x: torch.Tensor, centroids: torch.Tensor, *, provider: str = "auto"
) -> torch.Tensor:
    """The nearest of centroids ``[B, C, H, D]`` for each token of x ``[B, S, H, D]``.

    Returns int32 ``[B, H, S]``; of equally near centroids the lowest label. A NaN distance counts
    as infinite, and where all are, the label is 0. Never holds all S * C scores of a head at once
    if they exceed 64 MiB.
    """
    _check_centroids(x, centroids)
    x = x.detach()
    batch, length, heads, _ = x.shape
    accumulator = _accumulator(x)
    rounded = centroids.detach().to(x.dtype).transpose(1, 2).contiguous()
    wide = rounded.to(accumulator)
    half_norms = wide.square().sum(-1) / 2
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x.device)
    if choose_provider(provider, x) == "triton":
        from polyattn_kernels._token_kernels import nearest_centroids

        nearest_centroids(x, rounded, half_norms, labels)
        return labels
    for first, last in token_chunks(length, batch * heads * centroids.shape[1]):
        tokens = x[:, first:last].transpose(1, 2).to(accumulator)
        scores = torch.matmul(tokens, wide.transpose(-1, -2)).sub_(half_norms[:, :, None])
        # argmax takes NaN for the largest number; -inf loses to everything.
        scores.masked_fill_(scores.isnan(), float("-inf"))
        labels[:, :, first:last] = scores.argmax(-1)
    return labels


def token_chunks(length: int, scores_per_token: int) -> list[tuple[int, int]]:
    """Ranges of tokens that have at most SCORE_ELEMENTS scores each, or a single token."""
    step = max(1, SCORE_ELEMENTS // max(1, scores_per_token))
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def group_by_label(labels: torch.Tensor, num_groups: int) -> TokenGroups:
    """Sort tokens by label, keeping token order inside a group.

    labels: integer ``[B, H, S]`` in 0..num_groups - 1 (others make offsets that a plan's
    ``validate`` refuses). Labels of any origin will do, such as clusters plus a group for the
    text. No host synchronisation.
    """
    if labels.dim() != 3 or labels.dtype.is_floating_point:
        raise AttentionInputError(
            f"labels must be integers [B, H, S], found {labels.dtype} {list(labels.shape)}"
        )
    batch, heads, length = labels.shape
    # One sort of all problems: a problem's labels lie behind those of the problem before it.
    problems = batch * heads
    index_dtype = torch.int32 if problems * num_groups < 2**31 else torch.int64
    first_label = torch.arange(problems, dtype=index_dtype, device=labels.device) * num_groups
    keys = labels.reshape(problems, length).to(index_dtype) + first_label[:, None]
    ordered, order = keys.flatten().sort(stable=True)
    boundaries = torch.arange(problems * num_groups + 1, dtype=index_dtype, device=labels.device)
    offsets = torch.searchsorted(ordered, boundaries, out_int32=problems * length < 2**31)
    begins = torch.arange(problems, device=labels.device)[:, None] * length
    starts = offsets[:-1].view(problems, num_groups) - begins
    ends = offsets[1:].view(problems, num_groups)[:, -1:] - begins
    permutation = order.view(problems, length) - begins
    return TokenGroups(
        permutation.int().view(batch, heads, length),
        torch.cat([starts, ends], 1).int().view(batch, heads, num_groups + 1),
    )


def plan_from_groups(
    queries: TokenGroups,
    keys: TokenGroups,
    selection: BlockSelection | torch.Tensor,
    *,
    query_block: int | None = None,
    key_block: int | None = None,
) -> BlockSparsePlan:
    """The plan in which groups of queries attend to the selected groups of keys.

    With block sizes None the blocks are the groups themselves, of any size. With both sizes the
    walk, sorted by group, is cut into uniform tiles regardless of where groups end, and the
    selection is one of tiles: score them on the means that
    ``pool_blocks(x, block=..., permutation=groups.permutation)`` gives. That is another method
    than selecting clusters, cheaper for uniform kernels.

    Args:
        selection: lists from a rule of :mod:`polyattn_kernels.selection`, or a boolean map
            ``[B, H, Mq, Mk]``, True where the query block attends.
        query_block, key_block: tokens of a uniform tile, multiples of 16, or None.

    Keys may have fewer heads than queries (GQA); the plan repeats them. No host synchronisation.

    Raises:
        AttentionInputError: one block size without the other, or a selection of other blocks.
    """
    if (query_block is None) != (key_block is None):
        raise AttentionInputError(
            "give both query_block and key_block for uniform tiles or neither, found "
            f"{query_block} and {key_block}"
        )
    query_length, key_length = queries.permutation.shape[-1], keys.permutation.shape[-1]
    rows = queries.num_groups if query_block is None else -(-query_length // query_block)
    columns = keys.num_groups if key_block is None else -(-key_length // key_block)
    if isinstance(selection, torch.Tensor):
        found = tuple(selection.shape[-2:])
    else:
        found = (selection.key_counts.shape[-1], selection.num_key_blocks)
    if found != (rows, columns):
        raise AttentionInputError(
            f"the selection must be among {rows} query and {columns} key blocks, found "
            f"{' and '.join(map(str, found))}"
        )
    heads = queries.permutation.shape[1]
    geometry: BlockGeometry = {
        "query_block": query_block,
        "key_block": key_block,
        "query_offsets": queries.offsets if query_block is None else None,
        "key_offsets": _per_query_head(keys.offsets, heads) if key_block is None else None,
        "query_permutation": queries.permutation,
        "key_permutation": _per_query_head(keys.permutation, heads),
    }
    if isinstance(selection, torch.Tensor):
        return BlockSparsePlan.from_mask(
            selection, query_length=query_length, key_length=key_length, **geometry
        )
    return BlockSparsePlan.from_selection(
        selection, query_length=query_length, key_length=key_length, **geometry
    )


def _per_query_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat key heads for the query heads that share them; one head is shared as it is."""
    if tensor.shape[1] in (1, heads):
        return tensor
    if heads % tensor.shape[1]:
        raise AttentionInputError(
            f"query heads must be a multiple of key heads, found {heads} and {tensor.shape[1]}"
        )
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _check_centroids(x: torch.Tensor, centroids: torch.Tensor) -> None:
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise AttentionInputError(
            f"x must be floating point [B, S, H, D], found {x.dtype} {list(x.shape)}"
        )
    batch, _, heads, width = x.shape
    shape = centroids.shape
    if len(shape) != 4 or not shape[1] or (shape[0], *shape[2:]) != (batch, heads, width):
        raise AttentionInputError(
            f"centroids must be [B, C, H, D] with B={batch}, H={heads}, D={width} and at least "
            f"one cluster, found shape {list(shape)}"
        )
    if centroids.device != x.device:
        raise AttentionInputError(
            f"centroids are on {centroids.device} and x on {x.device}",
            hint="centroids.to(x.device)",
        )
