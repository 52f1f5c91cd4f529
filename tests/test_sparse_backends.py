"""The sparse backends side by side, in a model of diffusers, through the bridge."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_wan
import torch

import polyattn
from polyattn.integrations.diffusers import attach_gates

WIDTH = 2 * 16  # heads times head dimension

# At these parameters nothing is left out, and the method is dense attention.
DENSE: dict[str, dict[str, Any]] = {
    "sta": {"window_size": [3, 3, 3], "tile_size": [2, 4, 4], "skip_time_steps": 0},
    "vsa": {"sparsity": 0.0},
    "vmoba": {
        "temporal_chunk_size": 2, "spatial_chunk_size": [4, 4], "st_layer": 0,
        "moba_threshold": 1.0, "first_full_step": 0,
    },
    "svg2": {
        "num_q_centroids": 5, "num_k_centroids": 9, "top_p_kmeans": 1.0, "kmeans_iter_init": 2,
        "dense_steps": 0, "dense_layers": 0,
    },
}  # fmt: skip
SPARSER: dict[str, dict[str, Any]] = {
    "sta": {"window_size": [1, 1, 1]},
    "vsa": {"sparsity": 0.5},
    "vmoba": {"moba_threshold": 0.1},
    "svg2": {"top_p_kmeans": 0.3},
}


def model() -> Any:
    return tiny_wan.tiny_transformer(attention_head_dim=16)


def forward(transformer: Any) -> torch.Tensor:
    """One forward on a grid of 4 x 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        out = transformer(
            hidden_states=torch.randn(2, 16, 4, 16, 16, generator=generator),
            timestep=torch.tensor([900.0, 900.0]),
            encoder_hidden_states=torch.randn(2, 16, 16, generator=generator),
            return_dict=False,
        )[0]
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("backend", DENSE)
def test_each_serves_the_video_and_leaves_the_rest_dense(backend: str) -> None:
    transformer = model()
    plain = forward(transformer)
    with polyattn.apply(transformer, backend, config=DENSE[backend]) as handle:
        torch.testing.assert_close(forward(transformer), plain, rtol=1e-5, atol=1e-5)
    rows = {row.role: row for row in handle.report.rows}
    assert rows["cross"].used == "torch_sdpa"
    assert rows["self"].requested == backend
    assert rows["self"].facts["density"] == pytest.approx(1)
    with polyattn.apply(transformer, backend, config={**DENSE[backend], **SPARSER[backend]}) as now:
        assert not torch.allclose(forward(transformer), plain, rtol=1e-4, atol=1e-4)
    (facts,) = (row.facts for row in now.report.rows if row.role == "self")
    assert 0 < facts["density"] < 1
    assert facts["provider"] == "reference"


@pytest.mark.parametrize("backend", DENSE)
def test_density_is_of_visible_keys(backend: str) -> None:
    """The same number means the same in every report."""
    q, k, v = (torch.randn(2, 4 * 8 * 8 + 20, 2, 16) for _ in range(3))
    text = polyattn.TextSpan(256, 20, valid_length=15)
    visible = torch.arange(276) < torch.tensor([[200], [100]])
    for mask in (None, visible):
        report = polyattn.reporting.Report()
        with (
            polyattn.reporting.reporting_to(report),
            polyattn.forward_context(grid=(4, 8, 8), text=text, layer=0),
        ):
            polyattn.attention(q, k, v, backend=backend, config=DENSE[backend], attn_mask=mask)
        assert report.rows[0].facts["density"] == pytest.approx(1)


def test_the_gates_of_a_checkpoint_are_used() -> None:
    def gates(scale: float) -> dict[str, torch.Tensor]:
        return {
            f"blocks.{layer}.to_gate_compress.{name}": torch.full(shape, scale)
            for layer in range(tiny_wan.LAYERS)
            for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
        }

    plain = forward(model())
    for scale, same in ((0.0, True), (0.5, False)):
        transformer = model()
        attach_gates(transformer, gates(scale))
        with polyattn.apply(transformer, "vsa") as handle:
            found = forward(transformer)
        assert torch.allclose(found, plain, rtol=1e-5, atol=1e-5) == same
        (facts,) = (row.facts for row in handle.report.rows if row.role == "self")
        assert facts["coarse_branch"] == "on (times the gate)"
