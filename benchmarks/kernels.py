"""Speed of zq's CUDA kernels beside torch's, in one process.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --markdown benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --plot roofline.png benchmarks/results/kernels-h100.json

Each row is a CUDA graph of as many calls as make their operands 512 MB, so that weights come from memory as
they do in a model. It is replayed for 10 ms after a pause of 50 ms, five times, and the median counts; then
for 0.3 s without a pause, which shows what the power limit takes ("sustained"). Data are random: the clock of
a GPU depends on them. Products take activations that are quantized already; quantizing them is in the other
table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kernel_peers import installed, peer_rows
from kernel_rows import SHAPES, Row, activation_rows, product_rows
from kernel_tables import plot
from pages import all_tables
from protocol import commit_of, environment

from zq.kernels import cuda, nvrtc
from zq.kernels.table import UNITS
from zq.kernels.table_gemm import CEILINGS

BURST, PAUSE, ROUNDS, SUSTAINED = 0.01, 0.05, 5, 0.3  # seconds, but for the number of rounds
ITERATIONS = 20_000  # of the bare instruction


def seconds(calls: list[Callable[[], Any]], at_length: float = SUSTAINED) -> tuple[float, float]:
    """(in bursts, sustained for so many seconds) of one call, in a graph of all of them."""
    for call in calls[:2]:
        call()  # loads kernels
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # workspaces belong to the stream
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        once = _elapsed(graph, 1)
        bursts = []
        for _ in range(ROUNDS):
            time.sleep(PAUSE)
            bursts.append(_elapsed(graph, max(1, round(BURST / once))))
        sustained = _elapsed(graph, max(1, round(at_length / once)))
    graph.reset()
    return median(bursts) / len(calls), sustained / len(calls)


def _elapsed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Seconds of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / replays


def measured(row: Row, at_length: float) -> dict[str, Any]:
    burst, sustained = seconds(row.make(row.copies), at_length)
    facts = {key: getattr(row, key) for key in ("table", "kernel", "m", "n", "k", "bytes", "operations")}
    return facts | _microseconds(burst, sustained)


def _microseconds(burst: float, sustained: float) -> dict[str, float]:
    return {"us": round(burst * 1e6, 3), "sustained_us": round(sustained * 1e6, 3)}


def ceilings(device: cuda.Device) -> Iterator[dict[str, Any]]:
    """Operations per second of the bare tensor-core instruction of sm_90a with weights in registers."""
    if device.number != 90:
        return
    data = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(4, dtype=torch.int32, device="cuda")
    arguments = [cuda.pointer(data), ctypes.c_int(ITERATIONS), cuda.pointer(sink)]
    for unit in CEILINGS:
        UNITS[unit.name] = unit
        for entry, n in (("n128", 128), ("n256", 256)):
            grid, options = (device.sms, 1, 1), {"shared": n * 128}
            call = partial(cuda.launch, device, unit.name, entry, grid, 256, arguments, **options)
            times = _microseconds(*seconds([call]))
            sizes = {"m": 0, "n": n, "k": 0, "bytes": 0}
            sizes["operations"] = device.sms * 2 * 64 * n * 128 * 2 * ITERATIONS
            kernel = f"bare wgmma of {unit.name.removeprefix('ceiling_')}, N = {n}"
            yield {"table": "ceiling", "kernel": kernel, **sizes, **times}


def rows(args: argparse.Namespace, arch: int) -> Iterator[Row]:
    ms = [int(m) for m in args.tokens.split(",")]
    if "activations" in args.only:
        yield from activation_rows(ms, "cuda")
    if "products" in args.only:
        shapes = {shape: None for model in args.shapes.split(",") for shape in SHAPES[model].values()}
        for n, k in shapes:
            yield from product_rows(ms, n, k, "cuda", arch)
            for package in installed() if args.peers else ():
                yield from _peers(package, ms, n, k)


def _peers(package: str, ms: list[int], n: int, k: int) -> Iterator[Row]:
    """As many rows as the package gives: what it raises is its own."""
    try:
        yield from peer_rows(package, ms, n, k)
    except Exception as error:
        print(f"{package} n {n} k {k}: {type(error).__name__}: {error}", flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure every row; returns how many could not be."""
    device = cuda.describe(torch.cuda.current_device())
    document: dict[str, Any] = {
        "environment": environment("cuda", cuda=torch.version.cuda or "", nvrtc=nvrtc.version()),
        "protocol": {"rotated_mb": 512, "burst": BURST, "pause": PAUSE, "rounds": ROUNDS}
        | {"sustained": args.sustained, "multiprocessors": device.sms},
        "commit": commit_of(args.commit),
        "rows": [],
    }
    failed = 0

    def keep(found: dict[str, Any]) -> None:
        document["rows"].append(found)
        sizes = "  ".join(f"{key} {found[key]:<6}" for key in ("m", "n", "k"))
        print(f"{found['kernel']:<32} {sizes} {found['us']:9.2f} us", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    for found in ceilings(device):
        keep(found)
    for row in rows(args, device.number):
        try:
            keep(measured(row, args.sustained))
        except Exception as error:  # a package's own may be any
            print(f"{row.kernel} m {row.m} n {row.n} k {row.k}: {type(error).__name__}: {str(error)[:200]}")
            failed += 1
    return failed


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096", help="values of M")
    parser.add_argument("--shapes", default="target", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--only", default="activations,products")
    parser.add_argument("--sustained", type=float, default=SUSTAINED, help="seconds without a pause")
    parser.add_argument("--peers", action="store_true", help="also humming-kernels and gemlite, if installed")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--commit", help="to note in the results, where there is no git")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the tables of these results")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("IMAGE", "JSON"), help="draw the roofline")
    args = parser.parse_args()
    if args.markdown:
        print(all_tables(json.loads(args.markdown.read_text(encoding="utf-8"))))
    elif args.plot:
        plot(json.loads(args.plot[1].read_text(encoding="utf-8")), args.plot[0])
    elif not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch sees none")
    elif failed := run(args):
        raise SystemExit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
