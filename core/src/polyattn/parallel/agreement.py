"""What the processes of a job have to agree on before tensors travel, and how a disagreement ends.

Values are exchanged between CPUs: a rank that has failed says so here, and the others raise instead
of waiting for it. Two things are exchanged: in every call a few numbers
(:func:`exchange_headers`); and once for every new kind of call, what each rank would run and on
what (:func:`agree`), so that no rank runs another backend than the rest.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polyattn.discovery import registry
from polyattn.environment import Environment
from polyattn.errors import ParallelError
from polyattn.parallel.collectives import watched
from polyattn.parallel.mesh import SequenceGroups

__all__ = ["agree", "environment_facts", "exchange_headers", "fingerprint"]

TIMEOUT = timedelta(minutes=10)  # where the group itself tells none


@functools.lru_cache(maxsize=64)
def _between_cpus(group: Any) -> Any:
    """The group itself where it works on a CPU, or one of the same ranks that does."""
    if dist.get_backend(group) == "gloo":
        return group
    try:
        timeout = group._get_backend(torch.device("cuda")).options._timeout
    except (AttributeError, RuntimeError):
        timeout = TIMEOUT
    return dist.new_group(
        dist.get_process_group_ranks(group),
        backend="gloo",
        timeout=timeout,
        use_local_synchronization=True,
    )


def exchange_headers(groups: SequenceGroups, header: Sequence[int]) -> list[list[int]]:
    """Every rank's few integers, in the order of the sequence."""
    rows = torch.tensor([list(header)], dtype=torch.int64)
    for group in (groups.ulysses, groups.ring):
        if group.size > 1:
            found = [torch.empty_like(rows) for _ in range(group.size)]
            with watched("agreeing on the shards", group):
                dist.all_gather(found, rows, group=_between_cpus(group.group))
            rows = torch.cat(found)
    found_rows: list[list[int]] = rows.tolist()
    return found_rows


def fingerprint(value: Any) -> int:
    """A number that is equal on all ranks for equal values; ``value`` prints the same there."""
    return zlib.crc32(repr(value).encode())


def agree(groups: SequenceGroups, decide: Callable[[], dict[str, str]]) -> None:
    """Hold what ``decide`` says on this rank against the others; all return, or all raise.

    A rank on which ``decide`` raises raises that; the others say which rank it was and why.
    """
    error: Exception | None = None
    try:
        found: dict[str, str] = decide()
    except Exception as problem:
        error, found = problem, {"error": f"{type(problem).__name__}: {problem}"}
    all_found = _gathered(groups, found)
    if error is not None:
        raise error
    own = groups.index
    for index, other in enumerate(all_found):
        if "error" in other:
            raise ParallelError(f"rank {index} of {groups.size} cannot take part: {other['error']}")
    for index, other in enumerate(all_found):
        different = [name for name in found if other.get(name) != found[name]]
        if different:
            words = "; ".join(
                f"{name}: {found[name]} here (shard {own}), {other.get(name, 'nothing')} for shard "
                f"{index}"
                for name in different
            )
            raise ParallelError(
                f"the processes of the job would not run the same attention: {words}",
                hint="the same installation and the same settings on every machine; polyattn "
                "doctor shows them",
            )


def _gathered(groups: SequenceGroups, value: Any) -> list[Any]:
    values = [value]
    for group in (groups.ulysses, groups.ring):
        if group.size > 1:
            found: list[Any] = [None] * group.size
            with watched("agreeing on a backend", group):
                dist.all_gather_object(found, values, group=_between_cpus(group.group))
            values = [each for part in found for each in part]
    return values


def environment_facts(environment: Environment) -> dict[str, str]:
    """What has to be the same on every rank: device, torch, and what backends are made of."""
    accelerator = environment.accelerator
    relevant = {"torch", "triton", "polyattn"}
    for each in registry().backends.values():
        relevant |= {each.distribution, *(need.distribution for need in each.spec.requirements)}
    versions = [
        f"{name} {environment.distributions[name]}"
        for name in sorted(relevant)
        if name in environment.distributions
    ]
    return {
        "device": f"{accelerator.platform} {accelerator.arch or ''}".strip(),
        "torch": f"{environment.torch}, CUDA {environment.cuda}, HIP {environment.hip}",
        "installed": ", ".join(versions),
    }
