"""Every provider that can serve here, held against the token-by-token oracle on the same plans.

On a CPU that is the reference alone (and Triton, in its interpreter); what a provider refuses is
skipped with its reasons, and the reference refuses nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from strategies import assert_matches, oracle, random_plan, random_tensors

from polyattn_kernels.attention import block_sparse_attention
from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers import PROVIDERS, automatic_order, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] + [torch.bfloat16, torch.float16] * (DEVICE == "cuda")


def served(name: str, plan: BlockSparsePlan, tensors: tuple[torch.Tensor, ...]) -> None:
    why = load(name).reasons(plan, *tensors)
    if why:
        assert name != "reference"
        pytest.skip("; ".join(why))


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        *itertools.product(("uniform", "ragged"), ((128, 128), (64, 64), (128, 64))),
        ("variable", (128, 128)),  # whose blocks have no size
    ],
)
def test_against_the_oracle(
    name: str, dtype: torch.dtype, head_dim: int, kind: Any, blocks: tuple[int, int]
) -> None:
    plan = random_plan(
        head_dim + sum(blocks), query_length=520, key_length=700, query_block=blocks[0],
        key_block=blocks[1], queries=kind, keys=kind, heads=4, density=0.5, device=DEVICE,
    )  # fmt: skip
    tensors = random_tensors(
        plan, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, device=DEVICE
    )
    served(name, plan, tensors)
    found = block_sparse_attention(*tensors, plan, scale=0.2, return_lse=True, provider=name)
    assert isinstance(found, tuple)
    expected = oracle(*tensors, plan, scale=0.2)
    assert_matches(found, expected, dtype, magnitude=2.0)
    out = block_sparse_attention(*tensors, plan, scale=0.2, provider=name)
    assert isinstance(out, torch.Tensor)
    assert_matches((out, None), expected, dtype, magnitude=2.0)


@pytest.mark.parametrize("block", [64, 128])
def test_the_automatic_order_ends_with_what_serves_everything(block: int) -> None:
    plan = random_plan(1, query_block=block, key_block=block)
    assert automatic_order("cpu", plan, 128) == ("reference",)
    order = automatic_order("cuda", plan, 128)
    assert order[-1] == "reference"
    assert set(order) == set(PROVIDERS)
    assert order[0] == ("fa4" if block == 128 else "triton")
    assert automatic_order("cuda", plan, 64)[0] == ("fa4" if block == 128 else "hopper")
    assert automatic_order("cuda", plan, 96)[0] == "hopper"
