"""Choosing the backend for a request, and saying why.

Precedence: a forced backend, the call's or layer's own, a per-role setting, the global setting,
then automatic. Automatic never leaves exact backends. A named backend runs or the caller gets an
error with all reasons; the written exceptions are recorded in the selection and logged once:

* a backend that declares ``falls_back_to`` hands over when its runtime is not installed;
* a sparse backend named for the whole model leaves cross-attention and attention without a token
  grid dense;
* ``on_unavailable="fallback"`` lets automatic selection step in.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polyattn.config import load_config, per_backend, validate
from polyattn.contract import AttentionRequest, BackendSpec, Reason, ScheduledConfig
from polyattn.discovery import RegisteredBackend, registry
from polyattn.environment import Environment
from polyattn.errors import (
    BackendUnavailableError,
    ConfigError,
    InputError,
    PolyattnError,
    SelectionConflictError,
    nearest,
)
from polyattn.naming import backend_named, how_to_get_a_backend, resolve_name
from polyattn.probing import (
    RUNTIME_MISSING,
    availability_reasons,
    platform_reasons,
    request_reasons,
)
from polyattn.settings import OnUnavailable, current_settings, forced

__all__ = [
    "BackendStatus",
    "Candidate",
    "Selection",
    "asked_for",
    "backends",
    "load_factory",
    "local_environment",
    "remember_refusal",
    "select",
]

logger = logging.getLogger("polyattn")

Scope = Literal["call", "layer", "model"]
SHORT_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}


class Candidate(BaseModel):
    """A backend that was considered, and every reason against it (none = accepted)."""

    model_config = ConfigDict(frozen=True)

    name: str
    reasons: tuple[Reason, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.reasons


class Selection(BaseModel):
    """A decision: what was asked, what was chosen, where the wish came from, and the trace.

    ``source`` is ``force``, ``call``, ``layer``, ``model``, ``role``, ``global``,
    ``POLYATTN_BACKEND``, ``required`` or ``automatic``; ``why`` says in words how the choice
    followed. ``parameters`` are the chosen backend's, complete with defaults. ``dense`` is the
    selection of the dense phase of a sparse method.
    """

    model_config = ConfigDict(frozen=True)

    requested: str | None
    chosen: str
    source: str
    why: str
    trace: tuple[Candidate, ...]
    parameters: Mapping[str, Any] = {}
    dense: Selection | None = None


class BackendStatus(BaseModel):
    """An installed backend as this machine sees it; ``reasons`` is empty when it is usable."""

    model_config = ConfigDict(frozen=True)

    name: str
    aliases: tuple[str, ...]
    kind: str
    summary: str
    distribution: str
    version: str
    reasons: tuple[Reason, ...]

    @property
    def usable(self) -> bool:
        return not self.reasons


def backends(environment: Environment | None = None) -> list[BackendStatus]:
    """Every installed backend, with all reasons why it would not run in ``environment``."""
    environment = environment or local_environment()
    return [
        BackendStatus(
            name=each.name,
            aliases=tuple(each.spec.aliases),
            kind=each.spec.kind,
            summary=each.spec.summary,
            distribution=each.distribution,
            version=each.version,
            reasons=tuple(_machine_reasons(each.spec, environment)),
        )
        for each in sorted(registry().backends.values(), key=_preference)
    ]


@functools.cache
def local_environment(device: str | None = None) -> Environment:
    """This machine, looked at once per device; a plugin may teach platforms core does not know."""
    environment = Environment.detect(device)
    taught = {each.platform: each for each in registry().accelerators}
    if environment.platform in taught:
        return environment.with_accelerator(taught[environment.platform])
    if device is None and environment.platform == "cpu" and taught:
        return environment.with_accelerator(next(iter(taught.values())))
    return environment


def select(
    backend: str | None = None,
    *,
    request: AttentionRequest | None = None,
    config: Any = None,
    environment: Environment | None = None,
    required_backend: str | None = None,
    on_unavailable: OnUnavailable | None = None,
    scope: Scope = "call",
    **needs: Any,
) -> Selection:
    """Decide which backend serves a request, without running anything.

    ``request`` (or its fields as keywords: ``head_dim=128, dtype="bfloat16", is_causal=True``) says
    what is needed; ``environment`` defaults to this machine seen from ``request.device``. Raises
    :class:`~polyattn.errors.UnknownBackendError`,
    :class:`~polyattn.errors.BackendUnavailableError`,
    :class:`~polyattn.errors.SelectionConflictError` or
    :class:`~polyattn.errors.ConfigError`.
    """
    if request is None:
        if needs.get("dtype") is not None:
            name = str(needs["dtype"]).removeprefix("torch.")
            needs["dtype"] = SHORT_DTYPES.get(name, name)
        try:
            request = AttentionRequest(**needs)
        except TypeError as error:
            raise InputError(
                f"select: {error}".replace("AttentionRequest.__init__()", "")
            ) from None
    elif needs:
        raise InputError(f"select takes a request or its fields, found both: {', '.join(needs)}")
    environment = environment or local_environment(request.device)
    on_unavailable = on_unavailable or current_settings().on_unavailable
    requested, source = _wish(backend, request, required_backend, scope)
    given = load_config(config)
    if requested is None:
        return _automatic(request, environment, given, requested=None, source="automatic")
    chosen = backend_named(requested, source=_source_words(source))
    # Parameters are checked before anything else, so that a typo shows even where the named
    # backend will not be the one that runs.
    parameters = _parameters(chosen, requested, given)
    exception = _dense_exception(chosen.spec, request, source)
    if exception:
        plain = _without_extras_of(chosen.spec, request)
        # Cross-attention is none of the method's business: its staying dense is no substitution.
        level = logging.INFO if request.role == "cross" else logging.WARNING
        return _logged(_automatic(plain, environment, {}, requested, source, exception), level)
    reasons = _all_reasons(chosen.spec, request, parameters, environment)
    if not reasons:
        return _selection(chosen, parameters, request, environment, requested, source)
    refused = Candidate(name=chosen.name, reasons=tuple(reasons))
    if chosen.spec.falls_back_to and all(each.code in RUNTIME_MISSING for each in reasons):
        substitute = backend_named(chosen.spec.falls_back_to)
        defaults = _parameters(substitute, substitute.name, {})
        if not _all_reasons(substitute.spec, request, defaults, environment):
            why = f"the runtime of {chosen.name} is missing: {_joined(reasons)}"
            return _logged(
                _selection(
                    substitute, defaults, request, environment, requested, source, why, (refused,)
                )
            )
    if on_unavailable == "fallback":
        why = f"{chosen.name} cannot run here and fallback is allowed: {_joined(reasons)}"
        plain = _without_extras_of(chosen.spec, request)
        return _logged(_automatic(plain, environment, {}, requested, source, why, (refused,)))
    raise _unavailable(requested, source, refused, request, environment)


def asked_for(backend: str | None, role: str, scope: Scope = "call") -> BackendSpec | None:
    """The backend that attention of a role is asked to run on; None: selection is automatic."""
    name, source = _wish(backend, AttentionRequest(role=role), None, scope)
    return None if name is None else backend_named(name, source=_source_words(source)).spec


def _wish(
    backend: str | None, request: AttentionRequest, required: str | None, scope: Scope
) -> tuple[str | None, str]:
    """The backend that was asked for and by what: force, call, role, global; or nobody."""
    settings = current_settings()
    role_backend = settings.roles.get(request.role)
    wishes = [
        (forced(), "force"),
        (None if backend in (None, "auto") else backend, scope),
        (role_backend, "role"),
        (settings.backend, settings.source),
    ]
    wishes = [(name, source) for name, source in wishes if name is not None]
    if required is not None:
        canonical = resolve_name(required)[0]
        for name, source in wishes:
            if (
                name is not None
                and resolve_name(name, source=_source_words(source))[0] != canonical
            ):
                raise SelectionConflictError(
                    f"this layer is only right with the backend {required!r}, and "
                    f"{_source_words(source)} asks for {name!r}",
                    hint=f"leave the choice out, or ask for {required!r}",
                )
        return required, "required"
    return wishes[0] if wishes else (None, "automatic")


def _source_words(source: str) -> str:
    return {
        "force": "polyattn.force_backend",
        "call": "the call",
        "layer": "the layer",
        "model": "the setting for the whole model",
        "role": "the setting for its role",
        "global": "the global setting",
    }.get(source, source)


def _dense_exception(spec: BackendSpec, request: AttentionRequest, source: str) -> str | None:
    """Why a sparse backend named for a whole model does not apply to this attention."""
    if spec.kind != "sparse" or source in ("call", "layer", "role", "required"):
        return None
    if request.role == "cross" and not spec.capabilities.cross_attention:
        return f"{spec.name} serves self-attention; cross-attention stays dense"
    if spec.capabilities.needs_grid and request.grid is None:
        return f"{spec.name} works on a video's token grid; attention without one stays dense"
    return None


def _without_extras_of(spec: BackendSpec, request: AttentionRequest) -> AttentionRequest:
    """The request for a dense backend in the place of one whose method takes extra tensors."""
    extras = tuple(each for each in request.extras if each not in spec.capabilities.extras)
    forms = dict(zip(request.extras, request.extra_forms, strict=False))
    return replace(
        request, extras=extras, extra_forms=tuple(forms[each] for each in extras if each in forms)
    )


def _automatic(
    request: AttentionRequest,
    environment: Environment,
    given: Mapping[str, Any],
    requested: str | None,
    source: str,
    why: str | None = None,
    trace: tuple[Candidate, ...] = (),
) -> Selection:
    """The preferred exact backend that can serve the request with the given parameters."""
    candidates = list(trace)
    misfits: dict[str, ConfigError] = {}
    for each in sorted(registry().backends.values(), key=_preference):
        if each.spec.kind != "exact":
            continue
        try:
            parameters = _parameters(each, each.name, given)
        except ConfigError as error:  # meant for another backend, or for none: see below
            misfits[each.name] = error
            reason = Reason(code="config", message=error.message)
            candidates.append(Candidate(name=each.name, reasons=(reason,)))
            continue
        reasons = _all_reasons(each.spec, request, parameters, environment)
        candidates.append(Candidate(name=each.name, reasons=tuple(reasons)))
        if not reasons:
            return _selection(
                each,
                parameters,
                request,
                environment,
                requested,
                source,
                why or "the preferred exact backend that can serve this",
                tuple(candidates),
            )
    if misfits and len(misfits) == len(candidates) - len(trace):
        raise _nobody_takes(given, misfits)
    if not registry().backends:
        raise BackendUnavailableError(
            "no attention backend is installed; polyattn itself contains none",
            hint=how_to_get_a_backend(),
        )
    if not any(each.spec.kind == "exact" for each in registry().backends.values()):
        raise BackendUnavailableError(
            f"no exact backend is installed, and {_words(request)} needs one: "
            f"{why or 'automatic selection takes no other'}",
            hint=how_to_get_a_backend(),
            trace=tuple(candidates),
        )
    raise BackendUnavailableError(
        f"no exact backend can serve {_words(request)} on {environment.describe()}:"
        + "".join(f"\n  {each.name}: {_joined(each.reasons)}" for each in candidates),
        trace=tuple(candidates),
    )


def _nobody_takes(given: Mapping[str, Any], misfits: Mapping[str, ConfigError]) -> ConfigError:
    """The error for parameters that no backend of the automatic choice takes."""
    backends = registry().backends
    having = [
        name for name, each in backends.items() if set(given) <= set(each.spec.config.model_fields)
    ]
    for name in having:
        if name in misfits:  # it is the value that is wrong
            return misfits[name]
    words = ", ".join(map(repr, given))
    if having:
        return ConfigError(
            f"no backend that is chosen automatically has the parameter {words}; "
            f"{' and '.join(having)} has it, and runs when it is named",
            hint=f"backend={having[0]!r}",
        )
    known = registry().names()
    for key, value in given.items():
        if isinstance(value, Mapping) and key not in known and (close := nearest(key, known)):
            return ConfigError(f"{key!r} is no installed backend", hint=" or ".join(close))
    return next((each for each in misfits.values() if each.hint), next(iter(misfits.values())))


def _selection(
    chosen: RegisteredBackend,
    parameters: BaseModel,
    request: AttentionRequest,
    environment: Environment,
    requested: str | None,
    source: str,
    why: str = "requested",
    trace: tuple[Candidate, ...] = (),
) -> Selection:
    if not trace or trace[-1].name != chosen.name:
        trace = (*trace, Candidate(name=chosen.name))
    return Selection(
        requested=requested,
        chosen=chosen.name,
        source=source,
        why=why,
        trace=trace,
        parameters=parameters.model_dump(mode="json"),
        dense=_dense_partner(chosen, parameters, request, environment, requested),
    )


def _dense_partner(
    chosen: RegisteredBackend,
    parameters: BaseModel,
    request: AttentionRequest,
    environment: Environment,
    requested: str | None,
) -> Selection | None:
    """Who runs the dense phase of a scheduled method: what the run would use without it."""
    if not isinstance(parameters, ScheduledConfig):
        return None
    if not (parameters.dense_steps or parameters.dense_layers):
        return None
    request = _without_extras_of(chosen.spec, request)
    if parameters.dense_backend is None:
        why = f"dense phase of {chosen.name}"
        return _automatic(request, environment, {}, requested, "automatic", why)
    partner = backend_named(parameters.dense_backend, source=f"dense_backend of {chosen.name}")
    defaults = _parameters(partner, parameters.dense_backend, {})
    reasons = _all_reasons(partner.spec, request, defaults, environment)
    if partner.spec.kind == "sparse":
        reasons.append(Reason(code="kind", message="is itself a sparse backend"))
    if reasons:
        refused = Candidate(name=partner.name, reasons=tuple(reasons))
        raise _unavailable(
            partner.name, f"dense_backend of {chosen.name}", refused, request, environment
        )
    why = f"dense_backend of {chosen.name}"
    return _selection(partner, defaults, request, environment, requested, "call", why)


def _parameters(chosen: RegisteredBackend, asked_as: str, given: Mapping[str, Any]) -> BaseModel:
    """The chosen backend's parameters: the call's own, or else the process-wide ones."""
    source = "the configuration"
    nested = per_backend(given, registry()) if given else None
    if nested is not None:
        for name, parameters in nested.items():  # a misspelt one is an error, whoever runs
            validate(registry().backends[name].spec, parameters, source=source)
        given = nested.get(chosen.name, {})
    if not given:
        given = current_settings().config.get(chosen.name, {})
        source = "the process-wide configuration"
    implied = resolve_name(asked_as)[1]
    return validate(chosen.spec, given, implied=implied, alias=asked_as, source=source)


def _preference(each: RegisteredBackend) -> tuple[int, str]:
    return (-each.spec.priority, each.name)


def _machine_reasons(spec: BackendSpec, environment: Environment) -> list[Reason]:
    return [
        *platform_reasons(spec, environment),
        *availability_reasons(spec, environment),
        *([_broken[spec.name]] if spec.name in _broken else []),
    ]


def _all_reasons(
    spec: BackendSpec, request: AttentionRequest, parameters: BaseModel, environment: Environment
) -> list[Reason]:
    reasons = [
        *_machine_reasons(spec, environment),
        *request_reasons(spec, request, parameters, environment),
        *_refusals(spec.name, request, parameters),
    ]
    return list(dict.fromkeys(reasons))


def _joined(reasons: Any) -> str:
    return "; ".join(str(reason) for reason in reasons)


def _words(request: AttentionRequest) -> str:
    parts = [f"{request.role}-attention"]
    if request.dtype:
        parts.append(request.dtype)
    if request.head_dim:
        parts.append(f"head dimension {request.head_dim}")
    if request.is_causal:
        parts.append("causal")
    if request.mask != "none":
        parts.append(f"{request.mask.replace('_', '-')} mask")
    return ", ".join(parts)


def _unavailable(
    requested: str,
    source: str,
    refused: Candidate,
    request: AttentionRequest,
    environment: Environment,
) -> BackendUnavailableError:
    alternative = None
    with contextlib.suppress(BackendUnavailableError):
        alternative = _automatic(request, environment, {}, None, "automatic").chosen
    nearest_words = ""
    if alternative is not None:
        nearest_words = f"\n  {alternative} could serve it" + (
            " with other parameters"
            if alternative == refused.name
            else f" (backend={alternative!r})"
        )
    codes = {each.code for each in refused.reasons}
    hints = [each.hint for each in refused.reasons if each.hint]
    if codes & {"platform", "compute-capability"}:  # no installation helps on this device
        hints = [] if alternative in (None, refused.name) else [f"backend={alternative!r}"]
    elif codes & {*RUNTIME_MISSING, "strict"}:
        # Of commands that install, the last is the one that also knows the request.
        telling = [each for each in refused.reasons if each.code in (*RUNTIME_MISSING, "strict")]
        hints = [each.hint for each in telling[::-1] if each.hint] or hints
    return BackendUnavailableError(
        f"the backend {requested!r}, asked for by {_source_words(source)}, cannot serve "
        f"{_words(request)} on {environment.describe()}:"
        + "".join(f"\n  - {reason.message}" for reason in refused.reasons)
        + nearest_words,
        hint=next(iter(hints), None),
        trace=(refused,),
    )


def _logged(selection: Selection, level: int = logging.WARNING) -> Selection:
    _log_once(f"{selection.requested} -> {selection.chosen}: {selection.why}", level)
    return selection


@functools.cache
def _log_once(message: str, level: int = logging.WARNING) -> None:
    logger.log(level, message)


# Backends whose implementation could not be imported in this process, and why.
_broken: dict[str, Reason] = {}
_factories: dict[str, Any] = {}
# What a backend's factory refused though its probes had nothing against it: backend, request and
# parameters (as JSON, which hashes).
_refused: dict[tuple[str, AttentionRequest, str], Reason] = {}


def remember_refusal(
    name: str, request: AttentionRequest, parameters: BaseModel, error: BackendUnavailableError
) -> None:
    """From now on what the factory found is a reason against this backend for this request."""
    reason = Reason(code="refused-when-built", message=error.message, hint=error.hint)
    _refused[name, request, parameters.model_dump_json()] = reason
    _log_once(f"{name} is passed over: {reason}")


def _refusals(name: str, request: AttentionRequest, parameters: BaseModel) -> list[Reason]:
    if not _refused:
        return []
    found = _refused.get((name, request, parameters.model_dump_json()))
    return [] if found is None else [found]


def load_factory(backend: RegisteredBackend) -> Any | None:
    """The backend's factory, imported once; None (with a reason kept) when that fails.

    A vendor package can be installed and still not load, e.g. when it was built for another torch.
    """
    spec = backend.spec
    if spec.name not in _factories and spec.name not in _broken:
        try:
            _factories[spec.name] = pkgutil.resolve_name(spec.implementation)
        except (Exception, SystemExit) as error:
            words = f"{type(error).__name__}: {error}"
            hint = None
            if isinstance(error, PolyattnError):  # the plugin's own account of what it found
                words, hint = error.message, error.hint
            _broken[spec.name] = Reason(
                code="kernel-import-failed",
                message=f"{backend.distribution} {backend.version} is installed but "
                f"{spec.implementation} does not load: {words}",
                hint=hint,
            )
            _log_once(f"{spec.name} is passed over: {_broken[spec.name]}")
    return _factories.get(spec.name)
