"""Core without any plugin: whatever a person types first is answered in words.

Run in an environment that holds core alone (`nox -s none`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import polyattn
from polyattn.errors import BackendUnavailableError, PolyattnError, UnknownBackendError

PROGRAM = str(Path(sys.executable).with_name("polyattn"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=60)


def test_nothing_is_installed() -> None:
    assert polyattn.backends() == []


@pytest.mark.parametrize("command", ["backends", "matrix", "doctor"])
def test_listings_say_how_to_get_a_backend(command: str) -> None:
    answer = run(command)
    assert "Traceback" not in answer.stdout + answer.stderr
    assert 'pip install "polyattn[sdpa]"' in answer.stdout + answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("explain",),
        ("explain", "sdpa"),
        ("config", "sdpa"),
        ("generate",),
        ("generate", "--model-path", "nowhere"),
    ],
)
def test_what_cannot_run_is_one_clear_error(words: tuple[str, ...]) -> None:
    answer = run(*words)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stdout + answer.stderr
    assert "error:" in answer.stderr


def test_python() -> None:
    with pytest.raises(BackendUnavailableError, match="pip install"):
        polyattn.select()
    with pytest.raises(UnknownBackendError, match=r"polyattn\[sdpa\]"):
        polyattn.select("sdpa")
    with pytest.raises(ModuleNotFoundError, match="needs torch"):
        polyattn.attention  # noqa: B018 - the look-up is what is tested
    assert polyattn.load_config("a=1") == {"a": 1}
    assert issubclass(BackendUnavailableError, PolyattnError)
