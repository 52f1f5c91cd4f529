"""How often the demo model draws what its prompt asks for, by image analysis, with intervals.

    python bench/demo_quality.py --device cuda

Every prompt and seed is fixed here, before anything is generated: the 240 single-object prompts in
turn (pair i has seed 10000 + i), then two-object prompts drawn once by a seeded generator (seed
50000 + i). None is left out, and every miss is listed. The videos come from the saved folder
through `WanPipeline.from_pretrained`, at the settings in the folder's `polyattn_defaults.json`
unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import commit
from diffusers import WanPipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo" / "src"))

from polyattn_demo import DEFAULTS_FILE, model_path  # noqa: E402
from polyattn_demo.clips import SINGLE_SCENES, Scene, draw_pair  # noqa: E402
from polyattn_demo.contact_sheet import contact_sheet  # noqa: E402
from polyattn_demo.detector import Detection, Verdict, detect, judge  # noqa: E402

COUNTS = ("colour", "shape", "motion", "all_right")
SINGLE_SEED, PAIR_SEED, PAIR_DRAW = 10_000, 50_000, 20261122


@dataclass(frozen=True)
class Case:
    """One prompt with its seed."""

    scene: Scene
    seed: int


def single_cases(count: int) -> list[Case]:
    """Prompts in turn, in an order that mixes colours, shapes and motions from the start."""
    order = list(SINGLE_SCENES)
    random.Random(PAIR_DRAW).shuffle(order)
    return [Case(order[i % len(order)], SINGLE_SEED + i) for i in range(count)]


def pair_cases(count: int) -> list[Case]:
    rng = random.Random(PAIR_DRAW)
    return [Case(draw_pair(rng), PAIR_SEED + i) for i in range(count)]


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def generate(
    pipeline: WanPipeline, cases: list[Case], settings: dict[str, Any], autocast: bool
) -> torch.Tensor:
    """Videos [B, T, 3, H, W]. Noise is drawn on the CPU, so it is the same on every device."""
    device = pipeline.transformer.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        output = pipeline(
            prompt=[case.scene.prompt for case in cases],
            generator=[torch.Generator("cpu").manual_seed(case.seed) for case in cases],
            output_type="pt",
            **settings,
        )
    return output.frames.float()


@dataclass
class Outcome:
    """The cases of one kind with what was found in their videos."""

    cases: list[Case]
    found: list[Detection]
    verdicts: list[Verdict]
    seconds: float

    def rate(self, count: str) -> dict[str, Any]:
        right = sum(getattr(verdict, count) for verdict in self.verdicts)
        low, high = wilson(right, len(self.cases))
        share = right / max(1, len(self.cases))
        return {
            "right": right,
            "n": len(self.cases),
            "percent": round(100 * share, 2),
            "interval": [round(100 * low, 2), round(100 * high, 2)],
        }

    def by(self, field: str) -> dict[str, list[int]]:
        """All-right videos and their number, for each value of a field (single objects)."""
        table: dict[str, list[int]] = {}
        for case, verdict in zip(self.cases, self.verdicts, strict=True):
            row = table.setdefault(getattr(case.scene.things[0], field), [0, 0])
            row[0] += verdict.all_right
            row[1] += 1
        return table

    def misses(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt": case.scene.prompt,
                "seed": case.seed,
                "found": detection.summary,
                "wrong": [name for name in COUNTS[:3] if not getattr(verdict, name)],
            }
            for case, detection, verdict in zip(self.cases, self.found, self.verdicts, strict=True)
            if not verdict.all_right
        ]

    def report(self) -> dict[str, Any]:
        overlaps = [detection.overlap for detection in self.found]
        return {
            **{count: self.rate(count) for count in COUNTS},
            "clean": sum(detection.clean for detection in self.found),
            "mean_overlap": round(sum(overlaps) / max(1, len(overlaps)), 4),
            "seconds": round(self.seconds, 1),
            "misses": self.misses(),
        }


def evaluate(
    pipeline: WanPipeline,
    cases: list[Case],
    settings: dict[str, Any],
    *,
    batch: int,
    autocast: bool,
    keep: int,
) -> tuple[Outcome, list[torch.Tensor]]:
    """Generate and judge every case; the first `keep` videos are handed back."""
    kept: list[torch.Tensor] = []
    start = time.monotonic()
    # Detection runs on the CPU beside the generation of the next batch.
    with ThreadPoolExecutor() as pool:
        waiting: list[Future[Detection]] = []
        for first in range(0, len(cases), batch):
            for video in generate(pipeline, cases[first : first + batch], settings, autocast).cpu():
                waiting.append(pool.submit(detect, video))
                if len(kept) < keep:
                    kept.append(video)
            print(f"  {len(waiting)} of {len(cases)}, {time.monotonic() - start:.0f} s", flush=True)
        found = [each.result() for each in waiting]
    verdicts = [judge(seen, case.scene) for seen, case in zip(found, cases, strict=True)]
    return Outcome(cases, found, verdicts, time.monotonic() - start), kept


def environment(device: torch.device) -> dict[str, str]:
    cuda = device.type == "cuda"
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "python": platform.python_version(),
        **packages,
        "commit": commit(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    env, settings = report["environment"], report["settings"]
    lines = [
        "# Quality of the demo model",
        "",
        f"Machine: {env['device']}; Python {env['python']}, torch {env['torch']}, "
        f"diffusers {env['diffusers']}, transformers {env['transformers']}; "
        f"commit: {env['commit']}; arithmetic: {report['arithmetic']}.",
        "",
        f"Command: `{report['command']}`",
        "",
        f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items())}; "
        f"flow shift {report['flow_shift']}; attention: {report['attention']}.",
        "",
        "| prompts | count | right | n | share | 95 % interval (Wilson) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in ("single", "pair"):
        for count in COUNTS:
            rate = report[kind][count]
            low, high = rate["interval"]
            lines.append(
                f"| {kind} | {count.replace('_', ' ')} | {rate['right']} | {rate['n']} "
                f"| {rate['percent']:.2f} % | {low:.2f} to {high:.2f} % |"
            )
    for kind in ("single", "pair"):
        lines += ["", f"## Misses, {kind} ({len(report[kind]['misses'])})", ""]
        lines += [
            f'- "{miss["prompt"]}", seed {miss["seed"]}: {miss["found"]}'
            for miss in report[kind]["misses"]
        ] or ["none"]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="pipeline folder (default: the shipped one)")
    parser.add_argument("--single", type=int, default=1200, help="single-object cases")
    parser.add_argument("--pair", type=int, default=400, help="two-object cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--max-sequence-length", type=int)
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast, not float32")
    parser.add_argument("--attention-backend", help="run attention through polyattn")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "demo_quality")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first videos here")
    return parser.parse_args()


def generation_settings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / DEFAULTS_FILE).read_text("utf-8"))
    for other in ("prompt", "fps"):
        settings.pop(other, None)
    given = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "max_sequence_length": options.max_sequence_length,
    }
    return {**settings, **{name: value for name, value in given.items() if value is not None}}


def main() -> None:
    options = parse_arguments()
    folder = options.model or model_path()
    device = torch.device(options.device)
    settings = generation_settings(options, folder)
    pipeline = WanPipeline.from_pretrained(folder).to(device)  # float32: the default
    pipeline.set_progress_bar_config(disable=True)
    if options.attention_backend:
        import polyattn

        polyattn.apply(pipeline, backend=options.attention_backend)

    outcomes: dict[str, Outcome] = {}
    sheet: list[tuple[torch.Tensor, str]] = []
    kinds = (("single", single_cases(options.single), 21), ("pair", pair_cases(options.pair), 9))
    for kind, cases, keep in kinds:
        print(kind, flush=True)
        outcome, kept = evaluate(
            pipeline, cases, settings, batch=options.batch, autocast=options.autocast,
            keep=keep if options.sheet else 0,
        )  # fmt: skip
        outcomes[kind] = outcome
        sheet += [(v, case.scene.prompt) for v, case in zip(kept, cases, strict=False)]

    report = {
        "command": " ".join(["python", "bench/demo_quality.py", *_portable(sys.argv[1:])]),
        "environment": environment(device),
        "arithmetic": "bf16 autocast" if options.autocast else "float32",
        "attention": f"polyattn {options.attention_backend}"
        if options.attention_backend
        else "diffusers' own",
        "settings": settings,
        "flow_shift": pipeline.scheduler.config.flow_shift,
        "batch": options.batch,
        "draw": {"single_seed": SINGLE_SEED, "pair_seed": PAIR_SEED, "pair_draw": PAIR_DRAW},
        **{kind: outcome.report() for kind, outcome in outcomes.items()},
        "single_by_shape": outcomes["single"].by("shape"),
        "single_by_motion": outcomes["single"].by("motion"),
        "single_by_colour": outcomes["single"].by("colour"),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    text = markdown(report)
    options.output.with_suffix(".md").write_text(text, "utf-8")
    print(text)
    if options.sheet:
        contact_sheet([v for v, _ in sheet], [label for _, label in sheet], options.sheet)


def _portable(arguments: list[str]) -> list[str]:
    """The command as anyone would give it: without folders of this machine."""
    private = ("--model", "--output", "--sheet")
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in private:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in private)):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
