"""What a sparse method does around its attention: tiling, pooling, selection, clustering, plans.

Each tool of polyattn_kernels at the shapes of video models, in milliseconds of the GPU and, where
memory is the limit, in TB/s of the bytes that it must read and write once. ``flash-kmeans`` is
measured beside our k-means where it is installed.

    python bench/kernel_tools.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, gpu_milliseconds, save, table

from polyattn_kernels.clustering import (
    assign_to_centroids,
    group_by_label,
    kmeans,
    plan_from_groups,
    random_centroids,
)
from polyattn_kernels.merge import merge_attention_states
from polyattn_kernels.permutation import inverse_permute_tokens, permute_tokens
from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.pooling import pool_blocks
from polyattn_kernels.selection import select_top_k, select_top_p
from polyattn_kernels.tiling import tiling

DEVICE = "cuda"
GRIDS = ((21, 45, 80), (18, 48, 80))
HEADS = (8, 24)
CLUSTERS = (300, 1000)  # of queries, of keys


def cases(grid: tuple[int, int, int], heads: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Functions by name, with the bytes each must move (0: not limited by memory)."""
    tokens = grid[0] * grid[1] * grid[2]
    x = torch.randn(1, tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16)
    size = float(x.numel() * 2)
    found: dict[str, tuple[Callable[[], Any], float]] = {}
    for tile in ((4, 4, 4), (6, 8, 8)):
        cut = tiling(grid, tile, device=DEVICE)
        padded = cut.pad(x)
        rows = padded.numel() * 2.0
        name = "x".join(map(str, tile))
        found[f"tile {name}: to padded blocks"] = (partial(cut.pad, x), size + rows)
        found[f"tile {name}: back"] = (partial(cut.unpad, padded), size * 2)
        found[f"tile {name}: means of blocks"] = (
            partial(pool_blocks, padded, block=cut.block, lengths=cut.lengths),
            rows,
        )
    cut = tiling(grid, (4, 4, 4), device=DEVICE)
    blocks = cut.num_blocks
    scores = torch.randn(1, heads, blocks, blocks, device=DEVICE)
    number = max(1, round(0.1 * blocks))
    found[f"top-k, {number} of {blocks} blocks"] = (
        partial(select_top_k, scores, number),
        scores.numel() * 4.0,
    )
    found[f"top-p 0.9 of {blocks} blocks"] = (
        partial(select_top_p, scores, 0.9),
        scores.numel() * 4.0,
    )
    mask = scores > 1.28  # a tenth
    geometry: dict[str, Any] = {
        "query_length": cut.padded_length,
        "key_length": cut.padded_length,
        "query_block": 64,
        "key_block": 64,
    }
    found[f"plan from a map of {blocks}^2 blocks"] = (
        partial(BlockSparsePlan.from_mask, mask, **geometry),
        0,
    )
    chosen = select_top_k(scores, number)
    found["plan from a selection"] = (
        partial(
            BlockSparsePlan, key_counts=chosen.key_counts, key_indices=chosen.key_indices,
            **geometry,
        ),
        0,
    )  # fmt: skip
    order = torch.stack([torch.randperm(tokens, device=DEVICE) for _ in range(heads)])
    order = order.int()[None].contiguous()
    found["permute, per head"] = (partial(permute_tokens, x, order), size * 2)
    found["undo the permutation"] = (partial(inverse_permute_tokens, x, order), size * 2)
    lse = torch.randn(1, heads, tokens, device=DEVICE)
    found["merge two states"] = (partial(merge_attention_states, x, lse, x, lse), size * 3)
    for side, clusters in zip(("queries", "keys"), CLUSTERS, strict=True):
        start = random_centroids(x, clusters)
        result = kmeans(x, start, 2)
        for iterations in (2, 50):
            found[f"k-means of {side}, {clusters} clusters, {iterations} iterations"] = (
                partial(kmeans, x, start, iterations),
                0,
            )
        found[f"nearest of {clusters} centroids"] = (partial(assign_to_centroids, x, start), 0)
        found[f"group by {clusters} labels"] = (
            partial(group_by_label, result.labels, clusters),
            0,
        )
        found |= flash_kmeans(x, start, side, clusters)
    groups = [
        group_by_label(kmeans(x, random_centroids(x, number), 2).labels, number)
        for number in CLUSTERS
    ]
    map_of_clusters = torch.rand(1, heads, *CLUSTERS, device=DEVICE) < 0.25
    found["plan from clusters"] = (partial(plan_from_groups, *groups, map_of_clusters), 0)
    return found


def flash_kmeans(
    x: torch.Tensor, start: torch.Tensor, side: str, clusters: int
) -> dict[str, tuple[Callable[[], Any], float]]:
    """The same work by flash-kmeans, which takes one problem per batch item."""
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError:
        return {}
    problems = x[0].transpose(0, 1).contiguous()  # not counted: in its favour
    first = start[0].transpose(0, 1).to(x.dtype).contiguous()  # it takes one dtype only
    return {
        f"k-means of {side}, {clusters} clusters, {iterations} iterations: flash-kmeans": (
            partial(
                batch_kmeans_Euclid, problems, clusters, max_iters=iterations, tol=-1.0,
                init_centroids=first,
            ),
            0,
        )
        for iterations in (2, 50)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows, data = [], []
    with torch.no_grad():
        for grid in GRIDS:
            for heads in HEADS:
                for name, (function, moved) in cases(grid, heads).items():
                    where = f"{'x'.join(map(str, grid))}, {heads} heads"
                    try:
                        before = torch.cuda.memory_allocated()
                        torch.cuda.reset_peak_memory_stats()
                        function()
                        torch.cuda.synchronize()
                        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                        ms = gpu_milliseconds({name: function}, repeats=5)[name]
                    except Exception as problem:
                        rows.append([where, name, f"{type(problem).__name__}: {problem}"[:120]])
                        rows[-1] += ["", ""]
                        continue
                    speed = f"{moved / ms / 1e9:.2f}" if moved else ""
                    rows.append([where, name, f"{ms:.3f}", speed, f"{peak:.0f}"])
                    data.append(
                        {"case": where, "tool": name, "ms": ms, "bytes": moved, "peak_mib": peak}
                    )
    note = (
        "bf16, D=128, B=1. TB/s: bytes that must be read and written once, over the time. Peak: "
        "memory above the inputs, results included.\n\n"
    )
    command = " ".join(["python bench/kernel_tools.py", *sys.argv[1:]])
    body = table(["tokens", "tool", "ms", "TB/s", "peak MiB"], rows)
    save(arguments.output, "kernel_tools", "Around the attention", command, note + body, data)


if __name__ == "__main__":
    main()
