"""How much of a ring's rotations is hidden behind the attention it computes meanwhile.

    torchrun --nproc-per-node 2 bench/ring_overlap.py

On two GPUs: a call of the ring as it is, without the head start that lets the move's kernel in
before attention takes every multiprocessor, and without any communication (wrong numbers, for the
time only), in turns; and one part of the attention alone. The longest of the ranks' times, median.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, save, table

import polyattn
from polyattn.parallel import collectives, ring, sequence_mesh, shard_lengths
from polyattn.parallel.collectives import Rotation

SIZES = ((75_600, 12), (75_600, 40))
BACKENDS = ("fa", "torch_sdpa")
TURNS, REPEATS = 2, 5


class Nowhere:
    """A rotation that moves nothing."""

    def __init__(self, block: torch.Tensor, shape: Any, group: Any) -> None:
        self.block = block.new_empty(tuple(shape))

    def arrived(self) -> torch.Tensor:
        return self.block


def milliseconds(call: Callable[[], Any]) -> float:
    """The second of two calls, so that Python's part of it is hidden as in a model."""
    times = []
    for _ in range(REPEATS + 2):
        dist.barrier()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    longest = torch.tensor(statistics.median(times[2:]), device="cuda")
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def call_ring(layer: Any, own: Any, rotation: Any, cycles: int) -> None:
    ring.Rotation, collectives.HEAD_START = rotation, cycles
    with torch.no_grad():
        layer(*own)


def main() -> None:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    mesh = sequence_mesh(ring_degree=2)
    head_start, rows = collectives.HEAD_START, []
    for tokens, heads in SIZES:
        lengths = shard_lengths(tokens, 2)
        shape = (1, lengths[rank], heads, 128)
        own = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        for backend in BACKENDS:
            layer = polyattn.USPAttention(backend, mesh=mesh)

            around = partial(call_ring, layer, own)
            calls: dict[str, Callable[[], Any]] = {
                "ring": partial(around, Rotation, head_start),
                "no head start": partial(around, Rotation, 0),
                "no communication": partial(around, Nowhere, 0),
                "one part": partial(polyattn.attention, *own, backend=backend),
            }
            found: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(TURNS):
                for name, call in calls.items():
                    found[name].append(milliseconds(call))
            told = (" ".join(f"{ms:.2f}" for ms in found[name]) for name in calls)
            rows.append([f"{tokens:,} tokens, {heads} heads", backend, *told])
    if rank == 0:
        headings = ["size", "backend", "ring", "no head start", "no communication", "one part"]
        note = "bf16, D=128, two GPUs; every figure once a turn, ms.\n\n"
        save(RESULTS, "ring_overlap", "What a ring's rotations cost beside attention",
             "torchrun --nproc-per-node 2 bench/ring_overlap.py", note + table(headings, rows),
             rows, machine() | {"gpus": 2})  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
