"""Attention and a denoising step on several GPUs against one: speed-up, and what it is lost to.

On every GPU of a host, one process each. First the parallel layers are held against one process.
Then, at video lengths: a call of attention on one GPU and on all of them (Ulysses,
a ring), with the pieces of each call alone: all-to-all, rotation, attention
without communication; and a whole forward of `WanTransformer3DModel` as published for Wan 2.1 1.3B
with random weights, spread by `polyattn.apply(model, mesh=...)` and by diffusers' own context
parallelism. A time is the longest of the ranks', the median of several rounds.

    torchrun --nproc-per-node 2 bench/sequence_parallel.py [--output FOLDER] [--seconds 240]
    torchrun --nproc-per-node 2 bench/sequence_parallel.py --tiny   # on the CPU: shows that it runs

What fails is reported and passed over on all ranks. Where one rank alone fails in the middle of
communicating, the job ends with what it has; after every piece that is in
sequence_parallel.partial.json, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

# Multicast over NVLink is left off: shared hosts do not always bear it, and all-to-all and
# point-to-point, which is all that is timed here, do not use it. To be set before NCCL is loaded.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from common import RESULTS, machine, save, table
from sparse_wan_steps import Case, Forwards, build, describe, passed_by, twin_of

import polyattn
from polyattn.parallel import sequence_mesh, shard_lengths
from polyattn.parallel.agreement import exchange_headers
from polyattn.parallel.collectives import Layout, Rotation, head_shares, to_heads, to_sequence
from polyattn.parallel.mesh import sequence_groups
from polyattn.parallel.ring import _merged
from polyattn.reporting import Report, reporting_to

TARGET, TARGET_TOKENS = 1.85, 75600
TOLERANCE = 5e-3  # relative, of a check
COLLECTIVE = timedelta(seconds=90)  # longest wait of a collective
STATUS = timedelta(seconds=200)  # of the ranks for each other, between two pieces: longer than that
LEAST_SECONDS = 8  # no piece is begun with less than this left

Tensors = tuple[torch.Tensor, ...]


class StoppedError(Exception):
    """A rank failed while others communicate: nothing can be sent any more."""


@dataclass
class Job:
    """This process among the others: its device, its clock, and what all of them decide."""

    tiny: bool
    deadline: float
    folder: Path
    rank: int = 0
    ranks: int = 1
    status: Any = None  # a group of its own between CPUs, so that waiting never meets a tensor
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, tiny: bool, seconds: float, folder: Path) -> Job:
        job = cls(tiny, time.monotonic() + seconds, folder)
        if not tiny:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("gloo" if tiny else "nccl", timeout=COLLECTIVE)
        job.rank, job.ranks = dist.get_rank(), dist.get_world_size()
        job.status = dist.new_group(backend="gloo", timeout=STATUS)
        job.data = {"ranks": job.ranks, "failed": []}
        return job

    @property
    def make(self) -> dict[str, Any]:
        return {
            "device": "cpu" if self.tiny else "cuda",
            "dtype": torch.float32 if self.tiny else torch.bfloat16,
        }

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, in order. Waits for all of them."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.status)
        return found

    def told(self, value: Any) -> Any:
        """What rank 0 says."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.status)
        return values[0]

    def time_left(self, seconds: float = LEAST_SECONDS) -> bool:
        return bool(self.told(self.deadline - time.monotonic() > seconds))

    def say(self, words: str) -> None:
        if self.rank == 0:
            print(words, flush=True)

    def keep(self) -> None:
        if self.rank == 0:
            path = self.folder / "sequence_parallel.partial.json"
            path.write_text(json.dumps(self.data, indent=1, default=float))

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def attempt(self, what: str, function: Callable[[], Any], *, together: bool = True) -> Any:
        """The function's value on every rank, or None on every rank, and why, in the report.

        ``together``: it communicates, so that a rank that fails alone leaves the others waiting.
        That is asked between CPUs before anybody waits for its GPU.
        """
        if not self.time_left():
            self.data["failed"].append({"what": what, "why": "no time left"})
            return None
        value, error = None, None
        try:
            value = function()
        except Exception as problem:
            error = describe(problem)
        errors = self.everyone(error)
        if any(errors):
            said = "; ".join(f"rank {i}: {each}" for i, each in enumerate(errors) if each)
            if len(set(errors)) == 1:
                said = str(error)
            self.data["failed"].append({"what": what, "why": said})
            self.say(f"{what}: {said}")
            kinds = {(each or "nothing").partition(":")[0] for each in errors}
            if together and len(kinds) > 1:
                raise StoppedError(f"{what}: {said}")
            return None
        self.wait()
        return value

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Of the second of two calls, as everywhere here (`common.gpu_milliseconds`)."""
        function()
        if self.tiny:
            begun = time.perf_counter()
            function()
            return (time.perf_counter() - begun) * 1000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def turns(self, variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Median over the rounds of the longest time of the ranks, for each variant.

        Every rank takes the variants in the same order, another one every round.
        """
        times: dict[str, list[float]] = {name: [] for name in variants}
        order = random.Random(0)
        begun = time.monotonic()
        for turn in range(repeats):
            if turn and not self.time_left((time.monotonic() - begun) / turn):
                break
            for name in order.sample(list(variants), len(variants)):
                dist.barrier(group=self.status)
                times[name].append(self.milliseconds(variants[name]))
        everyones = self.everyone(times)
        return {
            name: statistics.median(map(max, zip(*(each[name] for each in everyones), strict=True)))
            for name in variants
        }


def drawn(job: Job, tokens: int, heads: int, width: int, seed: int = 0) -> Tensors:
    """The same q, k and v on every rank."""
    generator = torch.Generator(job.make["device"]).manual_seed(seed)
    shape = (1, tokens, heads, width)
    return tuple(torch.randn(shape, generator=generator, **job.make) for _ in range(3))


def shards(job: Job, tensors: Tensors, lengths: tuple[int, ...]) -> Tensors:
    start = sum(lengths[: job.rank])
    return tuple(x[:, start : start + lengths[job.rank]].contiguous() for x in tensors)


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def usable(job: Job, backend: str) -> bool:
    """Whether a dense backend itself runs here, on every rank, and nothing in its place."""
    report = Report()
    try:
        tensors = drawn(job, 512, 2, 128)
        with reporting_to(report):
            polyattn.attention(*tensors, backend=backend)
        runs = {row.used for row in report.rows} == {backend}
    except polyattn.PolyattnError:
        runs = False
    return all(job.everyone(runs))


@dataclass(frozen=True)
class Meshes:
    """All processes as one Ulysses group, and as one ring."""

    ulysses: Any
    ring: Any


# --- checks -----------------------------------------------------------------------------------


def sta_config(job: Job) -> dict[str, Any]:
    small = {"tile_size": [2, 4, 4]} if job.tiny else {}
    return {"window_size": [3, 3, 3], "skip_time_steps": 0, **small}


def uneven(tokens: int, ranks: int) -> tuple[int, ...]:
    """Shards of rather different lengths: the first one has a good third of what it could."""
    first = tokens // (2 * ranks) + 7
    return (first, *shard_lengths(tokens - first, ranks - 1))


def check(job: Job, meshes: Meshes, backends: list[str]) -> None:
    grid, heads, width = ((5, 8, 12), 4, 32) if job.tiny else ((9, 24, 40), 12, 128)
    tokens, words = math.prod(grid), 77
    rows = job.data["checks"] = []
    video, text = drawn(job, tokens, heads, width), drawn(job, words, heads, width, seed=1)
    even, odd = shard_lengths(tokens, job.ranks), uneven(tokens, job.ranks)
    for backend in backends:
        sparse = backend == "sta"
        config = sta_config(job) if sparse else None
        for kind, mesh in (("Ulysses", meshes.ulysses), ("ring", meshes.ring)):
            if sparse and kind == "ring":
                continue
            layer = polyattn.USPAttention(backend, config=config, mesh=mesh)
            local = polyattn.LocalAttention(backend, config=config)
            for what, lengths, replicated in (
                ("even shards", even, None),
                ("uneven shards", odd, None),
                ("uneven shards after replicated tokens", odd, "prefix"),
                ("uneven shards before replicated tokens", odd, "suffix"),
            ):
                if sparse and replicated == "prefix":
                    continue  # the video comes first there

                def compare(
                    layer: Any = layer, local: Any = local, lengths: Any = lengths,
                    replicated: Any = replicated,
                ) -> float:  # fmt: skip
                    whole, more = video, {}
                    span = None
                    if replicated is not None:
                        order = (text, video) if replicated == "prefix" else (video, text)
                        whole = tuple(torch.cat(each, 1) for each in zip(*order, strict=True))
                        more = {replicated: text}
                        span = polyattn.TextSpan(0 if replicated == "prefix" else tokens, words)
                    with polyattn.forward_context(grid=grid, step=0, layer=0, text=span):
                        wanted = local(*whole)
                        out = layer(*shards(job, video, lengths), **more)
                    first = words if replicated == "prefix" else 0
                    own = shards(job, (wanted[:, first : first + tokens],), lengths)[0]
                    if replicated is None:
                        return error_of(out, own)
                    rows = wanted[:, :words] if first else wanted[:, tokens:]
                    return max(error_of(out[0], own), error_of(out[1], rows))

                name = f"{kind}, {backend}, {what}"
                found = job.attempt(f"check of {name}", compare)
                if found is None:
                    continue
                worst = max(job.everyone(found))
                rows.append({"what": name, "error": worst, "passed": worst < TOLERANCE})
                job.say(f"{name}: error {worst:.1e} {'passed' if worst < TOLERANCE else 'FAILED'}")
    job.keep()


# --- attention --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    grid: tuple[int, int, int]
    heads: int
    repeats: int = 7
    width: int = 128

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens ({'x'.join(map(str, self.grid))}), {self.heads} heads"


def sizes(tiny: bool) -> list[Size]:
    if tiny:
        return [Size((5, 8, 12), 4, repeats=2, width=32)]
    return [Size((21, 45, 80), 12), Size((21, 45, 80), 40, repeats=5), Size((21, 30, 52), 12)]


ONE, ULYSSES, RING = "one", "ulysses", "ring"
RING_COMPUTE = "ring, attention alone"
IN, OUT, SEND_IN, SEND_OUT, ROTATION = (
    "all-to-all in", "all-to-all out", "sending in", "sending out", "rotation",
)  # fmt: skip


def attention_calls(
    job: Job, meshes: Meshes, size: Size, backend: str, whole: Tensors
) -> dict[str, tuple[Callable[[], Any], bool]]:
    """The calls to time, and whether they communicate."""
    lengths = shard_lengths(size.tokens, job.ranks)
    own = shards(job, whole, lengths)
    config = sta_config(job) if backend == "sta" else None
    local = polyattn.LocalAttention(backend, config=config)
    ulysses = polyattn.UlyssesAttention(backend, config=config, mesh=meshes.ulysses)

    def placed(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with polyattn.forward_context(grid=size.grid, step=0, layer=0):
                return function()

        return run

    calls = {
        ONE: (placed(lambda: local(*whole)), False),
        ULYSSES: (placed(lambda: ulysses(*own)), True),
    }
    if backend == "sta":
        return calls
    ring = polyattn.USPAttention(backend, mesh=meshes.ring)

    def attention_alone() -> torch.Tensor:
        """The ring's work on this rank if everybody's part were there already."""
        _, keys, values = own
        torch.stack([keys, values])  # what would be sent
        state = None
        for _ in range(job.ranks):
            state = _merged(state, *local(*own, return_lse=True))
        assert state is not None
        return state[0].to(own[0].dtype)

    calls[RING] = (placed(lambda: ring(*own)), True)
    calls[RING_COMPUTE] = (attention_alone, False)  # on a part, which has no grid
    return calls


def communication_calls(
    job: Job, meshes: Meshes, size: Size, whole: Tensors
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """The pieces that only move something, and the bytes each rank sends to others in them."""
    lengths = shard_lengths(size.tokens, job.ranks)
    own = shards(job, whole, lengths)
    groups = sequence_groups(meshes.ulysses, ring=True)
    ring = sequence_groups(meshes.ring, ring=True).ring
    queries, keys = head_shares(size.heads, size.heads, job.ranks)
    layout = Layout(groups.ulysses, lengths, (queries, keys, keys))
    result = torch.randn(1, size.tokens, len(queries[job.rank]), size.width, **job.make)
    element = own[0].element_size() * size.width
    local = lengths[job.rank]

    def send(tensors: int) -> Callable[[], Any]:
        """The same bytes without packing: what the link takes."""
        to = [local * len(queries[rank]) * element * tensors for rank in range(job.ranks)]
        by = [length * len(queries[job.rank]) * element * tensors for length in lengths]
        sent, received = (
            torch.empty(sum(each), dtype=torch.uint8, device=job.make["device"])
            for each in (to, by)
        )
        return lambda: dist.all_to_all_single(
            received, sent, by, to, group=groups.ulysses.group
        )  # fmt: skip

    block = torch.stack(own[1:])
    previous = lengths[(job.rank - 1) % job.ranks]
    arriving = (*block.shape[:2], previous, *block.shape[3:])
    calls = {
        IN: lambda: to_heads(own, layout),
        SEND_IN: send(3),
        OUT: lambda: to_sequence([result], layout.of(0)),
        SEND_OUT: send(1),
        ROTATION: lambda: Rotation(block, arriving, ring).arrived(),
    }
    others = size.heads - len(queries[job.rank])
    away = (size.tokens - local) * len(queries[job.rank]) * element
    sent = {SEND_IN: 3 * local * others * element, SEND_OUT: away,
            ROTATION: block.numel() * block.element_size()}  # fmt: skip
    return calls, sent


def asking(job: Job, meshes: Meshes, repeats: int) -> float:
    """Microseconds of the exchange between CPUs in every call."""
    groups = sequence_groups(meshes.ulysses, ring=True)
    times = []
    for _ in range(repeats):
        dist.barrier(group=job.status)
        begun = time.perf_counter()
        exchange_headers(groups, [1, 37800, 12345])
        times.append((time.perf_counter() - begun) * 1e6)
    return max(job.everyone(statistics.median(times)))


def attention(job: Job, meshes: Meshes, backends: list[str]) -> None:
    """Calls of attention and their pieces, at every size, each size in turns of its own."""
    rows = job.data["attention"] = []
    moves = job.data["communication"] = []
    found = job.attempt("asking for lengths", lambda: asking(job, meshes, 5 if job.tiny else 100))
    job.data["asking_us"] = found
    for size in sizes(job.tiny):
        whole = job.attempt(
            f"drawing {size}", lambda size=size: drawn(job, size.tokens, size.heads, size.width),
            together=False,
        )  # fmt: skip
        if whole is None:
            continue
        made = job.attempt(
            f"pieces of {size}",
            lambda size=size, whole=whole: communication_calls(job, meshes, size, whole),
            together=False,
        )
        running: dict[str, Callable[[], Any]] = {}
        if made is not None:
            for name, call in made[0].items():
                if job.attempt(f"{name} of {size}", lambda call=call: (call(), 1)) is not None:
                    running[name] = call
        for backend in backends:
            calls = job.attempt(
                f"{backend} at {size}",
                lambda size=size, whole=whole, backend=backend: attention_calls(
                    job, meshes, size, backend, whole
                ),
                together=False,
            )
            for name, (call, together) in (calls or {}).items():
                first = job.attempt(
                    f"{backend}, {name}, {size}", lambda call=call: (call(), 1), together=together
                )
                if first is not None:
                    running[f"{backend}: {name}"] = call
        if not running or not job.time_left():
            continue
        times = job.turns(running, size.repeats)
        told = {"size": str(size), "tokens": size.tokens, "heads": size.heads, "width": size.width}
        if made is not None:
            moves.append(told | {
                "ms": {name: times[name] for name in made[0] if name in times}, "bytes": made[1],
            })  # fmt: skip
        for backend in backends:
            own = {name: times[f"{backend}: {name}"]
                   for name in (ONE, ULYSSES, RING, RING_COMPUTE)
                   if f"{backend}: {name}" in times}  # fmt: skip
            if own:
                rows.append(told | {"backend": backend, "ms": own})
        job.say(attention_table(job, size=str(size)))
        job.keep()
        del whole, made, running
        if not job.tiny:
            torch.cuda.empty_cache()


# --- a denoising step -------------------------------------------------------------------------

PLAIN, SKIPPED = "diffusers", "attention passed by"
DIFFUSERS_BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash")  # none is downloaded


def steps(tiny: bool) -> list[Case]:
    if tiny:
        return [Case("tiny", (5, 8, 12), (3, 3, 3), repeats=2, tiny=True)]
    return [
        Case("Wan 2.1 1.3B 480p", (21, 30, 52), (3, 3, 3), repeats=3),
        Case("Wan 2.1 1.3B 720p", (21, 45, 80), (3, 3, 3), repeats=2),
    ]


@contextlib.contextmanager
def counting_devices(tiny: bool) -> Iterator[None]:
    """diffusers makes its mesh of accelerators, and a CPU counts as none."""
    with contextlib.ExitStack() as stack:
        if tiny:
            stack.enter_context(
                mock.patch.object(torch.accelerator, "device_count", return_value=1)
            )
            stack.enter_context(
                mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu"))
            )
        yield


def step(job: Job, meshes: Meshes, case: Case, model: Any, backend: str | None) -> None:
    """One forward of the model, on one GPU and on all, in every way that runs."""
    running: dict[str, Callable[[], Any]] = {}
    handles: list[Any] = []
    ways = f"{job.ranks} x"
    found: dict[str, Any] = {"case": str(case), "errors": {}, "backend": backend or "automatic"}
    reference: list[torch.Tensor] = []

    def seeded(subject: Any) -> Forwards:
        torch.manual_seed(7)  # the same latents and text everywhere
        return Forwards(case, subject)

    def take(name: str, make: Callable[[], Callable[[], Any]], together: bool) -> None:
        forwards = job.attempt(f"{case}, {name}: preparing", make, together=together)
        if forwards is None:
            return
        out = job.attempt(f"{case}, {name}", forwards, together=together)
        if out is None:
            return
        if SKIPPED not in name:
            if not reference:
                reference.append(out)
            found["errors"][name] = max(job.everyone(error_of(out, reference[0])))
        running[name] = forwards

    def bridged(mesh: Any) -> Forwards:
        forwards = seeded(twin_of(model))
        handles.append(polyattn.apply(forwards.model, backend, mesh=mesh))
        return forwards

    def skipping(mesh: Any) -> Callable[[], Any]:
        forwards = bridged(mesh)

        def run() -> Any:
            with passed_by(True):
                return forwards()

        return run

    def spread_by_diffusers(name: str) -> Forwards:
        from diffusers import ContextParallelConfig
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

        forwards = seeded(twin_of(model))
        active, _ = Registry.get_active_backend()
        try:
            forwards.model.set_attention_backend(name)
        finally:  # it speaks for all models, of which one here is timed with the default
            Registry.set_active_backend(active)
        with counting_devices(job.tiny):
            config = ContextParallelConfig(ulysses_degree=job.ranks)
            forwards.model.enable_parallelism(config=config)
        return forwards

    take(f"1 x polyattn {backend or ''}".strip(), lambda: bridged(None), False)
    take(f"1 x {PLAIN}", lambda: seeded(twin_of(model)), False)
    take(f"1 x {SKIPPED}", lambda: skipping(None), False)
    take(f"{ways} polyattn, Ulysses", lambda: bridged(meshes.ulysses), True)
    take(f"{ways} polyattn, ring", lambda: bridged(meshes.ring), True)
    take(f"{ways} {SKIPPED}", lambda: skipping(meshes.ulysses), True)
    for name in DIFFUSERS_BACKENDS[: 1 if job.tiny else None]:
        take(f"{ways} {PLAIN}, Ulysses, {name}", lambda name=name: spread_by_diffusers(name), True)
    if running and job.time_left(0):
        found["ms"] = job.turns(running, case.repeats)
    job.data["steps"].append(found)
    for handle in handles:
        handle.restore()
    job.say(step_table(found))
    job.keep()


# --- report -----------------------------------------------------------------------------------


def ratio(times: Mapping[str, float], one: str, other: str) -> str:
    if one not in times or other not in times:
        return "-"
    return f"{times[one] / times[other]:.2f}"


def shown(times: Mapping[str, float], name: str) -> str:
    return f"{times[name]:.2f}" if name in times else "-"


def attention_table(job: Job, size: str | None = None) -> str:
    headings = ["size", "backend", "one GPU, ms", "Ulysses, ms", "speed-up",
                "ring, ms", "speed-up"]  # fmt: skip
    rows = []
    for each in job.data.get("attention", []):
        if size in (None, each["size"]):
            times = each["ms"]
            row = [each["size"], each["backend"], shown(times, ONE)]
            for name in (ULYSSES, RING):
                row += [shown(times, name), ratio(times, ONE, name)]
            rows.append(row)
    return table(headings, rows)


def communication_table(job: Job) -> str:
    """The all-to-alls of each size: what they take, send and achieve."""
    headings = ["size", "move", "ms", "of it packing and unpacking, ms", "MB sent by a rank",
                "GB/s while sending"]  # fmt: skip
    rows = []
    for each in job.data.get("communication", []):
        times = each["ms"]
        for name, sending in ((IN, SEND_IN), (OUT, SEND_OUT), (ROTATION, ROTATION)):
            if name not in times or sending not in times:
                continue
            sent = each["bytes"][sending]
            packing = "-" if name == ROTATION else f"{times[name] - times[sending]:.3f}"
            rows.append([
                each["size"], name, f"{times[name]:.3f}", packing, f"{sent / 1e6:.1f}",
                f"{sent / times[sending] / 1e6:.0f}",
            ])  # fmt: skip
    return table(headings, rows)


def overlap(call: float, compute: float, communication: float) -> float:
    """The share of the communication's time that computing hides."""
    return min(1.0, max(0.0, (compute + communication - call) / communication))


def shares_table(job: Job) -> str:
    headings = ["size", "backend", "all-to-alls' share of a Ulysses call, %",
                "rotations of a ring, ms", "attention alone, ms", "ring call, ms",
                "hidden of the rotations, %"]  # fmt: skip
    pieces = {each["size"]: each["ms"] for each in job.data.get("communication", [])}
    rows = []
    for each in job.data.get("attention", []):
        times, moved = each["ms"], pieces.get(each["size"], {})
        share = "-"
        if {IN, OUT} <= moved.keys() and ULYSSES in times:
            share = f"{100 * (moved[IN] + moved[OUT]) / times[ULYSSES]:.1f}"
        row = [each["size"], each["backend"], share]
        if ROTATION in moved and {RING, RING_COMPUTE} <= times.keys():
            rotations = moved[ROTATION] * (job.ranks - 1)
            hidden = overlap(times[RING], times[RING_COMPUTE], rotations)
            each["overlap"] = hidden
            row += [f"{rotations:.3f}", shown(times, RING_COMPUTE), shown(times, RING),
                    f"{100 * hidden:.0f}"]  # fmt: skip
        else:
            row += ["-"] * 4
        rows.append(row)
    return table(headings, rows)


def step_table(found: dict[str, Any]) -> str:
    times = found.get("ms", {})
    first = next(iter(times), None)
    rows = []
    for name, value in times.items():
        own = f"{name.partition(' x')[0]} x {SKIPPED}"
        share = "-"
        if own in times and own != name:
            share = f"{100 * (1 - times[own] / value):.0f}"
        error = found["errors"].get(name)
        rows.append([name, f"{value:.1f}", ratio(times, first or "", name), share,
                     "-" if error is None else f"{error:.1e}"])  # fmt: skip
    headings = ["forward", "ms", "speed-up", "attention and its communication, %",
                "difference from the first"]  # fmt: skip
    return f"### {found['case']}\n\n{table(headings, rows)}"


def targets(job: Job) -> list[str]:
    lines = []
    rows = [each for each in job.data.get("attention", []) if each["tokens"] == TARGET_TOKENS]
    best = "fa" if any(each["backend"] == "fa" for each in rows) else "torch_sdpa"
    for each in rows:
        times = each["ms"]
        if each["backend"] == best and {ONE, ULYSSES} <= times.keys():
            reached = times[ONE] / times[ULYSSES]
            verdict = "met" if reached >= TARGET else "MISSED"
            lines.append(
                f"Target, Ulysses attention >= {TARGET}x: {verdict}, {reached:.2f}x with {best} at "
                f"{each['size']}."
            )
    return lines or [f"Target, Ulysses attention at {TARGET_TOKENS:,} tokens: not measured."]


def page(job: Job) -> str:
    checks = job.data.get("checks", [])
    asked = job.data.get("asking_us")
    parts = [
        f"{job.ranks} processes, "
        + ("float32 on the CPU: shows that it runs, no speed" if job.tiny else
           "one GPU each, bf16, D=128, B=1")
        + ". One GPU: the whole attention or model on every GPU by itself, the slower one counts; "
        "a speed-up is its time over that of all GPUs together, of the same backend.",
        "\n\n".join(targets(job)),
        "## Checks against one process\n\n"
        + table(["what", "relative error", ""],
                [[each["what"], f"{each['error']:.1e}", "passed" if each["passed"] else "FAILED"]
                 for each in checks]),
        f"## Attention\n\n{attention_table(job)}",
        "## Communication\n\nEvery piece alone. In: q, k and v at once, from shards to heads; out: "
        f"the result back; rotation: keys and values to the next rank.\n\n"
        f"{communication_table(job)}\n\n{shares_table(job)}",
    ]  # fmt: skip
    if asked is not None:
        parts.append(f"The exchange between CPUs in every call: {asked:.0f} us.")
    if job.data.get("steps"):
        parts.append(
            "## A denoising step\n\nOne forward (one guidance branch of one step) of the model "
            "with random weights: speed only, nothing about quality. Attention passed by: every "
            "attention call returns its input, so that neither attention nor what it sends is "
            "there; speed-ups are over the first row."
        )
        parts += [step_table(each) for each in job.data["steps"]]
    if job.data["failed"]:
        lines = [f"- {each['what']}: {each['why']}" for each in job.data["failed"]]
        parts.append("## Not measured\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def report(job: Job) -> None:
    if job.rank != 0:
        return
    command = " ".join(
        [f"torchrun --nproc-per-node {job.ranks} bench/sequence_parallel.py", *sys.argv[1:]]
    )
    body = page(job)
    data = json.loads(json.dumps(job.data, default=float))
    where = machine() | ({} if job.tiny else {"gpus": job.ranks})
    save(job.folder, "sequence_parallel", "Sequence parallelism: several GPUs against one", command,
         body, data, where)  # fmt: skip
    (job.folder / "sequence_parallel.partial.json").unlink(missing_ok=True)
    print("\n".join(targets(job)), flush=True)


def measure(job: Job) -> None:
    meshes = Meshes(sequence_mesh(), sequence_mesh(ring_degree=job.ranks))
    fast = usable(job, "fa")
    if not fast:
        job.data["failed"].append({"what": "fa", "why": "does not run here (polyattn doctor)"})
    backends = [*(["fa"] if fast else []), "torch_sdpa", "sta"]
    check(job, meshes, backends)
    attention(job, meshes, backends)
    job.data["steps"] = []
    torch.manual_seed(0)  # the same weights on every rank
    model = job.attempt("the model", lambda: build(job.tiny), together=False)
    for case in steps(job.tiny) if model is not None else ():
        step(job, meshes, case, model, "fa" if fast else None)
        if not job.tiny:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=240, help="stop after about this long")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, over gloo")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    job = Job.begin(arguments.tiny, arguments.seconds, arguments.output)
    if job.ranks < 2:
        raise SystemExit("two processes at least: torchrun --nproc-per-node 2 ...")
    with torch.no_grad():
        try:
            measure(job)
        except StoppedError as problem:
            job.say(f"stopped: {problem}")
            report(job)
            sys.stdout.flush()
            # Others may be in a collective that never ends; leaving in order would wait for it.
            job.everyone("leaving")
            os._exit(1)
    report(job)
    job.everyone("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
