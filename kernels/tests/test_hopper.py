"""The Hopper provider: what it takes anywhere, and on such a GPU every kind of plan and layout.

Gluon has no interpreter: without a GPU of compute capability 9.0 its kernels are not run.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import (
    assert_matches,
    guarded,
    longer_walk,
    oracle,
    plans,
    random_plan,
    random_tensors,
)

from polyattn_kernels.attention import block_sparse_attention
from polyattn_kernels.permutation import gather_tokens
from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers import hopper as provider
from polyattn_kernels.providers._lists import work_items

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"

needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
some = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def compare(plan: BlockSparsePlan, seed: int = 0, scale: float | None = None, **how: Any) -> None:
    how = {"dtype": torch.bfloat16, **how}
    q, k, v = random_tensors(plan, seed, device=DEVICE, **how)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    assert provider.reasons(plan, q, k, v) == []
    assert_matches(
        provider.run(q, k, v, plan, scale, True), oracle(q, k, v, plan, scale=scale), q.dtype,
        how.get("magnitude", 1.0) * max(1.0, abs(scale)),
    )  # fmt: skip


def on_device(plan: BlockSparsePlan) -> BlockSparsePlan:
    return replace(plan, **{name: each.to(DEVICE) for name, each in plan.tensors().items()})


# --- anywhere ---------------------------------------------------------------------------------


def test_reasons_name_all_that_is_wrong() -> None:
    plan = random_plan(1)
    q, k, v = random_tensors(plan, head_dim=20)
    words = " ".join(provider.reasons(plan, q, k, v))
    for each in ("runs on CUDA, found cpu", "float16 and bfloat16, found float32", "found 20"):
        assert each in words


@pytest.mark.parametrize("block", range(64, 513, 64))
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_every_uniform_configuration_fits(block: int, head_dim: int) -> None:
    for keys in range(64, 513, 64):
        config = provider.uniform_config(block, keys, head_dim)
        assert block % (config.consumers * 64) == 0
        assert keys % config.keys == 0 or keys * 2 == config.keys
        _fits(config, head_dim)
    for config in provider.gather_configs(head_dim):
        _fits(config, head_dim)


def _fits(config: provider.WarpConfig, head_dim: int) -> None:
    rows = config.consumers * 64 + 2 * config.keys * config.buffers
    assert config.programs * (rows * provider._padded(head_dim) * 2 + 1024) <= 227 * 1024
    threads = (config.consumers + 1) * 128
    if config.most_registers is not None:
        assert config.programs * threads * config.most_registers <= 65536


@pytest.mark.parametrize("seed", range(20))
def test_short_items_go_to_the_narrow_kernel_and_nothing_is_lost(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 400, (3, 7), generator=generator)
    sizes[:, seed % 7] = 128 * (seed % 3)
    ends = sizes.cumsum(-1)
    length = int(ends.max())
    costs = torch.randint(0, 9, (3, 7), generator=generator) if seed % 2 else None
    wide, narrow = work_items(ends - sizes, sizes, costs, 128, 64, length)
    assert narrow is not None
    for instance in range(3):
        seen: list[int] = []
        for items, least, most in ((wide, 65, 128), (narrow, 1, 64)):
            for block, first, number in items[instance].tolist():
                if number:
                    assert least <= number <= most
                    start = int(ends[instance, block] - sizes[instance, block])
                    assert start <= first
                    assert first + number <= int(ends[instance, block])
                    seen += range(first, first + number)
        assert sorted(seen) == list(range(int(ends[instance, -1])))


# --- on the GPU -------------------------------------------------------------------------------


@needs_hopper
@some
@given(plan=plans(blocks=(64, 128, 192), longest=700, most_heads=2), seed=st.integers(0, 99))
def test_every_kind_of_plan(plan: BlockSparsePlan, seed: int) -> None:
    compare(on_device(plan), seed, head_dim=64)


@needs_hopper
@pytest.mark.parametrize("lengths", [(512, 1024), (500, 771), (1, 1), (64, 77), (129, 1920)])
@pytest.mark.parametrize(
    "blocks", [(64, 64), (128, 128), (128, 64), (64, 128), (256, 256), (128, 384), (384, 192)]
)
@pytest.mark.parametrize("kind", ["uniform", "ragged"])
def test_block_sizes(kind: Any, blocks: tuple[int, int], lengths: tuple[int, int]) -> None:
    plan = random_plan(
        sum(blocks) + sum(lengths), query_length=lengths[0], key_length=lengths[1],
        query_block=blocks[0], key_block=blocks[1], heads=2, density=0.6, queries=kind, keys=kind,
        device=DEVICE,
    )  # fmt: skip
    compare(plan, heads=2, head_dim=128)


@needs_hopper
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_dimensions(kind: Any, head_dim: int, dtype: torch.dtype) -> None:
    for block in (64, 128):
        plan = random_plan(
            5, queries=kind, keys=kind, query_block=block, key_block=64, query_length=300,
            key_length=450, device=DEVICE,
        )  # fmt: skip
        compare(plan, head_dim=head_dim, dtype=dtype)


@needs_hopper
@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
@pytest.mark.parametrize("strided", [False, True])
def test_layouts_and_grouped_heads(kind: Any, strided: bool) -> None:
    plan = random_plan(
        11, queries=kind, keys=kind, query_block=128, key_block=64, query_length=390,
        key_length=333, batch=2, heads=4, permute_queries=kind == "variable", device=DEVICE,
    )  # fmt: skip
    compare(plan, batch=2, heads=4, kv_heads=2, head_dim=64, strided=strided)


@needs_hopper
@pytest.mark.parametrize("kind", ["uniform", "variable"])
@pytest.mark.parametrize("scale", [3.0, 1e-4])
@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_scales_and_magnitudes(kind: Any, scale: float, magnitude: float) -> None:
    plan = random_plan(
        2, queries=kind, keys=kind, query_block=128, key_block=128, query_length=512,
        key_length=512, device=DEVICE,
    )  # fmt: skip
    compare(plan, scale=scale, magnitude=magnitude, head_dim=64)


@needs_hopper
def test_more_work_than_programs() -> None:
    """Persistent programs come round more than once, with lists of every length, empty ones too."""
    for blocks in ((64, 64), (128, 128), (128, 64)):
        for keys in ("uniform", "ragged"):
            plan = random_plan(
                3, query_length=9000, key_length=2000, query_block=blocks[0], key_block=blocks[1],
                keys=keys, heads=5, density=0.3, device=DEVICE,
            )  # fmt: skip
            q, k, v = random_tensors(
                plan, heads=5, head_dim=64, dtype=torch.bfloat16, device=DEVICE
            )
            expected, expected_lse = block_sparse_attention(
                q.float(), k.float(), v.float(), plan, return_lse=True, provider="triton"
            )
            out, lse = provider.run(q, k, v, plan, 64**-0.5, True)
            assert lse is not None
            assert (out.float() - expected).norm() < 5e-3 * expected.norm()
            assert torch.allclose(lse, expected_lse, atol=1e-2)


@needs_hopper
@pytest.mark.parametrize("keys", ["uniform", "ragged"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *itertools.product((64, 128), (torch.float16, torch.bfloat16)),
        (16, torch.bfloat16),
        (80, torch.float16),
    ],
)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (384, 64)])
@pytest.mark.parametrize("longer", [False, True])
def test_permuted_queries_of_uniform_blocks(
    longer: bool, blocks: tuple[int, int], head_dim: int, dtype: torch.dtype, keys: Any
) -> None:
    """Read by their tokens and written to them: exact walks, and walks with gaps (video tiles)."""
    for seed, strided in ((0, False), (1, True)):
        plan = random_plan(
            seed, queries="ragged" if longer else "uniform", keys=keys, query_block=blocks[0],
            key_block=blocks[1], query_length=900 + 17 * seed, key_length=650, batch=2, heads=4,
            permute_queries=not longer, device=DEVICE,
        )  # fmt: skip
        if longer:
            plan = longer_walk(plan, seed).validate()
        assert provider._is_tiled(plan)
        compare(
            plan, seed, batch=2, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype,
            strided=strided,
        )  # fmt: skip


@needs_hopper
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128)])
def test_permuted_queries_of_more_work_than_programs(blocks: tuple[int, int]) -> None:
    """Programs come round with a new tile of queries; both ways of reading them give what the same
    queries give that were put in order before.
    """
    plan = random_plan(
        6, query_length=40_000, key_length=1500, query_block=blocks[0], key_block=blocks[1],
        queries="ragged", keys="ragged", heads=3, density=0.3, device=DEVICE,
    )  # fmt: skip
    plan = longer_walk(plan, 6)
    order = plan.query_permutation
    assert order is not None
    q, k, v = random_tensors(plan, heads=3, dtype=torch.bfloat16, head_dim=128, device=DEVICE)
    q = q.nan_to_num()  # queries in no block are in no result either; here they are compared
    walked = replace(plan, query_length=plan.query_positions, query_permutation=None)
    config = provider.uniform_config(*blocks, 128)
    expected, expected_lse = provider.attend_uniform(
        gather_tokens(q, order), k, v, walked, 0.1, True, config
    )
    assert expected_lse is not None
    for fetch in (True, False):
        out, lse = provider.attend_uniform(q, k, v, plan, 0.1, True, replace(config, fetch=fetch))
        assert lse is not None
        torch.testing.assert_close(gather_tokens(out, order), expected)
        at = order.clamp_min(0).long().expand(1, 3, -1)
        there = lse.gather(-1, at).masked_fill(order < 0, -math.inf)
        torch.testing.assert_close(there, expected_lse)


@needs_hopper
@pytest.mark.parametrize("block", [64, 128])
def test_wrong_walks_touch_nothing_outside(block: int) -> None:
    plan = random_plan(
        8, query_length=520, key_length=512, query_block=block, key_block=block,
        permute_queries=True, density=1.0, empty_rows=False, device=DEVICE,
    )  # fmt: skip
    assert plan.query_permutation is not None
    order = plan.query_permutation.clone()
    order[..., ::7] = torch.tensor(
        [-1, -(2**31), 2**31 - 1, 520, 521], dtype=torch.int32, device=DEVICE
    ).repeat(15)[: order[..., ::7].shape[-1]]
    q, k, v = (
        guarded(each, float("nan"))
        for each in random_tensors(
            plan, poison=False, head_dim=64, dtype=torch.bfloat16, device=DEVICE
        )
    )
    out, _ = provider.run(q, k, v, replace(plan, query_permutation=order), 0.125, True)
    named = order[0, 0][(order[0, 0] >= 0) & (order[0, 0] < 520)].long()
    assert torch.isfinite(out[:, named]).all()


WRONG_INDICES = [-1, -(2**31), 2**31 - 1, 6, 7, 100, 5]


@needs_hopper
@pytest.mark.parametrize("keys", ["uniform", "ragged", "variable"])
@pytest.mark.parametrize("index", WRONG_INDICES)
@pytest.mark.parametrize("key_length", [360, 384, 40])
def test_wrong_indices_read_nothing_outside(keys: Any, index: int, key_length: int) -> None:
    plan = random_plan(
        13, queries="variable" if keys == "variable" else "uniform", keys=keys, query_block=128,
        key_block=64, key_length=key_length, query_length=270, density=1.0, empty_rows=False,
        device=DEVICE,
    )  # fmt: skip
    if plan.key_lengths is not None:
        assert plan.key_block is not None
        starts = torch.arange(0, key_length, plan.key_block, dtype=torch.int32, device=DEVICE)
        plan = replace(
            plan, key_lengths=(key_length - starts).clamp_max(plan.key_block)[None, None]
        )
    indices = plan.key_indices.clone()
    indices[..., 0] = index
    indices[..., -1] = 0
    counts = torch.full_like(plan.key_counts, 2**31 - 1)
    counts[..., 1::3] = -5
    plan = replace(plan, key_indices=indices, key_counts=counts)
    q, k, v = (
        guarded(each, float("nan"))
        for each in random_tensors(
            plan, poison=False, head_dim=64, dtype=torch.bfloat16, device=DEVICE
        )
    )
    out, _ = provider.run(q, k, v, plan, 0.125, True)
    assert torch.isfinite(out).all()
    assert torch.all(out.abs() <= v.abs().max() * 1.01)


@needs_hopper
@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
def test_cuda_graphs_and_compile(kind: Any) -> None:
    plan = random_plan(
        4, queries=kind, keys=kind, query_block=128, key_block=64, query_length=500,
        key_length=500, device=DEVICE,
    )  # fmt: skip
    tensors = random_tensors(plan, head_dim=64, dtype=torch.bfloat16, device=DEVICE)
    wanted = block_sparse_attention(*tensors, plan, provider="hopper")
    assert isinstance(wanted, torch.Tensor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(*tensors, plan, provider="hopper")
    graph.replay()
    assert torch.equal(out, wanted)
    compiled = torch.compile(
        lambda q, k, v: block_sparse_attention(q, k, v, plan, provider="hopper"), fullgraph=True
    )
    assert torch.equal(compiled(*tensors), wanted)


@needs_hopper
def test_a_kernel_that_computes_wrong_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(7, query_block=64, key_block=64, heads=3, device=DEVICE)
    q, k, v = random_tensors(plan, heads=3, head_dim=24, dtype=torch.bfloat16, device=DEVICE)
    provider._verdicts.clear()
    real = provider.attend_uniform

    def wrong(*arguments: Any, **named: Any) -> Any:
        out, lse = real(*arguments, **named)
        return out * 1.1, lse

    monkeypatch.setattr(provider, "attend_uniform", wrong)
    assert "differs from the reference" in " ".join(provider.reasons(plan, q, k, v))
    provider._verdicts.clear()
