"""Trying things that may crash, in a process of their own: ``import torch``, one backend.

:func:`run_trial` starts this module as a child and turns whatever becomes of it into a value: an
answer, an error, a signal, a time-out. The child answers in a file, so nothing that a library
prints can be taken for it; what it starts itself, such as a compiler, is ended with it.
``python -m polyattn.cli.trial backend NAME``, typed by hand, answers on stdout.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyattn.errors import PolyattnError, UnknownBackendError

if TYPE_CHECKING:
    import torch

    from polyattn.contract import BackendSpec

__all__ = ["run_trial"]

Data = dict[str, Any]

MODULE = "polyattn.cli.trial"
LAST_LINES = 5  # of a failed trial's stderr
SECONDS_TO_WAIT = 180.0
TRIAL_GRID = (6, 8, 8)  # one tile of the sparse methods that work on tiles
# Relative error against float64: far above rounding, far below what a wrong kernel gives.
TOLERANCE = {"exact": 0.03, "quantized": 0.15}


def run_trial(*arguments: str, seconds: float = SECONDS_TO_WAIT) -> Data:
    """Run this module with ``arguments`` in a child; ``status`` is ok, refused or failed.

    A failed trial also has the last lines of the child's ``stderr``, and a ``hint``: the command
    that repeats it.
    """
    # A global choice of backend is not what is tried here, and could fail the trial by itself.
    environment = {key: value for key, value in os.environ.items() if key != "POLYATTN_BACKEND"}
    with tempfile.TemporaryDirectory() as folder:
        answer_file, errors_file = Path(folder, "answer"), Path(folder, "stderr")
        command = [sys.executable, "-m", MODULE, *arguments, f"--answer={answer_file}"]
        try:
            with errors_file.open("wb") as errors:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            return _failed(f"cannot start {sys.executable}: {error}")
        try:
            code: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
        lines = errors_file.read_text(encoding="utf-8", errors="replace").splitlines()
        result = _result(code, _read(answer_file), seconds)
    if result["status"] == "failed":
        result["stderr"] = [line for line in lines if line.strip()][-LAST_LINES:]
        if code != 0 and result["stderr"]:
            result["message"] += f": {result['stderr'][-1]}"
        result["hint"] = f"python -X faulthandler -m {MODULE} {' '.join(arguments)}"
        if "CUDA error" in result["message"]:  # which is reported later than it happened
            result["hint"] = f"CUDA_LAUNCH_BLOCKING=1 {result['hint']}"
    return result


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and everything it started: they share a session."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left
    child.kill()
    child.wait()


def _read(answer_file: Path) -> Data | None:
    try:
        answer: Data = json.loads(answer_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ended before, or while, it wrote its answer
        return None
    return answer


def _result(code: int | None, answer: Data | None, seconds: float) -> Data:
    if code is None:
        return _failed(f"did not finish within {seconds:g} s")
    if answer is None:
        return _failed(_ending(code) + (" before it answered" if code >= 0 else ""))
    if code != 0 and answer["status"] != "failed":
        said = "ran" if answer["status"] == "ok" else f"was refused ({answer['message']})"
        return {**answer, **_failed(f"{said}, and then {_ending(code)}")}
    return answer


def _failed(message: str) -> Data:
    return {"status": "failed", "message": message}


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"crashed with {signal.Signals(-code).name} (signal {-code})"
    except ValueError:
        return f"crashed with signal {-code}"


def _try_torch() -> Data:
    start = time.perf_counter()
    import torch

    seconds = time.perf_counter() - start
    from polyattn.environment import Environment

    seen = Environment.detect()
    return {
        "status": "ok",
        "message": None,
        "seconds": round(seconds, 3),
        "version": str(torch.__version__),
        "platform": seen.platform,
        "device": seen.describe(),
    }


def _try_backend(name: str) -> Data:
    """Load a backend's implementation and run one small attention with it."""
    from polyattn.naming import backend_named

    spec = backend_named(name).spec
    try:
        pkgutil.resolve_name(spec.implementation)
    except Exception as problem:  # a refusal too: what is usable has to load
        traceback.print_exc()
        return _failed(f"{spec.implementation} does not load: {type(problem).__name__}: {problem}")

    import torch

    from polyattn.contract import AttentionRequest
    from polyattn.dispatch import attention
    from polyattn.selection import local_environment, select

    platform = local_environment().platform
    q, k, v = _trial_tensors(spec, "cuda" if platform == "rocm" else platform)
    grid = TRIAL_GRID if spec.capabilities.needs_grid else None
    request = AttentionRequest(
        batch=q.shape[0],
        query_length=q.shape[1],
        key_length=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=spec.capabilities.dtypes[0],
        device=q.device.type,
        grid=grid,
    )
    try:
        select(name, request=request)
    except PolyattnError as refusal:
        return {"status": "refused", "message": str(refusal)}
    start = time.perf_counter()
    with torch.no_grad():
        found = attention(q, k, v, backend=name, grid=grid).double().cpu()
    seconds = time.perf_counter() - start
    error = _relative_error(found, q, k, v)
    limit = TOLERANCE.get(spec.kind)
    answer: Data = {"status": "ok", "message": None, "seconds": round(seconds, 3)}
    if not torch.isfinite(found).all():
        return {**answer, **_failed("gave values that are not finite")}
    if limit is not None:
        answer["relative_error"] = float(f"{error:.2g}")
        if error > limit:
            answer |= _failed(f"gave wrong numbers: relative error {error:.2g}, allowed {limit}")
    return answer


def _trial_tensors(
    spec: BackendSpec, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    head_dims = spec.capabilities.head_dims
    wishes = (64, 128, *head_dims.only, head_dims.minimum, head_dims.maximum)
    head_dim = next(size for size in wishes if head_dims.admits(size))
    tokens = TRIAL_GRID[0] * TRIAL_GRID[1] * TRIAL_GRID[2]
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, spec.capabilities.dtypes[0])
    q, k, v = torch.randn(3, 1, tokens, 2, head_dim, generator=generator).to(device, dtype)
    return q, k, v


def _relative_error(
    found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> float:
    """Distance to attention written out in float64 on the CPU."""
    q, k, v = (each.double().cpu().transpose(1, 2) for each in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    expected = (weights @ v).transpose(1, 2)
    return float((found - expected).norm() / expected.norm())


def _main(what: str, *words: str) -> None:
    names = [word for word in words if not word.startswith("--answer=")]
    try:
        answer = _try_torch() if what == "torch" else _try_backend(*names)
    except UnknownBackendError as error:
        answer = {"status": "refused", "message": str(error)}
    except PolyattnError as error:
        traceback.print_exception(error.__cause__ or error)
        answer = _failed(error.message)
    except Exception as error:
        traceback.print_exc()
        answer = _failed(f"{type(error).__name__}: {error}")
    text = json.dumps(answer)
    for word in words:
        if word.startswith("--answer="):
            Path(word.removeprefix("--answer=")).write_text(text, encoding="utf-8")
            return
    print(text)


if __name__ == "__main__":
    _main(*sys.argv[1:])
