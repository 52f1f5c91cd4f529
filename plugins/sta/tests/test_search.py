"""The loop: a search during runs, tuning, and inference by the strategy that came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import polyattn
from polyattn.errors import ConfigError, InputError
from polyattn.reporting import Report, reporting_to
from polyattn_sta import load_strategy, tune
from polyattn_sta.__main__ import main
from polyattn_sta.search import read_records, record_files

GRID, TILE, TILES = (3, 6, 8), (1, 2, 2), (3, 3, 4)
STEPS, LAYERS, HEADS = 4, 3, 4
CANDIDATES = [[1, 3, 4], [3, 1, 4], [3, 3, 1], [1, 1, 1]]


def inputs(draw: Any, prompt: int, step: int, layer: int, branch: str) -> Any:
    """Numbers of which each head prefers the neighbours along some axis."""
    q, k, v = draw(144, HEADS, seed=hash((prompt, step, layer, branch == "cond")) % 2**31)
    places = torch.cartesian_prod(*(torch.arange(side) for side in GRID)).double()
    for head in range(HEADS):
        axis = (head + step + layer + (branch == "cond")) % 3
        angle = places[:, axis] / GRID[axis] * 3
        for each in (q, k):
            each[0, :, head, :2] = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    return q, k, v


def run(
    draw: Any, prompt: int, config: Any, *, heads: slice = slice(None), steps: int = STEPS,
    branches: tuple[str, ...] = ("cond", "uncond"),
) -> tuple[dict[Any, torch.Tensor], Report]:  # fmt: skip
    """A whole fake run of a model with guidance; outputs by (step, layer, branch)."""
    outs = {}
    config = {"tile_size": TILE, **config}
    with reporting_to(Report()) as report:
        with polyattn.forward_context(grid=GRID, num_steps=steps, num_layers=LAYERS):
            for step in range(steps):
                for branch in branches:
                    for layer in range(LAYERS):
                        q, k, v = inputs(draw, prompt, step, layer, branch)
                        with polyattn.forward_context(step=step, layer=layer, branch=branch):
                            outs[step, layer, branch] = polyattn.attention(
                                q[:, :, heads], k[:, :, heads], v[:, :, heads],
                                backend="sta", config=config,
                            )  # fmt: skip
    return outs, report


@pytest.fixture(scope="module")
def searched(draw: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search over two prompts."""
    folder = tmp_path_factory.mktemp("search")
    for prompt in range(2):
        run(draw, prompt, searching(folder))
    return folder


def searching(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "sta_mode": "STA_searching", "search_output_path": str(folder), "candidates": CANDIDATES,
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected(draw: Any, method: Any) -> dict[Any, list[float]]:
    """Mean squared errors by (prompt, branch, step, layer, head), from the method in float64."""
    masks = {tuple(each): method.mask(GRID, TILE, [each] * HEADS) for each in CANDIDATES}
    dense = method.mask(GRID, TILE, [TILES] * HEADS)
    assert dense.all()
    found = defaultdict(list)
    for prompt in range(2):
        for branch in ("cond", "uncond"):
            for step in range(STEPS):
                for layer in range(LAYERS):
                    q, k, v = inputs(draw, prompt, step, layer, branch)
                    full, _ = method.attend(q, k, v, dense)
                    for mask in masks.values():
                        error = (method.attend(q, k, v, mask)[0] - full).square().mean((0, 1, 3))
                        for head in range(HEADS):
                            found[prompt, branch, step, layer, head].append(error[head].item())
    return found


def best(expected: Any, branches: tuple[str, ...], step: int, layer: int, head: int) -> Any:
    sums = [0.0] * len(CANDIDATES)
    for prompt in range(2):
        for branch in branches:
            for number, error in enumerate(expected[prompt, branch, step, layer, head]):
                sums[number] += error
    return tuple(CANDIDATES[sums.index(min(sums))])


def test_a_search_gives_full_attention(draw: Any, tmp_path: Path) -> None:
    outs, report = run(draw, 0, searching(tmp_path))
    for (step, layer, branch), out in outs.items():
        q, k, v = inputs(draw, 0, step, layer, branch)
        dense = polyattn.testing.oracle.attention(q, k, v)
        assert torch.allclose(out, dense, rtol=0, atol=1e-9)
    (row,) = report.rows
    assert sorted(row.steps) == list(range(STEPS))  # no step is skipped
    assert row.facts["density"] == 1.0
    assert row.facts["candidates"] == "1x3x4 3x1x4 3x3x1 1x1x1"
    assert row.facts["record"] == str(record_files(tmp_path)[0])


def test_a_search_records_every_call(searched: Path, expected: Any, method: Any) -> None:
    files = record_files(searched)
    assert len(files) == 2  # one for each run
    seen = set()
    by_prompt = []
    for file in files:
        records = read_records(file)
        first = records[0]
        errors = [each[0] for each in first.mean_squared_error]
        by_prompt.append(
            next(p for p in range(2) if errors == pytest.approx(expected[p, "cond", 0, 0, 0]))
        )
        for record in records:
            assert (record.num_steps, record.num_layers) == (STEPS, LAYERS)
            assert (record.tile, record.tiles) == (TILE, TILES)
            for head in range(HEADS):
                place = (by_prompt[-1], record.branch, record.step, record.layer, head)
                found = [each[head] for each in record.mean_squared_error]
                assert found == pytest.approx(expected[place], rel=1e-6)
                seen.add(place)
            for squared, absolute in zip(
                record.mean_squared_error, record.mean_absolute_error, strict=True
            ):
                assert all(0 < one**2 <= two for one, two in zip(absolute, squared, strict=True))
        densities = [method.mask(GRID, TILE, [each]).double().mean() for each in CANDIDATES]
        assert first.densities == pytest.approx([each.item() for each in densities])
    assert sorted(by_prompt) == [0, 1]
    assert seen == set(expected)


@pytest.mark.parametrize("both", [False, True])
def test_tuning_takes_the_best_of_all_prompts(
    searched: Path, expected: Any, tmp_path: Path, both: bool
) -> None:
    branches = ("cond", "uncond") if both else ("cond",)
    tuned = tune(searched, tmp_path / "mask.json", skip_time_steps=1, both_branches=both)
    strategy = load_strategy(tmp_path / "mask.json")
    assert tuned.strategy is strategy
    assert (strategy.steps, strategy.layers, strategy.heads) == (STEPS, LAYERS, HEADS)
    chosen = set()
    for step in range(STEPS):
        for layer in range(LAYERS):
            for head in range(HEADS):
                window = strategy.window(step, layer, head)
                if step < 1:
                    assert window == TILES
                else:
                    assert window == best(expected, branches, step, layer, head)
                    chosen.add(window)
    assert len(chosen) > 1  # heads of different tastes
    assert (tuned.runs, tuned.full_steps) == (2, 1)
    assert 0.25 < tuned.density < 0.75


def test_branches_make_a_difference(searched: Path, expected: Any, tmp_path: Path) -> None:
    """Otherwise the test above could not tell the two tunings apart."""
    places = [(s, la, h) for s in range(1, STEPS) for la in range(LAYERS) for h in range(HEADS)]
    assert any(
        best(expected, ("cond",), *place) != best(expected, ("cond", "uncond"), *place)
        for place in places
    )


def test_the_whole_loop(draw: Any, method: Any, searched: Path, tmp_path: Path) -> None:
    """STA_tuning on a run tunes, writes, and attends by the result; inference does the same."""
    path = tmp_path / "tuned.json"
    tuning = {
        "sta_mode": "STA_tuning", "search_output_path": str(searched),
        "mask_strategy_file_path": str(path), "skip_time_steps": 2,
    }  # fmt: skip
    tuned, report = run(draw, 0, tuning)
    strategy = load_strategy(path)
    sparse = next(row for row in report.rows if row.used == "sliding_tile_attn")
    assert sorted(sparse.steps) == [2, 3]
    assert sparse.facts["strategy"] == f"{path} (tuned from 2 runs)"
    inferred, _ = run(draw, 0, {"mask_strategy_file_path": str(path), "skip_time_steps": 2})
    for (step, layer, branch), out in inferred.items():
        assert torch.equal(out, tuned[step, layer, branch])
        windows = [strategy.window(step, layer, head) for head in range(HEADS)]
        assert (windows == [TILES] * HEADS) == (step < 2)
        q, k, v = inputs(draw, 0, step, layer, branch)
        right, _ = method.attend(q, k, v, method.mask(GRID, TILE, windows))
        assert torch.allclose(out, right, rtol=0, atol=1e-9)


def test_tuning_is_done_once(
    draw: Any, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyattn_sta import tuning

    calls = []
    read = tuning.read_records
    monkeypatch.setattr(tuning, "read_records", lambda file: calls.append(file) or read(file))
    path = tmp_path / "mask.json"
    config = {
        "sta_mode": "STA_tuning_cfg", "search_output_path": str(searched), "skip_time_steps": 0,
        "mask_strategy_file_path": str(path),
    }  # fmt: skip
    for prompt in range(2):
        run(draw, prompt, config)
    assert len(calls) == 2  # each of the two files, once
    path.unlink()
    tune(searched, path, skip_time_steps=0, both_branches=True)
    assert path.exists()
    assert len(calls) == 4
    for _ in range(2):
        tune(searched, path, skip_time_steps=1, both_branches=True)
        tune(searched, path, skip_time_steps=1.0, both_branches=True)  # all of them
        assert len(load_strategy(path).windows) == 1
    assert len(calls) == 12  # each wrote over the other


def test_tuning_replaces_its_own_files_only(
    draw: Any, searched: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "mask.json"
    by_hand = json.dumps({f"{s}_{la}_{h}": [1, 1, 1] for s in range(STEPS) for la in range(LAYERS)
                          for h in range(HEADS)})  # fmt: skip
    path.write_text(by_hand)
    config = {
        "sta_mode": "STA_tuning", "search_output_path": str(searched), "skip_time_steps": 0,
        "mask_strategy_file_path": str(path),
    }  # fmt: skip
    command = ["tune", str(searched), "--output", str(path), "--skip-time-steps"]
    with pytest.raises(ConfigError, match="is there already, and which tuning did not write"):
        run(draw, 0, config)
    assert main([*command, "0"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == by_hand
    assert main([*command, "0", "--overwrite"]) == 0
    tuned = path.read_text()
    assert tuned != by_hand
    assert main([*command, "1"]) == 0  # its own
    assert path.read_text() != tuned
    path.write_text(path.read_text() + "\n")
    assert main([*command, "0"]) == 1  # changed since
    path.write_text(tuned)
    assert main([*command, "0"]) == 0  # what it would write
    assert json.loads(path.read_text()).keys() == json.loads(by_hand).keys()


def test_a_search_serves_its_own_tiles_only(draw: Any, searched: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    config = {
        "sta_mode": "STA_tuning", "search_output_path": str(searched), "skip_time_steps": 0,
        "mask_strategy_file_path": str(path),
    }  # fmt: skip
    words = r"on 3x3x4 tiles of 1x2x2 tokens, and this is 3x3x4 tiles of 1x2x3"
    with pytest.raises(ConfigError, match=words) as error:
        polyattn.attention(
            *draw(3 * 6 * 12, HEADS), backend="sta", config={**config, "tile_size": [1, 2, 3]},
            grid=(3, 6, 12),
        )  # fmt: skip
    assert "tile_size=[1,2,2]" in str(error.value)
    with pytest.raises(ConfigError, match=r"and this is 4x3x5 tiles of 1x2x2"):
        polyattn.attention(
            *draw(4 * 6 * 10, HEADS), backend="sta", config={**config, "tile_size": TILE},
            grid=(4, 6, 10),
        )  # fmt: skip
    assert not path.exists()


@pytest.mark.parametrize("dense_layers", [1, 0.4])
def test_dense_layers_hold_in_all_of_the_loop(
    draw: Any, tmp_path: Path, dense_layers: Any, capsys: Any
) -> None:
    """They are not searched, and tuning gives them the full window."""
    folder, path = tmp_path / "search", tmp_path / "mask.json"
    run(draw, 0, searching(folder, dense_layers=dense_layers))
    assert {each.layer for each in read_records(record_files(folder)[0])} == {1, 2}
    tuning = {
        "sta_mode": "STA_tuning", "search_output_path": str(folder), "skip_time_steps": 1,
        "mask_strategy_file_path": str(path), "dense_layers": dense_layers,
    }  # fmt: skip
    run(draw, 0, tuning)
    strategy = load_strategy(path)
    for step in range(STEPS):
        assert {strategy.window(step, 0, head) for head in range(HEADS)} == {TILES}
    assert TILES not in {strategy.window(1, 1, head) for head in range(HEADS)}
    with pytest.raises(ConfigError, match="no record of step 1, layer 0, head 0") as error:
        tune(folder, skip_time_steps=1)
    assert "the skip_time_steps and dense_layers of the search" in str(error.value)
    words = ["tune", str(folder), "--skip-time-steps", "1", "--dense-layers", str(dense_layers)]
    assert main([*words, "--output", str(tmp_path / "again.json")]) == 0
    assert "from 1 run, first 1 step full" in capsys.readouterr().out
    assert (tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"skip_time_steps": True}, "skip_time_steps is a count .* found True"),
        ({"skip_time_steps": "1"}, "found '1'"),
        ({"skip_time_steps": None}, "found None"),
        ({"skip_time_steps": -1}, "found -1"),
        ({"skip_time_steps": 1.5}, "found 1.5"),
        ({"skip_time_steps": float("nan")}, "found nan"),
        ({"dense_layers": -1}, "dense_layers is a count"),
        ({"max_density": 2}, "max_density is a share above 0, to 1; found 2"),
        ({"max_density": "a"}, "found 'a'"),
        ({"mask_strategy_file_path": 3}, "mask_strategy_file_path is a path, found 3"),
        ({"search_output_path": None}, "search_output_path is a path, found None"),
    ],
)
def test_arguments_that_cannot_be_tuned_by(searched: Path, wrong: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tune(**{"search_output_path": searched, **wrong})


def test_ranks_search_their_own_heads(draw: Any, expected: Any, tmp_path: Path) -> None:
    for first in (0, 2):
        with polyattn.forward_context(first_head=first):
            run(draw, 0, searching(tmp_path), heads=slice(first, first + 2))
            run(draw, 1, searching(tmp_path), heads=slice(first, first + 2))
    strategy = tune(tmp_path, skip_time_steps=0).strategy
    for step, layer, head in ((0, 0, 0), (1, 2, 1), (3, 1, 2), (2, 0, 3)):
        assert strategy.window(step, layer, head) == best(expected, ("cond",), step, layer, head)


def test_the_first_steps_need_no_search(draw: Any, tmp_path: Path) -> None:
    """Given explicitly, the schedule holds in a search too."""
    _, report = run(draw, 0, searching(tmp_path, skip_time_steps=2))
    rows = {row.used: sorted(row.steps) for row in report.rows}
    assert rows["sliding_tile_attn"] == [2, 3]
    tuned = tune(tmp_path, skip_time_steps=0.5)
    assert tuned.path.name == "mask_strategy_s0.5.json"
    assert tuned.full_steps == 2
    with pytest.raises(ConfigError, match="no record of step 1, layer 0, head 0"):
        tune(tmp_path, skip_time_steps=1)


def test_dense_candidates_can_be_left_out(searched: Path, tmp_path: Path) -> None:
    tuned = tune(searched, tmp_path / "a.json", skip_time_steps=0, max_density=0.3)
    assert set(tuned.strategy.windows) <= {(3, 3, 1), (1, 1, 1)}
    wide = tune(searched, tmp_path / "b.json", skip_time_steps=0)
    assert wide.mean_squared_error < tuned.mean_squared_error
    assert wide.density > tuned.density
    with pytest.raises(ConfigError, match="leaves no candidate: they attend to 0.0278"):
        tune(searched, tmp_path / "c.json", max_density=0.01)


def test_a_run_that_was_cut_off_keeps_its_records(draw: Any, tmp_path: Path) -> None:
    run(draw, 0, searching(tmp_path), branches=("cond",))
    (file,) = record_files(tmp_path)
    whole = file.read_bytes()
    assert len(read_records(file)) == STEPS * LAYERS
    file.write_bytes(whole[:-40])  # within the last line
    assert len(read_records(file)) == STEPS * LAYERS - 1
    with pytest.raises(ConfigError, match="no record of step 3, layer 2, head 0"):
        tune(tmp_path, skip_time_steps=0)
    file.write_bytes(whole[:40])
    with pytest.raises(ConfigError, match="no finished record"):
        tune(tmp_path, skip_time_steps=0)


def test_records_that_cannot_be_tuned(draw: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder") as error:
        tune(tmp_path / "none")
    assert "sta_mode=STA_searching" in str(error.value)
    with pytest.raises(ConfigError, match="holds no search records"):
        tune(tmp_path)
    run(draw, 0, searching(tmp_path), branches=("uncond",))
    with pytest.raises(ConfigError, match="of the branch 'cond'; those in .* are of 'uncond'"):
        tune(tmp_path, skip_time_steps=0)
    with pytest.raises(ConfigError, match="both guidance branches"):
        tune(tmp_path, skip_time_steps=0, both_branches=True)
    (file,) = record_files(tmp_path)
    lines = file.read_text().splitlines()
    record = json.loads(lines[1])
    for changes, words in (
        ({"mean_squared_error": [[1.0]]}, "errors are a list per candidate"),
        ({"densities": [0.1]}, "densities are a number per candidate"),
        ({"mean_squared_error": [[None] * 4] * 4}, "valid number"),
        ({"version": 2}, "version"),
        ({"step": -1}, "step"),
    ):
        file.write_text("\n".join([lines[0], json.dumps({**record, **changes}), ""]))
        with pytest.raises(ConfigError, match=f"line 2 is no search record: .*{words}"):
            tune(tmp_path, skip_time_steps=0)
    file.write_text("\n".join(lines) + "\n")
    run(draw, 0, searching(tmp_path), steps=2)
    with pytest.raises(ConfigError, match="of different searches: . steps") as error:
        tune(tmp_path, skip_time_steps=0)
    assert "a folder of its own" in str(error.value)


def test_calls_that_cannot_be_searched(draw: Any, tmp_path: Path) -> None:
    q, k, v = draw(144, HEADS)

    def search(**config: Any) -> Any:
        given = {**searching(tmp_path), "tile_size": TILE, **config}
        return polyattn.attention(q, k, v, backend="sta", config=given, grid=GRID)

    with pytest.raises(InputError, match="does not say the step and the layer"):
        search()
    with polyattn.forward_context(step=0, layer=0):
        with pytest.raises(ConfigError, match=r"candidate \[1, 5, 1\] exceeds the grid of 3x3x4"):
            search(candidates=[[1, 5, 1]])
        with pytest.raises(ConfigError, match=r"\[3, 2, 4\] covers all of the grid"):
            search(candidates=[[1, 1, 1], [3, 2, 4]])
        with pytest.raises(ConfigError, match="a single tile"):
            search(candidates=None, tile_size=[6, 8, 8])
        blocked = tmp_path / "file"
        blocked.touch()
        with pytest.raises(ConfigError, match="cannot write the search record"):
            search(search_output_path=str(blocked))
        q[0, 5] = float("nan")
        with pytest.raises(InputError, match="step 0, layer 0: attention .* is not finite"):
            search()
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_search_with_text_judges_the_video(draw: Any, method: Any, tmp_path: Path) -> None:
    """Text and hidden keys, ragged tiles and default candidates; errors of video tokens alone."""
    grid, tile, text = (3, 5, 7), (1, 2, 2), polyattn.TextSpan(105, 9, 6)
    q, k, v = draw(114, 2, batch=2)
    visible = torch.ones(2, 114, dtype=torch.bool)
    visible[1, 20:60] = False
    config = {
        "sta_mode": "STA_SEARCHING", "search_output_path": str(tmp_path), "tile_size": tile,
    }  # fmt: skip
    with polyattn.forward_context(grid=grid, text=text, step=0, layer=0):
        out = polyattn.attention(q, k, v, backend="sta", config=config, attn_mask=visible)
    dense = method.mask(grid, tile, [(9, 9, 9)] * 2, text)
    full, _ = method.attend(q, k, v, dense, visible)
    assert torch.allclose(out, full, rtol=0, atol=1e-9)
    (record,) = read_records(record_files(tmp_path)[0])
    assert len(record.candidates) > 2
    for number, window in enumerate(record.candidates):
        mask = method.mask(grid, tile, [window] * 2, text)
        error = (method.attend(q, k, v, mask, visible)[0] - full)[:, :105]
        assert record.mean_squared_error[number] == pytest.approx(
            error.square().mean((0, 1, 3)).tolist(), rel=1e-6
        )
        assert record.mean_absolute_error[number] == pytest.approx(
            error.abs().mean((0, 1, 3)).tolist(), rel=1e-6
        )


def test_the_commands(searched: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "mask.json"
    tuning = ["tune", str(searched), "--output", str(path), "--skip-time-steps", "1"]
    assert main(tuning) == 0
    assert "from 2 runs, first 1 step full, mean density 0." in capsys.readouterr().out
    assert main([*tuning[:-1], "0.5", "--cfg", "--max-density", "0.3"]) == 0
    assert "first 2 steps full" in capsys.readouterr().out
    command = [sys.executable, "-m", "polyattn_sta", "show", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("4 steps, 3 layers, 4 heads; windows in tiles:\n  3x3x4")
    assert main(["tune", str(tmp_path / "none")]) == 1
    assert "Error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*tuning[:-1], "many"])
    assert "a count (3) or a share (0.2) is wanted, found 'many'" in capsys.readouterr().err
    assert main([*tuning, "--max-density", "1.5"]) == 1
    assert "max_density is a share above 0, to 1; found 1.5" in capsys.readouterr().err


def test_the_loop_on_the_demo_model(tmp_path: Path) -> None:
    """Search, tuning and inference as typed at the command line."""
    pytest.importorskip("polyattn_demo")
    pytest.importorskip("diffusers")
    from click.testing import CliRunner

    from polyattn.cli import main as polyattn_main

    folder, path = tmp_path / "search", tmp_path / "mask.json"

    def generate(name: str, config: str) -> list[dict[str, Any]]:
        words = [
            "generate", "--num-frames", "5", "--width", "64", "--height", "64", "--quiet",
            "--num-inference-steps", "2", "--output", str(tmp_path / f"{name}.mp4"),
            "--report", str(tmp_path / f"{name}.json"), "--attention-backend", "sta",
            "--attention-backend-config", f"{config},tile_size=[1,2,2]",
        ]  # fmt: skip
        result = CliRunner().invoke(polyattn_main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        text = (tmp_path / f"{name}.json").read_text()
        return [row for row in _rows(json.loads(text)) if row["used"] == "sliding_tile_attn"]

    (row,) = generate("searched", f"sta_mode=STA_searching,search_output_path={folder}")
    assert row["steps"] == [0, 1]
    layers = len(row["layers"])
    assert len(read_records(record_files(folder)[0])) == 2 * 2 * layers  # steps, branches
    tuning = f"search_output_path={folder},mask_strategy_file_path={path},skip_time_steps=1"
    (tuned,) = generate("tuned", f"sta_mode=STA_tuning_cfg,{tuning}")
    strategy = load_strategy(path)
    assert (strategy.steps, strategy.layers) == (2, layers)
    (used,) = generate("sparse", f"mask_strategy_file_path={path},skip_time_steps=1")
    assert used["steps"] == tuned["steps"] == [1]
    assert used["facts"]["density"] == tuned["facts"]["density"] < 0.3
    videos = [(tmp_path / f"{name}.mp4").read_bytes() for name in ("searched", "tuned", "sparse")]
    assert videos[1] == videos[2] != videos[0]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (None, "does not exist"),
        ({"0_0_0": [1, 1, 1]}, "is for a model of 1 layers|is for 1 heads"),
        ({"0_0_0": [9, 1, 1]}, r"the window \[9, 1, 1\] of '0_0_0' exceeds the grid"),
        ({"0_0_0": [1, 1, 1], "0_0_2": [1, 1, 1]}, "the first that is missing is '0_0_1'"),
        ("layers", "is for a model of 1 layers, and this one has"),
    ],
)
def test_a_strategy_that_does_not_fit_is_told_before_the_model_is_loaded(
    tmp_path: Path, entries: Any, words: str
) -> None:
    pytest.importorskip("polyattn_demo")
    pytest.importorskip("diffusers")
    from polyattn.cli.generation import GenerationRequest, plan_generation

    path = tmp_path / "mask.json"
    if entries == "layers":
        entries = {
            f"0_0_{head}": [1, 1, 1] for head in range(_demo_config()["num_attention_heads"])
        }
    if entries is not None:
        path.write_text(json.dumps(entries))
    request = GenerationRequest(
        prompt="a red circle", width=64, height=64, num_frames=5, output=tmp_path / "v.gif",
        attention_backend="sta",
        attention_backend_config=f"mask_strategy_file_path={path},tile_size=[1,2,2]",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        plan_generation(request)


def _demo_config() -> dict[str, Any]:
    import polyattn_demo

    config = Path(polyattn_demo.model_path()) / "transformer" / "config.json"
    found: dict[str, Any] = json.loads(config.read_text())
    return found


def _rows(data: Any) -> list[dict[str, Any]]:
    """The rows of a written report, wherever in the file they are."""
    if isinstance(data, dict):
        return [data] if "used" in data else [r for each in data.values() for r in _rows(each)]
    return [row for each in data for row in _rows(each)] if isinstance(data, list) else []
