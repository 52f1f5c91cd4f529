"""What the user set: process-wide settings, and the forced backend of the current thread or task.

:func:`configure` replaces one immutable :class:`Settings` value for the whole process;
:func:`force_backend` lives in a ContextVar, so it touches the current thread or asyncio task only
(a thread started later does not inherit it; use :func:`configure` for the whole process).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, get_args

from polyattn.config import load_config, per_backend, validate
from polyattn.discovery import registry
from polyattn.errors import ConfigError, InputError, SelectionConflictError, nearest
from polyattn.naming import resolve_name

__all__ = ["OnUnavailable", "Settings", "configure", "current_settings", "force_backend", "forced"]

logger = logging.getLogger("polyattn")

USUAL_ROLES = ("self", "cross", "joint")  # a model may name roles of its own
OnUnavailable = Literal["error", "fallback"]


@dataclass(frozen=True, eq=False)
class Settings:
    """Process-wide settings. ``config`` maps canonical backend names to their parameters.

    ``source`` says where ``backend`` came from, for messages and reports. Compared by identity:
    a change makes a new value, and decisions are cached on it.
    """

    backend: str | None = None
    source: str = "global"
    roles: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    on_unavailable: OnUnavailable = "error"


_settings: Settings | None = None
_UNCHANGED: Any = object()


def current_settings() -> Settings:
    """The settings in force; on first use they start from ``POLYATTN_BACKEND``."""
    global _settings
    if _settings is None:
        named = os.environ.get("POLYATTN_BACKEND", "").strip() or None
        if named is not None:
            resolve_name(named, source="the environment variable POLYATTN_BACKEND")
        _settings = Settings(backend=named, source="POLYATTN_BACKEND" if named else "global")
    return _settings


def configure(
    backend: str | None = _UNCHANGED,
    *,
    roles: Mapping[str, str] | None = _UNCHANGED,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = _UNCHANGED,
    on_unavailable: OnUnavailable = _UNCHANGED,
) -> Settings:
    """Set defaults for the whole process; what is left out stays, None clears.

    ``backend`` is the global choice, ``roles`` maps roles to backends (``{"cross": "torch_sdpa"}``)
    and outranks it, ``config`` is anything :func:`polyattn.load_config` reads: parameters of
    ``backend``, or a mapping from backend name to parameters. ``on_unavailable="fallback"`` lets
    automatic selection step in where a named backend cannot run; the report says so. Names and
    parameters are checked here, and nothing changes when one is wrong. Returns the new settings.
    """
    global _settings
    new = current_settings()
    if backend is not _UNCHANGED:
        if backend is not None:
            resolve_name(backend, source="polyattn.configure")
        new = replace(new, backend=backend, source="global")
    if roles is not _UNCHANGED:
        for role, name in (roles or {}).items():
            resolve_name(name, source=f"polyattn.configure for the role {role!r}")
            close = nearest(role, USUAL_ROLES)
            if role not in USUAL_ROLES and close:
                logger.warning("the role %r is set; did you mean %r?", role, close[0])
        new = replace(new, roles=dict(roles or {}))
    if config is not _UNCHANGED:
        new = replace(new, config=_config_by_backend(config, new.backend))
    if on_unavailable is not _UNCHANGED:
        if on_unavailable not in get_args(OnUnavailable):
            raise InputError(
                f"on_unavailable is 'error' or 'fallback', found {on_unavailable!r}",
            )
        new = replace(new, on_unavailable=on_unavailable)
    _settings = new
    return new


def _config_by_backend(
    config: str | os.PathLike[str] | Mapping[str, Any] | None, backend: str | None
) -> dict[str, dict[str, Any]]:
    parameters = load_config(config)
    if not parameters:
        return {}
    known = registry()
    result = per_backend(parameters, known)
    if result is None:
        if backend is None:
            raise ConfigError(
                f"the parameters {', '.join(parameters)} belong to no backend: none is named",
                hint="polyattn.configure('NAME', config=...), or config={'NAME': {...}}",
            )
        result = {resolve_name(backend)[0]: parameters}
    for name, given in result.items():
        # The requested name's implied parameters are merged at selection; a clash shows here too.
        asked, implied = resolve_name(backend) if backend is not None else (name, {})
        validate(known.backends[name].spec, given, implied=implied if asked == name else {})
    return result


_forced: ContextVar[str | None] = ContextVar("polyattn_forced_backend", default=None)
forced = _forced.get


class force_backend:  # noqa: N801 - called like a function, used like a context manager
    """Force every call of this thread or task onto one backend, above all other settings.

    ``force_backend("torch_sdpa")`` takes effect at once and ``force_backend(None)`` clears it;
    ``with force_backend("torch_sdpa"): ...`` restores, at the end of the block, what was in force
    before. Blocks nest.
    """

    def __init__(self, backend: str | None) -> None:
        if backend is not None:
            resolve_name(backend, source="polyattn.force_backend")
        self._token: Token[str | None] | None = _forced.set(backend)

    def __enter__(self) -> None:
        if self._token is None:
            raise SelectionConflictError(
                "this force_backend(...) was already used in a with block; make a new one"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        token, self._token = self._token, None
        if token is not None:
            _forced.reset(token)
