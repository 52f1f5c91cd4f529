"""V-MoBA written down token by token, in plain Python and numpy, from its definition alone.

Slow and obvious: which chunk a token is in, the mean of a chunk, who is picked, and then attention
over a boolean mask of all pairs of tokens, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Pair = tuple[int, int]  # a query and a chunk


@dataclass(frozen=True)
class Case:
    """What one call is about; ``chunk`` is a number of frames, (h, w) or (t, h, w)."""

    grid: tuple[int, int, int]
    kind: str
    chunk: Any
    mode: str
    pool: str
    topk: int = 1
    share: float = 0.25
    text_before: int = 0
    text_after: int = 0

    @property
    def video(self) -> int:
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        return self.video + self.text_before + self.text_after


def chunk_of_each_token(case: Case) -> list[int | None]:
    """The number of each token's chunk; None for text."""
    time, height, width = case.grid
    names: list[Any] = []
    for t in range(time):
        for h in range(height):
            for w in range(width):
                if case.kind == "temporal":
                    names.append(len(names) // int(case.chunk * height * width))
                elif case.kind == "spatial":
                    names.append((h // case.chunk[0], w // case.chunk[1]))
                else:
                    names.append((t // case.chunk[0], h // case.chunk[1], w // case.chunk[2]))
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    video = [numbers[name] for name in names]
    return [None] * case.text_before + video + [None] * case.text_after


def mask_of_tokens(case: Case, q: np.ndarray, k: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Which keys each query attends to: bool ``[H, S, S]`` from q ``[S, H, D]``, k ``[S, Hkv, D]``.

    ``visible`` is bool ``[S]``.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    chunk = chunk_of_each_token(case)
    members = {
        number: [s for s in range(case.length) if chunk[s] == number and visible[s]]
        for number in sorted({each for each in chunk if each is not None})
    }
    scores: list[dict[Pair, float]] = []
    for head in range(heads):
        means = {c: k[tokens, head // group].mean(0) for c, tokens in members.items() if tokens}
        scores.append(
            {
                (s, c): float(q[s, head] @ mean)
                for s in range(case.length)
                if chunk[s] is not None
                for c, mean in means.items()
            }
        )
    picked = pick(case, scores, chunk, heads)
    mask = np.zeros((heads, case.length, case.length), bool)
    for head in range(heads):
        for s in range(case.length):
            for t in range(case.length):
                is_text = chunk[s] is None or chunk[t] is None
                own = chunk[s] == chunk[t]
                mask[head, s, t] = visible[t] and (is_text or own or (s, chunk[t]) in picked[head])
    return mask


def pick(
    case: Case, scores: list[dict[Pair, float]], chunk: list[int | None], heads: int
) -> list[set[Pair]]:
    """The pairs that win, head by head, the queries' own chunks not necessarily among them."""
    pools: dict[Any, list[tuple[int, Pair]]] = {}
    for head in range(heads):
        for s, c in scores[head]:
            name = {"query_head": (head, s), "block": c, "head_global": head, "overall": 0}[
                case.pool
            ]
            pools.setdefault(name, []).append((head, (s, c)))
    number = len({each for each in chunk if each is not None})
    picked: list[set[Pair]] = [set() for _ in range(heads)]
    for name, entries in pools.items():
        own = [(head, pair) for head, pair in entries if chunk[pair[0]] == pair[1]]
        others = [(head, pair) for head, pair in entries if chunk[pair[0]] != pair[1]]
        others.sort(key=lambda each: (-scores[each[0]][each[1]], each[0], each[1]))
        if case.mode == "topk":
            # Every query's own chunk counts, even one in which nothing is visible.
            queries = {"query_head": 1, "head_global": case.video, "overall": heads * case.video}
            many = queries[case.pool]
            winners = others[: max(0, min(case.topk, number) * many - many)]
        else:
            winners = others[: prefix(case, scores, own, others)]
        for head, pair in winners:
            picked[head].add(pair)
        assert name is not None
    return picked


def prefix(
    case: Case,
    scores: list[dict[Pair, float]],
    own: list[tuple[int, Pair]],
    others: list[tuple[int, Pair]],
) -> int:
    """How many of the others, best first, it takes to hold the share; at least one."""
    values = [scores[head][pair] for head, pair in own + others]
    low, high = min(values), max(values)
    if high - low <= 1e-6:
        return len(others)

    def normal(entry: tuple[int, Pair]) -> float:
        return (scores[entry[0]][entry[1]] - low) / (high - low)

    total = sum(map(normal, own + others)) + 1e-6
    needed = max(0.0, case.share - sum(map(normal, own)) / total)
    held = 0.0
    for count, entry in enumerate(others, 1):
        held += normal(entry) / total
        if held >= needed:
            return count
    return len(others)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """out ``[S, H, D]`` and lse ``[H, S]`` over the pairs of a mask ``[H, S, S]``."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    out, lse = np.zeros_like(q), np.full((heads, length), -np.inf)
    for head in range(heads):
        for s in range(length):
            seen = np.flatnonzero(mask[head, s])
            if len(seen):
                scores = k[seen, head // group] @ q[s, head] * scale
                top = scores.max()
                weights = np.exp(scores - top)
                out[s, head] = weights @ v[seen, head // group] / weights.sum()
                lse[head, s] = top + math.log(weights.sum())
    return out, lse
