"""Block-sparse attention: every provider of polyattn_kernels against the best dense kernel.

For every shape, block size and density: TFLOP/s of the *selected* work (4 D per pair of a query and
a key that it attends to), how much faster that is than the fastest dense kernel found for the
shape, the error against float64 on some rows, peak memory of a call, and what building the plan
costs. Lists are random and ascending, each head its own, which is the worst case for the L2 cache;
variable blocks have lognormal sizes and random permutations. Variants of one case are timed in
turns. A provider that refuses or fails is a row that says why.

    python bench/block_sparse.py [--quick] [--seconds 110] [--only REGEX] [--output FOLDER]
    python bench/block_sparse.py --part 0/2 ...; python bench/block_sparse.py --part 1/2 ...
    python bench/block_sparse.py --join A/block_sparse.json B/block_sparse.json

``--quick`` measures the cases that the kernels are held to, with variants of each tier; without it,
every provider at every shape. Parts are for several GPUs, each with an --output of its own. Needs
the packages of core/ and kernels/ (installed, or on PYTHONPATH). Rows are written as they come, to
block_sparse.partial.jsonl in the output folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, gpu_milliseconds, save, table
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyattn_kernels.plan import BlockSparsePlan
from polyattn_kernels.providers import hopper as hopper_provider
from polyattn_kernels.providers import triton as triton_provider

DEVICE = "cuda"
LENGTHS = (75_600, 32_760, 69_120, 118_806)
DENSITIES = (0.125, 0.05, 0.25, 0.5, 1.0)
BLOCKS = ((128, 128), (64, 64), (128, 64))
CLUSTERS = (300, 1000)  # of queries, of keys
PROVIDERS = ("hopper", "triton", "fa4", "flex")  # those that exist are measured
LARGEST_ERROR = 0.01  # relative; bfloat16 explains 0.0025
NO_TIME = "no time left"
SAMPLED_BLOCKS, SAMPLED_ROWS = 3, 16  # what is held against float64

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    length: int
    heads: int
    head_dim: int
    density: float
    blocks: tuple[int, int] | None = None  # of queries and keys; None: variable
    variation: float = 0.0  # of the sizes of variable blocks: standard deviation over mean

    def __str__(self) -> str:
        blocks = f"{self.blocks[0]}x{self.blocks[1]}" if self.blocks else f"cv={self.variation}"
        return f"S={self.length} H={self.heads} D={self.head_dim} {blocks} density={self.density:g}"


def cases(quick: bool) -> list[Case]:
    """The most telling first, so that a time limit cuts the rest."""
    if quick:
        return [
            *(Case(69_120, 8, 128, density, (128, 128)) for density in (0.05, 0.125, 0.25)),
            *(Case(69_120, 8, 128, density, (128, 64)) for density in (0.05, 0.125)),
            *(Case(69_120, 8, 128, density, (64, 64)) for density in (0.05, 0.125)),
            *(Case(75_600, 8, 128, 0.25, None, variation) for variation in (0.5, 1.0)),
            Case(75_600, 8, 128, 0.125, (128, 128)),
            Case(118_806, 8, 128, 0.125, (128, 128)),
            Case(75_600, 8, 64, 0.125, (128, 128)),
        ]
    # What tells most comes first: variable blocks, one length at every density, then every length,
    # head number and dimension at one density, then the rest.
    shapes = ((8, 128), (24, 128), (8, 64), (24, 64))
    found = [Case(75_600, *shape, 0.25, None, cv) for shape in shapes for cv in (0.5, 1.0)]
    found += [Case(75_600, 8, 128, density, pair) for density in DENSITIES for pair in BLOCKS]
    for density in DENSITIES:
        for shape in shapes:
            for length in LENGTHS:
                found += [Case(length, *shape, density, pair) for pair in BLOCKS]
    return list(dict.fromkeys(found))


# --- plans ------------------------------------------------------------------------------------


def random_plan(case: Case) -> BlockSparsePlan:
    generator = torch.Generator(DEVICE).manual_seed(1)
    if case.blocks is None:
        return variable_plan(case, generator)
    rows, columns = (-(-case.length // block) for block in case.blocks)
    number = max(1, round(columns * case.density))
    lists = []
    for _ in range(case.heads):  # head by head: scores of all heads would take gigabytes
        scores = torch.rand(rows, columns, device=DEVICE, generator=generator)
        lists.append(scores.topk(number, -1).indices.sort(-1).values.to(torch.int32))
    return BlockSparsePlan(
        query_length=case.length,
        key_length=case.length,
        query_block=case.blocks[0],
        key_block=case.blocks[1],
        key_counts=torch.full((1, case.heads, rows), number, dtype=torch.int32, device=DEVICE),
        key_indices=torch.stack(lists)[None].contiguous(),
    )


def variable_plan(case: Case, generator: torch.Generator) -> BlockSparsePlan:
    """Clusters of lognormal sizes; each query cluster selects 0.4 to 1.6 times the density."""
    make: dict[str, Any] = {"device": DEVICE, "generator": generator}
    sides: dict[str, Any] = {}
    sizes = {}
    spread = math.sqrt(math.log(1 + case.variation**2))
    for side, clusters in zip(("query", "key"), CLUSTERS, strict=True):
        weights = torch.exp(torch.randn(case.heads, clusters, **make) * spread).double()
        ends = (weights.cumsum(-1) / weights.sum(-1, keepdim=True) * case.length).round().int()
        ends[:, -1] = case.length
        offsets = F.pad(ends, (1, 0))
        sizes[side] = offsets.diff(dim=-1)
        sides[f"{side}_offsets"] = offsets[None].contiguous()
        orders = [torch.randperm(case.length, **make) for _ in range(case.heads)]
        sides[f"{side}_permutation"] = torch.stack(orders).int()[None].contiguous()
    mask = torch.zeros(case.heads, *CLUSTERS, dtype=torch.bool, device=DEVICE)
    for head in range(case.heads):
        wanted = (0.4 + 1.2 * torch.rand(CLUSTERS[0], 1, **make)) * case.density * case.length
        order = torch.rand(CLUSTERS, **make).argsort(-1)
        mask[head].scatter_(1, order, sizes["key"][head][order].cumsum(-1) <= wanted)
    return BlockSparsePlan.from_mask(
        mask[None], query_length=case.length, key_length=case.length, **sides
    )


def milliseconds_to_plan(plan: BlockSparsePlan) -> float:
    """Of the lists from a map of blocks, of the plan's own capacity."""
    mask = plan.to_block_mask()
    fields = ("block", "offsets", "permutation")
    geometry = {
        name: getattr(plan, name)
        for side in ("query", "key")
        for name in (f"{side}_{field}" for field in fields)
    }

    def build() -> BlockSparsePlan:
        return BlockSparsePlan.from_mask(
            mask,
            query_length=plan.query_length,
            key_length=plan.key_length,
            capacity=plan.capacity,
            **geometry,
        )

    return gpu_milliseconds({"plan": build}, repeats=5)["plan"]


# --- what is timed ----------------------------------------------------------------------------


def sparse_variants(
    plan: BlockSparsePlan, tensors: Tensors, inside: bool
) -> tuple[dict[str, Callable[[], Result]], dict[str, str]]:
    """Functions by name, and why the others cannot run; ``inside``: also variants of a tier."""
    q, k, v = tensors
    scale = q.shape[-1] ** -0.5
    found: dict[str, Callable[[], Result]] = {}
    refused: dict[str, str] = {}
    for name in PROVIDERS:
        try:
            module = importlib.import_module(f"polyattn_kernels.providers.{name}")
            why = module.reasons(plan, q, k, v)
        except ModuleNotFoundError as problem:
            if problem.name == f"polyattn_kernels.providers.{name}":
                continue
            refused[name] = describe(problem)
        except Exception as problem:
            refused[name] = describe(problem)
        else:
            if why:
                refused[name] = "; ".join(why)
            else:
                found[name] = partial(module.run, q, k, v, plan, scale, False)
    if plan.is_uniform and plan.query_block == plan.key_block:
        try:
            found["cuDNN (no provider)"] = cudnn(plan, tensors)
        except ImportError as problem:
            refused["cuDNN (no provider)"] = describe(problem)
    if inside and "hopper" in found:
        found["hopper: with LSE"] = lambda: hopper_provider.run(q, k, v, plan, scale, True)
    if inside and "triton" in found:
        found |= triton_variants(plan, tensors, scale)
    return found, refused


def cudnn(plan: BlockSparsePlan, tensors: Tensors) -> Callable[[], Result]:
    """The block-sparse kernel of nvidia-cudnn-frontend, which is not among the providers."""
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    q, k, v = (each.transpose(1, 2).contiguous() for each in tensors)  # not counted

    def attend() -> Result:
        found = block_sparse_attention_forward(
            q, k, v, plan.key_indices, q2k_block_nums=plan.key_counts,
            sparse_block_size=plan.query_block,
        )  # fmt: skip
        return found["o_tensor"].transpose(1, 2), None

    return attend


def triton_variants(
    plan: BlockSparsePlan, tensors: Tensors, scale: float
) -> dict[str, Callable[[], Result]]:
    """What a choice inside the Triton tier costs or gains."""
    q, k, v = tensors
    capability = torch.cuda.get_device_capability()
    if plan.query_block is None or plan.key_block is None:
        config = triton_provider.gather_config(q.shape[-1], q.dtype, capability)

        def gathered(**how: Any) -> Callable[[], Result]:
            return lambda: triton_provider.attend_gathered(
                q, k, v, plan, scale, False, config, **how
            )

        return {
            "triton: with LSE": lambda: triton_provider.run(q, k, v, plan, scale, True),
            "triton: items not sorted": gathered(sort_by_cost=False),
        }
    chosen = triton_provider.uniform_config(
        plan.query_block, plan.key_block, q.shape[-1], q.dtype, capability
    )

    def uniform(config: triton_provider.TileConfig, **how: Any) -> Callable[[], Result]:
        return lambda: triton_provider.attend_uniform(q, k, v, plan, scale, False, config, **how)

    return {
        "triton: with LSE": lambda: triton_provider.run(q, k, v, plan, scale, True),
        "triton: not warp-specialised": uniform(chosen),
        "triton: checked": uniform(chosen, checked=True),
        "triton: unchecked": uniform(chosen, checked=False),
        "triton: pointers": uniform(replace(chosen, descriptors=False)),
    }


def dense_variants(tensors: Tensors) -> dict[str, Callable[[], Any]]:
    q, k, v = tensors
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*heads_first)

    found: dict[str, Callable[[], Any]] = {
        "torch": lambda: F.scaled_dot_product_attention(*heads_first),
        "cuDNN": cudnn,
    }
    for name, modules in (
        ("FA3", ("flash_attn_interface", "fa3_fwd_interface")),
        ("FA4", ("flash_attn.cute",)),
    ):
        for module in modules:
            try:
                function = importlib.import_module(module).flash_attn_func
            except Exception:  # a missing package is told by the name of the best dense kernel
                continue
            found[name] = partial(function, q, k, v)
            break
    return found


_best_dense: dict[tuple[int, int, int], str] = {}


def best_dense(case: Case, variants: dict[str, Callable[[], Any]]) -> str:
    """The name of the fastest dense kernel that runs, found once for a shape."""
    key = (case.length, case.heads, case.head_dim)
    if key not in _best_dense:
        working = {}
        for name, function in variants.items():
            try:
                function()
                torch.cuda.synchronize()
                working[name] = function
            except Exception as problem:
                stop_if_the_device_is_lost(problem)
                print(f"dense {name}: {describe(problem)}", flush=True)
        times = gpu_milliseconds(working, repeats=3, warmup=1)
        _best_dense[key] = min(times, key=lambda name: times[name])
    return _best_dense[key]


# --- correctness ------------------------------------------------------------------------------


def tokens_of(plan: BlockSparsePlan, side: str, head: int, block: int) -> torch.Tensor:
    """The tokens in one block of one head of the first batch item."""

    def of_head(name: str) -> torch.Tensor | None:
        field: torch.Tensor | None = getattr(plan, f"{side}_{name}")
        return None if field is None else field[0, head if field.shape[1] > 1 else 0]

    length = getattr(plan, f"{side}_length")
    offsets, size = of_head("offsets"), getattr(plan, f"{side}_block")
    if offsets is not None:
        start, stop = int(offsets[block]), int(offsets[block + 1])
    else:
        start, stop = block * size, min(block * size + size, length)
    walk = torch.arange(start, stop, device=plan.device)
    order = of_head("permutation")
    return walk if order is None else order[walk].long()


def error(plan: BlockSparsePlan, tensors: Tensors, out: torch.Tensor) -> float:
    """The largest relative error of the sampled blocks against float64; NaN if any output is."""
    if not bool(torch.isfinite(out).all()):
        return math.nan
    q, k, v = tensors
    heads, blocks, worst = q.shape[2], plan.num_query_blocks, 0.0
    for sample in range(SAMPLED_BLOCKS):
        head = sample * (heads - 1) // max(1, SAMPLED_BLOCKS - 1)
        block = sample * (blocks - 1) // max(1, SAMPLED_BLOCKS - 1)
        rows = tokens_of(plan, "query", head, block)
        rows = rows[:: max(1, len(rows) // SAMPLED_ROWS)]
        plan_head = head if plan.key_counts.shape[1] > 1 else 0
        count = int(plan.key_counts[0, plan_head, block])
        chosen = plan.key_indices[0, plan_head, block, :count].tolist()
        if not len(rows) or not chosen:
            continue
        columns = torch.cat([tokens_of(plan, "key", head, number) for number in chosen])
        if not len(columns):
            continue
        key_head = head // (heads // k.shape[2])
        scores = q[0, rows, head].double() @ k[0, columns, key_head].double().T
        wanted = (scores * q.shape[-1] ** -0.5).softmax(-1) @ v[0, columns, key_head].double()
        found = out[0, rows, head].double()
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


# --- one case ---------------------------------------------------------------------------------


class DeviceLostError(RuntimeError):
    """An error after which no kernel of this process can run."""


def stop_if_the_device_is_lost(problem: Exception) -> None:
    if re.search(r"illegal|misaligned|unspecified launch|device-side assert", str(problem)):
        raise DeviceLostError(describe(problem)) from problem


def describe(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:300].replace("\n", " ").replace("|", "/")


def measure(case: Case, inside: bool) -> dict[str, Any]:
    shape = (1, case.length, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    tensors = (q, k, v)
    plan = random_plan(case)
    density = float(plan.density())
    flops = 4.0 * case.head_dim * density * case.heads * case.length**2
    found: dict[str, Any] = {"case": str(case), "density": density, "failed": {}}
    variants, refused = sparse_variants(plan, tensors, inside)
    found["refused"] = refused
    found |= {"error": {}, "first_s": {}, "peak_mib": {}}
    running: dict[str, Callable[[], Any]] = {}
    for name, function in variants.items():
        try:
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            found["first_s"][name] = round(time.perf_counter() - start, 2)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out, _ = function()
            torch.cuda.synchronize()
            found["peak_mib"][name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            found["error"][name] = error(plan, tensors, out)
            del out
            # Not "greater than": a NaN must fail.
            if not found["error"][name] < LARGEST_ERROR:
                raise ArithmeticError(f"wrong result, relative error {found['error'][name]:.3g}")
            running[name] = function
        except Exception as problem:
            found["failed"][name] = describe(problem)
            stop_if_the_device_is_lost(problem)
    dense = dense_variants(tensors)
    best = best_dense(case, dense)
    work = max(flops, flops / density / 2)
    times = gpu_milliseconds(
        running | {"dense": dense[best]}, repeats=3 if work > 5e12 else 8, warmup=0
    )
    dense_ms = times.pop("dense")
    found["dense"] = {"kernel": best, "ms": dense_ms, "tflops": flops / density / dense_ms / 1e9}
    found["ms"] = times
    found["tflops"] = {name: flops / value / 1e9 for name, value in times.items()}
    found["speedup"] = {name: dense_ms / value for name, value in times.items()}
    try:
        found["plan_ms"] = milliseconds_to_plan(plan)
    except Exception as problem:
        found["failed"]["building the plan"] = describe(problem)
        stop_if_the_device_is_lost(problem)
    return found


# --- report -----------------------------------------------------------------------------------

HEADINGS = ["case", "dense ms (TF/s)", "plan ms", "variant", "ms", "TF/s", "speed-up", "error",
            "peak MiB", "first call s"]  # fmt: skip


def rows(result: dict[str, Any]) -> list[list[str]]:
    case = result["case"]
    if "skipped" in result:
        return [[case, "", "", result["skipped"]] + [""] * 6]
    dense = result["dense"]
    lead = [
        f"{case} (exactly {result['density']:.3f})",
        f"{dense['kernel']} {dense['ms']:.2f} ({dense['tflops']:.0f})",
        f"{result['plan_ms']:.2f}" if "plan_ms" in result else "",
    ]
    table_rows = [
        [*lead, name, f"{value:.3f}", f"{result['tflops'][name]:.0f}",
         f"{result['speedup'][name]:.2f}", f"{result['error'][name]:.4f}",
         f"{result['peak_mib'][name]:.0f}", f"{result['first_s'][name]:.1f}"]
        for name, value in sorted(result["ms"].items(), key=lambda item: item[1])
    ]  # fmt: skip
    for verdict in ("refused", "failed"):
        for name, why in result[verdict].items():
            table_rows.append([*lead, f"{name}: {verdict}: {why}"] + [""] * 6)
    return table_rows


def plot(data: list[dict[str, Any]], path: Path) -> str:
    """TF/s over density at S=75,600, H=8, D=128: a line per provider and block size. In words."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return "No plot: matplotlib is not installed."
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in data:
        match = re.match(r"S=75600 H=8 D=128 (\d+x\d+) ", result["case"])
        for name, value in result.get("tflops", {}).items():
            if match and ":" not in name:
                label = f"{match[1]} {name}"
                lines.setdefault(label, []).append((result["density"], value))
    if not lines:
        return "No plot: no case of uniform blocks with S=75,600, H=8 and D=128 was measured."
    figure, axes = pyplot.subplots(figsize=(11, 7))
    for label, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xscale="log", xlabel="density", ylabel="TFLOP/s of selected work")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"![TF/s over density]({path.name})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="the cases with targets")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case, from the I-th")
    parser.add_argument("--join", nargs="+", type=Path, default=[], help="results of parts")
    parser.add_argument("--seconds", type=float, default=110, help="stop after about this long")
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    arguments = parser.parse_args()
    if arguments.join:
        join(arguments.join, arguments.output)
        return
    part, parts = map(int, arguments.part.split("/"))
    begun = time.monotonic()
    torch.manual_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    progress = arguments.output / "block_sparse.partial.jsonl"
    progress.unlink(missing_ok=True)
    data: list[dict[str, Any]] = []
    longest, lost = 20.0, ""
    with torch.no_grad():
        for case in cases(arguments.quick)[part::parts]:
            if not re.search(arguments.only, str(case)):
                continue
            started = time.monotonic()
            if lost:
                data.append({"case": str(case), "skipped": f"the device was lost: {lost}"})
                continue
            if started - begun > arguments.seconds - longest:
                data.append({"case": str(case), "skipped": NO_TIME})
                continue
            try:
                data.append(measure(case, arguments.quick))
            except DeviceLostError as problem:
                lost = str(problem)
                data.append({"case": str(case), "skipped": f"lost the device: {lost}"})
            except Exception as problem:
                data.append({"case": str(case), "skipped": describe(problem)})
            with progress.open("a") as file:
                file.write(json.dumps(data[-1]) + "\n")
            for row in rows(data[-1]):
                print(" | ".join(row), flush=True)
            if not lost:
                torch.cuda.empty_cache()
            longest = max(longest, time.monotonic() - started)
    command = " ".join(["python bench/block_sparse.py", *sys.argv[1:]])
    name = "block_sparse_targets" if arguments.quick else "block_sparse"
    write(arguments.output, name, data, command)


def join(files: list[Path], output: Path) -> None:
    """One result of the parts that several GPUs measured."""
    loaded = [json.loads(file.read_text()) for file in files]
    order = {str(case): number for number, case in enumerate(cases(False))}
    data = [result for each in loaded for result in each["data"]]
    data.sort(key=lambda result: order.get(result["case"], len(order)))
    where = loaded[0]["machine"]
    if any(each["machine"] != where for each in loaded):
        raise SystemExit("the parts were not measured on one kind of machine at one commit")
    write(output, "block_sparse", data, " and ".join(each["command"] for each in loaded), where)


def write(
    output: Path,
    name: str,
    data: list[dict[str, Any]],
    command: str,
    where: dict[str, Any] | None = None,
) -> None:
    note = (
        "bf16, B=1, random ascending lists. TF/s count selected pairs only. Speed-up: over the "
        "fastest dense kernel found, timed in the same turns. Error: relative, against float64, "
        f"{SAMPLED_BLOCKS} blocks of queries. Peak: memory of one call above its inputs, the "
        "output included. plan ms: the lists from a boolean map of blocks.\n\n"
    )
    if name == "block_sparse":
        note += plot(data, output / f"{name}.png") + "\n\n"
    note += "## Fastest provider\n\n" + winners(data) + "\n\n## All\n\n"
    late = sum(result.get("skipped") == NO_TIME for result in data)
    if late:
        note += f"{late} of {len(data)} cases were not measured: {NO_TIME}.\n\n"
    told = [result for result in data if result.get("skipped") != NO_TIME]
    body = table(HEADINGS, [row for result in told for row in rows(result)])
    save(output, name, "Block-sparse attention", command, note + body, data, where)


def winners(data: list[dict[str, Any]]) -> str:
    """How often each provider is the fastest, by kind of block and head dimension."""
    kinds: dict[str, dict[str, int]] = {}
    for result in data:
        if times := {name: ms for name, ms in result.get("ms", {}).items() if ":" not in name}:
            words = result["case"].split()
            kind = "variable" if words[3].startswith("cv") else words[3]
            counts = kinds.setdefault(f"{kind}, {words[2]}", {})
            best = min(times, key=lambda name: times[name])
            counts[best] = counts.get(best, 0) + 1
    names = sorted({name for counts in kinds.values() for name in counts})
    lines = [
        [kind, *(str(counts.get(name, 0)) for name in names)] for kind, counts in kinds.items()
    ]
    return table(["blocks", *names], lines)


if __name__ == "__main__":
    main()
