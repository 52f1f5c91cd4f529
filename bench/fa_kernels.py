"""fa against the vendors' own calls, torch's default and cuDNN, on one GPU.

For every shape: milliseconds of `polyattn.attention` with FlashAttention 3 and 4, of the vendor's
function called directly on the same tensors, of torch's own choice and of cuDNN forced; what
polyattn's checks add, as a ratio; the error against float64 on some rows. Variants are timed in
turns, several calls between two events. A package that is missing, or a case that fails, is a row
that says so.

    python bench/fa_kernels.py [--output FOLDER] [--quick] [--seconds 140]
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, gpu_milliseconds, save, table
from torch.nn.attention import SDPBackend, sdpa_kernel

import polyattn

VENDORS = {3: ("flash_attn_interface", "fa3_fwd_interface"), 4: ("flash_attn.cute",)}
ROWS = 256  # queries whose result is held against float64


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    head_dim: int
    is_causal: bool = False
    visible: tuple[int, ...] = ()  # keys each batch item may see; empty: all, in a batch of one
    heads: int = 8

    @property
    def batch(self) -> int:
        return len(self.visible) or 1

    @property
    def flops(self) -> float:
        """Of the two matrix products; a causal call does half of them."""
        pairs = self.queries * (sum(self.visible) or self.keys) * (0.5 if self.is_causal else 1)
        return 4.0 * self.heads * self.head_dim * pairs

    def __str__(self) -> str:
        length = f"S={self.queries}"
        if self.keys != self.queries:
            length = f"Sq={self.queries} Sk={self.keys}"
        padding = f" key padding {'+'.join(map(str, self.visible))}" if self.visible else ""
        causal = " causal" if self.is_causal else ""
        return f"B={self.batch} {length} D={self.head_dim}{causal}{padding}"


def cases(quick: bool) -> list[Case]:
    lengths = (1024, 8192) if quick else (1024, 8192, 32760, 75600)
    found = [Case(s, s, d) for d in (128, 64) for s in lengths]
    found += [Case(8192, 8192, 128, visible=(8192, 5000))]
    if not quick:
        found += [Case(s, s, d, is_causal=True) for d in (128, 64) for s in (8192, 32760)]
        found += [Case(32760, 512, 128), Case(32760, 77, 128)]
    return found


def vendor(generation: int) -> Any | None:
    """The vendor's module. polyattn has loaded it before, where it could."""
    for name in VENDORS[generation]:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):
            continue
    return None


def variants(case: Case) -> tuple[dict[str, Callable[[], Any]], torch.Tensor | None, Any]:
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(case.batch, case.queries, case.heads, case.head_dim, **make)
    k, v = (torch.randn(case.batch, case.keys, case.heads, case.head_dim, **make) for _ in "kv")
    mask = None
    if case.visible:
        lengths = torch.tensor(case.visible, device="cuda")
        mask = torch.arange(case.keys, device="cuda") < lengths[:, None]
    found: dict[str, Callable[[], Any]] = {}
    for generation in (3, 4):
        found[f"fa{generation}"] = lambda name=f"fa{generation}": polyattn.attention(
            q, k, v, backend=name, attn_mask=mask, is_causal=case.is_causal
        )
        module = vendor(generation)
        if module is not None:
            found[f"direct{generation}"] = direct(module, case, q, k, v, mask)
    wide = None if mask is None else mask[:, None, None]

    def torch_default() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=wide,
            is_causal=case.is_causal,
        )  # fmt: skip

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch_default()

    found["torch"], found["cudnn"] = torch_default, cudnn
    return found, mask, (q, k, v)


def direct(
    module: Any, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any
) -> Callable[[], Any]:
    """The vendor's call alone; for key padding on keys that were packed before."""
    if mask is None:
        return lambda: module.flash_attn_func(q, k, v, causal=case.is_causal)
    packed_q, packed_k, packed_v = q.flatten(0, 1), k[mask], v[mask]

    def ends(lengths: tuple[int, ...]) -> torch.Tensor:
        sums = [sum(lengths[:end]) for end in range(len(lengths) + 1)]
        return torch.tensor(sums, dtype=torch.int32, device="cuda")

    ends_q, ends_k = ends((case.queries,) * case.batch), ends(case.visible)
    return lambda: module.flash_attn_varlen_func(
        packed_q, packed_k, packed_v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k,
        max_seqlen_q=case.queries, max_seqlen_k=max(case.visible),
    )  # fmt: skip


def error(out: torch.Tensor, case: Case, mask: torch.Tensor | None, tensors: Any) -> float:
    """Relative error of some rows of the last batch item and head against float64."""
    q, k, v = (each[-1, :, -1].double() for each in tensors)
    rows = torch.arange(0, case.queries, max(1, case.queries // ROWS), device="cuda")
    scores = q[rows] @ k.T * case.head_dim**-0.5
    if case.is_causal:
        last = rows[:, None] + case.keys - case.queries
        scores = scores.masked_fill(torch.arange(case.keys, device="cuda") > last, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[-1], -math.inf)
    wanted = scores.softmax(-1) @ v
    return float((out[-1, rows, -1].double() - wanted).norm() / wanted.norm())


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds per call of each variant that runs, and why the others do not."""
    functions, mask, tensors = variants(case)
    found: dict[str, Any] = {"case": str(case), "failed": {}, "ran": {}, "error": {}, "first_s": {}}
    for generation in (3, 4):
        if f"direct{generation}" not in functions:
            found["failed"][f"direct{generation}"] = "no package of this generation loads"
    for name, function in list(functions.items()):
        try:
            polyattn.report().clear()
            start = time.perf_counter()
            out = function()
            torch.cuda.synchronize()
            found["first_s"][name] = round(time.perf_counter() - start, 3)
            if name in ("fa3", "fa4"):
                (row,) = polyattn.report().rows
                found["ran"][name] = row.facts.get("package", row.used)
                if row.facts.get("generation") != int(name[2]):
                    why = row.facts.get("passed_over", row.why)
                    raise RuntimeError(f"{found['ran'][name]} ran instead: {why}")
                found["error"][name] = error(out, case, mask, tensors)
        except Exception as problem:
            found["failed"][name] = f"{type(problem).__name__}: {problem}"[:300]
            del functions[name]
    # Enough calls between two events that their own cost, and a launch, vanish.
    estimate = case.flops / 600e12 * 1000
    calls = max(1, math.ceil(4 / max(estimate, 0.05)))

    def several(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                function()

        return run

    times = gpu_milliseconds(
        {name: several(function) for name, function in functions.items()},
        repeats=25 if estimate < 1 else 11,
    )
    found["ms"] = {name: value / calls for name, value in times.items()}
    found["tflops"] = {name: case.flops / value / 1e9 for name, value in found["ms"].items()}
    found["ratio"] = {
        generation: found["ms"][f"fa{generation}"] / found["ms"][f"direct{generation}"]
        for generation in (3, 4)
        if {f"fa{generation}", f"direct{generation}"} <= found["ms"].keys()
    }
    return found


FIRST_CALL = """
import time, torch, polyattn
q = torch.randn(1, 1024, 8, 128, device="cuda", dtype=torch.bfloat16)
start = time.perf_counter()
polyattn.attention(q, q, q, backend="fa4", config="strict_version=true")
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_calls() -> dict[str, str]:
    """Seconds of FA4's import and first call in a new process, without and with its disk cache.

    The cases above filled the cache.
    """
    found = {}
    for name, setting in (
        ("without", {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}),
        ("with", {}),
    ):
        variables = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("FLASH_ATTENTION_CUTE_DSL_CACHE")
        }
        try:
            answer = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], env={**variables, **setting},
                capture_output=True, text=True, timeout=40, check=True,
            )  # fmt: skip
            found[name] = f"{float(answer.stdout.split()[-1]):.1f} s"
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as problem:
            output = getattr(problem, "stderr", "") or ""
            found[name] = f"failed: {type(problem).__name__} {str(output)[-200:]}".strip()
    return found


def cells(found: dict[str, Any]) -> list[str]:
    if "ms" not in found:
        return [found["case"], *["-"] * 10, found["skipped"]]

    def shown(kind: str, name: Any, digits: int) -> str:
        return f"{found[kind][name]:.{digits}f}" if name in found[kind] else "-"

    row = [found["case"]]
    for generation in (3, 4):
        row += [
            f"{shown('ms', f'direct{generation}', 3)}",
            f"{shown('ms', f'fa{generation}', 3)} ({shown('tflops', f'fa{generation}', 0)})",
            shown("ratio", generation, 3),
        ]
    row += [f"{shown('ms', name, 3)} ({shown('tflops', name, 0)})" for name in ("torch", "cudnn")]
    row += [shown("error", name, 4) for name in ("fa3", "fa4")]
    problems = "; ".join(f"{name}: {why[:120]}" for name, why in found["failed"].items())
    return [*row, problems.replace("|", "/").replace("\n", " ")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=140, help="start no case after this long")
    arguments = parser.parse_args()
    begun = time.monotonic()
    torch.manual_seed(0)
    data: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in cases(arguments.quick):
            if time.monotonic() - begun > arguments.seconds - 40:
                data.append({"case": str(case), "skipped": "no time left"})
                continue
            try:
                data.append(measure(case))
            except Exception as problem:
                problem_text = f"{type(problem).__name__}: {problem}"[:300].replace("\n", " ")
                data.append({"case": str(case), "skipped": problem_text})
            torch.cuda.empty_cache()
            print(" | ".join(cells(data[-1])), flush=True)
    packages = sorted({name for each in data for name in each.get("ran", {}).values()})
    first = first_calls() if vendor(4) is not None else {}
    headings = ["case", "FA3 direct ms", "fa3 ms (TF/s)", "ratio", "FA4 direct ms", "fa4 ms (TF/s)",
                "ratio", "torch ms (TF/s)", "cuDNN ms (TF/s)", "error fa3", "error fa4",
                "problems"]  # fmt: skip
    note = (
        f"bf16, H=8. Packages: {', '.join(packages) or 'none'}. fa3 and fa4 are "
        "`polyattn.attention` with that backend name, ratio is its time over the vendor's direct "
        "call; TF/s count the products of visible keys, half of them for causal calls. Key "
        "padding: the direct call gets packed keys, fa packs them itself. Error: relative, "
        f"against float64, {ROWS} rows.\n\n"
    )
    if first:
        note += (
            f"FA4's import and first call in a new process: {first['without']} without its disk "
            f"cache, {first['with']} with it.\n\n"
        )
    save(arguments.output, "fa_kernels", "fa and the vendors' own calls",
         "python bench/fa_kernels.py", note + table(headings, [cells(each) for each in data]),
         {"cases": data, "first_call": first})  # fmt: skip


if __name__ == "__main__":
    main()
