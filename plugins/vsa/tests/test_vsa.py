"""video_sparse_attn against the method's definition, written out token by token.

:func:`definition` shares nothing with the plugin or the kernels: loops and dictionaries say which
token sees which, in float64. Inputs are mostly float64, where equal scores mean equal tiles;
in other dtypes the scores of what was selected are compared, and numbers only where rounding could
not have changed the selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import polyattn
import polyattn_vsa.attention as plugin
from polyattn import TextSpan
from polyattn.contract import AttentionCall, AttentionRequest
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError, ConfigError, InputError
from polyattn.reporting import Report, reporting_to
from polyattn.testing import default_settings, oracle
from polyattn.testing.accuracy import budget, excess, measure
from polyattn_vsa.config import VsaConfig

NAN = float("nan")


@pytest.fixture(autouse=True)
def nobody_configured_anything() -> Any:
    with default_settings():
        yield


# --- the definition -------------------------------------------------------------------------------


@dataclass
class Answer:
    """What the definition says: out [B, S, H, D], lse [B, H, S], and how it came to be."""

    out: np.ndarray
    lse: np.ndarray
    mask: np.ndarray
    """[B, H, S, S]: which token sees which."""
    tile_of: list[int]
    """The tile of each token, -1 for text."""
    scores: np.ndarray
    """[B, H, tiles, tiles]."""
    selected: np.ndarray
    """[B, H, tiles, tiles]."""
    margin: np.ndarray
    """[B, H, tiles]: by how much the last tile selected beats the first that is not."""


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int, int],
    *,
    sparsity: float,
    scale: float | None = None,
    text: TextSpan | None = None,
    shown: torch.Tensor | None = None,
    coarse: bool = False,
    gate: torch.Tensor | None = None,
) -> Answer:
    """VSA of q [B, S, H, D], k and v [B, S, Hkv, D]; ``shown`` is bool [B, S]."""
    batch, tokens, heads, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    array = {name: x.double().numpy() for name, x in (("q", q), ("k", k), ("v", v))}
    per_key_head = heads // k.shape[2]
    video = grid[0] * grid[1] * grid[2]
    first = text.length if text is not None and text.start == 0 else 0

    # Which tile each token is in. Tiles are numbered along w, then h, then t.
    wide, high = math.ceil(grid[2] / 4), math.ceil(grid[1] / 4)
    tiles = math.ceil(grid[0] / 4) * high * wide
    tile_of = [-1] * tokens
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                token = first + (t * grid[1] + h) * grid[2] + w
                tile_of[token] = (t // 4 * high + h // 4) * wide + w // 4
    kept = max(1, min(tiles, math.ceil((1 - sparsity) * tiles)))

    out = np.zeros((batch, tokens, heads, width))
    lse = np.full((batch, heads, tokens), -math.inf)
    mask = np.zeros((batch, heads, tokens, tokens), dtype=bool)
    all_scores = np.zeros((batch, heads, tiles, tiles))
    selected = np.zeros((batch, heads, tiles, tiles), dtype=bool)
    margin = np.full((batch, heads, tiles), math.inf)
    for b in range(batch):
        visible = [shown is None or bool(shown[b, token]) for token in range(tokens)]
        if text is not None and text.valid_length is not None:
            for token in range(text.start + text.valid_length, text.start + text.length):
                visible[token] = False
        members: list[list[int]] = [[] for _ in range(tiles)]
        for token in range(tokens):
            if tile_of[token] >= 0 and visible[token]:
                members[tile_of[token]].append(token)

        for h in range(heads):
            qh, kh, vh = (
                array["q"][b, :, h],
                *(array[name][b, :, h // per_key_head] for name in ("k", "v")),
            )

            def means(x: np.ndarray, members: list[list[int]] = members) -> np.ndarray:
                return np.stack([x[m].mean(0) if m else np.zeros(width) for m in members])

            scores = means(qh) @ means(kh).T * scale
            all_scores[b, h] = scores
            candidates = [tile for tile in range(tiles) if members[tile]]
            for tile in range(tiles):
                best = sorted(candidates, key=lambda other, row=scores[tile]: (-row[other], other))
                selected[b, h, tile, best[:kept]] = True
                if len(best) > kept:
                    margin[b, h, tile] = scores[tile, best[kept - 1]] - scores[tile, best[kept]]
            for token in range(tokens):
                for key in range(tokens):
                    both_in_tiles = tile_of[token] >= 0 and tile_of[key] >= 0
                    mask[b, h, token, key] = visible[key] and (
                        not both_in_tiles or selected[b, h, tile_of[token], tile_of[key]]
                    )

            # The fine branch: a softmax over what each token sees.
            for token in range(tokens):
                seen = np.flatnonzero(mask[b, h, token])
                if len(seen):
                    logits = kh[seen] @ qh[token] * scale
                    top = logits.max()
                    lse[b, h, token] = top + math.log(np.exp(logits - top).sum())
                    out[b, token, h] = np.exp(logits - lse[b, h, token]) @ vh[seen]

            # The coarse branch: a softmax over all tiles, whatever their sizes.
            if coarse and candidates:
                weights = np.exp(
                    scores[:, candidates] - scores[:, candidates].max(1, keepdims=True)
                )
                pooled = weights / weights.sum(1, keepdims=True) @ means(vh)[candidates]
                for token in range(tokens):
                    if tile_of[token] >= 0:
                        factor = 1.0 if gate is None else gate[b, token, h].double().numpy()
                        out[b, token, h] += pooled[tile_of[token]] * factor
    assert video == sum(tile >= 0 for tile in tile_of)
    return Answer(out, lse, mask, tile_of, all_scores, selected, margin)


def tensors(
    grid: tuple[int, int, int],
    *,
    text: int = 0,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normally distributed q, k and v, stretched so that weights are uneven."""
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(grid) + text
    return tuple(
        (torch.randn(batch, tokens, count, width, generator=generator) * 1.5).to(dtype)
        for count in (heads, kv_heads or heads, kv_heads or heads)
    )  # type: ignore[return-value]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int, int],
    *,
    text: TextSpan | None = None,
    shown: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "vsa",
    **config: Any,
) -> Any:
    """The call as a user makes it."""
    with polyattn.forward_context(grid=grid, text=text):
        return polyattn.attention(
            q,
            k,
            v,
            backend=backend,
            config=config,
            attn_mask=shown,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
            return_lse=return_lse,  # type: ignore[call-overload]
            extras=None if gate is None else {"gate": gate},
        )


def facts(*arguments: Any, **keywords: Any) -> dict[str, Any]:
    """What the report says of a call."""
    with reporting_to(Report()) as report:
        attend(*arguments, **keywords)
    return report.rows[0].facts


def assert_same(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


# --- the numbers ----------------------------------------------------------------------------------

GRIDS = [
    (1, 1, 1),  # one token
    (2, 3, 4),  # one short tile
    (4, 4, 4),  # one whole tile
    (4, 8, 4),  # whole tiles only
    (5, 6, 9),  # ragged on every axis
    (1, 1, 70),  # long and thin: tiles of four tokens
    (37, 1, 1),
    (3, 9, 5),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.75, 1.0])
def test_the_fast_path_is_the_definition(grid: tuple[int, int, int], sparsity: float) -> None:
    """Fine branch and log-sum-exp, then both branches with and without a gate."""
    q, k, v = tensors(grid, batch=2)
    gate = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    fine = definition(q, k, v, grid, sparsity=sparsity)
    out, lse = attend(q, k, v, grid, sparsity=sparsity, return_lse=True)
    assert_same(out, fine.out)
    assert_same(lse, fine.lse, 1e-5)
    both = definition(q, k, v, grid, sparsity=sparsity, coarse=True, gate=gate)
    assert_same(attend(q, k, v, grid, sparsity=sparsity, gate=gate), both.out)
    plain = definition(q, k, v, grid, sparsity=sparsity, coarse=True)
    assert_same(attend(q, k, v, grid, sparsity=sparsity, coarse_branch="on"), plain.out)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_grid_text_mask_and_scale(data: st.DataObject) -> None:
    draw = data.draw
    side = st.integers(1, 9)
    grid = draw(st.tuples(side, side, side).filter(lambda each: math.prod(each) <= 180))
    video, length = math.prod(grid), draw(st.sampled_from([0, 0, 1, 5, 64, 70]))
    text = None
    if length:
        valid = draw(st.sampled_from([None, 0, 1, length // 2, length]))
        text = TextSpan(draw(st.sampled_from([0, video])), length, valid)
    kv_heads, batch = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    sizes: Any = {"text": length, "batch": batch, "heads": 2, "kv_heads": kv_heads, "width": 4}
    q, k, v = tensors(grid, **sizes, seed=draw(st.integers(0, 1000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shown = None
    if draw(st.booleans()):
        shown = torch.rand(batch, video + length, generator=generator) < draw(
            st.sampled_from([0.0, 0.1, 0.5, 0.95])
        )
    gate = None
    if draw(st.booleans()):
        gate = torch.randn(q.shape, dtype=q.dtype, generator=generator)
    coarse = draw(st.sampled_from(["auto", "on", "off"]))
    sparsity = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]))
    scale = draw(st.sampled_from([None, 1.3, 0.1, -0.7]))
    expected = definition(
        q, k, v, grid, sparsity=sparsity, scale=scale, text=text, shown=shown,
        coarse=coarse == "on" or (coarse == "auto" and gate is not None),
        gate=gate,
    )  # fmt: skip
    common: Any = {"text": text, "scale": scale, "gate": gate, "sparsity": sparsity}
    if shown is not None:  # what is hidden may be anything
        hidden = ~shown[:, :, None, None]
        k, v = k.masked_fill(hidden, NAN), v.masked_fill(hidden, NAN)
    # [B, 1, 1, S], since [B, S] is ambiguous where both are equal.
    key_padding = None if shown is None else shown[:, None, None]
    shared: Any = {**common, "shown": key_padding}
    assert_same(attend(q, k, v, grid, **shared, coarse_branch=coarse), expected.out)
    if coarse == "off":
        _, lse = attend(q, k, v, grid, **shared, coarse_branch=coarse, return_lse=True)
        assert_same(lse, expected.lse, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_other_dtypes(dtype: torch.dtype, gated: bool) -> None:
    """Where the selection is not a matter of rounding, which is nearly everywhere."""
    grid = (5, 6, 9)
    q, k, v = tensors(grid, heads=4, kv_heads=2, width=32, dtype=dtype)
    gate = tensors(grid, heads=4, width=32, dtype=dtype, seed=1)[0] if gated else None
    expected = definition(q, k, v, grid, sparsity=0.6, coarse=gated, gate=gate)
    certain = expected.margin > 1e-5  # [B, H, tiles]
    assert certain.mean() > 0.9
    rows = certain[:, :, expected.tile_of].transpose(0, 2, 1)  # [B, S, H]
    out = attend(q, k, v, grid, sparsity=0.6, gate=gate)
    assert out.dtype is dtype
    error = np.abs(out.double().numpy() - expected.out)[rows].max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 8e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_selection_is_made_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores so close that half precision would tie them: what is selected scores the most."""
    grid, sparsity = (8, 8, 16), 0.5
    q, k, v = tensors(grid, width=64, dtype=dtype)
    q, k = (x * 0.05 + 1 for x in (q, k))  # every score is near one number
    plans = []

    def recording(q: Any, k: Any, v: Any, plan: Any, **arguments: Any) -> Any:
        plans.append(plan)
        return attention(q, k, v, plan, **arguments)

    attention = plugin.block_sparse_attention
    monkeypatch.setattr(plugin, "block_sparse_attention", recording)
    attend(q, k, v, grid, sparsity=sparsity)
    expected = definition(q, k, v, grid, sparsity=sparsity)
    (plan,) = plans
    found = plan.validate().to_block_mask().numpy()
    assert (found.sum(-1) == 8).all()
    lost = (expected.scores * expected.selected).sum(-1) - (expected.scores * found).sum(-1)
    spread = expected.scores.std(-1)
    assert (spread > 0).all()
    assert (lost / spread).max() < 1e-2
    rounded = torch.from_numpy(expected.scores).bfloat16()
    assert rounded.unique().numel() < 16  # this is what it would be without float32


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("grid", "sparsity"), [((5, 6, 9), 0.0), ((4, 4, 4), 0.9), ((2, 3, 4), 1.0), ((8, 4, 8), 0.01)]
)
@pytest.mark.parametrize("text", [None, "before", "after"])
def test_nothing_left_out_is_dense_attention(
    dtype: torch.dtype, grid: tuple[int, int, int], sparsity: float, text: str | None
) -> None:
    """Held to the budget of an exact backend."""
    length = 77 if text else 0
    span = TextSpan(0 if text == "before" else math.prod(grid), length, 50) if text else None
    q, k, v = tensors(grid, text=length, batch=2, width=32, dtype=dtype)
    mask = None
    if span is not None:
        mask = torch.ones(2, q.shape[1], dtype=torch.bool)
        mask[:, span.start + 50 : span.start + length] = False
    out, lse = attend(q, k, v, grid, text=span, sparsity=sparsity, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask=mask, return_lse=True)
    reference, _ = oracle.same_precision_attention(q, k, v, mask=mask)
    allowed = budget("exact", dtype, measure(reference, expected))
    assert excess(measure(out, expected), allowed) is None
    assert (lse - expected_lse).abs().max() < 1e-4


def test_a_gate_of_zeros_is_no_coarse_branch_and_one_of_ones_is_no_gate() -> None:
    grid = (5, 6, 9)
    q, k, v = tensors(grid)
    fine = attend(q, k, v, grid, sparsity=0.5)
    zeros = attend(q, k, v, grid, sparsity=0.5, gate=torch.zeros_like(q))
    ones = attend(q, k, v, grid, sparsity=0.5, gate=torch.ones_like(q))
    assert torch.equal(zeros, fine)
    assert torch.equal(ones, attend(q, k, v, grid, sparsity=0.5, coarse_branch="on"))
    assert not torch.allclose(ones, fine)
    off = attend(q, k, v, grid, sparsity=0.5, gate=torch.ones_like(q), coarse_branch="off")
    assert torch.equal(off, fine)


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0.0, 10), (0.05, 10), (0.1, 9), (0.5, 5), (0.7, 4), (0.8, 2), (0.9, 1), (0.99, 1), (1.0, 1)],
)
def test_how_many_tiles_are_kept(sparsity: float, kept: int) -> None:
    """The published expression, its rounding included: (1 - 0.7) * 10 is a little more than 3."""
    grid = (3, 4, 37)  # ten tiles, short ones counted as whole
    assert facts(*tensors(grid), grid, sparsity=sparsity)["kept"] == f"{kept} of 10 tiles"


def test_equal_scores_take_the_lowest_tile() -> None:
    """All keys equal, and keys that come in pairs of equal tiles."""
    grid = (4, 4, 32)
    wishes: Any = {"sparsity": 0.7, "scale": 0.25}  # three of eight tiles are kept
    q, k, v = tensors(grid)
    for pattern in ([0] * 8, [0, 1, 2, 3] * 2, [3, 3, 2, 2, 1, 1, 0, 0]):
        for w in range(32):
            k[:, w::32] = pattern[w // 4]
        # Small integers and powers of two: scores are exact, and so are ties.
        expected = definition(q.round(), k, v, grid, **wishes)
        assert (expected.margin == 0).all()
        assert_same(attend(q.round(), k, v, grid, **wishes), expected.out)


# --- what is hidden -------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_a_hidden_token_reaches_nobody(gated: bool) -> None:
    """Not as key, not as value, and not as one of the queries that its tile is scored by."""
    grid = (5, 6, 9)
    q, k, v = tensors(grid, batch=2)
    gate = torch.randn(q.shape, dtype=q.dtype) if gated else None
    shown = torch.rand(2, 270, generator=torch.Generator().manual_seed(3)) < 0.6
    shown[0, : 4 * 54] = False  # whole tiles of the first batch item
    hidden = ~shown[:, :, None, None]
    first = attend(q, k, v, grid, shown=shown, gate=gate, sparsity=0.7)
    planted = (x.masked_fill(hidden, NAN) for x in (q, k, v))
    second = attend(*planted, grid, shown=shown, gate=gate, sparsity=0.7)
    assert torch.equal(first[shown], second[shown])
    assert first.isfinite().all()
    # The mask is not ignored altogether.
    assert not torch.allclose(first[shown], attend(q, k, v, grid, gate=gate, sparsity=0.7)[shown])


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("coarse", ["on", "off"])
def test_whoever_sees_nothing_gets_zeros(sparsity: float, coarse: str) -> None:
    grid = (5, 6, 9)
    q, k, v = tensors(grid, batch=2, dtype=torch.float32)
    k[0] = v[0] = NAN
    shown = torch.ones(2, 270, dtype=torch.bool)
    shown[0] = False
    wishes: Any = {"shown": shown, "sparsity": sparsity, "coarse_branch": coarse}
    out = attend(q, k, v, grid, **wishes)
    assert (out[0] == 0).all()
    alone = attend(q[1:], k[1:], v[1:], grid, sparsity=sparsity, coarse_branch=coarse)
    torch.testing.assert_close(out[1:], alone)
    if coarse == "off":
        _, lse = attend(q, k, v, grid, **wishes, return_lse=True)
        assert lse[0].isneginf().all()
        assert lse[1].isfinite().all()


@pytest.mark.parametrize("start", [0, 135])
@pytest.mark.parametrize("valid", [0, 1, 64, 69, 70])
def test_padded_text_is_the_same_by_span_and_by_mask(start: int, valid: int) -> None:
    grid, length = (3, 5, 9), 70
    q, k, v = tensors(grid, text=length)
    shown = torch.ones(1, 205, dtype=torch.bool)
    shown[:, start + valid : start + length] = False
    by_span = attend(q, k, v, grid, text=TextSpan(start, length, valid), sparsity=0.5)
    span = TextSpan(start, length)
    assert torch.equal(attend(q, k, v, grid, text=span, shown=shown, sparsity=0.5), by_span)
    other = k.clone()
    other[:, start + valid : start + length] = NAN
    padded = TextSpan(start, length, valid)
    assert torch.equal(attend(q, other, v, grid, text=padded, sparsity=0.5), by_span)


def test_a_nan_that_may_be_seen_is_seen() -> None:
    """As in dense attention, although a NaN is no score that a tile could be selected for."""
    grid = (5, 6, 9)
    q, k, v = tensors(grid)
    clean = attend(q, k, v, grid, sparsity=0.8)
    for name in "qk":
        broken = {"q": q.clone(), "k": k.clone(), "v": v}
        broken[name][0, 100, 1] = NAN
        out = attend(*broken.values(), grid, sparsity=0.8)
        assert torch.equal(out[:, :, 0], clean[:, :, 0])
        if name == "k":
            assert out[:, :, 1].isnan().all()
        else:
            assert out[0, 100, 1].isnan().all()
            assert out[:, :, 1].isnan().any(-1).sum() == 1


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_a_slice_of_heads_is_that_slice_of_the_whole(kv_heads: int) -> None:
    """What sequence parallelism over heads relies on: heads do not meet."""
    grid, text = (5, 6, 5), TextSpan(0, 20, 12)
    q, k, v = tensors(grid, text=20, heads=6, kv_heads=kv_heads)
    gate = torch.randn(q.shape, dtype=q.dtype)
    wishes: Any = {"text": text, "sparsity": 0.6}
    whole = attend(q, k, v, grid, **wishes, gate=gate)
    per_key_head = 6 // kv_heads
    for head in range(6):
        own = slice(head, head + 1)
        shared = slice(head // per_key_head, head // per_key_head + 1)
        part = attend(
            q[:, :, own], k[:, :, shared], v[:, :, shared], grid, **wishes, gate=gate[:, :, own]
        )
        torch.testing.assert_close(part, whole[:, :, own], rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter_and_nothing_is_modified() -> None:
    grid, text = (5, 6, 5), TextSpan(150, 20)
    q, k, v = tensors(grid, text=20, batch=2, heads=3, width=8)
    gate = torch.randn(2, 170, 1, 8, dtype=q.dtype).expand(-1, -1, 3, -1)
    shown = torch.rand(1, 170, generator=torch.Generator().manual_seed(5)) < 0.8
    shown = shown.expand(2, -1)
    plain = attend(q, k, v, grid, text=text, gate=gate.clone(), shown=shown, sparsity=0.5)
    packed = torch.stack((q, k, v), dim=3).unbind(3)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for views in (packed, tuple(heads_first)):
        before = [x.clone() for x in (*views, gate, shown)]
        found = attend(*views, grid, text=text, gate=gate, shown=shown, sparsity=0.5)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
        for x, copy in zip((*views, gate, shown), before, strict=True):
            assert torch.equal(x, copy)


def test_text_queries_see_all_and_have_no_coarse_branch() -> None:
    grid, text = (4, 4, 16), TextSpan(256, 10)
    q, k, v = tensors(grid, text=10)
    gate = torch.full(q.shape, 3.0, dtype=q.dtype)
    gate[:, 256:] = NAN  # not even read
    out = attend(q, k, v, grid, text=text, gate=gate, sparsity=0.75)
    assert_same(out[:, 256:], oracle.attention(q, k, v)[:, 256:].numpy())  # type: ignore[index]
    assert out.isfinite().all()


# --- the report, compiling, and the schedule ------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 6, 9), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("text", [None, TextSpan(0, 20), "masked"])
def test_the_report_says_the_density(grid: tuple[int, int, int], text: Any) -> None:
    """Pairs that attend, over all pairs with a visible key."""
    masked, text = text == "masked", None if text == "masked" else text
    q, k, v = tensors(grid, text=text.length if text else 0, batch=2)
    shown = torch.ones(2, q.shape[1], dtype=torch.bool)
    if masked:
        shown[1, 30:90] = False
    passed = shown if masked else None
    found = facts(q, k, v, grid, text=text, shown=passed, sparsity=0.5)
    mask = definition(q, k, v, grid, sparsity=0.5, text=text, shown=passed).mask
    pairs = 2 * q.shape[1] * shown.sum().item()
    assert found["density"] == pytest.approx(mask.sum() / pairs, abs=1e-9)
    assert 0 < found["density"] < 1
    assert found["provider"] == "reference"
    assert facts(q, k, v, grid, text=text, shown=passed, sparsity=0.0)["density"] == 1.0


@pytest.mark.parametrize(
    ("coarse", "gated", "words"),
    [
        ("auto", False, "off (no gate)"),
        ("auto", True, "on (times the gate)"),
        ("on", False, "on (without a gate)"),
        ("on", True, "on (times the gate)"),
        ("off", False, "off"),
        ("off", True, "off (the gate is not used)"),
    ],
)
def test_the_report_says_what_became_of_the_coarse_branch(
    coarse: str, gated: bool, words: str
) -> None:
    q, k, v = tensors((2, 3, 4))
    gate = torch.ones_like(q) if gated else None
    assert facts(q, k, v, (2, 3, 4), gate=gate, coarse_branch=coarse)["coarse_branch"] == words


def test_steps_run_in_one_compiled_graph() -> None:
    """With a gate that the graph computes, under fullgraph, and compiled once."""
    grid, heads, width = (5, 6, 9), 2, 8
    q, k, v = tensors(grid, width=width, dtype=torch.float32)
    projection = torch.nn.Linear(heads * width, heads * width).requires_grad_(False)
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        gate = projection(hidden).unflatten(-1, (heads, width))
        return polyattn.attention(
            q, k, v, backend="vsa", config="sparsity=0.5", extras={"gate": gate}
        )

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for step in range(5):
        hidden = torch.randn(1, 270, heads * width, generator=torch.Generator().manual_seed(step))
        with polyattn.forward_context(grid=grid, step=step, num_steps=5, layer=step % 2):
            torch.testing.assert_close(compiled(hidden, q, k, v), layer(hidden, q, k, v))
    assert len(graphs) == 1


@pytest.mark.parametrize("gated", [False, True])
def test_the_first_steps_can_be_dense(gated: bool) -> None:
    """With a gate, too, which then has nothing to weigh."""
    grid = (5, 6, 9)
    q, k, v = tensors(grid)
    gate = torch.ones_like(q) if gated else None
    dense = oracle.attention(q, k, v)
    with reporting_to(Report()) as report:
        for step in range(3):
            with polyattn.forward_context(step=step, num_steps=3):
                out = attend(q, k, v, grid, gate=gate, sparsity=0.75, dense_steps=1)
            assert torch.allclose(out, dense) == (step == 0)  # type: ignore[arg-type]
    used = {row.used: row.steps for row in report.rows}
    assert used.pop("video_sparse_attn") == {1, 2}
    assert list(used.values()) == [{0}]


class ForbidWaiting(TorchDispatchMode):
    """An error for every operator that has to know values: on a GPU each would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for waiting in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
            "equal.default",
        ):
            assert waiting not in name, name
        if ".index." in name or ".index_put" in name:
            assert all(each is None or each.dtype is not torch.bool for each in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("span", [None, TextSpan(0, 70, 40), TextSpan(270, 70, 40)])
def test_nothing_waits_for_the_device(
    masked: bool, span: TextSpan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held on the CPU, around the attention itself, whose reference does look at values there."""

    def stub(q: Any, k: Any, v: Any, plan: Any, **arguments: Any) -> torch.Tensor:
        return torch.zeros_like(q)

    grid = (5, 6, 9)
    q, k, v = tensors(grid, text=span.length if span else 0, batch=2)
    shown = torch.ones(2, q.shape[1], dtype=torch.bool) if masked else None
    attend(q, k, v, grid, text=span, shown=shown, sparsity=0.5)  # builds what is kept
    monkeypatch.setattr(plugin, "block_sparse_attention", stub)
    with ForbidWaiting():
        attend(q, k, v, grid, text=span, shown=shown, sparsity=0.5, coarse_branch="on")
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        with ForbidWaiting():
            q.sum().item()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sparsity": 90}, "sparsity=90 is out of range: 0 to 1"),
        ({"sparsity": -0.1}, "sparsity=-0.1 is out of range: 0 to 1"),
        ({"sparsity": "high"}, "sparsity.*valid number"),
        ({"sparsity": True}, "sparsity.*valid number"),
        ({"VSA_sparsity": 2}, "VSA_sparsity=2 is out of range: 0 to 1"),
        ({"sparsity": 0.5, "VSA_sparsity": 0.5}, "two spellings"),
        ({"sparsty": 0.5}, "no parameter 'sparsty'"),
        ({"coarse_branch": "yes"}, "coarse_branch.*'auto', 'on' or 'off'"),
        ({"coarse_branch": True}, "coarse_branch"),
        ({"dense_steps": 1.5}, "dense_steps=1.5: a share is at most 1.0"),
    ],
)
def test_bad_parameters(config: dict[str, Any], words: str) -> None:
    q, k, v = tensors((2, 3, 4))
    with pytest.raises(ConfigError, match=words):
        polyattn.attention(q, k, v, backend="vsa", config=config, grid=(2, 3, 4))


def test_both_spellings_and_both_names() -> None:
    grid = (5, 6, 9)
    q, k, v = tensors(grid)
    expected = attend(q, k, v, grid, sparsity=0.5)
    assert torch.equal(attend(q, k, v, grid, VSA_sparsity=0.5), expected)
    assert torch.equal(attend(q, k, v, grid, sparsity=0.5, backend="video_sparse_attn"), expected)
    named = polyattn.attention(q, k, v, backend="vsa", config="VSA_sparsity=0.5", grid=grid)
    assert torch.equal(named, expected)
    dense = attend(q, k, v, grid)  # the default leaves nothing out
    assert torch.equal(dense, attend(q, k, v, grid, sparsity=0))
    assert not torch.allclose(dense, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda gate: gate[:, :-1], r"\[B, S, H, D\] = \[1, 24, 2, 8\]; found \[1, 23, 2, 8\]"),
        (lambda gate: gate[..., :1], r"found \[1, 24, 2, 1\]"),
        (lambda gate: gate.flatten(2), r"unflatten"),
        (lambda gate: gate.float(), "shares q's dtype float64, found float32"),
    ],
)
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_a_gate_that_does_not_fit(change: Any, words: str, dense_steps: int) -> None:
    """After a gate that fits, and before the first dense step."""
    q, k, v = tensors((2, 3, 4))
    with polyattn.forward_context(step=0):
        attend(q, k, v, (2, 3, 4), gate=torch.ones_like(q), dense_steps=dense_steps)
        with pytest.raises(InputError, match=words):
            gate = change(torch.ones_like(q))
            attend(q, k, v, (2, 3, 4), gate=gate, dense_steps=dense_steps)


def test_a_gate_that_needs_a_gradient_is_refused() -> None:
    q, k, v = tensors((2, 3, 4))
    gate = torch.ones_like(q).requires_grad_()
    with torch.no_grad():
        attend(q, k, v, (2, 3, 4), gate=gate)
    with pytest.raises(BackendUnavailableError, match="no backward pass, and gradients are on"):
        attend(q, k, v, (2, 3, 4), gate=gate)


@pytest.mark.parametrize(
    ("coarse", "gated", "words"),
    [("auto", True, "coarse_branch=auto and a gate"), ("on", False, "coarse_branch=on")],
)
def test_two_branches_have_no_log_sum_exp(coarse: str, gated: bool, words: str) -> None:
    q, k, v = tensors((2, 3, 4))
    gate = torch.ones_like(q) if gated else None
    with pytest.raises(BackendUnavailableError, match=words) as caught:
        attend(q, k, v, (2, 3, 4), gate=gate, coarse_branch=coarse, return_lse=True)
    assert "coarse_branch=off" in str(caught.value)
    _, lse = attend(q, k, v, (2, 3, 4), gate=gate, coarse_branch="off", return_lse=True)
    assert lse.isfinite().all()


def test_what_does_not_fit_the_grid() -> None:
    q, k, v = tensors((2, 3, 4), text=3)
    with pytest.raises(InputError, match=r"makes 24 tokens, and q has 27"):
        attend(q, k, v, (2, 3, 4))
    with pytest.raises(InputError, match="before the video's 24 tokens"):
        attend(q, k, v, (2, 3, 4), text=TextSpan(5, 3))
    with pytest.raises(InputError, match="3 tokens cannot have 4 valid"):
        attend(q, k, v, (2, 3, 4), text=TextSpan(0, 3, 4))
    with pytest.raises(BackendUnavailableError, match="token grid"):
        polyattn.attention(q, k, v, backend="vsa")
    with pytest.raises(BackendUnavailableError, match="key_padding masks, found a boolean mask"):
        mask = torch.ones(27, 27, dtype=torch.bool)
        attend(q, k, v, (2, 3, 4), text=TextSpan(0, 3), shown=mask)


def test_the_implementation_keeps_nothing() -> None:
    """Two runs at once, grids of other sizes between equal calls: nothing but the parameters."""
    built = plugin.build(VsaConfig(sparsity=0.5), AttentionRequest(), Environment())
    q, k, v = tensors((5, 6, 9))
    other = tensors((3, 5, 18), seed=1)
    contexts = []
    answers = []
    for x, grid in (((q, k, v), (5, 6, 9)), (other, (3, 5, 18)), ((q, k, v), (5, 6, 9))):
        with polyattn.forward_context(grid=grid, layer=0, step=0) as context:
            answers.append(built(*x, AttentionCall(False, 0.3, context=context)))
        contexts.append(context)
    assert torch.equal(answers[0], answers[2])  # type: ignore[arg-type]
    assert vars(built) == {"config": VsaConfig(sparsity=0.5)}
    assert all(not context.run_state for context in contexts)
