"""Settings of the tests of fa."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from polyattn.testing.plugin import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

# The stand-ins are a module of their own, and the implementation that selection imports by name.
sys.path.insert(0, str(Path(__file__).parent))

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)
