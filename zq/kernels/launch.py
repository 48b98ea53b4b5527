"""From an operator's tensors to a launch: which kernel, how many blocks, which arguments.

`run` does it for torch.ops.zq. A function of LAUNCH takes an operator's outputs and arguments and returns
the launch, or None where there is nothing to compute. That depends on shapes, dtypes and numbers only, and
is kept: a later call sets addresses and launches.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels import checks, checks_kv, cuda, launch_kv, tiles
from zq.kernels.call import Launch, Mapped, Scratch

Describe = Callable[..., Launch | None]
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PIECE = 16  # bytes that a thread reads at once
THREADS = 1024
RESERVED = 2048  # bytes of shared memory that reductions use
SHORT, WIDE = 128, 3584  # pieces: what a warp keeps in registers, and a block
CLUSTER, CLUSTERED = 8, 512  # blocks, and threads of each
KEPT = 8192  # launches of a thread, at most
OUTPUTS = {  # fields of arguments that outputs fill; the other tensors have their names
    "quantize": ("q", "scale", "rowsum", "sum"),
    "product": ("y",),
    "decode_attention": ("out",),
    "store_kv": ("q",),
    "attend_token": ("codes", "steps", "rowsum"),
    "attend_text": ("out",),
    "attend_text_codes": ("out", "steps", "rowsum"),
}
RENAMED = {"gate_up": "x"}
ANYWHERE = frozenset(  # of the cache's kernels, which read one value of these at a time
    ("k_scale", "v_scale", "first", "last", "slopes", "position", "mask")
)


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
def row_shape(pieces: int, rows: int, device: cuda.Device, bare: bool = False) -> RowShape:
    """Who computes `rows` rows of `pieces` of 16 bytes. Few rows: a thread for each piece, and for long rows
    several multiprocessors, so that the time is short. Many rows, or nothing to compute before rows are
    quantized (`bare`): four pieces in a thread, so that fewer share a reduction, and short rows in a warp,
    which needs no barrier. The codes are the same. Limits fit times of an H200."""
    warps = -(-pieces // 32)
    if pieces > WIDE:
        return RowShape("quantize_long", THREADS, shared=pieces * PIECE)
    if pieces > (THREADS if not bare else 2 * THREADS) and device.number >= 90:
        blocks = next(size for size in (2, 4, CLUSTER) if size * CLUSTERED >= pieces)
        if 2 * rows * blocks <= device.sms:
            return RowShape("quantize_cluster", -(-warps // blocks) * 32, blocks=blocks)
    if pieces <= THREADS and rows * warps <= 16 * device.sms and not bare:
        return RowShape("quantize_1", 32 * warps)
    if pieces <= SHORT:
        return RowShape("quantize_warp", 128, rows=4)
    return RowShape("quantize_4", -(-warps // 4) * 32)


class GemmArguments(ctypes.Structure):
    """The parameters of gemm_sm90.cu (behind its map) and gemm_mma.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "sx", "rowsum", "w", "ws", "bias", "y", "scratch")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "ldx", "split", "half")),
    )


def quantize(op: str, outputs: list[Tensor], x: Tensor, k: int, eps: float = 0.0) -> Launch | None:
    """op: name of quant.cu's OP in lower case."""
    q, scale = outputs[:2]
    rows = q.shape[0]
    if rows == 0:
        return None
    short = "int8" if q.dtype == torch.int8 else "fp8"
    blocks = "_block128" if scale.dim() == 2 else ""
    device = cuda.describe(x.device.index)
    if short == "fp8" and device.number < 89:
        raise cuda.no_fp8(device)
    shape = row_shape(k * x.element_size() // PIECE, rows, device, op == "plain")
    if shape.shared > device.shared - RESERVED:
        raise ZqError(
            f"a row of {shape.shared} bytes is longer than the {device.shared - RESERVED} bytes of shared "
            "memory that keep it; compute without kernels"
        )
    name = f"{op}_{short}{blocks}_{KINDS[x.dtype]}"
    arguments = QuantArguments(rows=rows, k=k, inverse_k=1 / k, eps=eps)
    grid = (-(-rows // shape.rows) * shape.blocks, 1, 1)
    options = {"shared": shape.shared, "cluster": shape.blocks, "pdl": True}
    return Launch(device, name, shape.entry, grid, shape.threads, arguments, **options)


def _plain(op: str, outputs: list[Tensor], x: Tensor) -> Launch | None:
    return quantize("plain", outputs, x, x.shape[1])


def _norm(name: str) -> Describe:
    def describe(op: str, outputs: list[Tensor], x: Tensor, *args: Any) -> Launch | None:
        return quantize(name, outputs, x, x.shape[1], args[-2])

    return describe


def _silu(op: str, outputs: list[Tensor], gate_up: Tensor, dtype: torch.dtype) -> Launch | None:
    return quantize("silumul", outputs, gate_up, gate_up.shape[1] // 2)


def _gelu(op: str, outputs: list[Tensor], x: Tensor, approximate: str, dtype: torch.dtype) -> Launch | None:
    return quantize("gelunew" if approximate == "tanh" else "gelu", outputs, x, x.shape[1])


@lru_cache(maxsize=65536)
def _choose(
    op: str, m: int, n: int, k: int, group: int, asym: bool, half: bool, device: cuda.Device
) -> tiles.Config:
    return tiles.choose(op, m, n, k, group=group, arch=device.number, sms=device.sms, asym=asym, half=half)


def gemm(op: str, outputs: list[Tensor], x: Tensor, group: int = 0, asym: bool = False) -> Launch | None:
    """y [M, N] from x [M, K] and a packed weight, with the kernel that `tiles.choose` names."""
    (y,) = outputs
    (m, n), k = y.shape, x.shape[1]
    if m == 0:
        return None
    device = cuda.describe(x.device.index)
    config = _choose(op, m, n, k, group, asym, x.dtype == torch.float16, device)
    arguments = GemmArguments(m=m, n=n, k=k, ldx=k, split=config.split, half=int(y.dtype == torch.float16))
    return Launch(
        device,
        config.unit,
        config.entry,
        config.grid,
        config.block,
        arguments,
        spread=True,
        shared=config.shared,
        cluster=config.cluster,
        pdl=config.pdl,
        scratch=Scratch(config.workspace, config.zeroed, {"scratch": 0}) if config.workspace else None,
        mapped=Mapped(m, k, x.element_size(), config.map_rows) if config.map_rows else None,
    )


def _product(op: str, outputs: list[Tensor], x: Tensor, *args: Any) -> Launch | None:
    return gemm(op, outputs, x)


def _grouped(op: str, outputs: list[Tensor], x: Tensor, *args: Any) -> Launch | None:
    return gemm(op, outputs, x, group=args[-2])


def _w4a16(op: str, outputs: list[Tensor], x: Tensor, *args: Any) -> Launch | None:
    return gemm(op, outputs, x, group=args[-2], asym=args[-1])


LAUNCH: dict[str, Describe] = {
    "quant_int8": _plain,
    "quant_fp8": _plain,
    "quant_fp8_block128": _plain,
    "rms_norm_quant": _norm("rmsnorm"),
    "add_rms_norm_quant": _norm("addrmsnorm"),
    "layer_norm_quant": _norm("layernorm"),
    "add_layer_norm_quant": _norm("addlayernorm"),
    "post_layer_norm_quant": _norm("postlayernorm"),
    "silu_mul_quant": _silu,
    "gelu_quant": _gelu,
    "w8a8_int8": _product,
    "w8a8_fp8": _product,
    "fp8_block128": _product,
    "w4a8_int8": _grouped,
    "w4a8_int8_group": _grouped,
    "w4a8_fp8": _grouped,
    "w4a16": _w4a16,
    "w8a16": _product,
    **launch_kv.LAUNCH,
}


class Kept(NamedTuple):
    """A launch and what each call of it needs: outputs (shape, dtype), and which tensor of (*args, *outputs)
    fills which slot, and what its address must be a multiple of."""

    launch: Launch | None
    outputs: checks.Outputs
    slots: tuple[tuple[int, int, int], ...]


class _Here(threading.local):
    def __init__(self) -> None:
        self.kept: dict[Any, Kept] = {}


_here = _Here()


def run(op: str, args: Sequence[Any]) -> list[Tensor]:
    """An operator on CUDA tensors, on the current stream: its outputs. Raises ZqError."""
    key: list[Any] = [op]
    for x in args:
        key.append((x.shape, x.dtype, x.stride(), x.get_device()) if isinstance(x, Tensor) else x)
    found = _here.kept.get(tuple(key))
    if found is None:
        found = prepare(op, args)
        if len(_here.kept) >= KEPT:
            _here.kept.clear()
        _here.kept[tuple(key)] = found
    device = args[0].device
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in found.outputs]
    if found.launch is not None:
        address(found, (*args, *made))
        found.launch()
    return made


def forget() -> None:
    """Prepare every call of this thread again."""
    _here.kept.clear()


def prepare(op: str, args: Sequence[Any]) -> Kept:
    """Everything of a call that does not depend on addresses; checks its arguments. Raises ZqError."""
    check = getattr(checks_kv if op in launch_kv.LAUNCH else checks, op)
    outputs = check(*args)
    made = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in outputs]
    launch = LAUNCH[op](op, made, *args)
    if launch is None:
        return Kept(None, outputs, ())
    kind = "quantize" if "quant" in op else op if op in launch_kv.LAUNCH else "product"
    named = [RENAMED.get(name, name) for name in list(signature(check).parameters)[: len(args)]]
    named += OUTPUTS[kind][: len(outputs)]
    slots = [
        (launch.places[name], i, 1 if kind in launch_kv.LAUNCH and name in ANYWHERE else cuda.ALIGNED)
        for i, (name, x) in enumerate(zip(named, (*args, *made), strict=True))
        if isinstance(x, Tensor) and name in launch.places
    ]
    return Kept(launch, outputs, tuple(slots))


def address(kept: Kept, tensors: Sequence[Any]) -> None:
    """Set the addresses of a call's tensors (*args, *outputs). Raises ZqError."""
    slots = kept.launch.slots  # type: ignore[union-attr]
    for slot, place, multiple in kept.slots:
        begin = tensors[place].data_ptr()
        if begin % multiple:
            raise cuda.unaligned()
        slots[slot] = begin
