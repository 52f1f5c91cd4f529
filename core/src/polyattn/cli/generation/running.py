"""The long work of a generation: load, encode the prompt, denoise, decode, write.

Each stage is timed. The same plan on the same machine gives the same frames: the noise comes from a
generator on the CPU, seeded by the plan. The pipeline is private to the call, and what the call
changes in the process, it puts back.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyattn.cli.generation.output import write_text, write_video
from polyattn.cli.generation.planning import Plan
from polyattn.cli.generation.processes import together
from polyattn.errors import GenerateError, PolyattnError

__all__ = ["Progress", "Result", "run_generation"]

STAGES = ("load", "text", "denoise", "decode", "write")


class Progress(Protocol):
    """Told how far a generation is: the stage, and the steps done within ``denoise``."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Result:
    """A written video. ``attention`` has one mapping per row of the report, ready for JSON, and
    ``density`` is :attr:`polyattn.reporting.Report.density`."""

    plan: Plan
    path: Path
    seconds: dict[str, float]
    attention: list[dict[str, Any]]
    density: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "output": str(self.path),
            "report": None if plan.report is None else str(plan.report),
            "model": plan.model.location,
            "pipeline": plan.pipeline_class,
            "prompt": plan.prompt,
            "negative_prompt": plan.negative_prompt,
            "width": plan.width,
            "height": plan.height,
            "num_frames": plan.num_frames,
            "fps": plan.fps,
            "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale,
            "seed": plan.seed,
            "dtype": plan.dtype,
            "device": plan.device,
            "processes": plan.processes.count,
            "ulysses_degree": plan.processes.ulysses_degree,
            "ring_degree": plan.processes.ring_degree,
            "backend": plan.backend,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "attention": self.attention,
            "density": self.density,
            "notes": list(self.notes),
        }


class _Clock:
    """Seconds per stage; a stage lasts until the next one begins."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.stage: str | None = None
        self._progress = progress
        self._since = time.perf_counter()

    def begin(self, stage: str | None) -> None:
        now = time.perf_counter()
        if self.stage is not None:
            self.seconds[self.stage] += now - self._since
        self.stage, self._since = stage, now
        if stage is not None:
            self.tell(0, 1)

    def tell(self, done: int, total: int) -> None:
        if self._progress is not None and self.stage is not None:
            self._progress(self.stage, done, total)


def run_generation(plan: Plan, progress: Progress | None = None) -> Result | None:
    """Make the video of a plan; None in a process of several that does not write it.

    Raises :class:`~polyattn.errors.GenerateError` or another
    :class:`~polyattn.errors.PolyattnError`; nothing is left under the final name then.
    """
    import torch

    clock = _Clock(progress)
    # Loading draws random numbers, e.g. for weights that are overwritten; they are not the user's.
    with (
        torch.random.fork_rng(devices=[]),
        _memory_errors(plan),
        together(plan.processes, plan.device) as mesh,
    ):
        clock.begin("load")
        pipe = _load(plan)
        notes = [*plan.notes, *_attach_gates(pipe, plan), *_prompt_notes(pipe, plan)]
        with _attention(pipe, plan, mesh) as attention:
            clock.begin("text")
            frames = _run(pipe, plan, clock)
            rows, density = attention.rows(), attention.density()
            notes += attention.notes
    if not plan.processes.writes:
        return None
    if plan.processes.ulysses_degree > 1 and density is not None:
        notes.append("densities are those of the first process's heads")
    clock.begin("write")
    path = write_video(_as_bytes(frames), plan.output, plan.fps, overwrite=plan.overwrite)
    if path != plan.output:
        notes.append(f"{plan.output} was made by somebody else meanwhile; this video is {path}")
    clock.begin(None)
    result = Result(plan, path, clock.seconds, rows, density, tuple(notes))
    if plan.report is not None:
        text = json.dumps(result.to_dict(), indent=2) + "\n"
        write_text(text, plan.report, overwrite=plan.overwrite)
    return result


def _load(plan: Plan) -> Any:
    import diffusers
    import torch

    dtype = getattr(torch, plan.dtype)
    # Wan's VAE shows artefacts below float32; everything else, the text encoder too, is as asked.
    dtypes = dtype if dtype is torch.float32 else {"default": dtype, "vae": torch.float32}
    pipeline_class = getattr(diffusers, plan.pipeline_class)
    try:
        with _quiet_libraries(downloads=not plan.model.local):
            pipe = pipeline_class.from_pretrained(
                plan.model.location, torch_dtype=dtypes, local_files_only=plan.model.local
            )
    except PolyattnError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        if _is_out_of_memory(error):
            raise
        detail = " ".join(str(error).split())[:500]
        raise GenerateError(f"{plan.model.location} cannot be loaded: {detail}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(plan.device)


@contextlib.contextmanager
def _quiet_libraries(*, downloads: bool) -> Iterator[None]:
    """Keep loading bars and a deprecation that spans diffusers' versions off the screen."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [] if downloads else [diffusers_logging, transformers_logging]
    shown = [each for each in libraries if each.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _attach_gates(pipe: Any, plan: Plan) -> list[str]:
    """Put back the model's gates, which diffusers drops, where the backend takes a gate."""
    if plan.backend == "diffusers" or not plan.model.local:
        return []
    from polyattn.integrations.diffusers import attach_gates
    from polyattn.integrations.gates import saved_gates
    from polyattn.selection import asked_for

    wanted = None if plan.attention_backend == "auto" else plan.attention_backend
    spec = asked_for(wanted, "self", "model")
    if spec is None or "gate" not in spec.capabilities.extras:
        return []
    notes = []
    for name, model in pipe.components.items():
        if name.startswith("transformer") and model is not None:
            gates = saved_gates(Path(plan.model.location) / name)
            if gates:
                attach_gates(model, gates)
                notes.append(f"{name} has gates ({len(gates)} tensors), which {spec.name} uses")
    return notes


def _prompt_notes(pipe: Any, plan: Plan) -> list[str]:
    count = len(pipe.tokenizer(plan.prompt).input_ids)
    if count <= plan.max_sequence_length:
        return []
    return [
        f"the prompt has {count} tokens, and the model reads the first {plan.max_sequence_length}"
    ]


class _Attention(Protocol):
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]: ...

    def density(self) -> float | None: ...


class _Bridged:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.notes: tuple[str, ...] = handle.notes

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._handle.report.to_dict()
        return rows

    def density(self) -> float | None:
        density: float | None = self._handle.report.density
        return density


class _PassedThrough:
    notes: tuple[str, ...] = ()

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def rows(self) -> list[dict[str, Any]]:
        return self._rows

    def density(self) -> float | None:
        return None


@contextlib.contextmanager
def _attention(pipe: Any, plan: Plan, mesh: Any) -> Iterator[_Attention]:
    """Attach what computes attention, for the time of the block."""
    if plan.backend == "diffusers":
        from polyattn.cli.generation.passthrough import set_backend

        name = plan.attention_backend
        yield _PassedThrough([] if name is None else set_backend(pipe, name))
        return
    from polyattn.integrations.diffusers import apply

    handle = apply(
        pipe,
        plan.attention_backend,
        config=plan.attention_backend_config,
        cross_backend=plan.cross_attention_backend,
        mesh=mesh,
    )
    with handle:
        yield _Bridged(handle)


def _run(pipe: Any, plan: Plan, clock: _Clock) -> Any:
    """The frames ``[T, H, W, 3]``, float in 0 to 1; latents in a process that writes no video."""
    import torch

    total = plan.num_inference_steps

    def first_forward(*_: Any) -> None:
        if clock.stage == "text":
            clock.begin("denoise")
            clock.tell(0, total)

    def step_done(pipeline: Any, index: int, timestep: Any, tensors: Any) -> Any:
        clock.tell(index + 1, total)
        if index + 1 == len(pipeline.scheduler.timesteps):
            if plan.device.startswith("cuda"):
                torch.cuda.synchronize(plan.device)
            clock.begin("decode")
        return {}

    hooks = [
        model.register_forward_pre_hook(first_forward)
        for name, model in pipe.components.items()
        if name.startswith("transformer") and model is not None
    ]
    try:
        with torch.no_grad():
            output = pipe(
                prompt=plan.prompt,
                negative_prompt=plan.negative_prompt,
                width=plan.width,
                height=plan.height,
                num_frames=plan.num_frames,
                num_inference_steps=total,
                guidance_scale=plan.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(plan.seed),
                max_sequence_length=plan.max_sequence_length,
                output_type="np" if plan.processes.writes else "latent",
                callback_on_step_end=step_done,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return output.frames[0]


def _as_bytes(frames: Any) -> Any:
    """Frames as uint8, refusing numbers that are none."""
    import numpy as np

    if not np.isfinite(frames).all():
        share = 1 - float(np.isfinite(frames).mean())
        raise GenerateError(
            f"{share:.0%} of the video's values are not finite; nothing was written",
            hint="--dtype float32, or another --attention-backend",
        )
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


@contextlib.contextmanager
def _memory_errors(plan: Plan) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, PolyattnError) or not _is_out_of_memory(error):
            raise
        raise GenerateError(
            f"{plan.device} has too little memory for {plan.num_frames} frames of "
            f"{plan.width}x{plan.height} in {plan.dtype}",
            hint="a smaller --width, --height or --num-frames",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    told = "out of memory" in words or "can't allocate memory" in words
    return told or isinstance(error, MemoryError)
