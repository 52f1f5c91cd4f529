"""sage_attn against the vendor called directly, torch and FlashAttention 3, on one GPU.

Errors against float64 on a slice of 256 queries, on normally distributed tensors and on keys with a
large constant in each channel; milliseconds with torch's own choice and FlashAttention 3 beside
them. The vendor called directly shows its defects; the backend beside it shows them met. With
sageattention 2 installed the same tables are made of each of its kernels.

    python bench/sage_accuracy.py [--output FOLDER] [--seconds 80]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import importlib_metadata
import torch
import torch.nn.functional as F
from common import RESULTS, gpu_milliseconds, save, table

import polyattn

HEADS = 8
SLICE = 256
BIAS = 8.0  # standard deviation of the constant in each channel of the biased keys


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    head_dim: int
    biased: bool = False

    def __str__(self) -> str:
        keys = "biased k" if self.biased else "normal k"
        return f"Sq={self.queries} Sk={self.keys} D={self.head_dim} {keys}"


def cases() -> list[Case]:
    """Short lengths first: the defects are there."""
    found = [
        Case(512, keys, head_dim, biased)
        for keys in (77, 120, 200)
        for head_dim in (64, 128)
        for biased in (False, True)
    ]
    return found + [
        Case(length, length, head_dim, biased)
        for length in (32760, 75600)
        for head_dim in (128, 64)
        for biased in (False, True)
    ]


def speed_cases() -> list[Case]:
    found = [Case(length, length, d) for length in (32760, 75600) for d in (128, 64)]
    return [*found, Case(32760, 512, 128), Case(32760, 77, 128)]


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v as [B, S, H, D], bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    make: dict[str, Any] = {"device": "cuda", "generator": generator}
    q = torch.randn(1, case.queries, HEADS, case.head_dim, **make)
    k, v = (torch.randn(1, case.keys, HEADS, case.head_dim, **make) for _ in range(2))
    if case.biased:
        k += BIAS * torch.randn(1, 1, HEADS, case.head_dim, **make)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def rows_of(case: Case) -> torch.Tensor:
    step = max(1, case.queries // SLICE)
    return torch.arange(0, case.queries, step, device="cuda")[:SLICE]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """Attention of the slice in float64, head by head."""
    rows, outs = rows_of(case), []
    for head in range(HEADS):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T * case.head_dim**-0.5
        outs.append(scores.softmax(-1) @ v[0, :, head].double())
    return torch.stack(outs, dim=1)


def errors(out: torch.Tensor, expected: torch.Tensor, case: Case) -> dict[str, float]:
    found = out[0, rows_of(case)].double()
    difference = found - expected
    cosine = (found * expected).sum() / (found.norm() * expected.norm())
    return {
        "relative_l1": float(difference.abs().sum() / expected.abs().sum()),
        "norm_ratio": float(found.norm() / expected.norm()),
        "cosine": float(cosine),
        "worst_row": float((difference.norm(dim=-1) / expected.norm(dim=-1)).max()),
    }


def torch_default(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def fa3() -> Callable[..., torch.Tensor] | None:
    try:
        function = importlib.import_module("fa3_fwd_interface").flash_attn_func
    except Exception as problem:
        print(f"no FlashAttention 3 here: {type(problem).__name__}: {problem}")
        return None

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = function(q, k, v)
        return found[0] if isinstance(found, tuple) else found

    return call


def vendor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a user types; k is a copy, as 1.0.6 overwrites it."""
    return importlib.import_module("sageattention").sageattn(q, k, v, tensor_layout="NHD")


def configurations(major: int) -> dict[str, dict[str, Any]]:
    if major < 2:
        return {"sage_attn": {}}
    names = ("auto", "triton", "fp16_cuda", "fp8_cuda")
    return {f"sage_attn {name}": {"kernel": name} for name in names}


def variants_of(major: int, *, exact: bool) -> dict[str, Callable[..., torch.Tensor]]:
    found: dict[str, Callable[..., torch.Tensor]] = {"torch": torch_default}
    flash = fa3() if exact else None
    if flash is not None:
        found["fa3"] = flash
    found["sageattn directly"] = vendor
    for name, config in configurations(major).items():
        found[name] = polyattn.LocalAttention("sage_attn", config=config)
    return found


def measure_errors(major: int, deadline: float) -> list[dict[str, Any]]:
    variants = variants_of(major, exact=False)
    data = []
    for case in cases():
        if time.monotonic() > deadline:
            data.append({"case": str(case), "variant": "-", "problem": "out of time"})
            continue
        q, k, v = inputs(case)
        expected = oracle(q, k, v, case)
        before = k.clone()
        for name, function in variants.items():
            row: dict[str, Any] = {"case": str(case), **asdict(case), "variant": name}
            try:
                polyattn.report().clear()
                own = k if name.startswith("sage_attn") else k.clone()
                out = function(q, own, v)
                row |= errors(out, expected, case)
                if name.startswith("sage_attn"):
                    row["k_kept"] = torch.equal(k, before)
                    row["facts"] = dict(polyattn.report().rows[0].facts)
            except Exception as problem:
                row["problem"] = f"{type(problem).__name__}: {problem}"[:300]
            data.append(row)
        del q, k, v, before, expected
    return data


def measure_speed(major: int, deadline: float) -> list[dict[str, Any]]:
    variants = variants_of(major, exact=True)
    data = []
    for case in speed_cases():
        row: dict[str, Any] = {"case": str(case), **asdict(case), "ms": {}, "problems": {}}
        data.append(row)
        if time.monotonic() > deadline:
            row["problems"]["all"] = "out of time"
            continue
        q, k, v = inputs(case)
        working = {}
        for name, function in variants.items():
            call = partial(function, q, k.clone(), v)
            try:
                call()
                torch.cuda.synchronize()
                working[name] = call
            except Exception as problem:
                row["problems"][name] = f"{type(problem).__name__}: {problem}"[:300]
        try:
            row["ms"] = gpu_milliseconds(working, repeats=5, warmup=1)
        except Exception as problem:
            row["problems"]["timing"] = f"{type(problem).__name__}: {problem}"[:300]
        del q, k, v, working
    return data


def error_table(data: list[dict[str, Any]]) -> str:
    rows = []
    for row in data:
        if "problem" in row:
            rows.append([row["case"], row["variant"], row["problem"], "", "", "", "", ""])
            continue
        facts = row.get("facts", {})
        rows.append([
            row["case"], row["variant"], f"{row['relative_l1']:.4f}", f"{row['norm_ratio']:.4f}",
            f"{row['cosine']:.5f}", f"{row['worst_row']:.3f}",
            {True: "yes", False: "**no**"}.get(row.get("k_kept"), ""), facts.get("tail", ""),
        ])  # fmt: skip
    headings = ["case", "variant", "relative L1", "norm ratio", "cosine", "worst row", "k kept",
                "last block of keys"]  # fmt: skip
    return table(headings, rows)


def speed_table(data: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in data for name in row["ms"]))
    rows = []
    for row in data:
        flops = 4 * HEADS * row["queries"] * row["keys"] * row["head_dim"]
        cells = []
        for name in names:
            ms = row["ms"].get(name)
            cells.append("-" if ms is None else f"{ms:.3f} ({flops / ms / 1e9:.0f})")
        problems = "; ".join(f"{name}: {text}" for name, text in row["problems"].items())
        rows.append([row["case"], *cells, problems])
    return table(["case", *(f"{name}: ms (TF/s)" for name in names), "problems"], rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=80.0)
    arguments = parser.parse_args()
    start = time.monotonic()
    version = importlib_metadata.version("sageattention")
    major = int(version.partition(".")[0])
    with torch.no_grad():
        accuracy = measure_errors(major, start + 0.6 * arguments.seconds)
        speed = measure_speed(major, start + arguments.seconds)
    name = "sage_accuracy" if major < 2 else f"sage{major}_accuracy"
    text = (
        f"sageattention {version}; bfloat16, B=1, H={HEADS}. `sageattn directly` is what a user "
        "of the package types. Errors are those of 256 queries against float64; a norm ratio "
        "below 1 with a cosine near 1 is a softmax over too many keys. TF/s counts 4 B H Sq Sk D.\n"
        f"\n## Errors\n\n{error_table(accuracy)}\n\n## Milliseconds\n\n{speed_table(speed)}"
    )
    save(arguments.output, name, f"sage_attn with sageattention {version}",
         "python bench/sage_accuracy.py", text, {"errors": accuracy, "speed": speed})  # fmt: skip


if __name__ == "__main__":
    main()
