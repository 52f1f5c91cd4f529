"""Settings of the tests of sparse_video_gen_2_attn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from polyattn import testing
from polyattn.testing.plugin import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

# The tensors here are so small that several threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def dense_backend() -> Iterator[str]:
    """The backend of the dense phase, also where this plugin is installed alone."""
    with testing.dense_backend() as name:
        yield name
