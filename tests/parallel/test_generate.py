"""``polyattn generate`` by several processes: one video, or one error, and nothing in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import parallel_cases
import pytest
from parallel_cases import tiny_wan

from polyattn.cli.generation import GenerationRequest, plan_generation
from polyattn.cli.generation.processes import processes_of, timeout
from polyattn.errors import GenerateError

FAILING = Path(__file__).with_name("failing.py")
OPTIONS = ["--device", "cpu", "--prompt", "a red circle", "--num-inference-steps", "3",
           "--width", "48", "--height", "32", "--num-frames", "5", "--seed", "4"]  # fmt: skip
SLOWEST_END = 60  # seconds from the trouble to the end of the job, processes started included


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_wan.tiny_pipeline().save_pretrained(folder)
    return folder


def run(saved: Path, *arguments: str, ranks: int = 1, script: Any = ("-m", "polyattn"),
        **environment: str) -> subprocess.CompletedProcess[str]:  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, "-W", "ignore", *torchrun, *script, "generate", "--model-path",
         str(saved), *OPTIONS, *arguments],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "POLYATTN_PLUGINS": parallel_cases.PLUGINS,
             **environment},
    )  # fmt: skip


def test_the_same_video_by_two_processes(saved: Path, tmp_path: Path) -> None:
    alone = run(saved, "--output", str(tmp_path / "alone.mp4"))
    assert alone.returncode == 0, alone.stderr
    frames = imageio.v3.imread(tmp_path / "alone.mp4").astype(int)
    for name, options in (("ulysses", []), ("ring", ["--ring-degree", "2", "--json"])):
        path = tmp_path / f"{name}.mp4"
        done = run(saved, "--output", str(path), *options, ranks=2)
        assert done.returncode == 0, done.stderr
        found = imageio.v3.imread(path).astype(int)
        assert found.shape == frames.shape
        assert np.abs(found - frames).mean() < 1
        if options:
            told = json.loads(done.stdout)
            assert (told["processes"], told["ring_degree"], told["ulysses_degree"]) == (2, 2, 1)
        else:
            assert done.stdout.count("sampling") == 1
            assert "2 (Ulysses 2 x ring 1)" in done.stdout
            assert done.stdout.strip().endswith("ulysses.mp4")
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "alone.mp4", "ring.mp4", "ulysses.mp4",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["raise", "kill", "hang"])
def test_one_process_in_trouble_ends_all(how: str, saved: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(
        saved, "--output", str(tmp_path / "video.mp4"), ranks=2, script=(str(FAILING), how),
        POLYATTN_TIMEOUT="8",
    )  # fmt: skip
    assert time.monotonic() - began < SLOWEST_END
    assert done.returncode != 0
    words = {
        "raise": "the dog ate the second step",
        "kill": "Signal 9",
        "hang": "among 2 processes failed",
    }[how]
    assert words in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_what_the_plan_refuses(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def plan(**options: Any) -> Any:
        return plan_generation(
            GenerationRequest(model_path=str(saved), prompt="a", output=tmp_path / "v.mp4",
                              width=48, height=32, num_frames=5, **options)
        )  # fmt: skip

    with pytest.raises(GenerateError, match="2 x 1 and 1 process") as caught:
        plan(ulysses_degree=2)
    assert "torchrun --nproc-per-node 2" in str(caught.value)
    with pytest.raises(GenerateError, match="--ring-degree is at least 1"):
        plan(ring_degree=0)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert plan(device="cpu").processes.ulysses_degree == 2
    with pytest.raises(Exception, match="around a ring"):
        plan(device="cpu", ring_degree=2, attention_backend="sta",
             attention_backend_config="window_size=[1,1,1]")  # fmt: skip
    with pytest.raises(GenerateError, match="for one here"):
        plan(device="cpu", backend="diffusers")
    with pytest.raises(GenerateError, match="its own device"):
        plan(device="cuda:1")


def test_degrees_follow_from_the_processes() -> None:
    job = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}
    for given, found in (((None, None), (8, 1)), ((None, 2), (4, 2)), ((2, None), (2, 4)),
                         ((4, 2), (4, 2))):  # fmt: skip
        processes = processes_of(*given, job)
        assert (processes.ulysses_degree, processes.ring_degree) == found
        assert (processes.rank, processes.local_rank, processes.writes) == (5, 1, False)
    with pytest.raises(GenerateError, match="found 3 x 2 and 8 processes"):
        processes_of(3, None, job)
    with pytest.raises(GenerateError, match="found 'two'"):
        processes_of(None, None, {"WORLD_SIZE": "two"})
    for text in ("soon", "-1", "nan"):
        with pytest.raises(GenerateError, match="a number of seconds"):
            timeout({"POLYATTN_TIMEOUT": text})
