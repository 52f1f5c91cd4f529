"""What several processes check together: every case runs on all ranks, against one process.

A case takes the number of ranks and raises where something is wrong. Tensors are drawn from a seed,
so that every rank knows the whole sequence, and takes its own shard.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist

import polyattn
from polyattn.environment import Environment
from polyattn.errors import BackendUnavailableError, BridgeError, InputError, ParallelError
from polyattn.parallel import agreement, layers, sequence_mesh, shard_lengths
from polyattn.reporting import Report, reporting_to

sys.path.append(str(Path(__file__).parents[2] / "core" / "tests" / "compute"))

import tiny_wan

CASES: dict[str, Callable[[int], None]] = {}
TIMEOUT = timedelta(seconds=60)
PLUGINS = "sdpa,fa,sta,vsa,vmoba,svg2"

Tensors = tuple[torch.Tensor, ...]


def case(function: Callable[[int], None]) -> Callable[[int], None]:
    CASES[function.__name__] = function
    return function


def drawn(
    length: int = 24, heads: int = 4, kv_heads: int | None = None, *, batch: int = 1,
    width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Tensors:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, width) for h in (heads, kv_heads or heads, kv_heads or heads)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def shards(tensors: Tensors, lengths: Any = None) -> Tensors:
    """This rank's shards of whole tensors."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    lengths = lengths or shard_lengths(tensors[0].shape[1], ranks)
    start = sum(lengths[:rank])
    return tuple(x[:, start : start + lengths[rank]] for x in tensors)


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def every_mesh(ranks: int) -> list[Any]:
    """All ways to share out the ranks."""
    degrees = [each for each in (1, 2, 4) if ranks % each == 0]
    return [sequence_mesh(ulysses_degree=each, ring_degree=ranks // each) for each in degrees]


def compared(
    ranks: int, tensors: Tensors, *, lengths: Any = None, tolerance: float = 1e-9,
    attn_mask: torch.Tensor | None = None, meshes: Any = None, **options: Any,
) -> None:  # fmt: skip
    """Every mesh against one process, result and log-sum-exp, inputs unharmed."""
    whole, whole_lse = polyattn.attention(
        *tensors, attn_mask=attn_mask, return_lse=True, backend="sdpa", **options
    )
    own = shards(tensors, lengths)
    kept = [x.clone() for x in own]
    for mesh in meshes or every_mesh(ranks):
        layer = polyattn.USPAttention("sdpa", mesh=mesh, **options)
        out, lse = layer(*own, attn_mask=attn_mask, return_lse=True)
        exact = mesh["ring"].size() == 1  # parts are merged by a float32 log-sum-exp
        same(out, *shards((whole,), lengths), tolerance if exact else max(tolerance, 2e-6))
        wanted = shards((whole_lse.transpose(1, 2),), lengths)[0].transpose(1, 2)
        same(lse, wanted, max(tolerance, 1e-5))
        same(layer(*own, attn_mask=attn_mask), out, 1e-12)
    for before, after in zip(kept, own, strict=True):
        assert torch.equal(before, after)


# --- results --------------------------------------------------------------------------------------


@case
def one_line(ranks: int) -> None:
    tensors = drawn()
    out = polyattn.UlyssesAttention()(*shards(tensors))
    same(out, *shards((polyattn.attention(*tensors),)))


@case
def every_sharing(ranks: int) -> None:
    compared(ranks, drawn(24, 4))


@case
def uneven_shards(ranks: int) -> None:
    compared(ranks, drawn(23, 4, batch=2))
    compared(ranks, drawn(9, 4), lengths=(1, 8) if ranks == 2 else (0, 5, 1, 3))
    compared(ranks, drawn(3, 4), lengths=(3, 0) if ranks == 2 else (0, 0, 3, 0))


@case
def heads_that_do_not_divide(ranks: int) -> None:
    for heads, kv_heads in ((5, 5), (1, 1), (3, 3), (6, 2), (6, 3), (8, 1), (12, 4)):
        compared(ranks, drawn(10, heads, kv_heads), enable_gqa=heads != kv_heads)


@case
def masks(ranks: int) -> None:
    tensors = drawn(22, 4, batch=2)
    generator = torch.Generator().manual_seed(3)
    padding = torch.rand(2, 22, generator=generator) > 0.4
    padding[1, :11] = False
    boolean = torch.rand(2, 4, 22, 22, generator=generator) > 0.5
    boolean[:, :, 5] = False  # a query without keys
    boolean[:, :, :, :6] = False
    additive = torch.randn(1, 1, 22, 22, generator=generator).double()
    lengths = (0, 22) if ranks == 2 else (0, 9, 0, 13)
    for mask in (padding, padding[:, None, None], boolean, boolean[:1, :1], additive):
        compared(ranks, tensors, attn_mask=mask)
        compared(ranks, tensors, attn_mask=mask, lengths=lengths)


@case
def causal_and_scale(ranks: int) -> None:
    compared(ranks, drawn(21, 4), is_causal=True)
    compared(ranks, drawn(20, 4), scale=0.7)
    compared(ranks, drawn(20, 4), scale=-0.3)


@case
def dtypes_and_strides(ranks: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        compared(ranks, drawn(20, 4, dtype=dtype), tolerance=tolerance)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in drawn(20, 4, batch=2))
    compared(ranks, strided)


@case
def replicated_tokens(ranks: int) -> None:
    text, video = drawn(5, 6, 2, batch=2, seed=1), drawn(17, 6, 2, batch=2)
    mask = torch.ones(2, 22, dtype=torch.bool)
    mask[0, 2:4] = False
    mask[1, 9:] = False
    for at, order in (("prefix", (text, video)), ("suffix", (video, text))):
        whole = tuple(torch.cat(each, 1) for each in zip(*order, strict=True))
        for attn_mask in (None, mask):
            wanted, wanted_lse = polyattn.attention(
                *whole, enable_gqa=True, attn_mask=attn_mask, return_lse=True
            )
            first = 5 if at == "prefix" else 0
            video_rows = slice(first, first + 17)
            text_rows = slice(0, 5) if at == "prefix" else slice(17, None)
            for mesh in every_mesh(ranks):
                layer = polyattn.USPAttention(mesh=mesh, enable_gqa=True)
                (out, lse), (words, words_lse) = layer(
                    *shards(video), **{at: text}, attn_mask=attn_mask, return_lse=True
                )
                same(out, *shards((wanted[:, video_rows],)), 2e-6)
                same(words, wanted[:, text_rows], 2e-6)
                same(lse.transpose(1, 2), *shards((wanted_lse.transpose(1, 2)[:, video_rows],)),
                     1e-5)  # fmt: skip
                same(words_lse, wanted_lse[:, :, text_rows], 1e-5)
                out, words = layer(*shards(video), **{at: text}, attn_mask=attn_mask)
                same(out, *shards((wanted[:, video_rows],)), 2e-6)
                same(words, wanted[:, text_rows], 2e-6)


@case
def replicated_keys(ranks: int) -> None:
    q, _, _ = drawn(18, 4)
    _, k, v = drawn(7, 4, seed=2)
    for mesh in every_mesh(ranks):
        layer = polyattn.USPAttention(mesh=mesh, role="cross")
        out = layer(*shards((q,)), k, v, keys_replicated=True)
        same(out, *shards((polyattn.attention(q, k, v),)))


@case
def lengths_that_change(ranks: int) -> None:
    layer = polyattn.UlyssesAttention()
    for length in (19, 20, 19, 7):
        tensors = drawn(length, 4)
        same(layer(*shards(tensors)), shards((polyattn.attention(*tensors),))[0])


@case
def copies_of_a_layer(ranks: int) -> None:
    tensors = drawn(12, 4)
    layer = polyattn.UlyssesAttention()
    layer(*shards(tensors))
    for twin in (copy.copy(layer), copy.deepcopy(layer)):
        twin.scale = 0.9
        same(twin(*shards(tensors)), shards((polyattn.attention(*tensors, scale=0.9),))[0])


@case
def gradients(ranks: int) -> None:
    for heads, kv_heads, is_causal in (
        (4, 4, False), (6, 2, False), (4, 1, True), (3, 3, False), (1, 1, False),
    ):  # fmt: skip
        whole = [x.requires_grad_() for x in drawn(11, heads, kv_heads, width=8)]
        weight = drawn(11, heads, width=8, seed=5)[0]
        options = {"enable_gqa": heads != kv_heads, "is_causal": is_causal}
        wanted = torch.autograd.grad(
            (polyattn.attention(*whole, backend="sdpa", **options) * weight).sum(), whole
        )
        for mesh in every_mesh(ranks):
            own = [x.detach().clone().requires_grad_() for x in shards(tuple(whole))]
            out = polyattn.USPAttention("sdpa", mesh=mesh, **options)(*own)
            found = torch.autograd.grad((out * shards((weight,))[0]).sum(), own)
            for one, other in zip(found, wanted, strict=True):
                same(one, *shards((other,)), 2e-6)


@case
def gradients_with_masks_and_tokens(ranks: int) -> None:
    text, video = drawn(3, 4, seed=1, width=8), drawn(9, 4, width=8)
    mask = torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(7)) > 0.3
    mask[:, :, 6] = False
    whole = [torch.cat(each, 1).requires_grad_() for each in zip(text, video, strict=True)]
    weight = drawn(12, 4, width=8, seed=5)[0]
    out = polyattn.attention(*whole, backend="sdpa", attn_mask=mask)
    wanted = torch.autograd.grad((out * weight).sum(), whole)
    for mesh in every_mesh(ranks):
        own = [x.clone().requires_grad_() for x in shards(video)]
        words = [x.clone().requires_grad_() for x in text]
        layer = polyattn.USPAttention("sdpa", mesh=mesh)
        out, told = layer(*own, prefix=tuple(words), attn_mask=mask)
        # Every rank has the text's result: each counts its share of it.
        loss = (out * shards((weight[:, 3:],))[0]).sum() + (told * weight[:, :3]).sum() / ranks
        found = torch.autograd.grad(loss, own + words)
        for one, other in zip(found[:3], wanted, strict=True):
            same(one, *shards((other[:, 3:],)), 2e-6)
        for one, other in zip(found[3:], wanted, strict=True):
            total = one.clone()
            dist.all_reduce(total)
            same(total, other[:, :3], 2e-6)


@case
def compiled_with_graph_breaks(ranks: int) -> None:
    tensors = drawn(24, 4, dtype=torch.float32)
    layer = polyattn.UlyssesAttention("sdpa")
    compiled = torch.compile(lambda q, k, v: layer(q + 0, k, v) * 2, backend="eager")
    wanted = polyattn.attention(*tensors) * 2
    for _ in range(2):
        same(compiled(*shards(tensors)), *shards((wanted,)), 1e-5)


# --- sparse methods: the whole grid on every rank ---------------------------------------------

GRID = (3, 4, 5)
SPARSE: dict[str, dict[str, Any]] = {
    "sta": {"window_size": [3, 1, 3], "tile_size": [1, 2, 2], "skip_time_steps": 0},
    "vsa": {"sparsity": 0.5},
    "vmoba": {"temporal_chunk_size": 1, "spatial_chunk_size": [2, 2], "st_chunk_size": [1, 2, 2],
              "moba_threshold": 0.4, "first_full_step": 0},
    "svg2": {"num_q_centroids": 3, "num_k_centroids": 5, "top_p_kmeans": 0.6,
             "first_layers_fp": 0, "first_times_fp": 0},
}  # fmt: skip


@case
def sparse_methods(ranks: int) -> None:
    tensors = drawn(math.prod(GRID), 6, dtype=torch.float32, width=32)
    for name, config in SPARSE.items():
        place = {"step": 3, "num_steps": 10, "layer": 2, "num_layers": 4, "grid": GRID}
        with polyattn.forward_context(**place):
            wanted = polyattn.attention(*tensors, backend=name, config=config)
        with polyattn.forward_context(**place):
            layer = polyattn.UlyssesAttention(name, config=config)
            report = Report()
            with reporting_to(report):
                out = layer(*shards(tensors))
        same(out, *shards((wanted,)), 2e-5)
        assert report.rows or dist.get_rank() >= 6
        assert all(0 < row.facts["density"] < 1 for row in report.rows), report


@case
def a_gate_travels_with_its_tokens(ranks: int) -> None:
    tensors = drawn(math.prod(GRID), 5, dtype=torch.float32, width=32)
    gate = drawn(math.prod(GRID), 5, dtype=torch.float32, width=32, seed=9)[0]
    with polyattn.forward_context(grid=GRID, step=0, layer=0):
        wanted = polyattn.attention(
            *tensors, backend="vsa", config={"sparsity": 0.5}, extras={"gate": gate}
        )
        layer = polyattn.UlyssesAttention("vsa", config={"sparsity": 0.5})
        out = layer(*shards(tensors), extras={"gate": shards((gate,))[0]})
    same(out, *shards((wanted,)), 2e-5)


@case
def windows_of_each_head(ranks: int) -> None:
    """A strategy names heads of the whole layer; every rank takes those of its own."""
    heads, folder = 5, Path(sys.argv[3])
    windows = [[1, 1, 1], [3, 1, 1], [1, 2, 1], [3, 2, 1], [3, 2, 3]]
    path = folder / "strategy.json"
    if dist.get_rank() == 0:
        path.write_text(json.dumps({f"0_0_{head}": windows[head] for head in range(heads)}))
    dist.barrier()
    tensors = drawn(math.prod(GRID), heads, dtype=torch.float32, width=32)
    config = {"mask_strategy_file_path": str(path), "tile_size": [1, 2, 2], "skip_time_steps": 0}
    with polyattn.forward_context(grid=GRID, step=0, num_steps=1, layer=0, num_layers=1):
        wanted = polyattn.attention(*tensors, backend="sta", config=config)
        out = polyattn.UlyssesAttention("sta", config=config)(*shards(tensors))
    same(out, *shards((wanted,)), 2e-5)


@case
def text_and_video(ranks: int) -> None:
    text, video = (drawn(n, 4, dtype=torch.float32, width=32, seed=n)
                   for n in (7, math.prod(GRID)))  # fmt: skip
    whole = tuple(torch.cat(each, 1) for each in zip(video, text, strict=True))
    span = polyattn.TextSpan(math.prod(GRID), 7, 5)
    with polyattn.forward_context(grid=GRID, text=span, step=0, layer=0):
        wanted = polyattn.attention(*whole, backend="sta", config=SPARSE["sta"])
        out, words = polyattn.UlyssesAttention("sta", config=SPARSE["sta"])(
            *shards(video), suffix=text
        )
    same(out, *shards((wanted[:, :-7],)), 2e-5)
    same(words, wanted[:, -7:], 2e-5)


# --- diffusers ----------------------------------------------------------------------------------


def tiny_forward(model: Any, frames: int = 2, height: int = 4, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, frames, height, width, generator=generator)
    words = torch.randn(1, 7, 16, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), words, return_dict=False)[0]


@case
def a_denoiser_over_processes(ranks: int) -> None:
    model = tiny_wan.tiny_transformer()
    for size in ({}, {"frames": 1, "height": 6, "width": 6}):  # 12 tokens, and 9: uneven
        wanted = tiny_forward(model, **size)
        for mesh in every_mesh(ranks):
            with polyattn.apply(model, "sdpa", mesh=mesh) as handle:
                found = tiny_forward(model, **size)
            same(found, wanted, 1e-5)
            # With fewer heads than ranks, some have nothing to attend to.
            assert {row.used for row in handle.report.rows} == {"torch_sdpa"}
    assert torch.equal(tiny_forward(model, **size), wanted)
    assert not any(hasattr(each, "_diffusers_hook") for each in model.modules())


@case
def a_sparse_method_sees_the_whole_video(ranks: int) -> None:
    model = tiny_wan.tiny_transformer()
    for name, config in (("vsa", {"sparsity": 0.5}), ("vmoba", SPARSE["vmoba"])):
        with polyattn.apply(model, name, config=config):
            wanted = tiny_forward(model, frames=5, height=10, width=10)
        with polyattn.apply(model, name, config=config, mesh=sequence_mesh()) as handle:
            found = tiny_forward(model, frames=5, height=10, width=10)
        same(found, wanted, 1e-5)
        if dist.get_rank() < tiny_wan.HEADS:  # the others have no heads
            assert 0 < handle.report.density < 1
        ring = sequence_mesh(ring_degree=ranks)
        with polyattn.apply(model, name, config=config, mesh=ring):
            refused(BackendUnavailableError, "whole token grid", lambda: tiny_forward(model))


@case
def a_pipeline_over_processes(ranks: int) -> None:
    def video() -> Any:
        return pipe(
            prompt="a red circle", num_inference_steps=2, generator=torch.manual_seed(0),
            output_type="np", guidance_scale=3.0, max_sequence_length=8, **tiny_wan.SIZE,
        ).frames  # fmt: skip

    pipe = tiny_wan.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    wanted = torch.from_numpy(video())
    with polyattn.apply(pipe, mesh=sequence_mesh()):
        found = torch.from_numpy(video())
    same(found, wanted, 1e-4)


@case
def diffusers_own_context_parallelism(ranks: int) -> None:
    """A user's enable_parallelism stays in charge of the tokens; the attention is polyattn's."""
    model = tiny_wan.tiny_transformer()
    wanted = tiny_forward(model)
    config = diffusers.ContextParallelConfig(ulysses_degree=ranks)
    with (  # it counts devices, and a CPU is none
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
        mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu")),
    ):
        model.enable_parallelism(config=config)
    with polyattn.apply(model, "sdpa") as handle:
        same(tiny_forward(model), wanted, 1e-5)
        assert {row.used for row in handle.report.rows} == {"torch_sdpa"}
    refused(BridgeError, "without mesh=", lambda: polyattn.apply(model, mesh=sequence_mesh()))


@case
def spreadings_that_do_not_fit(ranks: int) -> None:
    model = tiny_wan.tiny_transformer()
    mesh = sequence_mesh()
    first = polyattn.apply(model, "sdpa", mesh=mesh)
    refused(BridgeError, "another mesh", lambda: polyattn.apply(model, mesh=sequence_mesh()))
    wanted = tiny_forward(model)
    with polyattn.apply(model, "sdpa"):  # takes part
        first.restore()
        same(tiny_forward(model), wanted, 1e-6)
    model._cp_plan = None
    refused(BridgeError, "no plan", lambda: polyattn.apply(model, mesh=mesh))
    same(tiny_forward(model), wanted, 1e-5)


# --- refusals -----------------------------------------------------------------------------------


def refused(kind: type[Exception], words: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except kind as error:
        assert words in str(error), f"{words!r} is not in {error}"
    else:
        raise AssertionError(f"not refused: {words}")


@case
def around_a_ring_no_method_on_a_grid(ranks: int) -> None:
    mesh = sequence_mesh(ulysses_degree=1, ring_degree=ranks)
    tensors = drawn(math.prod(GRID), 4, dtype=torch.float32, width=32)
    with polyattn.forward_context(grid=GRID, step=0, layer=0):
        layer = polyattn.USPAttention("sta", config=SPARSE["sta"], mesh=mesh)
        refused(BackendUnavailableError, "whole token grid", lambda: layer(*shards(tensors)))
        exact = polyattn.USPAttention(mesh=mesh)(*shards(tensors))
    same(exact, *shards((polyattn.attention(*tensors),)), 1e-5)


@case
def a_shard_that_does_not_fit_stops_all(ranks: int) -> None:
    q, k, v = shards(drawn(24, 4))
    layer = polyattn.UlyssesAttention()
    if dist.get_rank() == 1:
        refused(InputError, "same tokens", lambda: layer(q, k[:, 1:], v[:, 1:]))
        refused(InputError, "found list", lambda: layer(q, k, v, attn_mask=[1]))
    else:
        refused(ParallelError, "shard 1", lambda: layer(q, k, v))
        refused(ParallelError, "shard 1", lambda: layer(q, k, v))
    second = dist.get_rank() == 1
    wrong = tuple(x.float() for x in (q, k, v)) if second else (q, k, v)
    refused(ParallelError, "dtype: torch.float", lambda: layer(*wrong))
    mask = torch.ones(1, 24, dtype=torch.bool) if second else None
    refused(ParallelError, "attn_mask: ", lambda: layer(q, k, v, attn_mask=mask))
    q.requires_grad_(second)
    refused(ParallelError, "a gradient is needed", lambda: layer(q, k, v))
    q.requires_grad_(False)
    with polyattn.forward_context(step=dist.get_rank(), num_steps=8):
        refused(ParallelError, "forward context", lambda: layer(q, k, v))
    if second:  # has agreed to nothing yet, and the others have
        layer(q, k, v)
        layer = polyattn.UlyssesAttention()
    else:
        layer(q, k, v)
    layer(q, k, v)


@case
def masks_that_do_not_fit(ranks: int) -> None:
    tensors = shards(drawn(24, 4))
    for mesh in every_mesh(ranks):
        layer = polyattn.USPAttention(mesh=mesh)
        for shape in ((30, 30), (24, 30), (1, 30), (1, 1, 30, 30), (7,), (1, 1, 1, 1, 24)):
            mask = torch.ones(shape, dtype=torch.bool)
            refused(InputError, "whole sequence", lambda m=mask, a=layer: a(*tensors, attn_mask=m))


@case
def a_backend_that_one_rank_cannot_run(ranks: int) -> None:
    tensors = shards(drawn(24, 4))
    layer = polyattn.UlyssesAttention("fa", config={"strict_version": True, "version": 3})
    refused(BackendUnavailableError, "fa", lambda: layer(*tensors))
    known = layers.decide

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("nothing here computes attention")

    if dist.get_rank() == ranks - 1:
        layers.decide = fails
    try:
        layer = polyattn.UlyssesAttention()
        kind = RuntimeError if dist.get_rank() == ranks - 1 else ParallelError
        refused(kind, "nothing here computes", lambda: layer(*tensors))
    finally:
        layers.decide = known


@case
def environments_that_differ(ranks: int) -> None:
    known = layers.local_environment
    tensors = shards(drawn(24, 4))

    def other(device: str | None = None) -> Environment:
        return known(device).model_copy(update={"torch": "1.0"})

    if dist.get_rank() == 1:
        layers.local_environment = other
    try:
        refused(ParallelError, "torch: ", lambda: polyattn.UlyssesAttention()(*tensors))
    finally:
        layers.local_environment = known


@case
def other_backends_on_other_ranks(ranks: int) -> None:
    config = {"kernel": "math"} if dist.get_rank() == 0 else None
    with_config = polyattn.UlyssesAttention("sdpa")
    with polyattn.force_backend("sdpa"):
        polyattn.configure(config={"sdpa": config} if config else {})
        try:
            refused(ParallelError, "parameters", lambda: with_config(*shards(drawn(24, 4))))
        finally:
            polyattn.configure(config={})


@case
def wrong_arguments(ranks: int) -> None:
    tensors, text = shards(drawn(24, 4)), drawn(3, 4)
    layer = polyattn.UlyssesAttention()
    refused(InputError, "<class 'int'>", lambda: layer(*tensors, prefix=(1, 2, 3)))
    refused(InputError, "q, k and v, found", lambda: layer(*tensors, suffix=text[0]))
    other = tuple(x.float() for x in text)
    refused(InputError, "shares dtype", lambda: layer(*tensors, prefix=other))
    grouped = shards(drawn(24, 4, 2))
    refused(InputError, "was not asked for", lambda: layer(*grouped))
    causal = polyattn.UlyssesAttention(is_causal=True)
    refused(InputError, "their place is unclear", lambda: causal(*tensors, prefix=text))
    refused(InputError, "not defined for a shard",
            lambda: causal(*tensors, keys_replicated=True))  # fmt: skip
    refused(InputError, "neither prefix", lambda: layer(*tensors, prefix=text,
                                                        keys_replicated=True))  # fmt: skip
    refused(InputError, "to travel with it", lambda: layer(*tensors, extras={"gate": text[0]}))
    refused(InputError, "number of processes", lambda: sequence_mesh(ulysses_degree=3))
    ring = sequence_mesh(ulysses_degree=1, ring_degree=ranks)
    refused(InputError, "has no ring", lambda: polyattn.UlyssesAttention(mesh=ring))
    refused(InputError, "mesh is a DeviceMesh", lambda: polyattn.USPAttention(mesh="all"))
    empty = tuple(x[:, :0] for x in tensors)
    refused(InputError, "are empty", lambda: layer(*empty))


@case
def agreements_are_made_once(ranks: int) -> None:
    tensors = shards(drawn(24, 4))
    layer = polyattn.UlyssesAttention()
    counted, known = [], agreement.dist.all_gather_object

    def count(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return known(*arguments, **options)

    agreement.dist.all_gather_object = count
    try:
        for step in range(3):
            for branch in ("cond", "uncond"):
                with polyattn.forward_context(
                    step=step, num_steps=3, timestep=900.0 - step, layer=1, branch=branch
                ):
                    layer(*tensors)
        assert len(counted) == 1
        for length in (24, 23, 24, 23):
            with polyattn.forward_context(step=0, layer=1):
                layer(*shards(drawn(length, 4)))
        assert len(counted) == 2
    finally:
        agreement.dist.all_gather_object = known


# --- running them -------------------------------------------------------------------------------


def main() -> None:
    """``parallel_cases.py RANK RANKS FOLDER``: every case in turn, errors as JSON in the folder."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks,
        timeout=TIMEOUT,
    )  # fmt: skip
    wanted = sys.argv[4:] or list(CASES)
    for name in wanted:
        began, error = time.monotonic(), None
        try:
            CASES[name](ranks)
        except BaseException:
            error = traceback.format_exc()
        errors: list[Any] = [None] * ranks
        dist.all_gather_object(errors, error)
        if rank == 0:
            told = {"seconds": time.monotonic() - began, "errors": errors}
            (folder / f"{name}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
