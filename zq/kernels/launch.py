"""From an operator's tensors to a launch: which kernel, how many blocks, which arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels import cuda, launch_kv, tiles
from zq.kernels.cuda import pointer

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PIECE = 16  # bytes that a thread reads at once
THREADS = 1024
RESERVED = 2048  # bytes of shared memory that reductions use
SHORT, WIDE = 128, 3584  # pieces: what a warp keeps in registers, and a block
CLUSTER, CLUSTERED = 8, 512  # blocks, and threads of each


class QuantArguments(ctypes.Structure):
    """`Args` of quant.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "residual", "weight", "bias", "sum", "q", "scale", "rowsum")
        ),
        ("rows", ctypes.c_int),
        ("k", ctypes.c_int),
        ("inverse_k", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


class RowShape(NamedTuple):
    """Entry of quant.cu, threads of a block, rows of a block, blocks of a row (a cluster), bytes of shared
    memory."""

    entry: str
    threads: int
    rows: int = 1
    blocks: int = 1
    shared: int = 0


@lru_cache(maxsize=4096)
def row_shape(pieces: int, rows: int, device: cuda.Device) -> RowShape:
    """Who computes `rows` rows of `pieces` of 16 bytes. Few rows: a thread for each piece, and for long rows
    several multiprocessors, so that the time is short. Many rows: four pieces in a thread, so that fewer
    share a reduction, and short rows in a warp, which needs no barrier. The codes are the same."""
    warps = -(-pieces // 32)
    if pieces > WIDE:
        return RowShape("quantize_long", THREADS, shared=pieces * PIECE)
    if rows * warps <= 32 * device.sms:
        if pieces <= THREADS:
            return RowShape("quantize_1", 32 * warps)
        if device.number >= 90:
            blocks = next(size for size in (2, 4, CLUSTER) if size * CLUSTERED >= pieces)
            return RowShape("quantize_cluster", -(-warps // blocks) * 32, blocks=blocks)
    if pieces <= SHORT:
        return RowShape("quantize_warp", 128, rows=4)
    return RowShape("quantize_4", -(-warps // 4) * 32)


def quantize(op: str, x: Tensor, outputs: list[Tensor], k: int, eps: float = 0.0, **more: Tensor) -> None:
    """op: name of quant.cu's OP in lower case; more: residual, weight, bias."""
    q, scale = outputs[:2]
    rows = q.shape[0]
    if rows == 0:
        return
    arguments = QuantArguments(rows=rows, k=k, inverse_k=1 / k, eps=eps)
    outs = {"q": q, "scale": scale, "rowsum": outputs[2] if len(outputs) > 2 else None}
    outs["sum"] = outputs[3] if len(outputs) > 3 else None
    for name, value in {"x": x, **more, **outs}.items():
        setattr(arguments, name, pointer(value))
    short = "int8" if q.dtype == torch.int8 else "fp8"
    blocks = "_block128" if scale.dim() == 2 else ""
    device = cuda.describe(x.device.index)
    if short == "fp8" and device.number < 89:
        raise ZqError(f"{device.arch} has no FP8; use INT8 activations")
    shape = row_shape(k * x.element_size() // PIECE, rows, device)
    if shape.shared > device.shared - RESERVED:
        raise ZqError(
            f"a row of {shape.shared} bytes is longer than the {device.shared - RESERVED} bytes of shared "
            "memory that keep it; compute without kernels"
        )
    name = f"{op}_{short}{blocks}_{KINDS[x.dtype]}"
    grid = (-(-rows // shape.rows) * shape.blocks, 1, 1)
    options = {"shared": shape.shared, "cluster": shape.blocks, "pdl": True}
    cuda.launch(device, name, shape.entry, grid, shape.threads, [arguments], **options)


def _plain(op: str, outputs: list[Tensor], x: Tensor) -> None:
    quantize("plain", x, outputs, x.shape[1])


def _rms(op: str, outputs: list[Tensor], x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
    quantize("rmsnorm", x, outputs, x.shape[1], eps, weight=weight)


def _add_rms(
    op: str,
    outputs: list[Tensor],
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> None:
    quantize("addrmsnorm", x, outputs, x.shape[1], eps, residual=residual, weight=weight)


def _layer(
    op: str, outputs: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> None:
    quantize("layernorm", x, outputs, x.shape[1], eps, weight=weight, bias=bias)


def _add_layer(op: str, outputs: list[Tensor], x: Tensor, *args: Any) -> None:
    residual, weight, bias, eps, _ = args
    quantize("addlayernorm", x, outputs, x.shape[1], eps, residual=residual, weight=weight, bias=bias)


def _post_layer(op: str, outputs: list[Tensor], x: Tensor, *args: Any) -> None:
    residual, weight, bias, eps, _ = args
    quantize("postlayernorm", x, outputs, x.shape[1], eps, residual=residual, weight=weight, bias=bias)


def _silu(op: str, outputs: list[Tensor], gate_up: Tensor, dtype: torch.dtype) -> None:
    quantize("silumul", gate_up, outputs, gate_up.shape[1] // 2)


def _gelu(op: str, outputs: list[Tensor], x: Tensor, approximate: str, dtype: torch.dtype) -> None:
    quantize("gelunew" if approximate == "tanh" else "gelu", x, outputs, x.shape[1])


@lru_cache(maxsize=65536)
def _choose(
    op: str, m: int, n: int, k: int, group: int, asym: bool, half: bool, device: cuda.Device
) -> tiles.Config:
    return tiles.choose(op, m, n, k, group=group, arch=device.number, sms=device.sms, asym=asym, half=half)


def gemm(  # noqa: PLR0913
    op: str,
    outputs: list[Tensor],
    x: Tensor,
    w: Tensor,
    *,
    sx: Tensor | None = None,
    rowsum: Tensor | None = None,
    ws: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
    asym: bool = False,
) -> None:
    """y [M, N] from x [M, K] and a packed weight, with the kernel that `tiles.choose` names."""
    (y,) = outputs
    (m, n), k = y.shape, x.shape[1]
    if m == 0:
        return
    device = cuda.describe(x.device.index)
    config = _choose(op, m, n, k, group, asym, x.dtype == torch.float16, device)
    scratch = cuda.workspace(device, config.workspace, config.zeroed)
    arguments: list[Any] = [pointer(each) for each in (x, sx, rowsum, w, ws, bias, y, scratch)]
    arguments += [ctypes.c_int(each) for each in (m, n, k, k, config.split, int(y.dtype == torch.float16))]
    if config.map_rows:
        arguments.insert(0, cuda.tensor_map(x.data_ptr(), m, k, k, x.element_size(), config.map_rows))
    options = {"shared": config.shared, "cluster": config.cluster, "pdl": config.pdl}
    cuda.launch(device, config.unit, config.entry, config.grid, config.block, arguments, **options)


def _scaled(op: str, outputs: list[Tensor], x: Tensor, sx: Tensor, w: Tensor, *args: Any) -> None:
    ws, bias, *_ = args
    gemm(op, outputs, x, w, sx=sx, ws=ws, bias=bias)


def _two_level(
    op: str, outputs: list[Tensor], x: Tensor, sx: Tensor, rowsum: Tensor, w: Tensor, *args: Any
) -> None:
    ws, bias, _, group, _ = args
    gemm(op, outputs, x, w, sx=sx, rowsum=rowsum, ws=ws, bias=bias, group=group)


def _group(op: str, outputs: list[Tensor], x: Tensor, sx: Tensor, w: Tensor, *args: Any) -> None:
    ws, bias, _, group, _ = args
    gemm(op, outputs, x, w, sx=sx, ws=ws, bias=bias, group=group)


def _fp8_group(op: str, outputs: list[Tensor], x: Tensor, sx: Tensor, w: Tensor, *args: Any) -> None:
    bias, _, group, _ = args
    gemm(op, outputs, x, w, sx=sx, bias=bias, group=group)


def _block128(op: str, outputs: list[Tensor], x: Tensor, sx: Tensor, w: Tensor, *args: Any) -> None:
    gemm(op, outputs, x, w, sx=sx, bias=args[0])


def _w4a16(op: str, outputs: list[Tensor], x: Tensor, w: Tensor, *args: Any) -> None:
    ws, bias, _, group, asym = args
    gemm(op, outputs, x, w, ws=ws, bias=bias, group=group, asym=asym)


def _w8a16(
    op: str, outputs: list[Tensor], x: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: int
) -> None:
    gemm(op, outputs, x, w, ws=ws, bias=bias)


LAUNCH: dict[str, Callable[..., None]] = {
    "quant_int8": _plain,
    "quant_fp8": _plain,
    "quant_fp8_block128": _plain,
    "rms_norm_quant": _rms,
    "add_rms_norm_quant": _add_rms,
    "layer_norm_quant": _layer,
    "add_layer_norm_quant": _add_layer,
    "post_layer_norm_quant": _post_layer,
    "silu_mul_quant": _silu,
    "gelu_quant": _gelu,
    "w8a8_int8": _scaled,
    "w8a8_fp8": _scaled,
    "fp8_block128": _block128,
    "w4a8_int8": _two_level,
    "w4a8_int8_group": _group,
    "w4a8_fp8": _fp8_group,
    "w4a16": _w4a16,
    "w8a16": _w8a16,
    **launch_kv.LAUNCH,
}
