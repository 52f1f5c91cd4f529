"""Mask strategies: a window for every step, layer and head, in a JSON file.

The file is one object, ``{"step_layer_head": [t, h, w], ...}``, all numbers from 0 and windows in
tiles. It is dense over steps x layers x heads, and it is right for one model, one resolution and
one number of steps: whatever can be told of these from the file and the run is held against it.
Files are read once for as long as they stay the same. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyattn.errors import ConfigError
from polyattn_sta.windows import Extent, exceeds, words

__all__ = [
    "Strategy",
    "file_state",
    "load_strategy",
    "save_strategy",
    "strategy_text",
    "write_whole",
]

KEY = re.compile(r"(0|[1-9][0-9]{0,8})(_(0|[1-9][0-9]{0,8})){2}")
FORM = '{"step_layer_head": [t, h, w]}, e.g. {"0_0_0": [3, 3, 3]}'


@dataclass(frozen=True, eq=False)
class Strategy:
    """A window for every step, layer and head. Compared, and cached on, by identity."""

    source: str
    """Where it comes from, for messages."""
    steps: int
    layers: int
    heads: int
    windows: tuple[Extent, ...]
    """The distinct windows, in tiles along (T, H, W)."""
    first_keys: tuple[str, ...]
    """The first ``step_layer_head`` of each window, for messages."""
    choices: tuple[int, ...]
    """The number of a window for each (step, layer, head), head fastest."""

    def of_heads(self, step: int, layer: int) -> tuple[int, ...]:
        """Numbers of the windows of all heads."""
        start = (step * self.layers + layer) * self.heads
        return self.choices[start : start + self.heads]

    def window(self, step: int, layer: int, head: int) -> Extent:
        """The window [t, h, w] of one head."""
        return self.windows[self.of_heads(step, layer)[head]]

    def step_for(self, step: int, num_steps: int | None) -> int:
        """The strategy's step at the same fraction of the schedule.

        Raises:
            ConfigError: for a step beyond the strategy in a run of unknown length.
        """
        if num_steps is not None:
            return step * self.steps // num_steps
        if step >= self.steps:
            raise ConfigError(
                f"{self.source} has windows for {self.steps} steps, and this is step {step} of a "
                "run of unknown length",
                hint=f"with polyattn.forward_context(step={step}, num_steps=n): ...",
            )
        return step

    def check_layers(self, layer: int, num_layers: int | None) -> None:
        """ConfigError unless the strategy is for a model of this many layers."""
        if layer >= self.layers or num_layers not in (None, self.layers):
            found = f"layer {layer}" if num_layers is None else f"{num_layers} layers"
            raise ConfigError(
                f"{self.source} is for a model of {self.layers} layers, and this one has {found}"
            )

    def check_heads(self, heads: int, first_head: int | None) -> None:
        """ConfigError unless a call with these heads can be told which ones they are."""
        if first_head is None and heads != self.heads:
            raise ConfigError(
                f"{self.source} is for {self.heads} heads, and the call has {heads}; a call with "
                "some of the model's heads says which one is its first",
                hint="polyattn.forward_context(first_head=...)" if heads < self.heads else None,
            )
        if first_head is not None and first_head + heads > self.heads:
            raise ConfigError(
                f"{self.source} is for {self.heads} heads, and the call has heads {first_head} to "
                f"{first_head + heads - 1} (first_head={first_head})"
            )

    def check_tiles(self, tiles: Extent, tile: Extent) -> None:
        """ConfigError for the first window that exceeds the tile grid."""
        for window, key in zip(self.windows, self.first_keys, strict=True):
            if exceeds(window, tiles):
                raise ConfigError(
                    f"{self.source}: the window {list(window)} of {key!r} exceeds the grid of "
                    f"{words(tiles)} tiles of {words(tile)} tokens; it was made for another "
                    "resolution or tile_size"
                )


def load_strategy(path: str | os.PathLike[str]) -> Strategy:
    """The strategy in a file; the same object again while the file stays the same.

    Raises:
        ConfigError: for a file that cannot be read, is not JSON, or is no strategy; it names the
            first entry that is missing or wrong.
    """
    file = Path(path).expanduser()
    state = file_state(file)
    if state is None:
        raise ConfigError(
            f"the mask strategy {str(path)!r} does not exist (looked in {Path.cwd()})",
            hint="mask_strategy_file_path=FILE, or window_size=[3,3,3] to begin without one",
        )
    return _read(str(file.absolute()), state)


def file_state(file: Path) -> tuple[int, int] | None:
    """When a file was last written, and its size: equal while it stays the same. None: no file."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=8)
def _read(path: str, state: tuple[int, int]) -> Strategy:
    source = f"the mask strategy {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        entries = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; expected {FORM}") from None
    except (OSError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ConfigError(f"{source} cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{source} holds a {type(entries).__name__}; expected {FORM}")
    strategy = _strategy(entries, source)
    # Neither keys nor windows hold a colon: one more than entries is one that replaced another.
    if text.count(":") != len(entries):
        json.loads(text, object_pairs_hook=lambda pairs: _refuse_twice(pairs, source))
    return strategy


def _refuse_twice(pairs: list[tuple[str, Any]], source: str) -> None:
    key, count = Counter(key for key, _ in pairs).most_common(1)[0]
    raise ConfigError(f"{source} gives step, layer, head {key!r} {count} times")


def _strategy(entries: Mapping[str, Any], source: str) -> Strategy:
    """Entries in any order, put in order and held against what a strategy is."""
    if not entries:
        raise ConfigError(f"{source} is empty; expected {FORM}")
    numbers: dict[str, int] = {}  # of the distinct windows, by their text
    windows: list[Extent] = []
    chosen: dict[str, int] = {}
    for key, value in entries.items():
        if KEY.fullmatch(key) is None:
            raise ConfigError(f"{source}: the key {key!r} is not of the form step_layer_head")
        text = repr(value)  # a list and the text of one differ in it
        if text not in numbers:
            numbers[text] = len(windows)
            windows.append(_window(value, key, source))
        chosen[key] = numbers[text]
    # Each part is one of few texts; only those are made numbers.
    parts = "_".join(entries).split("_")
    steps, layers, heads = (1 + max(map(int, set(parts[part::3]))) for part in range(3))
    if len(entries) != steps * layers * heads:
        missing = next(key for key in _keys(steps, layers, heads) if key not in entries)
        raise ConfigError(
            f"{source} has {len(entries)} entries for {steps} steps, {layers} layers and {heads} "
            f"heads, which make {steps * layers * heads}; the first that is missing is {missing!r}"
        )
    choices = tuple([chosen[key] for key in _keys(steps, layers, heads)])
    first_keys = tuple(
        f"{at // heads // layers}_{at // heads % layers}_{at % heads}"
        for at in map(choices.index, range(len(windows)))
    )
    return Strategy(source, steps, layers, heads, tuple(windows), first_keys, choices)


def _window(value: Any, key: str, source: str) -> Extent:
    if type(value) is not list or [type(side) for side in value] != [int] * 3 or min(value) < 1:
        raise ConfigError(
            f"{source}: the window of {key!r} is three tile counts of at least 1, found "
            f"{json.dumps(value)[:80]}"
        )
    return value[0], value[1], value[2]


def _keys(steps: int, layers: int, heads: int) -> Iterable[str]:
    """Every step_layer_head of a box, in order."""
    return (
        f"{step}_{layer}_{head}"
        for step in range(steps)
        for layer in range(layers)
        for head in range(heads)
    )


def save_strategy(
    path: str | os.PathLike[str], windows: Mapping[tuple[int, int, int], Sequence[int]]
) -> Strategy:
    """Write windows by (step, layer, head) as a strategy, wholly or not at all, and read it back.

    Raises:
        ConfigError: for windows that make no strategy, or a path that cannot be written.
    """
    file = Path(path).expanduser()
    text = strategy_text(windows)
    _strategy(json.loads(text), f"the mask strategy {file}")
    write_whole(file, text)
    return load_strategy(file)


def strategy_text(windows: Mapping[tuple[int, int, int], Sequence[int]]) -> str:
    """What a file with these windows holds."""
    entries = {"_".join(map(str, place)): list(window) for place, window in windows.items()}
    return json.dumps(entries, indent=1)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that nobody ever reads half of it."""
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}.draft")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ConfigError(f"cannot write {str(file)!r}: {error}") from None
