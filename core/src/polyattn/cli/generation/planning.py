"""Everything about a generation that can be wrong, checked before anything slow happens.

:func:`plan_generation` turns a :class:`GenerationRequest`, where what is None was not given, into a
:class:`Plan`, where everything is decided. Values come from the request, then from the model
folder's own ``polyattn_defaults.json``, then from the family's defaults. No size is ever rounded:
one the model cannot make is an error that names the nearest that it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyattn.cli.generation.folder import DEFAULTS_FILE, ModelFolder, open_model
from polyattn.cli.generation.output import (
    MAXIMUM_GIF_FPS,
    SUFFIXES,
    check_destination,
    check_space,
)
from polyattn.cli.generation.processes import ALONE, Processes, processes_of
from polyattn.contract import AttentionRequest
from polyattn.errors import GenerateError, nearest

__all__ = ["DTYPES", "GenerationRequest", "Plan", "plan_generation"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST_SEED = 2**63 - 1
LARGEST_SIDE = 16384
LONGEST_VIDEO = 100_000


@dataclass(frozen=True)
class PipelineFamily:
    """A pipeline class that can be run from a prompt alone.

    ``side_multiple`` is what the pipeline itself demands of width and height, beside what follows
    from its VAE and patches.
    """

    defaults: Mapping[str, Any]
    side_multiple: int


FAMILIES = {
    "WanPipeline": PipelineFamily(
        defaults={
            "width": 832, "height": 480, "num_frames": 81, "fps": 16, "num_inference_steps": 50,
            "guidance_scale": 5.0, "max_sequence_length": 512, "negative_prompt": None,
            "prompt": None,
        },
        side_multiple=16,
    ),
}  # fmt: skip

# Where else to turn for pipelines that need more than a prompt.
NEEDS_MORE = {
    "WanImageToVideoPipeline": "an image",
    "WanVideoToVideoPipeline": "a video",
    "WanVACEPipeline": "control frames",
}


@dataclass(frozen=True)
class GenerationRequest:
    """What the user gave; None is "not given"."""

    model_path: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    fps: float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    output: str | Path = "polyattn.mp4"
    overwrite: bool = False
    backend: str = "polyattn"
    attention_backend: str | None = None
    attention_backend_config: Any = None
    cross_attention_backend: str | None = None
    allow_download: bool = False
    report: str | Path | None = None
    ulysses_degree: int | None = None
    ring_degree: int | None = None


@dataclass(frozen=True)
class Plan:
    """A generation with everything decided. ``notes`` tell what the reader may not expect."""

    model: ModelFolder
    pipeline_class: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    fps: float
    seed: int
    dtype: str
    device: str
    output: Path
    overwrite: bool
    backend: str
    attention_backend: str | None
    attention_backend_config: Any
    cross_attention_backend: str | None
    report: Path | None
    processes: Processes = ALONE
    notes: tuple[str, ...] = field(default=())


def plan_generation(request: GenerationRequest) -> Plan:
    """Decide everything, or raise the :class:`~polyattn.errors.PolyattnError` of what is wrong."""
    processes = processes_of(request.ulysses_degree, request.ring_degree)
    model = open_model(request.model_path)
    class_name = model.class_name()
    family = _family(class_name, model)
    values, notes = _values(request, model, family)
    parts = _Parts.read(model, class_name)
    _check_numbers(request, values, parts)
    _check_size(values, parts, family)
    output = _check_output(request, values, processes)
    if values["prompt"] is None:
        raise GenerateError("there is no prompt", hint='--prompt "a red circle moving left"')
    _check_packages(output)
    device = _device(request.device, processes)
    dtype = _dtype(request.dtype, device)
    _check_attention(request, values, parts, device, dtype, processes)
    return Plan(
        model=model,
        pipeline_class=class_name,
        seed=request.seed,
        dtype=dtype,
        device=device,
        output=output,
        overwrite=request.overwrite,
        backend=request.backend,
        attention_backend=request.attention_backend,
        attention_backend_config=request.attention_backend_config,
        cross_attention_backend=request.cross_attention_backend,
        report=Path(request.report) if request.report is not None else None,
        processes=processes,
        notes=tuple(notes),
        **values,
    )


def _family(class_name: str, model: ModelFolder) -> PipelineFamily:
    family = FAMILIES.get(class_name)
    if family is not None:
        return family
    supported = f"polyattn generate runs {', '.join(FAMILIES)}"
    if class_name in NEEDS_MORE:
        raise GenerateError(
            f"{model.location} is a {class_name}, which needs {NEEDS_MORE[class_name]} beside the "
            f"prompt; {supported}",
            hint="polyattn.apply(pipe) in Python, which serves it too",
        )
    raise GenerateError(
        f"{model.location} is a {class_name}, a family that is not supported yet; {supported}"
    )


def _values(
    request: GenerationRequest, model: ModelFolder, family: PipelineFamily
) -> tuple[dict[str, Any], list[str]]:
    """The numbers and texts of a run, each from the first place that gives it."""
    from_model = model.read_json(DEFAULTS_FILE) or {}
    for name, value in from_model.items():
        example = family.defaults.get(name, "text") if name in family.defaults else None
        if example is None and name not in ("prompt", "negative_prompt"):
            continue
        wanted = str if name in ("prompt", "negative_prompt") else type(example)
        _check_kind(name, value, wanted, f"{DEFAULTS_FILE} of {model.location}")
    unknown = sorted(set(from_model) - set(family.defaults))
    notes = [f"{DEFAULTS_FILE} of the model has {name!r}, which is not used" for name in unknown]
    values = {}
    for name, fallback in family.defaults.items():
        given = getattr(request, name, None)
        values[name] = given if given is not None else from_model.get(name, fallback)
    return values, notes


def _check_kind(name: str, value: Any, wanted: type, where: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        str: value is None or isinstance(value, str),
        int: number and (isinstance(value, int) or name == "fps"),
        float: number,
    }[wanted]
    if not fits:
        raise GenerateError(f"{where} gives {name}={value!r}, expected {wanted.__name__}")


@dataclass(frozen=True)
class _Parts:
    """What the model's configuration files say about sizes and attention."""

    transformers: tuple[Mapping[str, Any], ...]
    spatial_scale: int
    temporal_scale: int
    train_steps: int

    @classmethod
    def read(cls, model: ModelFolder, class_name: str) -> _Parts:
        index = model.read_json("model_index.json") or {}
        transformers = []
        for name in ("transformer", "transformer_2"):
            if (index.get(name) or [None])[0] is None:
                continue
            config = model.read_json(f"{name}/config.json")
            if config is None:
                raise GenerateError(
                    f"{model.location} is incomplete: model_index.json names {name}, and "
                    f"{name}/config.json is missing"
                )
            transformers.append(config)
        if not transformers:
            raise GenerateError(f"model_index.json of {model.location} names no transformer")
        vae = model.read_json("vae/config.json")
        if vae is None:
            raise GenerateError(f"{model.location} is incomplete: vae/config.json is missing")
        scheduler = model.read_json("scheduler/scheduler_config.json") or {}
        return cls(
            tuple(transformers),
            int(vae.get("scale_factor_spatial") or 8),
            int(vae.get("scale_factor_temporal") or 4),
            int(scheduler.get("num_train_timesteps") or 1000),
        )

    @property
    def patch(self) -> tuple[int, int, int]:
        time, height, width = self.transformers[0].get("patch_size", (1, 2, 2))
        return int(time), int(height), int(width)

    def grid(self, values: Mapping[str, Any]) -> tuple[int, int, int]:
        """Tokens in (T, H, W)."""
        frames = (values["num_frames"] - 1) // self.temporal_scale + 1
        sides = (values["height"] // self.spatial_scale, values["width"] // self.spatial_scale)
        time, height, width = self.patch
        return frames // time, sides[0] // height, sides[1] // width


def _check_numbers(request: GenerationRequest, values: dict[str, Any], parts: _Parts) -> None:
    steps, guidance, fps = (
        values["num_inference_steps"], values["guidance_scale"], values["fps"]
    )  # fmt: skip
    if not 1 <= steps <= parts.train_steps:
        raise GenerateError(
            f"--num-inference-steps is from 1 to {parts.train_steps}, found {steps}",
            hint="--num-inference-steps 20",
        )
    if not math.isfinite(guidance) or guidance < 0:
        raise GenerateError(
            f"--guidance-scale is a finite number of at least 0, found {guidance}",
            hint="--guidance-scale 5",
        )
    if not math.isfinite(fps) or not 0 < fps <= 240:
        raise GenerateError(f"--fps is from above 0 to 240, found {fps}", hint="--fps 16")
    if not 0 <= request.seed <= LARGEST_SEED:
        raise GenerateError(
            f"--seed is from 0 to {LARGEST_SEED}, found {request.seed}", hint="--seed 0"
        )
    if values["max_sequence_length"] < 1:
        raise GenerateError(f"max_sequence_length is at least 1, found it in {DEFAULTS_FILE} as "
                            f"{values['max_sequence_length']}")  # fmt: skip


def _check_size(values: dict[str, Any], parts: _Parts, family: PipelineFamily) -> None:
    patch_time, patch_height, patch_width = parts.patch
    for name, patch in (("width", patch_width), ("height", patch_height)):
        multiple = math.lcm(family.side_multiple, parts.spatial_scale * patch)
        _check_multiple(f"--{name}", values[name], multiple, 0, LARGEST_SIDE, "pixels")
    multiple = parts.temporal_scale * patch_time
    # The first latent frame is one frame; each further one is `temporal_scale` of them.
    first = 1 + parts.temporal_scale * (patch_time - 1)
    _check_multiple("--num-frames", values["num_frames"], multiple, first, LONGEST_VIDEO, "frames")
    limit = min(int(config.get("rope_max_seq_len", 1024)) for config in parts.transformers)
    grid = parts.grid(values)
    for name, tokens in zip(("--num-frames", "--height", "--width"), grid, strict=True):
        if tokens > limit:
            found = values[name[2:].replace("-", "_")]
            raise GenerateError(
                f"{name} {found} makes {tokens} positions, and the model has {limit}"
            )


def _check_multiple(
    option: str, value: int, multiple: int, offset: int, largest: int, unit: str
) -> None:
    """``value`` is ``offset`` plus a multiple, and positive."""
    lower = (value - offset) // multiple * multiple + offset
    if value == lower and 0 < value <= largest:
        return
    smallest = offset or multiple
    candidates = {min(max(each, smallest), largest) for each in (lower, lower + multiple)}
    rule = f"a multiple of {multiple}" + (f" plus {offset}" if offset else "")
    options = [
        (each - offset) // multiple * multiple + offset for each in sorted(candidates)
    ]  # fmt: skip
    raise GenerateError(
        f"{option} is {rule} for this model, up to {largest} {unit}; found {value}",
        hint=" or ".join(f"{option} {each}" for each in dict.fromkeys(options)),
    )


def _check_output(
    request: GenerationRequest, values: Mapping[str, Any], processes: Processes
) -> Path:
    output = Path(request.output).expanduser()
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise GenerateError(
            f"--output ends in {' or '.join(SUFFIXES)}, found {str(output)!r}",
            hint=f"--output {output.with_suffix('.mp4') if output.name else 'polyattn.mp4'}",
        )
    if suffix == ".gif" and values["fps"] > MAXIMUM_GIF_FPS:
        raise GenerateError(
            f"a GIF shows at most {MAXIMUM_GIF_FPS} frames a second, found --fps {values['fps']}",
            hint=f"--output {output.with_suffix('.mp4')}",
        )
    if not processes.writes:
        return output
    check_destination(output, overwrite=request.overwrite)
    check_space(output, values["num_frames"], values["height"], values["width"])
    if request.report is not None:
        report = Path(request.report).expanduser()
        if report.resolve() == output.resolve():
            raise GenerateError(f"--report and --output are the same file, {output}")
        check_destination(report, overwrite=request.overwrite, option="--report")
    return output


def _check_packages(output: Path) -> None:
    needed = ["torch", "diffusers", "transformers", "accelerate"]
    needed += ["PIL"] if output.suffix.lower() == ".gif" else ["imageio", "imageio_ffmpeg"]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise GenerateError(
            f"making a video needs {', '.join(missing)}, which is not installed",
            hint='pip install "polyattn[diffusers]"',
        )


def _device(asked: str, processes: Processes) -> str:
    """A device of this machine; ``auto`` takes CUDA (or ROCm), then MPS, then the CPU. Of several
    processes each takes its own device of the kind."""
    import torch

    present = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
               "mps": int(torch.backends.mps.is_available())}  # fmt: skip
    for name in ("xpu", "npu"):
        module = getattr(torch, name, None)
        available = module is not None and module.is_available()
        present[name] = module.device_count() if module is not None and available else 0
    if asked == "auto":
        asked = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if processes.count > 1 and asked != "cpu":
        if ":" in asked:
            raise GenerateError(
                f"of {processes.count} processes each takes its own device; found --device {asked}",
                hint=f"--device {asked.partition(':')[0]}",
            )
        asked = f"{asked}:{processes.local_rank}"
    kind, separator, index = asked.partition(":")
    here = ", ".join(name for name, count in present.items() if count)
    if kind not in present:
        close = nearest(kind, present)
        raise GenerateError(
            f"--device is auto or one of {', '.join(present)}, found {asked!r}; here: {here}",
            hint=f"--device {close[0] if close else 'auto'}",
        )
    if (separator and not index.isdigit()) or int(index or 0) >= present[kind]:
        raise GenerateError(f"this machine has no device {asked}; here: {here}",
                            hint="--device auto")  # fmt: skip
    return asked


def _dtype(asked: str, device: str) -> str:
    if asked not in DTYPES:
        raise GenerateError(f"--dtype is one of {', '.join(DTYPES)}, found {asked!r}")
    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "float32" if device.startswith(("cpu", "mps")) else "bfloat16"


def _check_attention(
    request: GenerationRequest, values: Mapping[str, Any], parts: _Parts, device: str, dtype: str,
    processes: Processes,
) -> None:  # fmt: skip
    if request.backend == "diffusers":
        if processes.count > 1:
            raise GenerateError(
                "several processes take polyattn's attention; diffusers' own is for one here",
                hint="--backend polyattn",
            )
        _check_passthrough(request)
    elif request.backend == "polyattn":
        if request.allow_download:
            raise GenerateError("--allow-download belongs to --backend diffusers")
        _check_selection(request, values, parts, device, dtype, processes)
    else:
        raise GenerateError(f"--backend is polyattn or diffusers, found {request.backend!r}")


def _check_passthrough(request: GenerationRequest) -> None:
    for option, given in (
        ("--attention-backend-config", request.attention_backend_config),
        ("--cross-attention-backend", request.cross_attention_backend),
    ):
        if given is not None:
            raise GenerateError(
                f"diffusers' own backends take no {option}", hint="--backend polyattn"
            )
    if request.attention_backend is not None:
        from polyattn.cli.generation.passthrough import check_name

        check_name(request.attention_backend, allow_download=request.allow_download)


def _check_selection(
    request: GenerationRequest, values: Mapping[str, Any], parts: _Parts, device: str, dtype: str,
    processes: Processes,
) -> None:  # fmt: skip
    """Select for every attention the run will make, and build it; what is impossible raises.

    Built, so that what a backend's own files lack is told before the model is loaded.
    """
    from polyattn.context import forward_context
    from polyattn.dispatch import bind
    from polyattn.integrations.sites import call_sites
    from polyattn.parallel.layers import refuse_grid_methods

    sites = call_sites(
        request.attention_backend,
        request.attention_backend_config,
        request.cross_attention_backend,
    )
    grid = parts.grid(values)
    tokens = math.prod(grid)
    for config in parts.transformers:
        heads = -(-int(config.get("num_attention_heads", 40)) // processes.ulysses_degree)
        known = {"num_steps": values["num_inference_steps"], "num_layers": config.get("num_layers")}
        for role, keys in (("self", tokens), ("cross", values["max_sequence_length"])):
            site = sites.get(role, sites[""])
            around = processes.ring_degree > 1 and role == "self"
            if around:
                refuse_grid_methods(site, role)
            shown = None if around else grid
            wanted = AttentionRequest(
                batch=1, query_length=tokens, key_length=keys, heads=heads, kv_heads=heads,
                head_dim=int(config.get("attention_head_dim", 128)), dtype=dtype,
                device=device, role=role, grid=shown, needs_lse=around,
                first_head=0 if processes.ulysses_degree > 1 else None,
            )  # fmt: skip
            with forward_context(role=role, grid=shown, **known):
                bind(site, wanted)
