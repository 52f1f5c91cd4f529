"""video_sparse_attn against the conformance kit."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyattn.testing import BackendConformance


class TestVideoSparseAttention(BackendConformance):
    """Fine branch alone, both branches, and the parameters at which the method is dense."""

    backend = "video_sparse_attn"
    grid = (3, 6, 9)  # six tiles, of which only one is whole
    configs = (
        {"sparsity": 0.5},
        {"sparsity": 0.8, "coarse_branch": "off"},
    )
    dense_config = {"sparsity": 0.0, "coarse_branch": "off"}  # noqa: RUF012 - a ClassVar of the kit

    def make_extras(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """A gate that keeps the sum of both branches within the range the kit allows."""
        values = torch.rand(q.shape, generator=torch.Generator().manual_seed(7)) * 0.08 - 0.04
        return {"gate": values.to(q.device, q.dtype)}


class TestVideoSparseAttentionOnCpu(TestVideoSparseAttention):
    """The CPU path, on a machine whose first choice is a GPU."""

    device = "cpu"


if not torch.cuda.is_available():
    del TestVideoSparseAttentionOnCpu  # the first class runs on the CPU already
