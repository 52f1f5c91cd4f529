"""AITER's stand-in, and a CPU that passes for the GPU it runs on.

AITER needs an AMD GPU. In its place stands a module that takes exactly the parameters of a release,
computes in plain torch, and keeps the vendor's habits. Core looks at the machine in one place,
``Environment.detect``: with that replaced, everything from the probes to the report believes in a
gfx942 while tensors stay on the CPU. What this proves is the adapter, not the vendor's kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from polyattn.environment import Accelerator, Environment
from polyattn.testing import fake_distribution, isolated_registry
from polyattn.testing.plugin import pytest_terminal_summary
from polyattn_aiter import SPEC

__all__ = ["pytest_terminal_summary"]

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)

STAND_IN = (Path(__file__).parent / "stand_in.py").read_text(encoding="utf-8")


def machine(arch: str = "gfx942", distributions: dict[str, str] | None = None) -> Environment:
    """A ROCm machine with AITER on it."""
    installed = {"torch": "2.9.0", "amd-aiter": "0.1.9"}
    return Environment(
        accelerator=Accelerator(platform="rocm", arch=arch, device_name="assumed"),
        torch="2.9.0",
        hip="6.4",
        distributions=installed if distributions is None else distributions,
    )


@contextlib.contextmanager
def pretend(
    folder: Path, source: str | None, environment: Environment | None = None
) -> Iterator[None]:
    """This process on another machine, where the module aiter is ``source`` (None: no file)."""
    environment = environment or machine()
    if source is None:
        fake_distribution(folder, "amd-aiter", "0.1.9", {}, {})
        folder.joinpath("aiter").mkdir()
    else:
        fake_distribution(folder, "amd-aiter", "0.1.9", {}, {"aiter.__init__": source})
    with pytest.MonkeyPatch.context() as patch, _fresh_modules():
        patch.setattr(Environment, "detect", classmethod(lambda cls, device=None: environment))
        patch.syspath_prepend(str(folder))
        with isolated_registry(SPEC):  # empties every cache that knows the machine or a backend
            yield


@contextlib.contextmanager
def _fresh_modules() -> Iterator[None]:
    """Import aiter, and the module that imports it, anew inside; afterwards all is as it was."""

    def concerned() -> list[str]:
        return [
            name
            for name in sys.modules
            if name.partition(".")[0] == "aiter" or name == "polyattn_aiter.attention"
        ]

    saved = {name: sys.modules.pop(name) for name in concerned()}
    try:
        yield
    finally:
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(saved)
        importlib.invalidate_caches()


def stand_in(release: str) -> str:
    return f"{STAND_IN}\n\nflash_attn_func = {release}\n"


@pytest.fixture(scope="class")
def pretended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The machine for a whole class, with the stand-in of its attribute ``release``."""
    with pretend(tmp_path_factory.mktemp("aiter"), stand_in(request.cls.release)):
        yield


class Pretence:
    """Machines for single tests: ``with pretence("release_of_2025_11") as aiter: ...``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def __call__(self, release: str, arch: str = "gfx942") -> Iterator[ModuleType]:
        with pretend(self.folder / f"{release}-{arch}", stand_in(release), machine(arch)):
            yield importlib.import_module("aiter")

    @contextlib.contextmanager
    def broken(
        self, source: str | None, distributions: dict[str, str] | None = None
    ) -> Iterator[None]:
        with pretend(self.folder / "broken", source, machine(distributions=distributions)):
            yield


@pytest.fixture
def pretence(tmp_path: Path) -> Pretence:
    return Pretence(tmp_path)
