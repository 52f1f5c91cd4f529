"""Settings of the tests of polyattn-sage, and how they pretend to have a GPU and a vendor package.

The stand-ins compute on the CPU, so all that has to be pretended is what the machine says of
itself: ``Environment.detect`` is replaced by one that reports a CUDA device, and everything else,
from discovery to the dispatcher, runs as it does for a user.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from polyattn import dispatch, selection
from polyattn.environment import Accelerator, Environment
from polyattn.testing import default_settings, fake_distribution
from polyattn.testing.plugin import pytest_terminal_summary
from polyattn_sage.installation import load_failures

__all__ = ["pytest_terminal_summary"]

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)

STAND_INS = Path(__file__).parent / "stand_ins"
VENDOR_MODULES = ("sageattention", "sageattn3", "fp4attn_cuda", "fp4quant_cuda")
detect = Environment.detect


def source(name: str) -> str:
    return (STAND_INS / f"{name}.py").read_text(encoding="utf-8")


def write_sageattention_1(folder: Path, version: str = "1.0.6") -> Path:
    return fake_distribution(
        folder, "sageattention", version, {}, {"sageattention.__init__": source("sageattention_1")}
    )


def write_sageattention_2(folder: Path, version: str = "2.2.0") -> Path:
    flags = "SM80_ENABLED = SM89_ENABLED = SM90_ENABLED = True\n"
    modules = {"sageattention.core": flags, "sageattention.__init__": source("sageattention_2")}
    fake_distribution(folder, "sageattention", version, {}, modules)
    (folder / "sageattention" / "_fused.abi3.so").touch()
    return folder


def write_sageattn3(folder: Path, version: str = "1.0.0") -> Path:
    modules = {"sageattn3.__init__": source("sageattn3"), "fp4attn_cuda": "", "fp4quant_cuda": ""}
    return fake_distribution(folder, "sageattn3", version, {}, modules)


WRITERS: dict[str, Callable[..., Path]] = {
    "sageattention 1": write_sageattention_1,
    "sageattention 2": write_sageattention_2,
    "sageattn3": write_sageattn3,
}


@contextlib.contextmanager
def pretending(arch: str, *folders: Path) -> Iterator[None]:
    """A CUDA device of this compute capability, and what is installed in the folders."""

    def pretended(cls: type[Environment], device: str | None = None) -> Environment:
        device_found = Accelerator(platform="cuda", arch=arch, device_name="pretended")
        found = detect(device).with_accelerator(device_found)
        if any(list(folder.glob("fastvideo_kernel*")) for folder in folders):
            return found
        # What happens to be installed here as well, and takes names of SageAttention 3.
        others = {k: v for k, v in found.distributions.items() if k != "fastvideo-kernel"}
        return found.model_copy(update={"distributions": others})

    real = forget_vendors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "detect", classmethod(pretended))
        for folder in folders:
            patch.syspath_prepend(str(folder))
        forget_decisions()
        try:
            with default_settings():
                yield
        finally:
            forget_vendors()
            sys.modules.update(real)
    forget_decisions()


def forget_vendors() -> dict[str, ModuleType]:
    """Unload the vendors' modules; a real one must come back as it was, it registers operators."""
    names = [name for name in sys.modules if name.partition(".")[0] in VENDOR_MODULES]
    load_failures.clear()
    importlib.invalidate_caches()
    return {name: sys.modules.pop(name) for name in names}


def forget_decisions() -> None:
    selection.local_environment.cache_clear()
    dispatch.clear_decisions()
    selection._refused.clear()


@pytest.fixture(scope="session")
def pretended() -> Any:
    """:func:`pretending`, for test modules."""
    return pretending


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a stand-in: ``stand_in("sageattention 2")``, or with a version of its own."""

    def write(what: str, *version: str) -> Path:
        return WRITERS[what](tmp_path_factory.mktemp("installed"), *version)

    return write
