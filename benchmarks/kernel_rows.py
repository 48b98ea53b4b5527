"""What benchmarks/kernels.py measures: every operator of zq and, beside it, what torch has.

A row makes `calls`: as many as it takes for their operands to exceed the caches together, each a function
without arguments that works on operands of its own. `bytes` and `operations` are of one call: what must be
read and written at least, and multiplications plus additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import zq.kernels.ops
from zq.kernels import layout, tiles
from zq.kernels.layout import Packing

ROTATED = 512 << 20  # bytes; ten times the L2 cache of an H100
BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
OPS: Any = torch.ops.zq
SHAPES = {  # of products: (N, K)
    "target": {"large": (28672, 8192), "small": (6144, 4096)},
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate-up": (28672, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate-up": (57344, 8192), "down": (8192, 28672)},
    "bert-large": {"qkv": (3072, 1024), "o": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096)},
}
WIDTHS = (1024, 4096, 8192, 14336, 28672)  # of activations


@dataclass(frozen=True)
class Row:
    """One measurement. make(copies) -> that many calls; operands: bytes that one call has to itself."""

    table: str
    kernel: str
    m: int
    n: int
    k: int
    bytes: int
    operations: int
    operands: int
    make: Callable[[int], list[Callable[[], Any]]]

    @property
    def copies(self) -> int:
        return max(2, min(256, -(-ROTATED // self.operands)))


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def normal(*shape: int, device: str, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def activation_rows(ms: list[int], device: str) -> Iterator[Row]:
    """Fused quantization beside a copy of the same input, the measure of bandwidth."""
    for k in WIDTHS:
        for m in ms:
            x, weight = normal(m, k, device=device), normal(k, device=device)
            wide = torch.cat((x, x), 1)
            calls: dict[str, tuple[Tensor, Callable[[Tensor], Any], int]] = {
                "copy": (x, torch.clone, nbytes(x, x)),
                "quant_int8": (x, OPS.quant_int8, 3 * m * k),
                "quant_fp8": (x, OPS.quant_fp8, 3 * m * k),
                "rms_norm_quant": (x, lambda x, w=weight: OPS.rms_norm_quant(x, w, 1e-5, INT8), 3 * m * k),
                "add_rms_norm_quant": (
                    x,
                    lambda x, w=weight: OPS.add_rms_norm_quant(x, x, w, 1e-5, INT8),
                    5 * m * k,  # the residual is the input here: it is read once from memory
                ),
                "layer_norm_quant": (
                    x,
                    lambda x, w=weight: OPS.layer_norm_quant(x, w, w, 1e-5, INT8),
                    3 * m * k,
                ),
                "silu_mul_quant": (wide, lambda x: OPS.silu_mul_quant(x, INT8), 5 * m * k),
                "gelu_quant": (x, lambda x: OPS.gelu_quant(x, "tanh", INT8), 3 * m * k),
            }
            for name, (given, call, moved) in calls.items():
                yield Row("activations", name, m, 0, k, moved, 0, nbytes(given), _rotate(given, call))


def _rotate(operand: Tensor, call: Callable[[Tensor], Any]) -> Callable[[int], list[Callable[[], Any]]]:
    def make(copies: int) -> list[Callable[[], Any]]:
        return [partial(call, operand.clone()) for _ in range(copies)]

    return make


def product_rows(ms: list[int], n: int, k: int, device: str, arch: int) -> Iterator[Row]:
    """Products of one shape for every M: torch's first, then zq's. `arch` as zq.kernels.tiles.choose takes
    it; operators that the device has no kernel for are left out."""
    weights = list(packed_weights(n, k, device, arch))
    for m in ms:
        x = normal(m, k, device=device)
        for name, weight, call in [*library(x, n), *((w, p, c(x)) for w, p, c in weights)]:
            moved = (
                nbytes(weight) + m * k * (2 if "16" in name else 1) + m * n * (4 if "int32" in name else 2)
            )
            yield Row("products", name, m, n, k, moved, 2 * m * n * k, nbytes(weight), _rotate(weight, call))


def library(x: Tensor, n: int) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Any]]]:
    """(name, weight, call) of torch's own matrix products, which are cuBLAS's."""
    m, k = x.shape
    device = str(x.device)
    yield "cuBLAS bf16", normal(n, k, device=device), lambda w: torch.nn.functional.linear(x, w)
    if m >= 32:  # what _int_mm takes
        x8 = torch.randint(-128, 128, (m, k), dtype=INT8, device=device)
        w8 = torch.randint(-128, 128, (n, k), dtype=INT8, device=device)
        yield "cuBLAS int8, int32 out", w8, lambda w: torch._int_mm(x8, w.T)
    if torch.cuda.get_device_capability() < (8, 9):
        return
    xf, wf = x.to(FP8), normal(n, k, device=device, dtype=FP8)
    one = torch.ones((), device=device)
    rows, columns = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    yield (
        "cuBLAS fp8, tensor scale",
        wf,
        lambda w: torch._scaled_mm(xf, w.T, scale_a=one, scale_b=one, out_dtype=BF16),
    )
    yield (
        "cuBLAS fp8, row scales",
        wf,
        lambda w: torch._scaled_mm(xf, w.T, scale_a=rows, scale_b=columns, out_dtype=BF16),
    )


Caller = Callable[[Tensor], Callable[[Tensor], Any]]


def packed_weights(n: int, k: int, device: str, arch: int) -> Iterator[tuple[str, Tensor, Caller]]:
    """(name, packed weight, x -> (packed weight -> y)) of zq's operators."""
    four = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    eight = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=device)
    floats = normal(n, k, device=device, dtype=FP8).view(torch.uint8)
    ws = torch.full((n,), 1e-3, device=device)

    def group_scales(group: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((n, -(-k // group)), 1e-3, device=device, dtype=dtype)

    def two_level(x: Tensor) -> Callable[[Tensor], Any]:
        q, s, r = OPS.quant_int8(x)
        return lambda w: OPS.w4a8_int8(q, s, r, w, ws, None, n, 128, BF16)

    def int8_groups(x: Tensor) -> Callable[[Tensor], Any]:
        q, s, _ = OPS.quant_int8(x)
        return lambda w: OPS.w4a8_int8_group(q, s, w, None, None, n, 128, BF16)

    def fp8_groups(x: Tensor) -> Callable[[Tensor], Any]:
        q, s = OPS.quant_fp8(x)
        return lambda w: OPS.w4a8_fp8(q, s, w, None, n, 128, BF16)

    def int8(x: Tensor) -> Callable[[Tensor], Any]:
        q, s, _ = OPS.quant_int8(x)
        return lambda w: OPS.w8a8_int8(q, s, w, ws, None, n, BF16)

    def fp8(x: Tensor) -> Callable[[Tensor], Any]:
        q, s = OPS.quant_fp8(x)
        return lambda w: OPS.w8a8_fp8(q, s, w, ws, None, n, BF16)

    def fp8_blocks(x: Tensor) -> Callable[[Tensor], Any]:
        q, s = OPS.quant_fp8_block128(x)
        return lambda w: OPS.fp8_block128(q, s, w, None, n, BF16)

    sub = torch.randint(1, 9, (n, -(-k // 128)), dtype=torch.uint8, device=device)
    offset = (128 - 8 * sub.short()).to(torch.uint8)
    blocks = torch.ones(-(-n // 128), -(-k // 128), device=device)
    yield "zq W4A8-INT8 g128 two-level", layout.pack(Packing("w4a8_two", 128), four, sub, offset), two_level
    yield "zq W4A8-INT8 g128", layout.pack(Packing("w4a8_group", 128), four, group_scales(128)), int8_groups
    yield "zq W8A8-INT8", layout.pack(Packing("w8a8"), eight), int8
    packed = layout.pack(Packing("w4a16", 128), four, group_scales(128, BF16))
    yield "zq W4A16 g128", packed, lambda x: lambda w: OPS.w4a16(x, w, None, None, n, 128, False)
    packed = layout.pack(Packing("w8a16"), eight)
    yield "zq W8A16", packed, lambda x: lambda w: OPS.w8a16(x, w, ws, None, n)
    if arch >= 89:
        yield "zq W4A8-FP8 g128", layout.pack(Packing("w4a8_fp8", 128), four, group_scales(128)), fp8_groups
        yield "zq W8A8-FP8", layout.pack(Packing("w8a8"), floats), fp8
        yield "zq FP8 block-128", layout.pack(Packing("fp8_block"), floats, blocks), fp8_blocks


MEASURED = {
    "w4a8_int8",
    "w4a8_int8_group",
    "w8a8_int8",
    "w4a16",
    "w8a16",
    "w4a8_fp8",
    "w8a8_fp8",
    "fp8_block128",
}
assert set(tiles.KINDS) == MEASURED == set(zq.kernels.ops.GEMM_OPS), "a row for every operator"
