"""``polyattn generate`` on a tiny pipeline: the video, every refusal, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
imageio = pytest.importorskip("imageio")
pytest.importorskip("imageio_ffmpeg")
polyattn_sdpa = pytest.importorskip("polyattn_sdpa")

import numpy as np  # noqa: E402
import recording_backend as recorder  # noqa: E402
import tiny_wan  # noqa: E402
from diffusers.models import attention_dispatch  # noqa: E402
from PIL import Image  # noqa: E402

from polyattn.cli import main  # noqa: E402
from polyattn.cli.generation import (  # noqa: E402
    GenerationRequest,
    output,
    passthrough,
    plan_generation,
    running,
)
from polyattn.errors import GenerateError  # noqa: E402
from polyattn.testing import isolated_registry  # noqa: E402

DISPATCH = attention_dispatch._AttentionBackendRegistry
SMALL = {"width": 48, "height": 32, "num_frames": 5, "num_inference_steps": 2, "fps": 8,
         "guidance_scale": 3.0, "max_sequence_length": 16, "prompt": "a red circle"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _backends() -> Iterator[None]:
    recorder.reset()
    specs = (
        polyattn_sdpa.SPEC, recorder.EXACT, recorder.SPARSE, recorder.GATED, recorder.GPU_ONLY,
    )  # fmt: skip
    with isolated_registry(*specs):
        yield
    recorder.reset()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny_wan.tiny_pipeline().save_pretrained(folder)
    (folder / "polyattn_defaults.json").write_text(json.dumps(SMALL))
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model folder to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what is written."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def generate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def fails(*arguments: object) -> str:
    """The message of a generation that must fail with exit code 1, and not by a traceback."""
    result = generate(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.count("error: ") == 1, result.output
    return " ".join(result.stderr.partition("error: ")[2].split())


def frames_of(path: Path) -> Any:
    with imageio.get_reader(path) as reader:
        return np.stack(list(reader.iter_data()))


# --- the video ------------------------------------------------------------------------------------


def test_a_video_with_the_model_folders_defaults(saved: Path, out: Path) -> None:
    path, report = out / "video.mp4", out / "report.json"
    result = generate("--model-path", saved, "--output", path, "--report", report)
    assert result.exit_code == 0, (result.output, result.exception)
    assert frames_of(path).shape == (5, 32, 48, 3)
    assert sorted(out.iterdir()) == [report, path]
    assert path.stat().st_mode == report.stat().st_mode
    lines = result.stdout.splitlines()
    assert lines[-1] == str(path)
    assert "seed 0" in result.stdout
    for stage in running.STAGES:
        assert f"{stage} " in result.stdout
    rows = [line.split() for line in lines if line.startswith(("self", "cross"))]
    assert [row[:6] for row in rows] == [
        ["self", "0-1", "0-1", "automatic", "torch_sdpa", "flash"],
        ["cross", "0-1", "0-1", "automatic", "torch_sdpa", "flash"],
    ]
    assert "denoising" in result.stderr
    data = json.loads(report.read_text())
    assert {name: data[name] for name in SMALL if name != "max_sequence_length"} == {
        name: value for name, value in SMALL.items() if name != "max_sequence_length"
    }
    assert {row["role"] for row in data["attention"]} == {"self", "cross"}
    assert data["output"] == str(path)
    assert set(data["seconds"]) == set(running.STAGES)
    assert data["seconds"]["load"] > 0


def test_options_outrank_the_model_folders_defaults(saved: Path, out: Path) -> None:
    path = out / "video.gif"
    result = generate(
        "--model-path", saved, "--prompt", "a green square", "--width", 32, "--height", 48,
        "--num-frames", 9, "--num-inference-steps", 1, "--guidance-scale", 1, "--fps", 10,
        "--seed", 5, "--output", path, "--json", "--negative-prompt", "red",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(result.stdout)
    assert data["prompt"] == "a green square"
    assert data["negative_prompt"] == "red"
    assert (data["seed"], data["num_inference_steps"]) == (5, 1)
    assert data["attention"][0]["calls"] == tiny_wan.LAYERS  # no guidance: one forward a step
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (9, (32, 48), 100)


def test_quiet_prints_the_path_alone(saved: Path, out: Path) -> None:
    result = generate("--model-path", saved, "--output", out / "v.gif", "--quiet")
    assert result.exit_code == 0
    assert result.stdout == f"{out / 'v.gif'}\n"
    assert result.stderr == ""


def test_no_report_leaves_the_table_out(saved: Path, out: Path) -> None:
    result = generate("--model-path", saved, "--output", out / "v.gif", "--no-report")
    assert result.exit_code == 0
    assert "torch_sdpa" not in result.stdout
    assert generate("--report", "x.json", "--no-report").exit_code == 2


def test_one_seed_is_one_video(saved: Path, out: Path) -> None:
    videos = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        path = out / f"{name}.gif"
        assert generate("--model-path", saved, "--seed", seed, "--output", path).exit_code == 0
        videos.append(path.read_bytes())
    assert videos[0] == videos[1]
    assert videos[0] != videos[2]


def test_the_users_random_numbers_are_left_alone(saved: Path, out: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    assert generate("--model-path", saved, "--output", out / "v.gif").exit_code == 0
    assert torch.equal(torch.rand(3), expected)


def test_backends_are_chosen_by_role(saved: Path, out: Path) -> None:
    result = generate(
        "--model-path", saved, "--output", out / "v.gif", "--json",
        "--attention-backend", "sparse_recorder", "--attention-backend-config", "dense_steps=1",
        "--cross-attention-backend", "recorder",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    used = {
        (row["role"], row["used"], tuple(row["steps"]))
        for row in json.loads(result.stdout)["attention"]
    }
    assert used == {
        ("self", "torch_sdpa", (0,)), ("self", "sparse_recorder", (1,)),
        ("cross", "recorder", (0, 1)),
    }  # fmt: skip


WEIGHTS = "diffusion_pytorch_model.safetensors"


def add_gates(folder: Path, *, sharded: bool) -> dict[str, Any]:
    """Gates as in a checkpoint that was trained with them, in its file or in one of several."""
    from safetensors.torch import load_file, save_file

    inner = tiny_wan.HEADS * tiny_wan.HEAD_DIM
    gates = {
        f"blocks.{layer}.to_gate_compress.{name}": torch.randn(shape)
        for layer in range(tiny_wan.LAYERS)
        for name, shape in (("weight", (inner, inner)), ("bias", (inner,)))
    }
    weights = load_file(folder / WEIGHTS)
    if not sharded:
        save_file({**weights, **gates}, folder / WEIGHTS, metadata={"format": "pt"})
        return gates
    (folder / WEIGHTS).unlink()
    places = {}
    for number, part in enumerate((weights, gates), 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return gates


@pytest.mark.parametrize("sharded", [False, True])
def test_gates_in_the_model_folder_are_used(model: Path, out: Path, sharded: bool) -> None:
    gates = add_gates(model / "transformer", sharded=sharded)
    command = ["--model-path", model, "--output", out / "v.gif", "--json", "--attention-backend"]
    result = generate(*command, "gated_recorder")
    assert result.exit_code == 0, (result.output, result.exception)
    notes = json.loads(result.stdout)["notes"]
    assert f"transformer has gates ({len(gates)} tensors), which gated_recorder uses" in notes
    seen = [each for each in recorder.GATES if each is not None]
    assert len(seen) == len(recorder.GATES) > 0
    assert all(each.abs().sum() > 0 for each in seen)


def test_gates_cost_nothing_where_nobody_takes_them(
    saved: Path, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyattn.integrations import gates as gates_module

    command = ["--output", out / "v.gif", "--json", "--overwrite", "--attention-backend"]
    result = generate("--model-path", saved, *command, "gated_recorder")
    assert json.loads(result.stdout)["notes"] == []  # a model without gates
    assert set(recorder.GATES) == {None}
    add_gates(model / "transformer", sharded=False)
    monkeypatch.setattr(gates_module, "_files", lambda _: pytest.fail("weights were looked at"))
    for backend in ("thin", "auto", "torch_sdpa"):
        result = generate("--model-path", model, *command, backend)
        assert result.exit_code == 0, (result.output, result.exception)
        assert not any("gate" in note for note in json.loads(result.stdout)["notes"])


def test_gates_that_do_not_fit_are_told(model: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    add_gates(model / "transformer", sharded=False)
    weights = load_file(model / "transformer" / WEIGHTS)
    del weights["blocks.1.to_gate_compress.bias"]
    save_file(weights, model / "transformer" / WEIGHTS, metadata={"format": "pt"})
    told = fails(
        "--model-path", model, "--output", out / "v.gif", "--attention-backend", "gated_recorder"
    )
    assert "'blocks.1.to_gate_compress.bias' of [24], found none" in told


def test_the_table_of_a_sparse_run(saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by role, the kernel that ran, and the density with the dense steps in it."""
    monkeypatch.setattr(recorder.Recorder, "facts", {"density": 0.5, "provider": "reference"})
    report = out / "report.json"
    result = generate(
        "--model-path", saved, "--output", out / "v.gif", "--report", report,
        "--attention-backend", "thin", "--attention-backend-config", "dense_steps=1",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith(("self", "cross"))]
    assert [row[:6] for row in rows] == [
        ["self", "0-1", "0", "thin", "torch_sdpa", "flash"],
        ["self", "0-1", "1", "thin", "sparse_recorder", "reference"],
        ["cross", "0-1", "0-1", "thin", "torch_sdpa", "flash"],
    ]
    assert rows[1][6:] == ["requested", "(density", "0.5)"]
    assert "density of self-attention over the run: 0.75" in lines
    assert json.loads(report.read_text())["density"] == pytest.approx(0.75)
    assert "thin -> torch_sdpa" not in result.stderr


def test_both_transformers_are_in_the_table(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    tiny_wan.tiny_pipeline(two_stages=True).save_pretrained(folder)
    (folder / "polyattn_defaults.json").write_text(json.dumps({**SMALL, "num_inference_steps": 4}))
    result = generate("--model-path", folder, "--output", out / "v.gif")
    assert result.exit_code == 0, (result.output, result.exception)
    components = [line.split()[0] for line in result.stdout.splitlines() if " torch_sdpa" in line]
    assert components == ["transformer"] * 2 + ["transformer_2"] * 2


def test_half_precision_keeps_the_vae_in_float32(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    load = running._load

    def remember(plan: Any) -> Any:
        pipe = load(plan)
        seen.update({name: getattr(pipe, name).dtype for name in ("transformer", "vae",
                                                                  "text_encoder")})  # fmt: skip
        return pipe

    monkeypatch.setattr(running, "_load", remember)
    result = generate("--model-path", saved, "--dtype", "bfloat16", "--output", out / "v.gif",
                      "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert seen == {"transformer": torch.bfloat16, "vae": torch.float32,
                    "text_encoder": torch.bfloat16}  # fmt: skip


def test_a_prompt_that_is_too_long_is_told(saved: Path, out: Path) -> None:
    result = generate("--model-path", saved, "--output", out / "v.gif", "--prompt", "red " * 40)
    assert result.exit_code == 0
    assert "the prompt has 41 tokens, and the model reads the first 16" in result.stdout


def test_the_demo_model_is_the_default(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = SimpleNamespace(model_path=lambda: saved)
    monkeypatch.setitem(sys.modules, "polyattn_demo", demo)
    result = generate("--output", out / "v.gif", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["model"] == str(saved)
    monkeypatch.setitem(sys.modules, "polyattn_demo", None)
    assert 'pip install "polyattn[demo]"' in fails("--output", out / "w.gif")


# --- the model ------------------------------------------------------------------------------------


def test_models_that_are_none(model: Path, out: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, words in (
        ("./no/such/folder", "there is no model folder './no/such/folder'"),
        ("nothing", "there is no model folder 'nothing'"),
        ("", "--model-path is empty"),
        (empty, "no model_index.json (the folder is empty)"),
        (model / "vae", "no model_index.json (found: config.json"),
        (model / "model_index.json", "is a file"),
    ):
        assert words in fails("--model-path", path, "--output", out / "v.mp4")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FluxPipeline", "FluxPipeline, a family that is not supported yet"),
        ("WanImageToVideoPipeline", "which needs an image beside the prompt"),
        (None, "names no pipeline class"),
    ],
)
def test_other_families(model: Path, name: str | None, words: str) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    assert words in fails("--model-path", model)


def test_broken_model_folders(model: Path, out: Path) -> None:
    arguments = ("--model-path", model, "--output", out / "v.mp4")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be loaded" in fails(*arguments)
    (model / "transformer" / "config.json").unlink()
    assert "transformer/config.json is missing" in fails(*arguments)
    (model / "model_index.json").write_text("{")
    assert "cannot read" in fails(*arguments)
    assert list(out.iterdir()) == []


def test_the_defaults_file_is_held_to_its_word(model: Path, out: Path) -> None:
    file = model / "polyattn_defaults.json"
    for content, words in (
        ('{"width": "wide"}', "gives width='wide', expected int"),
        ('{"num_frames": 5.5}', "gives num_frames=5.5"),
        ('{"prompt": 3}', "gives prompt=3, expected str"),
        ('{"guidance_scale": true}', "gives guidance_scale=True"),
        ('{"max_sequence_length": 0, "width": 48}', "max_sequence_length is at least 1"),
        ("[1]", "holds a list"),
        ("{", "cannot read"),
        ("{}", "there is no prompt"),
    ):
        file.write_text(content)
        size = ("--width", 48, "--height", 32, "--num-frames", 5) if content == "{}" else ()
        assert words in fails("--model-path", model, "--output", out / "v.mp4", *size)
    file.write_text(json.dumps({**SMALL, "shift": 3}))
    result = generate("--model-path", model, "--output", out / "v.gif")
    assert result.exit_code == 0
    assert "'shift', which is not used" in result.stdout


def test_hub_models_without_the_hub(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refused(kind: type[Exception]) -> Exception:
        error = kind.__new__(kind)  # its constructor wants the response of an HTTP library
        error.args = ("refused",)
        return error

    answers: list[Any] = [
        (errors.LocalEntryNotFoundError("no connection"), "cannot be fetched from the Hub"),
        (OSError("network is unreachable"), "cannot be fetched from the Hub"),
        (refused(errors.RepositoryNotFoundError), "no model some-org/some-model"),
        (refused(errors.GatedRepoError), "asks for an agreement"),
        (errors.EntryNotFoundError("404"), "no model_index.json"),
    ]
    for error, words in answers:

        def answer(*_: Any, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
        assert words in fails("--model-path", "some-org/some-model", "--output", out / "v.mp4")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name: str(saved / name))
    request = GenerationRequest("some-org/some-model", output=out / "v.mp4")
    assert plan_generation(request).model.local is False


# --- sizes and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--width", 50, "--width is a multiple of 16 for this model"),
        ("--width", 50, "Try: --width 48 or --width 64"),
        ("--height", 0, "Try: --height 16"),
        ("--height", -7, "Try: --height 16"),
        ("--width", 10**9, "Try: --width 16384"),
        ("--width", 1600, "--width 1600 makes 100 positions, and the model has 32"),
        ("--num-frames", 6, "Try: --num-frames 5 or --num-frames 9"),
        ("--num-frames", 0, "Try: --num-frames 1"),
        ("--num-frames", -3, "Try: --num-frames 1"),
        ("--num-inference-steps", 0, "from 1 to 1000, found 0"),
        ("--num-inference-steps", 1001, "from 1 to 1000, found 1001"),
        ("--guidance-scale", "nan", "finite number of at least 0, found nan"),
        ("--guidance-scale", -1, "found -1"),
        ("--fps", 0, "--fps is from above 0"),
        ("--fps", "inf", "--fps is from above 0"),
        ("--seed", -1, "--seed is from 0"),
        ("--seed", 2**63, "--seed is from 0"),
        ("--device", "cuda:99", "no device cuda:99"),
        ("--device", "cuda:x", "no device cuda:x"),
        ("--device", "gpu", "--device is auto or one of"),
    ],
)
def test_numbers_that_cannot_be(
    saved: Path, out: Path, option: str, value: object, words: str
) -> None:
    assert words in fails("--model-path", saved, "--output", out / "v.mp4", option, value)
    assert list(out.iterdir()) == []


def test_every_size_that_a_hint_names_works(saved: Path, out: Path) -> None:
    for width in range(1, 130, 7):
        request = GenerationRequest(str(saved), width=width, output=out / "v.mp4")
        try:
            plan_generation(request)
        except GenerateError as error:
            assert error.hint is not None
            for hint in error.hint.split(" or "):
                nearest = int(hint.removeprefix("--width "))
                assert abs(nearest - width) < 16
                plan_generation(GenerationRequest(str(saved), width=nearest, output=out / "v.mp4"))


# --- the output file ------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written(saved: Path, out: Path) -> None:
    existing = out / "there.mp4"
    existing.write_bytes(b"precious")
    for path, words in (
        (out / "v.avi", "ends in .mp4 or .gif"),
        (out / "v", "ends in .mp4 or .gif"),
        (out / "no" / "v.mp4", "does not exist Try: mkdir -p"),
        (existing, f"exists already Try: --overwrite, or --output {out / 'there-1.mp4'}"),
    ):
        assert words in fails("--model-path", saved, "--output", path)
    (out / "folder.mp4").mkdir()
    assert "is a folder" in fails("--model-path", saved, "--output", out / "folder.mp4")
    gif = fails("--model-path", saved, "--output", out / "v.gif", "--fps", 60)
    assert "at most 50 frames a second" in gif
    report = fails("--model-path", saved, "--output", out / "v.gif", "--report", existing)
    assert "exists already" in report
    same = fails("--model-path", saved, "--output", out / "v.gif", "--report", out / "v.gif")
    assert "same file" in same
    assert existing.read_bytes() == b"precious"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_a_folder_that_takes_no_files(saved: Path) -> None:
    assert "cannot be written" in fails("--model-path", saved, "--output", "/proc/v.mp4")


def test_overwrite_replaces(saved: Path, out: Path) -> None:
    path = out / "v.gif"
    path.write_bytes(b"old")
    path.chmod(0o640)
    result = generate("--model-path", saved, "--output", path, "--overwrite")
    assert result.exit_code == 0, (result.output, result.exception)
    assert path.read_bytes()[:3] == b"GIF"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_appears_meanwhile_is_not_replaced(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = output._encode_gif

    def slowly(frames: Any, temporary: Path, fps: float) -> None:
        (out / "v.gif").write_bytes(b"precious")
        encode(frames, temporary, fps)

    monkeypatch.setattr(output, "_encode_gif", slowly)
    result = generate("--model-path", saved, "--output", out / "v.gif")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(out / "v-1.gif")
    assert (out / "v.gif").read_bytes() == b"precious"
    assert (out / "v-1.gif").read_bytes()[:3] == b"GIF"
    assert "made by somebody else meanwhile" in result.stdout


def test_a_disk_that_is_nearly_full(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=1, used=1, free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    words = fails("--model-path", saved, "--output", out / "v.mp4")
    assert "has 0.0 MB free, and the video may need 1.1 MB" in words


def _half_written(error: BaseException) -> Any:
    def encode(frames: Any, temporary: Path, fps: float) -> None:
        temporary.write_bytes(b"half a vid")
        raise error

    return encode


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("[Errno 28] No space left on x")],
)
def test_a_disk_that_fills_up(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(output, "_encode_mp4", _half_written(error))
    words = fails("--model-path", saved, "--output", out / "v.mp4")
    assert "no space left on the disk" in words
    assert list(out.iterdir()) == []


def test_an_encoder_that_stops_early_is_noticed(out: Path) -> None:
    """A real one: its files may not grow beyond 3 kB, so that it ends in the middle."""
    program = f"""
import resource, numpy
from pathlib import Path
from polyattn.errors import GenerateError
from polyattn.cli.generation.output import write_video
frames = numpy.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=numpy.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    write_video(frames, Path({str(out / "v.mp4")!r}), 16, overwrite=False)
except GenerateError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "refused:" in done.stdout, (done.stdout, done.stderr)
    assert list(out.iterdir()) == []


def test_values_that_are_no_numbers_are_refused() -> None:
    frames = np.zeros((2, 4, 4, 3), dtype=np.float32)
    assert running._as_bytes(frames + 0.5).max() == 128
    frames[0] = np.nan
    with pytest.raises(GenerateError, match="50% of the video's values are not finite"):
        running._as_bytes(frames)


# --- interruptions --------------------------------------------------------------------------------


@contextlib.contextmanager
def _during_the_second_step(action: Any) -> Iterator[None]:
    scheduler = diffusers.UniPCMultistepScheduler
    step, count = scheduler.step, []

    def stepping(self: Any, *arguments: Any, **named: Any) -> Any:
        count.append(1)
        if len(count) == 2:
            action()
        return step(self, *arguments, **named)

    scheduler.step = stepping
    try:
        yield
    finally:
        scheduler.step = step


def test_ctrl_c_in_a_step_leaves_nothing(saved: Path, out: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with _during_the_second_step(interrupt):
        result = generate("--model-path", saved, "--output", out / "v.mp4")
    assert result.exit_code == 130
    assert "no video was written" in result.stderr
    assert list(out.iterdir()) == []


def test_ctrl_c_while_writing_leaves_what_was_there(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = out / "v.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr(output, "_encode_mp4", _half_written(KeyboardInterrupt()))
    result = generate("--model-path", saved, "--output", path, "--overwrite")
    assert result.exit_code == 130
    assert list(out.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "kill"), reason="needs signals")
def test_sigterm_leaves_nothing_and_its_handler_goes_back(saved: Path, out: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with _during_the_second_step(lambda: os.kill(os.getpid(), signal.SIGTERM)):
        result = generate("--model-path", saved, "--output", out / "v.mp4")
    assert result.exit_code == 143
    assert list(out.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_too_little_memory_is_told(saved: Path, out: Path) -> None:
    def exhaust() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    with _during_the_second_step(exhaust):
        words = fails("--model-path", saved, "--output", out / "v.mp4")
    assert "cpu has too little memory for 5 frames of 48x32 in float32" in words


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention-backend", "torch_spda"], "Try: torch_sdpa"),
        (["--attention-backend", "gpu_only"], "cannot serve self-attention"),
        (["--cross-attention-backend", "sparse_recorder"], "serves self-attention only"),
        (["--attention-backend", "sparse_recorder", "--dtype", "bfloat16"], "takes float32"),
        (["--attention-backend-config", "kernel"], "kernel"),
        (["--attention-backend", "sdpa", "--attention-backend-config", "kernal=math"], "kernal"),
        (["--allow-download"], "belongs to --backend diffusers"),
    ],
)
def test_attention_is_refused_before_anything_is_loaded(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(running, "_load", lambda plan: pytest.fail("loaded"))
    assert words in fails("--model-path", saved, "--output", out / "v.mp4", *arguments)


def test_a_backend_that_does_not_load_is_refused_before_the_model(saved: Path, out: Path) -> None:
    broken = recorder.EXACT.model_copy(update={"implementation": "no_such_module:build"})
    with isolated_registry(polyattn_sdpa.SPEC, broken):
        words = fails(
            "--model-path", saved, "--output", out / "v.mp4", "--attention-backend", "recorder"
        )
    assert "does not load" in words


# --- diffusers' own backends ----------------------------------------------------------------------


def test_diffusers_backends_are_passed_through_and_do_not_leak(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    math, calls = DISPATCH._backends[name], []

    def counting(**arguments: Any) -> Any:
        calls.append(1)
        return math(**arguments)

    monkeypatch.setitem(DISPATCH._backends, name, counting)
    active = DISPATCH._active_backend
    result = generate("--model-path", saved, "--output", out / "v.gif", "--backend", "diffusers",
                      "--attention-backend", "_native_math")  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(calls) == 2 * 2 * tiny_wan.LAYERS * 2
    assert DISPATCH._active_backend is active
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("transformer"))
    assert row.split() == ["transformer", "4", "_native_math"]


def test_diffusers_own_default(saved: Path, out: Path) -> None:
    active = DISPATCH._active_backend
    result = generate("--model-path", saved, "--output", out / "v.gif", "--backend", "diffusers")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "diffusers' own default backend" in result.stdout
    assert DISPATCH._active_backend is active


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention-backend", "natve"], "Try: --attention-backend native"),
        (["--attention-backend", "torch_sdpa"], "_native_math"),
        (["--attention-backend", "polyattn"], "no attention backend 'polyattn'"),
        (["--attention-backend", "flash_hub"], "--attention-backend flash_hub --allow-download"),
        (["--attention-backend", "xformers"], "cannot use its attention backend 'xformers'"),
        (["--attention-backend-config", "a=1"], "take no --attention-backend-config"),
        (["--cross-attention-backend", "native"], "take no --cross-attention-backend"),
    ],
)
def test_what_diffusers_cannot_do_is_refused_before_loading(
    saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    if "xformers" in arguments and attention_dispatch._CAN_USE_XFORMERS_ATTN:
        pytest.skip("xformers is installed")
    monkeypatch.setattr(running, "_load", lambda plan: pytest.fail("loaded"))
    active = DISPATCH._active_backend
    found = fails("--model-path", saved, "--output", out / "v.mp4", "--backend", "diffusers",
                  *arguments)  # fmt: skip
    assert words in found
    assert DISPATCH._active_backend is active


def test_a_backend_that_changes_nothing_is_an_error() -> None:
    """Some models ignore diffusers' call without a word."""
    active = DISPATCH._active_backend
    model = torch.nn.Linear(1, 1)
    model.set_attention_backend = lambda name: DISPATCH.set_active_backend(name)
    pipe = SimpleNamespace(components={"transformer": model, "transformer_2": None})
    with pytest.raises(GenerateError, match="changed nothing in transformer"):
        passthrough.set_backend(pipe, "_native_math")
    assert DISPATCH._active_backend is active
