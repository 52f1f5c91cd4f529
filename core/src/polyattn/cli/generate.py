"""``polyattn generate``: make a video, and say which backend ran where.

What is wrong with the request shows before anything slow happens, as one message. stdout gets the
settings, the table of what ran, and on its last line the path of the video (with ``--json`` one
object, with ``--quiet`` the path alone); the progress bar is on stderr. Ctrl-C ends with 130,
SIGTERM with 143, and neither leaves a file behind. Under ``torchrun`` several processes make one
video, and the first of them speaks and writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from polyattn.cli.output import Page, json_option
from polyattn.errors import PolyattnError

if TYPE_CHECKING:
    from polyattn.cli.generation import Plan, Result

__all__ = ["generate"]

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
STAGE_WORDS = {
    "load": "loading the model",
    "text": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "write": "writing",
}


@click.command()
@click.option(
    "--model-path",
    metavar="PATH_OR_ID",
    help="Folder of a diffusers model, or its id on the Hub.  [default: the demo model]",
)
@click.option("--prompt", help="What the video shows.")
@click.option("--negative-prompt", help="What it should not show.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--num-frames", type=int, help="Length in frames.")
@click.option("--num-inference-steps", type=int, help="Denoising steps.")
@click.option("--guidance-scale", type=float, help="How strongly the prompt guides; up to 1: off.")
@click.option("--fps", type=float, help="Frames a second of the file.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Start of the noise: one seed, one video.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Precision; auto: float32 on a CPU.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps, ...; auto: the best one here.",
)
@click.option(
    "--output",
    default="polyattn.mp4",
    show_default=True,
    metavar="FILE",
    help="Where to write: .mp4 or .gif.",
)
@click.option("--overwrite/--no-overwrite", default=False, help="Replace existing files.")
@click.option(
    "--backend",
    type=click.Choice(["polyattn", "diffusers"]),
    default="polyattn",
    show_default=True,
    help="Whose attention backends are named.",
)
@click.option(
    "--attention-backend", metavar="NAME", help="Backend of the denoisers.  [default: automatic]"
)
@click.option(
    "--attention-backend-config",
    metavar="CONFIG",
    help="Its parameters: a JSON or YAML file, JSON text, or key=value pairs.",
)
@click.option(
    "--cross-attention-backend", metavar="NAME", help="Another backend for cross-attention."
)
@click.option(
    "--allow-download",
    is_flag=True,
    help="With --backend diffusers: let it download kernels from the Hub.",
)
@click.option(
    "--ulysses-degree",
    type=int,
    metavar="N",
    help="Under torchrun: processes that share the heads.  [default: all]",
)
@click.option(
    "--ring-degree",
    type=int,
    metavar="N",
    help="Under torchrun: processes that pass keys and values on.  [default: 1]",
)
@click.option("--report", metavar="FILE", help="Also write settings, times and what ran as JSON.")
@click.option("--no-report", is_flag=True, help="Leave out the table of what ran.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no words: only the path.")
@json_option
def generate(
    as_json: bool, quiet: bool, no_report: bool, report: str | None, **options: Any
) -> None:
    """Make a video, and say which backend ran where.

    Sizes, steps and guidance default to what the model folder recommends
    (polyattn_defaults.json), and otherwise to those of its family.
    """  # fmt: skip
    if no_report and report is not None:
        raise click.UsageError("--report and --no-report contradict each other")
    from polyattn.cli.generation import GenerationRequest, plan_generation, run_generation

    try:
        with _terminable(), _told_by_rank():
            plan = plan_generation(GenerationRequest(report=report, **options))
            quiet = quiet or not plan.processes.writes
            if not (quiet or as_json):
                _write_plan(Page(), plan)
            with _progress_bar(shown=not quiet) as progress:
                result = run_generation(plan, progress)
    except KeyboardInterrupt:
        click.echo("interrupted: no video was written", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    if result is None:  # another process writes it, and says so
        return
    if as_json:
        from polyattn.cli.output import emit

        emit(result.to_dict(), True, lambda page: None)
        return
    if not quiet:
        _write_result(Page(), result, table=not no_report)
    click.echo(str(result.path))


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, so that nothing half-written stays."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(EXIT_TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _told_by_rank() -> Iterator[None]:
    """Let an error say which of several processes it is from."""
    try:
        yield
    except PolyattnError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            error.message = f"rank {os.environ.get('RANK')}: {error.message}"
            error.args = (f"rank {os.environ.get('RANK')}: {error}",)
        raise


@contextlib.contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=bars.tasks[task].total)
                tasks[stage] = bars.add_task(STAGE_WORDS[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress
        for task in tasks.values():
            bars.update(task, completed=bars.tasks[task].total)


def _write_plan(page: Page, plan: Plan) -> None:
    page.facts(
        {
            "model": f"{plan.model.location} ({plan.pipeline_class})",
            "prompt": plan.prompt,
            "negative prompt": plan.negative_prompt,
            "video": f"{plan.num_frames} frames of {plan.width}x{plan.height}, {plan.fps:g} fps",
            "sampling": f"{plan.num_inference_steps} steps, guidance {plan.guidance_scale:g}, "
            f"seed {plan.seed}",
            "runs on": f"{plan.device}, {plan.dtype}",
            **({"processes": str(plan.processes)} if plan.processes.count > 1 else {}),
        }
    )


def _write_result(page: Page, result: Result, *, table: bool) -> None:
    words = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    page.facts({"took": words})
    for note in result.notes:
        page.facts({"note": note})
    if table:
        page.line()
        _write_attention(page, result)
        page.line()


def _write_attention(page: Page, result: Result) -> None:
    plan, rows = result.plan, result.attention
    if plan.backend == "diffusers":
        if plan.attention_backend is None:
            page.line("attention: diffusers' own default backend")
            return
        page.table(
            ("component", "attention modules", "backend of diffusers"),
            [(row["component"], str(row["modules"]), row["used"]) for row in rows],
        )
        return
    from polyattn.reporting import density_words, ranges

    several = len({row["component"] for row in rows}) > 1
    columns = ("role", "layers", "steps", "requested", "used", "kernel", "why")
    page.table(
        ("component", *columns) if several else columns,
        [
            (
                *((row["component"],) if several else ()),
                row["role"],
                ranges(row["layers"]),
                ranges(row["steps"]),
                row["requested"] or "automatic",
                row["used"],
                *_kernel_and_why(row),
            )
            for row in rows
        ],
    )
    if result.density is not None:
        page.line(density_words(result.density))


def _kernel_and_why(row: dict[str, Any]) -> tuple[str, str]:
    """Two cells. What else the backend told of itself, e.g. its density, stands in the second."""
    facts = dict(row.get("facts", {}))
    kernel = next((facts.pop(name) for name in ("kernel", "provider") if name in facts), "")
    words = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
    )
    return str(kernel), row["why"] + (f" ({words})" if words else "")
