"""The numbers of sliding_tile_attn, against the method token by token in float64."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyattn
from polyattn import TextSpan
from polyattn.errors import BackendUnavailableError, ConfigError, InputError
from polyattn.layers import LocalAttention
from polyattn.reporting import Report, reporting_to
from polyattn.testing.accuracy import budget, excess, measure
from polyattn.testing.oracle import attention as dense_attention
from polyattn.testing.oracle import same_precision_attention
from polyattn.video import VideoSequence
from polyattn_sta import tiles as tiles_module
from polyattn_sta.tiles import tiles_of, window_plans
from polyattn_sta.windows import first_visible, tile_density, visible_widths

CPU = torch.device("cpu")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Any, text: Any = None,
    visible: Any = None, scale: float | None = None, **config: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    with polyattn.forward_context(grid=grid, text=text):
        out, lse = polyattn.attention(
            q, k, v, backend="sta", config={"skip_time_steps": 0, **config}, attn_mask=visible,
            scale=scale, enable_gqa=q.shape[2] != k.shape[2], return_lse=True,
        )  # fmt: skip
    return out, lse


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(found.double(), expected, rtol=0, atol=tolerance)


# --- the rule -------------------------------------------------------------------------------------


def test_an_axis_is_seen_as_published(method: Any) -> None:
    """The boxes of tiles are those of the clamped centre, for every window on every small axis."""
    for count in range(1, 13):
        for side in range(1, 16):
            (width, _, _) = visible_widths((side, 1, 1), (count, 1, 1))
            for query, first in enumerate(first_visible(width, count)):
                seen = [
                    key for key in range(count) if method.sees((query,), (key,), (side,), (count,))
                ]
                assert seen == list(range(first, first + width)), (count, side, query)


@pytest.mark.parametrize(
    ("grid", "text", "windows"),
    [
        ((30, 48, 80), 256, [(3, 3, 3), (5, 6, 1), (1, 6, 10), (5, 6, 10)]),
        ((36, 48, 48), 0, [(3, 3, 6), (6, 1, 6), (6, 6, 6), (1, 1, 6)]),
        ((18, 48, 80), 0, [(3, 1, 10), (1, 5, 7), (1, 6, 5), (3, 6, 10)]),
    ],
)
def test_published_canvases(method: Any, grid: Any, text: int, windows: Any) -> None:
    """Whole canvases of the paper, tile by tile, with HunyuanVideo's text."""
    valid = text * 3 // 4
    sequence = VideoSequence(grid, 0, text, valid, None)
    tiles = tiles_of(sequence, (6, 8, 8), CPU)
    counts = tiles.tile_grid
    places = [(t, h, w) for t in range(counts[0]) for h in range(counts[1])
              for w in range(counts[2])]  # fmt: skip
    plans = window_plans(tiles, tuple(windows))
    for plan, window, density in zip(plans.plans, windows, plans.densities, strict=True):
        assert (plan.query_block, plan.key_block) == (128, 128)
        plan.validate()
        known = {
            each: [method.sees(each, other, window, counts) for other in places] for each in places
        }
        expected = torch.tensor([known[each] for each in places])
        blocks = plan.to_block_mask()[0, 0]
        video = 3 * len(places)
        assert torch.equal(
            blocks[:video, :video], expected.repeat_interleave(3, 0).repeat_interleave(3, 1)
        )
        if text:  # 256 tokens, 192 of them valid: blocks of 128 and 64 keys
            assert plan.key_lengths is not None
            assert plan.key_lengths[0, 0, video:].tolist() == [128, 64, 0]
            assert blocks[:video, video:].tolist() == [[True, True, False]] * video
            assert blocks[video : video + 2, :-1].all()
            assert not blocks[video + 2].any()
        else:
            assert plan.key_lengths is None
            assert density == pytest.approx(tile_density(window, counts), abs=1e-12)
        assert density == pytest.approx(plan.density().item(), abs=1e-12)


sides = st.integers(1, 6)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    grid = draw(st.tuples(sides, sides, sides).filter(lambda each: math.prod(each) <= 100))
    tokens = math.prod(grid)
    length = draw(st.integers(0, 40))
    text = None
    if length:
        start = draw(st.sampled_from([0, tokens]))
        text = TextSpan(start, length, draw(st.none() | st.integers(0, length)))
    return {
        "grid": grid,
        "text": text,
        "tile": draw(st.tuples(*[st.integers(1, 5)] * 3)),
        "window": draw(st.tuples(*[st.integers(1, 7)] * 3)),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.sampled_from([(1, 1), (3, 3), (4, 2)])),
        "scale": draw(st.sampled_from([None, 0.9, -0.4])),
        "hidden": draw(st.sampled_from(["none", "shared", "per item"])),
        "strided": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
def test_any_grid_is_right(method: Any, draw: Any, case: dict[str, Any]) -> None:
    """Ragged, tiny and thin grids, text, hidden keys that hold NaN, groups, scales, views."""
    text, batch, (heads, kv_heads) = case["text"], case["batch"], case["heads"]
    length = math.prod(case["grid"]) + (text.length if text else 0)
    q, k, v = draw(length, heads, batch=batch, kv_heads=kv_heads, seed=case["seed"])
    mask = method.mask(case["grid"], case["tile"], [case["window"]] * heads, text)
    visible = None
    if case["hidden"] != "none":
        items = 1 if case["hidden"] == "shared" else batch
        generator = torch.Generator().manual_seed(case["seed"])
        visible = torch.rand(items, 1, 1, length, generator=generator) < 0.7
    shown = mask.any(0).any(0).expand(batch, -1)
    if visible is not None:
        shown = shown & visible[:, 0, 0]
    expected, expected_lse = method.attend(
        q, k, v, mask, None if visible is None else visible[:, 0, 0], case["scale"]
    )
    k, v = (each.masked_fill(~shown[:, :, None, None], math.nan) for each in (k, v))
    if case["strided"]:
        q, k, v = (each.transpose(1, 3).contiguous().transpose(1, 3) for each in (q, k, v))
    out, lse = attend(
        q, k, v, case["grid"], text, visible, case["scale"],
        window_size=case["window"], tile_size=case["tile"],
    )  # fmt: skip
    assert close(out, expected)
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert close(lse[finite], expected_lse[finite], 1e-5)


@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [
        ((1, 1, 1), (6, 8, 8), (1, 1, 1)),
        ((1, 1, 197), (1, 1, 16), (1, 1, 3)),
        ((67, 1, 2), (6, 8, 8), (3, 1, 1)),
        ((7, 9, 10), (6, 8, 8), (1, 1, 1)),
        ((7, 9, 10), (6, 8, 8), (1, 2, 1)),
        ((3, 9, 12), (3, 3, 5), (1, 1, 3)),
        ((4, 9, 9), (5, 4, 4), (1, 1, 1)),
    ],
)
def test_shapes_that_hurt(method: Any, draw: Any, grid: Any, tile: Any, window: Any) -> None:
    """One token, a thin line, short tiles at every edge, tiles of 45 and of 65 to 80 tokens."""
    q, k, v = draw(math.prod(grid), 2)
    expected, expected_lse = method.attend(q, k, v, method.mask(grid, tile, [window] * 2))
    out, lse = attend(q, k, v, grid, window_size=window, tile_size=tile)
    assert close(out, expected)
    assert close(lse, expected_lse, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_is_that_of_an_exact_kernel(method: Any, draw: Any, dtype: Any) -> None:
    grid, tile, window, text = (5, 6, 7), (2, 3, 4), (1, 1, 2), TextSpan(210, 11, 7)
    q, k, v = draw(221, 3, batch=2, dim=64, dtype=dtype)
    mask = method.mask(grid, tile, [window] * 3, text)
    expected, _ = method.attend(q, k, v, mask)
    plain, _ = same_precision_attention(q, k, v, mask=mask[None].expand(2, -1, -1, -1))
    out, _ = attend(q, k, v, grid, text, window_size=window, tile_size=tile)
    allowed = budget("exact", dtype, measure(plain, expected))
    assert excess(measure(out, expected), allowed) is None


@pytest.mark.parametrize("window", [(3, 2, 4), (9, 9, 9), (2, 2, 4)])
def test_a_full_window_is_dense_attention(draw: Any, window: Any) -> None:
    q, k, v = draw(3 * 4 * 8, 2, dtype=torch.float32)
    out, _ = attend(q, k, v, (3, 4, 8), window_size=window, tile_size=(1, 2, 2))
    expected = dense_attention(q, k, v)
    assert isinstance(expected, torch.Tensor)
    plain, _ = same_precision_attention(q, k, v)
    allowed = budget("exact", torch.float32, measure(plain, expected))
    assert excess(measure(out, expected), allowed) is None


def test_a_batch_item_without_visible_keys_is_zero(draw: Any, method: Any) -> None:
    q, k, v = draw(144, 2, batch=2)
    visible = torch.ones(2, 144, dtype=torch.bool)
    visible[1] = False
    k[1] = v[1] = math.nan
    out, lse = attend(q, k, v, GRID, None, visible, window_size=(1, 3, 1), tile_size=TILE)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    first = [each[:1] for each in (q, k, v)]
    assert close(out[:1], method.attend(*first, method.mask(GRID, TILE, [(1, 3, 1)] * 2))[0])


# --- windows per step, layer and head -------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 1, 3), (3, 3, 4), (1, 3, 1), (3, 1, 2)]


def a_window(step: int, layer: int, head: int) -> tuple[int, int, int]:
    return SHAPES[(step * 7 + layer * 3 + head) % len(SHAPES)]


GRID, TILE = (3, 6, 8), (1, 2, 2)  # 3 x 3 x 4 tiles


def test_each_head_has_its_window(method: Any, draw: Any, strategy_file: Any) -> None:
    path = strategy_file(a_window, steps=3, layers=2, heads=4)
    q, k, v = draw(144, 4, kv_heads=2)
    for step in range(3):
        for layer in range(2):
            windows = [a_window(step, layer, head) for head in range(4)]
            expected, _ = method.attend(q, k, v, method.mask(GRID, TILE, windows))
            with polyattn.forward_context(step=step, num_steps=3, layer=layer, num_layers=2):
                out, _ = attend(q, k, v, GRID, mask_strategy_file_path=path, tile_size=TILE)
            assert close(out, expected), (step, layer)


def test_a_slice_of_heads_is_that_of_the_whole(draw: Any, strategy_file: Any) -> None:
    """What a rank of Ulysses parallelism computes, told by first_head; without it, an error."""
    path = strategy_file(a_window, steps=1, layers=1, heads=6)
    q, k, v = draw(144, 6)
    with polyattn.forward_context(step=0, num_steps=1, layer=0):
        whole, _ = attend(q, k, v, GRID, mask_strategy_file_path=path, tile_size=TILE)
        for first in (0, 2, 4):
            part = [each[:, :, first : first + 2] for each in (q, k, v)]
            with polyattn.forward_context(first_head=first):
                out, _ = attend(*part, GRID, mask_strategy_file_path=path, tile_size=TILE)
            assert torch.equal(out, whole[:, :, first : first + 2])
        with pytest.raises(ConfigError, match="for 6 heads, and the call has 2;.*first") as error:
            attend(*part, GRID, mask_strategy_file_path=path, tile_size=TILE)
        assert "first_head=" in str(error.value)
        with (
            polyattn.forward_context(first_head=5),
            pytest.raises(ConfigError, match="heads 5 to 6"),
        ):
            attend(*part, GRID, mask_strategy_file_path=path, tile_size=TILE)
    one_window = {"window_size": (1, 3, 1), "tile_size": TILE}
    whole, _ = attend(q, k, v, GRID, **one_window)
    out, _ = attend(q[:, :, 1:3], k[:, :, 1:3], v[:, :, 1:3], GRID, **one_window)
    assert torch.equal(out, whole[:, :, 1:3])


@pytest.mark.parametrize(("num_steps", "expected"), [(2, [0, 2]), (4, [0, 1, 2, 3]),
                                                     (6, [0, 0, 1, 2, 2, 3])])  # fmt: skip
def test_other_step_counts_are_mapped_by_fraction(
    draw: Any, strategy_file: Any, num_steps: int, expected: list[int]
) -> None:
    path = strategy_file(a_window, steps=4, layers=1, heads=2)
    q, k, v = draw(144, 2)
    config = {"mask_strategy_file_path": path, "tile_size": TILE}
    by_step = []
    with polyattn.forward_context(num_steps=4, layer=0):
        for step in range(4):
            with polyattn.forward_context(step=step):
                by_step.append(attend(q, k, v, GRID, **config)[0])
    assert not any(torch.equal(by_step[0], each) for each in by_step[1:])
    with reporting_to(Report()) as report, polyattn.forward_context(num_steps=num_steps, layer=0):
        for step in range(num_steps):
            with polyattn.forward_context(step=step):
                out, _ = attend(q, k, v, GRID, **config)
            assert torch.equal(out, by_step[expected[step]])
    told = report.rows[0].facts.get("steps")
    assert told == (None if num_steps == 4 else f"{num_steps} mapped to the strategy's 4")


def test_plans_are_built_once_per_window(
    draw: Any, strategy_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    lists = tiles_module._lists
    monkeypatch.setattr(
        tiles_module, "_lists", lambda tiles, widths: built.append(widths) or lists(tiles, widths)
    )
    tiles_module._window_plans.cache_clear()
    path = strategy_file(a_window, steps=3, layers=3, heads=4)
    q, k, v = draw(144, 4)
    with polyattn.forward_context(num_steps=3, num_layers=3):
        for step in range(3):
            for layer in range(3):
                with polyattn.forward_context(step=step, layer=layer):
                    attend(q, k, v, GRID, mask_strategy_file_path=path, tile_size=TILE)
    assert len(built) == len(SHAPES)


def test_one_graph_serves_all_steps(draw: Any, strategy_file: Any) -> None:
    path = strategy_file(a_window, steps=4, layers=1, heads=2)
    config = {"mask_strategy_file_path": path, "tile_size": TILE, "skip_time_steps": 1}
    layer = LocalAttention("sta", config=config, layer=0)
    q, k, v = draw(144, 2, dtype=torch.float32)
    graphs = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    outs = []
    with polyattn.forward_context(grid=GRID, num_steps=4):
        for step in range(4):
            with polyattn.forward_context(step=step):
                outs.append(compiled(q, k, v))
                assert torch.allclose(outs[-1], layer(q, k, v))
    assert len(graphs) == 1
    assert not torch.allclose(outs[0], outs[1])


def test_what_inference_mode_cached_serves_outside(draw: Any, strategy_file: Any) -> None:
    path = strategy_file(a_window, steps=1, layers=1, heads=2)
    q, k, v = draw(150, 2)
    config = {"mask_strategy_file_path": path, "tile_size": (1, 2, 2)}
    with polyattn.forward_context(step=0, num_steps=1, layer=0):
        with torch.inference_mode():
            inside, _ = attend(q, k, v, (5, 5, 6), **config)
        outside, _ = attend(q, k, v, (5, 5, 6), **config)
    assert torch.equal(inside, outside)


# --- schedule and report --------------------------------------------------------------------------


def run_of(steps: int, draw: Any, **config: Any) -> Report:
    q, k, v = draw(144, 2, dtype=torch.float32)
    with reporting_to(Report()) as report, polyattn.forward_context(grid=GRID, num_steps=steps):
        for step in range(steps):
            with polyattn.forward_context(step=step, layer=0):
                polyattn.attention(q, k, v, backend="sta", config={"tile_size": TILE, **config})
    return report


def steps_of(report: Report) -> dict[str, list[int]]:
    return {row.used: sorted(row.steps) for row in report.rows}


@pytest.mark.parametrize(
    ("config", "sparse"),
    [
        ({}, [15, 16]),
        ({"skip_time_steps": 3}, list(range(3, 17))),
        ({"dense_steps": 3}, list(range(3, 17))),
        ({"skip_time_steps": 0.5}, list(range(8, 17))),
        ({"skip_time_steps": 0}, list(range(17))),
    ],
)
def test_first_steps_are_dense(draw: Any, config: Any, sparse: list[int]) -> None:
    """skip_time_steps holds in inference, too; the dense backend is that of a dense run."""
    steps = steps_of(run_of(17, draw, window_size=[1, 1, 3], **config))
    assert steps.pop("sliding_tile_attn") == sparse
    dense = [step for step in range(17) if step not in sparse]
    assert list(steps.values()) == ([dense] if dense else [])


def test_a_run_that_stays_dense_is_warned_of(draw: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="polyattn"):
        (row,) = run_of(4, draw, window_size=[1, 1, 3]).rows
    assert row.why == "skip_time_steps=15 leaves none of the run's 4 steps sparse"
    assert f"sliding_tile_attn: {row.why}" in caplog.text
    caplog.clear()
    run_of(4, draw, window_size=[1, 1, 3], skip_time_steps=3)
    assert not caplog.text


def test_the_report_tells_what_was_done(draw: Any, strategy_file: Any, method: Any) -> None:
    report = run_of(1, draw, window_size=[1, 1, 3], skip_time_steps=0)
    mask = method.mask(GRID, TILE, [(1, 1, 3)])
    facts = report.rows[0].facts
    assert facts.pop("density") == pytest.approx(mask.double().mean().item())
    assert facts == {"window": "1x1x3", "tiles": "3x3x4 of 1x2x2", "provider": "reference"}

    path = strategy_file(a_window, steps=1, layers=1, heads=2)
    report = run_of(1, draw, mask_strategy_file_path=path, skip_time_steps=0)
    mask = method.mask(GRID, TILE, [a_window(0, 0, 0), a_window(0, 0, 1)])
    facts = report.rows[0].facts
    assert facts["density"] == pytest.approx(mask.double().mean().item())
    assert facts["strategy"] == path


# --- what is refused ------------------------------------------------------------------------------


def test_windows_must_be_given(draw: Any) -> None:
    with pytest.raises(BackendUnavailableError) as error:
        attend(*draw(144, 1), GRID)
    for words in ("mask_strategy_file_path", "window_size", "found neither", "Try: "):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"window_size": [1, 1, 1], "mask_strategy_file_path": "x.json"},
            "give one of window_size and mask_strategy_file_path",
        ),
        ({"window_size": [0, 1, 1]}, "window_size.0"),
        ({"window_size": [3, 3]}, r"window_size=\[3, 3\] is a list of 2, expected 3"),
        ({"window_size": [1, 1, 1], "skip_time_steps": True}, "skip_time_steps=True is not a num"),
        ({"tile_size": [6, 8, 8.5]}, "tile_size.2"),
        ({"sta_mode": "STA_dreaming"}, "STA_tuning_cfg"),
        ({"sta_mode": "STA_searching"}, "needs search_output_path"),
        ({"sta_mode": "STA_tuning"}, "needs search_output_path"),
        (
            {"sta_mode": "STA_searching", "search_output_path": "x", "window_size": [1, 1, 1]},
            "window_size is a parameter of STA_inference, and sta_mode is STA_searching",
        ),
        ({"window_size": [1, 1, 1], "max_density": 0.2}, "max_density is a parameter of STA_tu"),
        ({"window_size": [1, 1, 1], "candidates": [[1, 1, 1]]}, "candidates is a parameter of"),
        ({"window_size": [1, 1, 1], "skip_time_steps": 2, "dense_steps": 2}, "in two spellings"),
        ({"window_size": [1, 1, 1], "skip_time_steps": 1.5}, "a share is at most 1.0"),
        ({"window_size": [1, 1, 1], "skip_time_steps": -2}, "skip_time_steps"),
        ({"windowsize": [1, 1, 1]}, "window_size"),
    ],
)
def test_parameters_that_cannot_be(draw: Any, config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        polyattn.attention(*draw(144, 1), backend="sta", config=config, grid=GRID)


def test_what_a_check_says_of_files(tmp_path: Path, strategy_file: Any) -> None:
    from polyattn.config import validate
    from polyattn.probing import config_reasons
    from polyattn_sta import SPEC

    def told(**config: Any) -> list[str]:
        return [each.message for each in config_reasons(SPEC, validate(SPEC, config))]

    path = strategy_file(a_window, steps=1, layers=1, heads=2)
    assert told(mask_strategy_file_path=path) == told(window_size=[1, 1, 1]) == []
    assert "does not exist" in told(mask_strategy_file_path=str(tmp_path / "none.json"))[0]
    assert "found neither" in told()[0]
    tuning = {"sta_mode": "STA_tuning", "search_output_path": str(tmp_path)}
    assert "holds no search records" in told(**tuning)[0]
    assert told(sta_mode="STA_searching", search_output_path=str(tmp_path / "new")) == []


@pytest.mark.parametrize("key", ["sta_mode", "STA_mode"])
@pytest.mark.parametrize("value", ["STA_inference", "STA_INFERENCE"])
def test_spellings_of_the_mode(draw: Any, key: str, value: str) -> None:
    q, k, v = draw(144, 1)
    out, _ = attend(q, k, v, GRID, window_size=[1, 1, 3], **{key: value})
    assert torch.equal(out, attend(q, k, v, GRID, window_size=[1, 1, 3])[0])


def test_a_call_without_a_grid_or_a_step(draw: Any, strategy_file: Any) -> None:
    q, k, v = draw(144, 2)
    config = {"window_size": [1, 1, 1]}
    with pytest.raises(BackendUnavailableError, match="grid"):
        polyattn.attention(q, k, v, backend="sta", config=config)
    with pytest.raises(InputError, match=r"(?s)^skip_time_steps=15 needs.*skip_time_steps=0, "):
        polyattn.attention(q, k, v, backend="sta", config=config, grid=GRID)
    path = strategy_file(a_window, steps=2, layers=2, heads=2)
    config = {"mask_strategy_file_path": path, "tile_size": TILE}
    with pytest.raises(InputError, match="does not say the step and the layer"):
        attend(q, k, v, GRID, **config)
    with polyattn.forward_context(step=2, layer=0):
        with pytest.raises(ConfigError, match="windows for 2 steps, and this is step 2"):
            attend(q, k, v, GRID, **config)
    with polyattn.forward_context(step=1, layer=0):
        attend(q, k, v, GRID, **config)


def test_a_strategy_for_another_model_or_size(draw: Any, strategy_file: Any) -> None:
    path = strategy_file(a_window, steps=2, layers=2, heads=2)
    q, k, v = draw(144, 2)
    config = {"mask_strategy_file_path": path, "tile_size": TILE}
    with polyattn.forward_context(step=0, num_steps=2, layer=0, num_layers=3):
        with pytest.raises(ConfigError, match="a model of 2 layers, and this one has 3 layers"):
            attend(q, k, v, GRID, **config)
    with polyattn.forward_context(step=0, num_steps=2, layer=2):
        with pytest.raises(ConfigError, match="a model of 2 layers, and this one has layer 2"):
            attend(q, k, v, GRID, **config)
    with polyattn.forward_context(step=0, num_steps=2, layer=0):
        with pytest.raises(ConfigError, match="for 2 heads, and the call has 3"):
            attend(*draw(144, 3), GRID, **config)
        # The first window that is too wide, by its entry: [3, 3, 4] on 1 x 2 x 2 tiles.
        first = next(
            f"{step}_{layer}_{head}"
            for step in range(2)
            for layer in range(2)
            for head in range(2)
            if max(a_window(step, layer, head)) > 2
        )
        with pytest.raises(ConfigError, match=f"'{first}' exceeds the grid of 1x2x2 tiles"):
            attend(*draw(12, 2), (1, 3, 4), mask_strategy_file_path=path, tile_size=(1, 2, 2))


def test_tiles_far_too_small_are_refused(draw: Any) -> None:
    q, k, v = draw(21 * 45 * 80, 1, dim=1, dtype=torch.float16)
    with pytest.raises(ConfigError, match="75,600 tiles, too many") as error:
        attend(q, k, v, (21, 45, 80), window_size=(21, 45, 80), tile_size=(1, 1, 1))
    assert "a larger tile_size" in str(error.value)
