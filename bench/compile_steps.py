"""Graphs compiled over 20 denoising steps, with step, timestep and layer changing every call.

python bench/compile_steps.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import RESULTS, save, table
from torch._dynamo.testing import CompileCounterWithBackend

import polyattn

STEPS, LAYERS = 20, 4


class Block(torch.nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)
        self.attention = polyattn.LocalAttention(layer=layer)
        self.out = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).unbind(2)
        return x + self.out(self.attention(q, k, v).flatten(2))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(*(Block(layer) for layer in range(LAYERS))).to(device)
    counter = CompileCounterWithBackend("inductor")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(1, 96, 64, device=device)
    worst = 0.0
    after_first = 0
    with torch.no_grad(), polyattn.forward_context(num_steps=STEPS, num_layers=LAYERS):
        for step in range(STEPS):
            with polyattn.forward_context(step=step, timestep=1000.0 - 50 * step):
                difference = (fast(x) - model(x)).abs().max().item()
            worst = max(worst, difference)
            if step == 0:
                after_first = counter.frame_count
    data = {
        "device": device,
        "graphs after the first step": after_first,
        f"graphs after {STEPS} steps": counter.frame_count,
        "recompiles after the first step": counter.frame_count - after_first,
        "largest difference to eager": worst,
    }
    save(arguments.output, f"compile_steps_{device}", "Recompiles over the steps of a run",
         "python bench/compile_steps.py", table(["figure", "value"], list(data.items())),
         data)  # fmt: skip


if __name__ == "__main__":
    main()
