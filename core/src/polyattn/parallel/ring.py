"""Attention while keys and values travel around a ring of processes.

Every rank keeps its queries and sees, one after the other, the keys and values of all ranks; what
each part gives is merged by its log-sum-exp in float32. The next part is on its way while the
present one is computed on. Exact, for any backend that returns a log-sum-exp (Ring Attention,
arXiv 2310.01889).

The gradient is that of the merged result, computed in plain torch from the saved log-sum-exp while
keys, values and their gradients go around once more: right for every backend, and slow. The
log-sum-exp is float32, and so is the accuracy of both passes for float64 tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from polyattn.parallel.collectives import Rotation
from polyattn.parallel.mesh import Group

__all__ = ["AttendPart", "RingLayout", "ring_attention"]

# (q, k, v, mask, is_causal) -> (out [B, Sq, H, D], lse [B, H, Sq])
AttendPart = Callable[..., tuple[torch.Tensor, torch.Tensor]]

GRADIENT_SCORES = 1 << 24  # scores the backward pass holds at once


@dataclass(frozen=True)
class RingLayout:
    """Where a rank's rows are in the whole sequence: ``first`` replicated tokens, the parts, and
    ``last`` replicated ones.

    ``parts`` are the tokens at each place of the ring. Queries and own keys of a rank are its part
    between the replicated tokens; the parts alone travel.
    """

    group: Group
    parts: tuple[int, ...]
    first: int = 0
    last: int = 0

    def travelling(self, place: int) -> slice:
        start = self.first + sum(self.parts[:place])
        return slice(start, start + self.parts[place])

    def rows(self, mask: torch.Tensor, dimension: int, place: int, own: bool) -> torch.Tensor:
        """A place's rows (or columns) of something over the whole sequence."""
        if mask.shape[dimension] == 1:
            return mask
        part = self.travelling(place)
        if not own or not (self.first or self.last):
            return mask.narrow(dimension, part.start, part.stop - part.start)
        length = mask.shape[dimension]
        pieces = [
            mask.narrow(dimension, 0, self.first),
            mask.narrow(dimension, part.start, part.stop - part.start),
            mask.narrow(dimension, length - self.last, self.last),
        ]
        return torch.cat(pieces, dimension)

    def mask_for(self, mask: torch.Tensor | None, place: int) -> torch.Tensor | None:
        """Of a mask ``[B, H, Sq, Sk]`` of the whole sequence, own queries by a place's keys."""
        if mask is None:
            return None
        own = self.group.rank
        return self.rows(self.rows(mask, 2, own, True), 3, place, place == own)

    def source(self, step: int) -> int:
        """Whose part is here after so many moves."""
        return (self.group.rank - step) % self.group.size


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RingLayout,
    attend: AttendPart,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of own q ``[B, Sq, H, D]`` over all ranks' keys: out, and lse ``[B, H, Sq]``.

    k and v ``[B, Sq, Hkv, D]`` are this rank's, replicated tokens included; ``mask`` is that of the
    whole sequence. ``attend`` is called for each part.
    """
    return _Ring.apply(q, k, v, layout, attend, mask, is_causal, scale)  # type: ignore[no-any-return,no-untyped-call]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RingLayout,
        attend: AttendPart, mask: torch.Tensor | None, is_causal: bool, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out, lse = _forward(q, k, v, layout, attend, mask, is_causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (layout, mask, is_causal, scale)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            gradients = _backward(grad, *ctx.saved_tensors, *ctx.rest)
        return (*gradients, None, None, None, None, None)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RingLayout, attend: AttendPart,
    mask: torch.Tensor | None, is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    own = layout.group.rank
    travels = slice(layout.first, layout.first + layout.parts[own])
    block = torch.stack([k[:, travels], v[:, travels]])
    state: tuple[torch.Tensor, torch.Tensor] | None = None
    for step in range(layout.group.size):
        place = layout.source(step)
        rotation = None
        if step + 1 < layout.group.size:
            following = layout.parts[layout.source(step + 1)]
            shape = (*block.shape[:2], following, *block.shape[3:])
            rotation = Rotation(block, shape, layout.group)
        keys, values = (k, v) if step == 0 else block.unbind(0)
        hidden = is_causal and place > own  # all of it lies after these queries
        if q.shape[1] and keys.shape[1] and not hidden:
            part = layout.mask_for(mask, place)
            state = _merged(state, *attend(q, keys, values, part, is_causal and place == own))
        if rotation is not None:
            block = rotation.arrived()
    if state is None:
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q), lse
    return state[0].to(q.dtype), state[1]


def _merged(
    state: tuple[torch.Tensor, torch.Tensor] | None, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two results over different keys as one over both; out accumulates in at least float32."""
    accumulated = out.to(torch.promote_types(out.dtype, torch.float32))
    if state is None:
        return accumulated, lse
    # Both without keys: -inf - -inf is NaN, and zero keeps zeros.
    share = torch.sigmoid(lse - state[1]).nan_to_num_(0.0)
    weight = share.transpose(1, 2).unsqueeze(-1).to(accumulated.dtype)
    return torch.lerp(state[0], accumulated, weight), torch.logaddexp(state[1], lse)


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, layout: RingLayout, mask: torch.Tensor | None, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    own, size = layout.group.rank, layout.group.size
    compute = torch.promote_types(q.dtype, torch.float32)
    travels = slice(layout.first, layout.first + layout.parts[own])
    grad_q = torch.zeros_like(q, dtype=compute)
    grad_own = torch.zeros((2, *k.shape), dtype=compute, device=q.device)
    # Keys, values and their gradients travel together, and are at home again after `size` moves.
    block = torch.stack([k[:, travels], v[:, travels]]).to(compute)
    block = torch.cat([block, torch.zeros_like(block)])
    for step in range(size):
        place = layout.source(step)
        if not (is_causal and place > own) and q.numel():
            keys = torch.stack([k, v]).to(compute) if step == 0 else block[:2]
            if keys.shape[2]:
                part_q, part_keys = _part_gradient(
                    grad.to(compute), q.to(compute), keys, out.to(compute), lse,
                    layout.mask_for(mask, place), is_causal and place == own, scale,
                )  # fmt: skip
                grad_q += part_q
                if step == 0:
                    grad_own += part_keys
                else:
                    block[2:] += part_keys
        following = layout.parts[layout.source(step + 1)]
        block = Rotation(
            block, (*block.shape[:2], following, *block.shape[3:]), layout.group
        ).arrived()
    grad_own[:, :, travels] += block[2:]
    return grad_q.to(q.dtype), grad_own[0].to(k.dtype), grad_own[1].to(v.dtype)


def _part_gradient(
    grad: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    mask: torch.Tensor | None, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q ``[B, Sq, H, D]`` and of keys and values ``[2, B, Sk, Hkv, D]``."""
    heads, kv_heads, length = q.shape[2], keys.shape[3], keys.shape[2]
    k, v = keys.repeat_interleave(heads // kv_heads, 3).transpose(2, 3).unbind(0)
    grad, q, out = (each.transpose(1, 2) for each in (grad, q, out))
    lse = lse.to(q.dtype).masked_fill(lse == -torch.inf, torch.inf)  # no key: every share is zero
    rows_at_once = max(1, GRADIENT_SCORES // (length * q.shape[0] * heads))
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[2], rows_at_once):
        rows = slice(start, min(start + rows_at_once, q.shape[2]))
        scores = q[:, :, rows] @ k.transpose(-1, -2) * scale
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            if part.dtype is torch.bool:
                scores = scores.masked_fill(~part, -torch.inf)
            else:
                scores = scores + part
        if is_causal:
            queries = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(-1)
            after = torch.arange(length, device=q.device) > queries
            scores = scores.masked_fill(after, -torch.inf)
        share = torch.exp(scores - lse[:, :, rows, None])
        above = grad[:, :, rows]
        pull = (above @ v.transpose(-1, -2)) - (above * out[:, :, rows]).sum(-1, keepdim=True)
        pull = share * pull * scale
        grad_v += share.transpose(-1, -2) @ above
        grad_k += pull.transpose(-1, -2) @ q[:, :, rows]
        grad_q[:, :, rows] = pull @ k
    of_keys = torch.stack([grad_k, grad_v]).transpose(2, 3)
    of_keys = of_keys.reshape(*of_keys.shape[:3], kv_heads, heads // kv_heads, -1).sum(4)
    return grad_q.transpose(1, 2), of_keys
