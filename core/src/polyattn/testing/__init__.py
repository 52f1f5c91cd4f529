"""For authors of backends: the conformance kit, its oracle, and isolation from what is installed.

A plugin's test file is three lines, and the backend's own spec decides what is tested::

    from polyattn.testing import BackendConformance

    class TestMyBackend(BackendConformance):
        backend = "my_backend"

``dense_backend`` gives tests of a sparse backend the dense one that its schedule needs.
``fake_distribution`` and ``isolated_registry`` serve tests of discovery and selection. These need
neither torch nor pytest. Everything else is loaded on first use and needs both
(``pip install "polyattn[testing]"``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from polyattn.testing.dense import dense_backend
from polyattn.testing.isolation import default_settings, fake_distribution, isolated_registry

if TYPE_CHECKING:
    from polyattn.testing import oracle
    from polyattn.testing.conformance import BackendConformance

__all__ = [
    "BackendConformance",
    "default_settings",
    "dense_backend",
    "fake_distribution",
    "isolated_registry",
    "oracle",
]


def __getattr__(name: str) -> Any:
    if name == "BackendConformance":
        return importlib.import_module("polyattn.testing.conformance").BackendConformance
    if name == "oracle":
        return importlib.import_module("polyattn.testing.oracle")
    raise AttributeError(f"module 'polyattn.testing' has no attribute {name!r}")
