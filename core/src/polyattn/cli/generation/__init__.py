"""Making a video from a model folder: what ``polyattn generate`` does, for use from Python.

::

    plan = plan_generation(GenerationRequest(prompt="a red circle moving left"))
    result = run_generation(plan)

:func:`plan_generation` finds whatever is wrong before any weight is read, as one
:class:`~polyattn.errors.PolyattnError`; :func:`run_generation` does the long work. A video appears
under its final name whole or not at all.
"""

from __future__ import annotations

from polyattn.cli.generation.planning import GenerationRequest, Plan, plan_generation
from polyattn.cli.generation.running import Progress, Result, run_generation

__all__ = [
    "GenerationRequest",
    "Plan",
    "Progress",
    "Result",
    "plan_generation",
    "run_generation",
]
