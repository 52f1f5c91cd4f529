"""Block means against loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn_kernels import pooling
from polyattn_kernels._triton_support import triton_reasons
from polyattn_kernels.errors import AttentionInputError
from polyattn_kernels.permutation import gather_tokens
from polyattn_kernels.pooling import gather_and_pool, head_chunks, pool_blocks
from polyattn_kernels.tiling import tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(params=["torch", "triton"])
def provider(request: pytest.FixtureRequest) -> str:
    reasons = triton_reasons(torch.empty(1, device=DEVICE)) if request.param == "triton" else []
    if reasons:
        pytest.skip("; ".join(reasons))
    return str(request.param)


def loop_means(
    x: torch.Tensor, ranges: list[list[tuple[int, int]]], permutation: torch.Tensor | None
) -> torch.Tensor:
    """Means over ranges[h % len][m] of the walk of head h, in float64."""
    batch, length, heads, width = x.shape
    means = torch.zeros(batch, len(ranges[0]), heads, width, dtype=torch.float64, device=x.device)
    for b in range(batch):
        for h in range(heads):
            order = torch.arange(length, device=x.device)
            if permutation is not None:
                order = permutation[b % permutation.shape[0], h % permutation.shape[1]].long()
            for m, (start, end) in enumerate(ranges[h % len(ranges)]):
                if end > start:
                    means[b, m, h] = x[b, order[start:end], h].double().mean(0)
    return means


def close(means: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    step = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    assert means.dtype is dtype
    assert torch.allclose(means.double(), expected, rtol=step[dtype], atol=step[dtype] * 0.1)


@pytest.mark.parametrize(("length", "block"), [(1, 16), (48, 16), (50, 16), (200, 128), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_uniform_blocks(
    length: int, block: int, dtype: torch.dtype, permuted: bool, provider: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, length, 10, device=DEVICE).to(dtype).transpose(1, 2)
    permutation = None
    if permuted:
        permutation = torch.rand(2, 3, length, device=DEVICE).argsort(-1).int()
    ranges = [(i, min(i + block, length)) for i in range(0, length, block)]
    means, counts = pool_blocks(x, block=block, permutation=permutation, provider=provider)
    close(means, loop_means(x, [ranges], permutation), dtype)
    assert counts.dtype is torch.int32
    assert counts.tolist() == [[[end - start for start, end in ranges]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_the_length_are_never_read(dtype: torch.dtype, provider: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 40, 2, 8, device=DEVICE).to(dtype)
    lengths = torch.tensor([[[16, 3, 8], [0, 16, 1]]], dtype=torch.int32, device=DEVICE)
    for h in range(2):
        for m in range(3):
            x[:, m * 16 + int(lengths[0, h, m]) : (m + 1) * 16, h] = NAN
    means, counts = pool_blocks(x, block=16, lengths=lengths, provider=provider)
    ranges = [[(m * 16, m * 16 + int(lengths[0, h, m])) for m in range(3)] for h in range(2)]
    close(means, loop_means(x, ranges, None), dtype)
    assert torch.equal(counts, lengths)
    assert not means[:, 0, 1].any()  # an empty block is zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [10, 64])
def test_gathered_and_pooled_in_one_pass(
    width: int, shared: bool, dtype: torch.dtype, provider: str
) -> None:
    """To the bit what the two tools give; hidden rows are moved and in no mean."""
    torch.manual_seed(2)
    built = tiling((5, 6, 7), (4, 4, 4), text_before=3, text_after=70, device=DEVICE)
    x = torch.randn(2, 3, built.length, width, device=DEVICE).to(dtype).transpose(1, 2)
    index, lengths = built.slot_tokens, built.lengths
    if not shared:  # each batch item hides its own tokens, and they hold NaN
        visible = torch.rand(2, built.length, device=DEVICE) < 0.8
        index, lengths = built.visible_first(visible)
        x = x.masked_fill(~visible[..., None, None], NAN)
    for asked in (None, torch.float32):
        moved, means = gather_and_pool(
            x, index, block=built.block, lengths=lengths, dtype=asked, provider=provider
        )
        expected = gather_tokens(x, index, provider=provider)
        assert torch.equal(moved.nan_to_num(7), expected.nan_to_num(7))
        pooled, _ = pool_blocks(
            expected, block=built.block, lengths=lengths, dtype=asked, provider=provider
        )
        assert means.dtype is pooled.dtype
        assert torch.equal(means, pooled)
        assert torch.isfinite(means).all()
        alone, _ = pool_blocks(
            x, block=built.block, lengths=lengths, permutation=index, dtype=asked, provider=provider
        )
        assert torch.equal(alone, means)  # without the gathered tensor


def test_gathered_and_pooled_without_lengths_or_rows(provider: str) -> None:
    x = torch.ones(1, 20, 2, 4, device=DEVICE)
    index = torch.tensor([[[3, -1, 19]]], dtype=torch.int32, device=DEVICE)
    moved, means = gather_and_pool(x, index, block=2, provider=provider)
    assert moved[0, :, 0, 0].tolist() == [1, 0, 1]
    assert means[0, :, 0, 0].tolist() == [0.5, 1]  # a row of zeros counts unless lengths say not
    moved, means = gather_and_pool(x, index[..., :0], block=2, provider=provider)
    assert moved.shape == means.shape == (1, 0, 2, 4)


def test_lengths_beyond_the_last_short_block_count_its_rows(provider: str) -> None:
    x = torch.ones(1, 20, 1, 4, device=DEVICE)
    lengths = torch.tensor([[[16, 16]]], dtype=torch.int32, device=DEVICE)
    means, counts = pool_blocks(x, block=16, lengths=lengths, provider=provider)
    assert counts.tolist() == [[[16, 4]]]
    assert torch.equal(means, torch.ones(1, 2, 1, 4, device=DEVICE))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_variable_blocks(data: st.DataObject) -> None:
    torch.manual_seed(2)
    length = data.draw(st.integers(1, 60))
    blocks = data.draw(st.integers(1, 9))
    cuts = st.lists(st.integers(0, length), min_size=blocks - 1, max_size=blocks - 1)
    offsets = [[0, *sorted(data.draw(cuts)), length] for _ in range(2)]
    permuted = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = torch.randn(2, length, 2, 5, device=DEVICE).to(dtype)
    permutation = torch.rand(1, 2, length, device=DEVICE).argsort(-1).int() if permuted else None
    ranges = [list(itertools.pairwise(row)) for row in offsets]
    providers = ["torch"] if triton_reasons(x) else ["torch", "triton"]
    for provider in providers:
        means, counts = pool_blocks(
            x,
            offsets=torch.tensor([offsets], dtype=torch.int32, device=DEVICE),
            permutation=permutation,
            provider=provider,
        )
        close(means, loop_means(x, ranges, permutation), dtype)
        assert counts.tolist() == [[[end - start for start, end in row] for row in ranges]]


def test_a_nan_stays_in_its_block(provider: str) -> None:
    x = torch.ones(1, 12, 1, 4, device=DEVICE)
    x[0, 5] = NAN
    offsets = torch.tensor([[[0, 4, 4, 9, 12]]], dtype=torch.int32, device=DEVICE)
    means, _ = pool_blocks(x, offsets=offsets, provider=provider)
    assert means[0, :, 0, 0].isnan().tolist() == [False, False, True, False]
    assert means[0, [0, 3]].eq(1).all()


def test_offsets_that_are_wrong_read_nothing_outside(provider: str) -> None:
    guarded = torch.full((1, 40, 1, 4), NAN, device=DEVICE)
    x = guarded[:, 16:24]
    x.fill_(1.0)
    for wrong in ([-9, 4, 8], [0, 4, 30], [0, 20, 3], [2, 4, 6]):
        offsets = torch.tensor([[wrong]], dtype=torch.int32, device=DEVICE)
        means, _ = pool_blocks(x, offsets=offsets, provider=provider)
        assert not means.isnan().any()


def test_sums_are_float32_and_the_mean_is_of_the_asked_dtype(provider: str) -> None:
    # A running bfloat16 sum of ones stops at 256.
    x = torch.ones(1, 1000, 1, 8, dtype=torch.bfloat16, device=DEVICE)
    means, _ = pool_blocks(x, block=1000, dtype=torch.float32, provider=provider)
    assert torch.equal(means, torch.ones(1, 1, 1, 8, device=DEVICE))


def test_tiles_of_both_layouts_have_the_same_means(provider: str) -> None:
    torch.manual_seed(4)
    built = tiling((3, 5, 4), (2, 2, 3), text_after=7, device=DEVICE)
    x = torch.randn(2, built.length, 2, 8, device=DEVICE)
    packed, packed_counts = pool_blocks(
        x, offsets=built.offsets, permutation=built.permutation, provider=provider
    )
    padded, padded_counts = pool_blocks(
        built.pad(x), block=built.block, lengths=built.lengths, provider=provider
    )
    assert torch.allclose(packed, padded, atol=1e-6)
    assert torch.equal(packed_counts, padded_counts)
    assert torch.equal(packed_counts, built.lengths)


def test_every_run_gives_the_same_bits(provider: str) -> None:
    x = torch.randn(2, 500, 2, 16, device=DEVICE)
    offsets = torch.tensor([[[0, 3, 3, 400, 500]]], dtype=torch.int32, device=DEVICE)
    first, second = (pool_blocks(x, offsets=offsets, provider=provider)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_few_heads_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 30, 5, 4, dtype=torch.float64)
    offsets = torch.tensor([[[0, 12, 30]]], dtype=torch.int32)
    permutation = torch.rand(1, 5, 30).argsort(-1).int()
    together, _ = pool_blocks(x, offsets=offsets, permutation=permutation, provider="torch")
    monkeypatch.setattr(pooling, "GATHERED_ELEMENTS", 30 * 4 * 2)
    assert head_chunks(30 * 4, 5) == [(0, 2), (2, 4), (4, 5)]
    apart, _ = pool_blocks(x, offsets=offsets, permutation=permutation, provider="torch")
    assert torch.equal(together, apart)


def test_chunks_of_heads_are_bounded_at_real_sizes() -> None:
    per_head = 75_600 * 128
    chunks = head_chunks(per_head, 40)
    assert chunks[0][0] == 0
    assert chunks[-1][1] == 40
    assert all((last - first) * per_head <= pooling.GATHERED_ELEMENTS for first, last in chunks)


@pytest.mark.parametrize("variable", [False, True])
def test_the_torch_path_is_differentiable(variable: bool) -> None:
    x = torch.randn(1, 10, 2, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([[[0, 3, 3, 10]]], dtype=torch.int32) if variable else None
    block = None if variable else 4
    assert torch.autograd.gradcheck(lambda t: pool_blocks(t, block=block, offsets=offsets)[0], x)


def test_a_block_has_no_negative_number_of_tokens(provider: str) -> None:
    x = torch.randn(1, 8, 2, 4, device=DEVICE)
    for arguments, expected in (
        ({"block": 4, "lengths": [-3, 2]}, [0, 2]),
        ({"offsets": [0, 6, 4, 8]}, [6, 0, 4]),
    ):
        tensors = {
            name: torch.tensor([[each]], dtype=torch.int32, device=DEVICE)
            if isinstance(each, list)
            else each
            for name, each in arguments.items()
        }
        means, counts = pool_blocks(x, provider=provider, **tensors)  # type: ignore[arg-type]
        assert counts.flatten().tolist() == expected
        for block, count in enumerate(expected):
            assert count or not means[:, block].any()


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 8, 2, 4)
    integers = torch.zeros(1, 1, 3, dtype=torch.int32)
    for arguments, message in (
        ({}, "found neither"),
        ({"block": 4, "offsets": integers}, "found both"),
        ({"block": 0}, "block must be at least 1, found 0"),
        ({"block": 4.0}, "block must be an int, found 4.0"),
        ({"block": 4, "lengths": integers}, r"lengths must be \[B\|1, H\|1, 2\]"),
        ({"offsets": integers, "lengths": integers}, "belong to uniform"),
        ({"offsets": integers.long()}, "offsets must be int32"),
        ({"offsets": integers[..., :0]}, "M \\+ 1 entries"),
        ({"block": 4, "permutation": integers}, r"permutation must be \[B\|1, H\|1, 8\]"),
    ):
        with pytest.raises(AttentionInputError, match=message):
            pool_blocks(x, **arguments)
    with pytest.raises(AttentionInputError, match="floating point"):
        pool_blocks(x.int(), block=4)
    with pytest.raises(AttentionInputError, match=r"\[B, S, H, D\]"):
        pool_blocks(x[0], block=4)
