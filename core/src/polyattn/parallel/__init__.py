"""Attention over a sequence that is spread over several processes, on ``torch.distributed``.

Started with ``torchrun``, every process (rank) holds a shard ``[B, S/n, H, D]`` of the sequence and
calls the same layer; what comes back is its shard of the result::

    torch.distributed.init_process_group()
    attend = polyattn.UlyssesAttention()
    out = attend(q, k, v)

:class:`UlyssesAttention` exchanges sequence for heads, so that every backend sees the whole
sequence (DeepSpeed Ulysses, arXiv 2309.14509). :class:`USPAttention` adds a ring on which keys and
values travel (Ring Attention, arXiv 2310.01889; both together: USP, arXiv 2405.07719), for backends
that return a log-sum-exp. With one process both are the local layer, without any communication.
"""

from __future__ import annotations

from polyattn.parallel.layers import UlyssesAttention, USPAttention
from polyattn.parallel.mesh import sequence_mesh, shard_lengths

__all__ = ["USPAttention", "UlyssesAttention", "sequence_mesh", "shard_lengths"]
