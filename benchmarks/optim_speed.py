"""Time and memory of an optimizer step: zq's AdamW with states of 32, 8 and 4 bits beside torch's and others.

    python benchmarks/optim_speed.py --out benchmarks/results/optim-speed-h200.json
    python benchmarks/optim_speed.py --block --out benchmarks/results/optim-block-h200.json
    python benchmarks/optim_speed.py --only '^(?!.*decoder.*unfused)' ...       by scheme and optimizer
    python benchmarks/optim_speed.py --only '^124M decoder, bfloat16, (?!zq unfused)' --again --out ...
    python benchmarks/optim_speed.py --device cpu --small               a quick look without a GPU

Times are of whole steps, one after the other as in training, host included: the median over rounds after a
warm-up; "host" is how long the host took to hand a step over. GB/s counts what must move at least: parameters
and states read and written, gradients read. Before it is timed every optimizer is checked: "update" is how
far ten steps of it move a small matrix from where ten steps in float64 move it, relative to that. --block
steps one block of the shape of Llama 70B twice (hidden 8192, inner 28672, 64 heads, 8 for keys and values;
parameters and gradients bfloat16) and notes peak memory. torchao and bitsandbytes take part where they are
installed (measured: 0.17.0 and 0.50.2). torchao compiles a graph for every shape: the first step has its own
column, and a row whose first step takes longer than --patience is left out.
"""

from __future__ import annotations

import argparse
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
BASE = "torch fused, 32 bit"
CHECKED = (128, 256)  # the matrix of the check
# Of "update"; row and column means stand for another second moment than that of each element.
LIMITS = {"4 bit, factored": 0.5, "32 bit": 1e-4, "8 bit": 0.03, "4 bit": 0.3}
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


WIDTHS: dict[str, dict[str, Any]] = {
    "32 bit": {"bits": 32},
    "8 bit": {"bits": 8},
    "4 bit": {"bits": 4},
    "4 bit, B128": {"bits": 4, "states": B128},
    "4 bit, factored": {"bits": 4, "states": {"exp_avg_sq": "factored"}},
}
PEERS = (
    ("torchao, 8 bit", "torchao.optim", "AdamW8bit"),
    ("torchao, 4 bit, B128", "torchao.optim", "AdamW4bit"),
    ("bitsandbytes, 8 bit", "bitsandbytes.optim", "AdamW8bit"),
)


def makers(cuda: bool) -> dict[str, Make]:
    """Optimizers by name; of packages that are not installed, none. All decay by .01, as torch does."""
    found: dict[str, Make] = {BASE: partial(torch.optim.AdamW, fused=True)}
    if cuda:
        found |= {f"zq, {name}": partial(AdamW, fused=True, **o) for name, o in WIDTHS.items()}
    for label, module, kind in PEERS:
        try:
            found[label] = getattr(import_module(module), kind)
        except (ImportError, AttributeError):
            continue
    found |= {f"zq unfused, {name}": partial(AdamW, fused=False, **o) for name, o in WIDTHS.items()}
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


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after so many seconds. Not where signals have no timer (Windows)."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"the first step took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def update_error(make: Make, device: str) -> float:
    """|what ten steps change - what they change in float64| / |the latter|, float32 parameters."""
    moved = []
    for made, kind, where in (
        (partial(torch.optim.AdamW, foreach=False), torch.float64, "cpu"),
        (make, torch.float32, device),
    ):
        generator = torch.Generator().manual_seed(1)
        param = nn.Parameter((torch.randn(CHECKED, generator=generator) * 0.02).to(where, kind))
        before = param.detach().clone()
        optimizer = made([param])
        for _ in range(10):
            param.grad = (torch.randn(CHECKED, generator=generator) * 1e-3).to(where, kind)
            optimizer.step()
        moved.append((param.detach() - before).double().cpu())
    return ((moved[1] - moved[0]).norm() / moved[0].norm()).item()


def checked(method: str, make: Make, device: str) -> float:
    found = update_error(make, device)
    limit = next(value for states, value in LIMITS.items() if f" {states}" in method)
    if not found < limit:
        raise ValueError(f"its update is {found:.3g} from that in float64; at most {limit:g} is right")
    return found


def speed(shapes: Shapes, make: Make, dtype: torch.dtype, device: str, wait: float) -> dict[str, Any]:
    params = prepared(shapes, dtype, device)
    optimizer = make(params)
    begun = time.perf_counter()
    with patience(wait):
        optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    first = time.perf_counter() - begun
    whole, host = timed(optimizer.step, device.startswith("cuda"))
    count = sum(p.numel() for p in params)
    kept = sum(t.nbytes for t in tensors(optimizer.state))
    moved = 3 * count * params[0].element_size() + 2 * kept
    return {
        "parameters": count,
        "us": round(whole * 1e6, 2),
        "host_us": round(host * 1e6, 2),
        "first_s": round(first, 3),
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
                    lambda s=shapes, m=make, d=dtype: speed(s, m, d, args.device, args.patience),
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
    parser.add_argument("--only", default=".*", help="regex over 'SCHEME, OPTIMIZER'")
    parser.add_argument("--again", action="store_true", help="measure rows that --out has already, too")
    parser.add_argument("--patience", type=float, default=100, help="seconds for a first step")
    parser.add_argument("--small", action="store_true", help="small tensors, to try it")
    parser.add_argument("--block", action="store_true", help="peak memory of one large block instead")
    parser.add_argument("--out", type=Path, help="JSON, continued when it is there")
    parser.add_argument("--write", type=Path, help="a page whose tables are made again from the results")
    parser.add_argument("--commit", help="to note in the results, where there is no git")
    args = parser.parse_args()
    commit = protocol.commit_of(args.commit)
    settings = {"rounds": ROUNDS, "warm-up": WARM, "small": args.small}
    results = protocol.Results(args.out, protocol.environment(args.device, **versions()), settings)
    made, errors = makers(args.device.startswith("cuda")), dict[str, float]()
    for table, scheme, method, measure in rows(args):
        key = {"table": table, "scheme": scheme, "method": method, "seed": 0}
        there = results.find(**key) and not args.again
        if there or not re.search(args.only, f"{scheme}, {method}"):
            continue
        try:
            if method not in errors:
                errors[method] = checked(method, made[method], args.device)
            found = {"update": errors[method]} | measure()
        # A package that cannot; memory that is not there; patience that ends.
        except (RuntimeError, TypeError, ValueError, TimeoutError) as error:
            report(f"{scheme}, {method}: {(str(error) or type(error).__name__).splitlines()[0]}")
            continue
        results.add({**key, "commit": commit, **found})
        report(f"{scheme}, {method}: {found}")
    for name in dict.fromkeys(row["table"] for row in results.rows):
        report(pages.TABLES[name](results.document))
    refresh(args.write)


if __name__ == "__main__":
    main()
