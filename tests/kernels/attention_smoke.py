# ruff: noqa: T201 (a script)
"""decode_attention and store_kv on a GPU, without pytest, for a machine that is there for minutes only.

    python -m tests.kernels.attention_smoke check           right or wrong: every head size and cache
    python -m tests.kernels.attention_smoke time [--quick]  microseconds at the heads of Llama-8B

`time` replays CUDA graphs over as many caches as exceed the L2 cache; `floor` is what the bytes of K, V and
scales need at the rate of a copy, measured first. torch: the ways of scaled_dot_product_attention, on 16
bits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import zq.kernels.ops  # noqa: F401 (registers the operators)
from tests.kernels.gpu_smoke import replay
from tests.kernels.inputs import BF16, FP8, FP16
from tests.kernels.inputs_kv import attention_args, store_args
from tests.kernels.near_kv import worst
from zq.kernels import cuda
from zq.kernels.table_kv import KV_UNITS

Z = torch.ops.zq
HEADS, KV_HEADS, CHANNELS = 32, 8, 128  # Llama-8B
BATCHES, LENGTHS = (1, 16, 64), (512, 4096, 32768)
CACHED = 256 << 20  # bytes: several times any L2 cache
CACHES = (None, "int8", "fp8")
SHAPES = [
    (1, 32, 8, 600, 128),
    (3, 32, 8, 5000, 128),
    (5, 8, 8, 333, 64),
    (2, 12, 2, 1500, 80),
    (2, 9, 1, 257, 96),
    (3, 16, 16, 1030, 256),
    (2, 20, 1, 129, 16),
    (70, 14, 2, 40, 64),
    (2, 4, 1, 40000, 64),
]


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for seed, (shape, kv, dtype) in enumerate(itertools.product(SHAPES, CACHES, (BF16, FP16))):
        length = shape[3]
        ends = [
            (0, length - 1),
            (length // 3, length - 2),
            (7, 7),
            (1, length // 2),
            (length - 1, length - 1),
        ]
        spans = [ends[row % len(ends)] for row in range(shape[0])]
        args = attention_args(shape, kv, dtype, spans, alibi=seed % 3 == 0, seed=seed, size=(1, 4)[seed % 2])
        yield f"{shape} {kv} {dtype}", args


def moved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """On the GPU, with the same strides."""
    return tuple(_moved(x) if isinstance(x, Tensor) else x for x in args)


def _moved(x: Tensor) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    raw = torch.uint8 if x.element_size() == 1 else x.dtype
    made.view(raw).copy_(x.view(raw))
    return made


def check() -> int:
    failures = 0
    for name, args in cases():
        here = moved(args)
        found = Z.decode_attention(*here)
        again, few = Z.decode_attention(*here), max(1, args[0].shape[0] // 2)
        alone = Z.decode_attention(*(x[:few] if isinstance(x, Tensor) and x.dim() and i < 7 else x
                                     for i, x in enumerate(here)))  # fmt: skip
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = Z.decode_attention(*here)
        same = torch.equal(found, again) and torch.equal(found[:few], alone)
        for _ in range(3):
            made.zero_()
            graph.replay()
            torch.cuda.synchronize()
            same = same and torch.equal(made, found)
        far = worst(found, here)
        bad = far > 1 or not same
        failures += bad
        twice = "" if same else ", not the same twice"
        print(f"{'FAIL' if bad else 'ok'} {name}: {far:.2f} of what is allowed{twice}", flush=True)
    ropes = (("half", None), ("half", 24), ("interleaved", 16), ("none", None))
    for (rope, rotary), kv, dtype in itertools.product(ropes, CACHES, (BF16, FP16)):
        for shape in ((5, 32, 8, 40, 128), (3, 4, 4, 9, 80), (300, 2, 1, 7, 64)):
            args = store_args(shape, kv, dtype, rope, rotary, wide=dtype == BF16)
            here = moved(args)
            found, wanted = Z.store_kv(*here).cpu(), Z.store_kv(*args)
            pairs = [
                (found, wanted),
                *((x.cpu(), y) for x, y in zip(here[1:5], args[1:5], strict=True) if y is not None),
            ]
            bad = not all(torch.equal(x.float().nan_to_num(3), y.float().nan_to_num(3)) for x, y in pairs)
            failures += bad
            if bad:
                print(f"FAIL store_kv {shape} {kv} {dtype} {rope} {rotary}")
    print(f"{failures} failures")
    return failures


def copy_rate() -> float:
    """Bytes a microsecond that a copy reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / replay([partial(y.copy_, x)])


def make(batch: int, length: int, kv: str | None) -> tuple[Any, ...]:
    """Arguments of decode_attention: full rows of random codes."""
    shape = (batch, KV_HEADS, length, CHANNELS)
    q = torch.randn(batch, HEADS, CHANNELS, device="cuda", dtype=BF16)
    if kv is None:
        k, v = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(2))
        scales = (None, None)
    else:
        codes = (torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8) & 0xB7 for _ in range(2))
        k, v = (x.view(torch.int8 if kv == "int8" else FP8) for x in codes)
        scales = tuple(torch.rand(shape[:3], device="cuda") * 0.01 for _ in range(2))
    first = torch.zeros(batch, dtype=torch.int32, device="cuda")
    return q, k, v, *scales, first, first + length - 1, CHANNELS**-0.5, None


def torch_ways(args: tuple[Any, ...]) -> dict[str, Callable[[], Tensor]]:
    q, k, v = args[0][:, :, None], args[1], args[2]

    def way(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    ways = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return {backend.name.split("_")[0].lower(): partial(way, backend) for backend in ways}


def bytes_of(args: tuple[Any, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in args[1:5] if x is not None)


def timing(quick: bool) -> None:
    rate = copy_rate()
    print(torch.cuda.get_device_name(), torch.__version__, f"copy {rate / 1e6:.2f} TB/s; microseconds")
    print(f"{'B':>3} {'L':>6} {'cache':>6} {'zq':>8} {'floor':>8} {'share':>6}  torch on 16 bits")
    for batch, length in itertools.product(BATCHES, LENGTHS[:2] if quick else LENGTHS):
        for kv in CACHES:
            first = make(batch, length, kv)
            size = bytes_of(first)
            if 2 * size > 0.6 * torch.cuda.get_device_properties(0).total_memory:
                print(f"{batch:3} {length:6} {kv or '16 bit':>6}  needs {size >> 30} GiB a layer, left out")
                continue
            sets = [first, *(make(batch, length, kv) for _ in range(min(64, CACHED // size)))]
            us = replay([partial(Z.decode_attention, *args) for args in sets])
            floor = size / rate
            others = ""
            for name in torch_ways(first) if kv is None else ():
                try:
                    calls = [torch_ways(args)[name] for args in sets]
                    others += f"  {name} {replay(calls):.1f}"
                except RuntimeError as error:
                    others += f"  {name} ({str(error).splitlines()[0][:30]})"
            times = f"{us:8.1f} {floor:8.1f} {100 * floor / us:5.0f}%"
            print(f"{batch:3} {length:6} {kv or '16 bit':>6} {times}{others}", flush=True)
            del sets, first
            torch.cuda.empty_cache()
    for batch, kv in itertools.product(BATCHES, CACHES):
        args = moved(store_args((batch, HEADS, KV_HEADS, 512, CHANNELS), kv))
        print(
            f"store_kv B={batch} {kv or '16 bit'}: {replay([partial(Z.store_kv, *args)] * 20):.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("check", "time"))
    parser.add_argument("--quick", action="store_true", help="no rows of 32768 positions")
    arguments = parser.parse_args()
    cuda.prepare("cuda", [unit.name for unit in KV_UNITS])
    if arguments.command == "check":
        sys.exit(check() > 0)
    timing(arguments.quick)


if __name__ == "__main__":
    main()
