"""What an operator takes and gives: shapes and dtypes, checked before anything is computed.

Each function takes the operator's arguments and returns [(shape, dtype)] of its outputs. It reads no values,
so it serves the CPU, CUDA and the fake tensors of torch.compile alike. Raises ZqError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels.layout import Packing, packed_bytes

Outputs = list[tuple[tuple[Any, ...], torch.dtype]]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
INT8, FP8, F32, I32 = torch.int8, torch.float8_e4m3fn, torch.float32, torch.int32
MULTIPLE = 16  # of K: rows are read 16 bytes at a time
INT8_K = 65536  # beyond it a sum of products may not fit 32 bits


def tensor(
    op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[Any, ...], like: Tensor
) -> None:
    """x has one of the dtypes, the shape, is contiguous, and lies where `like` lies."""
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ZqError(f"zq::{op}: {name} is {str(x.dtype).removeprefix('torch.')}; allowed: {allowed}")
    if tuple(x.shape) != shape:
        raise ZqError(f"zq::{op}: {name} has shape {list(x.shape)}, expected {list(shape)}")
    if x.device != like.device:
        raise ZqError(f"zq::{op}: {name} is on {x.device}, the input on {like.device}; move one of them")
    if not x.is_contiguous():
        raise ZqError(f"zq::{op}: {name} is not contiguous; call .contiguous() on it")


def matrix(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[Any, Any]:
    """x is a matrix of rows of a multiple of 16 values; returns its shape."""
    if x.dim() != 2 or x.shape[1] % MULTIPLE or x.shape[1] == 0:
        raise ZqError(
            f"zq::{op}: {name} has shape {list(x.shape)}, expected [M, K] with K a multiple of {MULTIPLE}; "
            "flatten the leading dimensions, or pad K with zeros"
        )
    tensor(op, name, x, dtypes, tuple(x.shape), x)
    return x.shape[0], x.shape[1]


def choice(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
        raise ZqError(f"zq::{op}: {name} is {str(value).removeprefix('torch.')}; allowed: {names}")


def quantized(m: Any, k: Any, dtype: torch.dtype) -> Outputs:
    """q, scale, rowsum; FP8 has no use for the last."""
    return [((m, k), dtype), ((m,), F32), ((m if dtype == INT8 else 0,), I32)]


def quant_int8(x: Tensor) -> Outputs:
    return quantized(*matrix("quant_int8", "x", x, FLOATS), INT8)


def quant_fp8(x: Tensor) -> Outputs:
    return quantized(*matrix("quant_fp8", "x", x, FLOATS), FP8)[:2]


def quant_fp8_block128(x: Tensor) -> Outputs:
    m, k = matrix("quant_fp8_block128", "x", x, FLOATS)
    return [((m, k), FP8), ((m, -(-k // 128)), F32)]


def norm_quant(
    op: str, x: Tensor, vectors: dict[str, Tensor], residual: Tensor | None, dtype: torch.dtype
) -> Outputs:
    m, k = matrix(op, "x", x, HALVES)
    for name, vector in vectors.items():
        tensor(op, name, vector, (x.dtype,), (k,), x)
    choice(op, "dtype", dtype, (INT8, FP8))
    if residual is None:
        return quantized(m, k, dtype)
    tensor(op, "residual", residual, (x.dtype,), (m, k), x)
    return [*quantized(m, k, dtype), ((m, k), x.dtype)]


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Outputs:
    return norm_quant("rms_norm_quant", x, {"weight": weight}, None, dtype)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> Outputs:
    return norm_quant("add_rms_norm_quant", x, {"weight": weight}, residual, dtype)


def layer_norm_quant(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Outputs:
    return norm_quant("layer_norm_quant", x, {"weight": weight, "bias": bias}, None, dtype)


def add_layer_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Outputs:
    return norm_quant("add_layer_norm_quant", x, {"weight": weight, "bias": bias}, residual, dtype)


def post_layer_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Outputs:
    return norm_quant("post_layer_norm_quant", x, {"weight": weight, "bias": bias}, residual, dtype)


def silu_mul_quant(gate_up: Tensor, dtype: torch.dtype) -> Outputs:
    op = "silu_mul_quant"
    m, both = matrix(op, "gate_up", gate_up, HALVES)
    if both % (2 * MULTIPLE):
        raise ZqError(
            f"zq::{op}: gate_up has {both} columns, expected twice a multiple of {MULTIPLE}; pad both halves"
        )
    choice(op, "dtype", dtype, (INT8, FP8))
    return quantized(m, both // 2, dtype)


def gelu_quant(x: Tensor, approximate: str, dtype: torch.dtype) -> Outputs:
    op = "gelu_quant"
    m, k = matrix(op, "x", x, HALVES)
    choice(op, "approximate", approximate, ("none", "tanh"))
    choice(op, "dtype", dtype, (INT8, FP8))
    return quantized(m, k, dtype)


def gemm(  # noqa: PLR0913
    op: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    w: Tensor,
    packing: Packing,
    vectors: Mapping[str, tuple[Tensor | None, tuple[Any, ...]]],
    bias: Tensor | None,
    n: Any,
    out: torch.dtype,
) -> Outputs:
    """vectors: float32 ones, with the shapes that they must have, None where they must be absent."""
    m, k = matrix(op, "x", x, dtypes)
    choice(op, "out", out, HALVES)
    if x.dtype == INT8 and k > INT8_K:
        raise ZqError(
            f"zq::{op}: K = {k} is more than {INT8_K}, where sums may overflow 32 bits; use FP8 activations"
        )
    tensor(op, "w", w, (torch.uint8,), (packed_bytes(packing, n, k),), x)
    for name, (vector, shape) in vectors.items():
        if vector is None:
            raise ZqError(f"zq::{op}: {name} is missing; give a float32 tensor of shape {list(shape)}")
        tensor(op, name, vector, (F32,), shape, x)
    if bias is not None:
        tensor(op, "bias", bias, (out,), (n,), x)
    return [((m, n), out)]


def w8a8_int8(
    x: Tensor, sx: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: Any, out: torch.dtype
) -> Outputs:
    vectors = {"sx": (sx, (x.shape[0],)), "ws": (ws, (n,))}
    return gemm("w8a8_int8", x, (INT8,), w, Packing("w8a8"), vectors, bias, n, out)


def w8a8_fp8(
    x: Tensor, sx: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: Any, out: torch.dtype
) -> Outputs:
    vectors = {"sx": (sx, (x.shape[0],)), "ws": (ws, (n,))}
    return gemm("w8a8_fp8", x, (FP8,), w, Packing("w8a8"), vectors, bias, n, out)


def fp8_block128(x: Tensor, sx: Tensor, w: Tensor, bias: Tensor | None, n: Any, out: torch.dtype) -> Outputs:
    vectors = {"sx": (sx, (x.shape[0], -(-x.shape[-1] // 128)))}
    return gemm("fp8_block128", x, (FP8,), w, Packing("fp8_block"), vectors, bias, n, out)


def w4a8_int8(  # noqa: PLR0913 (the operator's arguments)
    x: Tensor,
    sx: Tensor,
    rowsum: Tensor,
    w: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    n: Any,
    group: int,
    out: torch.dtype,
) -> Outputs:
    op = "w4a8_int8"
    vectors = {"sx": (sx, (x.shape[0],)), "ws": (ws, (n,))}
    found = gemm(op, x, (INT8,), w, Packing("w4a8_two", group), vectors, bias, n, out)
    tensor(op, "rowsum", rowsum, (I32,), (x.shape[0],), x)
    return found


def w4a8_int8_group(
    x: Tensor,
    sx: Tensor,
    w: Tensor,
    ws: Tensor | None,
    bias: Tensor | None,
    n: Any,
    group: int,
    out: torch.dtype,
) -> Outputs:
    op = "w4a8_int8_group"
    vectors = {"sx": (sx, (x.shape[0],)), **channel(op, ws, n, group)}
    return gemm(op, x, (INT8,), w, Packing("w4a8_group", group), vectors, bias, n, out)


def w4a8_fp8(
    x: Tensor, sx: Tensor, w: Tensor, bias: Tensor | None, n: Any, group: int, out: torch.dtype
) -> Outputs:
    vectors = {"sx": (sx, (x.shape[0],))}
    return gemm("w4a8_fp8", x, (FP8,), w, Packing("w4a8_fp8", group), vectors, bias, n, out)


def w4a16(
    x: Tensor, w: Tensor, ws: Tensor | None, bias: Tensor | None, n: Any, group: int, asym: bool
) -> Outputs:
    packing = Packing("w4a16", group, asym, x.dtype == torch.float16)
    return gemm("w4a16", x, HALVES, w, packing, channel("w4a16", ws, n, group), bias, n, x.dtype)


def w8a16(x: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: Any) -> Outputs:
    return gemm("w8a16", x, HALVES, w, Packing("w8a16"), {"ws": (ws, (n,))}, bias, n, x.dtype)


def channel(
    op: str, ws: Tensor | None, n: Any, group: int
) -> dict[str, tuple[Tensor | None, tuple[Any, ...]]]:
    """Channel scales are needed where there are no groups (group 0), and only there."""
    if group and ws is not None:
        raise ZqError(
            f"zq::{op}: ws is given and group is {group}; the scales of groups are part of w, give None"
        )
    return {} if group else {"ws": (ws, (n,))}
