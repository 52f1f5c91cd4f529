"""Plans: what builders put into them, what checks refuse, and what they say about themselves."""

from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans, random_plan, token_lists, token_mask, tokens_of_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

from polyattn_kernels import BlockSparsePlan, PlanError, select_top_k
from polyattn_kernels import plan as plan_module

UNIFORM = {"query_block": 16, "key_block": 32}


def int32(*values: Any) -> torch.Tensor:
    """[1, 1, ...] of nested lists."""
    return torch.tensor([[list(values)]], dtype=torch.int32)


def entries(plan: BlockSparsePlan) -> list[list[list[list[int]]]]:
    """The lists of a plan, cut at their counts: [item][head][query block]."""
    counts, indices = plan.key_counts.tolist(), plan.key_indices.tolist()
    return [
        [
            [row[:count] for count, row in zip(*head, strict=True)]
            for head in zip(*item, strict=True)
        ]
        for item in zip(counts, indices, strict=True)
    ]


def random_mask(seed: int, *shape: int, density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


# --- masks, sizes, density ------------------------------------------------------------------------


@given(plan=plans())
@settings(deadline=None, max_examples=150)
def test_masks_and_density_are_those_of_the_lists(plan: BlockSparsePlan) -> None:
    expected = token_mask(plan, plan.batch, plan.heads)
    assert torch.equal(plan.to_mask().expand_as(expected), expected)
    tokens = 0
    for item in range(plan.batch):
        for head in range(plan.heads):
            queries = sum(len(rows) for rows, _ in token_lists(plan, item, head))
            every = replace_lists(plan, [[list(range(plan.num_key_blocks))]])
            keys = len(token_lists(every, item, head)[0][1])
            tokens += queries * keys
    pairs = int(expected.sum())
    density = plan.density()
    assert density.dtype is torch.float64
    assert density.item() == pytest.approx(pairs / tokens if tokens else 0.0, abs=1e-12)


def replace_lists(plan: BlockSparsePlan, first: list[list[list[int]]]) -> BlockSparsePlan:
    """The plan with one list, the same for every query block."""
    chosen = first[0][0]
    indices = torch.tensor(chosen, dtype=torch.int32).repeat(1, 1, plan.num_query_blocks, 1)
    return replace(
        plan,
        key_counts=torch.full_like(indices[..., 0], len(chosen)),
        key_indices=indices,
    )


@given(plan=plans(longer_walks=False))
@settings(deadline=None, max_examples=100)
def test_variable_form_is_the_same_attention(plan: BlockSparsePlan) -> None:
    variable = plan.to_variable().validate()
    assert variable.query_block is None
    assert variable.key_block is None
    expected = token_mask(plan, plan.batch, plan.heads)
    assert torch.equal(token_mask(variable, plan.batch, plan.heads), expected)


def test_density_counts_tokens_and_not_rows() -> None:
    # 20 queries in blocks of 16 and 4; keys in blocks of 32, of which 32 and 3 are tokens.
    plan = BlockSparsePlan(
        query_length=20,
        key_length=64,
        **UNIFORM,
        key_counts=int32(1, 1),
        key_indices=int32([1], [0]),
        key_lengths=int32(32, 3),
    ).validate()
    assert plan.density().item() == (16 * 3 + 4 * 32) / (20 * 35)


# --- builders -------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1 << 20),
    density=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    shape=st.tuples(*(st.integers(1, n) for n in (2, 3, 6, 9))),
)
@settings(deadline=None)
def test_from_mask_lists_the_true_columns(
    seed: int, density: float, shape: tuple[int, int, int, int]
) -> None:
    mask = random_mask(seed, *shape, density=density)
    most = max(1, int(mask.sum(-1).max()))
    for capacity in (None, most):
        plan = BlockSparsePlan.from_mask(
            mask,
            query_length=16 * shape[2] - 3,
            key_length=32 * shape[3] - 31,
            capacity=capacity,
            **UNIFORM,
        ).validate()
        assert plan.capacity == (capacity or shape[3])
        assert entries(plan) == [
            [[[j for j, on in enumerate(row) if on] for row in head] for head in item]
            for item in mask.tolist()
        ]
        assert torch.equal(plan.to_block_mask(), mask)


def test_a_mask_that_breaks_the_promised_capacity_is_an_error() -> None:
    mask = torch.tensor([[[[True, True, False]]]])
    with pytest.raises(PlanError, match="capacity=1"):
        BlockSparsePlan.from_mask(mask, query_length=16, key_length=96, capacity=1, **UNIFORM)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(1, 1, 2, 3), "must be bool"),
        (torch.ones(2, 3, dtype=torch.bool), "must be bool"),
        (torch.ones(1, 1, 2, 4, dtype=torch.bool), "4 key blocks"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), "block_mask has 3 query blocks .* make 2 and 3"),
        ([[[[True]]]], r"must be a tensor, found list\n  Try: torch.as_tensor\(block_mask\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        BlockSparsePlan.from_mask(mask, query_length=32, key_length=96, **UNIFORM)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_indices_sorts_and_cuts(dtype: torch.dtype) -> None:
    indices = torch.tensor([[[[3, 0, 2], [1, 9, -7], [2, 5, 5]]]], dtype=dtype)
    counts = torch.tensor([[[3, 1, 0]]], dtype=dtype)
    plan = BlockSparsePlan.from_indices(
        indices, counts, query_length=48, key_length=128, **UNIFORM
    ).validate()
    assert entries(plan) == [[[[0, 2, 3], [1], []]]]
    # What is not used is a block that exists, so that a kernel may read ahead.
    assert int(plan.key_indices.min()) >= 0
    assert int(plan.key_indices.max()) < plan.num_key_blocks


def test_from_indices_uses_whole_lists_and_shares_counts() -> None:
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(2 * 4 * 5)]).view(2, 4, 5, 3)
    plan = BlockSparsePlan.from_indices(indices, query_length=80, key_length=256, **UNIFORM)
    plan.validate()
    assert torch.equal(plan.key_indices.long(), indices.sort(-1).values)
    counts = torch.tensor([[[3, 2, 1, 0, 3]]])
    plan = BlockSparsePlan.from_indices(indices, counts, query_length=80, key_length=256, **UNIFORM)
    plan.validate()
    assert entries(plan)[1][2][2] == [int(indices[1, 2, 2, 0])]


@pytest.mark.parametrize("bad", ["float", "dims"])
def test_from_indices_refuses(bad: str) -> None:
    indices = torch.zeros(1, 1, 2, 1, dtype=torch.float32 if bad == "float" else torch.int32)
    with pytest.raises(PlanError, match="int32 or int64 with 4 dimensions"):
        BlockSparsePlan.from_indices(
            indices if bad == "float" else indices[0], query_length=32, key_length=32, **UNIFORM
        )


@pytest.mark.parametrize(
    ("indices", "counts", "said"),
    [
        ([[[[0]]]], None, "indices must be a tensor, found list"),
        (torch.zeros(1, 1, 3, 1).int(), None, r"indices must be .* 2, 1 to 3\], .* \[1, 1, 3, 1\]"),
        (torch.zeros(1, 1, 2, 4).int(), None, r"1 to 3\], .* found \[1, 1, 2, 4\]"),
        (torch.zeros(1, 1, 2, 0).int(), None, r"1 to 3\], .* found \[1, 1, 2, 0\]"),
        (torch.zeros(2, 1, 2, 1).int(), torch.ones(3, 1, 2).int(), r"counts .* found \[3, 1, 2\]"),
    ],
)
def test_lists_that_do_not_fit_are_refused(indices: Any, counts: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        BlockSparsePlan.from_indices(indices, counts, query_length=32, key_length=96, **UNIFORM)


def test_numbers_past_32_bits_stay_wrong() -> None:
    lengths = {"query_length": 16, "key_length": 16, "query_block": 16, "key_block": 16}
    for number in (2**32, -(2**32)):
        plan = BlockSparsePlan.from_indices(torch.tensor([[[[number]]]]), **lengths)
        with pytest.raises(PlanError, match="key_indices must be from 0 to 0"):
            plan.validate()
        counts = torch.tensor([[[number + 1]]])
        plan = BlockSparsePlan.from_indices(torch.tensor([[[[0]]]]), counts, **lengths)
        with pytest.raises(PlanError, match="key_counts"):
            plan.validate()


def test_a_plan_of_a_selection() -> None:
    selection = select_top_k(torch.randn(2, 3, 4, 5), 2)
    lengths = {"query_length": 60, "key_length": 150}
    plan = BlockSparsePlan.from_selection(selection, **lengths, **UNIFORM).validate()
    assert torch.equal(plan.to_block_mask(), selection.to_mask())
    with pytest.raises(PlanError, match="selection has 4 query .* 5 key blocks; .* make 4 and 4"):
        BlockSparsePlan.from_selection(selection, query_length=60, key_length=128, **UNIFORM)
    with pytest.raises(PlanError, match="found a Tensor\n  Try: BlockSparsePlan.from_mask"):
        BlockSparsePlan.from_selection(selection.to_mask(), **lengths, **UNIFORM)  # type: ignore[arg-type]


def test_unknown_arguments_are_named() -> None:
    for build in (
        BlockSparsePlan.full,
        partial(BlockSparsePlan.from_mask, torch.ones(1, 1, 1, 1) > 0),
    ):
        with pytest.raises(PlanError, match="no argument q_block; .*query_block"):
            build(query_length=16, key_length=16, q_block=16)  # type: ignore[operator]


@dataclass(frozen=True)
class Band:
    """A pattern that is told apart by value."""

    width: int

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (queries - keys).abs() <= self.width


STATIC = {"query_length": 100, "key_length": 110, "query_block": 16, "key_block": 16}


def test_static_plans_are_built_once_per_value() -> None:
    plan = BlockSparsePlan.from_static(Band(1), **STATIC)
    assert BlockSparsePlan.from_static(Band(1), **STATIC) is plan
    assert BlockSparsePlan.from_static(Band(2), **STATIC) is not plan
    assert BlockSparsePlan.from_static(Band(1), **{**STATIC, "key_length": 111}) is not plan
    plan.validate()
    assert entries(plan) == [[[[j for j in range(7) if abs(i - j) <= 1] for i in range(7)]]]
    assert plan.capacity == 3
    table = [[abs(i - j) <= 1 for j in range(7)] for i in range(7)]
    written = BlockSparsePlan.from_static(table, **STATIC)
    assert written is BlockSparsePlan.from_static([list(map(int, row)) for row in table], **STATIC)
    assert torch.equal(written.key_indices, plan.key_indices)


def test_a_static_pattern_may_differ_by_head() -> None:
    def pattern(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.stack([queries >= keys, queries == keys])

    plan = BlockSparsePlan.from_static(pattern, **STATIC)
    assert plan.heads == 2
    assert entries(plan)[0][1] == [[i] for i in range(7)]


def test_a_static_pattern_may_broadcast() -> None:
    plan = BlockSparsePlan.from_static(lambda queries, keys: keys < 2, **STATIC)
    assert entries(plan) == [[[[0, 1]] * 7]]


def test_a_static_pattern_may_build_a_static_plan() -> None:
    def around(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        band = BlockSparsePlan.from_static(Band(1), **STATIC)
        return band.to_block_mask()[0, 0] | (keys == 0)

    found: list[BlockSparsePlan] = []
    build = lambda: found.append(BlockSparsePlan.from_static(around, **STATIC))  # noqa: E731
    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    thread.join(60)
    assert entries(found[0])[0][0][3] == [0, 2, 3, 4]


def test_threads_get_one_static_plan_and_do_not_wait_for_another_pattern() -> None:
    cache, started, finish = plan_module._Cache(most=4), threading.Barrier(3), threading.Event()
    small = partial(BlockSparsePlan.full, query_length=16, key_length=16)

    def slow() -> BlockSparsePlan:
        started.wait(60)
        finish.wait(60)
        return small()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cache.get, "slow", slow) for _ in range(2)]
        started.wait(60)
        cache.get("other", small)
        finish.set()
        assert both[0].result(60) is both[1].result(60)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query_block": 0}, "query_block must be at least 16, found 0"),
        ({"query_length": 0}, "query_length must be at least 1, found 0"),
        ({"key_block": 16.0}, "key_block must be an int, found 16.0"),
    ],
)
def test_static_plans_have_sizes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        BlockSparsePlan.from_static(Band(1), **{**STATIC, **changes})


def test_the_cache_of_static_plans_is_bounded_and_keeps_what_was_used_last() -> None:
    cache = plan_module._Cache(most=2)
    built = []

    def get(width: int) -> BlockSparsePlan:
        def build() -> BlockSparsePlan:
            built.append(width)
            return BlockSparsePlan.full(
                query_length=16, key_length=16, query_block=16, key_block=16
            )

        return cache.get(width, build)

    for width in (1, 2, 1, 3, 1, 2):
        get(width)
    assert built == [1, 2, 3, 2]


def test_static_plans_born_in_inference_mode_serve_outside_of_it() -> None:
    with torch.inference_mode():
        plan = BlockSparsePlan.from_static(Band(3), **STATIC)
    assert not plan.key_indices.is_inference()


def test_static_plans_of_a_tracer_are_not_kept() -> None:
    with FakeTensorMode():
        before = len(plan_module._static_plans._plans)
        cache = plan_module._static_plans
        cache.get("traced", lambda: BlockSparsePlan.full(query_length=16, key_length=16))
        assert len(cache._plans) == before


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (lambda queries, keys: torch.ones(7, 6, dtype=torch.bool), "7 query blocks"),
        (lambda queries, keys: torch.ones(7, 7), "bool"),
        ([[True] * 7] * 6 + [[True]], r"must have 7 rows of 7, found 7 rows of \[1, 7\]"),
        ([[True] * 7], r"must have 7 rows of 7, found 1 rows of \[7\]"),
        (torch.ones(2, 3, 1, 1, dtype=torch.bool), "a table of Mq rows"),
        (
            lambda queries, keys: torch.ones(2, 3, 1, 1, dtype=torch.bool),
            r"found bool \[2, 3, 1, 1",
        ),
        (lambda queries, keys: torch.ones(0, 7, 7, dtype=torch.bool), r"found bool \[0, 7, 7\]"),
        (lambda queries, keys: True, "must be bool .* found True"),
        (torch.ones(2, 7, 7, dtype=torch.bool), "a table of Mq rows .* found a Tensor"),
        (None, "a table of Mq rows .* found a NoneType"),
        (type("Unhashable", (), {"__call__": Band.__call__, "__hash__": None})(), "hashable"),
    ],
)
def test_static_patterns_that_do_not_fit_are_refused(pattern: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        BlockSparsePlan.from_static(pattern, **STATIC)


def test_full_attends_to_everything_that_is_there() -> None:
    plan = BlockSparsePlan.full(
        query_length=33,
        key_length=200,
        query_block=16,
        key_offsets=int32(0, 5, 5, 200),
    ).validate()
    assert plan.to_mask().all()
    assert plan.density().item() == 1
    assert BlockSparsePlan.full(query_length=129, key_length=5).validate().num_query_blocks == 2


@given(plan=plans(), seed=st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=100)
def test_dense_spans_reach_every_block_that_holds_one_of_their_tokens(
    plan: BlockSparsePlan, seed: int
) -> None:
    rng = random.Random(seed)

    def span(length: int) -> list[tuple[int, int]]:
        start = rng.randrange(length)
        return [(start, rng.randint(start + 1, length))] * rng.randint(0, 1)

    keys, queries = span(plan.key_length), span(plan.query_length)
    dense = plan.with_dense_blocks(key_spans=keys, query_spans=queries).validate()
    shown = dense.to_block_mask().expand(dense.batch, dense.heads, -1, -1)
    before = plan.to_block_mask().expand_as(shown)

    def touched(side: str, item: int, head: int, spans: list[tuple[int, int]]) -> set[int]:
        tokens = tokens_of_blocks(plan, side, item, head)
        wanted = {token for start, stop in spans for token in range(start, stop)}
        return {number for number, block in enumerate(tokens) if wanted & set(block)}

    for item in range(dense.batch):
        for head in range(dense.heads):
            expected = before[item, head].clone()
            for column in touched("key", item, head, keys):
                expected[:, column] = True
            for row in touched("query", item, head, queries):
                expected[row] = True
            assert torch.equal(shown[item, head], expected)


def test_dense_spans_take_a_capacity() -> None:
    plan = random_plan(3, density=0.0, key_length=96)
    dense = plan.with_dense_blocks(key_spans=[(0, 1)], capacity=2)
    assert dense.capacity == 2
    with pytest.raises(PlanError, match="capacity=2"):
        plan.with_dense_blocks(key_spans=[(0, 96)], capacity=2)


@pytest.mark.parametrize("span", [(3, 3), (5, 4), (-1, 2), (0, 91)])
def test_dense_spans_outside_of_the_sequence_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match="_spans"):
        random_plan(0).with_dense_blocks(key_spans=[span])


def test_dense_spans_are_pairs() -> None:
    with pytest.raises(PlanError, match=r"key_spans=\[\(start, stop\)\]"):
        random_plan(0).with_dense_blocks(key_spans=(0, 77))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
def test_building_waits_for_no_value(kind: Any) -> None:
    # Meta tensors have no values: whatever waited for one would raise here.
    drawn = random_plan(
        1, queries=kind, keys=kind, batch=2, heads=2, permute_queries=True, permute_keys=True
    )
    fake = {name: tensor.to("meta") for name, tensor in drawn.tensors().items()}
    geometry = {
        name: fake.get(name, getattr(drawn, name))
        for name in plan_module.BlockGeometry.__annotations__
    }
    lengths = {"query_length": drawn.query_length, "key_length": drawn.key_length}
    shape = (2, 2, drawn.num_query_blocks, drawn.num_key_blocks)
    mask = torch.empty(shape, dtype=torch.bool, device="meta")
    plan = BlockSparsePlan.from_mask(mask, capacity=2, **lengths, **geometry)
    chosen = torch.empty(shape, device="meta").topk(2).indices
    BlockSparsePlan.from_indices(chosen, **lengths, **geometry)
    BlockSparsePlan.full(**lengths, **geometry)
    dense = plan.with_dense_blocks([(0, 3)], [(5, 9)])
    assert dense.density().is_meta
    assert dense.to_variable().to_mask().is_meta
    assert str(dense)
    with pytest.raises((NotImplementedError, RuntimeError)):
        dense.validate()  # which does look at values


# --- checks ---------------------------------------------------------------------------------------


def fields(**changes: Any) -> dict[str, Any]:
    """A plan of 40 queries in blocks of 16 and 64 keys in blocks of 32, with changes."""
    return {
        "query_length": 40,
        "key_length": 64,
        **UNIFORM,
        "key_counts": int32(1, 2, 0),
        "key_indices": int32([1, 77], [0, 1], [-3, 5]),
        **changes,
    }


def test_the_unchanged_plan_is_valid() -> None:
    plan = BlockSparsePlan(**fields())
    assert plan.validate() is plan
    assert (plan.num_query_blocks, plan.num_key_blocks, plan.capacity) == (3, 2, 2)
    assert plan.is_uniform


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query_length": 0}, "query_length must be at least 1, found 0"),
        ({"query_block": None}, "query blocks are either uniform .* found neither"),
        ({"query_offsets": int32(0, 5, 9, 40)}, "found both"),
        ({"key_block": 24}, "key_block must be a positive multiple of 16, found 24"),
        ({"key_block": 0}, "key_block must be at least 16, found 0"),
        ({"key_block": 32.0}, "key_block must be an int, found 32.0"),
        ({"query_length": "40"}, "query_length must be an int, found '40'"),
        ({"key_indices": None}, "key_indices must be a tensor, found None"),
        ({"key_lengths": [32, 32]}, "key_lengths must be a tensor, found list"),
        ({"key_lengths": torch.tensor([32, 32])}, r"Try: key_lengths.int\(\)\[None, None\]$"),
        ({"key_block": None, "key_offsets": int32(0)}, "key_offsets must be .* at least one block"),
        (
            {"key_block": None, "key_offsets": torch.tensor([0, 64])},
            r"Try: key_offsets\[None, None\]",
        ),
        ({"key_counts": int32(1, 2, 0).long()}, r"int32 .*, found int64 .*\n.*key_counts.int\(\)"),
        ({"key_counts": int32(1, 2)}, r"key_counts must be .* 3\], found int32 \[1, 1, 2\]"),
        ({"key_indices": int32(1, 2, 3)}, "key_indices must be"),
        ({"key_indices": int32([1, 1, 1], [0, 1, 1], [0, 1, 1])}, "room for 3 key blocks"),
        ({"key_indices": int32([], [], [])}, "key_indices is empty"),
        ({"key_lengths": int32(32, 32, 32)}, r"key_lengths must be .* 2\]"),
        (
            {"key_block": None, "key_offsets": int32(0, 3, 64), "key_lengths": int32(1, 1)},
            "uniform",
        ),
        ({"query_permutation": int32(*range(41))}, r"query_permutation must be .* 40\]"),
        (
            {"query_permutation": int32(*range(39)), "query_lengths": int32(1, 2, 3)},
            r"query_permutation must be .* 40\]",
        ),
        (
            {"query_permutation": int32(7)[0, 0, 0], "query_lengths": int32(1, 2, 3)},
            r"query_permutation must be .* 40\], found int32 \[\]",
        ),
        ({"key_counts": int32(1, 2, 0).expand(2, 3, 3)}, "key_counts must be contiguous"),
        (
            {
                "key_counts": int32(1, 2, 0).repeat(2, 1, 1),
                "key_lengths": int32(3, 3).repeat(3, 1, 1),
            },
            "key_lengths has 3 batch items, key_counts has 2",
        ),
        ({"key_lengths": torch.empty(1, 1, 2, dtype=torch.int32, device="meta")}, "on one device"),
    ],
)
def test_what_the_shapes_tell_is_refused_at_once(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        BlockSparsePlan(**fields(**changes))


VARIABLE = {"query_block": None, "key_block": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"key_counts": int32(1, -2, 0)},
            "not be negative: found -2 at batch 0, head 0, query block 1",
        ),
        ({"key_counts": int32(1, 2, 3)}, "capacity of the lists, 2: found 3 at .* query block 2"),
        (
            {"key_indices": int32([2, 0], [0, 1], [0, 0])},
            "from 0 to 1: found 2 at batch 0, head 0, query block 0, entry 0",
        ),
        ({"key_indices": int32([1, 0], [-1, 1], [0, 0])}, "found -1 at .* query block 1, entry 0"),
        ({"key_indices": int32([1, 0], [1, 1], [0, 0])}, "twice: found 1 at .* block 1, entry 1"),
        (
            {"key_indices": int32([1, 0], [1, 0], [0, 0])},
            "ascending: found 0 at .* block 1, entry 1",
        ),
        ({"query_lengths": int32(16, 17, 8)}, "query_lengths .* found 17 at .* query block 1"),
        ({"query_lengths": int32(16, 16, 9)}, "found 9 at .* query block 2, which has 8 rows"),
        ({"query_lengths": int32(16, 16, 9)}, "query_lengths .* found 9 at .* query block 2"),
        ({"key_lengths": int32(0, -1)}, "key_lengths .* found -1 at .* key block 1"),
        ({"key_permutation": int32(*range(63), 64)}, "from 0 to 63: found 64 at .* position 63"),
        ({"key_permutation": int32(*range(63), 7)}, "repeats a token: found 7 at .* position 63"),
        ({"key_permutation": int32(*range(62), 5, 5)}, "found 5 at batch 0, head 0, position 62"),
        ({"query_permutation": int32(-1, *range(39))}, "query_permutation .* found -1"),
        (
            {"query_block": None, "query_offsets": int32(1, 2, 3, 40)},
            "query_offsets must start at 0: found 1 at batch 0, head 0",
        ),
        (
            {"query_block": None, "query_offsets": int32(0, 2, 3, 39)},
            "query_offsets must end at 40: found 39",
        ),
        (
            {"key_block": None, "key_offsets": int32(0, 65, 64)},
            "key_offsets decrease at the end of a block: found 64 at .* key block 1",
        ),
    ],
)
def test_values_that_no_kernel_may_meet_are_named(changes: dict[str, Any], said: str) -> None:
    plan = BlockSparsePlan(**fields(**changes))
    with pytest.raises(PlanError, match=said):
        plan.validate()


def longer(*order: int) -> BlockSparsePlan:
    """40 positions, 37 of them within lengths of 16, 13 and 8, for 38 queries."""
    return BlockSparsePlan(
        **fields(query_length=38, query_lengths=int32(16, 13, 8), query_permutation=int32(*order))
    )


def test_a_walk_may_have_positions_without_a_token() -> None:
    plan = longer(*range(29), -1, 29, -1, *range(30, 38)).validate()
    assert (plan.query_positions, plan.num_query_blocks) == (40, 3)
    assert plan.blocks_of_tokens("query").tolist() == [[[0] * 16 + [1] * 13 + [-1] + [2] * 8]]
    assert plan.with_dense_blocks(query_spans=[(29, 30)]).key_counts.tolist() == [[[1, 2, 0]]]
    with pytest.raises(PlanError, match="no variable blocks"):
        plan.to_variable()


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([-1, *range(29), -1, 29, *range(30, 38)], "or -1 past .*: found -1 at .* position 0"),
        ([*range(29), -1, -2, 29, *range(30, 38)], "found -2 at .* position 30"),
        ([*range(29), -1, 38, -1, *range(29, 37)], "from 0 to 37, .*: found 38 at .* position 30"),
        ([*range(29), -1, 29, -1, 29, *range(31, 38)], "repeats a token: found 29"),
        ([*range(29), -1, -1, -1, *range(29, 37)], "name each of 38 tokens: found 37 at"),
    ],
)
def test_walks_with_the_wrong_tokens_are_named(order: list[int], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        longer(*order).validate()


def test_the_first_offender_is_named_by_batch_and_head() -> None:
    counts = int32(1, 2, 0).repeat(2, 3, 1)
    counts[1, 2, 1] = 7
    with pytest.raises(PlanError, match="found 7 at batch 1, head 2, query block 1"):
        BlockSparsePlan(**fields(key_counts=counts)).validate()


@pytest.mark.parametrize("value", [-(10**6), -1, 10**6])
@pytest.mark.parametrize("what", ["key_indices", "permutations", "query_offsets", "key_offsets"])
def test_wrong_values_fail_no_assertion_of_an_index(what: str, value: int) -> None:
    """On a GPU it would be one on the device, after which nothing runs."""
    kind: Any = "variable" if what.endswith("offsets") else "uniform"
    plan = random_plan(2, queries=kind, keys=kind, permute_queries=True, permute_keys=True)
    changes = {
        name: torch.where(torch.rand(tensor.shape) < 0.5, tensor, value)
        for name, tensor in plan.tensors().items()
        if what in name or (what == "permutations" and "permutation" in name)
    }
    wrong = replace(plan, **changes)
    assert wrong.to_mask().shape == (1, 1, 70, 90)
    wrong.with_dense_blocks([(0, 9)], [(5, 9)]).to_mask()
    wrong.density()
    wrong.to_variable()
    with pytest.raises(PlanError):
        wrong.validate()


def test_moving_a_plan() -> None:
    plan = random_plan(3, queries="ragged", keys="variable", permute_keys=True)
    assert plan.to("cpu") is plan
    moved = plan.to(torch.device("meta"))
    assert moved.device.type == "meta"
    assert list(moved.tensors()) == list(plan.tensors())
    assert str(moved) == str(plan).replace("cpu", "meta")


@given(plan=plans())
@settings(deadline=None, max_examples=50)
def test_valid_plans_are_not_refused(plan: BlockSparsePlan) -> None:
    plan.validate()


# --- words and pictures ---------------------------------------------------------------------------


def test_a_plan_says_what_it_is_in_one_line() -> None:
    plan = random_plan(
        0, queries="ragged", keys="variable", permute_keys=True, query_length=70, key_length=90
    )
    text = str(plan)
    assert "\n" not in text
    assert text == repr(plan)
    for part in ("70 in 5 blocks of 16, ragged", "90 in 6 variable blocks, permuted", "cpu"):
        assert part in text


def test_a_drawing_shows_the_share_of_pairs_that_is_attended(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    plan = BlockSparsePlan(
        query_length=32,
        key_length=2048,
        query_block=16,
        key_block=2048 // 2,
        key_counts=int32(1, 0).repeat(1, 2, 1),
        key_indices=torch.tensor([[[[0], [0]], [[1], [0]]]], dtype=torch.int32),
        key_lengths=int32(1024, 1),
    )
    plan.draw(tmp_path / "plan.png", batch=0, head=1)
    image = image_module.open(tmp_path / "plan.png")
    assert image.size == (1024, 32)
    values = list(image.tobytes())
    first, last = values[: 16 * 1024], values[16 * 1024 :]
    assert set(last) == {255}
    # One key of the pixel's two: half dark, where block 1 starts; everything else is blank.
    assert {at % 1024 for at, value in enumerate(first) if value != 255} == {512}
    assert first[512] in (127, 128)
    plan.draw(tmp_path / "plan.png", batch=5)  # shared by all items
    with pytest.raises(PlanError, match="no head 2: the plan has 2, numbered from 0"):
        plan.draw(tmp_path / "plan.png", head=2)
    with pytest.raises(PlanError, match="cannot write .*nowhere"):
        plan.draw(tmp_path / "nowhere" / "plan.png")


def test_drawing_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PlanError, match=r"pip install \"polyattn-kernels\[draw\]\""):
        random_plan(0).draw(tmp_path / "plan.png")
