"""The sparse video backends as whole operators, against the best dense kernel of the same GPU.

For every shape and configuration: milliseconds of `polyattn.attention` inside a forward context
(select, permute, attend, restore; checks and report included), of torch's default, cuDNN, FA3 and
FA4 on the same tensors, and the ratios; the density that the backend reports; which share of the
GPU's time is attention; what a call costs the host; peak memory. Variants are timed in turns.
State is warm: SVG2 goes on from its clusters; its first call of a run is timed apart.

    python bench/sparse_operators.py [--quick] [--seconds 200] [--only REGEX] [--heads N]
    python bench/sparse_operators.py --tiny      # small shapes on the CPU: shows that it runs

Rows are written as they come, to sparse_operators.partial.json in the output folder.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, cpu_microseconds, gpu_milliseconds, save, table
from torch.nn.attention import SDPBackend, sdpa_kernel

import polyattn
from polyattn.context import entered
from polyattn.reporting import Report, reporting_to

STEP, NUM_STEPS, NUM_LAYERS = 20, 50, 30  # where in a run the calls say they are
WANTED_DENSITY = 0.25  # of svg2
REPEATS, WARMUP = 6, 2
PROFILED_CALLS = 3
LEAST_SECONDS = 15  # no case is begun with less than this left

# The planted inputs; see planted().
STRENGTH, SHARPNESS, CONTENTS, WAVES = 1.0, 0.5, 3, 3

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Extent = tuple[int, int, int]


@dataclass(frozen=True)
class Variant:
    """A sparse backend with parameters, in one layer of a run."""

    name: str
    backend: str
    config: Mapping[str, Any]
    layer: int = 1
    tuned: bool = False  # top_p_kmeans is to be found for WANTED_DENSITY


@dataclass(frozen=True)
class Case:
    name: str
    grid: Extent
    heads: int
    of_heads: int
    text: int = 0
    planted: bool = True
    only: str = ""  # variants whose name matches
    head_dim: int = 128
    tiny: bool = False
    fastvideo: bool = False

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    def __str__(self) -> str:
        text = f" + {self.text} text" if self.text else ""
        heads = f"{self.heads} of {self.of_heads}" if self.of_heads != self.heads else self.heads
        inputs = "planted" if self.planted else "normal"
        sides = "x".join(map(str, self.grid))
        return f"{self.name}: {sides}{text}, {heads} heads, D={self.head_dim}, {inputs} inputs"


TARGETS = Case("targets", (18, 48, 80), 8, 8, planted=False, only="sta|vsa")


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The most telling first, so that a time limit cuts the rest."""
    if arguments.fastvideo_process:
        own = {"sta": "sta 3x3x3", "vsa": "vsa 0.9"}[arguments.fastvideo_process]
        return [replace(TARGETS, only=own, fastvideo=True)]
    if arguments.tiny:
        small: dict[str, Any] = {"head_dim": 32, "tiny": True}
        return [
            Case("tiny", (6, 8, 8), 2, 2, planted=False, only="sta|vsa", **small),
            Case("tiny, ragged", (5, 9, 10), 2, 4, text=10, **small),
        ]
    part = arguments.heads or 8
    found = [
        TARGETS,
        Case("Wan 2.1 14B 720p", (21, 45, 80), part, 40),
        Case("Wan 2.1 1.3B 480p", (21, 30, 52), arguments.heads or 12, 12),
    ]
    if not arguments.quick:
        found += [
            Case("HunyuanVideo 720p", (33, 45, 80), part, 24, text=256),
            Case("Wan 2.1 14B 720p", (21, 45, 80), 40, 40,
                 only=r"sta 3x3x3|vsa 0.9|svg2 exact, top_p tuned|vmoba topk"),
        ]  # fmt: skip
    return found


# --- configurations ---------------------------------------------------------------------------


def variants_of(case: Case) -> list[Variant]:
    """Every backend as its authors run it, no step or layer dense."""
    tile: dict[str, Any] = {"tile_size": [2, 4, 4]} if case.tiny else {}
    found = [
        Variant(f"sta {'x'.join(map(str, window))}", "sta",
                {"window_size": list(window), "skip_time_steps": 0, **tile})
        for window in ((3, 3, 3), (3, 5, 5))
    ]  # fmt: skip
    found += [Variant(f"vsa {share:g}", "vsa", {"sparsity": share}) for share in (0.9, 0.8)]
    for mode in ("topk", "threshold"):
        for layer, kind in enumerate(("temporal", "spatial", "spatiotemporal")):
            config = vmoba_config(case.grid, mode)
            found.append(Variant(f"vmoba {mode} {kind}", "vmoba", config, layer))
    clusters = {"num_q_centroids": 6, "num_k_centroids": 20} if case.tiny else {}
    always: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, **clusters}
    found += [
        Variant("svg2 exact, defaults", "svg2", always),
        Variant("svg2 exact, top_p tuned", "svg2", always, tuned=True),
        Variant("svg2 tiled, defaults", "svg2", {**always, "variant": "tiled"}),
        Variant("svg2 tiled, top_p tuned", "svg2", {**always, "variant": "tiled"}, tuned=True),
    ]
    return [each for each in found if re.search(case.only, each.name)]


def vmoba_config(grid: Extent, mode: str) -> dict[str, Any]:
    """The authors' parameters for Wan 1.3B at 480p, their chunks scaled to this grid.

    An axis is cut into as many chunks as theirs (short last chunks may make it fewer), and topk
    stays. topk was published for 20x28x52 tokens, threshold for 20x30x52.
    """
    if mode == "topk":
        chunks, topk = ((10, 0, 0), (0, 7, 4), (5, 7, 4)), (2, 6, 18)
    else:
        chunks, topk = ((10, 0, 0), (0, 10, 13), (5, 5, 13)), ()

    def sizes(counts: Extent) -> list[int]:
        sides = zip(grid, counts, strict=True)
        return [-(-side // min(count, side)) for side, count in sides if count]

    config: dict[str, Any] = {
        "moba_select_mode": mode,
        "first_full_step": 0,
        "temporal_chunk_size": grid[0] / chunks[0][0],
        "spatial_chunk_size": sizes(chunks[1]),
        "st_chunk_size": sizes(chunks[2]),
    }
    names = ("temporal_topk", "spatial_topk", "st_topk")
    return config | dict(zip(names, topk, strict=False))


# --- inputs -----------------------------------------------------------------------------------


def inputs(case: Case) -> Tensors:
    shape = (1, case.length, case.heads, case.head_dim)
    generator = torch.Generator(case.device).manual_seed(0)
    make: dict[str, Any] = {"device": case.device, "generator": generator}
    v = torch.randn(shape, dtype=case.dtype, **make)
    if case.planted:
        return *planted(case, make), v
    q, k = (torch.randn(shape, dtype=case.dtype, **make) for _ in "qk")
    return q, k, v


def planted(case: Case, make: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys that attend to what is alike, near or far. Described in the report."""
    axes = [torch.linspace(0, 1, side, device=case.device) for side in case.grid]
    place = torch.cartesian_prod(*axes)
    q, k = (
        torch.randn((1, case.length, case.heads, case.head_dim), dtype=case.dtype, **make)
        for _ in "qk"
    )
    video = slice(0, len(place))  # text follows it, and stays noise
    for head in range(case.heads):
        count = CONTENTS * WAVES
        phases = place @ (torch.randn(3, count, **make) * 2) + torch.rand(count, **make)
        waves = torch.cos(2 * math.pi * phases).view(-1, CONTENTS, WAVES)
        content = waves.sum(-1) * math.sqrt(2 / WAVES)
        directions = torch.randn(CONTENTS, case.head_dim, **make) * SHARPNESS
        shifts = 2 * math.pi * torch.rand(case.head_dim, **make)
        features = STRENGTH * math.sqrt(2) * torch.cos(content @ directions + shifts)
        for tensor in (q, k):
            tensor[0, video, head] += features.to(case.dtype)
    return q, k


PLANTED = (
    f"Planted inputs, for each head: {CONTENTS} content coordinates, each the sum of {WAVES} waves "
    "of unit variance together over the grid scaled to a unit cube (wave vectors normal with "
    "deviation 2, random phases); features sqrt(2) cos(content . w + b) in D channels, w normal "
    f"with deviation {SHARPNESS:g}, b uniform; q and k are {STRENGTH:g} times the same features "
    "plus standard normal noise of their own; v and text are standard normal. Normal inputs: all "
    "standard normal."
)


# --- what is timed ----------------------------------------------------------------------------


class Operator:
    """One backend in one layer of a run: calls share what the run remembers."""

    def __init__(self, case: Case, variant: Variant, tensors: Tensors) -> None:
        self.case, self.variant, self.tensors = case, variant, tensors
        self.config = dict(variant.config)
        self.begin_run()

    def begin_run(self) -> None:
        case = self.case
        text = polyattn.TextSpan(math.prod(case.grid), case.text) if case.text else None
        with polyattn.forward_context(
            grid=case.grid, text=text, step=STEP, num_steps=NUM_STEPS, layer=self.variant.layer,
            num_layers=NUM_LAYERS, branch="cond",
        ) as context:  # fmt: skip
            self.context = context

    def __call__(self) -> torch.Tensor:
        with entered(self.context):
            return polyattn.attention(
                *self.tensors, backend=self.variant.backend, config=self.config
            )

    def first_of_a_run(self) -> torch.Tensor:
        self.begin_run()
        return self()

    def told(self) -> dict[str, Any]:
        """What the report says of one call."""
        report = Report()
        with reporting_to(report):
            self()
        (row,) = report.rows
        return {"used": row.used, **row.facts}

    def tune(self) -> None:
        """Halve the interval of top_p_kmeans until the density is near the wanted one."""
        low, high = 0.02, 0.999
        best = (math.inf, 0.9)
        top_p = 0.9
        for _ in range(8):
            self.config["top_p_kmeans"] = top_p
            density = float(self.told()["density"])
            best = min(best, (abs(density - WANTED_DENSITY), top_p))
            if best[0] < 0.005:
                break
            low, high = (low, top_p) if density > WANTED_DENSITY else (top_p, high)
            top_p = (low + high) / 2
        self.config["top_p_kmeans"] = best[1]


class DenseBackend:
    """A dense backend of polyattn, strictly that version."""

    def __init__(self, name: str, tensors: Tensors) -> None:
        self.name, self.tensors = name, tensors

    def __call__(self) -> torch.Tensor:
        config = {"strict_version": True}
        return polyattn.attention(*self.tensors, backend=self.name, config=config)


def dense_variants(tensors: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    q, k, v = (each.transpose(1, 2) for each in tensors)

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return {
        "torch default": lambda: F.scaled_dot_product_attention(q, k, v),
        "cuDNN": cudnn,
        "FA3": DenseBackend("fa3", tensors),
        "FA4": DenseBackend("fa4", tensors),
    }


def fastvideo_variants(case: Case, tensors: Tensors) -> dict[str, Callable[[], Any]]:
    """FastVideo's own STA and VSA on tokens that lie tile by tile already."""
    ops = importlib.import_module("fastvideo_kernel.ops")
    package = importlib.import_module("fastvideo_kernel")
    q, k, v = (each.transpose(1, 2).contiguous() for each in tensors)
    windows = [(3, 3, 3)] * case.heads
    tiles = case.length // 64
    sizes = torch.full((tiles,), 64, dtype=torch.int32, device=case.device)
    gate, kept = torch.zeros_like(q), math.ceil((1 - 0.9) * tiles)
    tier = "Triton" if getattr(ops, "sta_fwd", None) is None else "Hopper"
    found: dict[str, Callable[[], Any]] = {
        f"fastvideo-kernel VSA 0.9 ({tier} build, tiling not counted)": (
            lambda: package.video_sparse_attn(q, k, v, sizes, sizes, kept, (4, 4, 4), gate)
        ),
        f"fastvideo-kernel STA 3x3x3 ({tier} build, tiling not counted)": (
            lambda: ops.sliding_tile_attention(
                q, k, v, windows, 0, False, "x".join(map(str, case.grid))
            )
        ),
    }
    method = case.only[:3].upper()
    return {name: function for name, function in found.items() if f" {method} " in name}


# --- one case ---------------------------------------------------------------------------------


class DeviceLostError(RuntimeError):
    """An error after which no kernel of this process can run."""


def is_fatal(problem: Exception) -> bool:
    return bool(re.search(r"illegal|misaligned|unspecified launch|device-side", str(problem)))


def describe(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300].replace("|", "/")


def wait(case: Case) -> None:
    if not case.tiny:
        torch.cuda.synchronize()


@dataclass
class Trial:
    """What first calls of the variants of one case showed."""

    running: dict[str, Callable[[], Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of one call, roughly
    failed: dict[str, str] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    def take(
        self,
        case: Case,
        name: str,
        function: Callable[[], Any],
        prepare: Callable[[], None] = lambda: None,
    ) -> bool:
        """Prepare it, call it twice, and keep it if it gives finite numbers."""
        try:
            prepare()
            begun = time.perf_counter()
            out = function()
            wait(case)
            self.first_s[name] = round(time.perf_counter() - begun, 2)
            out = out[0] if isinstance(out, (tuple, list)) else out
            if not bool(torch.isfinite(out).all()):
                raise ArithmeticError("the output is not finite")
            del out
            before = 0
            if not case.tiny:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            function()
            wait(case)
            self.seconds[name] = time.perf_counter() - begun
            if not case.tiny:
                self.peak_mib[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as problem:
            self.failed[name] = describe(problem)
            if is_fatal(problem):
                raise DeviceLostError(self.failed[name]) from problem
            return False
        self.running[name] = function
        return True


def milliseconds(case: Case, trial: Trial, left: float) -> dict[str, float]:
    """Of all that runs, in turns, repeated as often as the time left allows."""
    round_s = sum(trial.seconds[name] for name in trial.running)
    repeats = max(1, min(REPEATS, int((left / max(round_s, 1e-6) - WARMUP) / 2)))
    if case.tiny:
        times = cpu_microseconds(trial.running, number=1, repeats=3, warmup=1)
        return {name: value / 1000 for name, value in times.items()}
    return gpu_milliseconds(trial.running, repeats=repeats, warmup=WARMUP)


def host_microseconds(case: Case, operator: Operator) -> float:
    """What one call keeps Python busy for, its kernels not waited for; the least of a few."""
    best = math.inf
    for _ in range(3):
        wait(case)
        begun = time.perf_counter()
        operator()
        best = min(best, time.perf_counter() - begun)
    wait(case)
    return best * 1e6


# Kernels by what they do, from their names; the first that matches counts.
CLASSES = (
    ("attention", r"uniform_attention|gathered_attention|attend_pairs|join_pairs|flash|fmha|sdpa"
                  r"|flex_attention|block_sparse"),
    ("moving rows", r"move_rows"),
    ("k-means", r"nearest_centroids|average_blocks|sort|searchsorted"),
    ("selection", r"select_blocks|average_blocks|gemm|gemv|nvjet|cublas|cutlass|topk|sort"
                  r"|::mm|::bmm"),
    ("planning", r"partition_lists|sum_runs|list_tokens"),
)  # fmt: skip
CLASS_NAMES = (*(name for name, _ in CLASSES), "other")


def class_of(kernel: str, backend: str) -> str:
    for name, pattern in CLASSES:
        if name == "k-means" and backend != "svg2":
            continue
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "other"


def profile(case: Case, operator: Operator) -> dict[str, Any]:
    """GPU milliseconds of one call by class of kernel, and the longest kernels.

    In a tiny case the CPU's operations stand in for kernels.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([] if case.tiny else [ProfilerActivity.CUDA])
    with record(activities=activities) as recorded:
        for _ in range(PROFILED_CALLS):
            operator()
        wait(case)
    times: dict[str, float] = {}
    wanted = DeviceType.CPU if case.tiny else DeviceType.CUDA
    for event in recorded.key_averages():
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            spent = event.self_cpu_time_total if case.tiny else event.self_device_time_total
            times[event.key] = times.get(event.key, 0.0) + spent / 1000 / PROFILED_CALLS
    classes = dict.fromkeys(CLASS_NAMES, 0.0)
    for kernel, spent in times.items():
        classes[class_of(kernel, operator.variant.backend)] += spent
    longest = sorted(times.items(), key=lambda item: -item[1])[:14]
    return {
        "ms": sum(classes.values()),
        "classes": classes,
        "longest": {kernel[:120]: round(spent, 4) for kernel, spent in longest},
    }


def measure(case: Case, deadline: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Fill what is known of a case, handing it to ``keep`` at every stage."""
    found: dict[str, Any] = {"case": str(case), "failed": {}}
    keep(found)
    tensors = inputs(case)
    trial = Trial()
    found |= {"failed": trial.failed, "first_s": trial.first_s, "peak_mib": trial.peak_mib}
    for name, function in dense_variants(tensors).items():
        trial.take(case, name, function)
    found["dense"] = list(trial.running)
    operators: dict[str, Operator] = {}
    facts = found["facts"] = {}
    for variant in variants_of(case):
        operator = Operator(case, variant, tensors)
        prepare = operator.tune if variant.tuned else lambda: None
        if trial.take(case, variant.name, operator, prepare):
            facts[variant.name] = operator.told()
            if "top_p_kmeans" in operator.config:
                facts[variant.name]["top_p_kmeans"] = operator.config["top_p_kmeans"]
            operators[variant.name] = operator
    if case.fastvideo:
        for name, function in fastvideo_variants(case, tensors).items():
            trial.take(case, name, function)
    keep(found)

    # A few seconds are left to the profiler and to first calls of runs.
    found["ms"] = times = milliseconds(case, trial, deadline - time.monotonic() - 8)
    pairs = 4.0 * case.head_dim * case.heads * case.length**2
    found["tflops"] = {
        name: pairs * (float(facts[name]["density"]) if name in facts else 1.0) / value / 1e9
        for name, value in times.items()
        if name in facts or name in found["dense"]
    }
    for mode in ("topk", "threshold"):
        kinds = [name for name in times if name.startswith(f"vmoba {mode}")]
        if len(kinds) == 3:
            name = f"vmoba {mode}, mean of the three"
            times[name] = sum(times[kind] for kind in kinds) / 3
            density = sum(float(facts[kind]["density"]) for kind in kinds) / 3
            facts[name] = {"density": density, "provider": facts[kinds[0]]["provider"]}
    keep(found)

    found["host_us"] = {name: host_microseconds(case, each) for name, each in operators.items()}
    keep(found)
    first = {
        f"{name}, first call of a run": each.first_of_a_run
        for name, each in operators.items()
        if name in ("svg2 exact, defaults", "svg2 tiled, defaults")
    }
    if first and deadline > time.monotonic() + 5:
        if case.tiny:
            again = cpu_microseconds(first, number=1, repeats=1, warmup=0)
            times |= {name: value / 1000 for name, value in again.items()}
        else:
            times |= gpu_milliseconds(first, repeats=2, warmup=0)
        keep(found)
    shares = found["shares"] = {}
    for name, operator in operators.items():
        if deadline < time.monotonic() + 2:
            found["failed"][f"shares of {name}"] = "no time left"
            continue
        try:
            shares[name] = profile(case, operator)
        except Exception as problem:
            found["failed"][f"shares of {name}"] = describe(problem)
    keep(found)


# --- report -----------------------------------------------------------------------------------

HEADINGS = ["variant", "density", "ms", "x best dense", "x FA3", "x cuDNN", "TF/s", "host us",
            "peak MiB", "first call s", "provider"]  # fmt: skip


def best_dense(found: dict[str, Any]) -> str | None:
    times = {name: found["ms"][name] for name in found["dense"] if name in found["ms"]}
    return min(times, key=lambda name: times[name]) if times else None


def rows(found: dict[str, Any]) -> list[list[str]]:
    times, facts = found["ms"], found["facts"]
    best = best_dense(found)

    def ratio(of: str | None, name: str) -> str:
        return f"{times[of] / times[name]:.2f}" if of in times else "-"

    def shown(kind: str, name: str, digits: int) -> str:
        number = found.get(kind, {}).get(name)
        return "-" if number is None else f"{number:.{digits}f}"

    made = []
    for name in times:
        known = facts.get(name, {})
        label = name + (f" ({known['top_p_kmeans']:.3f})" if "top_p_kmeans" in known else "")
        density = (
            f"{float(known['density']):.3f}" if known else ("1" if name in found["dense"] else "-")
        )
        made.append([
            label, density, f"{times[name]:.3f}", ratio(best, name), ratio("FA3", name),
            ratio("cuDNN", name), shown("tflops", name, 0), shown("host_us", name, 0),
            shown("peak_mib", name, 0), shown("first_s", name, 1), known.get("provider", "-"),
        ])  # fmt: skip
    return made


def share_rows(found: dict[str, Any]) -> list[list[str]]:
    made = []
    for name, each in found.get("shares", {}).items():
        total = each["ms"]
        if total:
            parts = [f"{100 * each['classes'][part] / total:.1f}" for part in CLASS_NAMES]
            made.append([name, f"{total:.3f}", *parts])
    return made


def section(found: dict[str, Any]) -> str:
    parts = [f"## {found['case']}"]
    if "skipped" in found:
        parts.append(found["skipped"])
    if "ms" in found:
        parts.append(f"Best dense: {best_dense(found)}.\n\n{table(HEADINGS, rows(found))}")
    if share_rows(found):
        headings = ["share of GPU time, %", "GPU ms", *CLASS_NAMES]
        parts.append(table(headings, share_rows(found)))
    for name, why in found.get("failed", {}).items():
        parts.append(f"- {name}: {why}")
    return "\n\n".join(parts)


def verdicts(data: list[dict[str, Any]]) -> list[list[str]]:
    """What the targets ask for, and what was found."""
    made: list[list[str]] = []

    def add(found: dict[str, Any], what: str, ms: float, limit: float) -> None:
        verdict = "met" if ms <= limit else f"MISSED by {100 * (ms / limit - 1):.0f} %"
        made.append([found["case"].split(",")[0], what, f"{ms:.3f}", f"{limit:.3f}", verdict])

    for found in data:
        times = found.get("ms", {})
        if found["case"].startswith("targets"):
            for name, limit in (("sta 3x3x3", 4.84), ("vsa 0.9", 5.4)):
                if name in times:
                    add(found, name, times[name], limit)
        svg2 = times.get("svg2 exact, top_p tuned")
        if svg2 and "FA3" in times:
            density = float(found["facts"]["svg2 exact, top_p tuned"]["density"])
            add(found, f"svg2 at density {density:.3f}: FA3 / 2", svg2, times["FA3"] / 2)
        for mode in ("topk", "threshold"):
            name = f"vmoba {mode}, mean of the three"
            if name in times and "cuDNN" in times:
                add(found, f"{name}: cuDNN", times[name], times["cuDNN"])
    return made


def summary(data: list[dict[str, Any]]) -> str:
    """A line for each case and variant."""
    lines = []
    for found in data:
        if "ms" not in found:
            lines.append([found["case"], found.get("skipped", "not finished"), "", "", ""])
            continue
        best = best_dense(found)
        for row in rows(found):
            lines.append([found["case"].partition(", D=")[0], row[0], row[1], row[2], row[3]])
        if best:
            lines.append(["", f"(best dense: {best})", "", "", ""])
    return table(["case", "variant", "density", "ms", "x best dense"], lines)


# --- all cases --------------------------------------------------------------------------------


def run_fastvideo(arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """FastVideo's kernels, each in a process of its own, since some builds lose the device."""
    title = "targets beside fastvideo-kernel"
    if arguments.tiny or importlib.util.find_spec("fastvideo_kernel") is None:
        return [{"case": title, "skipped": "fastvideo_kernel: not installed"}]
    data = []
    for method in ("vsa", "sta"):
        left = deadline - time.monotonic()
        if left < 2 * LEAST_SECONDS:
            data.append({"case": f"{title}, {method}", "skipped": "no time left"})
        else:
            data += fastvideo_process(method, arguments.output, left, f"{title}, {method}")
    return data


def fastvideo_process(method: str, output: Path, left: float, title: str) -> list[dict[str, Any]]:
    folder = output / f"fastvideo_{method}"
    results = folder / "sparse_operators.partial.json"
    results.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--fastvideo-process", method, "--output", str(folder),
               "--seconds", f"{left - 5:.0f}"]  # fmt: skip
    told = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        told = "" if done.returncode == 0 else f"its process failed: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired:
        told = "its process ran out of time"
    try:
        found: list[dict[str, Any]] = json.loads(results.read_text())
    except (OSError, ValueError):
        return [{"case": title, "skipped": told or "its process wrote nothing"}]
    for each in found:
        each["case"] = f"{title}: {each['case']}"
        if told:
            each["skipped"] = told
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="the three first shapes")
    parser.add_argument("--seconds", type=float, default=200, help="stop after about this long")
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    parser.add_argument("--heads", type=int, help="heads of the models' shapes")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--fastvideo-process", choices=("sta", "vsa"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    arguments.output.mkdir(parents=True, exist_ok=True)
    progress = arguments.output / "sparse_operators.partial.json"
    progress.unlink(missing_ok=True)
    data: list[dict[str, Any]] = []

    def write() -> None:
        progress.write_text(json.dumps(data, indent=1, default=float))

    lost = ""
    with torch.no_grad():
        for case in cases(arguments):
            if not re.search(arguments.only, str(case)):
                continue
            if lost or deadline - time.monotonic() < LEAST_SECONDS:
                why = f"the device was lost: {lost}" if lost else "no time left"
                data.append({"case": str(case), "skipped": why})
                continue
            begun, place = time.monotonic(), len(data)
            data.append({"case": str(case)})

            def keep(found: dict[str, Any], place: int = place) -> None:
                data[place] = found
                write()

            try:
                measure(case, deadline, keep)
            except DeviceLostError as problem:
                lost = str(problem)
                data[place]["skipped"] = f"lost the device: {lost}"
            except Exception as problem:
                data[place]["skipped"] = describe(problem)
                lost = describe(problem) if is_fatal(problem) else ""
            data[place]["seconds"] = round(time.monotonic() - begun, 1)
            write()
            print(f"{section(data[place])}\n({data[place]['seconds']} s)\n", flush=True)
            if not (lost or case.tiny):
                torch.cuda.empty_cache()
    if arguments.fastvideo_process:
        return
    if re.search(arguments.only, "fastvideo"):
        data += run_fastvideo(arguments, deadline)
        write()

    note = (
        f"{'float32 on the CPU, tiny' if arguments.tiny else 'bf16'}, B=1. A variant is one whole "
        "`polyattn.attention` call in a forward context: selection, permutation, attention and "
        "its inverse; no step or layer dense; warm state. Ratios above 1 are faster than dense. "
        "TF/s count the pairs that the reported density says are attended, over the whole call. "
        "Host: Python's time for one call, nothing waited for. Peak: memory of one call above its "
        "inputs, the output included. First call: in this process, compilation included; the rows "
        "named so are the first call of a run, 50 iterations of k-means instead of 2. V-MoBA has "
        "one row for each kind of layer, with the authors' parameters for Wan 1.3B scaled to the "
        "grid. top_p in brackets was tuned for a density of "
        f"{WANTED_DENSITY:g} on these inputs. Shares: kernel time of {PROFILED_CALLS} calls under "
        "torch.profiler by kernel name; k-means (svg2 only) holds all sorting and searching, "
        "other holds torch's elementwise, scan, scatter and copy kernels of selection and "
        f"planning.\n\n{PLANTED}"
    )
    checks = table(["case", "what", "ms", "limit ms", "verdict"], verdicts(data))
    body = "\n\n".join([note, "## Targets", checks, *(section(found) for found in data)])
    command = " ".join(["python bench/sparse_operators.py", *sys.argv[1:]])
    data = json.loads(json.dumps(data, default=float))
    save(arguments.output, "sparse_operators", "Sparse video backends as operators", command,
         body, data)  # fmt: skip
    print(f"{summary(data)}\n\n{checks}")


if __name__ == "__main__":
    main()
