"""SVG2 held against its definition, restated here: numpy in float64, one head and token at a time.

The oracle uses nothing of polyattn. It is given the tokens or centroids that k-means starts from,
and says, token by token, who attends to whom. In float64 no two choices tie, so that the fast path
must come to the very same numbers; in half precision, where they may, what was chosen is held to
the mass it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyattn
from polyattn.reporting import Report, reporting_to

Array: TypeAlias = "np.ndarray[Any, Any]"

# --- the oracle -----------------------------------------------------------------------------------


@dataclass
class Side:
    """One side of one head: the label of each visible token, and the means of the labels."""

    labels: dict[int, int]
    means: Array

    def members(self, label: int) -> list[int]:
        return [token for token, own in self.labels.items() if own == label]


def cluster(x: Array, tokens: list[int], centroids: Array, iterations: int) -> Side:
    """Lloyd's iterations over the rows ``tokens`` of x ``[S, D]``; rows of NaN are no centroid."""
    centroids = centroids.copy()
    labels: dict[int, int] = {}
    for _ in range(iterations):
        labels = {}
        for token in tokens:
            distances = ((x[token] - centroids) ** 2).sum(1)
            distances[np.isnan(distances)] = math.inf
            labels[token] = int(np.argmin(distances))
        for label in set(labels.values()):
            members = [token for token in tokens if labels[token] == label]
            centroids[label] = x[members].mean(0)
    return Side(labels, centroids)


def heaviest(
    query: Array,
    keys: list[Array],
    sizes: list[int],
    scale: float,
    top_p: float,
    at_least: int,
) -> list[int]:
    """The blocks that a query block takes: by falling mass until top_p is held, or at_least."""
    present = [block for block in range(len(keys)) if sizes[block] > 0]
    if not present:
        return []
    logits = {block: scale * float(query @ keys[block]) for block in present}
    top = max(logits.values())
    mass = {block: sizes[block] * math.exp(logits[block] - top) for block in present}
    order = sorted(present, key=lambda block: -mass[block])
    if top_p == 1:
        return order
    total = sum(mass.values())
    taken: list[int] = []
    held = 0.0
    for block in order:
        if held >= top_p * total and len(taken) >= at_least:
            break
        taken.append(block)
        held += mass[block]
    return taken


def _start(length: int, video: range, visible: list[bool], queries_in_video: set[int]) -> Array:
    """What text and hidden tokens have: rows that see all that is visible, text that all see."""
    mask = np.zeros((length, length), dtype=bool)
    for query in range(length):
        for key in range(length):
            text = key not in video
            mask[query, key] = visible[key] and (text or query not in queries_in_video)
    return mask


def cluster_mask(
    length: int,
    video: range,
    visible: list[bool],
    queries: Side,
    keys: Side,
    scale: float,
    top_p: float,
    at_least: int,
) -> Array:
    """Who attends to whom ``[S, S]``, by the paper's clusters."""
    mask = _start(length, video, visible, set(queries.labels))
    members = [keys.members(label) for label in range(len(keys.means))]
    sizes = [len(each) for each in members]
    for query, label in queries.labels.items():
        taken = heaviest(queries.means[label], list(keys.means), sizes, scale, top_p, at_least)
        for block in taken:
            mask[query, members[block]] = True
    return mask


def tile_mask(
    length: int,
    video: range,
    visible: list[bool],
    q: Array,
    k: Array,
    queries: Side,
    keys: Side,
    scale: float,
    top_p: float,
    min_ratio: float,
    tile: int,
) -> Array:
    """Who attends to whom ``[S, S]``, by tiles of the video's tokens sorted by cluster."""
    hidden = [token for token in video if not visible[token]]

    def tiles(side: Side) -> list[list[int]]:
        walk = sorted(side.labels, key=lambda token: (side.labels[token], token)) + hidden
        return [walk[start : start + tile] for start in range(0, len(walk), tile)]

    def shown(block: list[int]) -> list[int]:
        return [token for token in block if visible[token]]

    key_tiles = [shown(block) for block in tiles(keys)]
    means = [k[block].mean(0) if block else np.zeros(k.shape[1]) for block in key_tiles]
    sizes = [len(block) for block in key_tiles]
    chosen: set[int] = set()
    rows = []
    for block in tiles(queries):
        if shown(block):
            chosen |= set(block)
            taken = heaviest(
                q[shown(block)].mean(0), means, sizes, scale, top_p, int(min_ratio * len(means))
            )
            rows.append((block, taken))
    mask = _start(length, video, visible, chosen)
    for block, taken in rows:
        for query in block:
            for key_tile in taken:
                mask[query, key_tiles[key_tile]] = True
    return mask


def attend(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, Array]:
    """Softmax over each row's True keys: out ``[S, D]`` and log-sum-exp ``[S]``."""
    out, lse = np.zeros_like(q), np.full(len(q), -math.inf)
    for query in range(len(q)):
        seen = np.flatnonzero(mask[query])
        if len(seen):
            scores = scale * (k[seen] @ q[query])
            weights = np.exp(scores - scores.max())
            out[query] = weights @ v[seen] / weights.sum()
            lse[query] = scores.max() + math.log(weights.sum())
    return out, lse


# --- cases ----------------------------------------------------------------------------------------


@dataclass
class Situation:
    """A sequence, a mask and parameters."""

    grid: tuple[int, int, int]
    text_before: int = 0
    text_after: int = 0
    valid_text: int | None = None
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    share_hidden: float | None = None
    scale: float | None = None
    strided: bool = False
    data_seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        return self.tokens + self.text_before + self.text_after

    @property
    def video(self) -> range:
        return range(self.text_before, self.text_before + self.tokens)

    @property
    def text(self) -> polyattn.TextSpan | None:
        count = self.text_before + self.text_after
        if not count:
            return None
        return polyattn.TextSpan(0 if self.text_before else self.tokens, count, self.valid_text)

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """q, k, v ``[B, S, H, 16]``, plain or as views of another layout."""
        generator = torch.Generator().manual_seed(self.data_seed)
        heads = self.kv_heads * self.group
        made = []
        for count in (heads, self.kv_heads, self.kv_heads):
            shape = (self.batch, self.length, count, 16)
            if self.strided:
                shape = (self.batch, count, 16, self.length)
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            made.append(x.permute(0, 3, 1, 2) if self.strided else x)
        return made

    def mask(self) -> torch.Tensor | None:
        """Key padding ``[B, 1, 1, S]``; every second batch item hides no key."""
        if self.share_hidden is None:
            return None
        generator = torch.Generator().manual_seed(self.data_seed + 1)
        shown = torch.rand(self.batch, self.length, generator=generator) >= self.share_hidden
        shown[1::2] = True
        return shown[:, None, None]

    def visible(self, item: int) -> list[bool]:
        mask = self.mask()
        shown = [True] * self.length if mask is None else mask[item, 0, 0].tolist()
        if self.text is not None and self.valid_text is not None:
            start, end = self.text.start + self.valid_text, self.text.start + self.text.length
            shown[start:end] = [False] * (end - start)
        return shown


@st.composite
def situations(draw: st.DrawFn, variant: str) -> Situation:
    sides = (st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
    if variant == "tiled":
        sides = (st.integers(1, 3), st.integers(1, 8), st.integers(1, 12))
    before = draw(st.sampled_from((0, 0, 3)))
    after = 0 if before else draw(st.sampled_from((0, 1, 5)))
    count = before + after
    config: dict[str, Any] = {
        "num_q_centroids": draw(st.integers(1, 12)),
        "num_k_centroids": draw(st.sampled_from((1, 4, 9, 30, 1000))),
        "top_p_kmeans": draw(st.sampled_from((0.05, 0.5, 0.9, 1.0))),
        "min_kc_ratio": draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        "kmeans_iter_init": draw(st.integers(1, 4)),
        "kmeans_iter_step": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 5)),
        "variant": variant,
    }
    if variant == "tiled":
        config["tile_size"] = 64
    return Situation(
        grid=draw(st.tuples(*sides)),
        text_before=before,
        text_after=after,
        valid_text=draw(st.sampled_from((None, 0, count - 1, count))) if count else None,
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        share_hidden=draw(st.sampled_from((None, None, 0.3, 0.9, 1.1))),
        scale=draw(st.sampled_from((None, 0.7))),
        strided=draw(st.booleans()),
        data_seed=draw(st.integers(0, 1000)),
        config=config,
    )


# --- the fast path against the oracle -------------------------------------------------------------


def first_centroids(situation: Situation, x: Array, visible: list[bool], most: int) -> Any:
    """The visible tokens of the video that come first in the seeded order."""
    generator = torch.Generator().manual_seed(situation.config["seed"])
    order = torch.randperm(situation.tokens, generator=generator).tolist()
    order = [situation.text_before + token for token in order]
    drawn = [token for token in order if visible[token]][: min(most, situation.tokens)]
    rows = np.full((min(most, situation.tokens), x.shape[1]), math.nan)
    rows[: len(drawn)] = x[drawn]
    return rows


def expected(
    situation: Situation, tensors: list[torch.Tensor], kept: Any
) -> tuple[Array, Array, Array]:
    """Out ``[B, S, H, D]``, log-sum-exp ``[B, H, S]`` and masks ``[B, H, S, S]`` of one call."""
    config = situation.config
    q, k, v = (each.numpy() for each in tensors)
    batch, length, heads, width = q.shape
    scale = situation.scale or 1 / math.sqrt(width)
    out, lse = np.zeros_like(q), np.zeros((batch, heads, length))
    masks = np.zeros((batch, heads, length, length), dtype=bool)
    for item in range(batch):
        visible = situation.visible(item)
        shown = [token for token in situation.video if visible[token]]
        for head in range(heads):
            kv_head = head // situation.group
            sides = []
            for name, x, where in (("q", q, head), ("k", k, kv_head)):
                rows = x[item, :, where]
                if kept is None:
                    most = config[f"num_{name}_centroids"]
                    start = first_centroids(situation, rows, visible, most)
                    iterations = config["kmeans_iter_init"]
                else:
                    memory = kept.queries if name == "q" else kept.keys
                    start = memory[item, :, where].numpy()
                    iterations = config["kmeans_iter_step"]
                sides.append(cluster(rows, shown, start, iterations))
            at_least = int(config["min_kc_ratio"] * len(sides[1].means))
            rule = (sides[0], sides[1], scale, config["top_p_kmeans"])
            if config["variant"] == "exact":
                mask = cluster_mask(length, situation.video, visible, *rule, at_least)
            else:
                mask = tile_mask(
                    length,
                    situation.video,
                    visible,
                    q[item, :, head],
                    k[item, :, kv_head],
                    *rule,
                    config["min_kc_ratio"],
                    64,
                )
            masks[item, head] = mask
            out[item, :, head], lse[item, head] = attend(
                q[item, :, head], k[item, :, kv_head], v[item, :, kv_head], mask, scale
            )
    return out, lse, masks


def planted(situation: Situation, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors with NaN in k and v wherever a key is hidden."""
    q, k, v = tensors
    shown = torch.tensor([situation.visible(item) for item in range(situation.batch)])
    hidden = ~shown[:, :, None, None]
    return [q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan)]


def check(situation: Situation) -> None:
    """Three steps of a layer: from random tokens, and twice from the centroids of before."""
    report = Report()
    with (
        reporting_to(report),
        polyattn.forward_context(
            grid=situation.grid, text=situation.text, layer=3, num_layers=9, num_steps=9
        ) as run,
    ):
        kept = None
        for step in range(3):
            situation.data_seed += 7
            tensors = situation.tensors()
            situation.data_seed -= 7
            tensors[1] = tensors[1] + step
            report.clear()
            with polyattn.forward_context(step=step):
                out, lse = polyattn.attention(
                    *planted(situation, tensors),
                    backend="svg2",
                    config={**situation.config, "dense_steps": 0, "dense_layers": 0},
                    attn_mask=situation.mask(),
                    scale=situation.scale,
                    enable_gqa=situation.group > 1,
                    return_lse=True,
                )
            wanted_out, wanted_lse, masks = expected(situation, tensors, kept)
            np.testing.assert_allclose(out.numpy(), wanted_out, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(lse.numpy(), wanted_lse, rtol=1e-5, atol=1e-5)
            (row,) = report.rows
            assert row.facts["centroids"] == ("new" if kept is None else "kept")
            visible = sum(map(sum, map(situation.visible, range(situation.batch))))
            pairs = max(visible, 1) * masks.shape[1] * masks.shape[2]
            assert row.facts["density"] == pytest.approx(masks.sum() / pairs)
            kept = run.state["svg2"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(situations("exact"))
def test_clusters_are_those_of_the_definition(situation: Situation) -> None:
    check(situation)


@settings(max_examples=70, deadline=None, derandomize=True)
@given(situations("tiled"))
def test_tiles_are_those_of_the_definition(situation: Situation) -> None:
    check(situation)
