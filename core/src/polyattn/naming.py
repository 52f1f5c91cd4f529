"""From a name a person typed to a registered backend: canonical names, aliases, and near misses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import importlib_metadata

from polyattn.discovery import RegisteredBackend, registry
from polyattn.errors import InputError, UnknownBackendError, nearest

__all__ = ["backend_named", "how_to_get_a_backend", "resolve_name"]


def resolve_name(name: str, *, source: str = "") -> tuple[str, Mapping[str, Any]]:
    """The canonical name behind ``name`` and the parameters an alias implies.

    Raises :class:`~polyattn.errors.UnknownBackendError` with the nearest names, and with the
    command that installs the backend where polyattn has an extra of that name.
    """
    if not isinstance(name, str):
        raise InputError(f"a backend is named by text, found {name!r}")
    known = registry()
    if name in known.backends:
        return name, {}
    if name in known.aliases:
        return known.aliases[name]
    asked = f"{name!r} (asked for by {source})" if source else repr(name)
    installed = ", ".join(known.names()) or "none"
    message = f"there is no installed backend {asked}; installed: {installed}"
    concerned = [finding for finding in known.findings if finding.severity == "error"]
    for finding in concerned:
        message += f"\n  {finding.distribution}: {finding.message}"
    close = nearest(name, known.names())
    conflicts = [
        finding
        for finding in concerned
        if finding.stage == "conflict" and repr(name) in finding.message
    ]
    if conflicts:
        hint: str | None = f"POLYATTN_DISABLE={conflicts[-1].distribution}"
    elif name in _extras():
        hint = f'pip install "polyattn[{name}]"'
    elif not known.backends:
        hint = how_to_get_a_backend()
    elif close:
        hint = " or ".join(close)
    else:
        hint = "polyattn backends"
    raise UnknownBackendError(message, hint=hint)


def how_to_get_a_backend() -> str:
    """What to type when no backend is there: install one, or stop leaving them all out."""
    limits = [name for name in ("POLYATTN_PLUGINS", "POLYATTN_DISABLE") if name in os.environ]
    return f"unset {' '.join(limits)}" if limits else 'pip install "polyattn[sdpa]"'


def backend_named(name: str, *, source: str = "") -> RegisteredBackend:
    """The registered backend behind a name or alias."""
    return registry().backends[resolve_name(name, source=source)[0]]


def _extras() -> set[str]:
    try:
        return set(importlib_metadata.metadata("polyattn").get_all("Provides-Extra") or ())
    except importlib_metadata.PackageNotFoundError:
        return set()
