"""torch_sdpa against the conformance kit, with torch's choice of kernel and with named kernels."""

from __future__ import annotations

import torch

from polyattn.testing import BackendConformance


class TestTorchSdpa(BackendConformance):
    """Every kernel that takes all that torch_sdpa declares is held to the same numbers."""

    backend = "torch_sdpa"
    configs = ({}, {"kernel": "math"}, {"kernel": "flash"})


class TestTorchSdpaOnCpu(TestTorchSdpa):
    """The CPU kernels, on a machine whose first choice is a GPU."""

    device = "cpu"


if not torch.cuda.is_available():
    del TestTorchSdpaOnCpu  # the first class runs on the CPU already
