"""Strategy files: what is accepted, what is refused and how, how fast, and how often read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import polyattn
from polyattn.errors import ConfigError
from polyattn_sta import load_strategy
from polyattn_sta import strategy as strategy_module
from polyattn_sta.strategy import save_strategy
from polyattn_sta.windows import default_candidates, is_full, tile_density


def whole(steps: int = 2, layers: int = 2, heads: int = 2) -> dict[str, Any]:
    return {
        f"{step}_{layer}_{head}": [1 + step, 1 + layer, 1 + head]
        for step in range(steps)
        for layer in range(layers)
        for head in range(heads)
    }


def test_every_entry_is_found_in_any_order(tmp_path: Path) -> None:
    entries = whole(3, 2, 4)
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(dict(reversed(entries.items())), indent=4))
    strategy = load_strategy(path)
    assert (strategy.steps, strategy.layers, strategy.heads) == (3, 2, 4)
    for key, window in entries.items():
        step, layer, head = map(int, key.split("_"))
        assert strategy.window(step, layer, head) == tuple(window)
    assert len(strategy.windows) == 24
    for window, key in zip(strategy.windows, strategy.first_keys, strict=True):
        assert entries[key] == list(window)


def without(key: str) -> str:
    entries = whole()
    del entries[key]
    return json.dumps(entries)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[[3, 3, 3]]", "holds a list; expected"),
        ('"0_0_0"', "holds a str"),
        ("{}", "is empty"),
        ("[" * 100_000, "nested too deeply"),
        ('{"0_0": [1, 1, 1]}', "the key '0_0' is not of the form step_layer_head"),
        ('{"0_0_0": [1, 1, 1], "0_-1_0": [1, 1, 1]}', "the key '0_-1_0'"),
        ('{"0_0_0": [1, 1, 1], "0_0_0": [3, 3, 3]}', "gives step, layer, head '0_0_0' 2 times"),
        ('{"0_0_0": [1, 1, 1], "00_0_0": [3, 3, 3]}', "the key '00_0_0' is not of the form"),
        ('{"0_0_0": [1, 1]}', "of '0_0_0' is three tile counts of at least 1, found [1, 1]"),
        ('{"0_0_0": [1, 1, 0]}', "found [1, 1, 0]"),
        ('{"0_0_0": [1, 1, 1.5]}', "found [1, 1, 1.5]"),
        ('{"0_0_0": [1, 1, true]}', "found [1, 1, true]"),
        ('{"0_0_0": "3x3x3"}', "three tile counts"),
        ('{"0_0_0": [1, 1, 2], "0_0_1": "[1, 1, 2]"}', "of '0_0_1' is three tile counts"),
        ('{"0_0_0": {"t": 1}}', "three tile counts"),
        ('{"0_0_0": null}', "found null"),
        (
            without("1_0_1"),
            "7 entries for 2 steps, 2 layers and 2 heads, which make 8; the first "
            "that is missing is '1_0_1'",
        ),
        ('{"999999999_999999999_9": [1, 1, 1]}', "the first that is missing is '0_0_0'"),
    ],
)
def test_what_is_no_strategy(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mask.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_strategy(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path, draw: Any) -> None:
    with pytest.raises(ConfigError, match="does not exist .looked in"):
        load_strategy(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load_strategy("a\0b")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_strategy(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_strategy(tmp_path / "binary.json")
    config = {"mask_strategy_file_path": str(tmp_path / "none.json")}
    with polyattn.forward_context(step=20, layer=0), pytest.raises(ConfigError, match="none.json"):
        polyattn.attention(*draw(144, 1), backend="sta", config=config, grid=(3, 6, 8))


def test_nothing_half_is_saved(tmp_path: Path) -> None:
    place = tmp_path / "made" / "here" / "mask.json"
    saved = save_strategy(place, {(0, 0, 0): (3, 3, 3), (0, 0, 1): (1, 1, 5)})
    assert json.loads(place.read_text()) == {"0_0_0": [3, 3, 3], "0_0_1": [1, 1, 5]}
    assert saved.window(0, 0, 1) == (1, 1, 5)
    with pytest.raises(ConfigError, match="'0_0_1'"):
        save_strategy(place, {(0, 0, 0): (3, 3, 3), (0, 0, 2): (1, 1, 5)})
    assert load_strategy(place) is saved
    with pytest.raises(ConfigError, match="cannot write"):
        save_strategy(place / "below" / "mask.json", {(0, 0, 0): (3, 3, 3)})
    assert [each.name for each in place.parent.iterdir()] == ["mask.json"]


def test_a_large_file_is_read_fast_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72,000 entries in 4 MB, as for HunyuanVideo: under 0.3 s of work, and once for all layers."""
    path = tmp_path / "mask.json"
    entries = {
        f"{step}_{layer}_{head}": [(3, 3, 3), (5, 6, 1), (5, 6, 10), (1, 6, 10)][head % 4]
        for step in range(50)
        for layer in range(60)
        for head in range(24)
    }
    path.write_text(json.dumps(entries, indent=4))
    assert path.stat().st_size > 4_000_000
    times = []
    for _ in range(3):
        strategy_module._read.cache_clear()
        start = time.process_time()
        strategy = load_strategy(path)
        times.append(time.process_time() - start)
    plain = time.process_time()
    json.loads(path.read_text())
    plain = time.process_time() - plain
    assert min(times) < max(0.3, 10 * plain), times  # a busy machine is slow at everything
    assert len(strategy.windows) == 4
    assert strategy.of_heads(49, 59) == (0, 1, 2, 3) * 6
    monkeypatch.setattr(strategy_module, "_strategy", None)  # nothing is parsed from here on
    assert all(load_strategy(path) is strategy for _ in range(60))


def test_a_changed_file_counts_from_the_next_run_on(draw: Any, strategy_file: Any) -> None:
    def write(window: Any) -> str:
        path: str = strategy_file(lambda *_: window, steps=2, layers=2, heads=2)
        os.utime(path, ns=(0, sum(side**i for i, side in enumerate(window))))
        return path

    q, k, v = draw(144, 2)
    config = {
        "mask_strategy_file_path": write((1, 1, 1)), "tile_size": [1, 2, 2], "skip_time_steps": 0
    }  # fmt: skip

    def call(step: int, layer: int) -> Any:
        with polyattn.forward_context(step=step, layer=layer):
            return polyattn.attention(q, k, v, backend="sta", config=config)

    with polyattn.forward_context(grid=(3, 6, 8), num_steps=2):
        small = call(0, 0)
        write((3, 3, 4))
        assert call(0, 1).equal(small)
        assert call(1, 0).equal(small)
    with polyattn.forward_context(grid=(3, 6, 8), num_steps=2):
        assert not call(0, 0).equal(small)


def test_runs_do_not_meet(draw: Any, strategy_file: Any, method: Any) -> None:
    """Two runs with strategies of their own, call by call in turn."""
    windows = [(1, 1, 1), (3, 1, 2)]
    paths = [
        strategy_file(lambda *_, window=window: window, 2, 1, 2, f"{number}.json")
        for number, window in enumerate(windows)
    ]
    q, k, v = draw(144, 2)
    runs: list[dict[Any, Any]] = [{}, {}]
    for step in range(2):
        for number, window in enumerate(windows):
            config = {"mask_strategy_file_path": paths[number], "tile_size": [1, 2, 2]}
            context = polyattn.context.ForwardContext(
                grid=(3, 6, 8), step=step, num_steps=2, layer=0, run_state=runs[number]
            )
            with polyattn.context.entered(context):
                out = polyattn.attention(
                    q, k, v, backend="sta", config={**config, "skip_time_steps": 0}
                )
            mask = method.mask((3, 6, 8), (1, 2, 2), [window] * 2)
            assert out.allclose(method.attend(q, k, v, mask)[0], rtol=0, atol=1e-9)


# --- candidates -----------------------------------------------------------------------------------


def test_default_candidates_are_those_published() -> None:
    """On the tile grid for which the authors give candidates, the same six."""
    published = {(3, 1, 10), (1, 5, 7), (3, 3, 3), (1, 6, 5), (1, 3, 10), (3, 6, 1)}
    assert set(default_candidates((3, 6, 10))) == published


def test_default_candidates_suit_any_grid() -> None:
    for tiles in [(t, h, w) for t in range(1, 7) for h in range(1, 9) for w in range(1, 11)]:
        found = default_candidates(tiles)
        assert len(set(found)) == len(found) <= 7
        assert bool(found) == (tiles != (1, 1, 1))
        for window in found:
            assert not is_full(window, tiles)
            assert tile_density(window, tiles) <= 0.2 or found == ((1, 1, 1),)
