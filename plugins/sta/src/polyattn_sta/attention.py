"""``sliding_tile_attn``: each tile of a video attends to the tiles of a window around it.

Sliding Tile Attention (arXiv 2502.04507), on any token grid: tile index = coordinate // tile size,
and the tiles at the far edges may be short. Every head has a window, from a mask strategy or one
for all; softmax is exact over the tiles in it. Text is seen by every query and sees everything.

In a search the result is that of full attention, and the distance of every candidate window from it
is written down. What a run has to remember (its strategy, the name of its record) is in the run's
own state.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from pydantic import ValidationError

from polyattn.context import ForwardContext, current_context
from polyattn.contract import AttentionCall, AttentionRequest, Implementation
from polyattn.environment import Environment
from polyattn.errors import ConfigError, InputError
from polyattn.video import video_sequence
from polyattn_kernels import BlockSparsePlan, which_provider
from polyattn_sta.config import StaConfig
from polyattn_sta.search import SearchRecord, append_record
from polyattn_sta.strategy import Strategy, load_strategy
from polyattn_sta.tiles import Tiles, WindowPlans, attend, tiles_of, window_plans
from polyattn_sta.tuning import tune
from polyattn_sta.windows import (
    Extent,
    counted,
    default_candidates,
    exceeds,
    is_full,
    tiles_along,
    words,
)

__all__ = ["build"]

# q as it is, k and v in rows, and the key lengths of their plan.
Arranged = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]

RUN = ("sliding_tile_attn",)  # where a run's state keeps what all its layers share


def build(config: StaConfig, request: AttentionRequest, environment: Environment) -> Implementation:
    """The implementation for one request; what can be wrong with files is told here.

    Raises:
        ConfigError: for a strategy, candidates or search records that cannot serve.
    """
    attention: _SlidingTiles
    if config.sta_mode == "STA_searching":
        attention = Search(config)
    elif config.window_size is not None:
        attention = OneWindow(config)
    else:
        attention = ByStrategy(config)
    if request.grid is not None:
        attention.check(
            tiles_along(request.grid, config.tile_size), request.heads, request.first_head
        )
    return attention


class _SlidingTiles:
    """What the three ways of attending share; see :class:`polyattn.contract.Implementation`."""

    def __init__(self, config: StaConfig) -> None:
        self.config = config

    def check(self, tiles: Extent, heads: int | None, first_head: int | None) -> None:
        """ConfigError for what cannot serve this tile grid and number of heads."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        sequence = video_sequence(q, k, call)
        tiles = tiles_of(sequence, self.config.tile_size, q.device)
        assert call.context is not None  # video_sequence has refused a call without one
        plan, facts = self.plan(tiles, call.context, q.shape[2])
        arranged = (q, *tiles.arrange(k, v, sequence))
        out, lse = attend(*arranged, plan, call.scale, call.return_lse)
        call.facts = {
            **facts,
            **self.measure(arranged, out, tiles, call),
            "tiles": f"{words(tiles.tile_grid)} of {words(self.config.tile_size)}",
            "provider": which_provider(plan, *arranged[:3]).name,
        }
        return out if lse is None else (out, lse)

    def plan(
        self, tiles: Tiles, context: ForwardContext, heads: int
    ) -> tuple[BlockSparsePlan, dict[str, Any]]:
        """The plan that gives the call's result, and what to tell of it."""
        raise NotImplementedError

    def measure(
        self, arranged: Arranged, out: torch.Tensor, tiles: Tiles, call: AttentionCall
    ) -> Mapping[str, Any]:
        """What else is to be done with the arranged tensors and their result ``[B, S, H, D]``."""
        return {}


class OneWindow(_SlidingTiles):
    """``window_size`` for all steps, layers and heads."""

    def plan(
        self, tiles: Tiles, context: ForwardContext, heads: int
    ) -> tuple[BlockSparsePlan, dict[str, Any]]:
        window = self.config.window_size
        assert window is not None
        plans = window_plans(tiles, (window,))
        return plans.plans[0], {"density": plans.densities[0], "window": words(window)}


class ByStrategy(_SlidingTiles):
    """A window for each step, layer and head, from a file or tuned from a search."""

    def __init__(self, config: StaConfig) -> None:
        super().__init__(config)
        self.name = f"strategy of {config!r}"  # in a run's state

    def check(self, tiles: Extent, heads: int | None, first_head: int | None) -> None:
        strategy, _ = self.strategy(tiles)
        strategy.check_tiles(tiles, self.config.tile_size)
        if heads is not None:
            strategy.check_heads(heads, first_head)
        context = current_context()
        if context is not None and context.num_layers is not None:
            strategy.check_layers(0, context.num_layers)

    def strategy(self, tiles: Extent) -> tuple[Strategy, str]:
        """The strategy as it is now, and where it comes from; of a search on these tiles."""
        config = self.config
        if config.sta_mode == "STA_inference":
            assert config.mask_strategy_file_path is not None  # probed before anything is built
            return load_strategy(config.mask_strategy_file_path), config.mask_strategy_file_path
        assert config.search_output_path is not None
        tuned = tune(
            config.search_output_path,
            config.mask_strategy_file_path,
            skip_time_steps=config.dense_steps,
            dense_layers=config.dense_layers,
            both_branches=config.sta_mode == "STA_tuning_cfg",
            max_density=config.max_density,
            tile_size=config.tile_size,
            tile_grid=tiles,
        )
        return tuned.strategy, f"{tuned.path} (tuned from {counted(tuned.runs, 'run')})"

    def plan(
        self, tiles: Tiles, context: ForwardContext, heads: int
    ) -> tuple[BlockSparsePlan, dict[str, Any]]:
        run = context.run_state.setdefault(RUN, {})
        if self.name not in run:  # a file that changes during a run counts from the next one on
            run[self.name] = self.strategy(tiles.tile_grid)
        strategy, source = run[self.name]
        step, layer = _step_and_layer(context)
        strategy.check_tiles(tiles.tile_grid, self.config.tile_size)
        strategy.check_heads(heads, context.first_head)
        strategy.check_layers(layer, context.num_layers)
        own_step = strategy.step_for(step, context.num_steps)
        first = context.first_head or 0
        own_heads = slice(first, first + heads)
        plan, density = window_plans(tiles, strategy.windows).of_heads(
            strategy.of_heads(own_step, layer)[own_heads],
            _choices_on(strategy, tiles.geometry.device)[own_step, layer, own_heads],
        )
        facts = {"density": density, "strategy": source}
        if context.num_steps not in (None, strategy.steps):
            facts["steps"] = f"{context.num_steps} mapped to the strategy's {strategy.steps}"
        return plan, facts


@lru_cache(maxsize=8)
def _choices_on(strategy: Strategy, device: torch.device) -> torch.Tensor:
    """The windows' numbers ``[steps, layers, heads]``, sent to the device once for a run."""
    with torch.inference_mode(False):
        choices = torch.tensor(strategy.choices, device=device)
        return choices.view(strategy.steps, strategy.layers, strategy.heads)


class Search(_SlidingTiles):
    """Full attention, and a record of how far each candidate window is from it."""

    def check(self, tiles: Extent, heads: int | None, first_head: int | None) -> None:
        self.candidates(tiles)

    def candidates(self, tiles: Extent) -> tuple[Extent, ...]:
        """The windows to try on this tile grid."""
        given = self.config.candidates
        for window in given or ():
            if exceeds(window, tiles) or is_full(window, tiles):
                what = "exceeds" if exceeds(window, tiles) else "covers all of"
                raise ConfigError(
                    f"the candidate {list(window)} {what} the grid of {words(tiles)} tiles of "
                    f"{words(self.config.tile_size)} tokens"
                )
        found = given or default_candidates(tiles)
        if not found:
            raise ConfigError(
                f"a single tile of {words(self.config.tile_size)} tokens holds the whole grid: "
                "there are no windows to search",
                hint="a smaller tile_size",
            )
        return found

    def plan(
        self, tiles: Tiles, context: ForwardContext, heads: int
    ) -> tuple[BlockSparsePlan, dict[str, Any]]:
        _step_and_layer(context)  # before anything slow
        return self._plans(tiles).plans[-1], {"density": 1.0}

    def _plans(self, tiles: Tiles) -> WindowPlans:
        """Of the candidates, and of the full window last."""
        return window_plans(tiles, (*self.candidates(tiles.tile_grid), tiles.tile_grid))

    def measure(
        self, arranged: Arranged, out: torch.Tensor, tiles: Tiles, call: AttentionCall
    ) -> Mapping[str, Any]:
        context, config = call.context, self.config
        assert context is not None
        assert config.search_output_path is not None
        plans = self._plans(tiles)
        full = out[:, tiles.video]
        batch, _, _, head_dim = out.shape
        values = batch * math.prod(tiles.geometry.grid) * head_dim
        errors = []
        for plan in plans.plans[:-1]:
            other, _ = attend(*arranged, plan, call.scale)
            errors.append(_errors(other[:, tiles.video] - full, values))
        squared, absolute = torch.stack(errors, 1).tolist()  # the one wait of a searched call
        step, layer = _step_and_layer(context)
        run = context.run_state.setdefault(RUN, {})
        try:
            record = SearchRecord(
                run=run.setdefault("name", uuid.uuid4().hex),
                step=step,
                num_steps=context.num_steps,
                layer=layer,
                num_layers=context.num_layers,
                branch=context.branch,
                first_head=context.first_head or 0,
                tile=config.tile_size,
                tiles=tiles.tile_grid,
                candidates=self.candidates(tiles.tile_grid),
                densities=plans.densities[:-1],
                mean_squared_error=squared,
                mean_absolute_error=absolute,
            )
        except ValidationError:
            raise InputError(
                f"step {step}, layer {layer}: attention over these q, k and v is not finite, and "
                "no window can be judged by it"
            ) from None
        file = append_record(config.search_output_path, record)
        return {"candidates": " ".join(map(words, record.candidates)), "record": str(file)}


def _errors(difference: torch.Tensor, values: int) -> torch.Tensor:
    """Mean square and mean absolute value per head of ``[B, R, H, D]``: ``[2, H]``.

    In float32 without a float32 copy of the tensor.
    """
    dtype = torch.float64 if difference.dtype is torch.float64 else torch.float32
    norm = torch.linalg.vector_norm
    squared = norm(difference, 2, dim=(0, 1, 3), dtype=dtype).square() / values
    return torch.stack([squared, norm(difference, 1, dim=(0, 1, 3), dtype=dtype) / values])


def _step_and_layer(context: ForwardContext) -> tuple[int, int]:
    """Where in the run a call is, or an error that says how to tell."""
    missing = [name for name in ("step", "layer") if getattr(context, name) is None]
    if missing:
        raise InputError(
            "windows differ from step to step and from layer to layer, and the forward context "
            f"does not say the {' and the '.join(missing)}",
            hint="with polyattn.forward_context(step=i, num_steps=n, layer=j, num_layers=m): ...",
        )
    assert context.step is not None
    assert context.layer is not None
    return context.step, context.layer
