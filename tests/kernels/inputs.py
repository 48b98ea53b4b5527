"""Arguments for every operator: random, small, of every packing. Used on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zq.kernels import launch, layout, reference
from zq.kernels.launch import RowShape
from zq.kernels.layout import Packing

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """uint8 in low .. high - 1"""
    made = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    return made.to(torch.uint8)


def activations(m: int, k: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Rows of very different sizes; the second is zeros, the third all equal."""
    x = normal(m, k, seed=seed) * torch.logspace(-3, 3, m)[:, None]
    if m > 2:
        x[1], x[2] = 0.0, -3.0
    return x.to(dtype)


def quant_calls(m: int, k: int, dtype: torch.dtype = BF16) -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, residual = activations(m, k, dtype), normal(m, k, seed=1, dtype=dtype)
    weight, bias = normal(k, seed=2, dtype=dtype), normal(k, seed=3, dtype=dtype)
    yield "quant_int8", (x,)
    yield "quant_fp8", (x,)
    yield "quant_fp8_block128", (x,)
    for out in (torch.int8, FP8):
        yield "rms_norm_quant", (x, weight, 1e-5, out)
        yield "add_rms_norm_quant", (x, residual, weight, 1e-5, out)
        yield "layer_norm_quant", (x, weight, bias, 1e-5, out)
        yield "add_layer_norm_quant", (x, residual, weight, bias, 1e-5, out)
        yield "post_layer_norm_quant", (x, residual, weight, bias, 1e-5, out)
        yield "silu_mul_quant", (torch.cat((residual, x), 1), out)
        yield "gelu_quant", (x, "none", out)
        yield "gelu_quant", (x, "tanh", out)


def gemm_calls(m: int, n: int, k: int, dtype: torch.dtype = BF16) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every GEMM operator with every group size, with and without bias."""
    x = activations(m, k, dtype)
    x8, sx, rowsum = reference.quant_int8(x)
    xf, sf = reference.quant_fp8(x)
    xb, sb = reference.quant_fp8_block128(x)
    ws = normal(n, seed=4).abs() * 1e-2 + 1e-4
    codes4, codes8 = whole(0, 16, n, k, seed=5), whole(0, 256, n, k, seed=6)
    e4m3 = normal(n, k, seed=7).to(FP8).view(torch.uint8)
    for bias in (None, normal(n, seed=8, dtype=dtype)):
        yield "w8a8_int8", (x8, sx, layout.pack(Packing("w8a8"), codes8), ws, bias, n, dtype)
        yield "w8a8_fp8", (xf, sf, layout.pack(Packing("w8a8"), e4m3), ws, bias, n, dtype)
        blocks = normal(-(-n // 128), -(-k // 128), seed=9).abs()
        yield "fp8_block128", (xb, sb, layout.pack(Packing("fp8_block"), e4m3, blocks), bias, n, dtype)
        yield "w8a16", (x, layout.pack(Packing("w8a16"), codes8), ws, bias, n)
        yield (
            "w4a16",
            (x, layout.pack(Packing("w4a16", 0, False, dtype == FP16), codes4), ws, bias, n, 0, False),
        )
        yield "w4a8_int8_group", (x8, sx, layout.pack(Packing("w4a8_group"), codes4), ws, bias, n, 0, dtype)
        for group in (32, 64, 128):
            groups = -(-k // group)
            gs = normal(n, groups, seed=10).abs() * 1e-2 + 1e-3
            for kind, op, q, s in (
                ("w4a8_group", "w4a8_int8_group", x8, sx),
                ("w4a8_fp8", "w4a8_fp8", xf, sf),
            ):
                packed = layout.pack(Packing(kind, group), codes4, gs)
                no_ws = (None,) if op == "w4a8_int8_group" else ()
                yield op, (q, s, packed, *no_ws, bias, n, group, dtype)
            for asym in (False, True):
                packing = Packing("w4a16", group, asym, dtype == FP16)
                zero = whole(0, 16, n, groups, seed=11) if asym else None
                yield "w4a16", (x, layout.pack(packing, codes4, gs, zero), None, bias, n, group, asym)
            if group > 32:
                sub = whole(1, 17, n, groups, seed=12)
                offset = whole(0, 16, n, groups, seed=13)
                packed = layout.pack(Packing("w4a8_two", group), codes4, sub, offset)
                yield "w4a8_int8", (x8, sx, rowsum, packed, ws, bias, n, group, dtype)


def row_shapes(pieces: int) -> Iterator[RowShape]:
    """Every way to compute rows of so many pieces that a kernel allows, for an H100."""
    warps = -(-pieces // 32)
    if pieces > launch.WIDE:
        yield RowShape("quantize_long", launch.THREADS, shared=pieces * launch.PIECE)
        return
    if pieces <= launch.SHORT:
        yield from (RowShape("quantize_warp", 32 * rows, rows=rows) for rows in (1, 4, 8))
    if pieces <= launch.THREADS:
        yield RowShape("quantize_1", 32 * warps)
    yield RowShape("quantize_4", -(-warps // 4) * 32)
    for blocks in (2, 4, launch.CLUSTER):
        if blocks * launch.CLUSTERED >= pieces:
            yield RowShape("quantize_cluster", -(-warps // blocks) * 32, blocks=blocks)
