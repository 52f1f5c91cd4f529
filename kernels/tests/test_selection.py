"""Selection rules against loops over rows, and the properties that make them safe to plan with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn_kernels._triton_support import triton_reasons
from polyattn_kernels.errors import AttentionInputError, ProviderError
from polyattn_kernels.selection import (
    LONGEST_TRITON_ROW,
    BlockSelection,
    select_threshold,
    select_top_k,
    select_top_p,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INFINITY = float("inf")
NAN = float("nan")


@pytest.fixture(params=["torch", "triton"])
def provider(request: pytest.FixtureRequest) -> str:
    reasons = triton_reasons(torch.empty(1, device=DEVICE)) if request.param == "triton" else []
    if reasons:
        pytest.skip("; ".join(reasons))
    return str(request.param)


def rows_of(selection: BlockSelection) -> list[list[int]]:
    """The list of each row, flattened over batch and heads; checks what every list promises."""
    assert selection.key_indices.dtype is torch.int32
    assert selection.key_counts.dtype is torch.int32
    assert selection.key_indices.is_contiguous()
    lists = []
    counts = selection.key_counts.flatten().tolist()
    for entries, count in zip(selection.key_indices.flatten(0, 2).tolist(), counts, strict=True):
        assert 0 <= count <= len(entries)
        assert entries[:count] == sorted(set(entries[:count]))
        assert not any(entries[count:])
        assert all(0 <= entry < selection.num_key_blocks for entry in entries[:count])
        lists.append(entries[:count])
    return lists


def ranking(row: list[float], sizes: list[int] | None) -> list[int]:
    """Blocks that can be selected, best first, the lowest number first among equals."""
    able = [j for j, s in enumerate(row) if s > -INFINITY and (sizes is None or sizes[j] > 0)]
    return sorted(able, key=lambda j: (-row[j], j))


def loop_top_p(row: list[float], p: float, minimum: int, maximum: int) -> list[int]:
    ranked = ranking(row, None)
    if not ranked:
        return []
    weights = [math.exp(row[j] - row[ranked[0]]) for j in ranked]
    taken, mass = 0, 0.0
    while taken < len(ranked) and (mass < p * sum(weights) or p == 1):
        mass += weights[taken]
        taken += 1
    return sorted(ranked[: min(max(taken, minimum), maximum)])


def on_device(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([[rows]], device=DEVICE)


def test_top_k_breaks_ties_by_the_lowest_number(provider: str) -> None:
    scores = on_device(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [-0.0, 2.0, 0.0, 0.0, 2.0],
            [-1.0, -3.0, -1.0, -2.0, -1.0],
            [NAN, -INFINITY, NAN, 5.0, -INFINITY],
            [INFINITY, 1.0, INFINITY, 3.0, INFINITY],
            [NAN, NAN, NAN, NAN, NAN],
            [-1e-30, 1e-30, 0.0, -1e-28, 1e-28],
        ]
    )
    chosen = rows_of(select_top_k(scores, 3, provider=provider))
    assert chosen == [[0, 1, 2], [0, 1, 4], [0, 2, 4], [3], [0, 2, 4], [], [1, 2, 4]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_top_k_is_the_loop(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 40))
    values = st.sampled_from([-INFINITY, NAN, -2.0, -0.5, 0.0, 0.25, 1.0, 1e30])
    row = data.draw(st.lists(values, min_size=blocks, max_size=blocks))
    sizes = data.draw(st.lists(st.integers(0, 2), min_size=blocks, max_size=blocks))
    k = data.draw(st.integers(1, 50))
    expected = sorted(ranking(row, sizes)[:k])
    key_sizes = torch.tensor([[sizes]], dtype=torch.int32, device=DEVICE)
    scores = on_device([row])
    providers = ["torch"] if triton_reasons(scores) else ["torch", "triton"]
    for name in providers:
        assert rows_of(select_top_k(scores, k, key_sizes=key_sizes, provider=name)) == [expected]


@pytest.mark.parametrize("blocks", [1, 31, 64, 200, 1182])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_providers_select_the_same(blocks: int, dtype: torch.dtype, provider: str) -> None:
    torch.manual_seed(blocks)
    # Heads beside rows in memory; bf16 gives many ties.
    scores = torch.randn(2, 3, 2, blocks, device=DEVICE).to(dtype).transpose(1, 2)
    sizes = torch.randint(0, 3, (2, 1, blocks), dtype=torch.int32, device=DEVICE)
    for k in (1, blocks // 3 + 1, blocks):
        chosen = rows_of(select_top_k(scores, k, key_sizes=sizes, provider=provider))
        for place, row in enumerate(scores.float().flatten(0, 2).tolist()):
            expected = sorted(ranking(row, sizes[place // 6, 0].tolist())[:k])
            assert chosen[place] == expected
    chosen = rows_of(select_threshold(scores, 0.5, provider=provider))
    for place, row in enumerate(scores.float().flatten(0, 2).tolist()):
        assert chosen[place] == [j for j, score in enumerate(row) if score >= 0.5]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 1.0])
def test_top_p_is_the_loop(p: float, provider: str) -> None:
    torch.manual_seed(3)
    scores = 3 * torch.randn(1, 1, 4, 60, device=DEVICE)
    scores[..., ::7] = scores[..., 1:2]  # ties
    scores[0, 0, 0] = -INFINITY
    scores[0, 0, 1, 3:] = NAN
    for minimum, maximum in ((1, 60), (20, 60), (1, 4), (5, 5)):
        selection = select_top_p(
            scores, p, minimum_count=minimum, maximum_count=maximum, provider=provider
        )
        assert selection.key_indices.shape[-1] == maximum
        expected = [
            loop_top_p([-INFINITY if math.isnan(s) else s for s in row], p, minimum, maximum)
            for row in scores.flatten(0, 2).tolist()
        ]
        assert rows_of(selection) == expected


def test_top_p_weighs_blocks_by_size(provider: str) -> None:
    scores = torch.zeros(1, 1, 1, 4, device=DEVICE)
    sizes = torch.tensor([[[1, 4, 0, 3]]], dtype=torch.int32, device=DEVICE)

    def chosen(p: float, **options: bool) -> list[int]:
        return rows_of(select_top_p(scores, p, key_sizes=sizes, provider=provider, **options))[0]

    assert chosen(0.45) == [1]
    assert chosen(0.55) == [1, 3]
    assert chosen(1.0) == [0, 1, 3]
    assert chosen(0.3, weighted=False) == [0]
    assert chosen(0.6, weighted=False) == [0, 1]


def test_top_p_stops_at_the_block_that_crosses(provider: str) -> None:
    # Masses are exactly 1/2, 1/4, 1/8, 1/8: equality is reached, not crossed.
    scores = torch.tensor([0.0, -INFINITY, 0.0, 0.0, 0.0, 0.0], device=DEVICE).view(1, 1, 1, 6)
    sizes = torch.tensor([[[4, 8, 2, 1, 1, 0]]], dtype=torch.int32, device=DEVICE)

    def chosen(p: float) -> list[int]:
        return rows_of(select_top_p(scores, p, key_sizes=sizes, provider=provider))[0]

    if provider == "torch":  # log and exp of powers of two are not exact on every device
        assert chosen(0.49) == [0]
    assert chosen(0.51) == [0, 2]
    assert chosen(0.76) == [0, 2, 3]
    assert chosen(0.89) == [0, 2, 3, 4]


def test_top_p_of_infinite_scores(provider: str) -> None:
    scores = on_device([[INFINITY, 3.0, INFINITY, INFINITY], [3e38, -3e38, 3e38, 0.0]])
    assert rows_of(select_top_p(scores, 0.5, provider=provider)) == [[0, 2], [0]]
    assert rows_of(select_top_p(scores, 0.5, minimum_ratio=0.75, provider=provider)) == [
        [0, 2, 3],
        [0, 2, 3],
    ]


def test_minimum_ratio_counts_all_blocks_and_rounds_down(provider: str) -> None:
    scores = torch.arange(11.0, device=DEVICE).view(1, 1, 1, 11) * 100
    assert rows_of(select_top_p(scores, 0.5, minimum_ratio=0.3, provider=provider)) == [[8, 9, 10]]


def test_threshold_keeps_its_bounds(provider: str) -> None:
    scores = on_device([[0.0, 3.0, 1.0, 2.0], [-1.0, -2.0, NAN, -INFINITY]])

    def chosen(threshold: float, minimum: int, maximum: int | None) -> list[list[int]]:
        return rows_of(
            select_threshold(
                scores, threshold, minimum_count=minimum, maximum_count=maximum, provider=provider
            )
        )

    assert chosen(1.0, 0, None) == [[1, 2, 3], []]
    assert chosen(1.0, 1, None) == [[1, 2, 3], [0]]
    assert chosen(1.0, 0, 2) == [[1, 3], []]
    assert chosen(-INFINITY, 0, None) == [[0, 1, 2, 3], [0, 1]]
    assert chosen(INFINITY, 0, None) == [[], []]


def test_selection_is_the_same_in_every_run(provider: str) -> None:
    scores = torch.randn(1, 2, 3, 300, device=DEVICE).round(decimals=1)
    first, second = (select_top_p(scores, 0.8, provider=provider) for _ in range(2))
    assert torch.equal(first.key_indices, second.key_indices)
    assert torch.equal(first.key_counts, second.key_counts)


def test_the_mask_holds_what_the_lists_hold(provider: str) -> None:
    torch.manual_seed(5)
    scores = torch.randn(2, 3, 4, 9, device=DEVICE)
    scores[0, 0, 0] = -INFINITY
    scores[0, 0, 1] = 1.0
    selection = select_threshold(scores, 0.3, maximum_count=8, provider=provider)
    mask = selection.to_mask()
    assert mask.shape == scores.shape
    assert [row.nonzero().flatten().tolist() for row in mask.flatten(0, 2)] == rows_of(selection)
    assert rows_of(selection)[:2] == [[], list(range(8))]


def test_checked_mode_refuses_nan() -> None:
    scores = torch.zeros(1, 2, 3, 4)
    select_top_k(scores, 2, checked=True)
    scores[0, 1, 2, 3] = NAN
    with pytest.raises(AttentionInputError, match=r"\[0, 1, 2, 3\] is NaN"):
        select_top_k(scores, 2, checked=True)


def test_what_cannot_be_is_refused() -> None:
    scores = torch.zeros(1, 2, 3, 4)
    sizes = torch.ones(1, 1, 4, dtype=torch.int32)
    for call, message in (
        (lambda: select_top_k(scores, 0), "k must be at least 1"),
        (lambda: select_top_k(scores[0], 1), r"\[B, H, Mq, Mk\]"),
        (lambda: select_top_k(scores.int(), 1), "floating point"),
        (lambda: select_top_k(scores, 1, key_sizes=sizes.long()), "must be int32"),
        (lambda: select_top_k(scores, 1, key_sizes=sizes[..., :3]), "Mk=4"),
        (lambda: select_top_k(scores, 1, key_sizes=sizes.to("meta")), "is on meta"),
        (lambda: select_top_p(scores, 0.0), r"\(0, 1\]"),
        (lambda: select_top_p(scores, 1.5), r"\(0, 1\]"),
        (lambda: select_top_p(scores, 0.5, minimum_ratio=2.0), "minimum_ratio"),
        (lambda: select_top_k(scores, 2.5), "k must be an int, found 2.5"),
        (
            lambda: select_top_p(scores, 0.5, minimum_count=3, maximum_count=2),
            "maximum_count must not be below minimum_count, found 2 and 3",
        ),
        (
            lambda: select_top_p(scores, 0.5, minimum_ratio=0.8, maximum_count=2),
            "minimum_ratio=0.8 asks for at least 3 of 4 blocks, maximum_count for at most 2",
        ),
        (lambda: select_top_p(scores, 0.5, maximum_count=0), "maximum_count must be at least 1"),
        (lambda: select_threshold(scores, NAN), "found nan"),
        (
            lambda: select_threshold(scores, 0.0, minimum_count=-1),
            "minimum_count must be at least 0",
        ),
    ):
        with pytest.raises(AttentionInputError, match=message):
            call()
    with pytest.raises(ProviderError, match=f"up to {LONGEST_TRITON_ROW} key blocks"):
        select_top_k(torch.zeros(1, 1, 1, LONGEST_TRITON_ROW + 1), 1, provider="triton")
