"""Attention layers for a sequence that is spread over processes.

A layer is called on every rank with that rank's shard, and checks what it can before anything is
sent; what one rank refuses, the others refuse as well where they would otherwise wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from polyattn.context import ForwardContext, current_context, entered
from polyattn.contract import default_scale
from polyattn.dispatch import CallSite, Output, attend, decide
from polyattn.errors import BackendUnavailableError, InputError, ParallelError
from polyattn.inputs import view_mask
from polyattn.layers import LocalAttention
from polyattn.parallel.agreement import agree, environment_facts, exchange_headers, fingerprint
from polyattn.parallel.collectives import Layout, head_shares, to_heads, to_sequence
from polyattn.parallel.mesh import SequenceGroups, sequence_groups
from polyattn.parallel.ring import RingLayout, ring_attention
from polyattn.selection import asked_for, local_environment
from polyattn.settings import current_settings, forced

__all__ = ["USPAttention", "UlyssesAttention", "refuse_grid_methods"]

CONTEXT = "forward context"
MAXIMUM_AGREED = 1024  # kinds of calls that are remembered; then the ranks ask each other again

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class USPAttention(LocalAttention):
    """Attention over shards ``[B, S_local, H, D]`` of a sequence: Ulysses, ring, or both.

    ``mesh`` has the dimensions ``"ring"`` and ``"ulysses"`` (:func:`~polyattn.parallel.
    sequence_mesh`); None is the default process group, all of it Ulysses; 1 x 1 is
    :class:`~polyattn.LocalAttention`, without any communication. The other arguments are those of
    :class:`~polyattn.LocalAttention`.

    Within a Ulysses group every rank computes some heads over the whole sequence. Around a ring,
    keys and values travel and queries stay, which takes a backend that returns a log-sum-exp; a
    method on a video's token grid needs the whole sequence and is refused there. The grid and the
    text of a forward context are those of the whole video.

    Not for ``torch.compile(fullgraph=True)`` with more than one process: the graph breaks here.
    """

    _ring = True

    def __init__(
        self,
        backend: str | None = None,
        *,
        mesh: Any = None,
        config: Any = None,
        role: str = "self",
        layer: int | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        required_backend: str | None = None,
    ) -> None:
        super().__init__(
            backend, config=config, role=role, layer=layer, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, required_backend=required_backend,
        )  # fmt: skip
        self._mesh = mesh
        self._groups: SequenceGroups | None = None
        self._world: Any = None
        self._agreed: dict[Any, set[tuple[int, ...]]] = {}  # lengths, by kind of call
        self._together = self._in_parallel
        self.groups  # noqa: B018 - says at once what is wrong with the mesh

    @classmethod
    def at(cls, site: CallSite, *, mesh: Any, is_causal: bool, scale: float | None) -> Any:
        """The layer of a call site that exists already, as the bridges have them."""
        layer = cls(mesh=mesh, is_causal=is_causal, scale=scale, role="", enable_gqa=True)
        layer._site, layer._site_text = site, site.text
        return layer

    def extra_repr(self) -> str:
        groups = self.groups
        degrees = f"ulysses_degree={groups.ulysses.size}, ring_degree={groups.ring.size}"
        return f"{super().extra_repr()}, {degrees}"

    @property
    def groups(self) -> SequenceGroups:
        """The processes that share the sequence; looked up when first needed."""
        found = self._groups
        if found is None or (self._mesh is None and self._world is not _world()):
            found = self._look_up()
        return found

    def _look_up(self) -> SequenceGroups:
        self._world, self._agreed = _world(), {}
        self._groups = sequence_groups(self._mesh, ring=self._ring)
        if self._groups.size > 1:
            self._together = torch.compiler.disable(self._in_parallel)  # type: ignore[no-untyped-call]
        return self._groups

    def __getstate__(self) -> dict[str, Any]:
        """For copies: groups belong to a process, and are looked up again."""
        state: dict[str, Any] = {**self.__dict__, "_groups": None, "_world": None}
        del state["_together"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._together = self._in_parallel

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attn_mask: torch.Tensor | None = None,
        return_lse: bool = False,
        extras: Mapping[str, torch.Tensor] | None = None,
        prefix: Tensors | None = None,
        suffix: Tensors | None = None,
        keys_replicated: bool = False,
    ) -> Any:
        """Attention of this rank's shard of queries over the whole sequence.

        ``q`` is ``[B, S_local, H, D]``, k and v ``[B, S_local, Hkv, D]``; shards may differ in
        length, and lie in the order of ``groups.index``. ``attn_mask`` is the mask of the whole
        sequence, the same on every rank. ``extras`` are shards like q.

        ``prefix`` or ``suffix`` are q, k and v ``[B, L, H, D]`` of tokens that every rank holds in
        full (text), before or after the sequence; their result is the same on every rank.
        ``keys_replicated`` says that k and v are whole on every rank, as in cross-attention:
        nothing is sent then, and the rows of ``attn_mask`` are this rank's own.

        Returns out ``[B, S_local, H, D]``, with ``return_lse`` (out, lse ``[B, H, S_local]``); with
        replicated tokens that and the same of the tokens, as a pair. Gradients of replicated tokens
        are each rank's share; their sum is the gradient.

        Raises:
            InputError: for shards or arguments that do not fit.
            ParallelError: where ranks disagree, or another rank failed.
            BackendUnavailableError: for a backend that cannot serve this, as everywhere.
        """
        groups = self.groups
        replicated = prefix is not None or suffix is not None
        if groups.size > 1 and not keys_replicated:
            return self._together(q, k, v, attn_mask, return_lse, extras, prefix, suffix)
        if keys_replicated and replicated:
            raise InputError("keys_replicated goes with neither prefix nor suffix")
        if keys_replicated and self.is_causal:
            raise InputError("causal attention over replicated keys is not defined for a shard")
        if replicated:
            return self._joined_here(q, k, v, attn_mask, return_lse, extras, prefix, suffix)
        if keys_replicated and q.shape[1] == 0:
            return _empty(q, return_lse)
        return super().forward(q, k, v, attn_mask=attn_mask, return_lse=return_lse, extras=extras)

    # --- one process ------------------------------------------------------------------------------

    def _joined_here(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        return_lse: bool, extras: Mapping[str, torch.Tensor] | None, prefix: Tensors | None,
        suffix: Tensors | None,
    ) -> Any:  # fmt: skip
        _check_replicated(q, k, v, prefix, suffix, self.is_causal, extras)
        own = [(q, k, v)]
        whole = [torch.cat(each, 1) for each in zip(*filter(None, (prefix, *own, suffix)),
                                                    strict=True)]  # fmt: skip
        result = super().forward(*whole, attn_mask=mask, return_lse=return_lse)
        first = prefix[0].shape[1] if prefix is not None else 0
        return _apart(result, first, q.shape[1], return_lse)

    # --- several processes ------------------------------------------------------------------------

    def _checked(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        return_lse: bool, extras: Mapping[str, torch.Tensor] | None, prefix: Tensors | None,
        suffix: Tensors | None,
    ) -> _Call:  # fmt: skip
        """The call, after the ranks have told each other that nothing is wrong with it.

        Every call exchanges a few numbers between CPUs, beside whatever the GPUs are at. What is
        decided by them is decided alike on every rank.
        """
        groups = self.groups
        kind: dict[str, str] = {}
        error: Exception | None = None
        try:
            _check_shard(q, k, v, extras)
            _check_groups(q, k, self.enable_gqa)
            _check_replicated(q, k, v, prefix, suffix, self.is_causal, extras)
            kind = self._kind(q, k, v, mask, return_lse, extras, prefix, suffix)
        except Exception as problem:
            error = problem
        # What runs hangs on these; steps and branches come and go with the same decision.
        context = current_context() or ForwardContext()
        known = (
            *(kind[name] for name in kind if name != CONTEXT),
            context.role, context.grid, context.text, context.first_head,
            repr((current_settings(), forced())),
        )  # fmt: skip
        agreed = self._agreed.get(known)
        header = [0, 0, 0, 0]
        if error is None:
            header = [1, q.shape[1], fingerprint(kind), agreed is not None]
        rows = exchange_headers(groups, header)
        if error is not None:
            raise error
        if failed := [index for index, row in enumerate(rows) if not row[0]]:
            raise ParallelError(
                f"shard {failed[0]} of {groups.size} was refused by its rank, so this one (shard "
                f"{groups.index}) stops as well",
                hint="the reason is in the error of that rank",
            )
        if any(row[2] != header[2] for row in rows):
            agree(groups, lambda: kind)  # says what differs
        lengths = tuple(row[1] for row in rows)
        if not sum(lengths):
            raise InputError("all shards of the sequence are empty")
        named = dict(sorted((extras or {}).items()))
        call = _Call(self, q, k, v, mask, return_lse, named, prefix, suffix, lengths)
        call.check_mask()
        if agreed is None or not all(row[3] for row in rows):
            if len(self._agreed) >= MAXIMUM_AGREED:
                self._agreed.clear()
            agreed = set()  # on all ranks, so that they know the same lengths from here on
        if lengths not in agreed:
            agree(groups, call.decision)
            if len(agreed) >= MAXIMUM_AGREED:
                agreed.clear()
            agreed.add(lengths)
            self._agreed[known] = agreed
        return call

    def _kind(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        return_lse: bool, extras: Mapping[str, torch.Tensor] | None, prefix: Tensors | None,
        suffix: Tensors | None,
    ) -> dict[str, str]:  # fmt: skip
        """What of a call has to be equal on all ranks, by name."""
        context = current_context() or ForwardContext()
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise InputError(f"attn_mask is a tensor or None, found {type(mask).__name__}")
        grad = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
        values = {
            "batch, heads, key heads and head dimension": (q.shape[0], q.shape[2], k.shape[2],
                                                           q.shape[3]),
            "dtype": q.dtype,
            "kind of device": q.device.type,
            "layer": (self._site_text, self.is_causal, self.scale, self.enable_gqa),
            "return_lse": return_lse,
            "attn_mask": None if mask is None else (tuple(mask.shape), mask.dtype),
            "replicated tokens": [
                None if each is None else each[0].shape[1] for each in (prefix, suffix)
            ],
            "extras": sorted(extras or ()),
            CONTEXT: replace(context, run_state={}),
            "whether a gradient is needed": grad,
        }  # fmt: skip
        return {name: repr(value) for name, value in values.items()}

    def _in_parallel(self, *arguments: Any) -> Any:
        call = self._checked(*arguments)
        # As everywhere, attention computes in the dtype of its tensors.
        with torch.autocast(call.q.device.type, enabled=False):
            return self._attended(call)

    def _attended(self, call: _Call) -> Any:
        q, k, v, *more = call.whole()
        context = call.context()
        groups = self.groups
        with entered(context) if context is not None else contextlib.nullcontext():
            if groups.ring.size > 1:
                result: Any = self._around(call, q, k, v)
            elif not q.shape[2]:  # fewer heads than ranks, and none is left for this one
                result = (q, q.new_empty((q.shape[0], 0, q.shape[1]), dtype=torch.float32))
            else:
                extras = dict(zip(call.extras, more, strict=True))
                result = attend(
                    self._site, q, k, v, call.own_mask(), self.is_causal, self.scale,
                    q.shape[2] != k.shape[2], call.return_lse, extras,
                )  # fmt: skip
        out, lse = result if isinstance(result, tuple) else (result, None)
        return call.apart(out, lse if call.return_lse else None)

    def _around(self, call: _Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        def attend_part(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
            is_causal: bool,
        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            result = attend(
                self._site, q, k, v, mask, is_causal, self.scale, q.shape[2] != k.shape[2], True
            )
            assert isinstance(result, tuple)
            return result

        scale = self.scale if self.scale is not None else default_scale(q.shape[3])
        return ring_attention(
            q, k, v, call.ring, attend_part if q.shape[2] else _nothing, mask=call.own_mask(),
            is_causal=self.is_causal, scale=scale,
        )  # fmt: skip


class UlyssesAttention(USPAttention):
    """Attention over shards of a sequence by exchanging sequence for heads.

    ``mesh`` is a process group, a device mesh of one dimension, or None for the default group. See
    :class:`USPAttention` for everything else.
    """

    _ring = False


@dataclass(frozen=True)
class _Call:
    """One checked call: this rank's tensors, and how the sequence is shared out."""

    layer: USPAttention
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    return_lse: bool
    extras: dict[str, torch.Tensor]
    prefix: Tensors | None
    suffix: Tensors | None
    lengths: tuple[int, ...]

    @property
    def first(self) -> int:
        return 0 if self.prefix is None else self.prefix[0].shape[1]

    @property
    def last(self) -> int:
        return 0 if self.suffix is None else self.suffix[0].shape[1]

    @property
    def layout(self) -> Layout:
        """Of q, k, v and the extra tensors within the Ulysses group."""
        groups = self.layer.groups
        queries, keys = head_shares(self.q.shape[2], self.k.shape[2], groups.ulysses.size)
        shares = (queries, keys, keys, *([queries] * len(self.extras)))
        return Layout(groups.ulysses, groups.own(self.lengths), shares)

    @property
    def ring(self) -> RingLayout:
        groups = self.layer.groups
        return RingLayout(groups.ring, groups.parts(self.lengths), self.first, self.last)

    def whole(self) -> tuple[torch.Tensor, ...]:
        """This rank's heads of q, k, v and extras over its Ulysses group's part, tokens joined."""
        tensors = (self.q, self.k, self.v, *self.extras.values())
        if self.layer.groups.ulysses.size > 1:
            return to_heads(tensors, self.layout, before=self.prefix or (), after=self.suffix or ())
        if self.prefix is None and self.suffix is None:
            return tensors
        joined = zip(*filter(None, (self.prefix, tensors, self.suffix)), strict=True)
        return tuple(torch.cat(each, 1) for each in joined)

    def apart(self, out: torch.Tensor, lse: torch.Tensor | None) -> Any:
        """What goes back to the shards, and what belongs to the replicated tokens."""
        results = [out] if lse is None else [out, lse.transpose(1, 2).unsqueeze(-1)]
        layout, first = self.layout.of(0), self.first
        stop = first + layout.length
        spread = layout.group.size > 1
        own, tokens = [], []
        for each in results:
            part = each[:, first:stop]
            own.append(to_sequence([part], layout)[0] if spread else part)
            if self.prefix is not None or self.suffix is not None:
                rows = torch.cat([each[:, :first], each[:, stop:]], 1)
                if spread:  # to every rank the same rows
                    size = layout.group.size
                    everyone = replace(layout, lengths=(rows.shape[1],) * size)
                    rows = to_sequence([torch.cat([rows] * size, 1)], everyone)[0]
                tokens.append(rows)
        if not tokens:
            return _result(own)
        return _result(own), _result(tokens)

    def check_mask(self) -> None:
        """The mask is that of the whole sequence."""
        if self.mask is None:
            return
        length = self.first + sum(self.lengths) + self.last
        shape = tuple(self.mask.shape)
        full = (self.q.shape[0], self.q.shape[2], length, length)
        padding = shape == (full[0], length) and self.mask.dtype is torch.bool
        fits = 0 < len(shape) <= 4 and all(
            side in (1, wanted) for side, wanted in zip(shape[::-1], full[::-1], strict=False)
        )
        if not (padding or fits):
            raise InputError(
                f"attn_mask is that of the whole sequence and broadcasts to [B, H, S, S] = "
                f"{list(full)}, found {list(shape)}"
            )
        if self.mask.requires_grad and self.layer.groups.ring.size > 1:
            raise InputError(
                "around a ring an attn_mask gets no gradient", hint="attn_mask.detach()"
            )

    def own_mask(self) -> torch.Tensor | None:
        """The mask as four dimensions, for this rank's heads."""
        if self.mask is None:
            return None
        batch, length = self.q.shape[0], self.first + sum(self.lengths) + self.last
        like = self.q.new_empty(1).expand(batch, length, self.q.shape[2], self.q.shape[3])
        mask = view_mask(self.mask, like, like)
        heads = self.layout.heads[0][self.layout.group.rank]
        if mask.shape[1] == 1 or not heads:
            return mask
        return mask[:, heads[0] : heads[0] + len(heads)]

    def context(self) -> ForwardContext | None:
        """The forward context, with the place of this rank's heads."""
        context = current_context()
        if context is None:
            return None
        groups = self.layer.groups
        if groups.ring.size > 1:
            # A part of the sequence has no grid: who needs one has been refused.
            context = replace(context, grid=None, text=None)
        if groups.ulysses.size == 1:
            return context
        heads = self.layout.heads[0][groups.ulysses.rank]
        return replace(context, first_head=(context.first_head or 0) + (heads[0] if heads else 0))

    def decision(self) -> dict[str, str]:
        """What this rank would run, in words that are equal where it is the same."""
        layer, groups = self.layer, self.layer.groups
        if layer.is_causal and (self.first or self.last):
            raise InputError("causal attention takes no replicated tokens: their place is unclear")
        if groups.ring.size > 1:
            context = current_context()
            role = layer._site.role or (context.role if context is not None else "self")
            refuse_grid_methods(layer._site, role)
            if self.extras:
                raise InputError(f"around a ring no extra tensors travel; found {[*self.extras]}")
        layout = self.layout
        # A rank without heads decides as the first one does.
        rank = layout.group.rank if layout.heads[0][layout.group.rank] else 0
        queries, keys = (len(layout.heads[i][rank]) for i in (0, 1))
        length = max(1, self.first + layout.length + self.last)
        # The ring has a gradient of its own.
        grad = torch.is_grad_enabled() and self.q.requires_grad and groups.ring.size == 1

        def like(x: torch.Tensor, heads: int) -> torch.Tensor:
            whole = x.new_empty(1).requires_grad_(grad)
            return whole.expand(x.shape[0], length, heads, x.shape[3])

        mask = self.own_mask()
        if mask is not None:  # one of its kind
            sizes = [n if side > 1 else 1 for n, side in
                     zip((queries, length, length), mask.shape[1:], strict=True)]  # fmt: skip
            mask = mask[:, :1, :1, :1].expand(-1, *sizes[:2], length)
        context = self.context()
        with entered(replace(context, first_head=0)) if context else contextlib.nullcontext():
            found = decide(
                layer._site, like(self.q, queries), like(self.k, keys), like(self.v, keys), mask,
                layer.is_causal, layer.scale, queries != keys,
                self.return_lse or groups.ring.size > 1,
                {name: like(self.q, queries) for name in self.extras} or None,
            )  # fmt: skip
        parts = [found] if found.dense is None else [found, found.dense]
        return {
            "backend": " and ".join(each.chosen for each in parts),
            "parameters": " and ".join(repr(sorted(each.parameters.items())) for each in parts),
            **environment_facts(local_environment(str(self.q.device))),
        }


def _world() -> Any:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def refuse_grid_methods(site: CallSite, role: str) -> None:
    """Raise for a method on a video's token grid, where a ring shows a rank a part at a time."""
    spec = asked_for(site.backend or site.required_backend, role, site.scope)
    if spec is not None and spec.capabilities.needs_grid and role == "self":
        raise BackendUnavailableError(
            f"{spec.name} picks keys on the whole token grid, and around a ring a process sees a "
            "part of it at a time",
            hint="all processes as Ulysses: polyattn.UlyssesAttention(), or --ring-degree 1",
        )


def _check_shard(q: Any, k: Any, v: Any, extras: Mapping[str, torch.Tensor] | None) -> None:
    """What has to hold on each rank alone; an empty shard is fine."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor)
            raise InputError(f"{name} is a shard [B, S_local, H, D] of a tensor, found {found}")
    if not (q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape == v.shape):
        raise InputError(
            f"q, k and v of a shard have the same tokens: q {list(q.shape)}, k {list(k.shape)}, "
            f"v {list(v.shape)}",
            hint="keys_replicated=True, where k and v are whole on every rank (cross-attention)",
        )
    if q.shape[2] % max(1, k.shape[2]) or not k.shape[2] or q.shape[3] != k.shape[3]:
        raise InputError(f"the heads of q and k do not fit: q {list(q.shape)}, k {list(k.shape)}")
    if not (q.dtype is k.dtype is v.dtype and q.device == k.device == v.device):
        raise InputError(
            f"q, k and v share dtype and device, found {q.dtype} on {q.device}, {k.dtype} on "
            f"{k.device}, {v.dtype} on {v.device}"
        )
    for name, tensor in (extras or {}).items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != q.shape:
            found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor)
            raise InputError(
                f"extras[{name!r}] is a shard like q, {list(q.shape)}, to travel with it; found "
                f"{found}"
            )


def _check_groups(q: torch.Tensor, k: torch.Tensor, enable_gqa: bool) -> None:
    if q.shape[2] != k.shape[2] and not enable_gqa:
        raise InputError(
            f"{q.shape[2]} query heads share {k.shape[2]} key heads, and grouped-query attention "
            "was not asked for",
            hint="enable_gqa=True",
        )


def _check_replicated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: Tensors | None,
    suffix: Tensors | None, is_causal: bool, extras: Mapping[str, torch.Tensor] | None,
) -> None:  # fmt: skip
    for name, tokens in (("prefix", prefix), ("suffix", suffix)):
        if tokens is None:
            continue
        if not isinstance(tokens, (tuple, list)) or len(tokens) != 3:
            raise InputError(f"{name} is the tokens' q, k and v, found {type(tokens).__name__}")
        for own, shard in zip(tokens, (q, k, v), strict=True):
            fits = isinstance(own, torch.Tensor) and own.dim() == 4
            if not fits or (own.shape[0], *own.shape[2:]) != (shard.shape[0], *shard.shape[2:]):
                found = list(own.shape) if isinstance(own, torch.Tensor) else type(own)
                raise InputError(
                    f"{name} has the batch, heads and head dimension of the shards, "
                    f"{list(shard.shape)}; found {found}"
                )
            if own.dtype is not shard.dtype or own.device != shard.device:
                raise InputError(
                    f"{name} shares dtype and device with the shards, {shard.dtype} on "
                    f"{shard.device}; found {own.dtype} on {own.device}"
                )
        if len({each.shape[1] for each in tokens}) > 1:
            raise InputError(f"q, k and v of {name} have the same tokens")
        if extras:
            raise InputError(f"{name} goes with no extra tensors: the tokens have none")
        if is_causal:
            raise InputError("causal attention takes no replicated tokens: their place is unclear")


def _nothing(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q, q.new_empty((q.shape[0], 0, q.shape[1]), dtype=torch.float32)


def _empty(q: torch.Tensor, return_lse: bool) -> Output:
    out = torch.empty_like(q)
    return (out, _nothing(q)[1].new_empty((q.shape[0], q.shape[2], 0))) if return_lse else out


def _apart(result: Output, first: int, length: int, return_lse: bool) -> Any:
    out, lse = result if isinstance(result, tuple) else (result, None)
    results = [out] if lse is None or not return_lse else [out, lse.transpose(1, 2).unsqueeze(-1)]
    stop = first + length
    own = [each[:, first:stop] for each in results]
    tokens = [torch.cat([each[:, :first], each[:, stop:]], 1) for each in results]
    return _result(own), _result(tokens)


def _result(parts: list[torch.Tensor]) -> Output:
    """out, or (out, lse [B, H, S]) of what travelled as [B, S, H, 1]."""
    if len(parts) == 1:
        return parts[0]
    return parts[0], parts[1].squeeze(-1).transpose(1, 2)
