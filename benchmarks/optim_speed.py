"""Time and memory of an optimizer step: zq's AdamW with states of 32, 8 and 4 bits beside torch's and others.

    python benchmarks/optim_speed.py --out benchmarks/results/optim-speed-h200.json
    python benchmarks/optim_speed.py --block --out benchmarks/results/optim-speed-h200.json
    python benchmarks/optim_speed.py --device cpu --small               a quick look without a GPU

Times are of whole steps, one after the other as in training, host included: the median over rounds after a
warm-up; "host" is how long the host took to hand a step over. GB/s counts what must move at least: parameters
and states read and written, gradients read. --block steps one block of the shape of Llama 70B twice (hidden
8192, inner 28672, 64 heads, 8 for keys and values; parameters and gradients bfloat16) and notes peak memory.
torchao and bitsandbytes take part where they are installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import pages
import protocol
import torch
from optim import refresh
from torch import Tensor, nn

from zq.optim import AdamW

ROUNDS, WARM = 5, 3
SECONDS = 0.05  # of a round
Shapes = list[tuple[int, ...]]
B128 = {"exp_avg_sq": "ulinear4:b128"}


def decoder(vocabulary: int, positions: int, width: int, blocks: int) -> Shapes:
    """The tensors of GPT-2; 768 wide and 12 blocks deep they are 124 million."""
    vectors: Shapes = [(width,)] * 4
    linear: Shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    biases: Shapes = [(n,) for n, _ in linear]
    return [(vocabulary, width), (positions, width), *(vectors + linear + biases) * blocks, *vectors[:2]]


def block(hidden: int, inner: int, narrow: int) -> Shapes:
    """One block of a Llama; `narrow` rows of keys and values."""
    return [
        *((hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)),
        *((inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)),
    ]


SIZES: dict[str, Shapes] = {"4096 x 4096": [(4096, 4096)], "124M decoder": decoder(50257, 1024, 768, 12)}
SMALL: dict[str, Shapes] = {"96 x 96": [(96, 96)], "small decoder": decoder(100, 16, 72, 1)}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def makers(cuda: bool) -> dict[str, Make]:
    """Optimizers by name; of packages that are not installed, none."""
    found: dict[str, Make] = {"torch fused, 32 bit": partial(torch.optim.AdamW, fused=True)}
    for fused in (True, False) if cuda else (False,):
        for name, options in {
            "32 bit": {"bits": 32},
            "8 bit": {"bits": 8},
            "4 bit": {"bits": 4},
            "4 bit, B128": {"bits": 4, "states": B128},
        }.items():
            label = f"zq{'' if fused else ' unfused'}, {name}"
            found[label] = partial(AdamW, fused=fused, **options)
    peers = [("torchao.optim", "AdamW8bit", "8 bit"), ("torchao.optim", "AdamW4bit", "4 bit")]
    peers += [("bitsandbytes.optim", "AdamW8bit", "8 bit")]
    for module, kind, bits in peers if cuda else ():
        try:
            made = getattr(import_module(module), kind)
        except (ImportError, AttributeError):
            continue
        found[f"{module.split('.')[0]}, {bits}"] = made
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """All that a state of any of these optimizers holds on its device."""
    if isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors(getattr(value, name))
    elif isinstance(value, Tensor) and value.numel() > 1:
        yield value
    elif hasattr(value, "tensors"):
        yield from value.tensors().values()


def prepared(shapes: Shapes, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        values = torch.randn(shape, generator=generator, device=device) * 0.02
        params.append(nn.Parameter(values.to(dtype)))
        del values
        params[-1].grad = (torch.randn(shape, generator=generator, device=device) * 1e-3).to(dtype)
    return params


def timed(step: Callable[[], Any], cuda: bool) -> tuple[float, float]:
    """(seconds of a step, seconds of the host for it)."""

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(WARM):
        step()
    begun = wait()
    step()
    count = max(1, round(SECONDS / (wait() - begun)))
    found = []
    for _ in range(ROUNDS):
        begun = wait()
        for _ in range(count):
            step()
        host = time.perf_counter()
        found.append(((wait() - begun) / count, (host - begun) / count))
    return median(whole for whole, _ in found), median(host for _, host in found)


def speed(shapes: Shapes, make: Make, dtype: torch.dtype, device: str) -> dict[str, Any]:
    params = prepared(shapes, dtype, device)
    optimizer = make(params)
    whole, host = timed(optimizer.step, device.startswith("cuda"))
    count = sum(p.numel() for p in params)
    kept = sum(t.nbytes for t in tensors(optimizer.state))
    moved = 3 * count * params[0].element_size() + 2 * kept
    return {
        "parameters": count,
        "us": round(whole * 1e6, 2),
        "host_us": round(host * 1e6, 2),
        "state_bytes": kept,
        "moved_bytes": moved,
        "unfused": getattr(optimizer, "unfused", {}),
    }


def memory(shapes: Shapes, make: Make, device: str) -> dict[str, Any]:
    """Of two steps; `over`: beyond parameters, gradients and states."""
    with protocol.Cost(device) as cost:
        params = prepared(shapes, torch.bfloat16, device)
        if cost.cuda:
            torch.cuda.reset_peak_memory_stats()
        optimizer = make(params)
        for _ in range(2):
            optimizer.step()
    count = sum(p.numel() for p in params)
    kept = sum(t.nbytes for t in tensors(optimizer.state))
    peak = cost.gpu if cost.cuda else None
    over = None if peak is None else peak - kept - 4 * count
    return {"parameters": count, "state_bytes": kept, "peak_gpu_bytes": peak, "over_bytes": over}


def rows(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Callable[[], dict[str, Any]]]]:
    """(table, scheme, method, how to measure it)."""
    made = makers(args.device.startswith("cuda"))
    if args.block:
        shapes = block(64, 224, 16) if args.small else block(8192, 28672, 1024)
        for method, make in made.items():
            yield "optim-block", "block", method, lambda make=make: memory(shapes, make, args.device)
        return
    for size, shapes in (SMALL if args.small else SIZES).items():
        for dtype in (torch.float32, torch.bfloat16):
            scheme = f"{size}, {str(dtype).removeprefix('torch.')}"
            for method, make in made.items():
                yield (
                    "optim-speed",
                    scheme,
                    method,
                    lambda s=shapes, m=make, d=dtype: speed(s, m, d, args.device),
                )


def versions() -> dict[str, str]:
    found = {}
    for package in ("torchao", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small tensors, to try it")
    parser.add_argument("--block", action="store_true", help="peak memory of one large block instead")
    parser.add_argument("--out", type=Path, help="JSON, continued when it is there")
    parser.add_argument("--write", type=Path, help="a page whose tables are made again from the results")
    parser.add_argument("--commit", help="to note in the results, where there is no git")
    args = parser.parse_args()
    commit = protocol.commit_of(args.commit)
    settings = {"rounds": ROUNDS, "warm-up": WARM, "small": args.small}
    results = protocol.Results(args.out, protocol.environment(args.device, **versions()), settings)
    for table, scheme, method, measure in rows(args):
        key = {"table": table, "scheme": scheme, "method": method, "seed": 0}
        if results.find(**key):
            continue
        try:
            found = measure()
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # a package that cannot; memory that is not there
            report(f"{scheme}, {method}: {str(error).splitlines()[0]}")
            continue
        results.add({**key, "commit": commit, **found})
        report(f"{scheme}, {method}: {found}")
    for name in dict.fromkeys(row["table"] for row in results.rows):
        report(pages.TABLES[name](results.document))
    refresh(args.write)


if __name__ == "__main__":
    main()
