"""A denoiser's tokens spread over processes, with diffusers' own hooks.

diffusers knows for many models where a sequence is to be split, which tensors follow it (rotary
embeddings, timesteps per token), and where it is joined again: the model's context-parallel plan.
:class:`Spreading` installs those hooks for a mesh, or finds those that ``enable_parallelism``
installed; the attention between them is polyattn's, which knows every backend.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from polyattn.errors import BridgeError
from polyattn.parallel.agreement import exchange_headers
from polyattn.parallel.collectives import watched
from polyattn.parallel.mesh import DIMENSIONS, Group, SequenceGroups, sequence_groups

__all__ = ["Spreading", "mesh_of"]

HOOKS = "_diffusers_hook"  # where diffusers keeps a module's hooks

_spread: WeakKeyDictionary[Any, Spreading] = WeakKeyDictionary()


def mesh_of(component: str, model: Any) -> Any:
    """The mesh a model is already spread over, by a handle or by diffusers; None for one process.

    Raises :class:`~polyattn.errors.BridgeError` for parallelism of another kind.
    """
    if model in _spread:
        return _spread[model].mesh
    config = getattr(model, "_parallel_config", None)
    if config is None:
        return None
    mesh = getattr(getattr(config, "context_parallel_config", config), "_mesh", None)
    if mesh is None or getattr(config, "tensor_parallel_config", None) is not None:
        raise BridgeError(
            f"{component} has a parallelism of diffusers enabled that does not go through polyattn "
            "yet; context parallelism does",
            hint="polyattn.apply(pipe, mesh=polyattn.parallel.sequence_mesh())",
        )
    return mesh[DIMENSIONS]


class Spreading:
    """The hooks that spread one model over a mesh; the last of its users takes them away."""

    def __init__(self, component: str, model: Any, mesh: Any) -> None:
        from diffusers import ContextParallelConfig
        from diffusers.hooks.context_parallel import apply_context_parallel

        groups = sequence_groups(mesh, ring=True)
        if getattr(mesh, "mesh_dim_names", None) != DIMENSIONS:
            raise BridgeError(
                f"a pipeline takes a mesh of the dimensions {DIMENSIONS}, found {mesh!r}",
                hint="mesh=polyattn.parallel.sequence_mesh()",
            )
        self.model, self.mesh, self.users = model, mesh, 0
        self.plan = getattr(model, "_cp_plan", None)
        if self.plan is None:
            raise BridgeError(
                f"diffusers has no plan for spreading a {type(model).__name__} ({component}) over "
                "processes",
                hint="one process, or a model whose class has a _cp_plan (Wan has)",
            )
        config = ContextParallelConfig(
            ring_degree=groups.ring.size, ulysses_degree=groups.ulysses.size
        )
        # Tokens that do not come out even are split unevenly. diffusers' own attention cannot do
        # that on every mesh, and its config says so when it is made; polyattn's can.
        config.ulysses_anything = True
        config.setup(groups.index, groups.size, model.device, mesh=mesh)
        self._hooked_before = {each for each in model.modules() if hasattr(each, HOOKS)}
        apply_context_parallel(model, config, self.plan)
        for module in model.modules():
            _join_with_any_transport(module, groups, config._flattened_mesh.get_group())

    @classmethod
    def attach(cls, component: str, model: Any, mesh: Any) -> bool:
        """Spread a model, or take part in what an earlier handle did; whether there is anything to
        :meth:`detach`. A mesh of None is no wish."""
        found = _spread.get(model)
        if found is None:
            if mesh is None or sequence_groups(mesh, ring=True).size == 1:
                return False
            if mesh_of(component, model) is not None:
                raise BridgeError(
                    f"{component} is already spread over processes by enable_parallelism",
                    hint="polyattn.apply(...) without mesh= takes that one",
                )
            found = _spread[model] = cls(component, model, mesh)
        elif mesh is not None and mesh is not found.mesh:
            raise BridgeError(
                f"{component} is already spread over another mesh",
                hint="handle.restore() first, or leave mesh= out",
            )
        found.users += 1
        return True

    @classmethod
    def detach(cls, model: Any) -> None:
        found = _spread[model]
        found.users -= 1
        if not found.users:
            del _spread[model]
            found._remove()

    def _remove(self) -> None:
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(self.model, self.plan)
        for module in self.model.modules():
            if hasattr(module, HOOKS) and module not in self._hooked_before:
                delattr(module, HOOKS)


def _join_with_any_transport(module: Any, groups: SequenceGroups, group: Any) -> None:
    """Have a module's gathering hook join shards of unequal length, which gloo cannot gather."""
    from diffusers.hooks.context_parallel import ContextParallelGatherHook

    class Joining(ContextParallelGatherHook):  # type: ignore[misc]
        def post_forward(self, module: Any, output: Any) -> Any:
            outputs = [output] if isinstance(output, torch.Tensor) else list(output)
            if any(each.requires_grad for each in outputs):
                raise BridgeError(
                    "a model that is spread over processes is for inference: no gradient passes "
                    "where its tokens are joined",
                    hint="torch.no_grad()",
                )
            joined = [
                each if place is None else _joined(each, place.gather_dim, groups, group)
                for each, place in zip(outputs, self.metadata, strict=True)
            ]
            return joined[0] if isinstance(output, torch.Tensor) else tuple(joined)

    registry: Any = getattr(module, HOOKS, None)
    for name, hook in list(registry.hooks.items()) if registry is not None else ():
        if type(hook) is ContextParallelGatherHook:
            registry.remove_hook(name, recurse=False)
            registry.register_hook(Joining(hook.metadata, hook.parallel_config), name)


def _joined(
    shard: torch.Tensor, dimension: int, groups: SequenceGroups, group: Any
) -> torch.Tensor:
    """All shards along a dimension, on every process; filled up to one length on the way."""
    lengths = [row[0] for row in exchange_headers(groups, [shard.shape[dimension]])]
    rows = shard.movedim(dimension, 0)
    sent = rows.new_zeros((max(lengths), *rows.shape[1:]))
    sent[: len(rows)] = rows
    received = [torch.empty_like(sent) for _ in lengths]
    with watched("joining a model's tokens", Group.of(group)):
        dist.all_gather(received, sent, group=group)
    parts = [part[:length] for part, length in zip(received, lengths, strict=True)]
    return torch.cat(parts).movedim(0, dimension)
