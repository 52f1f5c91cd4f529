"""A process that knows exactly the plugins a test gives it, and folders that hold fake plugins.

:func:`isolated_registry` swaps the process's registry, settings and cached decisions for fresh ones
and puts the old ones back, whatever happens in between. :func:`fake_distribution` writes what an
installer would write, so that a subprocess finds a plugin through ``PYTHONPATH`` alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from polyattn import context, discovery, reporting, selection, settings
from polyattn.contract import BackendSpec
from polyattn.discovery import Registry
from polyattn.hooks import ENTRY_POINT_GROUP, hookimpl

__all__ = ["default_settings", "fake_distribution", "isolated_registry"]


def fake_distribution(
    path: str | os.PathLike[str],
    name: str,
    version: str,
    entry_points: Mapping[str, str],
    module_source: str | Mapping[str, str],
    requires: Iterable[str] = (),
) -> Path:
    """Write an installed-looking distribution into the folder ``path``, and return that folder.

    ``entry_points`` maps names in the group ``polyattn.backends`` to values
    (``{"x": "x_module"}``). ``module_source`` is the source of the one module they point to, or a
    mapping from module name to source. With ``path`` on ``sys.path`` or ``PYTHONPATH`` the
    distribution counts as installed.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    modules = _modules(entry_points, module_source)
    files = [_write_module(folder, module, source) for module, source in modules.items()]
    metadata = folder / f"{re.sub(r'[-_.]+', '_', name)}-{version}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    declared = "".join(f"{point} = {value}\n" for point, value in entry_points.items())
    (metadata / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\n{declared}", encoding="utf-8"
    )
    files += [metadata / "METADATA", metadata / "entry_points.txt", metadata / "RECORD"]
    (metadata / "RECORD").write_text(
        "".join(f"{file.relative_to(folder).as_posix()},,\n" for file in files), encoding="utf-8"
    )
    importlib.invalidate_caches()
    return folder


def _modules(
    entry_points: Mapping[str, str], module_source: str | Mapping[str, str]
) -> Mapping[str, str]:
    if not isinstance(module_source, str):
        return module_source
    named = {value.partition(":")[0].strip() for value in entry_points.values()}
    if len(named) != 1:
        raise ValueError(
            f"one source needs entry points that name one module, found {sorted(named)}; "
            "give a mapping from module name to source"
        )
    return {named.pop(): module_source}


def _write_module(folder: Path, module: str, source: str) -> Path:
    *packages, last = module.split(".")
    for package in packages:
        folder = folder / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    file = folder / f"{last}.py"
    file.write_text(source, encoding="utf-8")
    return file


@dataclass(frozen=True)
class _Distribution:
    name: str
    version: str = "0.0"
    requires: tuple[str, ...] = ()


class _Plugin:
    """What an in-memory entry point loads: an object that publishes one spec."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec

    @hookimpl
    def polyattn_backends(self) -> list[BackendSpec]:
        return [self._spec]


@dataclass(frozen=True)
class _EntryPoint:
    """The part of an entry point that discovery uses."""

    name: str
    value: str
    dist: _Distribution
    plugin: _Plugin

    def load(self) -> _Plugin:
        return self.plugin


@dataclass(frozen=True)
class _InMemory:
    """Stands in for what is installed."""

    entry_points: list[_EntryPoint]

    def __call__(self, path: list[str] | None = None) -> list[_EntryPoint]:
        return self.entry_points


def _entry_point(spec: BackendSpec) -> _EntryPoint:
    distribution = _Distribution(canonicalize_name(f"polyattn-{spec.name}"))
    return _EntryPoint(spec.name, f"in_memory:{spec.name}", distribution, _Plugin(spec))


@contextlib.contextmanager
def isolated_registry(*specs: BackendSpec) -> Iterator[Registry]:
    """Replace the process's plugins by exactly these backends until the ``with`` block ends.

    The specs pass through discovery as if each came from a distribution ``polyattn-<name>`` 0.0, so
    what discovery would refuse becomes a finding of the registry that is yielded. Settings start
    from their defaults inside, and every cache that knows a backend is emptied on both sides. The
    registry is one per process: other threads see the swap.
    """
    original = discovery.installed_entry_points
    discovery.installed_entry_points = _InMemory([_entry_point(spec) for spec in specs])
    _forget()
    try:
        with default_settings():
            yield _discovered_whole()
    finally:
        discovery.installed_entry_points = original
        _forget()
        if isinstance(original, _InMemory):  # back in an enclosing block
            _discovered_whole()


def _discovered_whole() -> Registry:
    """Fill the registry without the variables that leave plugins out."""
    limits = {
        variable: os.environ.pop(variable)
        for variable in ("POLYATTN_PLUGINS", "POLYATTN_DISABLE")
        if variable in os.environ
    }
    try:
        return discovery.registry()
    finally:
        os.environ.update(limits)


def _forget() -> None:
    """Empty every cache that holds what came from a plugin."""
    discovery.registry.cache_clear()
    selection.local_environment.cache_clear()  # holds devices that plugins taught
    selection._log_once.cache_clear()
    selection._broken.clear()
    selection._factories.clear()
    selection._refused.clear()
    dispatch = sys.modules.get("polyattn.dispatch")  # imports torch: never load it for this
    if dispatch is not None:
        dispatch.clear_decisions()


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Run as if nobody had configured anything: no settings, no forced backend, no context.

    Calls are reported apart, so that a test neither reads nor fills the process's own report.
    """
    saved = settings._settings
    settings._settings = settings.Settings()
    forced = settings._forced.set(None)
    position = context._current.set(None)
    try:
        with reporting.reporting_to(reporting.Report()):
            yield
    finally:
        context._current.reset(position)
        settings._forced.reset(forced)
        settings._settings = saved
