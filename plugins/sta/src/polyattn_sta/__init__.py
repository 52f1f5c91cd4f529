"""The backend ``sliding_tile_attn`` (``sta``): Sliding Tile Attention, arXiv 2502.04507.

Importing this module imports neither torch nor a kernel; :mod:`polyattn_sta.attention` does.
Strategies are made and read here too: :func:`tune`, :func:`load_strategy`, and
``python -m polyattn_sta``.
"""

from __future__ import annotations

from polyattn.contract import (
    Architectures,
    AttentionRequest,
    BackendSpec,
    Capabilities,
    HeadDims,
    Reason,
)
from polyattn.environment import Environment
from polyattn.errors import ConfigError
from polyattn.hooks import hookimpl
from polyattn_sta.config import TUNING, StaConfig
from polyattn_sta.search import record_files
from polyattn_sta.strategy import Strategy, load_strategy
from polyattn_sta.tuning import Tuned, tune

__all__ = ["SPEC", "Strategy", "Tuned", "load_strategy", "polyattn_backends", "tune"]


def _windows_are_given(
    request: AttentionRequest, config: StaConfig, environment: Environment
) -> list[Reason]:
    """Inference needs to be told its windows; nothing could stand in for them."""
    if config.sta_mode != "STA_inference" or config.window_size or config.mask_strategy_file_path:
        return []
    return [
        Reason(
            code="config",
            message="needs mask_strategy_file_path (a mask strategy: a window per step, layer and "
            "head) or window_size (one window [t, h, w] for all, in tiles), found neither",
            hint="--attention-backend-config 'window_size=[3,3,3]', or config={'window_size': "
            "[3, 3, 3]}",
        )
    ]


def _files_are_there(config: StaConfig) -> list[Reason]:
    """What the files that the configuration names lack; a run says so itself."""
    try:
        if config.sta_mode == "STA_inference" and config.mask_strategy_file_path is not None:
            load_strategy(config.mask_strategy_file_path)
        elif config.sta_mode in TUNING and config.search_output_path is not None:
            record_files(config.search_output_path)
    except ConfigError as error:
        return [Reason(code="config", message=error.message, hint=error.hint)]
    return []


SPEC = BackendSpec(
    name="sliding_tile_attn",
    aliases=["sta"],
    summary="Sliding Tile Attention: each tile of the video attends to a window of tiles",
    documentation="https://arxiv.org/abs/2502.04507",
    kind="sparse",
    capabilities=Capabilities(
        platforms={"cpu": Architectures(), "cuda": Architectures(minimum="8.0")},
        dtypes=("bfloat16", "float16", "float32", "float64"),
        head_dims=HeadDims(minimum=1, maximum=256),
        masks=("key_padding",),
        gqa=True,
        custom_scale=True,
        lse=True,
        deterministic=True,
        needs_grid=True,
        accuracy="approximate",
    ),
    config=StaConfig,
    probe_request=_windows_are_given,
    probe_config=_files_are_there,
    implementation="polyattn_sta.attention:build",
    footnotes={"cpu": "a reference, in plain torch"},
)


@hookimpl
def polyattn_backends() -> list[BackendSpec]:
    return [SPEC]
