"""A denoising step of Wan 2.1 1.3B with each attention: what sparse backends save of a whole model.

The published configuration of `WanTransformer3DModel` with random weights: these numbers are of
speed, and say NOTHING about the quality of a video. For 480p and 720p (81 frames): milliseconds of
one forward (one guidance branch of one step; a step with guidance is two) with diffusers' own
attention, with the dense backends of polyattn and with each sparse one, through `polyattn.apply`;
the share of attention, from a forward that passes it by; and what that makes for a video of 50
steps. Models share their weights and are timed in turns, warm: SVG2 goes on from its clusters.

    python bench/sparse_wan_steps.py [--seconds 210] [--only REGEX]
    python bench/sparse_wan_steps.py --tiny      # two layers on the CPU: shows that it runs

Rows are written as they come, to sparse_wan_steps.partial.json in the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_wan as wan
import torch
from common import RESULTS, cpu_microseconds, gpu_milliseconds, save, table

import polyattn

STEPS, DENSE_STEPS, FORWARDS_A_STEP = 50, 10, 2
FIRST_TIMESTEP = 1000.0
LEAST_SECONDS = 20  # no case is begun with less than this left

PUBLISHED: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
TEXT = 512  # tokens of the prompt, padding included


@dataclass(frozen=True)
class Case:
    name: str
    grid: tuple[int, int, int]
    window: tuple[int, int, int]  # of sta, near a quarter of all pairs
    repeats: int = 3
    tiny: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    def __str__(self) -> str:
        sides = "x".join(map(str, self.grid))
        return f"{self.name}: {sides} = {math.prod(self.grid):,} tokens"


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case("tiny", (5, 8, 12), (3, 3, 3), tiny=True)]
    return [
        Case("Wan 2.1 1.3B 480p", (21, 30, 52), (3, 3, 3)),
        Case("Wan 2.1 1.3B 720p", (21, 45, 80), (3, 3, 7), repeats=2),
    ]


def build(tiny: bool) -> torch.nn.Module:
    """The model with random weights, and no backend of its own."""
    settings = dict(PUBLISHED)
    if tiny:
        settings |= {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64,
                     "num_layers": 2, "text_dim": 32}  # fmt: skip
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with torch.device("cpu" if tiny else "cuda"):
            return wan.WanTransformer3DModel(**settings).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(dtype)


def twin_of(model: torch.nn.Module) -> torch.nn.Module:
    """Another model of the same weights, with attention modules of its own."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


# --- backends ---------------------------------------------------------------------------------


def backends(case: Case) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and parameters of each, all of them without dense steps and layers.

    SVG2 gets a quarter of its clusters whatever their mass: random weights make no clusters that
    a share of the mass could find.
    """
    small = case.tiny
    clusters = {"num_q_centroids": 6, "num_k_centroids": 20} if small else {}
    window = "x".join(map(str, case.window))
    sta: dict[str, Any] = {"skip_time_steps": 0, **({"tile_size": [2, 4, 4]} if small else {})}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "fa": ("fa", {}),
        "torch_sdpa": ("torch_sdpa", {}),
        f"sta {window}": ("sta", {**sta, "window_size": list(case.window)}),
        "vsa 0.75": ("vsa", {"sparsity": 0.75}),
        "vsa 0.9": ("vsa", {"sparsity": 0.9}),
        "vmoba topk": ("vmoba", vmoba_config(case.grid)),
        "svg2, a quarter of the clusters": (
            "svg2",
            {"dense_steps": 0, "dense_layers": 0, "top_p_kmeans": 0.01, "min_kc_ratio": 0.25,
             **clusters},
        ),
    }  # fmt: skip
    if case.window != (3, 3, 3):
        found["sta 3x3x3"] = ("sta", {**sta, "window_size": [3, 3, 3]})
    return found


def vmoba_config(grid: tuple[int, int, int]) -> dict[str, Any]:
    """The authors' topk parameters for 20x28x52 tokens, an axis cut into as many chunks here."""

    def sizes(*counts: int) -> list[int]:
        sides = grid[-len(counts) :]
        return [-(-side // min(n, side)) for side, n in zip(sides, counts, strict=True)]

    return {
        "moba_select_mode": "topk",
        "first_full_step": 0,
        "temporal_chunk_size": grid[0] / 10,
        "temporal_topk": 2,
        "spatial_chunk_size": sizes(7, 4),
        "spatial_topk": 6,
        "st_chunk_size": sizes(5, 7, 4),
        "st_topk": 18,
    }


# --- forwards ---------------------------------------------------------------------------------


class Forwards:
    """One model called as a pipeline would: two forwards a step, the timestep falling."""

    def __init__(self, case: Case, model: Any) -> None:
        make: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
        frames, height, width = case.grid
        self.model = model
        self.device = case.device
        self.latents = torch.randn(1, 16, frames, 2 * height, 2 * width, **make)
        self.text = torch.randn(1, 8 if case.tiny else TEXT, model.config.text_dim, **make)
        self.count = 0

    def __call__(self) -> torch.Tensor:
        # What is called by hand is told its step and branch by the timestep: a lower one is a new
        # step, the same one again the other branch.
        timestep = FIRST_TIMESTEP - self.count // FORWARDS_A_STEP
        self.count += 1
        out: torch.Tensor = self.model(
            hidden_states=self.latents,
            timestep=torch.tensor([timestep], device=self.device),
            encoder_hidden_states=self.text,
            return_dict=False,
        )[0]
        return out


@contextlib.contextmanager
def passed_by(cross_too: bool) -> Iterator[None]:
    """diffusers' attention replaced by its own input, in self-attention or everywhere."""
    original = wan.dispatch_attention_fn

    def dispatch(query: torch.Tensor, key: Any, value: torch.Tensor, **how: Any) -> torch.Tensor:
        if value.shape == query.shape:
            return value
        return query if cross_too else original(query, key, value, **how)

    wan.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        wan.dispatch_attention_fn = original


def without_attention(forwards: Forwards, cross_too: bool) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with passed_by(cross_too):
            return forwards()

    return run


SKIPPED, SELF_SKIPPED, DEFAULT = "attention passed by", "self-attention passed by", "diffusers"


def describe(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:300].replace("|", "/")


def measure(
    case: Case, model: torch.nn.Module, deadline: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Fill what is known of a case, handing it to ``keep`` at every stage."""
    found: dict[str, Any] = {"case": str(case), "failed": {}, "first_s": {}, "facts": {}}
    keep(found)
    plain = Forwards(case, twin_of(model))
    running: dict[str, Callable[[], torch.Tensor]] = {}
    single: dict[str, float] = {}
    handles: dict[str, Any] = {}

    def take(name: str, function: Callable[[], torch.Tensor]) -> None:
        """Forwards to warm up, and one that is timed roughly: SVG2 begins with long ones, of which
        each guidance branch has its own."""
        first: list[float] = []
        for _ in range(1 + (FORWARDS_A_STEP if name.startswith("svg2") else 1)):
            begun = time.perf_counter()
            out = function()
            if not case.tiny:
                torch.cuda.synchronize()
            first.append(time.perf_counter() - begun)
        if not bool(torch.isfinite(out).all()):
            raise ArithmeticError("the output is not finite")
        found["first_s"][name] = round(first[0], 2)
        single[name] = first[-1] * 1000
        running[name] = function

    def attempt(name: str, make: Callable[[], Callable[[], torch.Tensor]]) -> None:
        try:
            take(name, make())
        except Exception as problem:
            found["failed"][name] = describe(problem)
            handles.pop(name, None)

    def bridged(name: str, backend: str, config: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        forwards = Forwards(case, twin_of(model))
        handles[name] = polyattn.apply(forwards.model, backend=backend, config=dict(config))
        return forwards

    attempt(DEFAULT, lambda: plain)
    attempt(SKIPPED, lambda: without_attention(plain, cross_too=True))
    attempt(SELF_SKIPPED, lambda: without_attention(plain, cross_too=False))
    for name, (backend, config) in backends(case).items():
        if time.monotonic() > deadline - 5:
            found["failed"][name] = "no time left"
            continue
        attempt(name, lambda each=(name, backend, config): bridged(*each))
        found["single_ms"] = single
        keep(found)

    round_s = sum(single.values()) / 1000
    left = deadline - time.monotonic()
    repeats = min(case.repeats, int(left / max(round_s, 1e-6) / 2))
    if repeats < 1:
        found["ms"], found["timed"] = dict(single), "one forward each, for want of time"
    elif case.tiny:
        times = cpu_microseconds(running, number=1, repeats=repeats, warmup=1)
        found["ms"] = {name: value / 1000 for name, value in times.items()}
        found["timed"] = f"least of {repeats}"
    else:
        found["ms"] = gpu_milliseconds(running, repeats=repeats, warmup=0)
        found["timed"] = f"median of {repeats}"
    keep(found)
    for name, handle in handles.items():
        found["facts"][name] = handle.report.to_dict()
        handle.restore()
    keep(found)


# --- report -----------------------------------------------------------------------------------

HEADINGS = ["attention", "density", "ms a forward", "x diffusers", "attention's share, %",
            f"{STEPS} steps, s", f"first {DENSE_STEPS} dense, s", "ran"]  # fmt: skip


def video_attention(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The report's row of video self-attention."""
    rows = found["facts"].get(name, [])
    return next((row for row in rows if row["role"] == "self"), {})


def rows(found: dict[str, Any]) -> list[list[str]]:
    times = found["ms"]
    free = times.get(SKIPPED)
    dense = [times[name] for name in (DEFAULT, "fa", "torch_sdpa") if name in times]
    made = []
    for name, value in times.items():
        told = video_attention(found, name)
        facts = told.get("facts", {})
        density = facts.get("density")
        seconds = FORWARDS_A_STEP * STEPS * value / 1000
        share = "-" if free is None or name == SKIPPED else f"{100 * (1 - free / value):.0f}"
        mixed = "-"
        if density is not None and dense:
            saved = FORWARDS_A_STEP * DENSE_STEPS * (min(dense) - value) / 1000
            mixed = f"{seconds + saved:.0f}"
        ran = [told.get("used"), facts.get("kernel"), facts.get("provider")]
        made.append([
            name, "-" if density is None else f"{float(density):.3f}", f"{value:.1f}",
            f"{times[DEFAULT] / value:.2f}" if DEFAULT in times else "-", share, f"{seconds:.0f}",
            mixed, ", ".join(str(each) for each in ran if each) or "-",
        ])  # fmt: skip
    return made


def section(found: dict[str, Any]) -> str:
    parts = [f"## {found['case']}"]
    if "skipped" in found:
        parts.append(found["skipped"])
    if "ms" in found:
        parts.append(f"Timed: {found['timed']}.\n\n{table(HEADINGS, rows(found))}")
    parts += [f"- {name}: {why}" for name, why in found.get("failed", {}).items()]
    return "\n\n".join(parts)


def summary(data: list[dict[str, Any]]) -> str:
    lines = []
    for found in data:
        if "ms" not in found:
            lines.append([found["case"], found.get("skipped", "not finished"), "", "", "", ""])
            continue
        lines += [[found["case"].partition(":")[0], *row[:4], row[5]] for row in rows(found)]
    headings = ["case", "attention", "density", "ms a forward", "x diffusers", f"{STEPS} steps, s"]
    return table(headings, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=210, help="stop after about this long")
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    parser.add_argument("--tiny", action="store_true", help="two layers on the CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    arguments.output.mkdir(parents=True, exist_ok=True)
    progress = arguments.output / "sparse_wan_steps.partial.json"
    progress.unlink(missing_ok=True)
    torch.manual_seed(0)
    data: list[dict[str, Any]] = []
    with torch.no_grad():
        model = build(arguments.tiny)
        for case in cases(arguments.tiny):
            if not re.search(arguments.only, str(case)):
                continue
            place = len(data)
            data.append({"case": str(case)})
            if deadline - time.monotonic() < LEAST_SECONDS:
                data[place]["skipped"] = "no time left"
                continue

            def keep(found: dict[str, Any], place: int = place) -> None:
                data[place] = found
                progress.write_text(json.dumps(data, indent=1, default=float))

            try:
                measure(case, model, deadline, keep)
            except Exception as problem:
                data[place]["skipped"] = describe(problem)
            progress.write_text(json.dumps(data, indent=1, default=float))
            print(f"{section(data[place])}\n", flush=True)
            if not arguments.tiny:
                torch.cuda.empty_cache()

    note = (
        "**The weights are random: these numbers are of speed, and say nothing about the quality "
        "of a video.** `WanTransformer3DModel` "
        + ("in miniature, float32 on the CPU" if arguments.tiny else
           f"as published for Wan 2.1 1.3B ({PUBLISHED['num_layers']} layers, bf16)")
        + ", eager, B=1. One forward is one guidance branch of one step; a video of "
        f"{STEPS} steps with guidance has {FORWARDS_A_STEP * STEPS} of them (text encoder and VAE "
        f"not counted). diffusers: its default attention, no polyattn. {SKIPPED}: every attention "
        "call returns its input, which bounds what any attention can gain, and gives the share of "
        f"the others; {SELF_SKIPPED}: the bound for sparse backends, which serve video "
        "self-attention and leave cross-attention dense. Sparse backends run in all steps and "
        f"layers; the column 'first {DENSE_STEPS} dense' has the fastest dense time in those "
        "steps, as sparse methods are commonly run. V-MoBA: the authors' parameters scaled to the "
        "grid, the three kinds of layers by turns. SVG2: the heaviest quarter of the clusters "
        "instead of a share of the mass, because random weights make no clusters; warm."
    )  # fmt: skip
    command = " ".join(["python bench/sparse_wan_steps.py", *sys.argv[1:]])
    data = json.loads(json.dumps(data, default=float))
    body = "\n\n".join([note, *(section(found) for found in data)])
    save(arguments.output, "sparse_wan_steps", "Wan steps with sparse video backends", command,
         body, data)  # fmt: skip
    print(summary(data))
    print("\nRandom weights: speed only, nothing about quality.")


if __name__ == "__main__":
    main()
