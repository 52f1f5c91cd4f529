"""``sparse_video_gen_2_attn``: the semantic clusters of Sparse VideoGen 2 (arXiv 2505.18875).

For every batch item and head by itself:

1. k-means clusters the video's queries and, apart from them, its keys. A layer's first call in a
   run starts from seeded random tokens, later ones from its own last centroids.
2. A cluster of queries estimates the softmax mass of cluster j of keys as n_j * exp(scale * cq.cj),
   from centroids c and sizes n, in float32 or wider, and takes the heaviest clusters until it has
   ``top_p_kmeans`` of the mass, or more if ``min_kc_ratio`` asks for it.
3. Its queries attend to the tokens of these clusters, and to the text.

What is text or hidden is not clustered. Visible text is seen by every query; text queries, and
queries of hidden tokens, see every visible key. Hidden tokens, whatever they hold, reach nothing
but their own rows. A NaN in a visible token comes out as NaN, as from dense attention.

``variant="tiled"`` is not the paper's method: the tokens, sorted by cluster, are cut into tiles of
equal size, and step 2 chooses tiles by the means of tiles. It wastes nothing on uniform kernels.

Nothing here waits for the device. What a run remembers is in its forward context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from polyattn.context import ForwardContext
from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn.video import VideoSequence, video_sequence
from polyattn_kernels import (
    BlockSelection,
    BlockSparsePlan,
    TokenGroups,
    block_sparse_attention,
    gather_tokens,
    group_by_label,
    inverse_permutation,
    kmeans,
    plan_from_groups,
    pool_blocks,
    select_top_p,
    which_provider,
)
from polyattn_svg2.config import Svg2Config

__all__ = ["build"]

MEMORY = "svg2"  # where a layer's memory is in the context's state
TILE_SIZE = 128

Result: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"


def build(
    config: Svg2Config, request: AttentionRequest, environment: Environment
) -> Implementation:
    """SVG2 with these parameters.

    The implementation takes q ``[B, S, H, D]``, k and v ``[B, S, Hkv, D]`` of a sequence
    ``[text before | T * H * W | text after]`` and returns out, or out and the log-sum-exp over the
    attended keys. It raises InputError for a grid or text that are not those of the tensors.
    """
    attend = _attend_to_clusters if config.variant == "exact" else _attend_to_tiles

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> Result:
        sequence = video_sequence(q, k, call)
        assert call.context is not None
        queries, keys, start = _cluster_both(q, k, sequence, call.context, config)
        result, facts = attend(q, k, v, call, sequence, queries, keys, config)
        call.facts = {
            "variant": config.variant,
            "query_clusters": queries.occupied(),
            "key_clusters": keys.occupied(),
            "centroids": start,
            **facts,
        }
        return result

    return attention


# --- clusters -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Clusters:
    """One side's tokens. C clusters of the video come first; if there is text or a hidden token,
    three groups follow: hidden tokens of the video, visible text, hidden text."""

    centroids: torch.Tensor
    """``[B, C, H, D]``; NaN where there were fewer visible tokens than clusters."""
    groups: TokenGroups
    """All S tokens by cluster: C or C + 3 groups."""

    @property
    def count(self) -> int:
        """C."""
        return self.centroids.shape[1]

    @property
    def sizes(self) -> torch.Tensor:
        """int32 ``[B, H, C]``: tokens of each cluster."""
        return self.groups.sizes[..., : self.count]

    def occupied(self) -> torch.Tensor:
        """Clusters that have a token, in the mean over heads: a number on the device."""
        return (self.sizes > 0).sum(-1).float().mean()


@dataclass(frozen=True, eq=False)
class _Memory:
    """A layer's centroids ``[B, C, H, D]`` after its last call, and what they were made for.

    In the dtype of q and k, to which k-means rounds centroids before it compares with them.
    """

    made_for: tuple[Any, ...]
    queries: torch.Tensor
    keys: torch.Tensor


def _cluster_both(
    q: torch.Tensor,
    k: torch.Tensor,
    sequence: VideoSequence,
    context: ForwardContext,
    config: Svg2Config,
) -> tuple[_Clusters, _Clusters, str]:
    """Clusters of queries and of keys, and where their centroids came from, in words."""
    counts = tuple(
        min(number, sequence.video) for number in (config.num_q_centroids, config.num_k_centroids)
    )
    masked = sequence.visible is not None
    made_for = (q.shape, k.shape, q.dtype, q.device, sequence.grid, counts, masked)
    memory: _Memory | None = None
    start = "new"
    if context.layer is None:
        # Layers that do not say which they are would continue each other's clusters.
        start = "new (layer unknown)"
    else:
        memory = context.state.get(MEMORY)
        if memory is not None and memory.made_for == made_for:
            start = "kept"
        elif memory is not None:
            memory, start = None, "new (shape changed)"
    iterations = config.kmeans_iter_init if memory is None else config.kmeans_iter_step
    queries, keys = (
        _cluster(tokens, count, kept, iterations, config.seed, sequence)
        for tokens, count, kept in (
            (q, counts[0], None if memory is None else memory.queries),
            (k, counts[1], None if memory is None else memory.keys),
        )
    )
    if context.layer is not None:
        context.state[MEMORY] = _Memory(
            made_for, queries.centroids.to(q.dtype), keys.centroids.to(k.dtype)
        )
    return queries, keys, start


def _cluster(
    tokens: torch.Tensor,
    count: int,
    kept: torch.Tensor | None,
    iterations: int,
    seed: int,
    sequence: VideoSequence,
) -> _Clusters:
    """Clusters of the video in tokens ``[B, S, H, D]``, from kept centroids or random tokens."""
    video = slice(sequence.text_before, sequence.text_before + sequence.video)
    x = tokens[:, video]
    ranking = _random_order(sequence.video, seed, x.device)
    if sequence.visible is None:
        start = x.index_select(1, ranking[:count]) if kept is None else kept
        found = kmeans(x, start, iterations)
        labels, centroids = found.labels, found.centroids
        if not sequence.text:
            return _Clusters(centroids, found.groups)
    else:
        # To k-means a token of NaN is near to nothing, and then gets the label 0: with a centroid
        # of NaN put first, that label is the hidden tokens' own.
        hidden = ~sequence.visible[:, video]
        x = x.masked_fill(hidden[..., None, None], float("nan"))
        start = _first_visible(x, hidden, ranking, count)
        if kept is not None:
            start = torch.where(kept.isnan(), start, kept)
        nowhere = torch.full_like(start[:, :1], float("nan"))
        found = kmeans(x, torch.cat([nowhere, start], 1), iterations)
        labels = torch.where(hidden[:, None], count, (found.labels - 1).clamp_min(0))
        centroids = found.centroids[:, 1:]
    labels = F.pad(labels, (sequence.text_before, sequence.text_after), value=count + 1)
    visible = sequence.visible_keys(x.device)
    if visible is not None:
        labels = torch.where((labels == count + 1) & ~visible[:, None], count + 2, labels)
    return _Clusters(centroids, group_by_label(labels, count + 3))


@lru_cache(maxsize=32)
def _random_order(tokens: int, seed: int, device: torch.device) -> torch.Tensor:
    """A seeded permutation, drawn on the CPU: the same on every device and for any set of heads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator).to(device)


def _first_visible(
    x: torch.Tensor, hidden: torch.Tensor, ranking: torch.Tensor, count: int
) -> torch.Tensor:
    """The first ``count`` visible tokens in the order of ``ranking``, then hidden ones.

    x ``[B, V, H, D]``, hidden bool ``[B | 1, V]``; returns ``[B, count, H, D]``.
    """
    later = hidden[:, ranking].int().argsort(dim=1, stable=True)
    drawn = ranking[later[:, :count]]
    return x.gather(1, drawn[:, :, None, None].expand(x.shape[0], -1, *x.shape[2:]))


# --- selection ------------------------------------------------------------------------------------


def _select(
    queries: torch.Tensor,
    keys: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    config: Svg2Config,
) -> BlockSelection:
    """The key blocks of each query block, by the mass that their means and sizes promise.

    queries ``[B, Mq, H, D]`` and keys ``[B, Mk, Hkv, D]`` are float32 or float64, key_sizes int32
    ``[B | 1, Hkv | 1, Mk]``.
    """
    batch, blocks, heads, width = queries.shape
    kv_heads = keys.shape[2]
    # The query heads that share a key head are rows of one matrix.
    rows = queries.transpose(1, 2).reshape(batch, kv_heads, -1, width)
    scores = (rows @ keys.permute(0, 2, 3, 1)).view(batch, heads, blocks, -1) * scale
    # A mean is NaN if a token is: then it counts most, so that NaN is not lost on the way.
    scores = scores.masked_fill(scores.isnan(), float("inf"))
    if key_sizes.shape[1] not in (1, heads):
        key_sizes = key_sizes.repeat_interleave(heads // kv_heads, dim=1)
    return select_top_p(
        scores, config.top_p_kmeans, key_sizes=key_sizes, minimum_ratio=config.min_kc_ratio
    )


# --- the two variants -----------------------------------------------------------------------------


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan, call: AttentionCall
) -> tuple[Result, dict[str, Any]]:
    """Attention by the plan, and what the report says of it."""
    facts = {"density": plan.density(), "provider": which_provider(plan, q, k, v).name}
    result = block_sparse_attention(q, k, v, plan, scale=call.scale, return_lse=call.return_lse)
    return result, facts


def _attend_to_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    sequence: VideoSequence,
    queries: _Clusters,
    keys: _Clusters,
    config: Svg2Config,
) -> tuple[Result, dict[str, Any]]:
    """The paper's attention: blocks are the clusters, of any size."""
    chosen = _select(queries.centroids, keys.centroids, keys.sizes, call.scale, config)
    selection: BlockSelection | torch.Tensor = chosen
    if keys.groups.num_groups > keys.count:
        seen = q.new_ones(
            (*q.shape[:3:2], queries.groups.num_groups, keys.groups.num_groups), dtype=torch.bool
        )
        seen[..., : queries.count, : keys.count] = chosen.to_mask()
        seen[..., keys.count] = False
        seen[..., keys.count + 2] = False
        selection = seen
    plan = plan_from_groups(queries.groups, keys.groups, selection)
    result, facts = _attend(q, k, v, plan, call)
    visible = sequence.visible_keys(q.device)
    if visible is not None:  # to the plan hidden keys are keys, which nobody attends to
        facts["density"] = facts["density"] / visible.double().mean().clamp_min(1e-12)
    return result, facts


def _attend_to_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    sequence: VideoSequence,
    queries: _Clusters,
    keys: _Clusters,
    config: Svg2Config,
) -> tuple[Result, dict[str, Any]]:
    """Equal tiles of the tokens sorted by cluster, text in tiles of its own after them."""
    tile = config.tile_size or TILE_SIZE
    # The last tile of the video is filled up with rows that are no tokens where text follows it.
    filling = -sequence.video % tile if sequence.text else 0
    query_rows, key_rows = (
        torch.cat(
            [
                F.pad(side.groups.permutation[..., : sequence.video], (0, filling), value=-1),
                side.groups.permutation[..., sequence.video :],
            ],
            dim=-1,
        )
        for side in (queries, keys)
    )
    q_walk = gather_tokens(q, query_rows)
    k_walk, v_walk = (gather_tokens(each, key_rows) for each in (k, v))
    rows = q_walk.shape[1]
    video_tiles = -(-sequence.video // tile)
    visible = sequence.visible_keys(q.device)
    # Within the video and within the text, hidden tokens come last.
    all_tokens = _tile_lengths(sequence, tile, None, q.device)
    shown = all_tokens if visible is None else _tile_lengths(sequence, tile, visible, q.device)
    shown_in_video = shown[..., :video_tiles]
    means = []
    for walk in (q_walk, k_walk):
        video_rows = walk[:, : sequence.video + filling]
        dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        means.append(pool_blocks(video_rows, block=tile, lengths=shown_in_video, dtype=dtype)[0])
    chosen = _select(means[0], means[1], shown_in_video, call.scale, config)
    tiles = all_tokens.shape[-1]
    seen = q.new_ones((q.shape[0], q.shape[2], tiles, tiles), dtype=torch.bool)
    # A tile of hidden tokens only has no mean to choose by, and sees every visible key.
    blank = (shown_in_video == 0)[..., None]
    seen[..., :video_tiles, :video_tiles] = chosen.to_mask() | blank
    plan = BlockSparsePlan.from_mask(
        seen,
        query_length=rows,
        key_length=rows,
        query_block=tile,
        key_block=tile,
        # Lengths that only say what the sequence's end says anyway keep some kernels away.
        query_lengths=all_tokens if filling else None,
        key_lengths=shown if filling or visible is not None else None,
    )
    result, facts = _attend(q_walk, k_walk, v_walk, plan, call)
    facts["tile_size"] = tile
    place = inverse_permutation(queries.groups.permutation)
    if filling:
        place = torch.where(place < sequence.video, place, place + filling)
    if isinstance(result, torch.Tensor):
        return gather_tokens(result, place), facts
    out, lse = result
    return (gather_tokens(out, place), lse.gather(-1, place.long())), facts


def _tile_lengths(
    sequence: VideoSequence, tile: int, visible: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Tokens (visible ones only, if that is given) in each tile: int32 ``[B | 1, 1, tiles]``."""
    if visible is None:
        visible = torch.ones(1, sequence.length, dtype=torch.bool, device=device)
    video = slice(sequence.text_before, sequence.text_before + sequence.video)
    in_video = visible[:, video].sum(-1, keepdim=True)
    lengths = []
    for tokens, count in (
        (sequence.video, in_video),
        (sequence.text, visible.sum(-1, keepdim=True) - in_video),
    ):
        begins = torch.arange(0, tokens, tile, device=device)
        lengths.append((count - begins).clamp(0, tile))
    return torch.cat(lengths, -1).int()[:, None]
