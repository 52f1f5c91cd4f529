"""The Triton provider, interpreted on the CPU: every kind of plan and layout, and wrong plans.

The oracle is the token-by-token one of :mod:`strategies`. Keys that nobody attends to, and queries
in no block, hold NaN and infinities throughout. What only a GPU can tell (compiled code, TMA,
speed) is the benchmark's business.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import (
    assert_matches,
    guarded,
    oracle,
    plans,
    random_plan,
    random_tensors,
)

from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers import triton as provider
from polyattn_kernels.providers._lists import LENGTH_BITS, PART, list_parts, work_items

HAS_TRITON = True
try:
    if not torch.cuda.is_available():
        # The kernels' decorators read this when their module is imported, which is later.
        os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401
except ImportError:
    HAS_TRITON = False

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# The interpreter multiplies bfloat16 as if its bits were integers.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockSparsePlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert provider.reasons(plan, q, k, v) == []
    out, lse = provider.run(q, k, v, plan, scale, True)
    assert lse is not None
    return out, lse


def compare(plan: BlockSparsePlan, seed: int = 0, scale: float | None = None, **how: Any) -> None:
    q, k, v = random_tensors(plan, seed, device=DEVICE, **how)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # A rounded score is off by its size, and an exponential's relative error is that of its score.
    assert_matches(
        attend(q, k, v, plan, scale), oracle(q, k, v, plan, scale=scale), q.dtype,
        how.get("magnitude", 1.0) * max(1.0, abs(scale)),
    )  # fmt: skip


@needs_triton
@few
@given(plan=plans(longest=70, most_heads=2), seed=st.integers(0, 99))
def test_every_kind_of_plan(plan: BlockSparsePlan, seed: int) -> None:
    compare(on_device(plan), seed, head_dim=16)


@needs_triton
@pytest.mark.parametrize("lengths", [(128, 256), (200, 321), (1, 1), (64, 77)])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (128, 64), (64, 128), (256, 256)])
def test_the_block_sizes_of_video_methods(
    blocks: tuple[int, int], lengths: tuple[int, int]
) -> None:
    plan = random_plan(
        sum(blocks) + sum(lengths), query_length=lengths[0], key_length=lengths[1],
        query_block=blocks[0], key_block=blocks[1], heads=2, density=0.6, device=DEVICE,
    )  # fmt: skip
    compare(plan, heads=2, head_dim=32)


@needs_triton
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", ["ragged", "variable"])
def test_head_dimensions(kind: Any, head_dim: int) -> None:
    plan = random_plan(5, queries=kind, keys=kind, query_block=32, key_block=32, device=DEVICE)
    compare(plan, head_dim=head_dim)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
@pytest.mark.parametrize("strided", [False, True])
def test_dtypes_layouts_and_grouped_heads(kind: Any, dtype: torch.dtype, strided: bool) -> None:
    plan = random_plan(
        11, queries=kind, keys=kind, query_block=64, key_block=32, batch=2, heads=4, device=DEVICE
    )
    compare(plan, batch=2, heads=4, kv_heads=2, head_dim=32, dtype=dtype, strided=strided)


@needs_triton
@pytest.mark.parametrize("block", range(16, 145, 16))
def test_every_multiple_of_16(block: int) -> None:
    for keys in (16, 48, 80, 144):
        plan = random_plan(
            block + keys, query_length=150, key_length=170, query_block=block, key_block=keys,
            queries="ragged", keys="ragged", device=DEVICE,
        )  # fmt: skip
        compare(plan, head_dim=16)


@needs_triton
@pytest.mark.parametrize("kind", ["uniform", "variable"])
@pytest.mark.parametrize("scale", [3.0, 1.0, 1e-4])
@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_scales_and_magnitudes(kind: Any, scale: float, magnitude: float) -> None:
    plan = random_plan(2, queries=kind, keys=kind, device=DEVICE)
    compare(plan, scale=scale, magnitude=magnitude)


@needs_triton
def test_the_last_dimension_may_be_strided() -> None:
    plan = random_plan(9, device=DEVICE)
    q, k, v = random_tensors(plan, head_dim=32, device=DEVICE)
    spread = [torch.stack((each, each), dim=-1)[..., 0] for each in (q, k, v)]
    assert all(each.stride(-1) == 2 for each in spread)
    assert_matches(attend(*spread, plan, 0.2), oracle(q, k, v, plan, scale=0.2))


@needs_triton
@pytest.mark.parametrize("kind", ["uniform", "ragged", "variable"])
def test_without_lse_and_inputs_untouched(kind: Any) -> None:
    plan = random_plan(4, queries=kind, keys=kind, device=DEVICE)
    tensors = random_tensors(plan, head_dim=32, device=DEVICE)
    before = [each.clone() for each in (*tensors, *plan.tensors().values())]
    with_lse = provider.run(*tensors, plan, 0.2, True)
    out, lse = provider.run(*tensors, plan, 0.2, False)
    assert lse is None
    assert torch.equal(out, with_lse[0])
    for old, new in zip(before, (*tensors, *plan.tensors().values()), strict=True):
        assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))


@needs_triton
@pytest.mark.parametrize("token_list_bytes", [0, 1, 5 * 90 * 4, 3 * 5 * 90 * 4, 2**29])
@pytest.mark.parametrize("sort_by_cost", [False, True])
def test_gathered_keys_by_lists_in_turns_or_from_the_table(
    token_list_bytes: int, sort_by_cost: bool
) -> None:
    plan = random_plan(
        8, queries="variable", keys="variable", batch=2, heads=2, permute_queries=True,
        permute_keys=True, device=DEVICE,
    )  # fmt: skip
    q, k, v = random_tensors(plan, batch=2, heads=2, device=DEVICE)
    found = provider.attend_gathered(
        q, k, v, plan, 0.2, True, provider.gather_config(32, q.dtype, (0, 0)),
        token_list_bytes=token_list_bytes, sort_by_cost=sort_by_cost,
    )  # fmt: skip
    assert_matches(found, oracle(q, k, v, plan, scale=0.2))


@needs_triton
def test_offsets_past_32_bits_take_the_wide_path() -> None:
    """Keys so far apart that token times stride needs 64 bits, though little memory is touched."""
    plan = random_plan(6, queries="variable", keys="variable", key_length=70, device=DEVICE)
    q, k, v = random_tensors(plan, head_dim=16, device=DEVICE)
    stride = 2**25
    assert plan.key_length * stride > 2**31
    wide = []
    for each in (k, v):
        storage = torch.empty(70 * stride, dtype=torch.float16, device=DEVICE)
        view = storage.as_strided(each.shape, (70 * stride, stride, 16, 1))
        view.copy_(each)  # the pages in between are never touched
        wide.append(view)
    q = q.half()
    config = provider.gather_config(16, q.dtype, (0, 0))
    found = provider.attend_gathered(q, *wide, plan, 0.25, True, config)
    assert_matches(found, oracle(q, *wide, plan, scale=0.25), torch.float16)
    assert "stride between tokens of k" in " ".join(provider.reasons(plan, q, *wide))


# --- descriptors ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed"])
@pytest.mark.parametrize("keys", ["uniform", "ragged"])
def test_descriptors_read_every_layout_they_claim(layout: str, keys: Any) -> None:
    """The interpreter reads through the same matrix view that the hardware does."""
    plan = random_plan(
        21, keys=keys, query_block=64, key_block=32, query_length=150, key_length=150, batch=2,
        heads=2, device=DEVICE,
    )  # fmt: skip
    q, k, v = random_tensors(plan, batch=2, heads=2, head_dim=32, device=DEVICE)
    if layout == "bhsd":
        q, k, v = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v))
    elif layout == "packed":
        q, k, v = torch.stack((q, k, v), dim=2).unbind(2)
    assert provider._describable(q, k, v)
    config = replace(provider.uniform_config(64, 32, 32, q.dtype, (0, 0)), descriptors=True)
    found = provider.attend_uniform(q, k, v, plan, 0.2, True, config)
    assert_matches(found, oracle(q, k, v, plan, scale=0.2))


def test_what_descriptors_cannot_read() -> None:
    x = torch.zeros(2, 40, 4, 32)
    assert provider._matrix_view(x) == (40, 0, 32, 80, 128)
    assert provider._matrix_view(x.transpose(1, 2).contiguous().transpose(1, 2)) == (
        160, 40, 0, 320, 32,
    )  # fmt: skip
    assert provider._matrix_view(x[:, ::2]) == (20, 0, 32, 40, 128)
    assert provider._matrix_view(x[:1, :, :1]) == (0, 0, 0, 40, 32)
    assert provider._matrix_view(x.as_strided((2, 40, 4, 32), (5001, 128, 32, 1))) is None
    assert provider._matrix_view(x[:, :1].expand(2, 40, 4, 32)) is None
    assert not provider._describable(torch.zeros(1, 8, 2, 80))  # not a power of two
    assert not provider._describable(torch.zeros(1, 8, 2, 33)[..., 1:])  # rows of 33
    assert not provider._describable(torch.zeros(1 + 8 * 64)[1:].view(1, 8, 2, 32))  # base


@needs_triton
def test_a_configuration_that_does_not_fit_is_refused() -> None:
    plan = random_plan(1, key_block=48, device=DEVICE)
    q, k, v = random_tensors(plan, head_dim=80, device=DEVICE)
    config = provider.TileConfig(16, 32, 4, 2)
    with pytest.raises(ValueError, match="key blocks of 48"):
        provider.attend_uniform(q, k, v, plan, 1.0, False, config)
    with pytest.raises(ValueError, match="power of two"):
        provider.attend_uniform(
            q, k, v, plan, 1.0, False, replace(config, keys=16, descriptors=True)
        )
    with pytest.raises(ValueError, match="needs descriptors"):
        provider.attend_uniform(
            q, k, v, plan, 1.0, False, replace(config, keys=16, warp_specialize=True)
        )


# --- wrong plans ------------------------------------------------------------------------------


WRONG_INDICES = [-1, -(2**31), 2**31 - 1, 6, 7, 100, 5]


@needs_triton
@pytest.mark.parametrize("keys", ["uniform", "ragged", "variable"])
@pytest.mark.parametrize("index", WRONG_INDICES)
@pytest.mark.parametrize("key_length", [90, 96, 10])
def test_wrong_indices_read_nothing_outside(keys: Any, index: int, key_length: int) -> None:
    """Out of range, descending and repeated entries, counts above the capacity, and below zero."""
    queries = "variable" if keys == "variable" else "uniform"
    plan = random_plan(
        13, queries=queries, keys=keys, key_length=key_length, query_length=70, density=1.0,
        empty_rows=False, device=DEVICE,
    )  # fmt: skip
    if plan.key_lengths is not None:  # all keys are tokens: no NaN of theirs can excuse a NaN
        plan = replace(plan, key_lengths=None)
        assert plan.key_block is not None
        starts = torch.arange(0, key_length, plan.key_block, dtype=torch.int32, device=DEVICE)
        lengths = (key_length - starts).clamp_max(plan.key_block)[None, None]
        plan = replace(plan, key_lengths=lengths)
    indices = plan.key_indices.clone()
    indices[..., 0] = index
    indices[..., -1] = 0
    counts = torch.full_like(plan.key_counts, 2**31 - 1)
    counts[..., 1::3] = -5
    plan = replace(plan, key_indices=indices, key_counts=counts)
    q, k, v = (
        guarded(each, float("nan"))
        for each in random_tensors(plan, poison=False, head_dim=16, device=DEVICE)
    )
    out, _ = attend(q, k, v, plan, 0.25)
    assert torch.isfinite(out).all()
    assert torch.all(out.abs() <= v.abs().max() * 1.001)


@needs_triton
@pytest.mark.parametrize("value", [-7, 10**6, -(2**31), 2**31 - 1])
def test_wrong_offsets_and_permutations_touch_nothing_outside(value: int) -> None:
    plan = random_plan(
        17, queries="variable", keys="variable", permute_queries=True, permute_keys=True,
        device=DEVICE,
    )  # fmt: skip
    q, k, v = (
        guarded(each, float("nan"))
        for each in random_tensors(plan, poison=False, head_dim=16, device=DEVICE)
    )
    for field in ("query_offsets", "key_offsets", "query_permutation", "key_permutation"):
        for place in (0, 2, -1):
            wrong = getattr(plan, field).clone()
            wrong[..., place] = value
            out, _ = attend(q, k, v, replace(plan, **{field: wrong}), 0.25)
            assert torch.isfinite(out).all(), (field, place)
    for field in ("query_lengths", "key_lengths"):
        uniform = random_plan(18, queries="ragged", keys="ragged", device=DEVICE)
        tensors = [
            guarded(each, float("nan"))
            for each in random_tensors(uniform, poison=False, head_dim=16, device=DEVICE)
        ]
        wrong = torch.full_like(getattr(uniform, field), value)
        out, _ = attend(*tensors, replace(uniform, **{field: wrong}), 0.25)
        assert torch.isfinite(out).all(), field


@needs_triton
def test_the_guard_catches_a_read_outside() -> None:
    """The two tests above can fail: unchecked, a wrong index reaches the guard."""
    plan = random_plan(13, key_length=96, density=1.0, empty_rows=False, device=DEVICE)
    indices = plan.key_indices.clone()
    indices[..., -1] = 8
    plan = replace(plan, key_indices=indices)
    q, k, v = (
        guarded(each, float("nan"))
        for each in random_tensors(plan, poison=False, head_dim=16, device=DEVICE)
    )
    config = provider.uniform_config(16, 16, 16, q.dtype, (0, 0))
    out, _ = provider.attend_uniform(q, k, v, plan, 0.25, False, config, checked=False)
    assert torch.isnan(out).any()


# --- work items, configurations, reasons ------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    rows=st.sampled_from([16, 64]),
    by_cost=st.booleans(),
)
@settings(deadline=None, max_examples=60, database=None)
def test_work_items_cover_every_query_once(sizes: list[int], rows: int, by_cost: bool) -> None:
    length = sum(sizes)
    if not length:
        return
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    costs = torch.tensor([[(7 * number) % 5 for number in range(len(sizes))]])
    items, short = work_items(
        torch.tensor([starts], dtype=torch.int32), torch.tensor([sizes], dtype=torch.int32),
        costs if by_cost else None, rows, 0, length,
    )  # fmt: skip
    assert short is None
    assert items.dtype is torch.int32
    assert items.is_contiguous()
    seen: list[int] = []
    order = []
    for block, first, number in items[0].tolist():
        assert 0 <= number <= rows
        if number:
            assert starts[block] <= first
            assert first + number <= starts[block] + sizes[block]
            order.append(int(costs[0, block]))
            seen += range(first, first + number)
    assert sorted(seen) == list(range(length))
    if by_cost:
        assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("capability", [(0, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_configurations_fit_their_blocks_and_their_gpu(
    capability: tuple[int, int], dtype: torch.dtype
) -> None:
    for head_dim in (16, 64, 80, 128, 256):
        for query_block in range(16, 400, 16):
            for key_block in range(16, 400, 16):
                for describable in (False, True):
                    config = provider.uniform_config(
                        query_block, key_block, head_dim, dtype, capability, describable
                    )
                    assert key_block % config.keys == 0
                    assert 16 <= config.rows <= 128
                    assert config.rows & (config.rows - 1) == 0
                    assert config.descriptors <= (describable and capability >= (9, 0))
                    assert _fits(config, head_dim, dtype, capability)
        config = provider.gather_config(head_dim, dtype, capability)
        assert not config.descriptors
        assert _fits(config, head_dim, dtype, capability)


def _fits(
    config: provider.TileConfig, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> bool:
    width = max(16, 1 << (head_dim - 1).bit_length())
    buffers = 3 if config.stages >= 5 else min(config.stages, 2)
    tiles = config.rows + 2 * config.keys * buffers
    return tiles * width * dtype.itemsize <= provider._shared_memory(capability)


def test_hopper_gets_what_was_measured() -> None:
    def tiles(query_block: int, key_block: int) -> tuple[int, int, int, int, bool]:
        c = provider.uniform_config(query_block, key_block, 128, torch.bfloat16, (9, 0))
        return c.rows, c.keys, c.warps, c.stages, c.descriptors

    assert tiles(128, 128) == tiles(256, 256) == (128, 64, 4, 2, True)
    assert tiles(64, 64) == (64, 64, 4, 5, True)
    gather = provider.gather_config(128, torch.bfloat16, (9, 0))
    assert (gather.rows, gather.keys, gather.warps, gather.stages) == (64, 64, 4, 5)


def test_reasons_name_what_is_wrong() -> None:
    plan = random_plan(1)
    q, k, v = random_tensors(plan, head_dim=32, dtype=torch.float64)
    assert any("float64" in reason for reason in provider.reasons(plan, q, k, v))
    q, k, v = random_tensors(plan, dtype=torch.bfloat16)
    assert any("bfloat16" in reason for reason in provider.reasons(plan, q, k, v))


def test_both_modules_that_know_of_parts_agree() -> None:
    source = Path(provider.__file__).with_name("_hopper_kernels.py").read_text(encoding="utf-8")
    for name, value in (("PART", PART), ("LENGTH_BITS", LENGTH_BITS)):
        assert re.findall(rf"^{name} = gl\.constexpr\((\d+)\)", source, re.MULTILINE) == [
            str(value)
        ]
    assert 1 << LENGTH_BITS > PART  # so that an entry can hold the tokens of a whole part


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton there is nothing to import")
def test_importing_the_provider_imports_no_triton() -> None:
    code = (
        "import sys; from polyattn_kernels.providers import triton as p; "
        "print(p.NAME, 'triton' in sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert answer.stdout.split() == [provider.NAME, "False"]


def on_device(plan: BlockSparsePlan) -> BlockSparsePlan:
    return replace(plan, **{name: each.to(DEVICE) for name, each in plan.tensors().items()})


@needs_triton
def test_nothing_to_do() -> None:
    plan = random_plan(1, device=DEVICE)
    q, k, v = random_tensors(plan, device=DEVICE)
    out, lse = provider.run(q[:0], k[:0], v[:0], plan, 1.0, True)
    assert lse is not None
    assert out.shape == (0, 70, 1, 32)
    assert lse.shape == (0, 1, 70)
    for kind in ("uniform", "ragged", "variable"):
        plan = random_plan(1, queries=kind, keys=kind, device=DEVICE)
        plan = replace(plan, key_counts=plan.key_counts * 0)
        out, lse = attend(*random_tensors(plan, device=DEVICE), plan, 1.0)
        assert not out.any()
        assert lse.isneginf().all()


@needs_triton
@few
@given(
    seed=st.integers(0, 999), block=st.sampled_from([32, 64, 192]), length=st.integers(1, 900),
    shared=st.booleans(), ragged=st.booleans(),
)  # fmt: skip
def test_lists_of_full_blocks_and_of_parts(
    seed: int, block: int, length: int, shared: bool, ragged: bool
) -> None:
    plan = on_device(
        random_plan(
            seed,
            key_length=length,
            key_block=block,
            keys="ragged" if ragged else "uniform",
            batch=2,
            heads=3,
            shared=shared,
            spare_capacity=1,
        )
    )
    parts = list_parts(plan)
    sizes = plan.block_sizes("key").expand(plan.batch, plan.heads, -1).cpu()
    batch, heads, rows = parts.counts.shape
    for item, head, row in itertools.product(range(batch), range(heads), range(rows)):
        counts = plan.key_counts.expand(batch, heads, -1)[item, head, row]
        listed = plan.key_indices.expand(batch, heads, -1, -1)[item, head, row, :counts].tolist()
        held = {number: int(_pick(sizes, item, head)[number]) for number in listed}
        full = parts.full_indices[item, head, row, : parts.full_counts[item, head, row]].tolist()
        assert full == [number for number in listed if held[number] == block]
        entries = parts.entries[item, head, row, : parts.counts[item, head, row]].tolist()
        wanted = [
            (number * (block // PART) + part, min(PART, held[number] - part * PART))
            for number in listed
            if held[number] < block
            for part in range(block // PART)
            if held[number] > part * PART
        ]
        assert [(each >> LENGTH_BITS, each % (1 << LENGTH_BITS)) for each in entries] == wanted


def _pick(tensor: torch.Tensor, item: int, head: int) -> torch.Tensor:
    return tensor[min(item, tensor.shape[0] - 1), min(head, tensor.shape[1] - 1)]
