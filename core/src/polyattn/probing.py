"""Why a backend can or cannot serve: every reason is collected, none short-circuits.

Four questions, each answered by a list of :class:`~polyattn.contract.Reason` (empty = yes): does
the platform fit, is what the backend needs installed, can it serve this request, and can it with
these parameters. The answers follow from the declarations unless a plugin overrides a probe; a
probe that raises is itself a reason, so nothing here raises to the user.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel

from polyattn.contract import Architectures, AttentionRequest, BackendSpec, Reason
from polyattn.environment import Environment

__all__ = [
    "RUNTIME_MISSING",
    "availability_reasons",
    "capability_reasons",
    "config_reasons",
    "default_availability_reasons",
    "default_platform_reasons",
    "platform_reasons",
    "request_reasons",
]

RUNTIME_MISSING = frozenset({"requirement-missing", "requirement-version"})


def platform_reasons(spec: BackendSpec, environment: Environment) -> list[Reason]:
    """Why the backend does not run on this machine's device."""
    probe = spec.probe_platform
    if probe is None:
        return default_platform_reasons(spec, environment)
    return _guarded(spec, lambda: probe(environment))


def availability_reasons(spec: BackendSpec, environment: Environment) -> list[Reason]:
    """Why the backend is not usable as installed: distributions missing or out of range."""
    probe = spec.probe_availability
    if probe is None:
        return default_availability_reasons(spec, environment)
    return _guarded(spec, lambda: probe(environment))


def request_reasons(
    spec: BackendSpec, request: AttentionRequest, config: BaseModel, environment: Environment
) -> list[Reason]:
    """Why the backend, with these parameters, cannot serve the request."""
    reasons = capability_reasons(spec, request)
    probe = spec.probe_request
    if probe is not None:
        reasons += _guarded(spec, lambda: probe(request, config, environment))
    return reasons


def config_reasons(spec: BackendSpec, config: BaseModel) -> list[Reason]:
    """Why no request at all could be served with these parameters."""
    reasons: list[Reason] = []
    by_request, by_config = spec.probe_request, spec.probe_config
    if by_request is not None:
        found = _guarded(spec, lambda: by_request(AttentionRequest(), config, Environment()))
        reasons += [each for each in found if each.code == "config"]
    if by_config is not None:
        reasons += _guarded(spec, lambda: by_config(config))
    return reasons


def _guarded(spec: BackendSpec, probe: Callable[[], list[Reason]]) -> list[Reason]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reasons = list(probe())
        if all(isinstance(reason, Reason) for reason in reasons):
            return reasons
        problem = f"returned {reasons!r} instead of a list of Reason"
    except Exception as error:
        problem = f"raised {type(error).__name__}: {error}"
    return [
        Reason(
            code="plugin-error",
            message=f"a probe of {spec.name} {problem}; please report it to the plugin's author",
        )
    ]


def default_platform_reasons(spec: BackendSpec, environment: Environment) -> list[Reason]:
    """Platform and architecture, from the declared capabilities."""
    platforms = spec.capabilities.platforms
    if environment.platform not in platforms:
        return [
            Reason(
                code="platform",
                message=f"needs {' or '.join(platforms)}, found {environment.describe()}",
            )
        ]
    return _architecture_reasons(platforms[environment.platform], environment)


def _architecture_reasons(allowed: Architectures, environment: Environment) -> list[Reason]:
    arch = environment.arch
    if arch is None:
        return []
    if allowed.only and arch not in allowed.only:
        need = f"one of {', '.join(allowed.only)}"
    elif allowed.minimum and _number(arch) < _number(allowed.minimum):
        need = f"{allowed.minimum} or newer"
    else:
        return []
    kind = "compute capability" if environment.platform == "cuda" else "architecture"
    return [
        Reason(
            code="compute-capability",
            message=f"needs {environment.platform} {kind} {need}, found {environment.describe()}",
        )
    ]


def _number(arch: str) -> tuple[int, ...]:
    return tuple(int(part) for part in arch.split(".") if part.isdigit())


def default_availability_reasons(spec: BackendSpec, environment: Environment) -> list[Reason]:
    """Installed distributions against the version ranges in the plugin's metadata."""
    reasons = []
    for requirement in spec.requirements:
        wanted = f"{requirement.distribution} {requirement.specifier}".strip()
        found = environment.version_of(requirement.distribution)
        if found is None:
            reasons.append(
                Reason(
                    code="requirement-missing",
                    message=f"needs {wanted}, which is not installed",
                    hint=requirement.hint,
                )
            )
        elif not _within(found, requirement.specifier):
            reasons.append(
                Reason(
                    code="requirement-version",
                    message=f"needs {wanted}, found {requirement.distribution} {found}",
                    hint=requirement.hint,
                )
            )
    return reasons


def _within(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def capability_reasons(spec: BackendSpec, request: AttentionRequest) -> list[Reason]:
    """What the request needs and the backend does not declare. Unknown fields are not held."""
    can = spec.capabilities
    reasons: list[Reason] = []

    def need(satisfied: bool, code: str, message: str, hint: str | None = None) -> None:
        if not satisfied:
            reasons.append(Reason(code=code, message=message, hint=hint))

    if request.dtype is not None:
        need(
            request.dtype in can.dtypes,
            "dtype",
            f"takes {' or '.join(can.dtypes)}, found {request.dtype}",
            f"q, k, v = (x.to(torch.{can.dtypes[0]}) for x in (q, k, v))",
        )
    if request.head_dim is not None:
        need(
            can.head_dims.admits(request.head_dim),
            "head-dim",
            f"takes head dimensions {can.head_dims}, found {request.head_dim}",
        )
    if request.mask != "none":
        need(
            request.mask in can.masks or (request.mask == "key_padding" and "boolean" in can.masks),
            "mask",
            f"takes {' or '.join(can.masks) or 'no'} masks, found "
            f"{'an' if request.mask == 'additive' else 'a'} {request.mask.replace('_', '-')} mask",
        )
    need(can.causal or not request.is_causal, "causal", "has no causal attention")
    if request.heads is not None and request.kv_heads is not None:
        need(
            can.gqa or request.heads == request.kv_heads,
            "gqa",
            f"needs as many key heads as query heads, found {request.heads} and {request.kv_heads}",
        )
    differing = (
        request.query_length is not None
        and request.key_length is not None
        and request.query_length != request.key_length
    )
    need(
        can.cross_attention or not (differing or request.role == "cross"),
        "cross-attention",
        "serves self-attention only"
        + (
            f", found {request.query_length} queries and {request.key_length} keys"
            if differing
            else ", found cross-attention"
        ),
    )
    need(
        can.custom_scale or not request.custom_scale,
        "scale",
        f"has a fixed scale of 1/sqrt(D), found scale={request.scale}",
    )
    need(can.lse or not request.needs_lse, "lse", "does not return the log-sum-exp")
    need(
        can.autograd or not request.needs_grad,
        "autograd",
        "has no backward pass, and gradients are on for these tensors",
        "with torch.no_grad(): ...",
    )
    need(
        not can.needs_grid or request.grid is not None,
        "grid",
        "works on a video's token grid (T, H, W), and none was given",
        "polyattn.attention(q, k, v, grid=(T, H, W)), or polyattn.forward_context(grid=(T, H, W))",
    )
    unknown = [name for name in request.extras if name not in can.extras]
    need(
        not unknown,
        "extras",
        f"takes extra tensors {', '.join(can.extras) or 'none'}, found {', '.join(unknown)}",
    )
    return reasons
