"""Finding plugins: each one is loaded inside its own guard, and every failure becomes a value.

A plugin that cannot be imported, raises in its hook, returns something else than specs, speaks
another API version, prints, imports torch, or claims a name that is taken, is reported as a
:class:`Finding`; all other plugins still work. ``POLYATTN_PLUGINS=a,b`` limits what is loaded to
those entry points (empty loads none), ``POLYATTN_DISABLE=dist-a,dist-b`` leaves distributions out.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import importlib_metadata
import pluggy
from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as PackagingRequirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, ValidationError

from polyattn import hooks
from polyattn.contract import API_VERSION, OLDEST_API_VERSION, BackendSpec, Requirement
from polyattn.environment import Accelerator

__all__ = ["Finding", "RegisteredBackend", "Registry", "discover", "registry"]


class Finding(BaseModel):
    """Something wrong with a plugin: where, at which stage, and whether it was left out."""

    model_config = ConfigDict(frozen=True)

    distribution: str
    version: str
    entry_point: str
    stage: str
    message: str
    severity: str = "error"
    traceback: str | None = None


@dataclass(frozen=True)
class RegisteredBackend:
    """A valid spec and the distribution it came from."""

    spec: BackendSpec
    distribution: str
    version: str
    entry_point: str

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Registry:
    """What discovery found. ``aliases`` maps an alias to (canonical name, implied parameters)."""

    backends: Mapping[str, RegisteredBackend] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    accelerators: tuple[Accelerator, ...] = ()

    def names(self) -> list[str]:
        """All accepted names: canonical ones first."""
        return [*self.backends, *self.aliases]


@functools.lru_cache(maxsize=1)
def registry() -> Registry:
    """The plugins of this process, discovered once."""
    return discover(installed_entry_points())


def installed_entry_points(path: list[str] | None = None) -> Iterable[Any]:
    """The entry points plugins publish, on ``path`` or where Python looks for distributions.

    One distribution after the other: a list that cannot be parsed would otherwise hide all others.
    Of two installations of one distribution, the first on the path counts, as for imports.
    :mod:`polyattn.testing` puts another function in this one's place.
    """
    found: list[Any] = []
    seen: set[str] = set()
    where = {} if path is None else {"path": path}
    for distribution in importlib_metadata.distributions(**where):
        try:
            points: list[Any] = [
                point
                for point in distribution.entry_points
                if point.group == hooks.ENTRY_POINT_GROUP
            ]
        except Exception as error:
            if hooks.ENTRY_POINT_GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue  # somebody else's trouble
            points = [_UnreadableEntryPoints(distribution, error)]
        if points and (name := canonicalize_name(distribution.name)) not in seen:
            seen.add(name)
            found += points
    return found


@dataclass(frozen=True)
class _UnreadableEntryPoints:
    """Stands for a distribution whose entry points cannot be parsed; loading it tells why."""

    dist: Any
    error: Exception
    name: str = "?"
    value: str = "?"

    def load(self) -> Any:
        raise self.error


def discover(entry_points: Iterable[Any]) -> Registry:
    """Load the given entry points, each in its own guard, in order of distribution name."""
    loader = _Loader()
    for entry_point in _chosen(entry_points, loader.findings):
        loader.load(entry_point)
    return loader.finish()


def _chosen(entry_points: Iterable[Any], findings: list[Finding]) -> list[Any]:
    """The entry points that the environment variables leave in."""
    chosen = sorted(entry_points, key=lambda each: (_origin(each)[0], each.name))
    disabled = {canonicalize_name(name) for name in _listed("POLYATTN_DISABLE")}
    known = {canonicalize_name(_origin(each)[0]) for each in chosen}
    for unknown in sorted(disabled - known):
        findings.append(
            Finding(
                distribution="POLYATTN_DISABLE",
                version="",
                entry_point=unknown,
                stage="metadata",
                message=f"POLYATTN_DISABLE names {unknown!r}; no installed distribution of that "
                f"name offers backends (they come from: {', '.join(sorted(known)) or 'none'})",
            )
        )
    chosen = [each for each in chosen if canonicalize_name(_origin(each)[0]) not in disabled]
    if "POLYATTN_PLUGINS" in os.environ:
        wanted = _listed("POLYATTN_PLUGINS")
        for name in wanted:
            if name not in {each.name for each in chosen}:
                findings.append(
                    Finding(
                        distribution="POLYATTN_PLUGINS",
                        version="",
                        entry_point=name,
                        stage="metadata",
                        message=f"POLYATTN_PLUGINS names {name!r}, which no installed "
                        f"distribution offers (installed: "
                        f"{', '.join(sorted({each.name for each in chosen})) or 'none'})",
                    )
                )
        chosen = [each for each in chosen if each.name in wanted]
    return chosen


def _listed(variable: str) -> list[str]:
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]


def _origin(entry_point: Any) -> tuple[str, str]:
    distribution = getattr(entry_point, "dist", None)
    if distribution is None:
        return "unknown", ""
    return str(distribution.name), str(distribution.version)


class _Loader:
    """One discovery: collects specs and findings, then settles names."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.accelerators: list[Accelerator] = []
        self.found: list[RegisteredBackend] = []
        self.manager = pluggy.PluginManager("polyattn")
        self.manager.add_hookspecs(hooks)

    def load(self, entry_point: Any) -> None:
        torch_before = "torch" in sys.modules
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            self._load_quietly(entry_point)
        if output.getvalue().strip():
            first_line = output.getvalue().strip().splitlines()[0][:200]
            self._report(entry_point, "output", f"prints while it is loaded: {first_line!r}", True)
        if not torch_before and "torch" in sys.modules:
            self._report(
                entry_point,
                "import",
                "imports torch while it is discovered, which makes every listing slow; import it "
                "in the implementation module instead",
                True,
            )

    def _load_quietly(self, entry_point: Any) -> None:
        plugin = self._guard(entry_point, "import", entry_point.load)
        if plugin is None:
            return
        name = f"{_origin(entry_point)[0]}:{entry_point.name}"
        if self.manager.has_plugin(name) or self.manager.is_registered(plugin):
            self._report(entry_point, "register", "is declared twice by the same distribution")
            return
        registered = self._guard(
            entry_point, "register", lambda: self.manager.register(plugin, name)
        )
        if registered is None:
            return
        impls = [
            impl
            for caller in (
                self.manager.hook.polyattn_backends,
                self.manager.hook.polyattn_accelerator,
            )
            for impl in caller.get_hookimpls()
            if impl.plugin is plugin
        ]
        if not impls:
            self._report(
                entry_point,
                "hook",
                f"{entry_point.value} implements no polyattn hook; define polyattn_backends() "
                "marked with @polyattn.hooks.hookimpl",
            )
        for impl in impls:
            if impl.function.__name__ == "polyattn_accelerator":
                self._take_accelerator(entry_point, impl.function)
            else:
                self._take_specs(entry_point, impl.function)

    def _take_accelerator(self, entry_point: Any, function: Callable[[], Any]) -> None:
        accelerator = self._guard(entry_point, "hook", function)
        if isinstance(accelerator, Accelerator):
            self.accelerators.append(accelerator)
        elif accelerator is not None:
            self._report(entry_point, "hook", f"polyattn_accelerator returned {accelerator!r}")

    def _take_specs(self, entry_point: Any, function: Callable[[], Any]) -> None:
        specs = self._guard(entry_point, "hook", lambda: _as_list(function()))
        for spec in specs or ():
            if not isinstance(spec, BackendSpec):
                self._report(
                    entry_point,
                    "spec",
                    f"polyattn_backends returned {type(spec).__name__}, not a BackendSpec",
                )
                continue
            if not OLDEST_API_VERSION <= spec.api_version <= API_VERSION:
                self._report(
                    entry_point,
                    "api_version",
                    f"{spec.name} is built for API {spec.api_version}, this polyattn speaks "
                    f"{OLDEST_API_VERSION} to {API_VERSION}: upgrade "
                    + ("polyattn" if spec.api_version > API_VERSION else "the plugin"),
                )
                continue
            if spec.model_extra:
                self._report(
                    entry_point,
                    "spec",
                    f"{spec.name} declares fields this polyattn does not know and ignores: "
                    f"{', '.join(sorted(spec.model_extra))}",
                    True,
                )
            distribution, version = _origin(entry_point)
            if not spec.requirements:
                spec = spec.model_copy(update={"requirements": _requirements_of(entry_point)})
            self.found.append(RegisteredBackend(spec, distribution, version, entry_point.name))

    def finish(self) -> Registry:
        """Settle names: a name claimed twice belongs to nobody until one claimant is disabled."""
        backends: dict[str, RegisteredBackend] = {}
        claims: dict[str, list[RegisteredBackend]] = {}
        for backend in self.found:
            claims.setdefault(backend.name, []).append(backend)
        for name, claimants in claims.items():
            if len(claimants) == 1:
                backends[name] = claimants[0]
                continue
            for backend in claimants:
                self._conflict(backend, f"the name {name!r}", claimants)
        alias_claims: dict[str, list[RegisteredBackend]] = {}
        for backend in backends.values():
            for alias in backend.spec.aliases:
                alias_claims.setdefault(alias, []).append(backend)
        aliases: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for alias, claimants in alias_claims.items():
            if alias in claims:
                for backend in claimants:
                    if claims[alias] != [backend]:
                        self._conflict(backend, f"the alias {alias!r}", [backend, *claims[alias]])
            elif len(claimants) > 1:
                for backend in claimants:
                    self._conflict(backend, f"the alias {alias!r}", claimants)
            else:
                aliases[alias] = (claimants[0].name, claimants[0].spec.aliases[alias])
        return Registry(backends, aliases, tuple(self.findings), tuple(self.accelerators))

    def _conflict(
        self, backend: RegisteredBackend, what: str, claimants: list[RegisteredBackend]
    ) -> None:
        holders = sorted({each.distribution for each in claimants})
        self.findings.append(
            Finding(
                distribution=backend.distribution,
                version=backend.version,
                entry_point=backend.entry_point,
                stage="conflict",
                message=f"{what} is claimed by {' and '.join(holders)}; it stays unusable until "
                f"one is left out, e.g. POLYATTN_DISABLE={backend.distribution}",
            )
        )

    def _guard(self, entry_point: Any, stage: str, action: Callable[[], Any]) -> Any:
        """Run ``action``; an exception, or an attempt to exit, becomes a finding and None."""
        try:
            return action()
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]
            place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
            message = _first_lines(error) if isinstance(error, ValidationError) else str(error)
            lines = traceback.format_exception(error)
            head = "".join(lines if len(lines) < 8 else [*lines[:1], *lines[-6:]])
            self._report(
                entry_point, stage, f"{type(error).__name__}: {message}{place}", trace=head
            )
            return None

    def _report(
        self,
        entry_point: Any,
        stage: str,
        message: str,
        warning: bool = False,
        trace: str | None = None,
    ) -> None:
        distribution, version = _origin(entry_point)
        self.findings.append(
            Finding(
                distribution=distribution,
                version=version,
                entry_point=entry_point.name,
                stage=stage,
                message=message,
                severity="warning" if warning else "error",
                traceback=trace,
            )
        )


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(
            f"polyattn_backends must return a list of BackendSpec, not {type(value).__name__}"
        )
    return list(value)


def _first_lines(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'spec'}: {each['msg']}" for each in error.errors()[:4]
    )


def _requirements_of(entry_point: Any) -> tuple[Requirement, ...]:
    """What the plugin's own metadata asks for: its dependencies and its ``kernel`` extra.

    The version range of a kernel library is thus written once, in the plugin's pyproject.toml.
    """
    distribution = getattr(entry_point, "dist", None)
    return tuple(_read_requirements(distribution)) if distribution is not None else ()


def _read_requirements(distribution: Any) -> Iterator[Requirement]:
    own_name = str(distribution.name)
    for text in distribution.requires or ():
        try:
            parsed = PackagingRequirement(text)
        except InvalidRequirement:
            continue
        if canonicalize_name(parsed.name).split("-")[0] == "polyattn":
            continue
        needs_extra = parsed.marker is not None and not parsed.marker.evaluate({"extra": ""})
        if needs_extra and parsed.marker is not None:
            if not parsed.marker.evaluate({"extra": "kernel"}):
                continue
            hint = f'pip install "{own_name}[kernel]"'
        else:
            hint = f'pip install "{parsed.name}{parsed.specifier}"'
        yield Requirement(
            distribution=canonicalize_name(parsed.name),
            specifier=str(parsed.specifier),
            hint=hint,
        )
