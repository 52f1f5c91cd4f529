"""Every error polyattn raises on purpose, under one base class.

A message says what was asked, what was found, what was required, and, when something can be
typed to help, ends with a line that starts with ``Try:``. The classes also derive from the
built-in error a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BackendUnavailableError",
    "BridgeError",
    "ConfigError",
    "GenerateError",
    "InputError",
    "KernelError",
    "ParallelError",
    "PolyattnError",
    "SelectionConflictError",
    "UnknownBackendError",
    "nearest",
]


class PolyattnError(Exception):
    """Base of all polyattn errors. ``hint`` is one thing the reader can type next, or None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  Try: {hint}")
        self.message = message
        self.hint = hint


class InputError(PolyattnError, ValueError):
    """Tensors or arguments that no backend could accept: shapes, dtypes, devices, masks, scale."""


class ConfigError(PolyattnError, ValueError):
    """A configuration that cannot be read, or a parameter that a backend does not accept."""


class UnknownBackendError(PolyattnError, LookupError):
    """A backend name that no installed plugin declares."""


class BackendUnavailableError(PolyattnError, RuntimeError):
    """A named backend exists but cannot serve the request; the message holds all reasons.

    ``trace`` holds them as data: the :class:`~polyattn.selection.Candidate` values considered.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, trace: tuple[Any, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.trace = trace


class KernelError(PolyattnError, RuntimeError):
    """A backend raised while it was built or ran; ``__cause__`` is its own error."""


class ParallelError(PolyattnError, RuntimeError):
    """The processes of a parallel job do not fit together, or one of them failed."""


class SelectionConflictError(PolyattnError, RuntimeError):
    """Two settings that cannot both hold, e.g. a forced backend against a required one."""


class BridgeError(PolyattnError, RuntimeError):
    """A pipeline that the bridge cannot attach to, or that would not run what was asked."""


class GenerateError(PolyattnError, RuntimeError):
    """``polyattn generate`` cannot make the video that was asked for."""


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Names in ``known`` that look like ``name``, best first: what a typo was meant to be."""
    lowered = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), lowered, n=limit, cutoff=0.5)
    return [lowered[match] for match in matches]
