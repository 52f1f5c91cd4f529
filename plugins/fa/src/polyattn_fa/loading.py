"""Importing a vendor package, and holding what comes with it against what this plugin calls.

A package can be installed and still not load: built for another torch (an undefined symbol), a
shared library missing, files of another distribution under its name. Each becomes a
:class:`~polyattn.contract.Reason` that is remembered, so that the next generation is tried and the
probes know from then on.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from polyattn.contract import AttentionRequest, Reason
from polyattn.environment import Environment
from polyattn.selection import local_environment
from polyattn_fa.generations import MASK_CHANNELS, Package, install_command, load_failures

__all__ = ["Kernels", "build_reasons", "enable_disk_cache", "load"]

# Keyword arguments of the vendor's functions that this plugin passes.
DENSE = ("softmax_scale", "causal")
VARLEN = (*DENSE, "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
LSE = {2: "return_attn_probs", 3: "return_attn_probs", 4: "return_lse"}


@dataclass(frozen=True)
class Kernels:
    """A loaded package: its two functions, how it is asked for the log-sum-exp, its build flags.

    ``lse_argument`` is None for builds of FA3 from before the argument existed; the oldest of them
    always return the log-sum-exp.
    """

    package: Package
    version: str
    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    lse_argument: str | None
    flags: Mapping[str, bool]

    def __str__(self) -> str:
        return f"{self.package.distribution} {self.version}"


_loaded: dict[tuple[str, str], Kernels] = {}


def load(package: Package, version: str) -> Kernels | Reason:
    """The package's functions, imported once per process, or why they cannot be used."""
    key = (package.distribution, version)
    if key in load_failures:
        return load_failures[key]
    if key not in _loaded:
        try:
            _loaded[key] = _import(package, version)
        except (Exception, SystemExit) as error:  # whatever a broken package raises
            load_failures[key] = Reason(
                code="kernel-import-failed",
                message=f"{package.distribution} {version} is installed but {package.module} does "
                f"not load under torch {torch.__version__}: {type(error).__name__}: {error}",
                hint=_repair(package, error),
            )
            return load_failures[key]
    return _loaded[key]


# Where a module that a vendor package imports has another name than its distribution.
DISTRIBUTIONS = {
    "cuda": "cuda-python",
    "cutlass": "nvidia-cutlass-dsl",
    "quack": "quack-kernels",
    "tvm_ffi": "apache-tvm-ffi",
}


def _repair(package: Package, error: BaseException) -> str:
    """The command for a package that does not load: what it lacks, or itself once more."""
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    missing = missing.partition(".")[0]
    # Its own compiled modules; and a part of torch that is missing means it is for another torch.
    if not missing or missing.startswith(("flash_attn", "fa3_fwd", "torch")):
        install = install_command(package, local_environment())
        return install.replace("install", "install --force-reinstall --no-deps", 1)
    return f"pip install --upgrade {DISTRIBUTIONS.get(missing, missing)}"


def _import(package: Package, version: str) -> Kernels:
    if package.generation == 4:
        enable_disk_cache()
    module = importlib.import_module(package.module)
    dense = _function(module, "flash_attn_func", DENSE)
    varlen = _function(module, "flash_attn_varlen_func", VARLEN)
    lse_argument: str | None = LSE[package.generation]
    if not (_takes(dense, lse_argument) and _takes(varlen, lse_argument)):
        if package.generation != 3:
            raise ImportError(f"{_where(module)}: flash_attn_func takes no {lse_argument}")
        lse_argument = None
    return Kernels(package, version, dense, varlen, lse_argument, _build_flags(package))


def _function(module: ModuleType, name: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """The module's function; an ImportError where it is not the one its package documents."""
    function = getattr(module, name, None)
    if not callable(function):
        raise ImportError(
            f"{_where(module)} has no {name}: a folder left by an uninstall, or files of another "
            "distribution"
        )
    missing = [each for each in arguments if not _takes(function, each)]
    if missing:
        raise ImportError(f"{_where(module)}: {name} takes no {', '.join(missing)}")
    return function  # type: ignore[no-any-return]


def _where(module: ModuleType) -> str:
    found = getattr(module, "__file__", None) or list(getattr(module, "__path__", ())) or "memory"
    return f"{module.__name__} (from {found})"


def _takes(function: Callable[..., Any], argument: str | None) -> bool:
    return argument in inspect.signature(function).parameters


def _build_flags(package: Package) -> Mapping[str, bool]:
    """What FA3 was built without, as its ``CONFIG`` tells; empty where a build tells nothing."""
    if package.build_flags is None:
        return {}
    try:
        flags = importlib.import_module(package.build_flags).CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError, TypeError):
        return {}
    return dict(flags)


def build_reasons(
    kernels: Kernels, request: AttentionRequest, environment: Environment
) -> list[Reason]:
    """What the request needs and this build left out."""

    def without(feature: str) -> bool:
        return bool(kernels.flags.get(f"FLASHATTENTION_DISABLE_{feature}", False))

    missing = []
    if request.dtype == "float16" and without("FP16"):
        missing.append("float16")
    if request.mask != "none" and not request.is_causal and without("VARLEN"):
        missing.append("variable lengths, which a key-padding mask needs")
    if (environment.arch or "").startswith("8.") and without("SM8x"):
        missing.append("compute capability 8.x")
    asked = head_dim = request.head_dim or 0
    why = ""
    if asked and request.is_causal and request.mask != "none":
        head_dim += MASK_CHANNELS
        why = f" (causal with a mask runs at {head_dim})"
    buckets = [each for each in (64, 96, 128, 192, 256) if not without(f"HDIM{each}")]
    if head_dim > max(buckets, default=0):
        missing.append(f"head dimensions above {max(buckets, default=0)}, found {asked}{why}")
    return [Reason(code="build", message=f"{kernels} was built without {each}") for each in missing]


def enable_disk_cache() -> None:
    """Let FA4 keep compiled kernels in the user's cache folder, unless the user decided otherwise.

    FA4 reads both variables while it is imported, creates the folder at once, and locks files in it
    with ``flock``: where that would fail, the cache stays off, which is the vendor's default.
    """
    enabled = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
    folder = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    if enabled in os.environ or folder in os.environ:
        return
    try:
        import fcntl

        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "polyattn" / "flash-attn-4"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(path / "polyattn.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # another process is here at the same moment: locks work
    except (ImportError, OSError, RuntimeError):
        return
    os.environ[enabled] = "1"
    os.environ[folder] = str(path)
