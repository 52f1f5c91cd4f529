"""What every benchmark here shares: where it ran, how it timed, how it reports.

A result names its machine, versions and commit. GPU work is timed with CUDA events and CPU work
with a monotonic clock; figures are medians (GPU) or minima (CPU) of repeated runs after warm-up.
Variants that are compared are timed in turns within one process, so that a ratio sees one machine
in one state.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def machine() -> dict[str, Any]:
    """Where and with what this runs."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def commit() -> str:
    """The commit of these sources, with a `+` where files differ from it.

    A copy without its history is told by POLYATTN_COMMIT.
    """
    if told := os.environ.get("POLYATTN_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}+" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def gpu_milliseconds(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int = 8, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds of the GPU for each variant, timed in turns.

    Each turn is two calls, of which the second is timed: the GPU is at work while Python enqueues
    it, as it is within a model, so that only what takes longer to enqueue than to run is timed with
    Python's share.
    The turns come in another order every round: at video lengths the GPU's clock depends on how
    much power the kernel before took, which would favour whoever follows a slow one.
    """
    for function in variants.values():
        for _ in range(warmup):
            function()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(variants), len(variants)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            variants[name]()
            start.record()
            variants[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def cpu_microseconds(
    variants: Mapping[str, Callable[[], Any]],
    *,
    number: int = 5000,
    repeats: int = 9,
    warmup: int = 200,
) -> dict[str, float]:
    """Least microseconds per call of each variant, timed in turns."""
    for function in variants.values():
        for _ in range(warmup):
            function()
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats):
        for name, function in variants.items():
            start = time.perf_counter_ns()
            for _ in range(number):
                function()
            best[name] = min(best[name], (time.perf_counter_ns() - start) / number / 1000)
    return best


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save(
    folder: Path,
    name: str,
    title: str,
    command: str,
    text: str,
    data: Any,
    where: Mapping[str, Any] | None = None,
) -> None:
    """Write NAME.json and NAME.md, and print the latter. ``where``: if it was not measured here."""
    where = machine() if where is None else where
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"machine": where, "command": command, "data": data}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1))
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    page = f"# {title}\n\n{facts}.\nCommand: `{command}`.\n\n{text}\n"
    (folder / f"{name}.md").write_text(page)
    print(page)
