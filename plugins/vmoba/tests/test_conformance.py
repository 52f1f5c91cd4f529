"""vmoba_attn against the conformance kit, with each kind of layer and each mode."""

from __future__ import annotations

from typing import Any, ClassVar

from polyattn.testing import BackendConformance

TEMPORAL: dict[str, Any] = {"spatial_layer": 0, "st_layer": 0, "temporal_chunk_size": 1}
CYCLE: dict[str, Any] = {
    "temporal_chunk_size": 1,
    "temporal_topk": 1,
    "spatial_chunk_size": [2, 3],
    "spatial_topk": 2,
    "st_chunk_size": [1, 3, 3],
    "st_topk": 3,
}


class TestVmoba(BackendConformance):
    """At a share of 1 every chunk is kept, and the method is dense attention."""

    backend = "vmoba_attn"
    configs = (
        {**CYCLE, "moba_select_mode": "topk", "first_full_step": 0},
        CYCLE,
        {**TEMPORAL, "temporal_chunk_size": 0.3, "moba_threshold_type": "head_global"},
    )
    dense_config: ClassVar[dict[str, Any]] = {**CYCLE, "moba_threshold": 1.0}


class TestVmobaTopk(BackendConformance):
    """The same with the two other kinds of layers; dense where k is the number of chunks."""

    backend = "vmoba_attn"
    configs = (
        {
            **CYCLE,
            "temporal_layer": 0,
            "spatial_layer": 0,
            "moba_select_mode": "topk",
            "moba_threshold_type": "overall",
        },
        {**CYCLE, "temporal_layer": 0, "st_layer": 0},
    )
    dense_config: ClassVar[dict[str, Any]] = {
        **CYCLE,
        "moba_select_mode": "topk",
        "temporal_topk": 2,
    }
