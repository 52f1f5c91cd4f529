"""Settings of the tests of the kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Random plans and the oracle are a module of their own, which every test module here imports.
sys.path.insert(0, str(Path(__file__).parent))

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)
