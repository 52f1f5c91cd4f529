"""The errors this package raises on purpose.

A message says what was asked, what was found, what was required and, when something can be typed
to help, ends with a line that starts with ``Try:``.
"""

from __future__ import annotations

import torch

__all__ = ["AttentionInputError", "PlanError", "ProviderError", "require_int"]


class _HintedError(Exception):
    """``hint`` is one thing the reader can type next, or None."""

    # Exception.__new__ keeps the message, and torch.compile cannot trace super().__init__.
    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  Try: {self.hint}"


class AttentionInputError(_HintedError, ValueError):
    """Tensors or arguments that no provider could accept."""


class PlanError(_HintedError, ValueError):
    """A plan that does not describe which key blocks each query block attends to."""


class ProviderError(_HintedError, RuntimeError):
    """A named provider cannot serve the call, or does not exist; the message holds all reasons."""


def require_int(
    name: str, value: object, least: int = 1, error: type[_HintedError] = AttentionInputError
) -> None:
    """Refuse what is no int of at least ``least``."""
    if not isinstance(value, (int, torch.SymInt)):
        raise error(f"{name} must be an int, found {value!r}")
    if value < least:
        raise error(f"{name} must be at least {least}, found {value}")
