"""Settings of the tests of torch_sdpa."""

from __future__ import annotations

import torch

from polyattn.testing.plugin import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)
