"""From the records of a search to a strategy: for each step, layer and head the best candidate.

Errors are averaged over all records of a (step, layer, head), that is over prompts, and over
guidance branches where both are wanted; the candidate of least mean squared error wins, the earlier
one among equals. The first steps and layers get the full window.

A file that tuning has not written itself, or that was changed since, is not replaced unless told
so. Tuning knows its own by ``<file>.sha256`` beside them, in the form of ``sha256sum``: other
readers of a strategy would stumble over a mark within it. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyattn.errors import ConfigError
from polyattn_sta.search import SearchRecord, read_records, record_files
from polyattn_sta.strategy import (
    Strategy,
    file_state,
    save_strategy,
    strategy_text,
    write_whole,
)
from polyattn_sta.windows import Extent, words

__all__ = ["Tuned", "tune"]

Place = tuple[int, int, int]


@dataclass(frozen=True)
class Tuned:
    """A strategy that was made, and what is known of it."""

    path: Path
    strategy: Strategy
    runs: int
    """Runs whose records it rests on."""
    full_steps: int
    """First steps, with the full window."""
    density: float
    """Mean share of the pairs that is attended to, over all steps, layers and heads."""
    mean_squared_error: float
    """Mean over the steps that are not full; 0 if all are."""


def tune(
    search_output_path: str | os.PathLike[str],
    mask_strategy_file_path: str | os.PathLike[str] | None = None,
    *,
    skip_time_steps: int | float = 15,
    dense_layers: int | float = 0,
    both_branches: bool = False,
    max_density: float | None = None,
    tile_size: Sequence[int] | None = None,
    tile_grid: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Tuned:
    """Choose windows from the records in a folder, and write the strategy.

    Args:
        search_output_path: the folder a search wrote to.
        mask_strategy_file_path: the file to write; in that folder by default, named after
            ``skip_time_steps``.
        skip_time_steps: first steps that get the full window, a count or a share.
        dense_layers: first layers that do, a count or a share; a search with ``dense_layers`` has
            no records of them.
        both_branches: average over both guidance branches, and not the prompt's alone. Records of
            calls that held both branches in one batch count either way.
        max_density: leave out candidates that attend to a larger share of the pairs.
        tile_size: tokens of a tile, (T, H, W), that the search has to have been made with.
        tile_grid: number of tiles, (T, H, W), likewise.
        overwrite: replace a file that tuning did not write itself.

    The same records and arguments are tuned once, as long as the written file stays as it is.

    Raises:
        ConfigError: for records that are missing, damaged, of different searches or of other
            tiles; it names the first step, layer and head without one. For arguments that cannot
            be. For a file that is not tuning's own.
    """
    _check_arguments(
        search_output_path, mask_strategy_file_path, skip_time_steps, dense_layers, max_density
    )
    folder = Path(search_output_path).expanduser()
    files = record_files(search_output_path)
    target = (
        folder / f"mask_strategy_s{skip_time_steps}.json"
        if mask_strategy_file_path is None
        else Path(mask_strategy_file_path).expanduser()
    )
    states = tuple((file, file_state(file)) for file in files)
    tiles = tuple(None if each is None else tuple(each) for each in (tile_size, tile_grid))
    arguments = (
        states, target.absolute(), skip_time_steps, dense_layers, both_branches, max_density,
        tiles, overwrite,
    )  # fmt: skip
    tuned, written = _tune(*arguments)
    if file_state(tuned.path) != written:  # removed, or written over
        _tune.cache_clear()
        tuned, _ = _tune(*arguments)
    return tuned


State = tuple[int, int] | None


def _check_arguments(
    folder: Any, target: Any, skip_time_steps: Any, dense_layers: Any, max_density: Any
) -> None:
    paths = {"search_output_path": folder}
    if target is not None:
        paths["mask_strategy_file_path"] = target
    for name, value in paths.items():
        if not isinstance(value, (str, os.PathLike)):
            raise ConfigError(f"{name} is a path, found {value!r}")
    for name, value in (("skip_time_steps", skip_time_steps), ("dense_layers", dense_layers)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not value >= 0 or (isinstance(value, float) and value > 1):
            raise ConfigError(
                f"{name} is a count of at least 0 (an integer), or a share from 0.0 to 1.0; found "
                f"{value!r}"
            )
    number = isinstance(max_density, (int, float)) and not isinstance(max_density, bool)
    if max_density is not None and not (number and 0 < max_density <= 1):
        raise ConfigError(f"max_density is a share above 0, to 1; found {max_density!r}")


# Typed, for a count of 1 is not a share of 1.0.
@lru_cache(maxsize=8, typed=True)
def _tune(
    states: tuple[tuple[Path, State], ...],
    target: Path,
    skip_time_steps: int | float,
    dense_layers: int | float,
    both_branches: bool,
    max_density: float | None,
    wanted_tiles: tuple[tuple[int, ...] | None, ...],
    overwrite: bool,
) -> tuple[Tuned, State]:
    """The result, and the state of the written file."""
    files = [file for file, _ in states]
    records = _of_branches(_of_one_search(files), both_branches, files[0].parent)
    first = records[0]
    _check_tiles(first, wanted_tiles, files[0].parent)
    steps = first.num_steps or 1 + max(record.step for record in records)
    layers = first.num_layers or 1 + max(record.layer for record in records)
    heads = max(record.first_head + record.heads for record in records)
    full, full_layers = _count(skip_time_steps, steps), _count(dense_layers, layers)
    allowed = _allowed(first, max_density)
    errors = _mean_errors(records)
    windows: dict[Place, Extent] = {}
    densities, squares = [], []
    for step in range(steps):
        for layer in range(layers):
            for head in range(heads):
                place = (step, layer, head)
                if step < full or layer < full_layers:
                    windows[place] = first.tiles
                    densities.append(1.0)
                    continue
                if place not in errors:
                    raise ConfigError(
                        f"the search in {files[0].parent} has no record of step {step}, layer "
                        f"{layer}, head {head}; it has to cover all of {steps} steps, {layers} "
                        f"layers and {heads} heads but the first {full} steps and {full_layers} "
                        "layers",
                        hint="the skip_time_steps and dense_layers of the search"
                        if (step, layer) == (full, full_layers)
                        else None,
                    )
                best = min(allowed, key=lambda number: errors[place][number])
                windows[place] = first.candidates[best]
                densities.append(first.densities[best])
                squares.append(errors[place][best])
    strategy = _save(target, windows, overwrite)
    runs = len({record.run for record in records})
    tuned = Tuned(target, strategy, runs, full, _mean(densities), _mean(squares))
    return tuned, file_state(target)


def _of_one_search(files: Sequence[Path]) -> list[tuple[SearchRecord, Path]]:
    """Every record with its file, all of one setting."""
    found = [(record, file) for file in files for record in read_records(file)]
    if not found:
        raise ConfigError(f"the search in {files[0].parent} has no finished record")
    first, first_file = found[0]
    for record, file in found:
        if record.setting != first.setting:
            raise ConfigError(
                f"{file.name} and {first_file.name} are of different searches: "
                f"{_setting_words(record)} and {_setting_words(first)}",
                hint="a folder of its own for each model, resolution and number of steps",
            )
    return found


def _setting_words(record: SearchRecord) -> str:
    candidates = " ".join(map(words, record.candidates))
    return (
        f"{record.num_steps} steps, {record.num_layers} layers, {words(record.tiles)} tiles of "
        f"{words(record.tile)}, candidates {candidates}"
    )


def _of_branches(
    found: Iterable[tuple[SearchRecord, Path]], both: bool, folder: Path
) -> list[SearchRecord]:
    records = [record for record, _ in found]
    branches = {record.branch for record in records}
    if both:
        if branches == {"cond"} or branches == {"uncond"}:
            raise ConfigError(
                f"STA_tuning_cfg needs records of both guidance branches; those in {folder} are "
                f"all of {branches.pop()!r}",
                hint="sta_mode=STA_tuning, or a search with guidance",
            )
        return records
    chosen = [record for record in records if record.branch in ("cond", None)]
    if not chosen:
        raise ConfigError(
            f"STA_tuning needs records of the branch 'cond'; those in {folder} are of "
            f"{', '.join(map(repr, sorted(map(str, branches))))}",
            hint="with polyattn.forward_context(branch='cond'): ... around the search",
        )
    return chosen


def _check_tiles(
    record: SearchRecord, wanted: tuple[tuple[int, ...] | None, ...], folder: Path
) -> None:
    """A window is a number of tiles: on other tiles it means something else."""
    tile, tiles = (
        each if each is not None else found
        for each, found in zip(wanted, (record.tile, record.tiles), strict=True)
    )
    if (tile, tiles) != (record.tile, record.tiles):
        raise ConfigError(
            f"the search in {folder} was made on {words(record.tiles)} tiles of "
            f"{words(record.tile)} tokens, and this is {words(tiles)} tiles of {words(tile)}: its "
            "windows would mean something else",
            hint=f"tile_size=[{','.join(map(str, record.tile))}]"
            if tile != record.tile
            else "the search's own width, height and number of frames, or a search with these",
        )


def _count(wanted: int | float, total: int) -> int:
    """How many steps or layers a count or a share is (rounded down, as core does)."""
    return math.floor(wanted * total) if isinstance(wanted, float) else min(wanted, total)


def _save(target: Path, windows: Mapping[Place, Extent], overwrite: bool) -> Strategy:
    """Write the strategy, and beside it what tells that it is tuning's own."""
    digest_file = target.with_name(f"{target.name}.sha256")
    if not overwrite:
        _refuse_what_is_not_ours(target, digest_file, strategy_text(windows).encode())
    strategy = save_strategy(target, windows)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    # In this order two processes that tune alike, as ranks do, do not refuse each other's file.
    write_whole(digest_file, f"{digest}  {target.name}\n")
    return strategy


def _refuse_what_is_not_ours(target: Path, digest_file: Path, text: bytes) -> None:
    present = digest = None
    with contextlib.suppress(OSError, ValueError):
        present = target.read_bytes()
    with contextlib.suppress(OSError, ValueError):
        digest = digest_file.read_text().split()[0]
    if present in (None, text) or hashlib.sha256(present or b"").hexdigest() == digest:
        return
    raise ConfigError(
        f"tuning would write {target}, which is there already, and which tuning did not write or "
        "which was changed since; it is left as it is",
        hint="another mask_strategy_file_path; sta_mode=STA_inference, to use the file as it is; "
        "or python -m polyattn_sta tune ... --overwrite",
    )


def _allowed(record: SearchRecord, max_density: float | None) -> list[int]:
    """Numbers of the candidates that are not too dense."""
    if max_density is None:
        return list(range(len(record.candidates)))
    allowed = [number for number, density in enumerate(record.densities) if density <= max_density]
    if not allowed:
        raise ConfigError(
            f"max_density={max_density} leaves no candidate: they attend to "
            f"{min(record.densities):.3g} of the pairs and more"
        )
    return allowed


def _mean_errors(records: Iterable[SearchRecord]) -> dict[Place, list[float]]:
    """Mean squared error of each candidate, by (step, layer, head)."""
    sums: dict[Place, list[float]] = {}
    counts: dict[Place, int] = {}
    for record in records:
        for head, errors in enumerate(zip(*record.mean_squared_error, strict=True)):
            place = (record.step, record.layer, record.first_head + head)
            known = sums.get(place)
            sums[place] = (
                list(errors)
                if known is None
                else [left + right for left, right in zip(known, errors, strict=True)]
            )
            counts[place] = counts.get(place, 0) + 1
    return {place: [each / counts[place] for each in total] for place, total in sums.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
