"""Seconds of every stage of `polyattn generate` with its defaults, and of the whole process.

python bench/generate_stages.py [--runs 3] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, save, table

PROGRAM = str(Path(sys.executable).with_name("polyattn"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    stages: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(arguments.runs):
            command = [PROGRAM, "generate", "--json", "--output", f"{folder}/{run}.mp4"]
            start = time.perf_counter()
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            whole = time.perf_counter() - start
            told = json.loads(answer.stdout)
            for name, seconds in {**told["seconds"], "whole process": whole}.items():
                stages.setdefault(name, []).append(seconds)
    rows = [[name, f"{statistics.median(each):.2f}", f"{min(each):.2f} to {max(each):.2f}"]
            for name, each in stages.items()]  # fmt: skip
    note = (
        f"\n\nMedian and range of {arguments.runs} runs: {told['num_frames']} frames of "
        f"{told['width']}x{told['height']}, {told['num_inference_steps']} steps, guidance "
        f"{told['guidance_scale']}, {told['device']}, {told['dtype']}."
    )
    save(arguments.output, "generate_cpu", "Stages of generate", "python bench/generate_stages.py",
         table(["stage", "seconds", "range"], rows) + note, stages)  # fmt: skip


if __name__ == "__main__":
    main()
