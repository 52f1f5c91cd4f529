"""Whole-process times of importing polyattn and of the commands that list things.

Each command runs in a fresh interpreter; a figure is the median of the runs, and the bare
interpreter's median is subtracted where it says so.

    python bench/startup.py [--runs 15] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, save, table

PROGRAM = str(Path(sys.executable).with_name("polyattn"))
COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import polyattn": [sys.executable, "-c", "import polyattn"],
    "polyattn.backends()": [sys.executable, "-c", "import polyattn; polyattn.backends()"],
    "polyattn --help": [PROGRAM, "--help"],
    "polyattn backends": [PROGRAM, "backends"],
    "polyattn matrix": [PROGRAM, "matrix"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import polyattn, torch; polyattn.attention": [
        sys.executable, "-c", "import torch, polyattn; polyattn.attention",
    ],
    "import diffusers.models.attention_dispatch": [
        sys.executable, "-c", "import diffusers.models.attention_dispatch",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for run in range(arguments.runs + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if run:  # the first run fills the file cache
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    bare = medians["bare interpreter"]
    rows = [[name, f"{value:.3f} s", f"{value - bare:+.3f} s"] for name, value in medians.items()]
    text = table(["command", "median", "over a bare interpreter"], rows)
    save(arguments.output, "startup", "Start-up times", "python bench/startup.py",
         f"{text}\n\nMedian of {arguments.runs} runs in turns.", medians)  # fmt: skip


if __name__ == "__main__":
    main()
