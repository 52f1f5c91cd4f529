"""A dense backend for tests of a sparse one, where none is installed.

A method with a schedule is dense for its first steps or layers, by whichever exact backend there
is. Tests of such a plugin should pass where it is installed alone, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polyattn import discovery
from polyattn.contract import Architectures, AttentionCall, BackendSpec, Capabilities
from polyattn.environment import KNOWN_PLATFORMS
from polyattn.errors import BackendUnavailableError
from polyattn.selection import select
from polyattn.testing.isolation import _entry_point, _forget

if TYPE_CHECKING:
    import torch

__all__ = ["dense_backend"]

STAND_IN = BackendSpec(
    name="dense_stand_in",
    summary="The oracle's attention, for tests where no dense backend is installed",
    kind="exact",
    capabilities=Capabilities(
        platforms={platform: Architectures() for platform in KNOWN_PLATFORMS},
        dtypes=("float16", "bfloat16", "float32", "float64"),
        masks=("key_padding", "boolean", "additive"),
        causal=True,
        gqa=True,
        cross_attention=True,
        custom_scale=True,
        lse=True,
    ),
    implementation="polyattn.testing.dense:build",
)


@contextlib.contextmanager
def dense_backend() -> Iterator[str]:
    """Make sure that there is an exact backend; yields the name of the automatic choice.

    Where one is installed that runs here, nothing is changed. Otherwise a slow stand-in counts as
    installed until the ``with`` block ends; processes started meanwhile do not know it.
    """
    found = None
    with contextlib.suppress(BackendUnavailableError):
        found = select(dtype="float32").chosen
    if found is not None:
        yield found
        return
    original = discovery.installed_entry_points

    def installed(path: list[str] | None = None) -> list[Any]:
        return [*original(path), _entry_point(STAND_IN)]

    discovery.installed_entry_points = installed
    _forget()
    try:
        yield STAND_IN.name
    finally:
        discovery.installed_entry_points = original
        _forget()


def build(config: Any, request: Any, environment: Any) -> Any:
    """The oracle as an implementation."""
    from polyattn.testing import oracle

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, /
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out, lse = oracle.attention(
            q, k, v, mask=call.mask, is_causal=call.is_causal, scale=call.scale, return_lse=True
        )
        return (out.to(q.dtype), lse.float()) if call.return_lse else out.to(q.dtype)

    return attention
