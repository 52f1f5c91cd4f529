"""Where in a run a model's forward happens: the step, the guidance branch, and what the run keeps.

A :class:`RunTracker` is told of every forward of a pipeline's denoisers and answers with the
:class:`Moment`. Pipelines hand none of this to attention, so it is read from what can be seen from
outside: the schedule of the scheduler, the timestep, and diffusers' ``cache_context``, inside of
which recent pipelines call their denoisers (:class:`CacheContextWatch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from polyattn.context import RunState

__all__ = ["Announced", "CacheContextWatch", "Moment", "RunTracker", "announced_for"]


@dataclass(frozen=True)
class Announced:
    """What a pipeline said about the coming forward of ``model`` through ``cache_context``."""

    model: Any
    branch: str
    step: int | None
    num_steps: int | None


@dataclass(frozen=True)
class Moment:
    """One forward: its step and branch, and the memory of its model in this run."""

    step: int | None
    num_steps: int | None
    branch: str | None
    run_state: RunState


_announced: ContextVar[Announced | None] = ContextVar("polyattn_announced_forward", default=None)


def announced_for(model: Any) -> Announced | None:
    """What the ``cache_context`` around the current call says, if it is that of ``model``."""
    announced = _announced.get()
    return announced if announced is not None and announced.model is model else None


class CacheContextWatch:
    """Stands in front of one model's ``cache_context`` and remembers what it is called with.

    It is an attribute of the model instance, so that the class and other models stay as they are.
    ``users`` counts the attachments that need it; the last one takes it away.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.replaced = model.__dict__.get("cache_context")
        self.users = 0

    @classmethod
    def attach(cls, model: Any) -> None:
        if not hasattr(type(model), "cache_context"):
            return
        watch = model.__dict__.get("cache_context")
        if not isinstance(watch, cls):
            watch = cls(model)
            model.cache_context = watch
        watch.users += 1

    @classmethod
    def detach(cls, model: Any) -> None:
        watch = model.__dict__.get("cache_context")
        if not isinstance(watch, cls):
            return
        watch.users -= 1
        if watch.users == 0:
            del model.cache_context
            if watch.replaced is not None:
                model.cache_context = watch.replaced

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        model = self.model
        original = self.replaced or type(model).cache_context.__get__(model)
        with original(name, *args, **kwargs) as value:
            token = _announced.set(
                Announced(
                    model,
                    name,
                    _count_or_none(kwargs.get("step_index")),
                    _count_or_none(kwargs.get("num_inference_steps")),
                )
            )
            try:
                yield value
            finally:
                _announced.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheContextWatch:
        # The copied model is not attached; its watch only forwards.
        twin = CacheContextWatch.__new__(CacheContextWatch)
        twin.model = memo.get(id(self.model), self.model)
        twin.replaced, twin.users = self.replaced, 0
        return twin


def _count_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class RunTracker:
    """Follows the runs of one pipeline, or of one model that is called by hand.

    ``schedule`` gives the object that holds the scheduler's timesteps (a new one for every run) and
    ``total`` the number of steps; both give None for a model without a pipeline. A new run begins
    with a new schedule, with a timestep larger than the one before, or with a step announced out of
    order. Steps are the ones announced by the pipeline, or else distinct timesteps are counted.
    """

    def __init__(self, schedule: Callable[[], Any], total: Callable[[], int | None]) -> None:
        self._schedule = schedule
        self._total = total
        self._known_schedule: Any = None
        self._begin_run()

    def _begin_run(self) -> None:
        self._states: dict[str, RunState] = {}
        self._step = -1
        self._timestep: float | None = None
        self._branches: list[str | None] = []  # of the calls at this step

    def moment(self, component: str, timestep: float | None, announced: Announced | None) -> Moment:
        """The moment of a forward that begins now. To be called once per forward."""
        schedule = self._current_schedule()
        if self._is_new_run(schedule, timestep, announced):
            self._begin_run()
        self._known_schedule = schedule
        step = self._step_of(timestep, announced)
        if step != self._step or timestep != self._timestep:
            self._branches = []
        if announced is not None:
            branch: str | None = announced.branch
        elif timestep is None:
            branch = None
        else:  # guidance as two forwards: the prompt's comes first, then the other one
            branch = ("cond", "uncond")[len(self._branches) % 2]
        self._branches.append(branch)
        self._step, self._timestep = step, timestep
        known_step = step if step >= 0 else None
        return Moment(
            known_step,
            self._num_steps(known_step, announced),
            branch,
            self._states.setdefault(component, {}),
        )

    def _current_schedule(self) -> Any:
        schedule = self._schedule()
        # One that is made anew by every look says nothing about runs.
        return schedule if schedule is self._schedule() else None

    def _is_new_run(
        self, schedule: Any, timestep: float | None, announced: Announced | None
    ) -> bool:
        if schedule is not self._known_schedule:
            return True
        if announced is not None and announced.step is not None:
            if announced.step != self._step:
                return announced.step < self._step
        elif None not in (timestep, self._timestep) and timestep != self._timestep:
            assert timestep is not None
            assert self._timestep is not None
            return timestep > self._timestep
        # The very first call, made again: a run of one step is followed by another one.
        repeated = announced is not None and announced.branch in self._branches
        return schedule is None and self._step == 0 and repeated

    def _step_of(self, timestep: float | None, announced: Announced | None) -> int:
        if announced is not None and announced.step is not None:
            return announced.step
        if timestep is None or timestep == self._timestep:
            return self._step
        return self._step + 1

    def _num_steps(self, step: int | None, announced: Announced | None) -> int | None:
        total = announced.num_steps if announced is not None else None
        total = total or self._total()
        # A model called by hand beside its pipeline's schedule has no known total.
        return None if total is None or (step is not None and step >= total) else total
