"""Run an unmodified diffusers pipeline on polyattn's backends: :func:`polyattn.apply`.

::

    with polyattn.apply(pipe, backend="auto") as handle:
        video = pipe(prompt=...)
    print(handle.report)

Every attention call of the pipeline's denoisers then goes through polyattn, with its layer, role,
step, guidance branch and token grid; text encoders and VAEs keep their own attention. Projections,
rotary embeddings, LoRA and offloading stay diffusers' own. Attention modules are assigned one by
one: diffusers' process-wide backend and other models are not touched, and :meth:`Handle.restore`
puts everything back as it was. What cannot be bridged is refused before anything changes.

Applying again to the same pipeline nests: the latest handle that is still attached is in force, and
handles may be restored in any order.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import diffusers  # noqa: F401 - named first, so that its absence is what is reported
import torch

from polyattn.context import ForwardContext, current_context, entered
from polyattn.dispatch import CallSite, attend
from polyattn.errors import BridgeError, InputError
from polyattn.integrations.families import (
    GATE,
    AttentionPlace,
    Family,
    family_of,
    supported_words,
)
from polyattn.integrations.registration import (
    process_wide_backend,
    registered_member,
    routed,
    self_test,
)
from polyattn.integrations.runs import CacheContextWatch, RunTracker, announced_for
from polyattn.integrations.sites import call_sites
from polyattn.integrations.spreading import Spreading, mesh_of
from polyattn.parallel.layers import USPAttention
from polyattn.parallel.mesh import sequence_groups
from polyattn.reporting import Report, Row, reporting_to
from polyattn.selection import asked_for

__all__ = ["Handle", "PipelineReport", "apply", "attach_gates"]

logger = logging.getLogger("polyattn")


def apply(
    pipe_or_model: Any,
    backend: str | None = "auto",
    *,
    config: Any = None,
    cross_backend: str | None = None,
    mesh: Any = None,
) -> Handle:
    """Run the denoisers of a diffusers pipeline, or one such model, on polyattn's backends.

    ``backend`` names a backend for the whole model (``"auto"`` or None: selection decides). A
    sparse one serves video self-attention and leaves cross-attention dense; ``cross_backend`` names
    another backend for cross-attention, strictly. ``config`` holds parameters in any form
    :func:`polyattn.load_config` reads: those of ``backend``, or a mapping from backend name to
    parameters. Names and parameters are checked here; whether a backend can serve the tensors shows
    at the first call, since a pipeline may still move to another device.

    ``mesh`` (:func:`polyattn.parallel.sequence_mesh`, on every process of a ``torchrun`` job)
    spreads the denoisers' sequence over its processes, which all call the pipeline with the same
    inputs and seeds; every process then has the whole result, for inference. Its report is that of
    its own heads. A model for which diffusers' ``enable_parallelism`` was called before is served
    as it is.

    Raises :class:`~polyattn.errors.BridgeError` for what cannot be bridged: an unknown family, a
    compiled model, tensor parallelism, a diffusers that looks different.
    """
    sites = call_sites(backend, config, cross_backend)
    pipeline, models = _denoisers(pipe_or_model)
    plans = [_plan(component, model) for component, model in models.items()]
    member = registered_member()
    self_test(member)
    notes = _notes(plans)
    handle = Handle(plans, sites, _tracker(pipeline), member, notes, mesh)
    for note in notes:
        logger.info(note)
    return handle


def attach_gates(transformer: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Give a Wan transformer the gate projections of a checkpoint that was trained for VSA.

    diffusers drops a checkpoint's ``blocks.N.to_gate_compress.weight`` and ``.bias``, since its own
    model has no such layers. This makes them of ``state_dict``, whose other keys are not looked at,
    in the dtype and on the device of the block. To be called on the loaded model before anything is
    compiled, offloaded, quantized, or handed to :func:`apply`; the layers stay in the model, and
    are run where the backend takes the extra tensor ``gate``.

    Raises :class:`~polyattn.errors.BridgeError` for a family that is not served, and
    :class:`~polyattn.errors.InputError` for weights that are missing, left over, or of another
    shape. Nothing is changed then.
    """
    family = family_of(transformer)
    if family is None:
        raise BridgeError(
            f"gates cannot be attached to {type(transformer).__name__}; supported: "
            f"{supported_words()}"
        )
    given = {key: state_dict[key] for key in state_dict if f".{GATE}." in key}
    gates = {}
    for place in family.places(transformer):
        if place.role != "self":
            continue
        block, like = place.path.rpartition(".")[0], place.module.to_q
        gate = torch.nn.Linear(like.in_features, like.out_features, device="meta")
        for name, wanted in list(gate.named_parameters()):
            key = f"{block}.{GATE}.{name}"
            found = given.pop(key, None)
            if found is None or found.shape != wanted.shape:
                what = "none" if found is None else f"one of {list(found.shape)}"
                raise InputError(
                    f"{type(transformer).__name__} needs a tensor {key!r} of {list(wanted.shape)}, "
                    f"found {what}"
                )
            weight = found.to(like.weight.device, like.weight.dtype, copy=True)
            setattr(gate, name, torch.nn.Parameter(weight))
        gates[block] = gate
    if given:
        raise InputError(
            f"{type(transformer).__name__} has no block for {len(given)} tensors of gates, the "
            f"first of which is {next(iter(given))!r}"
        )
    for block, gate in gates.items():
        setattr(transformer.get_submodule(block), GATE, gate)


# --- what it applies to ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One denoiser that can be bridged: its name in the pipeline, and its attention modules."""

    component: str
    model: Any
    family: Family
    places: list[AttentionPlace]


def _denoisers(subject: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline (None for a bare model), and its denoisers by component name."""
    if isinstance(subject, torch.nn.Module):
        return None, {"transformer": subject}
    components = getattr(subject, "components", None)
    if not isinstance(components, Mapping):
        raise InputError(
            "polyattn.apply takes a diffusers pipeline or one of its models, found "
            f"{type(subject).__name__}"
        )
    denoisers = {
        name: component
        for name, component in components.items()
        if name.startswith("transformer") and isinstance(component, torch.nn.Module)
    }
    if not denoisers:
        modules = [
            f"{name} ({type(component).__name__})"
            for name, component in components.items()
            if isinstance(component, torch.nn.Module)
        ]
        raise BridgeError(
            f"{type(subject).__name__} has no transformer that polyattn could serve; it has "
            f"{', '.join(modules) or 'no models'}; supported: {supported_words()}"
        )
    return subject, denoisers


def _plan(component: str, model: Any) -> _Plan:
    _refuse_compiled(component, model.modules())
    family = family_of(model)
    if family is None:
        raise BridgeError(
            f"{component} is a {type(model).__name__}, a family polyattn does not serve yet; "
            f"supported: {supported_words()}"
        )
    mesh_of(component, model)  # refuses other kinds of parallelism
    places = family.places(model)
    if not places:
        raise BridgeError(
            f"no attention layer found in {component} ({type(model).__name__}): nothing would run "
            "on polyattn"
        )
    for place in places:
        _check_processor(component, place)
    return _Plan(component, model, family, places)


def _refuse_compiled(component: str, modules: Iterable[Any]) -> None:
    if any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules
    ):
        raise BridgeError(
            f"{component} is compiled with torch.compile, which the diffusers bridge does not "
            "serve yet: the step would be frozen into the graph",
            hint="polyattn.apply(...) on the pipeline before anything is compiled",
        )


def _check_processor(component: str, place: AttentionPlace) -> None:
    processor = getattr(place.module, "processor", None)
    where = f"{component}.{place.path}"
    if isinstance(processor, torch.nn.Module) or not hasattr(processor, "_attention_backend"):
        raise BridgeError(
            f"{where} has the processor {type(processor).__name__}, which does not let its "
            "attention backend be chosen",
            hint=f"{component}.set_attn_processor(...) with diffusers' own processor",
        )


def _notes(plans: list[_Plan]) -> tuple[str, ...]:
    """What of diffusers' own settings is set aside while the handle is attached."""
    notes = []
    for plan in plans:
        earlier = Counter(
            getattr(backend, "value", backend)
            for place in plan.places
            if not isinstance(place.module.processor, _RoutedProcessor)
            and (backend := place.module.processor._attention_backend) is not None
        )
        notes += [
            f"{count} attention layers of {plan.component} were set to diffusers' backend "
            f"{backend!r}; handle.restore() puts that back"
            for backend, count in earlier.items()
        ]
    active = process_wide_backend()
    if active is not None:
        notes.append(
            f"diffusers' process-wide backend is {active!r} (DIFFUSERS_ATTN_BACKEND or an earlier "
            "set_attention_backend); it stays so for everything but these layers"
        )
    return tuple(notes)


def _tracker(pipeline: Any) -> RunTracker:
    def schedule() -> Any:
        return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)

    def total() -> int | None:
        count = getattr(pipeline, "num_timesteps", None)
        if isinstance(count, int) and count > 0:
            return count
        timesteps = schedule()
        return len(timesteps) if timesteps is not None and len(timesteps) else None

    if pipeline is None:
        return RunTracker(lambda: None, lambda: None)
    return RunTracker(schedule, total)


# --- what runs ------------------------------------------------------------------------------------


class _RoutedProcessor:
    """Stands in for one attention module's processor, and routes its attention to polyattn.

    It calls a copy of the processor that asks diffusers for the backend ``polyattn``; the original
    is kept untouched for the day it goes back. The last of ``bindings`` is in force; without any,
    the original runs.
    """

    def __init__(self, replaced: Any, member: Any) -> None:
        self.replaced = replaced
        self.routing = copy.copy(replaced)
        self.routing._attention_backend = member
        self.bindings: list[_Binding] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.bindings:
            return self.replaced(*args, **kwargs)
        # A processor is called with the module and its hidden states.
        hidden_states = args[1] if len(args) > 1 else kwargs.get("hidden_states")
        with _InForce(self.bindings[-1], hidden_states):
            return self.routing(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("replaced", "routing", "bindings"):  # not there yet, e.g. while being copied
            raise AttributeError(name)
        return getattr(self.replaced, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.replaced, memo)  # a copied model is not attached

    @property
    def _attention_backend(self) -> Any:
        return (self.routing if self.bindings else self.replaced)._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        if self.bindings:
            raise BridgeError(
                f"this layer runs through polyattn; diffusers cannot set its backend to {value!r}",
                hint="handle.restore() first, or name the backend in polyattn.apply(pipe, ...)",
            )
        self.replaced._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.replaced, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        if self.bindings and value is not None:
            raise BridgeError(
                "diffusers' context parallelism cannot be enabled while polyattn is applied",
                hint="handle.restore(), enable_parallelism(...), and polyattn.apply(...) again",
            )
        self.replaced._parallel_config = value


class _Binding:
    """One attention module as one handle sees it: its site, its layer and role, its report."""

    def __init__(self, attachment: _Attachment, place: AttentionPlace, site: CallSite) -> None:
        self.attachment = attachment
        self.place = place
        self.site = site
        self._layers: dict[Any, USPAttention] = {}

    def layer(self, is_causal: bool, scale: float | None) -> USPAttention:
        """Attention over this model's mesh, for calls of this kind."""
        key = (is_causal, scale)
        if key not in self._layers:
            self._layers[key] = USPAttention.at(
                self.site, mesh=self.attachment.mesh, is_causal=is_causal, scale=scale
            )
        return self._layers[key]


@dataclass(frozen=True)
class _Call:
    """One call of a bound processor: answers the attention that diffusers asks for inside it."""

    binding: _Binding
    hidden_states: torch.Tensor | None

    @property
    def spread(self) -> bool:
        return self.binding.attachment.mesh is not None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(query.device.type):
            # What torch's own attention does there: a query kept in float32 by its norm meets a
            # value in bfloat16.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (each.to(dtype) for each in (query, key, value))
        if self.spread and self.binding.place.role == "self":
            return self._attend_together(query, key, value, mask, is_causal, scale)
        # Cross-attention needs no other process: each has all of the text.
        result = attend(
            self.binding.site, query, key, value, mask, is_causal, scale, enable_gqa,
            extras=self.extras(query),
        )  # fmt: skip
        assert isinstance(result, torch.Tensor)
        return result

    def _attend_together(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, is_causal: bool, scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        layer = self.binding.layer(is_causal, scale)
        result: torch.Tensor = layer(query, key, value, attn_mask=mask, extras=self.extras(query))
        return result

    def extras(self, query: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """The layer's gate, if it has one and the backend in force takes it; query [B, S, H, D]."""
        place, site = self.binding.place, self.binding.site
        if place.gate is None or self.hidden_states is None:
            return None
        spec = asked_for(site.backend, place.role, site.scope)
        if spec is None or "gate" not in spec.capabilities.extras:
            return None
        gate = place.gate(self.hidden_states).unflatten(-1, query.shape[2:])
        return {"gate": gate.to(query.dtype)}


class _InForce:
    """For the length of one processor call: route, forward context and report. Leaves no trace."""

    def __init__(self, binding: _Binding, hidden_states: torch.Tensor | None) -> None:
        attachment = binding.attachment
        self._managers = (
            routed(_Call(binding, hidden_states)),
            entered(attachment.context(binding.place)),
            reporting_to(attachment.report),
        )

    def __enter__(self) -> None:
        for manager in self._managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self._managers):
            manager.__exit__(None, None, None)


class _Attachment:
    """One denoiser under one handle: watches its forwards, and binds its attention modules."""

    def __init__(
        self, plan: _Plan, sites: Mapping[str, CallSite], tracker: RunTracker, report: Report,
        mesh: Any,
    ) -> None:  # fmt: skip
        self._wanted_mesh, self._spreads = mesh, False
        self.mesh: Any = None  # while attached: what the model is spread over
        self.component = plan.component
        self.model = plan.model
        self.family = plan.family
        self.tracker = tracker
        self.report = report
        self.num_layers = 1 + max(place.layer for place in plan.places)
        self._bindings = [
            _Binding(self, place, sites.get(place.role, sites[""])) for place in plan.places
        ]
        self._watched = tuple(plan.model.modules())  # listed once: a model has thousands
        self._forward = threading.local()
        self._hooks: list[Any] = []

    def __len__(self) -> int:
        return len(self._bindings)

    def attach(self, member: Any) -> None:
        self._spreads = Spreading.attach(self.component, self.model, self._wanted_mesh)
        self.mesh = mesh_of(self.component, self.model)
        for binding in self._bindings:
            module = binding.place.module
            if not isinstance(module.processor, _RoutedProcessor):
                module.processor = _RoutedProcessor(module.processor, member)
            module.processor.bindings.append(binding)
        CacheContextWatch.attach(self.model)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            CacheContextWatch.detach(self.model)
        if self._spreads:
            Spreading.detach(self.model)
        self._hooks, self._spreads = [], False
        for binding in self._bindings:
            processor = binding.place.module.processor
            if isinstance(processor, _RoutedProcessor) and binding in processor.bindings:
                processor.bindings.remove(binding)
                if not processor.bindings:
                    binding.place.module.processor = processor.replaced

    def context(self, place: AttentionPlace) -> ForwardContext:
        """The context of a call in the forward in progress; outside of one, step and grid are what
        the caller entered, or unknown."""
        known: dict[str, Any] = getattr(self._forward, "known", None) or {}
        outer = current_context() or ForwardContext()
        return replace(
            outer, layer=place.layer, num_layers=self.num_layers, role=place.role, **known
        )

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self.model:
            return  # a copy of the attached model
        _refuse_compiled(self.component, self._watched)
        if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
            raise BridgeError(
                f"{self.component} has gradient checkpointing enabled, which would run its "
                "attention again later, without knowing the step",
                hint=f"pipe.{self.component}.disable_gradient_checkpointing()",
            )
        arguments = _by_name(model, args, kwargs)
        timestep = _largest(self.family.timestep(model, arguments))
        grid = self.family.grid(model, arguments)
        if self.mesh is not None:
            size = sequence_groups(self.mesh, ring=True).size
            if math.prod(grid) < size:
                raise BridgeError(
                    f"{math.prod(grid)} tokens cannot be spread over {size} processes"
                )
        moment = self.tracker.moment(self.component, timestep, announced_for(model))
        self._forward.known = {
            "step": moment.step,
            "num_steps": moment.num_steps,
            "timestep": timestep,
            "branch": moment.branch,
            "grid": grid,
            "run_state": moment.run_state,
        }

    def _after_forward(self, model: Any, args: Any, output: Any) -> None:
        if model is self.model:
            self._forward.known = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
        return self  # in the hooks of a copied model, which it then ignores


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """A forward's arguments by name."""
    if not args:
        return kwargs
    bound = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
    return bound.arguments


def _largest(timestep: Any) -> float | None:
    """One number for a timestep per batch item or per token (conditioned tokens have 0)."""
    if timestep is None:
        return None
    if isinstance(timestep, torch.Tensor):
        return float(timestep.detach().max()) if timestep.numel() else None
    return float(timestep)


# --- what the user holds --------------------------------------------------------------------------


class PipelineReport(Report):
    """The reports of a pipeline's denoisers, by component name, read as one."""

    def __init__(self, components: Mapping[str, Report]) -> None:
        super().__init__()
        self.components = dict(components)

    @property
    def rows(self) -> list[Row]:
        return [*super().rows, *(row for part in self.components.values() for row in part.rows)]

    def clear(self) -> None:
        super().clear()
        for part in self.components.values():
            part.clear()

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, one mapping per row with its component, ready for JSON."""
        return [
            {"component": component, **row}
            for component, part in self.components.items()
            for row in part.to_dict()
        ]

    def __str__(self) -> str:
        if len(self.components) == 1:
            return "\n".join(str(part) for part in self.components.values())
        parts = [
            f"{component}:\n  " + part.rows_text().replace("\n", "\n  ")
            for component, part in self.components.items()
        ]
        return "\n".join([*parts, *self.density_lines()])


class Handle:
    """Polyattn attached to a pipeline. ``with handle:`` or :meth:`restore` takes it off again.

    ``report`` tells what ran: a :class:`PipelineReport`. ``notes`` says which of diffusers' own
    settings are set aside meanwhile, ``layers`` counts the attention modules that were changed, by
    component.
    """

    def __init__(
        self,
        plans: list[_Plan],
        sites: Mapping[str, CallSite],
        tracker: RunTracker,
        member: Any,
        notes: tuple[str, ...],
        mesh: Any = None,
    ) -> None:
        reports = {plan.component: Report() for plan in plans}
        self.report = PipelineReport(reports)
        self.notes = notes
        self._attachments = [
            _Attachment(plan, sites, tracker, reports[plan.component], mesh) for plan in plans
        ]
        try:
            for attachment in self._attachments:
                attachment.attach(member)
        except BaseException:
            self.restore()
            raise
        self.layers = {each.component: len(each) for each in self._attachments}

    @property
    def attached(self) -> bool:
        return bool(self._attachments)

    def restore(self) -> None:
        """Put the pipeline back exactly as it was. The report stays; a second call does nothing."""
        attachments, self._attachments = self._attachments, []
        for attachment in attachments:
            attachment.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        where = ", ".join(
            f"{count} attention modules of {name}" for name, count in self.layers.items()
        )
        return f"<polyattn.Handle: {where}; {'attached' if self.attached else 'restored'}>"
