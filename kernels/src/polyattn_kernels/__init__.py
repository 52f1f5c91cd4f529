"""Block-sparse attention, and the tools that pick its blocks.

A :class:`BlockSparsePlan` says which key blocks each query block attends to;
:func:`block_sparse_attention` attends by it, with whichever of several kernels serves the call.
"""

from __future__ import annotations

from polyattn_kernels.attention import ProviderChoice, block_sparse_attention, which_provider
from polyattn_kernels.clustering import (
    KMeans,
    TokenGroups,
    assign_to_centroids,
    group_by_label,
    kmeans,
    plan_from_groups,
    random_centroids,
)
from polyattn_kernels.errors import AttentionInputError, PlanError, ProviderError
from polyattn_kernels.merge import merge_attention_states
from polyattn_kernels.permutation import (
    gather_tokens,
    inverse_permutation,
    inverse_permute_tokens,
    permute_tokens,
)
from polyattn_kernels.plan import BlockGeometry, BlockSparsePlan
from polyattn_kernels.pooling import pool_blocks
from polyattn_kernels.selection import (
    BlockSelection,
    select_threshold,
    select_top_k,
    select_top_p,
)
from polyattn_kernels.tiling import Tiling

__all__ = [
    "AttentionInputError",
    "BlockGeometry",
    "BlockSelection",
    "BlockSparsePlan",
    "KMeans",
    "PlanError",
    "ProviderChoice",
    "ProviderError",
    "Tiling",
    "TokenGroups",
    "assign_to_centroids",
    "block_sparse_attention",
    "gather_tokens",
    "group_by_label",
    "inverse_permutation",
    "inverse_permute_tokens",
    "kmeans",
    "merge_attention_states",
    "permute_tokens",
    "plan_from_groups",
    "pool_blocks",
    "random_centroids",
    "select_threshold",
    "select_top_k",
    "select_top_p",
    "which_provider",
]
