"""Which processes share a sequence, and which part of it each of them holds.

Ranks are ordered ring first: rank ``r * u + i`` is number ``i`` of Ulysses group ``r``, and holds
shard ``r * u + i`` of the sequence, in order. So the shards of a Ulysses group are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from polyattn.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "DIMENSIONS",
    "Group",
    "SequenceGroups",
    "sequence_groups",
    "sequence_mesh",
    "shard_lengths",
]

DIMENSIONS = ("ring", "ulysses")


def shard_lengths(length: int, shards: int) -> tuple[int, ...]:
    """How ``length`` tokens are shared out, as ``torch.tensor_split`` does: the first shards get
    one token more where it does not come out even."""
    return tuple(length // shards + (index < length % shards) for index in range(shards))


def sequence_mesh(
    *, ulysses_degree: int | None = None, ring_degree: int = 1, device_type: str | None = None
) -> DeviceMesh:
    """All processes of the job as a mesh of ``ring_degree`` x ``ulysses_degree``.

    A missing ``ulysses_degree`` is what is left of the processes. To be called by every process.
    Raises :class:`~polyattn.errors.InputError` for degrees that do not make the number of
    processes, or before ``torch.distributed`` is initialized.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        raise InputError(
            "a mesh needs torch.distributed, which is not initialized",
            hint="torch.distributed.init_process_group(), in a script started with torchrun",
        )
    processes = dist.get_world_size()
    ulysses = processes // max(1, ring_degree) if ulysses_degree is None else ulysses_degree
    if min(ulysses, ring_degree) < 1 or ulysses * ring_degree != processes:
        raise InputError(
            f"ulysses_degree x ring_degree is the number of processes, {processes}; found "
            f"{ulysses} x {ring_degree}"
        )
    if device_type is None:
        with_gpus = torch.cuda.is_available() and dist.get_backend() != "gloo"
        device_type = "cuda" if with_gpus else "cpu"
    return init_device_mesh(device_type, (ring_degree, ulysses), mesh_dim_names=DIMENSIONS)


@dataclass(frozen=True)
class Group:
    """One dimension of the mesh, as one process sees it; a ``group`` of None is that process
    alone."""

    group: Any = None
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, group: Any) -> Group:
        return cls(group, dist.get_world_size(group), dist.get_rank(group))


@dataclass(frozen=True)
class SequenceGroups:
    """The processes that share one sequence."""

    ring: Group
    ulysses: Group

    @property
    def size(self) -> int:
        return self.ring.size * self.ulysses.size

    @property
    def index(self) -> int:
        """This process's place in the sequence."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    def own(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Of the shards' lengths, those of this process's Ulysses group."""
        start = self.ring.rank * self.ulysses.size
        return tuple(lengths[start : start + self.ulysses.size])

    def parts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens at each place of the ring."""
        size = self.ulysses.size
        return tuple(sum(lengths[i * size : (i + 1) * size]) for i in range(self.ring.size))


def sequence_groups(mesh: Any, *, ring: bool) -> SequenceGroups:
    """The groups of a mesh, of a process group, or (None) of the default group if there is one."""
    if mesh is None:
        if not (dist.is_available() and dist.is_initialized()):
            return SequenceGroups(Group(), Group())
        return SequenceGroups(Group(), Group.of(dist.group.WORLD))
    if isinstance(mesh, dist.ProcessGroup):
        return SequenceGroups(Group(), Group.of(mesh))
    names = getattr(mesh, "mesh_dim_names", None)
    sides = getattr(mesh, "ndim", None)
    if sides == 1 and names != ("ring",):
        return SequenceGroups(Group(), Group.of(mesh.get_group()))
    if sides == 1 and ring:
        return SequenceGroups(Group.of(mesh.get_group()), Group())
    if sides == 2 and names == DIMENSIONS:
        found = SequenceGroups(*(Group.of(mesh.get_group(name)) for name in DIMENSIONS))
        if found.ring.size > 1 and not ring:
            raise InputError(
                f"UlyssesAttention has no ring, and the mesh has one of {found.ring.size}",
                hint="polyattn.USPAttention(mesh=mesh)",
            )
        return found
    raise InputError(
        "mesh is a DeviceMesh with the dimensions ('ring', 'ulysses'), one of one dimension, a "
        f"process group, or None (the default group); found {mesh!r}",
        hint="polyattn.parallel.sequence_mesh(ulysses_degree=2)",
    )
