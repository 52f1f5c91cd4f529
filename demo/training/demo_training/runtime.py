"""Small things both training stages share: device set-up, averaging, schedules, log lines, and
what several processes of one run need to agree on."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    """The processes of one training run, one for each GPU; alone when there is only one.

    Started by `torchrun`, whose environment variables it reads. Every process trains on clips of
    its own and on the mean of all gradients, so that all of them hold the same weights.
    """

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device(device)
        if self.size == 1:
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.size)
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, number: float) -> float:
        """The first process's value, so that clocks that differ lead to one schedule."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def log(*words: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)


def prepare(device: torch.device) -> None:
    """Let CUDA use its fast matrix units; a CPU is left as it is."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def machine(device: torch.device) -> dict[str, Any]:
    """What the run took place on, for the training record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    packages = ("torch", "diffusers", "transformers", "tokenizers", "safetensors")
    return {
        "device": name or "cpu",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


class Clock:
    """Share of a time budget that has passed. Schedules follow it, not a step count, so that the
    same command trains to the end of its schedule on a slower machine too."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        return self.elapsed / self.seconds


class MovingAverage:
    """Exponential moving average of parameters, quicker to follow during the first steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        for target, value in zip(parameters, self.average, strict=True):
            target.copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps)


def cosine(share: float, floor: float = 0.02) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def constant_then_linear(share: float, turn: float, floor: float = 0.01) -> float:
    """One until `turn`, then straight down to `floor` at the end."""
    return 1.0 if share < turn else max(floor, (1 - share) / (1 - turn))


def rounded(values: Sequence[float] | Tensor, digits: int = 5) -> list[float]:
    return [round(float(v.detach() if isinstance(v, Tensor) else v), digits) for v in values]
