"""``fa``: attention by FlashAttention's own functions, to the letter of polyattn's contract.

What the generations leave open is settled here. A query that sees no key gives zeros and a
log-sum-exp of -inf (FA2 gives +inf). Keys behind a key-padding mask never reach a kernel. Tensors
are laid out as the kernels read them (16-byte rows) where a view is not.

No call waits for the GPU: the number of visible keys stays on the device, so calls can be captured
in a CUDA graph, the first call of each shape (FA4 compiles then) made before.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError, KernelError, PolyattnError
from polyattn.selection import local_environment
from polyattn_fa.config import FaConfig
from polyattn_fa.generations import (
    MASK_CHANNELS,
    candidates,
    installed_packages,
)
from polyattn_fa.loading import Kernels, build_reasons, load

__all__ = ["FlashAttention", "build"]

logger = logging.getLogger("polyattn")

# Seconds after which the first call of a configuration says what it is waiting for.
PATIENCE = 1.0


def build(config: FaConfig, request: AttentionRequest, environment: Environment) -> Implementation:
    """The implementation for one request: the first generation that can serve it and loads.

    Raises :class:`~polyattn.errors.BackendUnavailableError` with every reason where none does.
    """
    passed: dict[int, list[str]] = {}
    for candidate in candidates(request, config, environment):
        package = candidate.package
        reasons = list(candidate.reasons)
        if not reasons:
            loaded = load(package, str(environment.version_of(package.distribution)))
            if isinstance(loaded, Kernels):
                reasons = build_reasons(loaded, request, environment)
                if not reasons:
                    passed.pop(package.generation, None)
                    return FlashAttention(loaded, request, environment, _words(passed))
            else:
                reasons = [loaded]
        passed.setdefault(package.generation, []).extend(each.message for each in reasons)
    raise BackendUnavailableError(
        f"fa: no generation of FlashAttention can serve {_shape(request)} on "
        f"{environment.describe()}: {_words(passed) or 'none runs on this device'}",
        hint="backend='torch_sdpa'",
    )


def _words(passed: dict[int, list[str]]) -> str:
    return "; ".join(
        f"FlashAttention {generation}: {', '.join(messages)}"
        for generation, messages in passed.items()
    )


def _shape(request: AttentionRequest) -> str:
    heads = f"H={request.heads}" + (
        f" Hkv={request.kv_heads}" if request.kv_heads != request.heads else ""
    )
    return (
        f"B={request.batch} Sq={request.query_length} Sk={request.key_length} {heads} "
        f"D={request.head_dim} {request.dtype}"
        + (" causal" if request.is_causal else "")
        + (" with a key-padding mask" if request.mask != "none" else "")
    )


class FlashAttention:
    """One request's attention; see :class:`polyattn.contract.Implementation`."""

    def __init__(
        self,
        kernels: Kernels,
        request: AttentionRequest,
        environment: Environment,
        passed_over: str,
    ) -> None:
        self.kernels = kernels
        self.request = request
        self.environment = environment
        self.dense = kernels.dense
        # FA4 launches on the current device, wherever its tensors are; the others look.
        self.needs_current_device = kernels.package.generation == 4
        self.arguments: dict[str, bool] = {}
        if request.needs_lse and kernels.lse_argument is not None:
            self.arguments[kernels.lse_argument] = True
        # The first queries see no key where causal attention has more queries than keys.
        length = (request.query_length or 0) - (request.key_length or 0)
        self.blind = max(0, length) if request.is_causal else 0
        self.special = bool(self.blind or request.mask != "none" or request.needs_lse)
        kernel = "dense"
        if request.mask != "none":
            kernel = "dense, mask as a channel" if request.is_causal else "varlen, keys packed"
        self.facts: dict[str, object] = {
            "generation": kernels.package.generation,
            "package": str(kernels),
            "kernel": kernel,
        }
        if passed_over:
            self.facts["passed_over"] = passed_over
        self.started = False

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        call.facts = self.facts
        if q.is_cuda and q.get_device() not in _thread.devices:
            _give_context(q.device)
        if (
            self.needs_current_device
            and q.is_cuda
            and q.get_device() != torch.cuda.current_device()
        ):
            with torch.cuda.device(q.device):
                return self(q, k, v, call)
        try:
            if self.started:
                return self._attend(q, k, v, call)
            with _announced(self._first_call()):
                result = self._attend(q, k, v, call)
            self.started = True
            return result
        except (PolyattnError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._named(error) from error

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        scale = call.scale
        if not self.special:
            out = self.dense(
                _aligned(q), _aligned(k), _aligned(v), softmax_scale=scale, causal=call.is_causal
            )
            return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
        if call.mask is None:
            out, lse = self._dense(q, k, v, scale, call.is_causal)
            if self.blind:
                out[:, : self.blind] = 0
                if lse is not None:
                    lse[:, :, : self.blind] = float("-inf")
        else:
            visible = call.mask[:, 0, 0].expand(k.shape[0], -1)
            attend = self._causal_with_mask if call.is_causal else self._packed
            out, lse = attend(q, k, v, visible, scale)
        if not call.return_lse:
            return out
        if lse is None:
            raise BackendUnavailableError(
                f"fa: this build of {self.kernels} returns no log-sum-exp, neither always nor on "
                "request",
                hint=self._way_out(),
            )
        return out, lse

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out [B, Sq, H, D] and, where it was asked for, the log-sum-exp [B, H, Sq]."""
        return _pair(
            self.dense(
                _aligned(q),
                _aligned(k),
                _aligned(v),
                softmax_scale=scale,
                causal=is_causal,
                **self.arguments,
            )
        )

    def _packed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The visible keys [B, Sk] of all batch items, one after the other, as variable lengths.

        An item whose keys are all hidden keeps one stand-in, and its rows are put right afterwards.
        Rows that nothing points to, and stand-ins, repeat a visible key: a kernel reads whole tiles
        and multiplies what it must not see by zero, which a NaN would survive.
        """
        batch, queries, heads, head_dim = q.shape
        keys = k.shape[1]
        blind = ~visible.any(1)
        kept = visible.clone()
        kept[:, 0] |= blind
        lengths = kept.sum(1, dtype=torch.int32)
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        seen, total = visible.flatten(), batch * keys
        # The place of each visible key; those of the others is one behind the last.
        places = torch.where(seen, kept.flatten().cumsum(0) - 1, total)
        source = seen.to(torch.uint8).argmax().expand(total + 1).clone()
        source.scatter_(0, places, torch.arange(total, device=k.device))
        source = source[:total]
        result = self.kernels.varlen(
            _aligned(q.flatten(0, 1)),
            k.flatten(0, 1).index_select(0, source),
            v.flatten(0, 1).index_select(0, source),
            cu_seqlens_q=torch.arange(
                0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device
            ),
            cu_seqlens_k=ends,
            max_seqlen_q=queries,
            max_seqlen_k=keys,  # an upper bound: the true one is on the device
            softmax_scale=scale,
            causal=False,
            **self.arguments,
        )
        out, lse = _pair(result)
        out = out.view(batch, queries, heads, head_dim)
        out.masked_fill_(blind[:, None, None, None], 0)
        if lse is not None:
            lse = self._heads_first(lse, heads, batch * queries)
            lse = lse.view(heads, batch, queries).transpose(0, 1)
            lse = lse.masked_fill(blind[:, None, None], float("-inf"))
        return out, lse

    def _heads_first(self, lse: torch.Tensor, heads: int, rows: int) -> torch.Tensor:
        """The log-sum-exp of variable lengths as [H, rows].

        Documented is [H, rows]. A build that returns [rows, H] is understood where the two differ;
        where they do not, the documented order is taken.
        """
        if lse.shape == (heads, rows):
            return lse
        if lse.shape == (rows, heads):
            return lse.transpose(0, 1)
        raise KernelError(
            f"fa: {self._who()} returned a log-sum-exp of {list(lse.shape)} for "
            f"{_shape(self.request)}, where [{heads}, {rows}] is documented",
            hint=self._way_out(),
        )

    def _causal_with_mask(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Causality counts all positions, hidden ones too, so keys cannot be packed.

        One channel more carries the mask instead: hidden keys get a score so low that their weight
        is zero, visible ones get exactly nothing added.
        """
        queries, keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
        low = 2.0**40 if q.dtype is torch.bfloat16 else 2.0**15
        hidden = ~visible[:, :, None, None]
        q, k, v = (
            F.pad(x, (0, MASK_CHANNELS))
            for x in (q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0))
        )
        q[..., head_dim] = low
        k[..., head_dim] = hidden.squeeze(-1) * -low
        out, lse = self._dense(q, k, v, scale, True)
        last = torch.arange(keys - queries, keys, device=q.device)  # the last key of each query
        seen = (visible.cumsum(1) > 0)[:, last.clamp(min=0)] & (last >= 0)
        out = out[..., :head_dim].masked_fill(~seen[:, :, None, None], 0)
        if lse is not None:
            lse = lse.masked_fill(~seen[:, None], float("-inf"))
        return out, lse

    def _first_call(self) -> str:
        doing = "compiling" if self.kernels.package.generation == 4 else "loading"
        return (
            f"{doing} {self._who()} for {_shape(self.request)}: the first call takes a few seconds"
        )

    def _who(self) -> str:
        return f"FlashAttention {self.kernels.package.generation} ({self.kernels})"

    def _named(self, error: Exception) -> KernelError:
        """The kernel's error with its generation and request, and what to try."""
        return KernelError(
            f"fa: {self._who()} raised {type(error).__name__}: {error}\n  for "
            f"{_shape(self.request)} on {self.environment.describe()}, torch {torch.__version__}"
            + ("\n  this process has lost its device: start a new one" if _is_lost(error) else ""),
            hint=self._way_out(),
        )

    def _way_out(self) -> str:
        mine = self.kernels.package.generation
        others = [
            f"config='version={each.package.generation}'"
            for each in candidates(self.request, FaConfig(), self.environment)
            if not each.reasons and each.package.generation != mine
        ]
        return others[0] if others else "backend='torch_sdpa'"


def _is_lost(error: Exception) -> bool:
    """Whether the error is one after which every call on the device fails."""
    lasting = r"(cuda|hip).*(illegal|misaligned|assert|launch.fail)"
    return re.search(lasting, str(error), re.IGNORECASE) is not None


class _Thread(threading.local):
    """The devices (by index) that have a context in this thread."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()


def _give_context(device: torch.device) -> None:
    """Make the device's CUDA context current in this thread, by any small launch.

    A new thread has none until it launches something through the CUDA runtime. FA3 encodes its
    tensor maps through the driver before its first launch, which then fails without an error code
    being looked at, and its kernel dies on an illegal instruction that costs the whole process its
    device.
    """
    torch.zeros(1, device=device)
    _thread.devices.add(device.index)


def _pair(result: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FA2 and FA3 return out, or a tuple that starts with out and log-sum-exp; FA4 always that."""
    return (result[0], result[1]) if isinstance(result, tuple) else (result, None)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels read it: rows of D values side by side, 16-byte steps.

    Expanded tensors (steps of zero) are laid out too: a TMA descriptor does not take them.
    """
    if x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    if x.is_contiguous():
        return x
    *steps, last = x.stride()
    if last == 1 and all(step and step % 8 == 0 for step in steps):
        return x
    return x.contiguous()


@contextlib.contextmanager
def _announced(message: str) -> Iterator[None]:
    """Say what is going on where it takes longer than a moment."""
    timer = threading.Timer(PATIENCE, logger.warning, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _load_one() -> None:
    """Fail now where nothing loads: selection then goes on without this backend and says why."""
    environment = local_environment()
    problems = []
    for package, version in installed_packages(environment):
        loaded = load(package, version)
        if isinstance(loaded, Kernels):
            return
        problems.append(loaded)
    if problems:
        raise BackendUnavailableError(
            "; ".join(each.message for each in problems), hint=problems[0].hint
        )


_load_one()
