"""One more attention backend inside diffusers, named ``polyattn``, added while the program runs.

diffusers has no extension point: its backend names are a closed enumeration and its registry is a
class with private attributes. :func:`registered_member` extends both, after making sure that they
look as they are known to look, and :func:`self_test` proves that a call really arrives and comes
back unharmed. What is unexpected is a :class:`~polyattn.errors.BridgeError` that names diffusers'
version; its own choice of backend, for a process or a model, is never touched.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from enum import Enum
from typing import Any, Protocol

import torch

from polyattn.errors import BridgeError

__all__ = ["NAME", "Route", "diffusers_version", "process_wide_backend", "registered_member",
           "routed", "self_test"]  # fmt: skip

NAME = "polyattn"
TESTED_VERSIONS = "0.42.1"

_registering = threading.Lock()


class Route(Protocol):
    """Who answers the attention calls that diffusers makes inside :func:`routed`.

    ``spread`` says whether it knows that the tensors are shards of a sequence.
    """

    @property
    def spread(self) -> bool: ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor: ...


_route: ContextVar[Route | None] = ContextVar("polyattn_diffusers_route", default=None)


@contextlib.contextmanager
def routed(route: Route) -> Iterator[None]:
    """Answer this thread's calls to the backend ``polyattn`` of diffusers with ``route``."""
    token = _route.set(route)
    try:
        yield
    finally:
        _route.reset(token)


def _attention_for_diffusers(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """The function diffusers calls; [B, S, H, D] in and out. Its parameter names are diffusers'."""
    route = _route.get()
    if route is None:
        raise BridgeError(
            "diffusers was told to use the attention backend 'polyattn' by name; polyattn must be "
            "applied to the pipeline instead, so that it knows the layer, the step and the grid",
            hint="handle = polyattn.apply(pipe, backend='auto')",
        )
    if dropout_p:
        raise BridgeError(f"polyattn has no attention dropout, and the model asks for {dropout_p}")
    if _parallel_config is not None and not route.spread:
        raise BridgeError(
            "diffusers' context parallelism was enabled after polyattn was applied",
            hint="polyattn.apply(pipe, ...) after enable_parallelism(...)",
        )
    return route.attend(query, key, value, attn_mask, is_causal, scale, enable_gqa)


def diffusers_version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _unfit(problem: str) -> BridgeError:
    return BridgeError(
        f"diffusers {diffusers_version()} cannot be bridged: {problem}; polyattn is tested with "
        f"diffusers {TESTED_VERSIONS}",
        hint='pip install "polyattn[diffusers]"',
    )


def _dispatch_module() -> Any:
    try:
        from diffusers.models import attention_dispatch
    except ImportError as error:
        raise _unfit(f"it has no attention dispatch ({error})") from error
    return attention_dispatch


def registered_member() -> Any:
    """The member ``polyattn`` of diffusers' backend names, added and registered when it is not."""
    module = _dispatch_module()
    names: Any = getattr(module, "AttentionBackendName", None)
    backends: Any = getattr(module, "_AttentionBackendRegistry", None)
    _check_fit(names, backends)
    with _registering:
        found = names._value2member_map_.get(NAME)
        if found is not None:
            function = backends._backends.get(found)
            if function is not None and function.__module__ == __name__:
                return found
            raise _unfit(f"something else already registered a backend named {NAME!r}")
        member = _new_member(names)
        backends.register(member, supports_context_parallel=True)(_attention_for_diffusers)
        return member


def _check_fit(names: Any, backends: Any) -> None:
    if not (isinstance(names, type) and issubclass(names, str) and issubclass(names, Enum)):
        raise _unfit("its backend names are no longer an enumeration of text")
    for attribute in ("_member_map_", "_value2member_map_"):
        if not isinstance(getattr(names, attribute, None), dict):
            raise _unfit(f"its backend names have no {attribute}")
    for attribute in ("_backends", "_constraints", "_supported_arg_names"):
        if not isinstance(getattr(backends, attribute, None), dict):
            raise _unfit(f"its backend registry has no {attribute}")
    if not callable(getattr(backends, "register", None)):
        raise _unfit("its backend registry has no register")
    if not callable(getattr(_dispatch_module(), "dispatch_attention_fn", None)):
        raise _unfit("it has no dispatch_attention_fn")


def _new_member(names: Any) -> Any:
    member = str.__new__(names, NAME)
    member._name_ = NAME.upper()
    member._value_ = NAME
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    setattr(names, member._name_, member)  # before it is a member: members cannot be set
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[NAME] = member
    return member


class _SelfTestRoute:
    """Torch's own attention, to compare with what comes back through diffusers."""

    spread = False

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        return torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        ).transpose(1, 2)  # fmt: skip


def self_test(member: Any) -> None:
    """Send a tiny call through diffusers: mask and scale must arrive, the result must come back."""
    dispatch = _dispatch_module().dispatch_attention_fn

    def ramp(length: int) -> torch.Tensor:  # no random numbers: the user's generators stay put
        values = torch.arange(length * 8, dtype=torch.float32, device="cpu")
        return (values / 7.0).sin().reshape(1, length, 2, 4)

    query, key, value = ramp(3), ramp(5), ramp(5) + 1
    mask = torch.tensor([[[[True, False, True, True, False]]]], device="cpu")
    route = _SelfTestRoute()
    with torch.no_grad(), routed(route):
        try:
            found = dispatch(query, key, value, attn_mask=mask, scale=0.7, backend=member)
        except Exception as error:
            raise _unfit(
                f"a call did not reach polyattn ({type(error).__name__}: {error})"
            ) from error
        wanted = route.attend(query, key, value, mask, False, 0.7, False)
    if not isinstance(found, torch.Tensor) or not torch.equal(found, wanted):
        raise _unfit("a call that went through it came back with another result")


def process_wide_backend() -> str | None:
    """What models without a choice of their own use in diffusers, if it is not torch's own."""
    active = getattr(_dispatch_module()._AttentionBackendRegistry, "_active_backend", None)
    value = getattr(active, "value", active)
    return None if value in (None, "native") else str(value)
