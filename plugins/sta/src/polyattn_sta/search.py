"""Search records: how far each candidate window was from full attention, call by call.

A run writes one file, ``mask_search_<run>.jsonl``, with a line for every searched call. A line is a
whole record and is written at once, so that the file is complete at any time: a run that is cut off
loses nothing but the line in progress, which a reader leaves out. Nothing here imports torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from polyattn.errors import ConfigError
from polyattn_sta.windows import Extent

__all__ = ["SearchRecord", "append_record", "read_records", "record_files"]

PATTERN = "mask_search_*.jsonl"

Errors = tuple[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], ...]


class SearchRecord(BaseModel):
    """One call of a search: one step, layer and guidance branch, some heads, all candidates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(1, ge=1, le=1)
    run: str
    step: int = Field(ge=0)
    num_steps: int | None
    layer: int = Field(ge=0)
    num_layers: int | None
    branch: str | None
    first_head: int = Field(ge=0)
    tile: Extent
    tiles: Extent
    candidates: tuple[Extent, ...] = Field(min_length=1)
    densities: tuple[float, ...]
    """Share of the pairs that each candidate attends to."""
    mean_squared_error: Errors
    """Of each candidate and head, over batch, video tokens and channels."""
    mean_absolute_error: Errors

    @model_validator(mode="after")
    def _errors_are_of_all(self) -> Self:
        heads = len(self.mean_squared_error[0]) if self.mean_squared_error else 0
        for errors in (self.mean_squared_error, self.mean_absolute_error):
            if not heads or [len(row) for row in errors] != [heads] * len(self.candidates):
                raise ValueError("errors are a list per candidate of a number per head")
        if len(self.densities) != len(self.candidates):
            raise ValueError("densities are a number per candidate")
        return self

    @property
    def heads(self) -> int:
        return len(self.mean_squared_error[0])

    @property
    def setting(self) -> tuple[object, ...]:
        """What records must share to be averaged."""
        return (self.num_steps, self.num_layers, self.tile, self.tiles, self.candidates)


def append_record(folder: str, record: SearchRecord) -> Path:
    """Add a record to the file of its run, which is returned.

    Raises:
        ConfigError: where the file cannot be written.
    """
    file = Path(folder).expanduser() / PATTERN.replace("*", record.run)
    line = record.model_dump_json().encode() + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            written = os.write(handle, line)
        finally:
            os.close(handle)
    except OSError as error:
        raise ConfigError(f"cannot write the search record {str(file)!r}: {error}") from None
    if written != len(line):
        raise ConfigError(f"cannot write the search record {str(file)!r}: the disk is full")
    return file


def record_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a search, in order of their names.

    Raises:
        ConfigError: for a folder that is not there, or holds none.
    """
    path = Path(folder).expanduser()
    files = sorted(path.glob(PATTERN)) if path.is_dir() else []
    if not files:
        raise ConfigError(
            f"{str(folder)!r} holds no search records ({PATTERN})"
            if path.is_dir()
            else f"{str(folder)!r} is no folder (looked in {Path.cwd()})",
            hint=f"sta_mode=STA_searching,search_output_path={folder}",
        )
    return files


def read_records(file: Path) -> list[SearchRecord]:
    """The records in a file, without a last line that is not finished.

    Raises:
        ConfigError: naming the line that is no record.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ConfigError(f"the search record {file} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(SearchRecord.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ConfigError(
                f"{file}, line {number} is no search record: {where or 'line'}: {problem['msg']}"
            ) from None
    return records
