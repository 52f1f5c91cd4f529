"""Random plans, tensors that punish a leak, and what the attention of a plan is, token by token.

Nothing here uses the package's own builders, lists or masks: plans are written entry by entry, and
the oracle reads them entry by entry, so that it can disagree with the code under test.

    plan = random_plan(seed, query_length=100, key_length=130, queries="ragged", density=0.3)
    q, k, v = random_tensors(plan, seed, heads=4, kv_heads=2, head_dim=64)
    expected, expected_lse = oracle(q, k, v, plan)
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from polyattn_kernels.plan import BlockSparsePlan

__all__ = [
    "assert_matches",
    "guarded",
    "longer_walk",
    "oracle",
    "plans",
    "random_plan",
    "random_tensors",
    "token_lists",
    "token_mask",
    "tokens_of_blocks",
    "tolerance",
]

Kind = Literal["uniform", "ragged", "variable"]


def random_plan(
    seed: int,
    *,
    query_length: int = 70,
    key_length: int = 90,
    queries: Kind = "uniform",
    keys: Kind = "uniform",
    query_block: int = 16,
    key_block: int = 16,
    query_blocks: int = 5,
    key_blocks: int = 6,
    batch: int = 1,
    heads: int = 1,
    density: float = 0.4,
    permute_queries: bool = False,
    permute_keys: bool = False,
    empty_rows: bool = True,
    spare_capacity: int = 0,
    shared: bool = True,
    device: str = "cpu",
) -> BlockSparsePlan:
    """A valid plan, the same for the same arguments.

    ``uniform`` sides have blocks of ``*_block`` tokens (the last may be short), ``ragged`` ones
    also have lengths, ``variable`` ones have ``*_blocks`` blocks of random sizes, some empty.
    ``density`` is the chance of each pair of blocks; 0 selects one block per row, 1 all. With
    ``empty_rows`` some query blocks attend to nothing. List entries past the count are rubbish.
    Each tensor is shared (1) over batch or heads at random, unless ``shared`` is off.
    """
    rng = random.Random(seed)
    fields: dict[str, Any] = {}

    def leading() -> tuple[int, int]:
        return (rng.choice((1, batch)), rng.choice((1, heads))) if shared else (batch, heads)

    def filled(make: Any) -> torch.Tensor:
        items, planes = leading()
        rows = [[make() for _ in range(planes)] for _ in range(items)]
        return torch.tensor(rows, dtype=torch.int32, device=device)

    counts = {}
    for side, kind, length, block, number, permute in (
        ("query", queries, query_length, query_block, query_blocks, permute_queries),
        ("key", keys, key_length, key_block, key_blocks, permute_keys),
    ):
        if kind == "variable":
            number = max(1, number)

            def edges(length: int = length, number: int = number) -> list[int]:
                # Cuts may coincide (empty blocks), also at either end.
                return [0, *sorted(rng.randint(0, length) for _ in range(number - 1)), length]

            fields[f"{side}_block"] = None
            fields[f"{side}_offsets"] = filled(edges)
        else:
            number = -(-length // block)
            fields[f"{side}_block"] = block
            if kind == "ragged":

                def lengths(length: int = length, block: int = block, n: int = number) -> list[int]:
                    rows = [min(block, length - i * block) for i in range(n)]
                    return [rng.choice((0, 1, r, rng.randint(0, r))) for r in rows]

                fields[f"{side}_lengths"] = filled(lengths)
        counts[side] = number
        if permute:

            def order(length: int = length) -> list[int]:
                return rng.sample(range(length), length)

            fields[f"{side}_permutation"] = filled(order)

    rows, columns = counts["query"], counts["key"]
    items, planes = leading()
    lists = []
    for _ in range(items * planes * rows):
        if empty_rows and rng.random() < 0.1:
            lists.append([])
            continue
        chosen = [j for j in range(columns) if rng.random() < density]
        lists.append(chosen or [rng.randrange(columns)])
    capacity = min(columns, max(1, max(len(each) for each in lists)) + spare_capacity)
    rubbish = [each + [rng.randint(-9, 999) for _ in range(capacity - len(each))] for each in lists]
    shape = (items, planes, rows)
    return BlockSparsePlan(
        query_length=query_length,
        key_length=key_length,
        key_counts=torch.tensor(
            [len(each) for each in lists], dtype=torch.int32, device=device
        ).view(shape),
        key_indices=torch.tensor(rubbish, dtype=torch.int32, device=device).view(*shape, capacity),
        **fields,
    )


def longer_walk(plan: BlockSparsePlan, seed: int) -> BlockSparsePlan:
    """The plan, which has query lengths and no query permutation, for fewer queries out of order.

    Positions within a length hold a token; of the others some do, and some are -1.
    """
    rng = random.Random(seed)
    assert plan.query_lengths is not None
    assert plan.query_block is not None
    positions, block = plan.query_length, plan.query_block
    sizes = plan.query_lengths.tolist()
    most = max(sum(of_head) for item in sizes for of_head in item)
    queries = min(positions, max(1, most + rng.randint(0, 20)))

    def order(lengths: list[int]) -> list[int]:
        inside = [p for p in range(positions) if p % block < lengths[p // block]]
        outside = [p for p in range(positions) if p % block >= lengths[p // block]]
        held = inside + rng.sample(outside, queries - len(inside))
        walk = [-1] * positions
        for place, token in zip(held, rng.sample(range(queries), queries), strict=True):
            walk[place] = token
        return walk

    walks = [[order(of_head) for of_head in item] for item in sizes]
    permutation = torch.tensor(walks, dtype=torch.int32, device=plan.device)
    return replace(plan, query_length=queries, query_permutation=permutation)


def plans(
    *,
    kinds: tuple[tuple[Kind, Kind], ...] | None = None,
    blocks: tuple[int, ...] = (16, 32, 48),
    longest: int = 100,
    permutations: bool = True,
    longer_walks: bool = True,
    most_batch: int = 2,
    most_heads: int = 4,
) -> st.SearchStrategy[BlockSparsePlan]:
    """A hypothesis strategy over :func:`random_plan`; ``kinds`` are pairs (queries, keys).

    With permutations, those of ragged queries may be of a longer walk, :func:`longer_walk`.
    """
    every: tuple[Kind, ...] = ("uniform", "ragged", "variable")
    kinds = kinds or tuple((a, b) for a in every for b in every)
    number = st.integers(1, 7)
    flags = st.booleans() if permutations else st.just(False)

    def build(kind: tuple[Kind, Kind], seed: int, longer: bool, **rest: Any) -> BlockSparsePlan:
        longer = longer and kind[0] == "ragged"
        rest["permute_queries"] = rest["permute_queries"] and not longer
        plan = random_plan(seed, queries=kind[0], keys=kind[1], **rest)
        return longer_walk(plan, seed) if longer else plan

    return st.builds(
        build,
        kind=st.sampled_from(kinds),
        longer=flags if longer_walks else st.just(False),
        seed=st.integers(0, 1 << 30),
        query_length=st.integers(1, longest),
        key_length=st.integers(1, longest),
        query_block=st.sampled_from(blocks),
        key_block=st.sampled_from(blocks),
        query_blocks=number,
        key_blocks=number,
        batch=st.integers(1, most_batch),
        heads=st.integers(1, most_heads),
        density=st.sampled_from((0.0, 0.2, 0.5, 1.0)),
        permute_queries=flags,
        permute_keys=flags,
        spare_capacity=st.integers(0, 2),
    )


def _of(tensor: torch.Tensor, item: int, head: int) -> torch.Tensor:
    return tensor[item if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0]


def tokens_of_blocks(plan: BlockSparsePlan, side: str, item: int, head: int) -> list[list[int]]:
    """The tokens of q or k in each block, in the order of the walk."""
    length = getattr(plan, f"{side}_length")
    permutation = getattr(plan, f"{side}_permutation")
    if side == "query" and permutation is not None:
        length = permutation.shape[-1]  # the walk may be longer than q
    offsets, lengths = getattr(plan, f"{side}_offsets"), getattr(plan, f"{side}_lengths")
    if offsets is not None:
        edges = _of(offsets, item, head).tolist()
        walks = [range(a, b) for a, b in pairwise(edges)]
    else:
        block = getattr(plan, f"{side}_block")
        walks = [range(a, min(a + block, length)) for a in range(0, length, block)]
        if lengths is not None:
            sizes = _of(lengths, item, head).tolist()
            walks = [walk[:size] for walk, size in zip(walks, sizes, strict=True)]
    if permutation is None:
        return [list(walk) for walk in walks]
    order = _of(permutation, item, head).tolist()
    return [[order[position] for position in walk] for walk in walks]


def token_lists(
    plan: BlockSparsePlan, item: int = 0, head: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Per query block: the queries in it, and the keys they attend to, in the order of the walk."""
    queries = tokens_of_blocks(plan, "query", item, head)
    keys = tokens_of_blocks(plan, "key", item, head)
    counts = _of(plan.key_counts, item, head).tolist()
    indices = _of(plan.key_indices, item, head).tolist()
    return [
        (rows, [token for j in chosen[:count] for token in keys[j]])
        for rows, count, chosen in zip(queries, counts, indices, strict=True)
    ]


def token_mask(plan: BlockSparsePlan, batch: int, heads: int) -> torch.Tensor:
    """Which keys each query attends to: bool ``[batch, heads, Sq, Sk]``."""
    mask = torch.zeros(batch, heads, plan.query_length, plan.key_length, dtype=torch.bool)
    for item in range(batch):
        for head in range(heads):
            for rows, columns in token_lists(plan, item, head):
                for row in rows:
                    mask[item, head, row, columns] = True
    return mask


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockSparsePlan,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the plan in float64 on the CPU: out ``[B, Sq, H, D]``, lse ``[B, H, Sq]``.

    Softmax over exactly the keys that are attended; no other key is ever read.
    """
    batch, queries, heads, dim = q.shape
    groups = heads // k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k, v = (each.detach().cpu().double() for each in (q, k, v))
    out = torch.zeros(batch, queries, heads, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for item in range(batch):
        for head in range(heads):
            for rows, columns in token_lists(plan, item, head):
                if not rows or not columns:
                    continue
                scores = q[item, rows, head] @ k[item, columns, head // groups].T * scale
                top = scores.amax(-1, keepdim=True)
                weights = (scores - top).exp()
                total = weights.sum(-1, keepdim=True)
                out[item, rows, head] = weights / total @ v[item, columns, head // groups]
                lse[item, head, rows] = (top + total.log()).squeeze(-1)
    return out, lse


def random_tensors(
    plan: BlockSparsePlan,
    seed: int = 0,
    *,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    magnitude: float = 1.0,
    poison: bool = True,
    strided: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v for a plan.

    With ``poison``, keys that no query of their head attends to, and queries that are in no block,
    hold NaN and infinities. With ``strided``, all three are views whose strides fit no dense
    layout. ``magnitude`` scales q.
    """
    batch, heads = batch or plan.batch, heads or plan.heads
    kv_heads = kv_heads or heads
    generator = torch.Generator().manual_seed(seed)

    def normal(length: int, planes: int) -> torch.Tensor:
        return torch.randn(batch, length, planes, head_dim, generator=generator)

    q = normal(plan.query_length, heads) * magnitude
    k, v = normal(plan.key_length, kv_heads), normal(plan.key_length, kv_heads)
    if poison:
        groups = heads // kv_heads
        for item in range(batch):
            seen: list[set[int]] = [set() for _ in range(kv_heads)]
            for head in range(heads):
                walked: set[int] = set()
                for rows, columns in token_lists(plan, item, head):
                    walked |= set(rows)
                    seen[head // groups] |= set(columns) if rows else set()
                for row in set(range(plan.query_length)) - walked:
                    q[item, row, head] = math.nan
            for head in range(kv_heads):
                for number, key in enumerate(sorted(set(range(plan.key_length)) - seen[head])):
                    k[item, key, head] = (math.nan, math.inf, -math.inf)[number % 3]
                    v[item, key, head] = (math.inf, math.nan, -math.inf)[number % 3]
    tensors = [each.to(device, dtype) for each in (q, k, v)]
    if strided:
        for number, each in enumerate(tensors):
            shape = list(each.shape)
            shape[1] *= 2
            shape[2] += 1
            wide = torch.full(shape, math.nan, dtype=dtype, device=device)
            view = wide[:, ::2, 1:] if number % 2 else wide[:, 1::2, :-1]
            view.copy_(each)
            tensors[number] = view
    return tensors[0], tensors[1], tensors[2]


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of a row; on a GPU, float32 products are three passes of tf32."""
    if dtype is torch.float32:
        return 1e-4 if device.type == "cuda" else 2e-5
    return {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]


def assert_matches(
    found: tuple[torch.Tensor, torch.Tensor | None],
    expected: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
) -> None:
    """Relative error per row, zeros and -inf exactly where the oracle has them."""
    out, expected_out = found[0].cpu(), expected[0]
    assert out.dtype is dtype
    blind = expected[1].transpose(1, 2).isneginf()
    assert torch.all(out[blind] == 0)
    assert torch.isfinite(out).all()
    distance = (out.double() - expected_out).norm(dim=-1)
    size = expected_out.norm(dim=-1).clamp_min(0.1)
    assert (distance / size).max() < tolerance(dtype, found[0].device) * magnitude
    if found[1] is not None:
        lse = found[1].cpu()
        assert lse.dtype is torch.float32
        assert torch.equal(lse.isneginf(), expected[1].isneginf())
        seen = ~expected[1].isneginf()
        error = (lse[seen].double() - expected[1][seen]).abs()
        assert torch.all(error < 1e-3 * expected[1][seen].abs().clamp_min(1))


def guarded(x: torch.Tensor, guard: float) -> torch.Tensor:
    """The same values with ``guard`` before and after them in memory.

    A read outside the tensor then turns the result into NaN, if guard is NaN.
    """
    around = 8192
    store = torch.full((x.numel() + 2 * around,), guard, dtype=x.dtype, device=x.device)
    inner = store[around:-around].view(x.shape)
    inner.copy_(x)
    return inner
