"""The parallel layers on two and four processes, over gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import CASES, PLUGINS, drawn

import polyattn
from polyattn.errors import InputError
from polyattn.parallel import sequence_mesh, shard_lengths
from polyattn.parallel.collectives import head_shares

SCRIPT = Path(__file__).with_name("parallel_cases.py")


@pytest.fixture(scope="module", params=[2, 4])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases, run once by so many processes; the folder with what each case gave."""
    ranks = request.param
    folder = tmp_path_factory.mktemp(f"ranks{ranks}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLYATTN_PLUGINS": PLUGINS}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(rank), str(ranks), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    told = [each.communicate(timeout=500)[0] for each in running]
    return folder, told


@pytest.mark.parametrize("name", CASES)
def test_on_several_processes(name: str, job: Any) -> None:
    folder, told = job
    path = folder / f"{name}.json"
    assert path.is_file(), "\n".join(told)
    found = json.loads(path.read_text())
    assert not any(found["errors"]), "\n".join(filter(None, found["errors"]))


@pytest.mark.parametrize("kind", [polyattn.UlyssesAttention, polyattn.USPAttention])
def test_one_process_is_the_local_layer(kind: Any) -> None:
    q, k, v = drawn(20, 4)
    text = drawn(3, 4, seed=1)
    layer = kind(scale=0.3)
    local = polyattn.LocalAttention(scale=0.3)
    wanted = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", wanted, v)
    torch.testing.assert_close(layer(q, k, v), wanted)
    out, lse = layer(q, k, v, return_lse=True)
    assert torch.equal(lse, local(q, k, v, return_lse=True)[1])
    whole = local(*(torch.cat(each, 1) for each in zip(text, (q, k, v), strict=True)))
    out, words = layer(q, k, v, prefix=text)
    assert torch.equal(torch.cat([words, out], 1), whole)
    assert "ulysses_degree=1" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), local(q, k, v))


def test_a_mesh_needs_processes() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        sequence_mesh(ulysses_degree=2)


def test_shards_come_out_even_where_they_can() -> None:
    assert shard_lengths(10, 4) == (3, 3, 2, 2)
    assert shard_lengths(1, 3) == (1, 0, 0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 4), (12, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 8])
def test_every_head_has_one_rank_and_its_keys(heads: int, kv_heads: int, ranks: int) -> None:
    queries, keys = head_shares(heads, kv_heads, ranks)
    assert [head for share in queries for head in share] == list(range(heads))
    for own, used in zip(queries, keys, strict=True):
        if own:
            repeat = len(own) // len(used)
            assert [used[index // repeat] for index in range(len(own))] == [
                head * kv_heads // heads for head in own
            ]
