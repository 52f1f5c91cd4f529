"""From the records of a search to a strategy: for each step, layer and head the best candidate.

Errors are averaged over all records of a (step, layer, head), that is over prompts, and over
guidance branches where both are wanted; the candidate of least mean squared error wins, the earlier
one among equals. The first steps get the full window. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from polyattn.errors import ConfigError
from polyattn_sta.search import SearchRecord, read_records, record_files
from polyattn_sta.strategy import Strategy, file_state, save_strategy
from polyattn_sta.windows import Extent, words

__all__ = ["Tuned", "full_steps", "tune"]

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
    both_branches: bool = False,
    max_density: float | None = None,
) -> Tuned:
    """Choose windows from the records in a folder, and write the strategy.

    Args:
        search_output_path: the folder a search wrote to.
        mask_strategy_file_path: the file to write; in that folder by default, named after
            ``skip_time_steps``.
        skip_time_steps: first steps that get the full window, a count or a share.
        both_branches: average over both guidance branches, and not the prompt's alone. Records of
            calls that held both branches in one batch count either way.
        max_density: leave out candidates that attend to a larger share of the pairs.

    The same records and arguments are tuned once, as long as the written file stays as it is.

    Raises:
        ConfigError: for records that are missing, damaged, or of different searches; it names the
            first step, layer and head without one.
    """
    folder = Path(search_output_path).expanduser()
    files = record_files(search_output_path)
    target = (
        folder / f"mask_strategy_s{skip_time_steps}.json"
        if mask_strategy_file_path is None
        else Path(mask_strategy_file_path).expanduser()
    )
    states = tuple((file, file_state(file)) for file in files)
    arguments = (states, target.absolute(), skip_time_steps, both_branches, max_density)
    tuned, written = _tune(*arguments)
    if file_state(tuned.path) != written:  # removed, or written over
        _tune.cache_clear()
        tuned, _ = _tune(*arguments)
    return tuned


State = tuple[int, int] | None


@lru_cache(maxsize=8)
def _tune(
    states: tuple[tuple[Path, State], ...],
    target: Path,
    skip_time_steps: int | float,
    both_branches: bool,
    max_density: float | None,
) -> tuple[Tuned, State]:
    """The result, and the state of the written file."""
    files = [file for file, _ in states]
    records = _of_branches(_of_one_search(files), both_branches, files[0].parent)
    first = records[0]
    steps = first.num_steps or 1 + max(record.step for record in records)
    layers = first.num_layers or 1 + max(record.layer for record in records)
    heads = max(record.first_head + record.heads for record in records)
    full = full_steps(skip_time_steps, steps)
    allowed = _allowed(first, max_density)
    errors = _mean_errors(records)
    windows: dict[Place, Extent] = {}
    densities, squares = [], []
    for step in range(steps):
        for layer in range(layers):
            for head in range(heads):
                place = (step, layer, head)
                if step < full:
                    windows[place] = first.tiles
                    densities.append(1.0)
                    continue
                if place not in errors:
                    raise ConfigError(
                        f"the search in {files[0].parent} has no record of step {step}, layer "
                        f"{layer}, head {head}; it has to cover all of {steps} steps, {layers} "
                        f"layers and {heads} heads but the first {full} steps"
                    )
                best = min(allowed, key=lambda number: errors[place][number])
                windows[place] = first.candidates[best]
                densities.append(first.densities[best])
                squares.append(errors[place][best])
    strategy = save_strategy(target, windows)
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


def full_steps(skip_time_steps: int | float, steps: int) -> int:
    """How many steps a count or a share is (rounded down, as core takes ``dense_steps``)."""
    if isinstance(skip_time_steps, float):
        if not 0 <= skip_time_steps <= 1:
            raise ConfigError(f"a share of the steps is from 0 to 1, found {skip_time_steps}")
        return math.floor(skip_time_steps * steps)
    if skip_time_steps < 0:
        raise ConfigError(f"skip_time_steps is at least 0, found {skip_time_steps}")
    return min(skip_time_steps, steps)


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
