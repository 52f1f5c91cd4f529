"""``aiter``: attention by AITER's ``flash_attn_func``, to the letter of polyattn's contract.

Follows ``aiter/ops/mha.py`` of https://github.com/ROCm/aiter. What its releases do differently is
asked of the function itself when an implementation is built; it is called by keyword, and only with
what is needed: never a window, whose form changed between releases.

What the vendor leaves open, or does differently from kernel to kernel, is settled here:

* A query that sees no key is never handed over; it gives zeros and -inf.
* Of a batch item with a key-padding mask only the visible keys are handed over, one launch per item
  (the vendor's variable-length assembly kernel is known to hang near 64k tokens on gfx942). With
  causality too, one launch per stretch of queries whose own keys are all visible or all hidden:
  two for padding at one end. The host has to know the lengths, so a mask costs one synchronisation.
* Kernels are launched on the current device: q's is made the current one.
* The kernels address 4 GiB per batch item; views that are spread wider are copied.

Nothing announces the first call, which may build a kernel for minutes: AITER logs that itself.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import importlib_metadata
import torch
import torch.nn.functional as F

from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError
from polyattn_aiter.config import ROUNDINGS, AiterConfig
from polyattn_aiter.probes import (
    ADDRESSABLE_BYTES,
    DISTRIBUTION,
    INSTALL_HINT,
    NAMESAKE,
    rounding_limits,
)

__all__ = ["build"]

NEEDED = ("q", "k", "v", "softmax_scale", "causal", "return_lse")
ROUNDING = "how_v3_bf16_cvt"
REINSTALL_HINT = f"pip uninstall -y {NAMESAKE} {DISTRIBUTION} && {INSTALL_HINT}"


def _installed() -> str:
    """What is installed under the two names, for messages."""
    found = []
    for name in (DISTRIBUTION, NAMESAKE):
        try:
            found.append(f"{name} {importlib_metadata.version(name)}")
        except importlib_metadata.PackageNotFoundError:
            continue
    return " and ".join(found) or f"no distribution {DISTRIBUTION}"


def _load() -> Callable[..., Any]:
    """AITER's ``flash_attn_func``, or a BackendUnavailableError that says what is there instead."""
    try:
        module = importlib.import_module("aiter")
    except (Exception, SystemExit) as error:
        raise BackendUnavailableError(
            f"import aiter ({_installed()}) fails with {type(error).__name__}: {error}",
            hint=_remedy(error),
        ) from error
    function = getattr(module, "flash_attn_func", None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    if getattr(module, "__file__", None) is None:
        folders = ", ".join(map(str, module.__path__))
        found = f"is a folder without a package, left behind at {folders}"
    else:
        found = f"at {module.__file__} has no flash_attn_func"
    hint = REINSTALL_HINT
    for variable in ("AITER_TRITON_ONLY", "AITER_AOT_IMPORT"):
        if os.environ.get(variable, "0") != "0":
            found += f", and {variable} is set, which leaves it out"
            hint = f"unset {variable}"
    raise BackendUnavailableError(f"the module aiter ({_installed()}) {found}", hint=hint)


def _remedy(error: BaseException) -> str | None:
    """The command after a failed import; a library that does not load is not pip's to mend."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    missing, _, part = error.name.partition(".")
    if missing == "aiter":
        return REINSTALL_HINT
    return None if part else f"pip install {missing}"  # it is there, in another version


# At import, so that a failure is a reason against the backend, and selection goes on.
flash_attn_func = _load()


def build(
    config: AiterConfig, request: AttentionRequest, environment: Environment
) -> Implementation:
    """The implementation for one request.

    Raises :class:`~polyattn.errors.BackendUnavailableError` where the installed function lacks a
    parameter that is needed.
    """
    try:
        parameters = inspect.signature(flash_attn_func).parameters
    except (TypeError, ValueError) as error:
        raise BackendUnavailableError(
            f"cannot read the signature of aiter.flash_attn_func ({_installed()}): {error}",
            hint=REINSTALL_HINT,
        ) from error
    missing = [name for name in NEEDED if name not in parameters]
    if missing:
        raise BackendUnavailableError(
            f"aiter.flash_attn_func ({_installed()}) takes no {', '.join(missing)}; found "
            f"the parameters {', '.join(parameters)}",
            hint=REINSTALL_HINT,
        )
    arguments: dict[str, Any] = {}
    facts: dict[str, object] = {"kernel": "aiter.flash_attn_func"}
    # Set where ENABLE_CK=0 leaves only the vendor's Triton kernels, which know no rounding.
    has_assembly = bool(getattr(flash_attn_func, "__globals__", {}).get("ENABLE_CK", True))
    if config.bf16_rounding is not None:
        if ROUNDING not in parameters or not has_assembly:
            found = (
                f"takes no {ROUNDING}"
                if ROUNDING not in parameters
                else "runs Triton kernels only (ENABLE_CK=0), which offer none"
            )
            raise BackendUnavailableError(
                f"bf16_rounding={config.bf16_rounding} needs a choice of rounding, and "
                f"aiter.flash_attn_func ({_installed()}) {found}"
            )
        arguments[ROUNDING] = ROUNDINGS[config.bf16_rounding]
        facts["bf16_rounding"] = config.bf16_rounding
    elif ROUNDING in parameters and has_assembly and not rounding_limits(request, environment):
        names = {number: name for name, number in ROUNDINGS.items()}
        default = parameters[ROUNDING].default
        facts["bf16_rounding"] = f"{names.get(default, default)} (the vendor's default)"
    return AiterAttention(arguments, facts)


class AiterAttention:
    """One request's attention; see :class:`polyattn.contract.Implementation`."""

    def __init__(self, arguments: Mapping[str, Any], facts: Mapping[str, object]) -> None:
        self.arguments = arguments
        self.facts = facts

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        call.facts = self.facts
        with _current(q.device):
            return self._attend(q, k, v, call)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        scale = call.scale
        if call.mask is not None:
            out, lse = self._masked(q, k, v, call.mask[:, 0, 0], scale, call)
        else:
            blind = max(0, q.shape[1] - k.shape[1]) if call.is_causal else 0
            out, lse = self._launch(
                q[:, blind:], k, v, scale, call.is_causal, return_lse=call.return_lse
            )
            if blind:
                out = F.pad(out, (0, 0, 0, 0, blind, 0))
                lse = None if lse is None else F.pad(lse, (blind, 0), value=float("-inf"))
        return out if lse is None else (out, lse)

    def _masked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor,
        scale: float,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With ``visible`` [B or 1, Sk]: each item attends to its visible keys, and only those."""
        batch, queries, heads, _ = q.shape
        out = q.new_zeros(q.shape)
        lse = None
        if call.return_lse:
            lse = q.new_full((batch, heads, queries), float("-inf"), dtype=torch.float32)
        rows = visible.cpu()
        shared = rows.shape[0] == 1
        for number, row in enumerate(rows):
            item = slice(None) if shared else slice(number, number + 1)
            keys, values = k[item], v[item]
            if not row.all():
                index = row.nonzero().squeeze(-1).to(k.device)
                keys, values = keys.index_select(1, index), values.index_select(1, index)
            for first, last, count, is_causal in _stretches(row, queries, call.is_causal):
                part, part_lse = self._launch(
                    q[item, first:last],
                    keys[:, :count],
                    values[:, :count],
                    scale,
                    is_causal,
                    return_lse=call.return_lse,
                )
                out[item, first:last] = part
                if lse is not None and part_lse is not None:
                    lse[item, :, first:last] = part_lse
        return out, lse

    def _launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        is_causal: bool,
        *,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of the vendor's function, in which every query sees at least one key.

        It returns ``out``, a tuple that starts with it (always, in the oldest versions), or
        ``(out, lse [B, H, Sq], ...)``.
        """
        result = flash_attn_func(
            q=_addressable(q),
            k=_addressable(k),
            v=_addressable(v),
            softmax_scale=scale,
            causal=is_causal,
            return_lse=return_lse,
            **self.arguments,
        )
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if not return_lse:
            return parts[0], None
        wanted = (q.shape[0], q.shape[2], q.shape[1])
        if len(parts) < 2 or tuple(parts[1].shape) != wanted:
            found = [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor)]
            raise BackendUnavailableError(
                f"aiter.flash_attn_func ({_installed()}) was asked for a log-sum-exp of shape "
                f"{wanted}, and returned tensors of shapes {found}",
                hint="return_lse=False",
            )
        return parts[0], parts[1].float()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """``device`` as the current one, where it is a GPU and is not that already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _stretches(
    row: torch.Tensor, queries: int, is_causal: bool
) -> list[tuple[int, int, int, bool]]:
    """Launches that together serve one item: (first query, last query + 1, keys, is_causal).

    ``row`` [Sk] says on the host which keys are visible. Each launch takes the first so many of the
    visible keys; queries without any are in none. Causal query i sees the visible ones of the keys
    up to j = i + Sk - Sq. As long as j itself is visible, each next query sees one more of them:
    causal attention aligned to the bottom right. As long as it is hidden, all see the same.
    """
    if not is_causal:
        total = int(row.sum())
        return [(0, queries, total, False)] if total else []
    offset = row.shape[0] - queries
    start = max(0, -offset)
    own = row[start + offset :]
    seen = row.cumsum(0)[start + offset :]
    changes = (own[1:] != own[:-1]).nonzero().flatten() + 1
    launches = []
    for first, last in itertools.pairwise([0, *changes.tolist(), len(own)]):
        count = int(seen[last - 1])
        if count:
            launches.append((start + first, start + last, count, bool(own[first])))
    return launches


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """x [B, S, H, D], copied where 32 bits cannot hold its byte strides or an item's extent."""
    between_items = x.stride(0) if x.shape[0] > 1 else 0
    reach = max(between_items, x.shape[1] * x.stride(1), x.shape[2] * x.stride(2))
    return x.contiguous() if reach * x.element_size() >= ADDRESSABLE_BYTES else x
