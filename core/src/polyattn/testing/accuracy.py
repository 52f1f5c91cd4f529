"""How far a result may be from the oracle, by the accuracy tier its backend declares.

Four measures, because cosine alone hides a wrong softmax denominator (it only scales the result)
and averages hide one wrong row. An exact backend may err twice as much as a plain kernel of the
same dtype does on the same numbers, plus a floor for rounding the result. A quantized backend has a
fixed budget that 8-bit and 4-bit attention meet on normally distributed inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

__all__ = [
    "EXACT_FACTOR",
    "QUANTIZED_BUDGET",
    "Errors",
    "budget",
    "excess",
    "lse_budget",
    "measure",
]


@dataclass(frozen=True)
class Errors:
    """Distance of a result from the expected one; every measure is 0 for equal tensors.

    ``norm``: the ratio of norms, less 1. ``relative_l1``: summed absolute difference over summed
    absolute values. ``worst_row``: the largest error of one row [D], relative to the row (or to a
    tenth of the mean row, for rows that nearly cancel). ``cosine``: 1 less the cosine of the angle.
    """

    norm: float
    relative_l1: float
    worst_row: float
    cosine: float


EXACT_FACTOR = 2.0
QUANTIZED_BUDGET = Errors(norm=0.05, relative_l1=0.2, worst_row=0.6, cosine=0.02)
TINY = 1e-300


def measure(actual: torch.Tensor, expected: torch.Tensor) -> Errors:
    """The errors of ``actual`` against ``expected``, two tensors whose last dimension is a row."""
    actual = actual.detach().to(expected.device, torch.float64)
    expected = expected.detach().to(torch.float64)
    difference = actual - expected
    norm, expected_norm = actual.norm().item(), expected.norm().item()
    rows = expected.norm(dim=-1)
    row_errors = difference.norm(dim=-1) / rows.clamp(min=max(0.1 * rows.mean().item(), TINY))
    both = norm * expected_norm
    cosine = (actual * expected).sum().item() / both if both > 0 else float(norm == expected_norm)
    return Errors(
        norm=abs(norm - expected_norm) / max(expected_norm, TINY),
        relative_l1=difference.abs().sum().item() / max(expected.abs().sum().item(), TINY),
        worst_row=row_errors.max().item(),
        cosine=max(0.0, 1.0 - cosine),
    )


def budget(
    accuracy: str, dtype: torch.dtype, reference: Errors, *, gradient: bool = False
) -> Errors:
    """What a backend of this accuracy tier may err, where plain attention errs by ``reference``.

    Gradients have a floor four times as high: they are differences of nearly equal numbers, and a
    fused backward pass computes the weights a second time.
    """
    if accuracy == "quantized":
        return QUANTIZED_BUDGET
    floor = _floor(dtype) * (4 if gradient else 1)
    return Errors(
        norm=EXACT_FACTOR * reference.norm + floor,
        relative_l1=EXACT_FACTOR * reference.relative_l1 + floor,
        worst_row=EXACT_FACTOR * reference.worst_row + 4 * floor,
        cosine=EXACT_FACTOR * reference.cosine + floor * floor + 1e-14,
    )


def lse_budget(accuracy: str, dtype: torch.dtype, reference_error: float) -> float:
    """The largest absolute error of a log-sum-exp of ordinary size."""
    if accuracy == "quantized":
        return 0.1
    # The log-sum-exp is float32 whatever the inputs are.
    return EXACT_FACTOR * reference_error + max(_floor(dtype), 1e-5)


def _floor(dtype: torch.dtype) -> float:
    """Rounding a correct result to a half type costs up to half an eps; sums cost a few."""
    eps = torch.finfo(dtype).eps
    return eps if dtype in (torch.float16, torch.bfloat16) else 16 * eps


def excess(found: Errors, allowed: Errors) -> str | None:
    """Which measures are over budget, in words; None when none is."""
    over = []
    for field in fields(Errors):
        error, limit = getattr(found, field.name), getattr(allowed, field.name)
        if not error <= limit:  # NaN is over budget too
            over.append(f"{field.name} {error:.3g} (allowed {limit:.3g})")
    return ", ".join(over) or None
