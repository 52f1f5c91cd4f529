"""What each sparse method does to the videos of the demo model, against dense attention.

    python bench/sparse_quality.py --device cuda --autocast --seconds 170
    python bench/sparse_quality.py --device cpu --cases 4 --batch 2

A paired comparison: every row makes the same videos as dense attention does, of the same prompts
and the same seeds, and is compared with those: how far its frames are off (PSNR, SSIM), and in how
many videos the verdict of the prompt detector flipped, in each direction. Cases are those of
`demo_quality.py`, three with one object to one with two, fixed before anything is generated.

Rows take turns, one batch each, so that they see the same cases when the time is up; what is
finished is saved as it comes. The first control row leaves nothing out: it shows what other
kernels and another order of sums do on their own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, machine, save, table
from demo_quality import Case, generate, pair_cases, single_cases
from diffusers import WanPipeline

import polyattn
from polyattn_demo import generation_defaults, model_path
from polyattn_demo.contact_sheet import SHEET_FRAMES
from polyattn_demo.detector import Verdict, detect, judge

NAME = "sparse_quality"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHARE = 0.2  # of the steps that run dense, but for one row of each method
WARM_UP_STEPS = 5  # one of them dense where the share is 0.2


def variant(backend: str, *others: dict[str, Any], **config: Any) -> list[dict[str, Any]]:
    """Configurations of one backend that share `config`."""
    return [{"backend": backend, **config, **other} for other in others]


# The demo's grid is 9 x 16 x 16 tokens, so tiles, chunks and clusters are smaller than the methods'
# defaults: STA 9 x 4 x 4 tiles of 16 tokens, VSA 3 x 4 x 4 of at most 64 (its size is fixed),
# V-MoBA 9 slabs, 16 tubes or 48 boxes, SVG2 64 clusters of keys (36 tokens each).
ROWS = [
    *variant("vsa", {"sparsity": 0.0}, dense_steps=0),
    *variant("vsa", {"sparsity": 0.5}, {"sparsity": 0.75}, {"sparsity": 0.9}, dense_steps=SHARE),
    *variant("vsa", {"sparsity": 0.75}, dense_steps=0),
    *variant(
        "sta",
        {"window_size": [9, 3, 3]}, {"window_size": [5, 3, 3]}, {"window_size": [3, 3, 3]},
        tile_size=[1, 4, 4], dense_steps=SHARE,
    ),
    *variant("sta", {"window_size": [5, 3, 3]}, tile_size=[1, 4, 4], dense_steps=0),
    *variant(
        "vmoba",
        {"moba_threshold": 0.5}, {"moba_threshold": 0.25}, {"moba_threshold": 0.1},
        temporal_chunk_size=1, spatial_chunk_size=[4, 4], st_chunk_size=[3, 4, 4],
        dense_steps=SHARE,
    ),
    *variant(
        "vmoba", {"moba_threshold": 0.25}, temporal_chunk_size=1, spatial_chunk_size=[4, 4],
        st_chunk_size=[3, 4, 4], dense_steps=0,
    ),
    *variant(
        "svg2",
        {"top_p_kmeans": 0.9}, {"top_p_kmeans": 0.7}, {"top_p_kmeans": 0.5},
        num_q_centroids=24, num_k_centroids=64, dense_layers=0, dense_steps=SHARE,
    ),
    *variant(
        "svg2", {"top_p_kmeans": 0.7}, num_q_centroids=24, num_k_centroids=64, dense_layers=0,
        dense_steps=0,
    ),
]  # fmt: skip
TOLD_ONCE = ("tile_size", "temporal_chunk_size", "spatial_chunk_size", "st_chunk_size",
             "num_q_centroids", "num_k_centroids", "dense_layers")  # fmt: skip


# --- pictures compared ----------------------------------------------------------------------------


def psnr(videos: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Decibels for each video [B, T, 3, H, W] in [0, 1], mean over frames; equal frames: 100."""
    error = (videos - others).square().mean((-3, -2, -1)).clamp(min=1e-10)
    return (-10 * error.log10()).mean(-1)


def ssim(videos: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each video (Wang et al. 2004), mean over frames and channels.

    Gaussian window of 11 x 11 with a standard deviation of 1.5, K1 = .01, K2 = .03, no padding. In
    float64: variances are differences of near numbers, and convolutions in float32 may be TF32.
    """
    distance = torch.arange(-5, 6, device=videos.device, dtype=torch.float64)
    weights = (-distance.square() / (2 * 1.5**2)).exp()
    weights = weights / weights.sum()

    def blurred(images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(images, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    means = []
    for video, other in zip(videos, others, strict=True):
        x, y = (each.double().flatten(0, 1).unsqueeze(1) for each in (video, other))
        mean_x, mean_y = blurred(x), blurred(y)
        variance_x = blurred(x * x) - mean_x**2
        variance_y = blurred(y * y) - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        ratio = ratio / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
        means.append(ratio.mean())
    return torch.stack(means)


# --- verdicts compared ----------------------------------------------------------------------------


def at_most(k: int, n: int, p: float) -> float:
    """Probability of at most `k` of `n`, each with probability `p`."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or k >= n else 0.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))


def exact_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share by Clopper and Pearson."""

    def solve(count: int, target: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            if at_most(count, n, middle) > target:
                low = middle
            else:
                high = middle
        return low

    return (solve(k - 1, 0.975) if k else 0.0), (solve(k, 0.025) if k < n else 1.0)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p that flips go both ways alike."""
    flips = lost + gained
    return min(1.0, 2 * at_most(min(lost, gained), flips, 0.5)) if flips else 1.0


# --- rows -----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One configuration (dense attention without any) and what came of it so far."""

    config: dict[str, Any] | None
    cases: list[Case] = field(default_factory=list)
    verdicts: list[Future[Verdict]] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Per video, one entry for each batch."""
    attended: list[tuple[int, float, bool]] = field(default_factory=list)
    """Self-attention as the reports have it: calls, their density, whether by the method."""
    backends: set[str] = field(default_factory=set)
    providers: set[str] = field(default_factory=set)
    failure: str | None = None

    @property
    def label(self) -> str:
        if self.config is None:
            return "dense"
        words = [
            f"{name}={'x'.join(map(str, value)) if isinstance(value, list) else f'{value:g}'}"
            for name, value in self.config.items()
            if name not in ("backend", "dense_steps", *TOLD_ONCE)
        ]
        return " ".join([self.config["backend"], *words])

    @property
    def label_and_steps(self) -> str:
        return self.label if self.dense_steps in (SHARE, 1.0) else f"{self.label}, no dense steps"

    @property
    def dense_steps(self) -> float:
        return 1.0 if self.config is None else self.config["dense_steps"]

    def attach(self, pipeline: WanPipeline) -> polyattn.integrations.diffusers.Handle:
        if self.config is None:
            return polyattn.apply(pipeline, backend="torch_sdpa")
        config = {name: value for name, value in self.config.items() if name != "backend"}
        return polyattn.apply(pipeline, backend=self.config["backend"], config=config)

    def read_report(self, report: polyattn.Report) -> None:
        for row in report.rows:
            if row.role == "self":
                facts = row.facts
                by_method = "density" in facts
                self.attended.append((row.calls, facts.get("density", 1.0), by_method))
                self.backends.add(row.used)
                self.providers.update(str(facts.get("provider") or "").split(", "))
        self.providers.discard("")

    def density(self, of_method: bool) -> float:
        """Mean over the calls of the method, or over all self-attention of the run."""
        counted = [(calls, d) for calls, d, own in self.attended if own or not of_method]
        return sum(c * d for c, d in counted) / max(1, sum(c for c, _ in counted))

    def report(self, dense: Row) -> dict[str, Any]:
        found: dict[str, Any] = {
            "label": self.label, "config": self.config, "failure": self.failure,
            "n": len(self.cases), "dense_steps": self.dense_steps,
        }  # fmt: skip
        if not self.cases:
            return found
        right = [each.result().all_right for each in self.verdicts]
        other = [each.result().all_right for each in dense.verdicts[: len(right)]]
        for kind, objects in (("single", 1), ("pair", 2)):
            some = [r for r, c in zip(right, self.cases, strict=True)
                    if len(c.scene.things) == objects]  # fmt: skip
            found[kind] = [sum(some), len(some)]
        for count in ("colour", "shape", "motion"):
            found[count] = sum(getattr(each.result(), count) for each in self.verdicts)
        found |= {
            "seconds": round(min(self.seconds), 4),
            "backends": sorted(self.backends), "providers": sorted(self.providers),
            "density": round(self.density(True), 4) if self.config else 1.0,
            "density_of_run": round(self.density(False), 4),
        }  # fmt: skip
        if self.config is not None:
            pairs = list(zip(other, right, strict=True))
            lost, gained = pairs.count((True, False)), pairs.count((False, True))
            found |= {
                "psnr": round(statistics.fmean(self.psnr), 2),
                "psnr_lowest": round(min(self.psnr), 2),
                "ssim": round(statistics.fmean(self.ssim), 4),
                "lost": lost, "lost_interval": exact_interval(lost, len(pairs)),
                "gained": gained, "gained_interval": exact_interval(gained, len(pairs)),
                "p": round(mcnemar(lost, gained), 4),
                "flipped": [
                    {"prompt": case.scene.prompt, "seed": case.seed, "dense": before}
                    for case, (before, after) in zip(self.cases, pairs, strict=True)
                    if before != after
                ],
            }  # fmt: skip
        return found


class Comparison:
    """Turns of all rows over the cases, until they are done or the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.start = time.monotonic()
        self.dense = Row(None)
        self.rows = [row for row in map(Row, ROWS) if wanted(row, options.only)]
        self.turn_seconds: dict[str, float] = {}
        self.pages: dict[str, list[torch.Tensor]] = {}  # a few frames of the first turn, as bytes
        self.settings = generation_defaults()
        for name in ("prompt", "fps"):
            self.settings.pop(name, None)
        if options.steps:
            self.settings["num_inference_steps"] = options.steps
        singles = iter(single_cases(options.cases))
        pairs = iter(pair_cases(options.cases))
        self.cases = [next(pairs if i % 4 == 3 else singles) for i in range(options.cases)]
        self.pipeline = WanPipeline.from_pretrained(model_path()).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def run(self) -> None:
        batch = self.options.batch
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(self.cases), batch):
                part = self.cases[first : first + batch]
                expected = len(part) / batch
                if first and self.elapsed() + expected * self._longest_turn() > self._limit():
                    break
                dense = self._turn(self.dense, part, None, pool)
                if dense is None:
                    break
                for row in self.rows:
                    last = self.turn_seconds.get(row.label_and_steps, self._longest_turn())
                    if self.elapsed() + expected * last > self._limit():
                        break
                    if row.failure is None:
                        self._turn(row, part, dense, pool)
                    if not first:
                        self.save(draw=False)
                self.save()
                if self.elapsed() > self._limit():
                    break

    def _limit(self) -> float:
        return self.options.seconds * 0.97

    def _longest_turn(self) -> float:
        return max(self.turn_seconds.values(), default=0.0)

    def _turn(
        self, row: Row, part: list[Case], dense: torch.Tensor | None, pool: ThreadPoolExecutor
    ) -> torch.Tensor | None:
        """One batch of one row; the videos, on their device."""
        try:
            if not row.cases and self.device.type == "cuda":  # compile first
                few = part if dense is None else part[:4]
                self._generate(row, few, {"num_inference_steps": WARM_UP_STEPS})
                row.attended.clear()
            start = time.monotonic()
            videos = self._generate(row, part, {})
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
            if dense is not None:
                row.psnr += psnr(videos, dense).tolist()
                row.ssim += ssim(videos, dense).tolist()
        except Exception:
            row.failure = traceback.format_exc()
            print(f"FAILED {row.label_and_steps}\n{row.failure}", flush=True)
            return None
        row.seconds.append(seconds / len(part))
        row.cases += part
        on_cpu = videos.cpu()
        for case, video in zip(part, on_cpu, strict=True):
            row.verdicts.append(pool.submit(_verdict, video, case))
        if row.label_and_steps not in self.pages:
            self.pages[row.label_and_steps] = [
                (video[list(SHEET_FRAMES)].clamp(0, 1) * 255).round().byte() for video in on_cpu
            ]
        self.turn_seconds[row.label_and_steps] = time.monotonic() - start
        print(
            f"{self.elapsed():6.1f} s  {row.label_and_steps}: {len(part)} videos in "
            f"{seconds:.2f} s" + (f", PSNR {row.psnr[-1]:.1f}" if row.psnr else ""),
            flush=True,
        )
        return videos

    def _generate(self, row: Row, part: list[Case], other: dict[str, Any]) -> torch.Tensor:
        settings = {**self.settings, **other}
        with row.attach(self.pipeline) as handle:
            videos = generate(self.pipeline, part, settings, self.options.autocast)
            row.read_report(handle.report)
        return videos

    def save(self, draw: bool = True) -> None:
        """All there is so far; the results of another device or other rows stay as they are."""
        data = saved(self.options.results)
        part = data[" ".join([self.device.type, *self.options.only])] = {
            "machine": machine(),
            "settings": self.settings,
            "arithmetic": "bf16 autocast" if self.options.autocast else "float32",
            "batch": self.options.batch,
            "seconds": round(self.elapsed(), 1),
            "rows": [row.report(self.dense) for row in (self.dense, *self.rows)],
        }
        command = "python bench/sparse_quality.py " + shlex.join(portable(sys.argv[1:]))
        part["command"] = command
        title = "Sparse attention on the demo model, against dense"
        with contextlib.redirect_stdout(io.StringIO()):
            save(self.options.results, NAME, title, command, page(data), data)
        if draw and not self.options.only:
            self.draw()

    def draw(self) -> None:
        """Frames side by side, for the first case of one object and the first of two.

        The first that dense attention gets right, so that what is wrong is the method's doing.
        """
        chosen: dict[int, int] = {}
        first = self.dense.verdicts[: len(self.pages["dense"])]
        for index, verdict in enumerate(first):
            if verdict.result().all_right:
                chosen.setdefault(len(self.cases[index].scene.things), index)
        if chosen:
            picture(
                {
                    label: [frames[i] for _, i in sorted(chosen.items()) if i < len(frames)]
                    for label, frames in self.pages.items()
                },
                [self.cases[i].scene.prompt for _, i in sorted(chosen.items())],
                {
                    row.label_and_steps: f"density {row.density(True):.2f}, "
                    f"of the run {row.density(False):.2f}"
                    for row in self.rows
                },
                self.options.images / f"{NAME}.png",
            )


def _verdict(video: torch.Tensor, case: Case) -> Verdict:
    return judge(detect(video), case.scene)


# --- for people -----------------------------------------------------------------------------------


HEADINGS = (
    "method", "dense steps", "density", "of the run", "PSNR", "SSIM", "one object", "two", "lost",
    "gained", "p", "s a video", "kernel",
)  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """The tables, the GPU's first."""
    parts = [
        "Each row makes the same videos as dense attention, of the same prompts and seeds, and is "
        "compared with them. Grid 9 x 16 x 16 tokens; tiles of STA 1 x 4 x 4, of VSA 4 x 4 x 4, "
        "chunks of V-MoBA 1 frame, 4 x 4 and 3 x 4 x 4, clusters of SVG2 24 and 64, no dense "
        "layers. Dense steps: the share of first steps that run dense. Density: attended share of "
        "all pairs, of the method's calls and of all self-attention of the run. PSNR and SSIM: "
        "mean over frames, then over videos. Right: colour, shape and motion of all objects. Lost: "
        "right with dense attention and wrong here; gained: the reverse; each with the exact 95 % "
        "interval of its share of all videos. p: exact McNemar test. Seconds: per video of the "
        "fastest batch, without loading, compiling and judging; the demo is small, so they say "
        "nothing about speed at video sizes.",
    ]
    for device in sorted(data, reverse=True):
        part = data[device]
        where = part["machine"].get("gpu") if device.startswith("cuda") else part["machine"]["cpu"]
        parts += [
            f"## {where}",
            f"{part['settings']['num_inference_steps']} steps, {part['arithmetic']}, batch "
            f"{part['batch']}, torch {part['machine']['torch']}, commit "
            f"{part['machine']['commit']}: `{part['command']}`",
            table(
                HEADINGS,
                [_cells(row) for row in part["rows"]],
            ),
        ]  # fmt: skip
        parts += [
            f"{row['label']}, dense steps {row['dense_steps']}, failed (all of it in the JSON "
            "file):\n\n```\n" + "\n".join(row["failure"].strip().splitlines()[-4:]) + "\n```"
            for row in part["rows"]
            if row["failure"]
        ]
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    steps = "all" if row["config"] is None else f"{row['dense_steps']:g}"
    if not row["n"]:
        return [row["label"], steps, "failed" if row["failure"] else "not run", *[""] * 10]

    def flips(name: str) -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]} ({100 * low:.1f} to {100 * high:.1f} %)"

    dense = row["config"] is None
    return [
        row["label"], steps, f"{row['density']:.3f}", f"{row['density_of_run']:.3f}",
        "" if dense else f"{row['psnr']:.1f}", "" if dense else f"{row['ssim']:.3f}",
        "{} of {}".format(*row["single"]), "{} of {}".format(*row["pair"]),
        "" if dense else flips("lost"), "" if dense else flips("gained"),
        "" if dense else f"{row['p']:.3g}", f"{row['seconds']:.3g}",
        ", ".join(row["providers"]) or "dense",
    ]  # fmt: skip


def picture(
    pages: dict[str, list[torch.Tensor]],
    prompts: Sequence[str],
    captions: dict[str, str],
    path: Path,
) -> None:
    """A row of frames for each label, a column for each prompt; below 400 kB. Needs Pillow."""
    from PIL import Image, ImageDraw

    size, label_width, line, gap = 64, 250, 16, 6
    strip = len(SHEET_FRAMES) * size
    width = label_width + len(prompts) * (strip + gap)
    sheet = Image.new("RGB", (width, line + gap + len(pages) * (size + 2)), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        pen.text((label_width + column * (strip + gap), 2), prompt, fill=(235, 235, 235))
    for index, (label, videos) in enumerate(pages.items()):
        top = line + gap + index * (size + 2)
        method, _, rest = label.partition(" ")
        pen.text((gap, top + 8), method, fill=(235, 235, 235))
        pen.text((gap, top + 24), rest, fill=(175, 175, 175))
        pen.text((gap, top + 40), captions.get(label, ""), fill=(175, 175, 175))
        for column, frames in enumerate(videos):
            for i, frame in enumerate(frames):
                image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((size, size))
                sheet.paste(image, (label_width + column * (strip + gap) + i * size, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = 0  # as it is, or else with fewer and fewer colours
    while True:
        shown = sheet.quantize(colours, dither=Image.Dither.NONE) if colours else sheet
        shown.save(path, optimize=True)
        if path.stat().st_size < 400_000 or colours == 32:
            return
        colours = colours // 2 or 256


def plot(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """PSNR over the density of the run, a line for each method; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=110)
    shown = [row for row in rows if row["config"] and row["n"] and row["density"] < 1]
    for index, backend in enumerate(dict.fromkeys(row["config"]["backend"] for row in shown)):
        own = [row for row in shown if row["config"]["backend"] == backend]
        for dense, style in ((True, "o-"), (False, "x")):
            points = sorted(
                (r["density_of_run"], r["psnr"]) for r in own if (r["dense_steps"] > 0) == dense
            )
            if points:
                name = backend if dense else f"{backend}, no dense steps"
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=name)
    axes.set_xlabel("attended share of all pairs, whole run")
    axes.set_ylabel("PSNR against dense, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


# --- the command ----------------------------------------------------------------------------------


def wanted(row: Row, only: Sequence[str]) -> bool:
    return not only or any(re.search(each, row.label_and_steps) for each in only)


def saved(folder: Path) -> dict[str, Any]:
    """What earlier runs found, by device."""
    path = folder / f"{NAME}.json"
    known: dict[str, Any] = json.loads(path.read_text())["data"] if path.is_file() else {}
    return known


def portable(arguments: Sequence[str]) -> list[str]:
    """The command as anyone would give it: without folders of this machine."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(("--results", "--images")):
            kept.append(argument)
        skip = argument in ("--results", "--images")
    return kept


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=int, default=1200, help="at most, of both kinds together")
    parser.add_argument("--batch", type=int, default=40, help="cases of one turn")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop in time for this")
    parser.add_argument("--steps", type=int, help="sampling steps, if not the model's own")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast, not float32")
    parser.add_argument("--only", nargs="*", default=[], metavar="REGEX",
                        help="rows whose label matches; saved beside all rows")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument("--redraw", action="store_true", help="table and plot of what is saved")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if not options.redraw:
        Comparison(options).run()
    data = saved(options.results)
    part = data.get("cuda") or data.get("cpu") or next(iter(data.values()), None)
    if part is None:
        sys.exit("nothing was finished, so there is nothing to show")
    if options.redraw:
        print(page(data))
    drawn = plot(part["rows"], options.images / f"{NAME}_psnr.png")
    for device in data:
        print(f"\n{device}, {data[device]['seconds']} s, n = {data[device]['rows'][0]['n']}")
        print(" | ".join(HEADINGS[:-1]))
        for row in data[device]["rows"]:
            print(" | ".join(_cells(row)[:-1]))
    if not drawn:
        print("no plot: matplotlib is not installed here; --redraw makes it from what is saved")


if __name__ == "__main__":
    main()
