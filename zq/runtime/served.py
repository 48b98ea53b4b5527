"""A quantized weight made ready for serving, in one of three ways:

    kernel      packed once for an operator of `torch.ops.zq` (CUDA, where a kernel has the scheme)
    torch's     a product of torch that takes codes (cpu.py, CPU)
    dequantized dequantized once, activations rounded in simulation as zq.load does: any other scheme

`serve` chooses. What is computed is what zq measured, up to the rounding of the output. Unlike QuantLinear
these do not go back into a checkpoint. `takes` says which quantized rows a module can be given in place of
its input (rows.py), where it can.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import zq.kernels.ops  # noqa: F401 (defines torch.ops.zq)
from zq.kernels import layout
from zq.kernels.select import kernel_op
from zq.kernels.tiles import packing, unit_name
from zq.numerics.qtensor import QTensor, fake_quantize_tokens
from zq.runtime.cpu import cpu_linear
from zq.runtime.rows import Rows, quantized
from zq.spec import Scheme, TensorSpec

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def units(op: str, scheme: Scheme, dtype: torch.dtype, capability: int) -> list[str]:
    """Names of the compile units that a layer needs: load them before a CUDA graph is captured."""
    packed = packing(op, group_of(scheme.weights), not scheme.weights.symmetric, dtype == torch.float16)
    names = [unit_name(op, packed, capability)]
    if scheme.activations is not None:
        kind = "int8" if scheme.activations.format == "int8" else "fp8"
        blocks = "_block128" if scheme.activations.layout.kind == "group" else ""
        names.append(f"plain_{kind}{blocks}_{NAMES[dtype]}")
    return names


def group_of(spec: TensorSpec) -> int:
    """Inputs that share a scale; 0: those of a row."""
    return (spec.layout.size or 0) if spec.layout.kind == "group" else 0


def serve(q: QTensor, activations: TensorSpec | None, dtype: torch.dtype) -> nn.Module:
    """A module x [..., K] of `dtype`, bias [N] or None -> [..., N], on the device of q. Its `way` names what
    computes it. Raises ZqError when a kernel exists and cannot be loaded."""
    scheme = Scheme(q.spec, activations)
    device = q.codes.device
    sm = capability(device)
    if sm is not None:
        op = kernel_op(scheme, q.shape[1], NAMES[dtype], sm)
        if op is not None and (op != "w4a16" or _holds(q.scale, dtype)):
            load_kernels(op, scheme, dtype, device)
            return KernelLinear(q, op, dtype)
    made = cpu_linear(q, activations, dtype) if device.type == "cpu" else None
    return DenseLinear(q, activations, dtype) if made is None else made


def capability(device: torch.device) -> int | None:
    """10 x the compute capability of a device that runs kernels, None for every other."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _holds(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales stay what they are in the dtype in which a kernel of 16-bit activations keeps them."""
    return torch.equal(scale.to(dtype).float(), scale.float())


def load_kernels(op: str, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> None:
    """So that nothing is compiled or loaded while a CUDA graph is captured. Raises ZqError."""
    if device.type != "cuda":
        return
    from zq.kernels import cuda  # of use only where there is a GPU

    here = cuda.describe(torch.cuda.current_device() if device.index is None else device.index)
    cuda.prepare(device, units(op, scheme, dtype, here.number))


class KernelLinear(nn.Module):
    """`torch.ops.zq.OP` on a weight packed for it; on a CPU the operator is its slow reference."""

    def __init__(self, q: QTensor, op: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.w: Tensor
        self.ws: Tensor | None
        self.n, self.k, self.op = q.shape[0], q.shape[1], op
        self.group, self.asym = group_of(q.spec), not q.spec.symmetric
        self.packing = packing(op, self.group, self.asym, dtype == torch.float16)
        w, ws = pack(q, op, dtype)
        self.register_buffer("w", w)
        self.register_buffer("ws", ws)

    @property
    def way(self) -> str:
        return f"zq's kernel {self.op}"

    @property
    def takes(self) -> torch.dtype | None:
        """What the operator wants its rows quantized to, token by token; None: as they are."""
        if self.op.endswith("a16") or self.op == "fp8_block128":  # which has scales within a row
            return None
        return torch.float8_e4m3fn if self.op.endswith("fp8") else torch.int8

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self.product(quantized(Rows(rows), self.takes), bias, x.dtype).reshape(*x.shape[:-1], self.n)

    def product(self, rows: Rows, bias: Tensor | None, out: torch.dtype) -> Tensor:
        """rows as `takes` says, bias [N] or None -> [M, N] in `out`."""
        ops, w, ws, n, group = torch.ops.zq, self.w, self.ws, self.n, self.group
        x, sx, rowsum = rows
        if self.op == "w4a16":
            return ops.w4a16(x, w, ws, bias, n, group, self.asym)
        if self.op == "w8a16":
            return ops.w8a16(x, w, ws, bias, n)
        if self.op == "fp8_block128":
            return ops.fp8_block128(*ops.quant_fp8_block128(x), w, bias, n, out)
        if self.op == "w4a8_fp8":
            return ops.w4a8_fp8(x, sx, w, bias, n, group, out)
        if self.op == "w8a8_fp8":
            return ops.w8a8_fp8(x, sx, w, ws, bias, n, out)
        if self.op == "w4a8_int8":
            return ops.w4a8_int8(x, sx, rowsum, w, ws, bias, n, group, out)
        if self.op == "w4a8_int8_group":
            return ops.w4a8_int8_group(x, sx, w, ws, bias, n, group, out)
        return ops.w8a8_int8(x, sx, w, ws, bias, n, out)


def pack(q: QTensor, op: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(packed weight, channel scales [N] float32 or None) of an operator with inputs of `dtype`."""
    spec, group = q.spec, group_of(q.spec)
    p = packing(op, group, not spec.symmetric, dtype == torch.float16)
    if spec.two_level:
        return layout.pack(p, *layout.two_level(q)), q.scale[:, 0].float().contiguous()
    if op == "fp8_block128":
        return layout.pack(p, q.codes, q.scale), None
    if p.bits == 8:
        return layout.pack(p, q.codes.view(torch.uint8)), q.scale[:, 0].float().contiguous()
    codes = (q.codes + 8).to(torch.uint8)
    if group == 0:
        return layout.pack(p, codes), q.scale[:, 0].float().contiguous()
    return layout.pack(p, codes, q.scale, None if q.zero is None else (q.zero + 8).to(torch.uint8)), None


class DenseLinear(nn.Module):
    """The weight in `dtype` [N, K]."""

    way = "dequantized weights"
    takes = None

    def __init__(self, q: QTensor, activations: TensorSpec | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.activations = None if activations is None else str(activations)
        self.weight: Tensor
        self.register_buffer("weight", q.dequantize(dtype))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.activations is not None:
            x = (simulate_op if torch.compiler.is_compiling() else simulate)(x, self.activations)
        return nn.functional.linear(x, self.weight, bias)


def simulate(x: Tensor, spec: str) -> Tensor:
    """`fake_quantize_tokens`, as one operator where torch.compile would change its rounding."""
    return fake_quantize_tokens(x, parsed(spec))


parsed = cache(TensorSpec.parse)


simulate_op = torch.library.custom_op("zq::simulate_tokens", simulate, mutates_args=())


@simulate_op.register_fake
def _(x: Tensor, spec: str) -> Tensor:
    return torch.empty_like(x)
