"""polyattn: every attention kernel a diffusion model can use, behind one contract.

``import polyattn`` is cheap: it imports neither torch nor any plugin. Names are loaded on first
use; those that compute (``attention``, the layers, ``apply``) need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyattn.config import load_config
    from polyattn.context import forward_context
    from polyattn.contract import TextSpan
    from polyattn.dispatch import attention
    from polyattn.environment import Environment
    from polyattn.errors import PolyattnError
    from polyattn.integrations.diffusers import apply
    from polyattn.layers import LocalAttention
    from polyattn.parallel import UlyssesAttention, USPAttention
    from polyattn.reporting import report
    from polyattn.selection import backends, select
    from polyattn.settings import configure, force_backend

_HOMES = {
    "Environment": "polyattn.environment",
    "LocalAttention": "polyattn.layers",
    "PolyattnError": "polyattn.errors",
    "TextSpan": "polyattn.contract",
    "USPAttention": "polyattn.parallel",
    "UlyssesAttention": "polyattn.parallel",
    "apply": "polyattn.integrations.diffusers",
    "attention": "polyattn.dispatch",
    "backends": "polyattn.selection",
    "configure": "polyattn.settings",
    "force_backend": "polyattn.settings",
    "forward_context": "polyattn.context",
    "load_config": "polyattn.config",
    "report": "polyattn.reporting",
    "select": "polyattn.selection",
}

__all__ = [
    "Environment",
    "LocalAttention",
    "PolyattnError",
    "TextSpan",
    "USPAttention",
    "UlyssesAttention",
    "apply",
    "attention",
    "backends",
    "configure",
    "force_backend",
    "forward_context",
    "load_config",
    "report",
    "select",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'polyattn' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "diffusers"):
            raise
        extra = "sdpa" if error.name == "torch" else "diffusers"
        raise ModuleNotFoundError(
            f"polyattn.{name} needs {error.name}, which is not installed\n"
            f'  Try: pip install "polyattn[{extra}]"',
            name=error.name,
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
