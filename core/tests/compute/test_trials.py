"""Trials of backends that crash, hang, raise or babble: each becomes that backend's own finding.

Every backend here is a distribution of its own in a folder on ``PYTHONPATH``, and behaves well
until its kernel is loaded or run, as a broken vendor package does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from polyattn.cli import trial
from polyattn.testing import fake_distribution

pytestmark = pytest.mark.slow  # each trial imports torch in a process of its own

PLUGIN = """
from polyattn.contract import Architectures, BackendSpec, Capabilities
from polyattn.hooks import hookimpl

@hookimpl
def polyattn_backends():
    return [BackendSpec(
        name="NAME", summary="a toy", kind="exact", implementation="toy_NAME_kernel:build",
        capabilities=Capabilities(
            platforms={"cpu": Architectures(), "cuda": Architectures()}, dtypes=("float32",)
        ),
    )]
"""

KERNEL = """
import os, signal, subprocess, sys, time
ON_LOAD
def build(config, request, environment):
    import torch
    def run(q, k, v, call):
        ON_CALL
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return run
"""

LAST_WORDS = "print('one\\ntwo\\nthree\\nfour\\nfive\\nsix', file=sys.stderr, flush=True); "
GRANDCHILD = (
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "open(PIDS, 'w').write(f'{os.getpid()} {child.pid}'); "
)
FORGED = 'print(\'{"status": "failed", "message": "forged"}\', flush=True); '
BABBLE = FORGED + "os.write(1, bytes(range(256)) * 9); os.write(2, b'\\xff'); sys.stdout.close(); "


class Toys:
    """A folder of toy backends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.pids = folder / "pids"

    def add(self, name: str, on_load: str = "", on_call: str = "pass") -> None:
        self.names.append(name)
        kernel = KERNEL.replace("ON_LOAD", on_load).replace("ON_CALL", on_call)
        fake_distribution(
            self.folder,
            f"toy-{name}",
            "1.0",
            {name: f"toy_{name}"},
            {
                f"toy_{name}": PLUGIN.replace("NAME", name),
                f"toy_{name}_kernel": kernel.replace("PIDS", repr(str(self.pids))),
            },
        )

    def left_over(self) -> list[int]:
        """Which of the processes that wrote down their numbers still run, a moment later."""
        deadline = time.monotonic() + 5
        while True:
            alive = [pid for pid in map(int, self.pids.read_text().split()) if _runs(pid)]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no such file: no Linux, or gone just now
        return True


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toys:
    for name in [*os.environ]:
        if name.startswith("POLYATTN_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Toys(tmp_path)


def test_doctor_tries_each_backend_in_a_process_of_its_own(
    toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashes, exits, exceptions and babble are findings; the other backends' trials are right."""
    toys.add("segfault", on_call=LAST_WORDS + "os.kill(os.getpid(), signal.SIGSEGV)")
    toys.add("aborts", on_load="os.abort()")
    toys.add("exits", on_call="sys.exit(0)")
    toys.add("raises", on_call="raise RuntimeError('CUDA error: an illegal instruction\\nmore')")
    toys.add("broken", on_load="from polyattn.errors import InputError; raise InputError('no')")
    toys.add("babbles", on_load=BABBLE)
    toys.add("wrong", on_call="v = v * 1.1")
    toys.add("dies_late", on_load="import atexit; atexit.register(os._exit, 7)")
    toys.add("sound")
    monkeypatch.setenv("POLYATTN_PLUGINS", ",".join(toys.names))
    command = [sys.executable, "-m", "polyattn", "doctor", "--deep"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    trials: dict[str, Any] = data["trials"]
    found = {name: each["message"] for name, each in trials.items() if each["status"] == "failed"}
    assert set(found) == set(toys.names) - {"sound", "babbles"}
    assert found["segfault"] == "crashed with SIGSEGV (signal 11): six"
    assert trials["segfault"]["stderr"] == ["two", "three", "four", "five", "six"]
    assert found["aborts"].startswith("crashed with SIGABRT (signal 6)")
    assert found["exits"].startswith("ended with exit code 0 before it answered")
    assert "RuntimeError: CUDA error: an illegal instruction" in found["raises"]
    assert "toy_raises_kernel.py" in "\n".join(trials["raises"]["stderr"])  # the traceback
    assert trials["raises"]["hint"].startswith("CUDA_LAUNCH_BLOCKING=1 ")
    assert found["broken"] == "toy_broken_kernel:build does not load: InputError: no"
    assert found["wrong"].startswith("gave wrong numbers: relative error")
    assert found["dies_late"].startswith("ran, and then ended with exit code 7")
    for name in ("sound", "babbles"):
        assert trials[name]["status"] == "ok", trials[name]
        assert trials[name]["relative_error"] < 1e-5
    problems = {
        each["message"].partition(" does not work here: ")[0]: each
        for each in data["problems"]
        if "does not work here" in each["message"]
    }
    assert set(problems) == set(found)
    assert "\n  two\n" in problems["segfault"]["message"]
    for name, problem in problems.items():
        assert problem["severity"] == "error"
        assert f"-m polyattn.cli.trial backend {name}" in problem["hint"]


def test_the_hint_of_a_trial_can_be_pasted(toys: Toys) -> None:
    toys.add("segfault", on_call="os.kill(os.getpid(), signal.SIGSEGV)")
    toys.add("sound")
    hint = trial.run_trial("backend", "segfault")["hint"]
    program, *words = hint.split()
    assert program == "python"
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGSEGV
    assert "toy_segfault_kernel.py" in done.stderr  # where it crashed
    done = subprocess.run(
        [sys.executable, *words[:-1], "sound"], capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout)["status"] == "ok"


def test_a_trial_that_hangs_is_ended_with_all_it_started(toys: Toys) -> None:
    toys.add("hangs", on_load=GRANDCHILD + "time.sleep(600)")
    answer = trial.run_trial("backend", "hangs", seconds=10)
    assert answer["status"] == "failed"
    assert answer["message"].startswith("did not finish within 10 s")
    assert toys.left_over() == []


def test_a_crash_is_not_waited_for_because_of_what_it_left_behind(toys: Toys) -> None:
    """A compiler started by the crashed process holds its output open."""
    toys.add("orphan", on_load=GRANDCHILD + "os.kill(os.getpid(), signal.SIGKILL)")
    start = time.monotonic()
    answer = trial.run_trial("backend", "orphan", seconds=100)
    assert time.monotonic() - start < 90
    assert answer["message"].startswith("crashed with SIGKILL (signal 9)")
    assert toys.left_over() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_poisoned_device_stays_in_its_process(
    toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in a kernel a process can use its device no more; the next trial can."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    toys.add("poison", on_call="v = v[:, torch.full_like(v[0, :, 0, 0], 1 << 20).long()]")
    toys.add("sound")
    poisoned = trial.run_trial("backend", "poison")
    assert poisoned["status"] == "failed"
    assert "CUDA error" in poisoned["message"]
    assert poisoned["hint"].startswith("CUDA_LAUNCH_BLOCKING=1 ")
    assert trial.run_trial("backend", "sound")["status"] == "ok"
