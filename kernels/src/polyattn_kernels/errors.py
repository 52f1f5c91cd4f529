"""The errors this package raises on purpose.

A message says what was asked, what was found, what was required and, when something can be typed
to help, ends with a line that starts with ``Try:``.
"""

from __future__ import annotations

__all__ = ["AttentionInputError", "PlanError", "ProviderError"]


class _HintedError(Exception):
    """``hint`` is one thing the reader can type next, or None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  Try: {hint}")
        self.message = message
        self.hint = hint


class AttentionInputError(_HintedError, ValueError):
    """Tensors or arguments that no provider could accept."""


class PlanError(_HintedError, ValueError):
    """A plan that does not describe which key blocks each query block attends to."""


class ProviderError(_HintedError, RuntimeError):
    """A named provider cannot serve the call, or does not exist; the message holds all reasons."""
