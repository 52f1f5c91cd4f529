"""Test settings: the sources are found without installing, and a CPU test uses few threads."""

from __future__ import annotations

import sys
from pathlib import Path

_DEMO = Path(__file__).resolve().parents[1]
for folder in (_DEMO / "training", _DEMO / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
