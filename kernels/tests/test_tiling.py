"""Tilings and permutations against slow loops over tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn_kernels._triton_support import triton_reasons
from polyattn_kernels.errors import AttentionInputError, ProviderError
from polyattn_kernels.permutation import (
    gather_tokens,
    inverse_permutation,
    inverse_permute_tokens,
    permute_tokens,
)
from polyattn_kernels.tiling import Tiling, tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def provider(request: pytest.FixtureRequest) -> str:
    reasons = triton_reasons(torch.empty(1, device=DEVICE)) if request.param == "triton" else []
    if reasons:
        pytest.skip("; ".join(reasons))
    return str(request.param)


def loop_blocks(
    grid: tuple[int, int, int], tile: tuple[int, int, int], before: int, after: int
) -> list[list[int]]:
    """Tokens of every block, by going through tiles and then through every token of the grid."""
    size = tile[0] * tile[1] * tile[2]
    cells = grid[0] * grid[1] * grid[2]

    def text(first: int, count: int) -> list[list[int]]:
        tokens = list(range(first, first + count))
        return [tokens[i : i + size] for i in range(0, count, size)]

    tiles = []
    for corner in itertools.product(*(range(0, g, t) for g, t in zip(grid, tile, strict=True))):
        members = []
        for place in itertools.product(*(range(g) for g in grid)):
            if all(c <= p < c + t for c, p, t in zip(corner, place, tile, strict=True)):
                members.append(before + (place[0] * grid[1] + place[1]) * grid[2] + place[2])
        tiles.append(members)
    return text(0, before) + tiles + text(before + cells, after)


def sequence(built: Tiling, batch: int = 2, heads: int = 2, width: int = 4) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, built.length, heads, width, device=DEVICE)


grids = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
tiles = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(grids, tiles, st.integers(0, 9), st.integers(0, 9))
def test_blocks_are_those_of_the_loop(
    grid: tuple[int, int, int], tile: tuple[int, int, int], before: int, after: int
) -> None:
    blocks = loop_blocks(grid, tile, before, after)
    built = tiling(grid, tile, text_before=before, text_after=after, device=DEVICE)
    assert built.num_blocks == len(blocks)
    assert built.permutation[0, 0].tolist() == list(itertools.chain(*blocks))
    assert built.lengths[0, 0].tolist() == [len(block) for block in blocks]
    starts = list(itertools.accumulate((len(block) for block in blocks), initial=0))
    assert built.offsets[0, 0].tolist() == starts
    padded = [block + [-1] * (built.block - len(block)) for block in blocks]
    assert built.slot_tokens[0, 0].tolist() == list(itertools.chain(*padded))
    assert [*built.text_before_blocks, *built.tile_blocks, *built.text_after_blocks] == list(
        range(built.num_blocks)
    )
    # Every tile's first token lies at the tile's corner.
    for number, place in zip(built.tile_blocks, built.tile_coordinates.tolist(), strict=True):
        corner = [c * t for c, t in zip(place, tile, strict=True)]
        assert blocks[number][0] - before == (corner[0] * grid[1] + corner[1]) * grid[2] + corner[2]
    x = sequence(built)
    assert torch.equal(built.unpack(built.pack(x)), x)
    assert torch.equal(built.unpad(built.pad(x)), x)


@pytest.mark.parametrize(
    ("grid", "tile", "text"),
    [
        ((1, 1, 1), (1, 1, 1), (0, 0)),
        ((1, 1, 1), (4, 4, 4), (0, 3)),
        ((5, 6, 7), (2, 4, 4), (0, 0)),
        ((3, 4, 5), (8, 8, 8), (2, 0)),
        ((4, 4, 4), (2, 2, 2), (9, 17)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_both_providers(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    text: tuple[int, int],
    dtype: torch.dtype,
    provider: str,
) -> None:
    built = tiling(grid, tile, text_before=text[0], text_after=text[1], device=DEVICE)
    blocks = loop_blocks(grid, tile, *text)
    # Heads in front of tokens, and every other column: no stride is what a dense tensor has.
    dense = torch.randn(2, 3, built.length, 10, device=DEVICE).to(dtype)
    for x in (dense.transpose(1, 2)[..., ::2], dense.transpose(1, 2).contiguous()):
        padded = built.pad(x, provider=provider)
        packed = built.pack(x, provider=provider)
        position = 0
        for number, block in enumerate(blocks):
            rows = padded[:, number * built.block : (number + 1) * built.block]
            assert torch.equal(rows[:, : len(block)], x[:, block])
            assert not rows[:, len(block) :].any()
            assert torch.equal(packed[:, position : position + len(block)], x[:, block])
            position += len(block)
        padding = (built.slot_tokens < 0)[0, 0]
        padded[:, padding] = float("nan")
        assert torch.equal(built.unpad(padded, provider=provider), x)
        assert torch.equal(built.unpack(packed, provider=provider), x)


def test_a_tiling_in_words() -> None:
    built = Tiling.of((3, 4, 5), (2, 2, 2), text_after=3)
    assert repr(built) == (
        "Tiling((3, 4, 5) in tiles of (2, 2, 2), text 0 + 3: 63 tokens in 13 blocks of 8; cpu)"
    )
    assert "text" not in repr(Tiling.of((3, 4, 5), (2, 2, 2)))


def test_a_tiling_made_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        built = Tiling.of((3, 4, 7), (2, 2, 3))
    assert not built.permutation.is_inference()


def test_equal_values_share_one_tiling() -> None:
    assert Tiling.of((3, 4, 5), (2, 2, 2), text_after=3) is tiling(
        (3, 4, 5), (2, 2, 2), text_after=3
    )
    first = tiling((3, 4, 5), (2, 2, 2), text_after=3)
    assert tiling([3, 4, 5], [2, 2, 2], text_after=3, device=torch.device("cpu")) is first
    assert tiling((3, 4, 5), (2, 2, 2), text_before=3) is not first


@pytest.mark.parametrize(
    ("grid", "tile", "text"),
    [
        ((0, 4, 4), (1, 1, 1), 0),
        ((4, 4), (1, 1, 1), 0),
        ((4, 4, 4), (1, 0, 1), 0),
        ((4, 4, 4), (1, 1, 1.5), 0),
        ((4, 4, 4), (1, 1, 1), -1),
        ((4, 4, 4), (1, 1, 1), [2]),
    ],
)
def test_impossible_sizes_are_refused(
    grid: tuple[int, ...], tile: tuple[int, ...], text: Any
) -> None:
    with pytest.raises(AttentionInputError, match="found"):
        tiling(grid, tile, text_before=text)


def test_a_sequence_of_another_length_is_refused() -> None:
    built = tiling((2, 3, 4), (2, 2, 2))
    with pytest.raises(AttentionInputError, match="S=24 tokens, found shape"):
        built.pack(torch.zeros(1, 25, 1, 4))
    with pytest.raises(AttentionInputError, match="S=32 padded rows"):
        built.unpad(torch.zeros(1, 24, 1, 4))


# --- permutations -------------------------------------------------------------------------------


def loop_gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], index.shape[-1], *x.shape[2:])
    for b, h, p in itertools.product(range(x.shape[0]), range(x.shape[2]), range(index.shape[-1])):
        token = int(index[b % index.shape[0], h % index.shape[1], p])
        if token >= 0:
            out[b, p, h] = x[b, token, h]
    return out


def random_permutation(leading: tuple[int, int], length: int) -> torch.Tensor:
    return torch.rand(*leading, length, device=DEVICE).argsort(-1).to(torch.int32)


@pytest.mark.parametrize("leading", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize(("length", "width"), [(1, 1), (37, 6), (70, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_permutations_move_the_bits_of_every_head(
    leading: tuple[int, int], length: int, width: int, dtype: torch.dtype, provider: str
) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, length, width, device=DEVICE).to(dtype).transpose(1, 2)
    permutation = random_permutation(leading, length)
    permuted = permute_tokens(x, permutation, provider=provider, checked=True)
    assert torch.equal(permuted, loop_gather(x, permutation))
    assert permuted.is_contiguous()
    assert torch.equal(inverse_permute_tokens(permuted, permutation, provider=provider), x)
    inverse = inverse_permutation(permutation)
    assert torch.equal(permute_tokens(permuted, inverse, provider=provider), x)


def test_minus_one_gathers_zeros(provider: str) -> None:
    x = torch.randn(2, 5, 2, 4, device=DEVICE)
    x[:, 0] = float("nan")  # what a careless clamp of -1 would read
    index = torch.tensor([[[3, -1, 1, -1, 4, 4, 2]]], dtype=torch.int32, device=DEVICE)
    assert torch.equal(gather_tokens(x, index, provider=provider), loop_gather(x, index))
    empty = gather_tokens(x[:, :0], -torch.ones_like(index), provider=provider)
    assert empty.shape == (2, 7, 2, 4)
    assert not empty.any()


def test_the_triton_gather_reads_nothing_outside(provider: str) -> None:
    if provider == "torch":
        pytest.skip("torch's own indexing refuses such entries")
    guarded = torch.full((1, 12, 1, 4), float("nan"), device=DEVICE)
    x = guarded[:, 4:8]
    x.fill_(1.0)
    index = torch.tensor([[[0, 4, -2, 3, 7]]], dtype=torch.int32, device=DEVICE)
    out = gather_tokens(x, index, provider=provider)
    assert out[0, :, 0, 0].tolist() == [1, 0, 0, 1, 0]


def test_the_torch_path_is_differentiable() -> None:
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    permutation = torch.rand(1, 2, 6).argsort(-1).int()
    for function in (permute_tokens, inverse_permute_tokens):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, permutation), x)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(1, 1, 4, dtype=torch.int64), "must be int32"),
        (torch.zeros(3, 1, 4, dtype=torch.int32), r"\[B\|1, H\|1"),
        (torch.zeros(1, 4, dtype=torch.int32), r"\[B\|1, H\|1"),
        (torch.zeros(1, 1, 8, dtype=torch.int32)[..., ::2], "contiguous"),
        (torch.zeros(1, 1, 4, dtype=torch.int32, device="meta"), "is on meta"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: torch.Tensor, message: str) -> None:
    with pytest.raises(AttentionInputError, match=message):
        gather_tokens(torch.zeros(2, 4, 2, 3), index)


def test_checked_mode_names_the_offender() -> None:
    x = torch.zeros(1, 4, 2, 3)
    index = torch.tensor([[[0, 1, 2, 3], [0, 1, 4, 3]]], dtype=torch.int32)
    with pytest.raises(AttentionInputError, match=r"index\[0, 1, 2\] is 4; entries lie in 0..3"):
        gather_tokens(x, index, checked=True)
    index[0, 1, 2] = 1
    for function in (permute_tokens, inverse_permute_tokens):
        with pytest.raises(AttentionInputError, match="batch 0, head 1 is not a permutation"):
            function(x, index, checked=True)
    with pytest.raises(AttentionInputError, match=r"\[B\|1, H\|1, 4\]"):
        permute_tokens(x, index[..., :3].contiguous())


def test_a_named_provider_runs_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.zeros(1, 1, 4, dtype=torch.int32)
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(ProviderError, match='"auto", "torch" or "triton", found \'cuda\''):
        gather_tokens(x, index, provider="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ProviderError, match="need CUDA or ROCm tensors, found cpu"):
        gather_tokens(x, index, provider="triton")


def test_visible_tokens_come_first_in_their_block() -> None:
    cut = tiling((3, 5, 3), (2, 2, 2), text_after=11)
    visible = torch.rand(2, cut.length, generator=torch.Generator().manual_seed(3)) < 0.6
    slots, lengths = cut.visible_first(visible)
    assert slots.shape == (2, 1, cut.padded_length)
    for item in range(2):
        blocks = slots[item, 0].view(cut.num_blocks, cut.block).tolist()
        plain = cut.slot_tokens[0, 0].view(cut.num_blocks, cut.block).tolist()
        for block, before, length in zip(blocks, plain, lengths[item, 0].tolist(), strict=True):
            shown = [token for token in before if token >= 0 and visible[item, token]]
            assert block[:length] == shown
            assert sorted(block) == sorted(before)
    everything = torch.ones(1, cut.length, dtype=torch.bool)
    slots, lengths = cut.visible_first(everything)
    assert torch.equal(slots, cut.slot_tokens)
    assert torch.equal(lengths, cut.lengths)
    with pytest.raises(AttentionInputError, match="bool"):
        cut.visible_first(torch.ones(1, cut.length))
