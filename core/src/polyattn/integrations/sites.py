"""From what a user asks of a whole model to the call sites of its attention, by role."""

from __future__ import annotations

from typing import Any

from polyattn.config import load_config, per_backend, validate
from polyattn.discovery import registry
from polyattn.dispatch import CallSite, call_site
from polyattn.naming import backend_named, resolve_name
from polyattn.selection import select

__all__ = ["call_sites"]


def call_sites(backend: str | None, config: Any, cross_backend: str | None) -> dict[str, CallSite]:
    """The call sites by role, ``""`` for all roles but cross-attention; checks names and config."""
    wanted = _named(backend, "polyattn.apply")
    cross = _named(cross_backend, "cross_backend of polyattn.apply")
    parameters = load_config(config)
    nested = per_backend(parameters, registry()) if parameters else None
    if wanted is None and parameters:
        select(config=parameters)  # raises for parameters that no automatic choice would take
    for name in (wanted, cross):
        if name is not None:
            canonical, implied = resolve_name(name)
            given = parameters if nested is None else nested.get(canonical, {})
            if nested is not None or name is wanted:
                validate(backend_named(name).spec, given, implied=implied, alias=name,
                         source="the configuration")  # fmt: skip
    general = call_site(wanted, parameters or None, scope="model")
    if cross is None:
        return {"": general, "cross": general}
    same = wanted is not None and resolve_name(wanted)[0] == resolve_name(cross)[0]
    cross_parameters = parameters if nested is not None or same else {}
    # Named for exactly these layers, so strict like a layer's own wish.
    return {"": general, "cross": call_site(cross, cross_parameters or None, scope="layer")}


def _named(name: str | None, source: str) -> str | None:
    if name in (None, "auto"):
        return None
    resolve_name(name, source=source)
    return name
