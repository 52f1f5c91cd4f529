"""The facts about a machine that decide which attention kernel can run.

This is the only module that looks at the machine. Everything else takes an :class:`Environment`
as a value, so a decision about an H100 can be tested, or planned with ``--assume``, on a laptop.
Looking never imports torch: where torch is already loaded it is asked, otherwise its build is read
from its files and the GPU from the operating system.
"""

from __future__ import annotations

import ast
import csv
import functools
import logging
import os
import platform as python_platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import importlib_metadata
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, Field

from polyattn.errors import InputError

__all__ = ["KNOWN_PLATFORMS", "Accelerator", "Environment"]

KNOWN_PLATFORMS = ("cuda", "rocm", "mps", "npu", "xpu", "cpu")


class Accelerator(BaseModel):
    """One compute device: the platform it belongs to and what kernels need to know of it.

    ``arch`` is the compute capability for CUDA (``"9.0"``), the gfx name for ROCm
    (``"gfx942"``), and None where a platform has no such notion.
    """

    model_config = ConfigDict(frozen=True)

    platform: str
    arch: str | None = None
    device_name: str | None = None
    driver: str | None = None


class Environment(BaseModel):
    """What a machine is and has. Frozen and JSON-serialisable; build one by hand to plan for it.

    ``distributions`` maps normalised distribution names (``flash-attn``) to installed versions.
    """

    model_config = ConfigDict(frozen=True)

    accelerator: Accelerator = Accelerator(platform="cpu")
    torch: str | None = None
    cuda: str | None = None
    hip: str | None = None
    python: str = Field(default_factory=python_platform.python_version)
    system: str = Field(default_factory=python_platform.system)
    machine: str = Field(default_factory=python_platform.machine)
    distributions: Mapping[str, str] = Field(default_factory=dict)

    @property
    def platform(self) -> str:
        """``cuda``, ``rocm``, ``mps``, ``npu``, ``xpu``, ``cpu``, or a name a plugin taught."""
        return self.accelerator.platform

    @property
    def arch(self) -> str | None:
        return self.accelerator.arch

    def version_of(self, distribution: str) -> str | None:
        """Installed version of a distribution, or None."""
        return self.distributions.get(canonicalize_name(distribution))

    def describe(self) -> str:
        """One line for messages: ``cuda 9.0 (NVIDIA H100 80GB HBM3)``."""
        words = [self.platform]
        if self.arch:
            words.append(self.arch)
        if self.accelerator.device_name:
            words.append(f"({self.accelerator.device_name})")
        return " ".join(words)

    def with_accelerator(self, accelerator: Accelerator) -> Environment:
        """The same machine, seen from another of its devices."""
        return self.model_copy(update={"accelerator": accelerator})

    @classmethod
    def detect(cls, device: str | None = None) -> Environment:
        """Look at this machine.

        ``device`` is a torch device string (``"cpu"``, ``"cuda:1"``) to look from; by default the
        fastest device present. Does not import torch.
        """
        build = _torch_build()
        return cls(
            accelerator=_detect_accelerator(build, device),
            torch=build.get("version"),
            cuda=build.get("cuda"),
            hip=build.get("hip"),
            distributions=_installed_distributions(),
        )

    @classmethod
    def assume(cls, text: str, *, base: Environment | None = None) -> Environment:
        """An environment from words such as ``"cuda:9.0,torch:2.11,flash-attn:2.8.3"``.

        A platform word, of which there may be one, sets the device; ``torch:``, ``python:`` and
        any distribution name set versions, and a version of ``none`` removes a distribution. What
        is not mentioned is taken from ``base`` (by default, this machine).
        """
        start = base or cls.detect()
        accelerator: Accelerator | None = None
        facts: dict[str, Any] = {}
        distributions = dict(start.distributions)
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, separator, value = word.partition(":")
            name = name.strip()
            value = value.strip()
            if name.lower() in KNOWN_PLATFORMS:
                if accelerator is not None:
                    raise InputError(f"the assumed machine {text!r} names two platforms")
                accelerator = _assumed_accelerator(name.lower(), value or None)
            elif not separator or not value or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise InputError(
                    f"cannot read {word!r} in the assumed machine {text!r}: expected a platform "
                    f"({', '.join(KNOWN_PLATFORMS)}), a platform with its arch, or NAME:VERSION",
                    hint="--assume cuda:9.0,torch:2.11",
                )
            elif name == "python":
                facts["python"] = value
            else:
                distributions.pop(canonicalize_name(name), None)
                if value.lower() != "none":
                    distributions[canonicalize_name(name)] = value
        facts["torch"] = distributions.get("torch")
        if accelerator is not None:
            facts["cuda"] = (start.cuda or "assumed") if accelerator.platform == "cuda" else None
            facts["hip"] = (start.hip or "assumed") if accelerator.platform == "rocm" else None
        accelerator = accelerator or start.accelerator
        return start.model_copy(
            update={**facts, "accelerator": accelerator, "distributions": distributions}
        )


def _assumed_accelerator(platform: str, arch: str | None) -> Accelerator:
    if platform == "cuda":
        arch = arch or "9.0"
        if not re.fullmatch(r"\d+\.\d+", arch):
            raise InputError(
                f"cuda:{arch} is not a compute capability: expected MAJOR.MINOR",
                hint="--assume cuda:9.0",
            )
    elif platform == "rocm":
        arch = arch or "gfx942"
    elif arch is not None:
        raise InputError(
            f"{platform}:{arch} cannot be assumed: {platform} has no architectures",
            hint=f"--assume {platform}",
        )
    return Accelerator(platform=platform, arch=arch, device_name="assumed")


def _installed_distributions() -> dict[str, str]:
    """Name and version of everything installed; the first on the path wins, as for imports.

    What cannot be read, such as what an interrupted uninstall leaves, is left out with a warning.
    """
    found: dict[str, str] = {}
    for distribution in importlib_metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception as error:
            _warn_once(
                f"the metadata of an installed package cannot be read and it is left out: "
                f"{getattr(distribution, '_path', distribution)} ({type(error).__name__}: {error})"
            )
            continue
        if name and version:
            found.setdefault(canonicalize_name(name), version)
    return found


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("polyattn").warning(message)


def _torch_build() -> dict[str, str | None]:
    """Version, CUDA and HIP versions of the installed torch, read without importing it."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "version"):
        return {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    try:
        spec = find_spec("torch")
    except ValueError:  # a module of that name without a spec: not an installed torch
        spec = None
    if spec is None or spec.origin is None:
        return {}
    facts: dict[str, str | None] = {}
    try:
        tree = ast.parse(Path(spec.origin).with_name("version.py").read_text())
    except (OSError, SyntaxError):
        return {"version": _installed_distributions().get("torch")}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            target = node.target.id
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target = node.targets[0].id
        else:
            continue
        if isinstance(node.value, ast.Constant):
            value = node.value.value
            facts[target] = None if value is None else str(value)
    return {
        "version": facts.get("__version__"),
        "cuda": facts.get("cuda"),
        "hip": facts.get("hip"),
    }


def _detect_accelerator(build: Mapping[str, str | None], device: str | None) -> Accelerator:
    kind, _, index_text = (device or "").partition(":")
    index = int(index_text) if index_text.isdigit() else 0
    if kind == "cpu":
        return Accelerator(platform="cpu", device_name=python_platform.processor() or None)
    if "torch" in sys.modules:
        accelerator = _ask_torch(kind or None, index)
    else:
        accelerator = _ask_system(build)
    if kind and not _belongs(kind, accelerator.platform):
        # A device type this module does not know: its own name is its platform.
        return Accelerator(platform=kind)
    return accelerator


def _belongs(device_type: str, platform: str) -> bool:
    return device_type == platform or (device_type == "cuda" and platform == "rocm")


def _ask_torch(kind: str | None, index: int) -> Accelerator:
    import torch

    if kind in (None, "cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            arch = str(getattr(properties, "gcnArchName", "")).partition(":")[0] or None
            return Accelerator(platform="rocm", arch=arch, device_name=properties.name)
        arch = f"{properties.major}.{properties.minor}"
        return Accelerator(platform="cuda", arch=arch, device_name=properties.name)
    if kind in (None, "mps") and torch.backends.mps.is_available():
        return Accelerator(platform="mps", device_name=python_platform.processor() or None)
    if kind in (None, "xpu") and hasattr(torch, "xpu") and torch.xpu.is_available():
        return Accelerator(platform="xpu", device_name=torch.xpu.get_device_name(index))
    npu = getattr(torch, "npu", None)  # provided by the torch_npu package once it is imported
    if kind in (None, "npu") and npu is not None and npu.is_available():
        return Accelerator(platform="npu", device_name=npu.get_device_name(index))
    return Accelerator(platform="cpu", device_name=python_platform.processor() or None)


def _ask_system(build: Mapping[str, str | None]) -> Accelerator:
    """What the operating system says, limited to what the installed torch build could use."""
    torch_installed = bool(build)
    if not torch_installed or build.get("cuda"):
        found = _nvidia_gpu()
        if found is not None:
            return found
    if not torch_installed or build.get("hip"):
        found = _amd_gpu()
        if found is not None:
            return found
    if python_platform.system() == "Darwin" and python_platform.machine() == "arm64":
        return Accelerator(platform="mps", device_name="Apple silicon")
    return Accelerator(platform="cpu", device_name=python_platform.processor() or None)


def _nvidia_gpu() -> Accelerator | None:
    """The first visible NVIDIA GPU by ``nvidia-smi``, which ships with every driver."""
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible in ("", "-1"):
        return None
    command = [
        program,
        "--query-gpu=name,compute_cap,driver_version",
        "--format=csv,noheader",
    ]
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    for row in csv.reader(answer.stdout.splitlines(), skipinitialspace=True):
        if len(row) == 3:
            return Accelerator(platform="cuda", device_name=row[0], arch=row[1], driver=row[2])
    return None


def _amd_gpu() -> Accelerator | None:
    """The first AMD GPU in the kernel's compute topology (amdgpu's KFD interface in sysfs)."""
    nodes = Path("/sys/class/kfd/kfd/topology/nodes")
    for properties in sorted(nodes.glob("*/properties")) if nodes.is_dir() else ():
        try:
            match = re.search(r"^gfx_target_version (\d+)$", properties.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match and int(match[1]):
            major, minor, stepping = (
                int(match[1]) // 10000,
                int(match[1]) // 100 % 100,
                int(match[1]) % 100,
            )
            return Accelerator(platform="rocm", arch=f"gfx{major}{minor:x}{stepping:x}")
    return None
