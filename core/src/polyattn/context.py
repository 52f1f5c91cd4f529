"""What only the running model knows: step, layer, branch, token grid, and what a run remembers.

A :class:`ForwardContext` is entered around the model (by the diffusers bridge, or by hand) and read
by the dispatcher; it never travels through a model's own arguments. It lives in a ContextVar, so
two pipelines in two threads do not meet. Contexts nest: a field left out is inherited, and the
outermost context owns the run's ``state``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from polyattn.contract import ScheduledConfig, TextSpan
from polyattn.errors import InputError

__all__ = [
    "ForwardContext",
    "RunState",
    "current_context",
    "dense_phase",
    "entered",
    "forward_context",
    "nothing_sparse",
]

RunState = MutableMapping[tuple[Any, ...], MutableMapping[str, Any]]

# What a schedule counts: its option, where in a run a call is, and the total.
SCHEDULE = (("dense_steps", "step", "num_steps"), ("dense_layers", "layer", "num_layers"))


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Where in a run a call happens. Every field may be unknown (None).

    ``step`` counts denoising steps from 0 and ``timestep`` is the scheduler's value; ``layer``
    counts transformer layers from 0; ``branch`` names the guidance branch (``"cond"``,
    ``"uncond"``); ``grid`` is the video's token grid (T, H, W); ``text`` places text tokens in a
    joint sequence. ``first_head`` is set where a call has only some of the layer's heads, as under
    Ulysses parallelism: the number of the first of them.
    """

    step: int | None = None
    num_steps: int | None = None
    timestep: float | None = None
    layer: int | None = None
    num_layers: int | None = None
    role: str = "self"
    branch: str | None = None
    grid: tuple[int, int, int] | None = None
    text: TextSpan | None = None
    first_head: int | None = None
    run_state: RunState = field(default_factory=dict, repr=False, compare=False)

    @property
    def state(self) -> MutableMapping[str, Any]:
        """What this layer, role and branch remember until the end of the run."""
        return self.run_state.setdefault((self.layer, self.role, self.branch), {})


_current: ContextVar[ForwardContext | None] = ContextVar("polyattn_forward_context", default=None)

current_context = _current.get


@contextlib.contextmanager
def forward_context(
    *,
    step: int | None = None,
    num_steps: int | None = None,
    timestep: float | None = None,
    layer: int | None = None,
    num_layers: int | None = None,
    role: str | None = None,
    branch: str | None = None,
    grid: tuple[int, int, int] | None = None,
    text: TextSpan | None = None,
    first_head: int | None = None,
) -> Iterator[ForwardContext]:
    """Say where in a run the calls inside the ``with`` block happen.

    Fields left out are inherited from the enclosing context. The outermost context is the run: what
    methods learn is kept until it ends. Raises :class:`~polyattn.errors.InputError` for values that
    cannot be, e.g. a step beyond ``num_steps``.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("step", step),
            ("num_steps", num_steps),
            ("timestep", timestep),
            ("layer", layer),
            ("num_layers", num_layers),
            ("role", role),
            ("branch", branch),
            ("grid", check_grid(grid)),
            ("text", text),
            ("first_head", first_head),
        )
        if value is not None
    }
    outer = _current.get()
    context = replace(outer, **given) if outer is not None else ForwardContext(**given)
    _check(context)
    with entered(context):
        yield context


@contextlib.contextmanager
def entered(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make ``context`` the current one as it is: for whoever keeps a run's state over calls."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def check_grid(grid: Any) -> tuple[int, int, int] | None:
    """``grid`` as a tuple of three positive integers, or an error that says so."""
    if grid is None:
        return None
    if (
        isinstance(grid, (tuple, list))
        and len(grid) == 3
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in grid)
    ):
        return (grid[0], grid[1], grid[2])
    raise InputError(
        f"grid is the number of tokens in (T, H, W), three positive integers; found {grid!r}"
    )


def _check(context: ForwardContext) -> None:
    for name, index, total_name, total in (
        ("step", context.step, "num_steps", context.num_steps),
        ("layer", context.layer, "num_layers", context.num_layers),
    ):
        for label, value, least in ((name, index, 0), (total_name, total, 1)):
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < least
            ):
                raise InputError(f"{label} is an integer of at least {least}, found {value!r}")
        if index is not None and total is not None and index >= total:
            raise InputError(f"{name} counts from 0: {name}={index} needs {total_name} > {total}")
    if context.first_head is not None and (
        not isinstance(context.first_head, int) or context.first_head < 0
    ):
        raise InputError(f"first_head is an integer of at least 0, found {context.first_head!r}")
    for name in ("role", "branch"):
        value = getattr(context, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise InputError(f"{name} is a word such as 'self' or 'cond', found {value!r}")
    if context.text is not None:
        _check_text(context.text)


def _check_text(text: Any) -> None:
    if not isinstance(text, TextSpan):
        raise InputError(
            f"text is a polyattn.TextSpan(start, length, valid_length), found {text!r}"
        )
    for name in ("start", "length", "valid_length"):
        value = getattr(text, name)
        if name == "valid_length" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(
                f"{name} of a TextSpan is a number of tokens, an integer of at least 0; found "
                f"{value!r} in {text}",
                hint=f"{name}=int(...)" if not isinstance(value, int) else None,
            )
    if text.valid_length is not None and text.valid_length > text.length:
        raise InputError(
            f"a text of {text.length} tokens cannot have {text.valid_length} valid ones: {text}",
            hint="TextSpan(start, length, valid_length): length counts padding too",
        )


def dense_phase(config: ScheduledConfig, context: ForwardContext | None) -> str | None:
    """Which key of a scheduled method makes it dense here (``"dense_steps"``), or None.

    Raises :class:`~polyattn.errors.InputError` when the schedule asks for something the context
    does not say: a schedule is never dropped.
    """
    for option, index_name, total_name in SCHEDULE:
        wanted: int | float = getattr(config, option)
        if not wanted:
            continue
        index: int | None = getattr(context, index_name, None)
        total: int | None = getattr(context, total_name, None)
        key = config.key_of(option)
        if index is None or (isinstance(wanted, float) and total is None):
            raise InputError(
                f"{key}={wanted} needs to know the {index_name if index is None else total_name}"
                ", and the forward context does not say it",
                hint=f"with polyattn.forward_context({index_name}=i, {total_name}=n): ..., or "
                f"{key}=0, which switches it off",
            )
        if index < _count(wanted, total):
            return key
    return None


def nothing_sparse(config: ScheduledConfig, context: ForwardContext) -> str | None:
    """How a schedule leaves all of the run dense, or None where it does not, or nobody knows."""
    for option, _, total_name in SCHEDULE:
        wanted: int | float = getattr(config, option)
        total: int | None = getattr(context, total_name)
        if total is not None and _count(wanted, total) >= total:
            return (
                f"{config.key_of(option)}={wanted} leaves none of the run's {total} "
                f"{total_name.removeprefix('num_')} sparse"
            )
    return None


def _count(wanted: int | float, total: int | None) -> int:
    """A count, or a share of a known total, as a count."""
    if isinstance(wanted, int):
        return wanted
    assert total is not None
    return math.floor(wanted * total)
