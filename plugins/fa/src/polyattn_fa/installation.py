"""Whether the files are there that a package's metadata promise; looked at without importing it.

Looked at only where this interpreter has the version asked about, so that a plan for another
machine is not answered with this machine's files. Only top-level names are searched for, as finding
``flash_attn.cute`` would import ``flash_attn``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import importlib_metadata

__all__ = ["missing_files"]


def missing_files(distribution: str, version: str, module: str) -> str | None:
    """What an installed distribution lacks of its module, in words; None where nothing is seen."""
    try:
        if importlib_metadata.version(distribution) != version:
            return None
    except importlib_metadata.PackageNotFoundError:
        return None
    name, _, inner = module.partition(".")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: it is imported, and has no spec
        return None
    if spec is None:
        return f"there is no module {name}"
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    if not inner:
        # A folder without code is a namespace, which has no origin.
        return None if spec.origin is not None else f"there is no __init__.py in {_joined(folders)}"
    if not all(each.is_dir() for each in folders):
        return None  # an editable installation finds its modules in another way
    if any((each / inner / "__init__.py").is_file() for each in folders):
        return None
    return f"there is no {inner}/__init__.py in {_joined(folders)}"


def _joined(folders: list[Path]) -> str:
    return " or ".join(map(str, folders))
