"""k-means against a slow Lloyd loop, and plans of clusters against masks made from labels."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from polyattn_kernels import block_sparse_attention, clustering
from polyattn_kernels._triton_support import triton_reasons
from polyattn_kernels.clustering import (
    TokenGroups,
    assign_to_centroids,
    group_by_label,
    kmeans,
    plan_from_groups,
    random_centroids,
    token_chunks,
)
from polyattn_kernels.errors import AttentionInputError
from polyattn_kernels.permutation import inverse_permute_tokens, permute_tokens
from polyattn_kernels.pooling import pool_blocks
from polyattn_kernels.selection import select_threshold, select_top_k, select_top_p

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(params=["torch", "triton"])
def provider(request: pytest.FixtureRequest) -> str:
    reasons = triton_reasons(torch.empty(1, device=DEVICE)) if request.param == "triton" else []
    if reasons:
        pytest.skip("; ".join(reasons))
    return str(request.param)


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small integers: every product and sum is exact in every order, so ties are real."""
    return torch.randint(-2, 3, shape, device=DEVICE).float()


def loop_labels(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    batch, length, heads, _ = x.shape
    labels = torch.zeros(batch, heads, length, dtype=torch.int32, device=x.device)
    for b in range(batch):
        for h in range(heads):
            for s in range(length):
                away = (x[b, s, h].double() - centroids[b, :, h].double()).square().sum(-1)
                labels[b, h, s] = away.tolist().index(float(away.min()))
    return labels


def loop_lloyd(
    x: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    centroids = centroids.double().clone()
    for _ in range(iterations):
        labels = loop_labels(x, centroids)
        for b in range(x.shape[0]):
            for h in range(x.shape[2]):
                for c in range(centroids.shape[1]):
                    members = x[b, labels[b, h] == c, h].double()
                    if len(members):
                        centroids[b, c, h] = members.mean(0)
    return labels, centroids


@pytest.mark.parametrize(("length", "clusters", "width"), [(1, 1, 4), (70, 9, 6), (150, 100, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_labels_are_the_nearest_and_lowest(
    length: int, clusters: int, width: int, dtype: torch.dtype, provider: str
) -> None:
    torch.manual_seed(0)
    x = whole_numbers(2, 3, length, 2 * width).to(dtype).transpose(1, 2)[..., ::2]
    centroids = whole_numbers(2, clusters, 3, width)
    labels = assign_to_centroids(x, centroids, provider=provider)
    assert labels.dtype is torch.int32
    assert torch.equal(labels, loop_labels(x, centroids))


def test_of_equal_centroids_far_apart_the_first_attracts(provider: str) -> None:
    x = whole_numbers(1, 20, 1, 16)
    same = torch.ones(1, 200, 1, 16, device=DEVICE)
    same[0, ::3] = 50.0
    assert assign_to_centroids(x, same, provider=provider).unique().tolist() == [1]


def test_labels_of_real_numbers_are_nearest_within_rounding(provider: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 200, 2, 64, device=DEVICE)
    centroids = torch.randn(1, 40, 2, 64, device=DEVICE)
    labels = assign_to_centroids(x, centroids, provider=provider).long()
    away = torch.cdist(x.transpose(1, 2).double(), centroids.transpose(1, 2).double())
    picked = away.gather(-1, labels[..., None]).squeeze(-1)
    assert torch.allclose(picked, away.amin(-1), rtol=1e-5)


def test_nan_never_attracts_and_gets_label_zero(provider: str) -> None:
    x = torch.ones(1, 5, 1, 16, device=DEVICE)
    x[0, 3] = NAN
    centroids = torch.zeros(1, 4, 1, 16, device=DEVICE)
    centroids[0, 1] = NAN
    centroids[0, 2] = 1.0
    assert assign_to_centroids(x, centroids, provider=provider).tolist() == [[[2, 2, 2, 0, 2]]]


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_is_lloyds_loop(iterations: int, dtype: torch.dtype, provider: str) -> None:
    if provider == "triton" and dtype is torch.float64:
        pytest.skip("the Triton kernels accumulate in float32")
    torch.manual_seed(2)
    x = torch.randn(2, 60, 2, 5, device=DEVICE, dtype=dtype)
    start = x[:, :7].clone()  # no two alike, so that rounding cannot turn a tie
    kept = start.clone()
    result = kmeans(x, start, iterations, provider=provider)
    labels, centroids = loop_lloyd(x, start, iterations)
    assert torch.equal(result.labels, labels)
    assert torch.allclose(result.centroids.double(), centroids, atol=1e-6)
    assert result.centroids.dtype is dtype
    assert torch.equal(start, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centroids_are_the_means_of_the_labels_and_empty_ones_stay(
    dtype: torch.dtype, provider: str
) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 50, 2, 8, device=DEVICE).to(dtype)
    start = torch.randn(1, 6, 2, 8, device=DEVICE)
    start[:, 4] = 1000.0  # nobody is near
    result = kmeans(x, start, 3, provider=provider)
    sizes = result.groups.sizes
    assert sizes[0, :, 4].tolist() == [0, 0]
    assert torch.equal(result.centroids[:, 4], start[:, 4])
    for h in range(2):
        for c in range(6):
            members = x[0, result.labels[0, h] == c, h].double()
            assert len(members) == sizes[0, h, c]
            if len(members):
                mean = result.centroids[0, c, h].double()
                assert torch.allclose(mean, members.mean(0), atol=1e-6)


def test_a_warm_start_goes_on_where_the_call_before_stopped(provider: str) -> None:
    torch.manual_seed(4)
    x = torch.randn(1, 80, 2, 8, device=DEVICE)
    start = random_centroids(x, 5, generator=torch.Generator().manual_seed(1))
    once = kmeans(x, start, 5, provider=provider)
    twice = kmeans(x, kmeans(x, start, 2, provider=provider).centroids, 3, provider=provider)
    assert torch.equal(once.labels, twice.labels)
    assert torch.equal(once.centroids, twice.centroids)


def test_separated_clusters_are_found(provider: str) -> None:
    torch.manual_seed(5)
    truth = torch.randint(0, 4, (90,), device=DEVICE)
    middles = 20 * torch.eye(4, 16, device=DEVICE)
    x = (middles[truth] + torch.randn(90, 16, device=DEVICE))[None, :, None]
    first = [int((truth == c).nonzero()[0]) for c in range(4)]
    result = kmeans(x, x[:, first], 4, provider=provider)
    assert torch.equal(result.labels[0, 0].long(), truth)


def test_tolerance_settles_each_problem_by_itself(provider: str) -> None:
    torch.manual_seed(6)
    # Head 0 converges at once: every token is a centroid. Head 1 goes on.
    x = torch.randn(1, 120, 2, 4, device=DEVICE)
    x[:, :, 0] = x[:, :6, 0].repeat(1, 20, 1)
    start = x[:, :6].clone()
    free = kmeans(x, start, 6, provider=provider)
    held = kmeans(x, start, 6, tolerance=1e-5, provider=provider)
    assert torch.equal(free.labels, held.labels)
    assert torch.allclose(free.centroids, held.centroids, atol=1e-4)
    # Any move is below an infinite tolerance: the first iteration stands, labels and means alike.
    stopped = kmeans(x, start, 6, tolerance=float("inf"), provider=provider)
    once = kmeans(x, start, 1, provider=provider)
    assert torch.equal(stopped.labels, once.labels)
    assert torch.equal(stopped.centroids, once.centroids)
    assert torch.equal(stopped.groups.permutation, once.groups.permutation)
    assert not torch.equal(free.labels, once.labels)


def test_a_nan_token_spoils_one_cluster_only(provider: str) -> None:
    torch.manual_seed(7)
    x = torch.randn(1, 40, 2, 8, device=DEVICE)
    x[0, 11, 1] = NAN
    result = kmeans(x, x[:, :5].clone(), 4, provider=provider)
    assert result.centroids[0, 0, 1].isnan().all()
    assert result.centroids[0, 1:, 1].isfinite().all()
    assert result.centroids[0, :, 0].isfinite().all()
    assert result.labels[0, 1, 11] == 0


def test_equal_inputs_give_equal_bits(provider: str) -> None:
    x = torch.randn(1, 200, 2, 16, device=DEVICE).to(torch.bfloat16)
    first, second = (
        kmeans(
            x,
            random_centroids(x, 20, generator=torch.Generator().manual_seed(9)),
            3,
            provider=provider,
        )
        for _ in range(2)
    )
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.centroids, second.centroids)


def test_random_centroids_are_tokens_of_their_own_head() -> None:
    x = torch.randn(2, 9, 3, 4, device=DEVICE).to(torch.bfloat16)
    drawn = random_centroids(x, 30, generator=torch.Generator().manual_seed(3))
    assert drawn.dtype is torch.float32
    found = (drawn[:, :, None] == x.float()[:, None]).all(-1).any(2)
    assert found.all()
    assert not torch.equal(drawn[0], drawn[1])
    again = random_centroids(x, 30, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, again)
    torch.manual_seed(0)
    assert not torch.equal(random_centroids(x, 30), random_centroids(x, 30))


def test_scores_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    step = token_chunks(75_600, 40 * 1000)[0][1]
    assert step * 40 * 1000 <= clustering.SCORE_ELEMENTS
    assert token_chunks(75_600, 1 << 30)[:2] == [(0, 1), (1, 2)]
    x = torch.randn(1, 50, 2, 8, device=DEVICE, dtype=torch.float64)
    centroids = torch.randn(1, 7, 2, 8, device=DEVICE)
    whole = assign_to_centroids(x, centroids, provider="torch")
    monkeypatch.setattr(clustering, "SCORE_ELEMENTS", 2 * 7 * 8)
    assert token_chunks(50, 2 * 7)[-1] == (48, 50)
    assert torch.equal(assign_to_centroids(x, centroids, provider="torch"), whole)


# --- groups and plans -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 40), st.integers(1, 8), st.data())
def test_groups_are_a_stable_sort(
    batch: int, heads: int, length: int, groups: int, data: st.DataObject
) -> None:
    count = batch * heads * length
    flat = data.draw(st.lists(st.integers(0, groups - 1), min_size=count, max_size=count))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.uint8]))
    labels = torch.tensor(flat, dtype=dtype, device=DEVICE).view(batch, heads, length)
    found = group_by_label(labels, groups)
    assert found.permutation.dtype is torch.int32
    assert found.offsets.dtype is torch.int32
    assert found.permutation.is_contiguous()
    assert found.offsets.is_contiguous()
    assert found.num_groups == groups
    for b in range(batch):
        for h in range(heads):
            row = labels[b, h].tolist()
            members = [[s for s in range(length) if row[s] == c] for c in range(groups)]
            assert found.permutation[b, h].tolist() == list(itertools.chain(*members))
            assert found.sizes[b, h].tolist() == [len(tokens) for tokens in members]
            assert found.offsets[b, h, 0] == 0
            assert found.offsets[b, h, -1] == length


def random_groups(heads: int, length: int, groups: int) -> tuple[torch.Tensor, TokenGroups]:
    labels = torch.randint(0, groups, (2, heads, length), dtype=torch.int32, device=DEVICE)
    labels[labels == groups - 2] = 0  # an empty group
    return labels, group_by_label(labels, groups)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_the_plan_of_groups_is_the_mask_of_labels(key_heads: int) -> None:
    torch.manual_seed(8)
    query_labels, queries = random_groups(4, 33, 5)
    key_labels, keys = random_groups(key_heads, 41, 7)
    block_map = torch.rand(2, 4, 5, 7, device=DEVICE) < 0.4
    plan = plan_from_groups(queries, keys, block_map)
    plan.validate()
    key_labels = key_labels.repeat_interleave(4 // key_heads, 1)
    expected = torch.zeros(2, 4, 33, 41, dtype=torch.bool, device=DEVICE)
    for b in range(2):
        for h in range(4):
            by_query = block_map[b, h][query_labels[b, h].long()]
            expected[b, h] = by_query[:, key_labels[b, h].long()]
    assert torch.equal(plan.to_mask().expand(2, 4, 33, 41), expected)


def test_the_plan_of_equal_tiles_cuts_the_sorted_walk() -> None:
    torch.manual_seed(9)
    _, queries = random_groups(2, 70, 5)
    _, keys = random_groups(2, 90, 7)
    q = torch.randn(2, 70, 2, 8, device=DEVICE)
    k = torch.randn(2, 90, 2, 8, device=DEVICE)
    query_means, _ = pool_blocks(q, block=32, permutation=queries.permutation)
    key_means, key_sizes = pool_blocks(k, block=16, permutation=keys.permutation)
    scores = query_means.transpose(1, 2) @ key_means.permute(0, 2, 3, 1)
    selection = select_top_k(scores, 3, key_sizes=key_sizes)
    plan = plan_from_groups(queries, keys, selection, query_block=32, key_block=16)
    plan.validate()
    assert plan.is_uniform
    mask, blocks = plan.to_mask(), selection.to_mask()
    for b, h, i, j in ((0, 0, 0, 0), (1, 1, 69, 89), (0, 1, 40, 17), (1, 0, 31, 15)):
        query = int(queries.permutation[b, h, i])
        key = int(keys.permutation[b, h, j])
        assert bool(mask[b, h, query, key]) == bool(blocks[b, h, i // 32, j // 16])
    assert int(mask.sum()) == sum(
        int(blocks[b, h, i // 32, j // 16])
        for b in range(2)
        for h in range(2)
        for i in range(70)
        for j in range(90)
    )


def test_everything_selected_is_everything_attended() -> None:
    torch.manual_seed(10)
    x = torch.randn(1, 60, 2, 8, device=DEVICE)
    clusters = kmeans(x, random_centroids(x, 6, generator=torch.Generator().manual_seed(0)), 2)
    centroids = clusters.centroids.transpose(1, 2)
    scores = centroids @ centroids.transpose(-1, -2)
    selection = select_top_p(scores, 1.0, key_sizes=clusters.groups.sizes)
    plan = plan_from_groups(clusters.groups, clusters.groups, selection)
    assert bool(plan.to_mask().all())
    assert float(plan.density()) == 1.0


@pytest.mark.parametrize("block", [None, 16])
def test_attention_over_chosen_groups_is_masked_attention(block: int | None) -> None:
    torch.manual_seed(11)
    q, k, v = (torch.randn(1, 70, 2, 16, device=DEVICE) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    queries = kmeans(q, random_centroids(q, 4, generator=generator), 2).groups
    keys = kmeans(k, random_centroids(k, 9, generator=generator), 2).groups
    if block is None:
        query_means, _ = pool_blocks(q, offsets=queries.offsets, permutation=queries.permutation)
        key_means, sizes = pool_blocks(k, offsets=keys.offsets, permutation=keys.permutation)
    else:
        query_means, _ = pool_blocks(q, block=block, permutation=queries.permutation)
        key_means, sizes = pool_blocks(k, block=block, permutation=keys.permutation)
    scores = query_means.transpose(1, 2) @ key_means.permute(0, 2, 3, 1) / 4
    selection = select_top_p(scores, 0.6, key_sizes=sizes)
    plan = plan_from_groups(queries, keys, selection, query_block=block, key_block=block)
    assert 0 < float(plan.density()) < 1
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=plan.to_mask()
    )
    out = block_sparse_attention(q, k, v, plan, provider="reference")
    assert isinstance(out, torch.Tensor)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


def test_nothing_waits_for_the_device() -> None:
    # A fake tensor has no values: whatever needs one on the host is an error.
    with FakeTensorMode():
        x = torch.empty(1, 96, 2, 8)
        result = kmeans(x, random_centroids(x, 6), 3, tolerance=1e-4)
        sizes = result.groups.sizes
        centroids = result.centroids.transpose(1, 2)
        scores = centroids @ centroids.transpose(-1, -2)
        for selection in (
            select_top_k(scores, 2, key_sizes=sizes),
            select_top_p(scores, 0.9, key_sizes=sizes, minimum_ratio=0.1),
            select_threshold(scores, 0.0),
            select_threshold(scores, 0.0).to_mask(),
        ):
            plan = plan_from_groups(result.groups, result.groups, selection)
            assert plan.num_query_blocks == 6
        permuted = permute_tokens(x, result.groups.permutation)
        assert inverse_permute_tokens(permuted, result.groups.permutation).shape == x.shape


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 8, 2, 4)
    groups = group_by_label(torch.zeros(1, 2, 8, dtype=torch.int32), 3)
    other = group_by_label(torch.zeros(1, 4, 8, dtype=torch.int32), 3)
    selection = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    for call, message in (
        (lambda: kmeans(x, x[:, :2], 0), "iterations must be at least 1, found 0"),
        (lambda: kmeans(x, x[:, :2], 1, tolerance=0.0), "tolerance must be a distance above 0"),
        (lambda: kmeans(x, x[:, :0], 1), "at least one cluster"),
        (lambda: kmeans(x, x[:, :2, :1], 1), "H=2"),
        (lambda: kmeans(x.int(), x[:, :2], 1), "floating point"),
        (lambda: kmeans(x, x[:, :2].to("meta"), 1), "are on meta"),
        (lambda: random_centroids(x[:, :0], 2), "at least one token"),
        (lambda: random_centroids(x, 0), "at least 1, found 0"),
        (lambda: group_by_label(x[..., 0], 2), "must be integers"),
        (lambda: plan_from_groups(groups, groups, selection, query_block=16), "give both"),
        (
            lambda: plan_from_groups(groups, groups, selection, query_block=16, key_block=16),
            "among 1 query and 1 key blocks, found 3 and 3",
        ),
        (
            lambda: plan_from_groups(groups, groups, select_top_k(torch.zeros(1, 2, 3, 4), 1)),
            "among 3 query and 3 key blocks, found 3 and 4",
        ),
        (lambda: plan_from_groups(groups, other, selection), "multiple of key heads"),
    ):
        with pytest.raises(AttentionInputError, match=message):
            call()
