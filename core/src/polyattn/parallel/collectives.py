"""The moves of attention between processes, each in one collective, differentiable where needed.

:func:`to_heads` turns shards of the sequence with all heads into the whole sequence with some
heads, for several tensors at once; :func:`to_sequence` is its inverse, and each is the other's
gradient. Nothing is padded: sequence lengths and head counts may differ from rank to rank. What is
received lies in memory as ``[S, B, H, D]`` and is handed out as a view ``[B, S, H, D]``, so that
neither joining shards nor joining replicated tokens costs a copy. :class:`Rotation` sends keys and
values around a ring while something else is computed.

A process that fails makes these raise :class:`~polyattn.errors.ParallelError` where its death is
noticed (gloo), or has ``torch.distributed`` end this process too (NCCL).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from polyattn.errors import ParallelError
from polyattn.parallel.mesh import Group

__all__ = ["Heads", "Layout", "Rotation", "head_shares", "to_heads", "to_sequence", "watched"]

HEAD_START = 60_000  # clock cycles, some 35 us; measured in bench/results/ring_overlap.md

Heads = tuple[int, ...]  # numbers of heads, in order; a head may be there several times


@contextlib.contextmanager
def watched(what: str, group: Group) -> Iterator[None]:
    """Say who was doing what when a collective failed: the cause is mostly another rank's."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise ParallelError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: {what} among {group.size} "
            f"processes failed: {str(error).splitlines()[0]}",
            hint="the first error is that of the rank that stopped: look for it above",
        ) from error


@dataclass(frozen=True)
class Layout:
    """Who has what: tokens of each rank's shard, and which heads of each tensor it works on.

    ``heads[i][r]`` are the heads of tensor ``i`` that rank ``r`` gets.
    """

    group: Group
    lengths: tuple[int, ...]
    heads: tuple[tuple[Heads, ...], ...]

    @property
    def length(self) -> int:
        return sum(self.lengths)

    def count(self, rank: int) -> int:
        """Heads of all tensors together that a rank gets."""
        return sum(len(shares[rank]) for shares in self.heads)

    def of(self, tensor: int) -> Layout:
        """The layout of one of the tensors."""
        return Layout(self.group, self.lengths, (self.heads[tensor],))


def head_shares(
    heads: int, kv_heads: int, ranks: int
) -> tuple[tuple[Heads, ...], tuple[Heads, ...]]:
    """Which query heads and which key heads each rank works on.

    Ranks get neighbouring heads, and the first ranks one more where it does not come out even; with
    fewer heads than ranks the last ones get none. Key heads go with the query heads that use them:
    whole groups where there are enough, and otherwise a key head goes to every rank that needs it,
    repeated where the query heads of a rank would not share evenly.
    """
    group = heads // kv_heads
    per_share = group if kv_heads >= ranks else 1
    base, more = divmod(heads // per_share, ranks)
    queries, keys, start = [], [], 0
    for rank in range(ranks):
        stop = start + (base + (rank < more)) * per_share
        own = tuple(range(start, stop))
        used = tuple(dict.fromkeys(head // group for head in own))
        if len(used) > 1 and len(used) * group != len(own):
            used = tuple(head // group for head in own)
        queries.append(own)
        keys.append(used)
        start = stop
    return tuple(queries), tuple(keys)


def to_heads(
    tensors: Sequence[torch.Tensor],
    layout: Layout,
    *,
    before: Sequence[torch.Tensor] = (),
    after: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:
    """Shards ``[B, S_local, H, D]`` to whole sequences ``[B, S, heads of this rank, D]``.

    ``before`` and ``after`` are replicated tokens ``[B, L, H, D]``, one tensor for each of
    ``tensors``: they are joined to the sequence here and not sent.
    """
    return _ToHeads.apply(layout, len(before) > 0, len(after) > 0, *tensors, *before, *after)  # type: ignore[no-any-return,no-untyped-call]


def to_sequence(tensors: Sequence[torch.Tensor], layout: Layout) -> tuple[torch.Tensor, ...]:
    """The inverse: ``[B, S, heads of this rank, D]`` to shards ``[B, S_local, H, D]``.

    Heads that several ranks had are added up.
    """
    return _ToSequence.apply(layout, *tensors)  # type: ignore[no-any-return,no-untyped-call]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, before: bool, after: bool, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(layout.heads)
        shards, rest = tensors[:count], tensors[count:]
        first, last = rest[: count * before], rest[count * before :]
        ctx.layout = layout
        ctx.rows = (first[0].shape[1] if before else 0, last[0].shape[1] if after else 0)
        ctx.all_heads = [each.shape[2] for each in shards]
        return _to_heads(shards, layout, first, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        layout, (first, last) = ctx.layout, ctx.rows
        stop = first + layout.length
        shards = _to_sequence([each[:, first:stop] for each in gradients], layout, ctx.all_heads)
        rank = layout.group.rank
        joined = [
            _spread(each[:, rows], shares[rank], heads)
            for rows, wanted in ((slice(0, first), first), (slice(stop, None), last))
            if wanted
            for each, shares, heads in zip(gradients, layout.heads, ctx.all_heads, strict=True)
        ]
        return (None, None, None, *shards, *joined)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        return tuple(_to_sequence(tensors, layout, [1 + max(map(max, filter(None, shares)))
                                                    for shares in layout.heads]))  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return (None, *_to_heads(gradients, ctx.layout))


def _to_heads(
    shards: Sequence[torch.Tensor],
    layout: Layout,
    before: Sequence[torch.Tensor] = (),
    after: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:
    group, lengths, like = layout.group, layout.lengths, shards[0]
    batch, own_length, _, width = like.shape
    sent = [own_length * batch * layout.count(rank) * width for rank in range(group.size)]
    outgoing = like.new_empty(sum(sent))
    for rank, piece in enumerate(torch.split(outgoing, sent)):
        into = piece.view(own_length, batch, layout.count(rank), width)
        _put(into, [_taken(x, layout.heads[i][rank]) for i, x in enumerate(shards)])
    count = layout.count(group.rank)
    first = before[0].shape[1] if before else 0
    last = after[0].shape[1] if after else 0
    joined = like.new_empty((first + layout.length + last, batch, count, width))
    for replicated, rows in ((before, joined[:first]), (after, joined[first + layout.length :])):
        if replicated:
            _put(rows, [_taken(x, layout.heads[i][group.rank]) for i, x in enumerate(replicated)])
    received = [length * batch * count * width for length in lengths]
    incoming = joined[first : first + layout.length].view(-1)
    _all_to_all(incoming, outgoing, received, sent, group)
    parts = torch.split(joined, [len(shares[group.rank]) for shares in layout.heads], dim=2)
    return tuple(part.transpose(0, 1) for part in parts)


def _to_sequence(
    tensors: Sequence[torch.Tensor], layout: Layout, all_heads: Sequence[int]
) -> list[torch.Tensor]:
    group, lengths, like = layout.group, layout.lengths, tensors[0]
    batch, _, _, width = like.shape
    own_length, count = lengths[group.rank], layout.count(group.rank)
    sent = [length * batch * count * width for length in lengths]
    if len(tensors) == 1 and tensors[0].transpose(0, 1).is_contiguous():
        outgoing = tensors[0].transpose(0, 1).reshape(-1)  # as a kernel left it: nothing to do
    else:
        outgoing = like.new_empty(sum(sent))
        _put(outgoing.view(layout.length, batch, count, width), tensors)
    received = [own_length * batch * layout.count(rank) * width for rank in range(group.size)]
    incoming = like.new_empty(sum(received))
    _all_to_all(incoming, outgoing, received, sent, group)
    pieces = [
        torch.split(
            piece.view(own_length, batch, layout.count(rank), width).transpose(0, 1),
            [len(shares[rank]) for shares in layout.heads],
            dim=2,
        )
        for rank, piece in enumerate(torch.split(incoming, received))
    ]
    results = []
    for i, heads in enumerate(all_heads):
        shares = layout.heads[i]
        if [head for share in shares for head in share] == list(range(heads)):
            results.append(torch.cat([piece[i] for piece in pieces], dim=2))
        else:
            result = like.new_zeros((batch, own_length, heads, width))
            for share, piece in zip(shares, pieces, strict=True):
                result.index_add_(2, _index(share, like), piece[i])
            results.append(result)
    return results


def _taken(x: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Some heads of ``[B, S, H, D]``; a view where they are neighbours."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))) if heads else True:
        start = heads[0] if heads else 0
        return x[:, :, start : start + len(heads)]
    return x.index_select(2, _index(heads, x))


def _spread(x: torch.Tensor, share: Heads, heads: int) -> torch.Tensor:
    """The gradient of :func:`_taken`."""
    result = x.new_zeros((*x.shape[:2], heads, x.shape[3]))
    return result.index_add_(2, _index(share, x), x)


def _index(heads: Heads, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(heads, dtype=torch.long, device=like.device)


def _put(into: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Tensors ``[B, S, H, D]`` beside each other into ``[S, B, all their heads, D]``."""
    for part, x in zip(
        torch.split(into, [x.shape[2] for x in tensors], dim=2), tensors, strict=True
    ):
        part.copy_(x.transpose(0, 1))


def _all_to_all(
    incoming: torch.Tensor,
    outgoing: torch.Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    group: Group,
) -> None:
    """One all-to-all of elements. Sent as bytes: every dtype travels, whatever the transport."""
    size = outgoing.element_size()
    with watched("an all-to-all", group):
        dist.all_to_all_single(
            incoming.view(torch.uint8),
            outgoing.view(torch.uint8),
            [each * size for each in received],
            [each * size for each in sent],
            group=group.group,
        )


class Rotation:
    """Contiguous blocks that travel around a ring, each rank's to the next one.

    Between the creation and :meth:`arrived`, what came before is still there to be computed on.
    """

    def __init__(self, block: torch.Tensor, shape: Sequence[int], group: Group) -> None:
        """Start sending ``block`` to the next rank, and receiving one of ``shape``."""
        self._group = group
        self._sent = block  # kept until it is sent
        self._received = block.new_empty(tuple(shape))
        following, previous = (
            dist.get_global_rank(group.group, (group.rank + step) % group.size)
            for step in (1, group.size - 1)
        )
        moves = [
            dist.P2POp(move, each.view(-1).view(torch.uint8), peer, group.group)
            for move, each, peer in (
                (dist.isend, block, following), (dist.irecv, self._received, previous),
            )
            if each.numel()
        ]  # fmt: skip
        with watched("passing keys and values on", group):
            self._works = dist.batch_isend_irecv(moves) if moves else []
        if block.is_cuda:
            # The move's kernel needs a few multiprocessors. An attention kernel that takes them all
            # first keeps it waiting until its own end, and nothing overlaps.
            torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]

    def arrived(self) -> torch.Tensor:
        with watched("passing keys and values on", self._group):
            for work in self._works:
                work.wait()
        return self._received
