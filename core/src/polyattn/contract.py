"""What a backend declares and what it is given: the contract between polyattn and a plugin.

A plugin publishes :class:`BackendSpec` values through the ``polyattn_backends`` hook
(:mod:`polyattn.hooks`). A spec is data: names, declared :class:`Capabilities`, a pydantic model of
its parameters, and the import string of a factory that is resolved on first use. Importing this
module never imports torch, so a plugin's ``__init__`` that imports only this stays cheap.

What a backend does not declare, it is never asked to do; what it declares, the conformance kit
(:mod:`polyattn.testing`) exercises.

Semantics every implementation keeps (they are checked by the kit):

* q is ``[B, Sq, H, D]``, k and v are ``[B, Sk, Hkv, D]``; the output is ``[B, Sq, H, D]`` in q's
  dtype; the log-sum-exp is ``[B, H, Sq]``, natural log, float32. Inputs are never modified.
* ``mask`` is boolean (True = may attend) or additive in q's dtype, always 4-D here and
  broadcastable to ``[B, H, Sq, Sk]``. Keys hidden by a key-padding mask may hold NaN.
* Causal is aligned to the bottom right when Sq != Sk: query i sees keys up to i + Sk - Sq.
* A query row that sees no key gives zeros, and a log-sum-exp of -inf.
* ``scale`` multiplies q @ k^T; the dispatcher always passes a positive number (the sign of another
  is in the q it passes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from polyattn.environment import Environment

if TYPE_CHECKING:
    import torch

    from polyattn.context import ForwardContext

__all__ = [
    "API_VERSION",
    "OLDEST_API_VERSION",
    "Architectures",
    "AttentionCall",
    "AttentionRequest",
    "BackendSpec",
    "Capabilities",
    "HeadDims",
    "Implementation",
    "Kind",
    "MaskKind",
    "NoConfig",
    "Reason",
    "Requirement",
    "Role",
    "ScheduledConfig",
    "TextSpan",
    "default_scale",
]

API_VERSION = 1
OLDEST_API_VERSION = 1

Kind = Literal["exact", "quantized", "sparse"]
MaskKind = Literal["none", "key_padding", "boolean", "additive"]
Role = str  # "self", "cross", "joint"; free, so that a model may name roles of its own
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")


class Reason(BaseModel):
    """Why something cannot be: ``message`` says required versus found.

    ``hint`` is one command that can be pasted, or None when nothing that can be typed helps.
    The code ``installation-broken`` marks what is installed and cannot work, which ``polyattn
    doctor`` lists as a problem; a machine that does not fit is none.
    """

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (try: {self.hint})"


class Requirement(BaseModel):
    """A distribution a backend needs: ``specifier`` is a PEP 440 range, empty for any version."""

    model_config = ConfigDict(frozen=True)

    distribution: str
    specifier: str = ""
    hint: str | None = None


class Architectures(BaseModel):
    """Which devices of a platform: at least ``minimum``, and one of ``only`` when that is given.

    CUDA architectures are compute capabilities (``"8.0"``), compared as numbers; ROCm
    architectures are gfx names and can only be listed in ``only``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: str | None = None
    only: tuple[str, ...] = ()


class HeadDims(BaseModel):
    """Head dimensions D a backend takes: a range in steps, or exactly those in ``only``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum: int = Field(1, ge=1)
    maximum: int = Field(1024, ge=1)
    multiple_of: int = Field(1, ge=1)
    only: tuple[int, ...] = ()

    def admits(self, head_dim: int) -> bool:
        if self.only:
            return head_dim in self.only
        return self.minimum <= head_dim <= self.maximum and head_dim % self.multiple_of == 0

    def __str__(self) -> str:
        if self.only:
            return ", ".join(map(str, self.only))
        step = f" in steps of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.minimum} to {self.maximum}{step}"


class Capabilities(BaseModel):
    """What a backend can do. The defaults claim nothing beyond plain dense self-attention.

    Declarations drive selection, error messages, documentation and the conformance tests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platforms: Mapping[str, Architectures]
    dtypes: tuple[Literal["float16", "bfloat16", "float32", "float64"], ...]
    head_dims: HeadDims = HeadDims()
    masks: tuple[Literal["key_padding", "boolean", "additive"], ...] = ()
    causal: bool = False
    gqa: bool = False
    cross_attention: bool = False
    custom_scale: bool = False
    lse: bool = False
    autograd: bool = False
    deterministic: bool = False
    cuda_graphs: bool = False
    needs_grid: bool = False
    extras: tuple[str, ...] = ()
    accuracy: Literal["exact", "quantized", "approximate"] = "exact"

    @model_validator(mode="after")
    def _claims_something(self) -> Capabilities:
        if not self.platforms or not self.dtypes:
            raise ValueError("declare at least one platform and one dtype")
        return self


class NoConfig(BaseModel):
    """The configuration of a backend without parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduledConfig(BaseModel):
    """Base of configurations whose method stays dense for the first steps and layers.

    An int is a count; a float between 0 and 1 is a share of the run's steps or layers, rounded
    down. Core applies the schedule: in the dense phase it runs ``dense_backend``, by default the
    backend that automatic selection gives, so that the dense steps are those of a dense run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense_steps: int | float = Field(
        0, ge=0, description="First denoising steps that run dense: a count, or a share (0.2)."
    )
    dense_layers: int | float = Field(
        0, ge=0, description="First layers that run dense: a count, or a share (0.03)."
    )
    dense_backend: str | None = Field(
        None, description="Backend of the dense phase; by default the automatic choice."
    )

    @field_validator("dense_steps", "dense_layers")
    @classmethod
    def _share_or_count(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value > 1:
            raise ValueError(f"a share is at most 1.0, found {value}; for a count write an integer")
        return value

    def key_of(self, option: str) -> str:
        """What the method calls ``dense_steps`` or ``dense_layers``: the name in messages."""
        return option


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Where text tokens sit in a joint sequence: ``start`` to ``start + length``.

    ``valid_length`` counts the tokens that are not padding (all of them when None).
    """

    start: int
    length: int
    valid_length: int | None = None


def default_scale(head_dim: int) -> float:
    """1/sqrt(D), rounded as torch rounds it."""
    return 1.0 / math.sqrt(head_dim)


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """What a layer needs, without tensors. Hashable: selection is cached on it.

    A field that is None is unknown and is not held against a backend, so a request can be partly
    filled when planning (``polyattn explain --head-dim 128 --causal``). ``first_head`` is the
    number of the first head where the request has only some of a layer's heads. ``extra_forms``
    holds shape and dtype of each of ``extras``, or nothing where no tensors are known.
    """

    batch: int | None = None
    query_length: int | None = None
    key_length: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    device: str | None = None
    role: Role = "self"
    is_causal: bool = False
    mask: MaskKind = "none"
    scale: float | None = None
    grid: tuple[int, int, int] | None = None
    text: TextSpan | None = None
    first_head: int | None = None
    needs_lse: bool = False
    needs_grad: bool = False
    extras: tuple[str, ...] = ()
    extra_forms: tuple[tuple[tuple[int, ...], str], ...] = ()

    @property
    def custom_scale(self) -> bool:
        """Whether ``scale`` differs from 1/sqrt(D)."""
        if self.scale is None:
            return False
        return self.head_dim is None or self.scale != default_scale(self.head_dim)


@dataclass(slots=True)
class AttentionCall:
    """What one call carries beside q, k and v. ``scale`` is positive, ``mask`` is 4-D or None.

    An implementation may set ``facts`` (a flat mapping such as ``{"kernel": "cudnn"}`` or
    ``{"density": 0.125}``); they appear in the run's report. A number may be left on its device, as
    a tensor of one element: it is read when the report is.
    """

    is_causal: bool
    scale: float
    mask: torch.Tensor | None = None
    mask_kind: MaskKind = "none"
    enable_gqa: bool = False
    return_lse: bool = False
    context: ForwardContext | None = None
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] | None = None


class Implementation(Protocol):
    """A bound backend: built once per (backend, config, request), then called for every tensor.

    It keeps no state between calls; what a method learns during a run lives in
    ``call.context.state``.
    """

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of q ``[B, Sq, H, D]`` over k, v ``[B, Sk, Hkv, D]``: out, or (out, lse)."""
        ...


Probe = Callable[[Environment], "list[Reason]"]
ConfigProbe = Callable[[Any], "list[Reason]"]
RequestProbe = Callable[["AttentionRequest", Any, Environment], "list[Reason]"]


class BackendSpec(BaseModel):
    """One backend, declared. See the module's text for what an implementation promises.

    ``aliases`` maps other accepted names to the parameters they imply (``{"fa3": {"version": 3}}``)
    and may be given as a plain list. ``implementation`` is ``"module:factory"``; the factory is
    called as ``factory(config, request, environment)`` and returns an :class:`Implementation`.
    ``probe_platform`` and ``probe_availability`` take an :class:`Environment` and return reasons
    (empty = fine); by default they follow from ``capabilities`` and from the version ranges in the
    plugin's own metadata. ``probe_request(request, config, environment)`` adds reasons that hang on
    the parameters, beyond what the capabilities declare. ``probe_config(config)`` says why no run
    can start with the parameters as they are, such as a file that is not there; ``polyattn config
    NAME --check`` warns of it, and a run raises it itself. ``falls_back_to`` names the backend that
    serves instead when this one's runtime is not installed and nothing else is against it. Among
    exact backends, the highest ``priority`` is chosen first. ``footnotes`` maps platforms to
    remarks for the support matrix.
    """

    model_config = ConfigDict(frozen=True, extra="allow", arbitrary_types_allowed=True)

    name: str
    summary: str
    kind: Kind
    capabilities: Capabilities
    implementation: str
    aliases: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    documentation: str | None = None
    api_version: int = 1
    config: type[BaseModel] = NoConfig
    requirements: tuple[Requirement, ...] = ()
    priority: int = 0
    falls_back_to: str | None = None
    probe_platform: Probe | None = None
    probe_availability: Probe | None = None
    probe_request: RequestProbe | None = None
    probe_config: ConfigProbe | None = None
    footnotes: Mapping[str, str] = Field(default_factory=dict)

    @field_validator("aliases", mode="before")
    @classmethod
    def _aliases_may_be_a_list(cls, value: Any) -> Any:
        return {alias: {} for alias in value} if isinstance(value, (list, tuple, set)) else value

    @model_validator(mode="after")
    def _names_are_names(self) -> BackendSpec:
        for name in (self.name, *self.aliases):
            if not NAME_PATTERN.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a backend name: lower-case letters, digits and underscores, "
                    "starting with a letter"
                )
        if not re.fullmatch(r"[\w.]+:[\w.]+", self.implementation):
            raise ValueError(
                f"implementation {self.implementation!r} is not of the form 'module:factory'"
            )
        if self.config.model_config.get("extra") != "forbid":
            raise ValueError(
                f"the config model {self.config.__name__} must forbid extra keys "
                "(model_config = ConfigDict(extra='forbid')), so that a typo is never dropped"
            )
        return self
