"""Merging attention states, against attention over all keys at once in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyattn_kernels import AttentionInputError, merge_attention_states
from polyattn_kernels._triton_support import triton_reasons

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

State = tuple[torch.Tensor, torch.Tensor]


def attend(scores: torch.Tensor, v: torch.Tensor) -> State:
    """float64 out [B, S, H, D] and lse [B, H, S] of scores [B, H, S, K] and v [B, H, K, D]."""
    blind = scores.amax(-1, keepdim=True) == -math.inf if scores.shape[-1] else None
    if blind is None:
        shape = scores.shape[:-1]
        return (
            torch.zeros(shape[0], shape[2], shape[1], v.shape[-1], dtype=torch.float64),
            torch.full(shape, -math.inf, dtype=torch.float64),
        )
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


@given(
    seed=st.integers(0, 1 << 20),
    offset=st.sampled_from((0.0, 1.0, -80.0, 200.0, -3000.0, 1e4)),
    magnitude=st.sampled_from((1e-3, 1.0, 30.0)),
    keys=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
@settings(deadline=None, max_examples=200)
def test_two_parts_make_the_whole(
    seed: int, offset: float, magnitude: float, keys: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 7, sum(keys), generator=generator, dtype=torch.float64) * magnitude
    scores[..., : keys[0]] += offset
    scores[torch.rand(scores.shape, generator=generator) < 0.4] = -math.inf
    v = torch.randn(2, 3, sum(keys), 4, generator=generator, dtype=torch.float64)
    parts = [attend(*both) for both in zip(scores.split(keys, -1), v.split(keys, -2), strict=True)]
    (out_a, lse_a), (out_b, lse_b) = ((out.to(dtype), lse.float()) for out, lse in parts)
    out, lse = merge_attention_states(out_a, lse_a, out_b, lse_b)
    expected, expected_lse = attend(scores, v)
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    # The parts' lse are float32: their rounding, not the merge, bounds what can be asked.
    rounding = max(1.0, abs(offset), 4 * magnitude) * 1e-6
    error = 2e-2 if dtype is torch.bfloat16 else 4 * rounding
    torch.testing.assert_close(out.double(), expected, atol=error, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=rounding, rtol=1e-6)
    other, other_lse = merge_attention_states(out_b, lse_b, out_a, lse_a)
    assert torch.equal(other, out)
    assert torch.equal(other_lse, lse)


def state(value: float, lse: float) -> State:
    return torch.full((1, 1, 1, 2), value), torch.full((1, 1, 1), lse)


@pytest.mark.parametrize("huge", [1e4, -1e4, 3e38, -3e38])
def test_a_part_without_keys_changes_nothing_and_is_not_read(huge: float) -> None:
    for a, b in (
        (state(2.5, huge), state(math.nan, -math.inf)),
        (state(math.inf, -math.inf), state(2.5, huge)),
    ):
        out, lse = merge_attention_states(*a, *b)
        assert out.tolist() == [[[[2.5, 2.5]]]]
        assert lse.item() == pytest.approx(huge)


def test_two_parts_without_keys_are_zeros() -> None:
    out, lse = merge_attention_states(*state(math.nan, -math.inf), *state(7.0, -math.inf))
    assert out.tolist() == [[[[0.0, 0.0]]]]
    assert lse.item() == -math.inf


def test_a_part_that_outweighs_the_other_by_far_is_the_result() -> None:
    out, lse = merge_attention_states(*state(1.0, 3e38), *state(2.0, -3e38))
    assert out.tolist() == [[[[1.0, 1.0]]]]
    assert lse.item() == pytest.approx(3e38)


def test_a_broken_part_is_not_hidden() -> None:
    for bad in (state(1.0, math.nan), state(math.nan, 0.0), state(1.0, math.inf)):
        out, _ = merge_attention_states(*bad, *state(1.0, 0.0))
        assert out.isnan().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, b: (a[0].squeeze(0), a[1], *b), "must be .B, S, H, D. of one shape"),
        (lambda a, b: (a[0].half(), a[1], *b), "one shape and dtype"),
        (lambda a, b: (*a, b[0], b[1].transpose(1, 2)), "lse_b must be float32"),
        (lambda a, b: (a[0], a[1].double(), *b), "lse_a must be float32"),
        (lambda a, b: (*a, b[0], b[1].to("meta")), "on one device"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: object, said: str) -> None:
    part = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
    with pytest.raises(AttentionInputError, match=said):
        merge_attention_states(*change(part, part))  # type: ignore[operator]


@pytest.mark.skipif(bool(triton_reasons(torch.zeros(1, device=DEVICE))), reason="no Triton here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 70, 3, 20), (1, 130, 2, 128)])
def test_triton_merges_as_torch_does(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    batch, tokens, heads, _ = shape
    parts = []
    for side in range(2):
        out = torch.randn(shape, generator=generator)
        lse = torch.randn(batch, heads, tokens, generator=generator) * 30
        lse[..., side::3] = -math.inf
        lse[..., 2::5] = -math.inf
        out[lse.transpose(1, 2).isneginf()] = math.nan
        parts += [out.to(DEVICE, dtype), lse.to(DEVICE)]
    parts[2] = torch.stack((parts[2], parts[2]), -1)[..., 0]  # a last dimension with a stride
    found, found_lse = merge_attention_states(*parts, provider="triton")
    wanted, wanted_lse = merge_attention_states(*parts, provider="torch")
    assert found.dtype is dtype
    assert torch.allclose(found, wanted, atol=2e-3 if dtype is torch.float16 else 1e-6)
    assert torch.allclose(found_lse, wanted_lse, atol=1e-5)
    assert torch.equal(found_lse.isneginf(), wanted_lse.isneginf())
    parts[1][0, 0, 0] = math.nan
    found, found_lse = merge_attention_states(*parts, provider="triton")
    assert found_lse[0, 0, 0].isnan()
    assert found[0, 0, 0].isnan().all()
