"""``--backend diffusers``: attention by one of diffusers' own backends, under diffusers' name.

The name goes to diffusers' ``set_attention_backend`` unchanged, for every denoiser of the pipeline.
That call also changes the backend of the whole process; this is put back at once, so that only the
pipeline at hand runs what was named for it.
"""

from __future__ import annotations

from typing import Any

from polyattn.errors import GenerateError, nearest

__all__ = ["check_name", "set_backend"]


def check_name(name: str, *, allow_download: bool) -> None:
    """Raise unless the installed diffusers knows the backend and has what it needs."""
    import diffusers
    from diffusers.models import attention_dispatch as dispatch

    members = dispatch.AttentionBackendName.__members__.values()
    known = sorted(member.value for member in members if member.value != "polyattn")
    if name not in known:
        close = nearest(name, known)
        raise GenerateError(
            f"diffusers {diffusers.__version__} has no attention backend {name!r}; it has "
            f"{', '.join(known)}",
            hint=f"--attention-backend {close[0]}" if close else None,
        )
    if name.endswith("_hub") and not allow_download:
        raise GenerateError(
            f"the backend {name!r} of diffusers downloads a compiled kernel from the Hub",
            hint=f"--attention-backend {name} --allow-download",
        )
    check = getattr(dispatch, "_check_attention_backend_requirements", None)
    if check is not None:
        try:
            check(dispatch.AttentionBackendName(name))
        except Exception as error:
            raise _unusable(name, error) from error


def set_backend(pipe: Any, name: str) -> list[dict[str, Any]]:
    """Set the backend on every denoiser; returns how many attention modules each one changed."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    rows = []
    before = Registry._active_backend
    try:
        for component, model in pipe.components.items():
            if not component.startswith("transformer") or model is None:
                continue
            try:
                model.set_attention_backend(name)
            except Exception as error:
                raise _unusable(name, error) from error
            rows.append({"component": component, "used": name, "modules": _count(model, name)})
    finally:
        Registry._active_backend = before
    for row in rows:
        if not row["modules"]:
            raise GenerateError(
                f"diffusers' set_attention_backend({name!r}) changed nothing in "
                f"{row['component']}: its attention does not let a backend be chosen"
            )
    return rows


def _count(model: Any, name: str) -> int:
    chosen = (
        getattr(getattr(module, "processor", None), "_attention_backend", None)
        for module in model.modules()
    )
    return sum(getattr(backend, "value", backend) == name for backend in chosen)


def _unusable(name: str, error: Exception) -> GenerateError:
    return GenerateError(f"diffusers cannot use its attention backend {name!r}: {error}")
