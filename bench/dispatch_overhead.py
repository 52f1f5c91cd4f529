"""What a call through polyattn costs beside torch's own call.

On the CPU: microseconds per call on tiny tensors, one thread. On a GPU: the same (time to enqueue),
and milliseconds at video lengths.

    python bench/dispatch_overhead.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, cpu_microseconds, gpu_milliseconds, save, table

import polyattn


class Direct(torch.nn.Module):
    """A layer that calls torch directly: what LocalAttention is compared with."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return direct(q, k, v)


def direct(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def variants(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    q, k, v = (torch.randn(*shape, device=device, dtype=dtype) for _ in range(3))
    layer, direct_layer = polyattn.LocalAttention(), Direct()
    found = {
        "torch": lambda: direct(q, k, v),
        "torch in a module": lambda: direct_layer(q, k, v),
        "polyattn.attention": lambda: polyattn.attention(q, k, v),
        "LocalAttention": lambda: layer(q, k, v),
    }
    try:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        found["diffusers dispatch_attention_fn"] = lambda: dispatch_attention_fn(q, k, v)
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, data = [], {}
    with torch.no_grad():
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        for device in devices:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            times = cpu_microseconds(variants(device, (1, 8, 2, 16), dtype))
            data[f"{device} tiny, us"] = times
            for name, value in times.items():
                base = times["torch in a module" if name == "LocalAttention" else "torch"]
                rows.append([device, "B=1 S=8 H=2 D=16", name, f"{value:.2f} us",
                             f"{value - base:+.2f} us"])  # fmt: skip
        if "cuda" in devices:
            for length in (32760, 75600):
                times = gpu_milliseconds(variants("cuda", (1, length, 8, 128), torch.bfloat16))
                data[f"cuda {length}, ms"] = times
                for name, value in times.items():
                    rows.append(["cuda", f"B=1 S={length} H=8 D=128", name, f"{value:.3f} ms",
                                 f"{value / times['torch']:.3f} x"])  # fmt: skip
    name = "dispatch_overhead" + ("_gpu" if "cuda" in devices else "_cpu")
    text = table(["device", "shape", "call", "time", "against torch"], rows)
    note = "\n\nLocalAttention is compared with a module that calls torch directly."
    save(arguments.output, name, "Cost of a call", "python bench/dispatch_overhead.py",
         text + note, data)  # fmt: skip


if __name__ == "__main__":
    main()
