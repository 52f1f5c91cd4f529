"""How attention over several GPUs scales, on paper: the tables of docs/parallelism.md.

A model of one call of self-attention: its products at the speed of one GPU, what is copied in its
memory, what is sent to other GPUs of the host and to other hosts. Speeds are those that
`sequence_parallel.py` measured (bench/results/sequence_parallel.json); what is not measured yet
is an assumption, and the printed text says which. Where there are measurements, the model's two-GPU
times stand beside them.

    python bench/scaling_model.py                                # prints the tables
    python bench/scaling_model.py --write docs/parallelism.md    # puts them into the document
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common import RESULTS, table

HOST = 8  # GPUs of a host
ELEMENT = 2  # bytes, bf16
BEGIN, END = "<!-- scaling model: begin -->", "<!-- scaling model: end -->"


@dataclass(frozen=True)
class Model:
    """A video model's self-attention in one forward."""

    name: str
    heads: int
    layers: int
    tokens: int = 75600
    width: int = 128


MODELS = (Model("Wan 14B, 720p", 40, 40), Model("Wan 1.3B, 720p", 12, 30))


@dataclass(frozen=True)
class Speeds:
    """What the model is fed with."""

    tflops: float = 710.0  # of dense attention on one GPU: fa3 in bench/results/fa_kernels.md
    link: float = 300.0  # GB/s a GPU sends to others of its host
    ring_link: float = 300.0  # the same, of a rotation
    network: float = 50.0  # GB/s a GPU sends to another host: 400 Gb/s
    packing: float = 2400.0  # GB/s read and written while packing and unpacking
    merging: float = 2400.0  # the same, while the parts of a ring are merged
    latency: float = 0.05  # ms of one collective, whatever its size
    hidden: float = 1.0  # share of a rotation that attention hides, where it takes longer


WORDS = {
    "tflops": "attention on one GPU, TFLOP/s",
    "link": "all-to-all in a host, GB/s a GPU",
    "ring_link": "rotation in a host, GB/s a GPU",
    "network": "between hosts, GB/s a GPU",
    "packing": "packing and unpacking, GB/s read and written",
    "merging": "merging the parts of a ring, GB/s read and written",
    "latency": "latency of a collective, ms",
    "hidden": "hidden share of a rotation",
}


@dataclass(frozen=True)
class Cost:
    """Of one call, in ms on the GPU that takes longest, and MB that each GPU sends."""

    attention: float
    copying: float
    waiting: float  # for what arrives
    inside: float  # MB to GPUs of the host
    outside: float  # MB to another host, of the GPU that sends most there

    @property
    def ms(self) -> float:
        return self.attention + self.copying + self.waiting


def one_gpu(model: Model, speeds: Speeds) -> float:
    return 4 * model.tokens**2 * model.heads * model.width / speeds.tflops / 1e9


def merged(ring: int) -> int:
    """How often a bf16 tensor like q is read or written around a ring: k and v stacked 4, the first
    result in float32 3, each further one converted and joined 9, the result rounded 3."""
    return 10 + 9 * (ring - 1)


def cost(model: Model, ulysses: int, ring: int, speeds: Speeds) -> Cost:
    """A call on ``ulysses`` x ``ring`` GPUs, hosts filled one after the other."""
    gpus = ulysses * ring
    size = model.tokens * model.width * ELEMENT  # of one head's q, k, v or result
    heads = -(-model.heads // ulysses)  # of the GPU with most
    shard = size * model.heads / gpus

    # Ulysses: q, k and v out, the result back; each peer gets one part of the shard.
    near = min(ulysses, HOST)
    inside = 4 * shard * (near - 1) / ulysses
    outside = 4 * shard * (ulysses - near) / ulysses
    waiting = max(inside / speeds.link, outside / speeds.network) / 1e6
    waiting += 2 * speeds.latency * (ulysses > 1)
    copying = 8 * shard / speeds.packing / 1e6 * (ulysses > 1)  # read and written, packed, unpacked

    # Ring: own queries by one part of the keys after the other, the next one on its way.
    own = size / ring * heads
    compute = one_gpu(model, speeds) * heads / model.heads / ring**2
    if ring > 1:
        crosses = gpus > HOST
        rate = speeds.network if crosses else speeds.ring_link
        rotation = 2 * own / rate / 1e6 + speeds.latency
        waiting += (ring - 1) * max(rotation * (1 - speeds.hidden), rotation - compute)
        copying += own * merged(ring) / speeds.merging / 1e6
        sent = 2 * own * (ring - 1)
        inside, outside = (inside, outside + sent) if crosses else (inside + sent, outside)
    return Cost(compute * ring, copying, waiting, inside / 1e6, outside / 1e6)


def measured(data: Mapping[str, Any]) -> tuple[Speeds, set[str]]:
    """Speeds from the results of sequence_parallel.py, and which of them are from there.

    Those of a link are the slope over all sizes, so that a latency is not taken for a low rate;
    the others are those of the size with the most tokens and heads.
    """
    found: dict[str, float] = {}
    ranks = data["ranks"]
    rows = best_dense(data.get("attention", []))
    if rows:
        row, times = rows[-1], rows[-1]["ms"]
        shard = row["tokens"] * row["heads"] * row["width"] * ELEMENT / ranks
        if "one" in times:
            found["tflops"] = 4 * row["tokens"] * shard * ranks / ELEMENT / times["one"] / 1e9
        if {"one", "ring, attention alone"} <= times.keys():
            merging = times["ring, attention alone"] - times["one"] / ranks
            if merging > 0:
                found["merging"] = shard * merged(ranks) / merging / 1e6
        if "overlap" in row:
            found["hidden"] = row["overlap"]
    moves = by_size(data.get("communication", []))
    sent, passed = (
        [(each["bytes"][name], each["ms"][name]) for each in moves for name in names
         if name in each["ms"]]
        for names in (("sending in", "sending out"), ("rotation",))
    )  # fmt: skip
    for name, points in (("link", sent), ("ring_link", passed)):
        if len({size for size, _ in points}) > 1:
            slope, latency = statistics.linear_regression(*zip(*points, strict=True))
            if slope > 0:
                found[name] = 1 / slope / 1e6
                if name == "link":
                    found["latency"] = max(0.0, latency)
    if (
        moves
        and {"all-to-all in", "all-to-all out", "sending in", "sending out"}
        <= moves[-1]["ms"].keys()
    ):
        row, times = moves[-1], moves[-1]["ms"]
        packing = sum(times[f"all-to-all {way}"] - times[f"sending {way}"] for way in ("in", "out"))
        if packing > 0:
            shard = row["tokens"] * row["heads"] * row["width"] * ELEMENT / ranks
            found["packing"] = 8 * shard / packing / 1e6
    return replace(Speeds(), **found), set(found)


def by_size(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda each: (each["tokens"], each["heads"]))


def best_dense(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {each["backend"] for each in rows}
    name = "fa" if "fa" in names else "torch_sdpa"
    return by_size([each for each in rows if each["backend"] == name])


def layouts(gpus: int) -> list[tuple[int, int]]:
    """The ways worth a look: all Ulysses, Ulysses in a host with a ring between, all ring."""
    mixed = (HOST, gpus // HOST) if gpus > HOST else (gpus // 2, 2)
    wanted = [(gpus, 1), mixed, *([(4, gpus // 4)] if gpus > HOST else []), (1, gpus)]
    return list(dict.fromkeys(wanted))


def scaling_table(model: Model, speeds: Speeds) -> str:
    headings = ["GPUs", "Ulysses x ring", "heads of a GPU", "MB sent by a GPU in a step: in its "
                "host", "between hosts", "ms a call", "of it copying", "of it waiting",
                "s a step", "speed-up"]  # fmt: skip
    alone = one_gpu(model, speeds)
    rows = [["1", "-", str(model.heads), "0", "0", f"{alone:.1f}", "0.0", "0.0",
             f"{alone * model.layers / 1000:.2f}", "1.00"]]  # fmt: skip
    for gpus in (2, 4, 8, 16, 24, 32):
        costs = {each: cost(model, *each, speeds) for each in layouts(gpus)}
        best = min(costs.values(), key=lambda each: each.ms)
        for (ulysses, ring), each in costs.items():
            up = f"{alone / each.ms:.2f}"
            most = -(-model.heads // ulysses)
            even = "" if model.heads % ulysses == 0 else " at most"
            rows.append([
                f"{gpus}" + (f" ({gpus // HOST} hosts)" if gpus > HOST else ""),
                f"{ulysses} x {ring}", f"{most}{even}",
                f"{each.inside * model.layers:,.0f}", f"{each.outside * model.layers:,.0f}",
                f"{each.ms:.1f}", f"{each.copying:.1f}", f"{each.waiting:.1f}",
                f"{each.ms * model.layers / 1000:.2f}", f"**{up}**" if each is best else up,
            ])  # fmt: skip
    return (
        f"{model.name}: {model.tokens:,} tokens, {model.heads} heads, {model.layers} layers\n\n"
        + (table(headings, rows))
    )


def hiding_table(speeds: Speeds) -> str:
    """From how many tokens a GPU on a rotation takes less time than the attention beside it."""
    rows = [
        [where, f"{rate:.0f}", f"{ELEMENT * speeds.tflops * 1e3 / 2 / rate:,.0f}"]
        for where, rate in (
            ("in a host", speeds.ring_link), ("between hosts, 400 Gb/s", speeds.network),
            ("between hosts, 100 Gb/s", speeds.network / 4),
        )
    ]  # fmt: skip
    return table(["link", "GB/s a GPU", "tokens of a part, at least"], rows)


def crossing_table(speeds: Speeds) -> str:
    """Below which rate of its link a ring is faster than Ulysses, heads coming out even."""
    rows = []
    for gpus in (2, 4, 8):
        sent = 4 * (gpus - 1) / gpus**2 - 2 * (gpus - 1) / gpus * (1 - speeds.hidden)
        copied = merged(gpus) / gpus / speeds.merging - 8 / gpus / speeds.packing
        crossing = f"{sent / copied:,.0f}" if sent > 0 and copied > 0 else "never"
        rows.append([f"{gpus}", crossing])
    return table(["GPUs", "the ring is faster below, GB/s a GPU"], rows)


def check_table(data: Mapping[str, Any], speeds: Speeds) -> str:
    """The model beside every measured size, in ms."""
    ranks = data["ranks"]
    rows = []
    for each in best_dense(data["attention"]):
        model = Model("", each["heads"], 1, each["tokens"], each["width"])
        own = speeds
        if "one" in each["ms"]:  # the GPU's speed at this size: what is checked is the spreading
            products = 4 * each["tokens"] ** 2 * each["heads"] * each["width"]
            own = replace(speeds, tflops=products / each["ms"]["one"] / 1e9)
        for kind, layout in (("ulysses", (ranks, 1)), ("ring", (1, ranks))):
            if kind in each["ms"]:
                told, real = cost(model, *layout, own).ms, each["ms"][kind]
                rows.append([each["size"], kind, f"{told:.2f}", f"{real:.2f}",
                             f"{100 * (told / real - 1):+.1f} %"])  # fmt: skip
    return table(["size", "way", "model, ms", "measured, ms", "difference"], rows)


def measured_table(data: Mapping[str, Any]) -> str:
    """Every call and forward that was measured, on one GPU and on all."""
    rows = []
    for each in by_size(data.get("attention", [])):
        times = each["ms"]
        rows.append([f"attention, {each['backend']}, {each['size']}", *compared(
            times, "one", "ulysses", "ring"
        )])  # fmt: skip
    for each in data.get("steps", []):
        times = each.get("ms", {})
        first, way = next(iter(times), ""), f"{data['ranks']} x polyattn, "
        rows.append([f"a forward, {each['case']}", *compared(
            times, first, f"{way}Ulysses", f"{way}ring"
        )])  # fmt: skip
    headings = ["what", "one GPU, ms", "Ulysses, ms (speed-up)", "ring, ms (speed-up)"]
    return table(headings, rows)


def compared(times: Mapping[str, float], one: str, *others: str) -> list[str]:
    alone = times.get(one)
    cells = ["-" if alone is None else f"{alone:.1f}"]
    for each in others:
        value = times.get(each)
        up = "" if alone is None or value is None else f" ({alone / value:.2f})"
        cells.append("-" if value is None else f"{value:.1f}{up}")
    return cells


def text(data: Mapping[str, Any] | None) -> str:
    speeds, known = measured(data) if data else (Speeds(), set())
    given = []
    for each in fields(Speeds):
        value = getattr(speeds, each.name)
        source = "measured on two GPUs" if each.name in known else "assumed"
        if each.name == "tflops" and not known:
            source = "measured, bench/results/fa_kernels.md"
        given.append([WORDS[each.name], f"{value:.2f}" if value < 10 else f"{value:.0f}", source])
    parts = [
        "What the model is fed with:",
        table(["speed", "value", "from"], given),
        *(scaling_table(model, speeds) for model in MODELS),
        "Bold: the fastest way at that number of GPUs. A step is one forward; only self-attention "
        "is counted.",
        "A rotation hides behind attention from so many tokens in a part of the ring:",
        hiding_table(speeds),
        "A ring whose rotations are hidden still merges its parts; Ulysses waits for what it\n"
        "sends, and copies less. With one rate for all GPUs, and heads that come out even:",
        crossing_table(speeds),
    ]
    if data and data.get("attention"):
        parts += [
            f"The model beside what was measured on {data['ranks']} GPUs (the speed of one GPU "
            "taken from the same row):",
            check_table(data, speeds),
            f"All of what was measured on {data['ranks']} GPUs:",
            measured_table(data),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "sequence_parallel.json")
    parser.add_argument("--write", type=Path, help="a document with the marks of this script")
    arguments = parser.parse_args()
    data = None
    if arguments.results.is_file():
        data = json.loads(arguments.results.read_text())["data"]
    made = text(data)
    print(made)
    if arguments.write is not None:
        page = arguments.write.read_text()
        if BEGIN not in page or END not in page:
            raise SystemExit(f"{arguments.write} has no lines {BEGIN} and {END}")
        # A function, since a replacement text has escapes of its own.
        filled = re.sub(
            f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{made}\n\n{END}", page,
            flags=re.DOTALL,
        )  # fmt: skip
        arguments.write.write_text(filled)


if __name__ == "__main__":
    main()
