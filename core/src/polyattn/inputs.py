"""Checking the arguments of an attention call, and turning them into an AttentionRequest.

Every combination of shapes, dtypes, devices, mask and scale that no backend could serve is refused
here with an :class:`~polyattn.errors.InputError`, before any kernel sees it. The dispatcher runs
these checks once per distinct combination, not once per call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from polyattn.context import ForwardContext
from polyattn.contract import AttentionRequest, MaskKind
from polyattn.errors import InputError

__all__ = ["dtype_name", "mask_kind", "request_of", "view_mask"]

LAYOUT = "expected [B, S, H, D]"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def request_of(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    return_lse: Any,
    extras: Any,
    needs_grad: bool,
    role: str,
    context: ForwardContext | None,
) -> AttentionRequest:
    """The request behind a call, or an InputError that says what is wrong and what to do."""
    for name, value in (
        ("is_causal", is_causal),
        ("enable_gqa", enable_gqa),
        ("return_lse", return_lse),
    ):
        if not isinstance(value, bool):
            raise InputError(f"{name} is True or False, found {value!r}")
    _check_tensors(q, k, v)
    _check_shapes(q, k, v, enable_gqa)
    _check_scale(scale)
    _check_extras(extras, q)
    grid = context.grid if context is not None else None
    text = context.text if context is not None else None
    if grid is not None and role == "self":
        video = grid[0] * grid[1] * grid[2]
        tokens = video + (text.length if text is not None else 0)
        if q.shape[1] != tokens:
            extra = f" and {text.length} text tokens" if text is not None else ""
            hint = "give the grid in tokens, i.e. the latent's size divided by the patch size"
            if text is None and q.shape[1] > tokens:
                hint += (
                    f"; or, if {q.shape[1] - tokens} of the tokens are text, say where: "
                    f"polyattn.forward_context(grid={grid}, text=polyattn.TextSpan({tokens}, "
                    f"{q.shape[1] - tokens})), TextSpan(0, ...) before the video"
                )
            raise InputError(
                f"the grid (T, H, W) = {grid}{extra} makes {tokens} tokens, and q has "
                f"{q.shape[1]} (role {role!r})",
                hint=hint,
            )
    return AttentionRequest(
        batch=q.shape[0],
        query_length=q.shape[1],
        key_length=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=dtype_name(q.dtype),
        device=str(q.device),
        role=role,
        is_causal=is_causal,
        mask=mask_kind(mask, q, k),
        scale=None if scale is None else float(scale),
        grid=grid,
        text=text,
        first_head=context.first_head if context is not None else None,
        needs_lse=return_lse,
        needs_grad=needs_grad,
        extras=tuple(sorted(extras)) if extras else (),
        extra_forms=tuple(
            (tuple(extras[name].shape), dtype_name(extras[name].dtype)) for name in sorted(extras)
        )
        if extras
        else (),
    )


def _check_tensors(q: Any, k: Any, v: Any) -> None:
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} is a torch tensor, found {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise InputError(
                f"{name} is a {'nested' if tensor.is_nested else tensor.layout} tensor; attention "
                "takes ordinary dense tensors",
                hint=f"{name}.to_dense(), or padding and a key-padding mask",
            )
        if tensor.dim() != 4:
            raise InputError(f"{name} has {tensor.dim()} dimensions {_shape(tensor)}, {LAYOUT}")
        if not tensor.is_floating_point():
            raise InputError(
                f"{name} has dtype {dtype_name(tensor.dtype)}; attention takes floating-point "
                "tensors",
                hint=f"{name}.to(torch.bfloat16)",
            )
        if tensor.numel() == 0:
            raise InputError(f"{name} is empty: {_shape(tensor)}; every dimension is at least 1")
    for what, of in (("dtype", lambda x: dtype_name(x.dtype)), ("device", lambda x: x.device)):
        found = {name: str(of(tensor)) for name, tensor in tensors.items()}
        if len(set(found.values())) > 1:
            described = ", ".join(f"{name} {value}" for name, value in found.items())
            target = "q.device" if what == "device" else "q.dtype"
            raise InputError(
                f"q, k and v share one {what}, found {described}",
                hint=f"k.to({target}), v.to({target})",
            )


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool) -> None:
    shapes = f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}, {LAYOUT}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InputError(f"q, k and v share the batch size B: {shapes}")
    if k.shape[1] != v.shape[1]:
        raise InputError(f"k and v share the sequence length S: {shapes}")
    if k.shape[2] != v.shape[2]:
        raise InputError(f"k and v share the number of heads H: {shapes}")
    if not q.shape[3] == k.shape[3] == v.shape[3]:
        raise InputError(f"q, k and v share the head dimension D: {shapes}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads == kv_heads:
        return
    if heads % kv_heads:
        raise InputError(
            f"the {heads} query heads are not a multiple of the {kv_heads} key heads: {shapes}",
            hint="if S and H are swapped, pass q.transpose(1, 2), and k and v likewise",
        )
    if not enable_gqa:
        raise InputError(
            f"{heads} query heads share {kv_heads} key heads, and grouped-query attention was not "
            f"asked for: {shapes}",
            hint="enable_gqa=True",
        )


def _check_scale(scale: Any) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InputError(f"scale is a number or None, found {type(scale).__name__}")
    try:
        finite = math.isfinite(scale)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite:
        raise InputError(f"scale is a finite number, found {scale}", hint="scale=None (1/sqrt(D))")


def _check_extras(extras: Any, q: torch.Tensor) -> None:
    if extras is None:
        return
    if not isinstance(extras, Mapping):
        raise InputError(f"extras maps names to tensors, found {type(extras).__name__}")
    for name, tensor in extras.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"extras maps names to tensors, found {name!r}: {type(tensor).__name__}",
                hint=f"leave {name!r} out where there is none" if tensor is None else None,
            )
        if tensor.device != q.device:
            raise InputError(
                f"extras[{name!r}] is on {tensor.device}, q on {q.device}",
                hint=f"extras[{name!r}].to(q.device)",
            )


def mask_kind(mask: Any, q: torch.Tensor, k: torch.Tensor) -> MaskKind:
    """What kind of mask this is; raises when it is none that attention could honour."""
    if mask is None:
        return "none"
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"attn_mask is a tensor or None, found {type(mask).__name__}")
    batch, queries, heads, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    full = (batch, heads, queries, keys)
    if mask.dtype is not torch.bool and mask.dtype is not q.dtype:
        if mask.is_floating_point():
            raise InputError(
                f"an additive attn_mask has q's dtype {dtype_name(q.dtype)}, found "
                f"{dtype_name(mask.dtype)}",
                hint=f"attn_mask.to(torch.{dtype_name(q.dtype)})",
            )
        raise InputError(
            f"attn_mask is boolean (True = may attend) or additive, found {dtype_name(mask.dtype)}",
            hint="attn_mask.bool()",
        )
    if mask.device != q.device:
        raise InputError(
            f"attn_mask is on {mask.device}, q on {q.device}", hint="attn_mask.to(q.device)"
        )
    per_item_or_query = mask.shape == (batch, keys) and batch == queries and batch > 1
    if per_item_or_query and mask.dtype is torch.bool:
        raise InputError(
            f"a boolean attn_mask of shape {_shape(mask)} is ambiguous, because B and Sq are both "
            f"{batch}: it could hide keys per batch item or per query",
            hint="attn_mask[:, None, None, :] (per item), attn_mask[None, None] (per query)",
        )
    shape = view_mask(mask, q, k).shape if mask.dim() <= 4 else None
    fits = shape is not None and all(
        side in (1, wanted) for side, wanted in zip(shape, full, strict=True)
    )
    if not fits or mask.dim() == 0:
        raise InputError(
            f"attn_mask of shape {_shape(mask)} does not broadcast to [B, H, Sq, Sk] = "
            f"{list(full)}",
            hint="attn_mask[:, None, None, :] for a [B, Sk] key-padding mask",
        )
    if mask.dtype is not torch.bool:
        return "additive"
    assert shape is not None
    return "key_padding" if shape[1] == shape[2] == 1 else "boolean"


def view_mask(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The mask as a 4-D view broadcastable to [B, H, Sq, Sk], its last dimension never broadcast.

    A boolean [B, Sk] hides keys per batch item; any other mask broadcasts from the right.
    """
    if mask.dim() == 2 and mask.dtype is torch.bool and mask.shape == (q.shape[0], k.shape[1]):
        mask = mask[:, None, None, :]
    elif mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] == 1 != k.shape[1]:
        mask = mask.expand(-1, -1, -1, k.shape[1])
    return mask


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
