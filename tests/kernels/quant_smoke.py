# ruff: noqa: T201 (a script)
"""The kernels of activations on a GPU, for a machine that is there for minutes only.

    python -m tests.kernels.quant_smoke check [--out FILE.json] [--only REGEX] [--part 0/4]
    python -m tests.kernels.quant_smoke time [--out FILE.json] [--only REGEX]

`check` runs every operator, dtype and way to launch, into memory full of NaN, against the reference; all ways
must give the same bytes. `time` runs every way to launch as a CUDA graph of calls on buffers that together
exceed the caches, beside a copy; the way that zq takes is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import zq.kernels.ops  # noqa: F401 (registers the operators)
from tests.kernels.inputs import BF16, FP8, FP16, activations, quant_calls, row_shapes
from tests.kernels.near_quant import verdict
from tests.kernels.on_cpu import into
from zq.kernels import bundle, checks, cuda, launch, reference
from zq.kernels.launch import RowShape
from zq.kernels.table import QUANT_UNITS, UNITS

ROTATED = 256 << 20  # bytes: several times the L2 cache
INT8 = torch.int8
CHECKED = [  # rows, K
    *((5, k) for k in (16, 48, 128, 256, 768, 1008, 1024, 1040, 3072, 4096, 5120, 8192, 8208, 14336, 28672)),
    *((2, k) for k in (32768, 32784, 40000)),
    (133, 768),
    (300, 1024),
    (70, 4096),
    (0, 0),  # extreme numbers
]
TIMED = [
    *((m, 4096) for m in (1, 16, 128, 256, 512, 1024, 4096)),
    *((m, 14336) for m in (1, 16, 64, 128, 512, 4096)),
    *((m, 28672) for m in (1, 1024)),
    *((m, 8192) for m in (1, 128, 2048)),
    *((m, 768) for m in (128, 1024, 8192)),
    *((m, 3072) for m in (128, 1024, 8192)),
    *((m, 1024) for m in (1, 1024, 8192)),
]


def compile_all(names: list[str]) -> None:
    started = time.time()
    device = cuda.describe(0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: bundle.cubin(UNITS[name], device.arch), names))
    print(f"compiled {len(names)} units in {time.time() - started:.1f} s", flush=True)


def forced(shape: RowShape | None) -> None:
    """Every launch takes this shape from now on; None: the one that zq chooses."""
    launch.row_shape = CHOICE if shape is None else lambda *_: shape
    launch.forget()


CHOICE = launch.row_shape


def run_into_nan(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    made = []
    for shape, dtype in getattr(checks, name)(*args):
        made.append(torch.empty(shape, dtype=dtype, device="cuda"))
        if made[-1].numel():
            made[-1].view(torch.uint8).fill_(0xFF)
    into(name, args, made)
    torch.cuda.synchronize()
    return [each.cpu() for each in made]


def calls_to_check(m: int, k: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for dtype in (BF16, FP16):
        yield from quant_calls(m, k, dtype)
    x = activations(m, k, torch.float32)
    yield from ((name, (x,)) for name in ("quant_int8", "quant_fp8", "quant_fp8_block128"))


def with_outlier(args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0].clone()
    x[:, 3] = 60.0 * x[:, 3].abs() + 30.0
    return (x, *args[1:])


def extreme() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every finite number of 16 bits, and rows of one size for every exponent."""
    for dtype in (BF16, FP16):
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = bits[torch.isfinite(bits)]
        x = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
        for k in (16, 32, 4096):
            rows = x[: len(x) // k * k].reshape(-1, k)
            yield from (("quant_int8", (rows,)), ("quant_fp8", (rows,)), ("quant_fp8_block128", (rows,)))
        ordered = finite.sort().values.reshape(-1, 16 if dtype == BF16 else 64)[:, :16].contiguous()
        small = ordered.float().abs().amax(1) < 60000
        yield from (("quant_int8", (ordered,)), ("quant_fp8", (ordered,)))
        for out in (INT8, FP8):
            yield from (("gelu_quant", (ordered[small], how, out)) for how in ("none", "tanh"))
    odd = torch.tensor(
        [[torch.inf, 1.0] * 8, [-torch.inf] * 16, [torch.inf, -torch.inf] * 8, [3e38, 1.0] * 8]
    )
    for dtype in (BF16, FP16, torch.float32):
        yield from (("quant_int8", (odd.to(dtype),)), ("quant_fp8", (odd.to(dtype),)))


def check(only: str, part: int, parts: int) -> dict[str, Any]:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parts))
    cases, wrong = 0, []
    for m, k in CHECKED[part::parts]:
        calls = list(calls_to_check(m, k)) if m else list(extreme())
        if 4096 <= k <= 28672:
            calls += [(name, with_outlier(args)) for name, args in calls if "norm" in name]
        calls = [call for call in calls if re.search(only, call[0])]
        for name, args in calls:
            wanted = list(getattr(reference, name)(*args))
            there = tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)
            width = args[0].shape[1] // (2 if name == "silu_mul_quant" else 1) * args[0].element_size()
            first = None
            for shape in [None, *row_shapes(width // 16)]:
                forced(shape)
                made = run_into_nan(name, there)
                said = verdict(name, args, made, wanted) if first is None else ""
                first = first or made
                same = all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(made, first, strict=True))
                cases += 1
                if said or not same:
                    what = f"{name} {[a for a in args[1:] if not isinstance(a, Tensor)]} {args[0].dtype}"
                    wrong.append(f"{what} {list(args[0].shape)} {shape}: {said or 'other bytes'}")
                    print("WRONG", wrong[-1], flush=True)
    forced(None)
    nan = torch.ones(2, 64, dtype=BF16)
    nan[1, 33] = torch.nan
    scale = run_into_nan("quant_int8", (nan.cuda(),))[1]
    if torch.isnan(scale).tolist() != [False, True]:
        wrong.append(f"NaN in the second row gives scales {scale.tolist()}")
    print(f"{'FAIL' if wrong else 'PASS'}: {cases - len(wrong)} of {cases} right", flush=True)
    return {"cases": cases, "wrong": wrong}


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def timed_calls(m: int, k: int) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Any], int]]:
    """(name, operand to rotate, call, bytes that must be moved)"""
    ops: Any = torch.ops.zq
    x = torch.randn(m, k, device="cuda").to(BF16)
    weight, bias = torch.randn(k, device="cuda").to(BF16), torch.randn(k, device="cuda").to(BF16)
    wide = torch.randn(m, 2 * k, device="cuda").to(BF16)
    size = m * k
    yield "copy", x, torch.clone, 4 * size
    yield "quant_int8", x, ops.quant_int8, 3 * size
    yield "quant_fp8", x, ops.quant_fp8, 3 * size
    yield "rms_norm", x, lambda x: ops.rms_norm_quant(x, weight, 1e-5, INT8), 3 * size
    yield "add_rms_norm", wide, lambda x: ops.add_rms_norm_quant(*_two(x, m, k), weight, 1e-5, INT8), 7 * size
    yield "layer_norm", x, lambda x: ops.layer_norm_quant(x, weight, bias, 1e-5, INT8), 3 * size
    yield (
        "post_layer_norm",
        wide,
        lambda x: ops.post_layer_norm_quant(*_two(x, m, k), weight, bias, 1e-5, INT8),
        7 * size,
    )
    yield "silu_mul", wide, lambda x: ops.silu_mul_quant(x, INT8), 5 * size
    yield "gelu", x, lambda x: ops.gelu_quant(x, "none", INT8), 3 * size
    yield "gelu_tanh", x, lambda x: ops.gelu_quant(x, "tanh", INT8), 3 * size


def _two(wide: Tensor, m: int, k: int) -> tuple[Tensor, Tensor]:
    first, second = wide.view(2, m, k).unbind(0)
    return first, second


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Of one call, in a graph of all."""
    calls[0]()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()  # workspaces belong to the stream
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        found = []
        for _ in range(5):
            begin.record()
            graph.replay()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 2 * 1e3 / len(calls))
    graph.reset()
    return median(found)


def shapes_to_time(pieces: int, m: int) -> Iterator[RowShape]:
    for shape in row_shapes(pieces):
        if ("warp" not in shape.entry or shape.rows > 1) and ("cluster" not in shape.entry or m <= 512):
            yield shape


def measure(only: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for m, k in TIMED:
        copied = 0.0
        for name, operand, call, size in timed_calls(m, k):
            if name != "copy" and not re.search(only, name):
                continue
            copies = max(2, min(128, ROTATED // (operand.numel() * 2)))
            buffers = [operand.clone() for _ in range(copies)]
            calls = [lambda x=x, call=call: call(x) for x in buffers]
            if name == "copy":
                copied = 4 * m * k / microseconds(calls)
                print(f"\n{m} x {k}: a copy takes {4 * m * k / copied:.2f} us", flush=True)
                continue
            chosen = CHOICE(k // 8, m, cuda.describe(0), name.startswith("quant"))
            found = []
            for shape in dict.fromkeys([chosen, *shapes_to_time(k // 8, m)]):
                forced(shape)
                found.append((shape, microseconds(calls)))
            forced(None)
            best = min(time for _, time in found)
            print(f"  {name:16}", end="")
            for shape, time_ in found:
                short = shape.entry.removeprefix("quantize_") + f".{shape.threads}"
                short += f"x{shape.blocks}" if shape.blocks > 1 else ""
                mark = ("*" if shape == chosen else "") + ("!" if time_ == best else "")
                print(f"  {short}{mark} {time_:.2f}", end="")
                facts = {"op": name, "m": m, "k": k, "us": round(time_, 3), "chosen": shape == chosen}
                rows.append(facts | shape._asdict() | {"of_copy": round(size / time_ / copied, 3)})
            print(f"   {size / found[0][1] / copied:.0%} of copy", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="0/1", help="of a check, so that some run side by side")
    args = parser.parse_args()
    names = [unit.name for unit in QUANT_UNITS]
    if args.what == "time":
        names = [name for name in names if re.search("int8_bf16$|^plain_fp8_bf16$", name)]
    compile_all(names)
    started = time.time()
    if args.what == "check":
        found: Any = check(args.only, *map(int, args.part.split("/")))
    else:
        found = measure(args.only)
    print(f"{time.time() - started:.0f} s", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.what == "check" and found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
