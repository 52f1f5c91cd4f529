"""Environments: read without torch, assumed from words, frozen and serialisable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from polyattn.environment import Accelerator, Environment
from polyattn.errors import InputError


def test_detect_does_not_import_torch() -> None:
    code = (
        "import sys; from polyattn import Environment; e = Environment.detect(); "
        "assert 'torch' not in sys.modules; print(e.platform, e.python)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[1] == ".".join(map(str, sys.version_info[:3]))


def test_assume() -> None:
    base = Environment(distributions={"torch": "2.13.0", "numpy": "2.0"}, torch="2.13.0")
    hopper = Environment.assume("cuda:9.0, torch:2.11, Flash_Attn:2.8.3,numpy:none", base=base)
    assert (hopper.platform, hopper.arch, hopper.torch) == ("cuda", "9.0", "2.11")
    assert hopper.version_of("flash-attn") == hopper.version_of("flash_attn") == "2.8.3"
    assert hopper.version_of("numpy") is None
    assert hopper.cuda is not None
    assert hopper.hip is None
    assert Environment.assume("rocm", base=base).arch == "gfx942"
    assert Environment.assume("mps", base=base).platform == "mps"
    assert Environment.assume("", base=base) == base
    assert base.version_of("numpy") == "2.0"


@pytest.mark.parametrize(
    "text", ["cuda:hopper", "cuda,cpu", "cpu:banana", "H100", "torch:", ":9.0", "cuda:9", "a b:1"]
)
def test_assume_refuses(text: str) -> None:
    with pytest.raises(InputError, match="assume"):
        Environment.assume(text, base=Environment())


def test_frozen_and_serialisable() -> None:
    machine = Environment(accelerator=Accelerator(platform="cuda", arch="9.0"))
    assert Environment.model_validate_json(machine.model_dump_json()) == machine
    with pytest.raises(Exception, match="frozen"):
        machine.torch = "2.0"  # type: ignore[misc]
    assert machine.with_accelerator(Accelerator(platform="cpu")).platform == "cpu"
    assert machine.platform == "cuda"


def test_the_cpu_of_any_machine_is_a_cpu() -> None:
    assert Environment.detect("cpu").platform == "cpu"


@pytest.mark.parametrize("metadata", [None, b"Name: half\n", b"\xff\xfe\x00broken"])
def test_unreadable_metadata_is_left_out_with_a_warning(
    metadata: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What an interrupted uninstall leaves behind stops nothing."""
    folder = tmp_path / "half-1.0.dist-info"
    folder.mkdir()
    if metadata is not None:
        (folder / "METADATA").write_bytes(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level("WARNING", logger="polyattn"):
        found = Environment.detect().distributions
    assert "half" not in found
    assert "pydantic" in found
    assert str(folder) in caplog.text
