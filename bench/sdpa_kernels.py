"""torch_sdpa against torch's default and each of torch's kernels, on one GPU.

For every shape, layout, mask and dtype: milliseconds of torch's own choice, of each kernel forced
through the plugin (`kernel=...`), and of the plugin's `auto`; the kernel torch picked; the error of
`auto` against float64 on a slice. What is timed is a `LocalAttention`, checks and report included.

    python bench/sdpa_kernels.py [--output FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, gpu_milliseconds, save, table

import polyattn
from polyattn.errors import PolyattnError

KERNELS = ("cudnn", "flash", "efficient")


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    head_dim: int
    layout: str = "bshd"
    mask: str = "none"
    is_causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    heads: int = 8
    kv_heads: int = 8
    batch: int = 1


def cases(quick: bool) -> list[Case]:
    lengths = (128, 512, 1024, 2304, 8192, 32760, 75600)
    found = [Case(s, s, d) for d in (64, 128) for s in lengths]
    if quick:
        return found[:4]
    found += [
        Case(s, s, 128, layout) for s in (1024, 32760, 75600) for layout in ("bhsd", "packed")
    ]
    found += [Case(s, 512, 128) for s in (1024, 32760)]
    found += [Case(s, 77, 128) for s in (1024, 32760)]
    found += [Case(s, s, 128, is_causal=True) for s in (1024, 8192, 32760)]
    found += [
        Case(s, s, 128, mask=mask)
        for s in (1024, 8192)
        for mask in ("key_padding", "boolean", "additive")
    ]
    found += [
        Case(32760, 32760, 128, mask="key_padding"),
        Case(32760, 512, 128, mask="key_padding"),
    ]
    found += [Case(s, s, d) for s in (1024, 8192) for d in (32, 40, 80, 96, 160, 256)]
    found += [Case(s, s, 128, dtype=torch.float16) for s in (1024, 32760)]
    found += [Case(s, s, 64, dtype=torch.float32) for s in (1024, 8192)]
    found += [Case(8192, 8192, 128, kv_heads=2)]
    found += [Case(2304, 2304, 64, heads=4, kv_heads=4, batch=2)]
    return found


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k, v as [B, S, H, D] in the case's memory layout."""
    make = {"device": "cuda", "dtype": case.dtype}
    b, h, d = case.batch, case.heads, case.head_dim
    if case.layout == "packed":
        return torch.randn(b, case.queries, 3, h, d, **make).unbind(2)
    shapes = [(b, case.queries, h, d)] + [(b, case.keys, case.kv_heads, d)] * 2
    if case.layout == "bhsd":
        return tuple(torch.randn(b, n, s, d, **make).transpose(1, 2) for b, s, n, d in shapes)
    return tuple(torch.randn(*shape, **make) for shape in shapes)


def mask_of(case: Case) -> torch.Tensor | None:
    if case.mask == "none":
        return None
    if case.mask == "key_padding":
        keep = torch.arange(case.keys, device="cuda") < case.keys - case.keys // 8
        return keep[None, None, None, :].expand(case.batch, -1, -1, -1).contiguous()
    keep = torch.rand(1, 1, case.queries, case.keys, device="cuda") > 0.2
    if case.mask == "boolean":
        return keep
    return torch.zeros(keep.shape, device="cuda", dtype=case.dtype).masked_fill(~keep, -1e4)


def torch_default(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, case: Case
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=case.is_causal, enable_gqa=case.heads != case.kv_heads,
    ).transpose(1, 2)  # fmt: skip


def error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case,
          mask: torch.Tensor | None) -> float:  # fmt: skip
    """Relative error of some rows of the first batch item and head against float64."""
    rows = torch.arange(0, case.queries, max(1, case.queries // 64), device="cuda")
    head = case.heads - 1
    group = case.heads // case.kv_heads
    scores = q[0, rows, head].double() @ k[0, :, head // group].double().T * case.head_dim**-0.5
    if case.is_causal:
        scores = scores.masked_fill(
            torch.arange(case.keys, device="cuda") > rows[:, None], float("-inf")
        )
    if mask is not None:
        part = mask[0, 0, 0:1] if mask.shape[2] == 1 else mask[0, 0, rows]
        scores = (
            scores.masked_fill(~part, float("-inf"))
            if part.dtype is torch.bool
            else scores + part.double()
        )
    wanted = scores.softmax(-1) @ v[0, :, head // group].double()
    return float((out[0, rows, head].double() - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows, data = [], []
    for case in cases(arguments.quick):
        q, k, v = inputs(case)
        mask = mask_of(case)
        gqa = case.heads != case.kv_heads
        variants: dict[str, Callable[[], torch.Tensor]] = {
            "torch": partial(torch_default, q, k, v, mask, case),
        }
        refused = {}
        for kernel in ("auto", *KERNELS):
            layer = polyattn.LocalAttention(
                "torch_sdpa", config={"kernel": kernel}, is_causal=case.is_causal, enable_gqa=gqa
            )
            call = partial(layer, q, k, v, attn_mask=mask)
            try:
                call()
                torch.cuda.synchronize()
                variants[kernel] = call
            except PolyattnError:
                refused[kernel] = "refused"
            except RuntimeError as problem:
                refused[kernel] = f"failed: {problem}"[:200]
        if case.layout == "packed" and "cudnn" in variants:
            copied = variants["cudnn"]
            variants["cudnn on copies"] = lambda f=copied, t=(q, k, v): f.func(
                *(x.contiguous() for x in t), attn_mask=None
            )
        with torch.no_grad():
            times = gpu_milliseconds(variants)
            picked = torch._fused_sdp_choice(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, 0.0,
                case.is_causal, enable_gqa=gqa,
            )  # fmt: skip
            polyattn.report().clear()
            out = variants["auto"]()
            ran = polyattn.report().rows[0].facts.get("kernel")
            relative = error(out, q, k, v, case, mask)
        name = (
            f"B={case.batch} Sq={case.queries} Sk={case.keys} H={case.heads}/{case.kv_heads} "
            f"D={case.head_dim} {str(case.dtype)[6:]} {case.layout}"
            + (" causal" if case.is_causal else "")
            + (f" {case.mask}" if case.mask != "none" else "")
        )
        torch_picked = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(picked, str(picked))
        data.append({"case": name, "ms": times, "refused": refused, "torch_picked": torch_picked,
                     "auto_ran": ran, "error": relative})  # fmt: skip
        cells = [f"{times[each]:.3f}" if each in times else "-" for each in
                 ("torch", "auto", *KERNELS, "cudnn on copies")]  # fmt: skip
        rows.append([name, torch_picked, ran, *cells, f"{times['torch'] / times['auto']:.2f}",
                     f"{relative:.4f}"])  # fmt: skip
        print(rows[-1], flush=True)
        del q, k, v, mask, out, variants
    headings = ["case", "torch picks", "auto runs", "torch ms", "auto ms", *KERNELS,
                "cudnn on copies", "torch/auto", "error of auto"]  # fmt: skip
    note = (
        "Milliseconds. Layout bshd: contiguous [B, S, H, D]; bhsd: a transposed view of contiguous "
        "[B, H, S, D]; packed: views into one [B, S, 3, H, D]. A torch/auto above 1 means auto is "
        "faster. '-': the kernel does not take the case.\n\n"
    )
    save(arguments.output, "sdpa_kernels", "torch_sdpa and torch's own kernels",
         "python bench/sdpa_kernels.py", note + table(headings, rows), data)  # fmt: skip


if __name__ == "__main__":
    main()
