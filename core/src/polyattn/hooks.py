"""The pluggy hooks through which a plugin speaks to polyattn.

A plugin is a distribution with an entry point in the group ``polyattn.backends`` whose value is a
module (or object) that implements ``polyattn_backends``::

    from polyattn.hooks import hookimpl

    @hookimpl
    def polyattn_backends():
        return [BackendSpec(...)]

Hooks are called by core's own guarded loop (:mod:`polyattn.discovery`), one plugin at a time, so a
plugin that fails never takes another one with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from polyattn.contract import BackendSpec
from polyattn.environment import Accelerator

__all__ = ["ENTRY_POINT_GROUP", "hookimpl", "polyattn_accelerator", "polyattn_backends"]

ENTRY_POINT_GROUP = "polyattn.backends"

hookspec = pluggy.HookspecMarker("polyattn")
hookimpl = pluggy.HookimplMarker("polyattn")


@hookspec
def polyattn_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """The backends this plugin offers. Must not import torch or a kernel library."""


@hookspec
def polyattn_accelerator() -> Accelerator | None:
    """Optional: the device of a platform core does not know, or None where it is absent."""
