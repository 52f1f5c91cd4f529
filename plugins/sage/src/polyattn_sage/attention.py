"""``sage_attn`` and ``sage_attn_3``: SageAttention, with the defects of its versions met.

What is settled here and not left to the vendor's functions:

* k is never modified. Its mean over the keys, taken in float32, is subtracted into a new tensor and
  the vendor's own smoothing is switched off: exact for the softmax, cheaper than a copy, and the
  log-sum-exp gets its correction in float32 (the vendor's is rounded to the inputs' dtype).
* sageattention 1.0.6 counts the empty slots of the last block of 64 keys as keys with logit 0 and
  value 0, which scales every row by L / (L + empty), L the sum of exp(logit). A second pass over
  values of one returns exactly that factor, and the first is divided by it. As k has no mean, L is
  at least the number of keys (Jensen), so the loss is at most empty / (keys + empty): where that is
  below half a unit in the last place of bfloat16, one pass runs and the bound is reported.
* Additive masks reach sageattention 2 less each row's maximum, which the softmax does not see, and
  times log2(e), the unit its kernel adds them in. Both in float32: in the inputs' dtype a second
  rounding would take from a large bias its small differences. A query that sees no key gives zeros.
* The CUDA kernels of sageattention 2 are launched on the device's default stream, whatever stream
  is current: the two are made to wait for each other, and capture into a graph is an error.
* Its fp8 kernels divide each channel of v by its largest value: a channel of zeros would come out
  as NaN, and is put back to zeros.
* Element offsets inside the kernels are 32-bit, and rows are read 16 bytes at a time: views that
  reach further or are not aligned are copied, larger tensors are run in parts.
* NaN and infinity in the output (P V overflows where it is accumulated in fp16) are an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from polyattn.contract import AttentionCall, AttentionRequest, Implementation, Reason
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError, KernelError
from polyattn_sage import kernels
from polyattn_sage.config import CheckFinite, Sage3Config, SageConfig
from polyattn_sage.installation import EXTENSIONS_3, again, load_failures
from polyattn_sage.kernels import Choice, choose

__all__ = ["build", "build_3"]

KEY_BLOCK = 64  # keys per block of sageattention 1.0.6
TAIL_TOLERANCE = 2.0**-9  # half a unit in the last place of bfloat16, below 1
LOG2_E = 1.44269504  # as the vendor rounds it
LOWEST_BIAS = -30000.0  # in place of -inf, which the vendor's kernel turns into NaN; fits fp16

Part = tuple[torch.Tensor, "torch.Tensor | None"]


def build(
    config: SageConfig, request: AttentionRequest, environment: Environment
) -> Implementation:
    """``sage_attn`` for one request. Raises BackendUnavailableError where it does not load."""
    version = environment.version_of("sageattention")
    choice = choose(request, config, environment)
    if choice is None:
        raise BackendUnavailableError(
            f"sage_attn: no kernel is known for sageattention {version} on "
            f"{environment.describe()}",
            hint="polyattn explain sage_attn",
        )
    install = kernels.INSTALL_1 if choice.generation == 1 else kernels.INSTALL_2
    vendor = _Vendor("sage_attn", "sageattention", f"{version}", choice.function, install)
    if choice.built_flag is not None:
        # Where an extension was left out of a build, the vendor's import keeps it quiet.
        core = _imported("sageattention.core", f"{version}", install)
        if not getattr(core, choice.built_flag, True):
            raise BackendUnavailableError(
                f"sage_attn: sageattention {version} is built without kernel={choice.kernel}",
                hint=f"TORCH_CUDA_ARCH_LIST={environment.arch} {again(install)}",
            )
    return SageAttention(vendor, choice, config.check_finite, request)


def build_3(
    config: Sage3Config, request: AttentionRequest, environment: Environment
) -> Implementation:
    """``sage_attn_3`` for one request. Raises BackendUnavailableError where it does not load."""
    version = f"{environment.version_of('sageattn3')}"
    vendor = _Vendor("sage_attn_3", "sageattn3", version, "sageattn3_blackwell", kernels.INSTALL_3)
    return Sage3Attention(vendor, config, request)


# --- the vendor's package -------------------------------------------------------------------------


def _imported(module: str, version: str, install: str, function: str | None = None) -> Any:
    """A module of the vendor, or a function in it; a failure is remembered for the probes."""
    distribution = module.partition(".")[0]
    key = (distribution, version)
    if key not in load_failures:
        try:
            found = importlib.import_module(module)
            if function is None:
                return found
            if not callable(getattr(found, function, None)):
                where = getattr(found, "__file__", None)
                raise ImportError(f"{where} has no such function as {function}")
            return getattr(found, function)
        except (Exception, SystemExit) as error:  # no library, another torch's ABI, no Triton, ...
            load_failures[key] = Reason(
                code="kernel-import-failed",
                message=f"{distribution} {version} is installed and does not load: "
                f"{type(error).__name__}: {error}",
                hint=_remedy(error, distribution, install),
            )
    failure = load_failures[key]
    raise BackendUnavailableError(failure.message, hint=failure.hint)


def _remedy(error: BaseException, distribution: str, install: str) -> str | None:
    """The command after a failed import: what is missing, or else the package once more."""
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    own, _, part = missing.partition(".")
    if own in ("", distribution, *EXTENSIONS_3):
        return again(install)
    return None if part else f"pip install {own}"  # it is there, in a version without that part


class _Vendor:
    """One function of the vendor's package, with the names for messages."""

    def __init__(
        self, backend: str, distribution: str, version: str, function: str, install: str
    ) -> None:
        self.backend = backend
        self.name = f"{distribution} {version}"
        self.function: Callable[..., Any] = _imported(distribution, version, install, function)


# --- what both backends share ---------------------------------------------------------------------


class _Quantized:
    """One request's attention; see :class:`polyattn.contract.Implementation`.

    Nothing is kept between calls but whether the output has been searched for NaN once.
    """

    def __init__(
        self,
        vendor: _Vendor,
        check_finite: CheckFinite,
        request: AttentionRequest,
        elements_per_head: int,
        facts: dict[str, object],
    ) -> None:
        self.vendor = vendor
        self.check_finite = check_finite
        self.searched = False
        self.parts = list(_parts(request, elements_per_head, vendor.backend))
        if len(self.parts) > 1:
            facts["parts"] = len(self.parts)
        self.facts = {**facts, "check_finite": check_finite}
        self.facts_of_capture = {**facts, "check_finite": "left out of a CUDA graph"}

    def part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float,
        mask: torch.Tensor | None,
    ) -> Part:  # fmt: skip
        """Attention of tensors that 32-bit offsets reach; never modifies them."""
        raise NotImplementedError

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        call.facts = self.facts
        scale, mask = call.scale, call.mask
        seen = top = None
        inputs: tuple[torch.Tensor, ...] = (q, k, v)
        if mask is not None:
            if call.mask_kind == "key_padding":
                hidden = ~mask[:, 0, 0, :, None, None]
                k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
            if mask.dtype is torch.bool:
                seen = mask.any(-1, keepdim=True)
            else:
                top = mask.amax(-1, keepdim=True).float()
                seen = top != float("-inf")
                top.masked_fill_(~seen, 0)
                mask = (mask.float() - top).mul_(LOG2_E).clamp_(min=LOWEST_BIAS).to(q.dtype)
                inputs = (q, k, v, mask)
        out, lse = self.launch(q, lambda: self._in_parts(q, k, v, call, scale, mask))
        if top is not None and lse is not None:
            lse = lse + top.squeeze(-1)
        if seen is not None:
            out = out.masked_fill(~seen.transpose(1, 2), 0)
            lse = None if lse is None else lse.masked_fill(~seen.squeeze(-1), float("-inf"))
        self._search(out, inputs, call)
        if not call.return_lse:
            return out
        assert lse is not None
        return out, lse

    def launch(self, q: torch.Tensor, work: Callable[[], Part]) -> Part:
        """Run ``work`` with q's device current, as Triton and the vendor need it; put it back."""
        if not q.is_cuda:
            return work()
        with torch.cuda.device(q.device):
            return work()

    def _in_parts(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float,
        mask: torch.Tensor | None,
    ) -> Part:  # fmt: skip
        if len(self.parts) == 1:
            return self.part(_within_reach(q), k, _within_reach(v), call, scale, mask)
        group = q.shape[2] // k.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = None
        if call.return_lse:
            shape = (q.shape[0], q.shape[2], q.shape[1])
            lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        for item, first, last in self.parts:
            rows, heads = slice(item, item + 1), slice(first, last)
            grouped = slice(first * group, last * group)
            own_mask = mask
            if mask is not None:
                own_mask = mask[rows] if mask.shape[0] > 1 else mask
                own_mask = own_mask[:, grouped] if mask.shape[1] > 1 else own_mask
            one, one_lse = self.part(
                _within_reach(q[rows, :, grouped]), k[rows, :, heads],
                _within_reach(v[rows, :, heads]), call, scale, own_mask,
            )  # fmt: skip
            out[rows, :, grouped] = one
            if lse is not None and one_lse is not None:
                lse[rows, grouped] = one_lse
        return out, lse

    def _search(
        self, out: torch.Tensor, inputs: tuple[torch.Tensor, ...], call: AttentionCall
    ) -> None:
        """Raise for an output that is not finite though the inputs are (what shows as black)."""
        step = None if call.context is None else call.context.step
        if self.check_finite == "never" or (
            self.check_finite == "first_step" and self.searched and step != 0
        ):
            return
        if out.is_cuda and torch.cuda.is_current_stream_capturing():
            call.facts = self.facts_of_capture
            return
        self.searched = True
        if _finite(out) or not all(_finite(each) for each in inputs):
            return
        raise KernelError(
            f"{self.vendor.backend}: {self.vendor.name} returned NaN or infinity for finite q "
            f"{list(out.shape)}, k and v ({self.facts}): its accumulator overflowed, which shows "
            "as black frames",
            hint=self.remedy(),
        )

    def remedy(self) -> str:
        """What to type when the accumulator overflows."""
        return "backend='torch_sdpa'"


def _parts(
    request: AttentionRequest, elements_per_head: int, backend: str
) -> Iterator[tuple[int, int, int]]:
    """(batch item, first key head, last key head) of each part; one part is the whole call."""
    assert request.batch is not None
    assert request.kv_heads is not None
    if request.batch * request.kv_heads * elements_per_head < kernels.OFFSETS:
        yield 0, 0, request.kv_heads
        return
    heads = (kernels.OFFSETS - 1) // elements_per_head
    if heads == 0:
        raise BackendUnavailableError(
            f"{backend}: one head of this request has {elements_per_head:,} elements, and the "
            "kernels' 32-bit offsets reach 2**31",
            hint="backend='torch_sdpa'",
        )
    for item in range(request.batch):
        for first in range(0, request.kv_heads, heads):
            yield item, first, min(first + heads, request.kv_heads)


def _within_reach(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels read it, itself or a copy: offsets below 2**31, rows of aligned 16 bytes."""
    strides = x.stride()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides[:-1])
    if strides[-1] == 1 and last < kernels.OFFSETS and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _finite(x: torch.Tensor) -> bool:
    """One pass, one wait, no temporary: NaN survives a minimum and a maximum."""
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


# --- sage_attn ------------------------------------------------------------------------------------


class SageAttention(_Quantized):
    """SageAttention 1 and 2."""

    def __init__(
        self,
        vendor: _Vendor,
        choice: Choice,
        check_finite: CheckFinite,
        request: AttentionRequest,
    ) -> None:
        queries, keys, head_dim, group = _dimensions(request)
        self.options: dict[str, Any] = {"tensor_layout": "NHD", "smooth_k": False}
        facts: dict[str, object] = {"kernel": choice.kernel, "version": vendor.name}
        for name in ("qk_quant_gran", "pv_accum_dtype"):
            value = getattr(choice, name)
            if value is not None:
                self.options[name] = facts[name] = value
        masked = request.mask != "none"
        self.has_remedy = (choice.kernel == "fp16_cuda" and choice.pv_accum_dtype != "fp32") or (
            choice.generation > 1 and choice.kernel == "triton" and not masked
        )
        self.on_default_stream = choice.generation > 1 and choice.kernel != "triton"
        self.fp8 = choice.kernel.startswith("fp8")
        empty = -keys % KEY_BLOCK if choice.generation == 1 and not request.is_causal else 0
        loss = empty / (keys + empty)
        self.correct = loss > TAIL_TOLERANCE
        if self.correct:
            facts["tail"] = f"{empty} empty keys, corrected by a second pass"
        elif empty:
            facts["tail"] = f"{empty} empty keys, which weigh at most {loss:.3%}"
        padded = head_dim if choice.generation == 1 else 64 if head_dim <= 64 else 128
        elements = max(queries * group, keys) * padded
        super().__init__(vendor, check_finite, request, elements, facts)

    def launch(self, q: torch.Tensor, work: Callable[[], Part]) -> Part:
        if not (q.is_cuda and self.on_default_stream):
            return super().launch(q, work)
        with torch.cuda.device(q.device):
            if torch.cuda.is_current_stream_capturing():
                raise BackendUnavailableError(
                    f"{self.vendor.backend}: {self.vendor.name} launches {self.facts['kernel']} on "
                    "the default stream, which no CUDA graph captures",
                    hint="config={'kernel': 'triton'}, or no CUDA graphs",
                )
            current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            if current == default:
                return work()
            default.wait_stream(current)
            with torch.cuda.stream(default):
                out, lse = work()
            current.wait_stream(default)
            for each in (out, lse):
                if each is not None:
                    each.record_stream(current)
            return out, lse

    def part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float,
        mask: torch.Tensor | None,
    ) -> Part:  # fmt: skip
        mean = k.mean(1, keepdim=True, dtype=torch.float32)
        k = torch.sub(k, mean, out=torch.empty(k.shape, dtype=k.dtype, device=k.device))
        options = {**self.options, "is_causal": call.is_causal, "sm_scale": scale}
        if mask is not None:
            options["attn_mask"] = mask
        if call.return_lse:
            out, lse = self.vendor.function(q, k, v, **options, return_lse=True)
            # [B, Sq, Hkv, G, D] x [B, Hkv, D]: what the subtracted mean would have added.
            grouped = q.float().view(*q.shape[:2], k.shape[2], -1, q.shape[3])
            shift = torch.einsum("bshgd,bhd->bhgs", grouped, mean.squeeze(1)).flatten(1, 2)
            return self.whole(out, v), lse + scale * shift
        out = self.vendor.function(q, k, v, **options)
        if self.correct:
            ones = torch.ones((1, 1, 1, v.shape[3]), dtype=v.dtype, device=v.device)
            share = self.vendor.function(q, k, ones.expand(v.shape), **options)
            out = out.div_(share[..., :1])
        return self.whole(out, v), None

    def whole(self, out: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The vendor's output (a view where it padded D) as a tensor of its own."""
        out = out.contiguous()
        if self.fp8:
            zeros = (v.amax(1) == 0) & (v.amin(1) == 0)
            zeros = zeros.repeat_interleave(out.shape[2] // v.shape[2], dim=1)
            out.masked_fill_(zeros[:, None], 0)
        return out

    def remedy(self) -> str:
        if self.has_remedy:
            return "config={'kernel': 'fp16_cuda', 'pv_accum_dtype': 'fp32'}"
        return super().remedy()


def _dimensions(request: AttentionRequest) -> tuple[int, int, int, int]:
    """Queries, keys, head dimension, and query heads per key head; known once tensors are here."""
    assert request.query_length is not None
    assert request.key_length is not None
    assert request.head_dim is not None
    assert request.heads is not None
    assert request.kv_heads is not None
    group = request.heads // request.kv_heads
    return request.query_length, request.key_length, request.head_dim, group


# --- sage_attn_3 ----------------------------------------------------------------------------------


class Sage3Attention(_Quantized):
    """SageAttention 3. Its kernel takes [B, H, S, D], pads S to 128, and keeps a float32 tensor of
    [B, H, Sq/128, Sk] (with ``per_block_mean``; of [B, H, 1, Sk] without)."""

    def __init__(self, vendor: _Vendor, config: Sage3Config, request: AttentionRequest) -> None:
        self.per_block_mean = config.per_block_mean
        queries, keys, head_dim, _ = _dimensions(request)
        assert request.batch is not None
        assert request.heads is not None
        queries, keys = queries + -queries % 128, keys + -keys % 128
        delta = (queries // 128 if config.per_block_mean else 1) * keys
        elements = max(queries * head_dim, keys * head_dim, delta)
        facts: dict[str, object] = {"version": vendor.name}
        super().__init__(vendor, config.check_finite, request, elements, facts)
        _, first, last = self.parts[0]
        heads = request.heads * request.batch if len(self.parts) == 1 else last - first
        for each in (self.facts, self.facts_of_capture):
            each["delta_s"] = f"{heads * delta * 4 / 2**20:.1f} MiB"

    def part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float,
        mask: torch.Tensor | None,
    ) -> Part:  # fmt: skip
        # The vendor subtracts k's mean in place: it is given a copy, whatever k's layout is.
        k = k.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        q, v = (each.transpose(1, 2).contiguous() for each in (q, v))
        out = self.vendor.function(
            q, k, v, is_causal=call.is_causal, per_block_mean=self.per_block_mean
        )
        return out.transpose(1, 2), None
