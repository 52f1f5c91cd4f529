"""The processes that make one video together, as ``torchrun`` starts them.

Every process plans and denoises; the sequence is spread over all of them, and the first one
decodes and writes. A process that raises ends with its message, and ``torchrun`` then ends the
others; one that waits for a process that is gone or stuck gives up after ``POLYATTN_TIMEOUT``
seconds (600).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from polyattn.errors import GenerateError

__all__ = ["ALONE", "Processes", "processes_of", "together"]

TIMEOUT = "POLYATTN_TIMEOUT"
DEFAULT_TIMEOUT = 600.0


@dataclass(frozen=True)
class Processes:
    """How many there are, which one this is (on its machine: ``local_rank``), and the degrees."""

    count: int = 1
    rank: int = 0
    local_rank: int = 0
    ulysses_degree: int = 1
    ring_degree: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process decodes and writes the video."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.count} (Ulysses {self.ulysses_degree} x ring {self.ring_degree})"


ALONE = Processes()


def processes_of(
    ulysses_degree: int | None, ring_degree: int | None, environment: Mapping[str, str] = os.environ
) -> Processes:
    """The processes of this job; a degree that is not given is what is left of them.

    Raises :class:`~polyattn.errors.GenerateError` for degrees that do not make their number.
    """
    count, rank, local_rank = (
        _number(environment, name, default)
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    for option, given in (("--ulysses-degree", ulysses_degree), ("--ring-degree", ring_degree)):
        if given is not None and given < 1:
            raise GenerateError(f"{option} is at least 1, found {given}", hint=f"{option} 1")
    if ring_degree is None:
        ring_degree = max(1, count // (ulysses_degree or count))
    if ulysses_degree is None:
        ulysses_degree = max(1, count // ring_degree)
    product = ulysses_degree * ring_degree
    if product != count:
        wanted = max(product, 1)
        raise GenerateError(
            f"--ulysses-degree x --ring-degree is the number of processes; found {ulysses_degree} "
            f"x {ring_degree} and {count} process{'es' if count > 1 else ''}",
            hint=f"torchrun --nproc-per-node {wanted} -m polyattn generate ...",
        )
    return Processes(count, rank, local_rank, ulysses_degree, ring_degree)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdigit():
        raise GenerateError(
            f"the variable {name}, which torchrun sets, is a number; found {text!r}"
        )
    return int(text)


def timeout(environment: Mapping[str, str] = os.environ) -> timedelta:
    """How long a process waits for another one."""
    text = environment.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise GenerateError(f"{TIMEOUT} is a number of seconds, found {text!r}")
    return timedelta(seconds=seconds)


@contextlib.contextmanager
def together(processes: Processes, device: str) -> Iterator[Any]:
    """The mesh of the processes, for the time of the block; None for one process."""
    if processes.count == 1:
        yield None
        return
    import torch
    import torch.distributed as dist

    from polyattn.parallel import sequence_mesh

    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        dist.get_default_backend_for_device(place.type),
        timeout=timeout(),
        device_id=place if place.type == "cuda" else None,
    )
    yield sequence_mesh(
        ulysses_degree=processes.ulysses_degree,
        ring_degree=processes.ring_degree,
        device_type=place.type,
    )
    # Not after an error: it would wait for the others, and this process is about to end.
    dist.destroy_process_group()
