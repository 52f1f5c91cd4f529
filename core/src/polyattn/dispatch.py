"""The call: from q, k, v to the kernel that was selected for them.

A decision is made once per distinct combination of shapes, dtypes, devices, arguments, settings and
context, and then found again by one dictionary look-up; everything else here is checked on the way
to making it. Under ``torch.compile`` the call is one opaque operator, ``polyattn::attention``,
which makes the same look-up when it runs: the forward context is read inside it, so one graph
serves every step of a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch

from polyattn import settings
from polyattn.config import canonical_text, load_config, validate
from polyattn.context import (
    ForwardContext,
    current_context,
    dense_phase,
    forward_context,
    nothing_sparse,
)
from polyattn.contract import (
    AttentionCall,
    AttentionRequest,
    Implementation,
    ScheduledConfig,
    default_scale,
)
from polyattn.discovery import RegisteredBackend, registry
from polyattn.errors import BackendUnavailableError, InputError, KernelError, PolyattnError
from polyattn.inputs import request_of, view_mask
from polyattn.reporting import Row, current_report
from polyattn.selection import (
    Scope,
    Selection,
    load_factory,
    local_environment,
    remember_refusal,
    select,
)

__all__ = [
    "CallSite",
    "attend",
    "attention",
    "bind",
    "call_site",
    "clear_decisions",
    "decide",
]

logger = logging.getLogger("polyattn")

# Distinct decisions kept; a service with ever-changing lengths starts over instead of growing.
MAXIMUM_DECISIONS = 8192

# Looked up once: they are asked on every call.
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled: Any = torch._C._is_any_autocast_enabled
_STRIDED = torch.strided
_forced = settings.forced

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class CallSite:
    """Where a call comes from and what was asked for there. One object per distinct ``text``."""

    text: str
    backend: str | None = None
    config: Mapping[str, Any] | None = None
    scope: Scope = "call"
    role: str | None = None
    layer: int | None = None
    required_backend: str | None = None


_call_sites: dict[str, CallSite] = {}
_plain_call_sites: dict[str | None, CallSite] = {}


def call_site(
    backend: str | None = None,
    config: Any = None,
    *,
    scope: Scope = "call",
    role: str | None = None,
    layer: int | None = None,
    required_backend: str | None = None,
) -> CallSite:
    """The call site with these wishes; equal wishes give the same object."""
    parameters = load_config(config) if config is not None else None
    text = json.dumps([backend, canonical_text(parameters), scope, role, layer, required_backend])
    found = _call_sites.get(text)
    if found is None:
        found = CallSite(text, backend, parameters, scope, role, layer, required_backend)
        found = _call_sites.setdefault(text, found)
    return found


def _call_site_from_text(text: str) -> CallSite:
    found = _call_sites.get(text)
    if found is None:  # a compiled graph loaded in a new process
        backend, config, scope, role, layer, required = json.loads(text)
        found = call_site(
            backend,
            json.loads(config) if config is not None else None,
            scope=scope,
            role=role,
            layer=layer,
            required_backend=required,
        )
    return found


class _Decision:
    """A selection bound to its implementation, and what every call with it shares."""

    __slots__ = ("checked", "dense", "extras", "implementation", "last", "mask_kind", "plain_call",
                 "role", "scale", "schedule", "selection", "shape")  # fmt: skip

    def __init__(
        self,
        selection: Selection,
        implementation: Implementation,
        schedule: ScheduledConfig | None,
        dense: _Decision | None,
        request: AttentionRequest,
        extras: tuple[str, ...],
    ) -> None:
        assert request.head_dim is not None
        self.selection = selection
        self.schedule = schedule
        self.dense = dense
        # What runs in the place of a method with extra tensors does without them.
        self.extras = extras
        self.role = request.role
        self.mask_kind = request.mask
        scale = request.scale if request.scale is not None else default_scale(request.head_dim)
        self.implementation = implementation if scale > 0 else _sign_in_q(implementation, scale)
        self.scale = abs(scale) or 1.0
        self.shape = (
            f"B={request.batch} Sq={request.query_length} Sk={request.key_length} "
            f"H={request.heads} D={request.head_dim} {request.dtype}"
        )
        # One object serves every call that carries nothing of its own.
        self.plain_call = AttentionCall(
            request.is_causal,
            self.scale,
            enable_gqa=request.heads != request.kv_heads,
            return_lse=request.needs_lse,
        )
        self.checked = False
        # The row last counted in, the report it belongs to, and why it is dense: one value, so
        # that another thread never sees a row beside the wrong report.
        self.last: tuple[Row | None, object, str | None] = (None, None, None)

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        enable_gqa: bool,
        return_lse: bool,
        extras: Mapping[str, torch.Tensor] | None,
        context: ForwardContext | None = None,
    ) -> AttentionCall:
        return AttentionCall(
            is_causal,
            self.scale,
            None if mask is None else view_mask(mask, q, k),
            self.mask_kind,
            enable_gqa,
            return_lse,
            context,
            {name: extras[name] for name in extras if name in self.extras} if extras else {},
        )

    def row(self, why_dense: str | None) -> Row:
        """The report row of this decision, kept for the report that was last written to."""
        report = current_report()
        epoch = report.epoch
        row, last_epoch, last_why = self.last
        if row is None or epoch is not last_epoch or why_dense != last_why:
            chosen = self.selection
            why = why_dense or chosen.why
            row = Row(self.role, chosen.requested, chosen.chosen, chosen.source, why, self.shape)
            key = (row.role, row.requested, row.used, row.source, row.why, row.shape)
            row = report.row(key, row)
            self.last = (row, epoch, why_dense)
        return row

    def words(self) -> str:
        """The request, for an error."""
        causal = " causal" if self.plain_call.is_causal else ""
        mask = "" if self.mask_kind == "none" else f" {self.mask_kind.replace('_', '-')} mask"
        return f"{self.shape}{causal}{mask}"

    def check_result(self, result: Any, q: torch.Tensor, return_lse: bool) -> None:
        """Hold the first result of an implementation against the contract."""
        if self.checked:
            return
        out, lse = result if return_lse and isinstance(result, tuple) else (result, None)
        problem = None
        if not isinstance(out, torch.Tensor) or (return_lse and lse is None):
            problem = f"returned {type(result).__name__}"
        elif out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
            problem = f"returned {list(out.shape)} {out.dtype} on {out.device}"
        elif lse is not None and (
            lse.shape != (q.shape[0], q.shape[2], q.shape[1]) or lse.dtype != torch.float32
        ):
            problem = f"returned a log-sum-exp of {list(lse.shape)} {lse.dtype}"
        if problem is not None:
            raise BackendUnavailableError(
                f"the backend {self.selection.chosen!r} broke its contract: it {problem} for q "
                f"{list(q.shape)} {q.dtype}; please report it to the plugin's author"
            )
        self.checked = True


def _sign_in_q(implementation: Implementation, scale: float) -> Implementation:
    """An implementation for a scale that is not positive, which is only told positive ones.

    Fused kernels find a row's maximum before they scale. A negative scale makes that the minimum,
    and exp overflows; with the sign in q the result is exact.
    """
    sign = -1.0 if scale < 0 else 0.0

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return implementation(q * sign, k, v, call)

    return run


def _explain(error: BaseException, chosen: Selection, request: str) -> None:
    """Raise what a plugin or its vendor's kernel raised with who it was and what it was asked.

    Returns for an error that says so already, or that callers wait for by its class.
    """
    if isinstance(error, (PolyattnError, torch.OutOfMemoryError)):
        return
    backend = registry().backends.get(chosen.chosen)
    versions = []
    if backend is not None:
        installed = local_environment().distributions
        versions = [f"{backend.distribution} {backend.version}"]
        versions += [
            f"{each.distribution} {installed[each.distribution]}"
            for each in backend.spec.requirements
            if each.distribution in installed
        ]
    lost = "CUDA error" in str(error) or "HIP error" in str(error)
    raise KernelError(
        f"the backend {chosen.chosen!r} ({', '.join(versions) or 'no longer installed'}) raised "
        f"{type(error).__name__}: {error}\n  for {request}, parameters "
        f"{dict(chosen.parameters)}, torch {torch.__version__}"
        + ("\n  the process may have lost its device: start a new one" if lost else ""),
        hint="polyattn doctor --deep, or another backend (polyattn backends)",
    ) from error


_decisions: dict[Any, _Decision] = {}


def clear_decisions() -> None:
    """Forget every decision, e.g. after plugins changed under test."""
    _decisions.clear()


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str | None = ...,
    config: Any = ...,
    is_causal: bool = ...,
    attn_mask: torch.Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
    grid: tuple[int, int, int] | None = ...,
    extras: Mapping[str, torch.Tensor] | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str | None = ...,
    config: Any = ...,
    is_causal: bool = ...,
    attn_mask: torch.Tensor | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[True],
    grid: tuple[int, int, int] | None = ...,
    extras: Mapping[str, torch.Tensor] | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str | None = None,
    config: Any = None,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    grid: tuple[int, int, int] | None = None,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> Output:
    """Scaled dot-product attention: softmax(scale * q k^T + mask) v.

    ``q`` is ``[B, Sq, H, D]``; ``k`` and ``v`` are ``[B, Sk, Hkv, D]``, alike in dtype and device,
    Hkv = H, or a divisor of H and ``enable_gqa=True``. Returns ``[B, Sq, H, D]`` in q's dtype; with
    ``return_lse=True`` also the natural log-sum-exp ``[B, H, Sq]`` in float32, without a gradient.

    ``backend`` names a backend (None or ``"auto"``: selection decides) and ``config`` holds its
    parameters, in any form :func:`polyattn.load_config` reads. ``attn_mask`` is boolean (True = may
    attend) or additive in q's dtype and broadcasts to ``[B, H, Sq, Sk]``; a boolean ``[B, Sk]`` or
    ``[B, 1, 1, Sk]`` is a key-padding mask. ``is_causal`` aligns to the bottom right; with a mask,
    both apply. ``scale`` defaults to 1/sqrt(D). A query row that sees no key gives zeros. ``grid``
    is shorthand for a forward context that holds only a token grid (T, H, W), and ``extras`` are
    tensors that a backend declares by name. Autocast is off inside: q's dtype is computed in.

    Raises :class:`~polyattn.errors.PolyattnError` subclasses; never another backend, mask or scale
    than asked for without an entry in :func:`polyattn.report`.
    """
    if torch.compiler.is_compiling():
        return _traced(
            _constant_site(backend, config),
            q,
            k,
            v,
            attn_mask,
            is_causal,
            scale,
            enable_gqa,
            return_lse,
            grid,
            extras,
        )
    if config is None:
        try:
            site = _plain_call_sites.get(backend)
        except TypeError:
            raise InputError(f"a backend is named by text, found {backend!r}") from None
        if site is None:
            site = _plain_call_sites.setdefault(backend, call_site(backend))
    else:
        site = call_site(backend, config)
    if grid is not None:
        with forward_context(grid=grid):
            return attend(
                site, q, k, v, attn_mask, is_causal, scale, enable_gqa, return_lse, extras
            )
    return attend(site, q, k, v, attn_mask, is_causal, scale, enable_gqa, return_lse, extras)


def attend(
    site: CallSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    extras: Mapping[str, torch.Tensor] | None = None,
    *,
    needs_grad: bool = False,
) -> Output:
    """:func:`attention` for a known call site. Eager only: the operator below calls it too.

    ``needs_grad`` says that a gradient is wanted where the tensors do not show it.
    """
    context = current_context()
    try:
        shape, dtype, device = q.shape, q.dtype, q.device
        same = k.shape == shape and v.shape == shape
        if not (
            k.dtype is dtype
            and v.dtype is dtype
            and k.device == device == v.device
            and q.layout is _STRIDED is k.layout
            and v.layout is _STRIDED
        ):
            raise TypeError  # mixed: the checks say what is wrong
        given = None
        if extras:
            given = tuple(
                [(name, each.shape, each.dtype, each.device) for name, each in extras.items()]
            )
        key: Any = (
            site, shape if same else (shape, k.shape, v.shape), dtype, device, is_causal, scale,
            enable_gqa, return_lse,
            needs_grad
            or (
                _is_grad_enabled()
                and (
                    q.requires_grad or k.requires_grad or v.requires_grad
                    or (given is not None and _any_requires_grad(extras))
                )
            ),
            settings._settings, _forced(),
            None
            if context is None
            else (context.role, context.grid, context.text, context.first_head),
            None if mask is None else (mask.shape, mask.dtype, mask.device),
            given,
        )  # fmt: skip
        decision = _decisions.get(key)
    except (TypeError, AttributeError, RuntimeError):
        key = decision = None  # not tensors, or not hashable: the checks say what is wrong
    if (
        _is_any_autocast_enabled()
        and isinstance(q, torch.Tensor)
        and torch.is_autocast_enabled(q.device.type)
    ):
        # Attention computes in the dtype of its tensors; nothing inside is cast behind its back.
        with torch.autocast(q.device.type, enabled=False):
            return attend(
                site, q, k, v, mask, is_causal, scale, enable_gqa, return_lse, extras,
                needs_grad=needs_grad,
            )  # fmt: skip
    if decision is None:
        before = settings._settings
        decision = _decide(
            site, q, k, v, mask, is_causal, scale, enable_gqa, return_lse, extras, needs_grad,
            context,
        )  # fmt: skip
        # The look-up may have come before the settings were first read; then it is made again.
        if key is not None and before is settings._settings:
            if len(_decisions) >= MAXIMUM_DECISIONS:
                _decisions.clear()
            _decisions[key] = decision
    if context is not None or site.layer is not None:
        return _attend_in_context(
            decision, _at_site(context, site), q, k, v, mask, is_causal, enable_gqa, return_lse,
            extras,
        )  # fmt: skip
    if decision.schedule is not None:
        dense_phase(decision.schedule, None)  # says what the schedule lacks
    if mask is None and not extras:
        call = decision.plain_call
    else:
        call = decision.call(q, k, mask, is_causal, enable_gqa, return_lse, extras)
    try:
        result = decision.implementation(q, k, v, call)
    except Exception as error:
        _explain(error, decision.selection, decision.words())
        raise
    row, epoch, _ = decision.last
    if row is not None and epoch is current_report().epoch:
        if row.last_facts is call.facts:
            row.calls += 1
            return result
        row.count(None, call.facts)
        return result
    decision.check_result(result, q, return_lse)
    decision.row(None).count(None, call.facts)
    return result


def decide(
    site: CallSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    extras: Mapping[str, torch.Tensor] | None = None,
) -> Selection:
    """What :func:`attend` would run for such tensors, after everything that can refuse has been
    asked. Values are not looked at: the tensors may be views of one number."""
    return _decide(
        site, q, k, v, mask, is_causal, scale, enable_gqa, return_lse, extras, False,
        current_context(),
    ).selection  # fmt: skip


def _attend_in_context(
    decision: _Decision,
    context: ForwardContext,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    return_lse: bool,
    extras: Mapping[str, torch.Tensor] | None,
) -> Output:
    """The call where step, layer or grid are known: schedules apply, and the report says where."""
    why_dense = None
    if decision.schedule is not None:
        _refuse_frozen_schedule(decision)
        phase = dense_phase(decision.schedule, context)
        if phase is not None and decision.dense is not None:
            method = decision.selection.chosen
            why_dense = _wholly_dense(method, decision.schedule, context) or f"{phase} of {method}"
            decision = decision.dense
    call = decision.call(q, k, mask, is_causal, enable_gqa, return_lse, extras, context)
    try:
        result = decision.implementation(q, k, v, call)
    except Exception as error:
        _explain(error, decision.selection, decision.words())
        raise
    decision.check_result(result, q, return_lse)
    decision.row(why_dense).count(context, call.facts)
    return result


def _wholly_dense(method: str, schedule: ScheduledConfig, context: ForwardContext) -> str | None:
    """Why no call of the run is sparse, or None; a warning says so once in a run."""
    why = nothing_sparse(schedule, context)
    if why is not None:
        warned = context.run_state.setdefault(("schedules",), {})
        message = f"{method}: {why}; set it lower, as a count or a share (0.2)"
        if not warned.get(message):
            warned[message] = True
            logger.warning(message)
    return why


def _at_site(context: ForwardContext | None, site: CallSite) -> ForwardContext:
    """The context as seen from a layer that knows its own role and place."""
    if context is None:
        context = ForwardContext()
    role = site.role or context.role
    layer = context.layer if site.layer is None else site.layer
    if role == context.role and layer == context.layer:
        return context
    return replace(context, role=role, layer=layer)


def _decide(
    site: CallSite,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    return_lse: Any,
    extras: Any,
    needs_grad: bool,
    context: ForwardContext | None,
) -> _Decision:
    """Check everything, select, and build the implementation."""
    needs_grad = needs_grad or (
        torch.is_grad_enabled() and (_any_requires_grad((q, k, v)) or _any_requires_grad(extras))
    )
    request = request_of(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        extras=extras,
        needs_grad=needs_grad,
        role=site.role or (context.role if context is not None else "self"),
        context=context,
    )
    return bind(site, request)


def bind(site: CallSite, request: AttentionRequest) -> _Decision:
    """Select for a request and build the implementation, which tells what its files lack.

    What is known of the run is in the current forward context.
    """
    environment = local_environment(request.device)
    known = registry().backends

    def build(chosen: Selection, dense: _Decision | None) -> _Decision:
        backend: RegisteredBackend = known[chosen.chosen]
        parameters = validate(backend.spec, chosen.parameters)
        factory = load_factory(backend)
        assert factory is not None
        try:
            implementation = factory(parameters, request, environment)
        except (Exception, SystemExit) as error:
            _explain(error, chosen, str(request))
            raise
        schedule = parameters if isinstance(parameters, ScheduledConfig) else None
        if dense is None:
            schedule = None
        extras = backend.spec.capabilities.extras
        return _Decision(chosen, implementation, schedule, dense, request, extras)

    # A chosen backend may turn out not to load, or its factory to refuse this request. Either is a
    # reason from then on, and selection runs again.
    for _ in range(2 * len(known) + 1):
        selection = select(
            site.backend,
            request=request,
            config=site.config,
            environment=environment,
            required_backend=site.required_backend,
            scope=site.scope,
        )
        partner = selection.dense
        chosen = [selection] if partner is None else [partner, selection]
        if not all(load_factory(known[each.chosen]) is not None for each in chosen):
            continue
        built: _Decision | None = None
        for each in chosen:
            try:
                built = build(each, built)
            except BackendUnavailableError as error:
                parameters = validate(known[each.chosen].spec, each.parameters)
                remember_refusal(each.chosen, request, parameters, error)
                break
        else:
            assert built is not None
            return built
    raise BackendUnavailableError("no backend could be loaded", hint="polyattn doctor")


def _any_requires_grad(tensors: Any) -> bool:
    """Of a sequence or a mapping, which may hold anything: it may not have been checked yet."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors or ()
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in values)


def _refuse_frozen_schedule(decision: _Decision) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise BackendUnavailableError(
            f"{decision.selection.chosen} changes from step to step, and a CUDA graph would repeat "
            "the captured step for ever",
            hint="torch.compile(...) without mode='reduce-overhead'",
        )


# --- torch.compile -------------------------------------------------------------------------------


def _constant_site(backend: Any, config: Any) -> str:
    return call_site(backend, config).text


# What torch.compiler.assume_constant_result does, without importing torch._dynamo (a second) for
# those who never compile: its result becomes a constant of the graph.
_constant_site._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _traced(
    site_text: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    grid: tuple[int, int, int] | None,
    extras: Mapping[str, torch.Tensor] | None,
) -> Output:
    names = sorted(extras) if extras else []
    tensors = [extras[name] for name in names] if extras else []
    # Known while tracing, and not in the operator: below autograd no tensor needs a gradient.
    needs_grad = torch.is_grad_enabled() and _any_requires_grad((q, k, v, *tensors))
    out, lse = _attention_operator(
        q, k, v, mask, ",".join(names), tensors, site_text, is_causal, scale, enable_gqa,
        return_lse,
        list(grid) if grid is not None else None,
        needs_grad,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("polyattn::attention", mutates_args=())
def _attention_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    extra_names: str,
    extras: list[torch.Tensor],
    site: str,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    grid: list[int] | None,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = _attend_as_operator(
        site, q, k, v, mask, extra_names, extras, is_causal, scale, enable_gqa, return_lse, grid,
        needs_grad,
    )  # fmt: skip
    out, lse = result if isinstance(result, tuple) else (result, _no_lse(q))
    # An operator's strides are fixed by its fake, and its outputs may not alias its inputs.
    out = out.contiguous()
    if out.data_ptr() in (q.data_ptr(), k.data_ptr(), v.data_ptr()):
        out = out.clone()
    return out, lse.contiguous()


def _attend_as_operator(
    site: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    extra_names: str,
    extras: list[torch.Tensor],
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    grid: list[int] | None,
    needs_grad: bool,
) -> Output:
    arguments: Any = (
        _call_site_from_text(site), q, k, v, mask, is_causal, scale, enable_gqa, return_lse,
        dict(zip(filter(None, extra_names.split(",")), extras, strict=True)),
    )  # fmt: skip
    if grid is None:
        return attend(*arguments, needs_grad=needs_grad)
    with forward_context(grid=(grid[0], grid[1], grid[2])):
        return attend(*arguments, needs_grad=needs_grad)


def _no_lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty((0,), dtype=torch.float32)


@_attention_operator.register_fake
def _attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, extra_names: Any, extras: Any,
    site: Any, is_causal: Any, scale: Any, enable_gqa: Any, return_lse: bool, grid: Any,
    needs_grad: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out = q.new_empty(q.shape)
    if not return_lse:
        return out, _no_lse(q)
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("polyattn::attention_backward", mutates_args=())
def _backward_operator(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    extra_names: str,
    extras: list[torch.Tensor],
    site: str,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    grid: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients, by running the forward once more with gradients on: right for any kernel."""
    with torch.enable_grad(), _recording_autograd():
        q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
        out = _attend_as_operator(
            site, q, k, v, mask, extra_names, extras, is_causal, scale, enable_gqa, False, grid,
            True,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        gradients = torch.autograd.grad(out, (q, k, v), grad)
    return gradients[0].contiguous(), gradients[1].contiguous(), gradients[2].contiguous()


def _recording_autograd() -> Any:
    """Switch on what records gradients: inside an operator's body torch has it switched off."""
    core: Any = torch._C
    autograd = core.DispatchKeySet(core.DispatchKey.AutogradFunctionality)
    included = core._dispatch_tls_local_include_set()
    return core._ForceDispatchKeyGuard(included, core._dispatch_tls_local_exclude_set() - autograd)


@_backward_operator.register_fake
def _backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    (q, k, v, mask, names, extras, site, is_causal, scale, enable_gqa, _, grid, _) = inputs
    for name, tensor in (("attn_mask", mask), *zip(names.split(","), extras, strict=False)):
        if tensor is not None and tensor.requires_grad:
            raise InputError(
                f"{name} needs a gradient, which polyattn does not compute under torch.compile",
                hint=f"{name}.detach(), or call attention outside of the compiled function",
            )
    ctx.save_for_backward(q, k, v, mask, *extras)
    ctx.rest = (names, site, is_causal, scale, enable_gqa, grid)


def _backward(ctx: Any, grad: torch.Tensor, _grad_lse: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, mask, *extras = ctx.saved_tensors
    names, site, is_causal, scale, enable_gqa, grid = ctx.rest
    gradients = _backward_operator(
        grad, q, k, v, mask, names, extras, site, is_causal, scale, enable_gqa, grid
    )
    return (*gradients, None, None, [None] * len(extras), *[None] * 7)


_attention_operator.register_autograd(_backward, setup_context=_save_for_backward)
