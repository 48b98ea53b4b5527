"""What every operator computes, in plain torch on the CPU. Slow and obvious: the kernels must agree with it.

Activations are quantized by zq.numerics, as the runtime simulates it. What a fused operator does before that
is rounded to the dtype of its input where the unfused model rounds (norms as in transformers); sums are taken
in float64 and rounded to float32, so a kernel that sums in float32 may differ by one unit in the last place
of a norm's inverse, and rarely by one code.

Products of matrices: x [M, K], weight [N, K].

    integers   acc = sum of x q, exact;  y = round(float32(acc) * (ws * sx) + bias)
    groups     v = sum over groups in order of float32(acc_g) * gs;  y = round(v * sx + bias)
    floats     v = sum in float64, then as above

Each product and each sum is rounded to float32, and y once more to its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq.kernels import layout
from zq.kernels.layout import Packing
from zq.numerics import scales
from zq.numerics.groups import group
from zq.numerics.qtensor import encode
from zq.spec import TensorSpec

SPECS = {
    torch.int8: TensorSpec.parse("int8:token"),
    torch.float8_e4m3fn: TensorSpec.parse("e4m3fn:token"),
}


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (q [M, K] int8 or e4m3, scale [M] float32)."""
    spec = SPECS[dtype]
    rows = group(x.float(), spec)
    scale = scales.absmax(rows, spec, torch.float32)
    if dtype == torch.int8:
        q = encode(rows, spec, scale)
    else:  # torch keeps minus zero, which zq's codes do not have
        q = (rows / scale.step.unsqueeze(-1)).clamp(-448, 448).to(dtype)
    return q.reshape(x.shape), scale.scale.reshape(-1)


def quant_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = quantize(x, torch.int8)
    return q, scale, q.sum(-1, dtype=torch.int32)


def quant_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, torch.float8_e4m3fn)


def quant_fp8_block128(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % 128))
    q, scale = quantize(padded.reshape(-1, 128), torch.float8_e4m3fn)
    return q.reshape(padded.shape)[:, :k].contiguous(), scale.reshape(m, -1)


def codes(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = quantize(y, dtype)
    return (
        q,
        scale,
        q.sum(-1, dtype=torch.int32) if dtype == torch.int8 else y.new_empty(0, dtype=torch.int32),
    )


def _inverse(square: Tensor, eps: float) -> Tensor:
    return 1 / torch.sqrt(square.float() + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = (wide * _inverse(wide.double().square().mean(-1, keepdim=True), eps)).to(x.dtype)
    return (weight.float() * normed.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x.float() - x.double().mean(-1, keepdim=True).float()
    normed = centred * _inverse(centred.double().square().mean(-1, keepdim=True), eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return codes(rms_norm(x, weight, eps), dtype)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    total = x + residual
    return *codes(rms_norm(total, weight, eps), dtype), total


def layer_norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return codes(layer_norm(x, weight, bias, eps), dtype)


def add_layer_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    total = x + residual
    return *codes(layer_norm(total, weight, bias, eps), dtype), total


def post_layer_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    normed = layer_norm(x + residual, weight, bias, eps)
    return *codes(normed, dtype), normed


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    silu = (gate / (1 + torch.exp(-gate))).to(gate_up.dtype)
    return (silu.float() * up).to(gate_up.dtype)


def silu_mul_quant(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return codes(silu_mul(gate_up), dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(x.float(), approximate=approximate).to(x.dtype)


def gelu_quant(x: Tensor, approximate: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return codes(gelu(x, approximate), dtype)


def finish(v: Tensor, scale: Tensor | None, bias: Tensor | None, out: torch.dtype) -> Tensor:
    """v [M, N], scale broadcastable -> v * scale + bias, in float32 steps, in `out`."""
    v = v.float()
    v = v if scale is None else v * scale
    v = v if bias is None else v + bias.float()
    return v.to(out)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] of any dtype, weight [N, K] float64 -> [M, N] float64. Exact for integers below 2^53."""
    return x.double() @ weight.T


def w8a8_int8(
    x: Tensor, sx: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: int, out: torch.dtype
) -> Tensor:
    weight = layout.unpack(Packing("w8a8"), w, n, x.shape[1])[0].view(torch.int8)
    return finish(product(x, weight.double()), ws * sx[:, None], bias, out)


def w8a8_fp8(
    x: Tensor, sx: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: int, out: torch.dtype
) -> Tensor:
    weight = layout.unpack(Packing("w8a8"), w, n, x.shape[1])[0].view(torch.float8_e4m3fn)
    return finish(product(x, weight.double()), ws * sx[:, None], bias, out)


def fp8_block128(x: Tensor, sx: Tensor, w: Tensor, bias: Tensor | None, n: int, out: torch.dtype) -> Tensor:
    k = x.shape[1]
    codes, scale, _ = layout.unpack(Packing("fp8_block"), w, n, k)
    assert scale is not None
    wide = scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    weight = codes.view(torch.float8_e4m3fn).double() * wide
    steps = sx.double().repeat_interleave(128, 1)[:, :k]
    return finish(product(x.double() * steps, weight), None, bias, out)


def w4a8_int8(  # noqa: PLR0913 (the operator's arguments)
    x: Tensor,
    sx: Tensor,
    rowsum: Tensor,
    w: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    out: torch.dtype,
) -> Tensor:
    k = x.shape[1]
    q, sub, offset = layout.unpack(Packing("w4a8_two", group), w, n, k)
    assert sub is not None
    assert offset is not None
    u = q * _spread(sub, group, k) + _spread(offset, group, k)
    acc = product(x, u.double()) - 128 * rowsum.double()[:, None]
    return finish(acc, ws * sx[:, None], bias, out)


def w4a8_int8_group(
    x: Tensor,
    sx: Tensor,
    w: Tensor,
    ws: Tensor | None,
    bias: Tensor | None,
    n: int,
    group: int,
    out: torch.dtype,
) -> Tensor:
    k = x.shape[1]
    q, gs, _ = layout.unpack(Packing("w4a8_group", group), w, n, k)
    q = q.double() - 8
    if ws is not None:
        return finish(product(x, q), ws * sx[:, None], bias, out)
    assert gs is not None
    v = torch.zeros(x.shape[0], n)
    for x_part, q_part, scale in zip(x.split(group, 1), q.split(group, 1), gs.unbind(1), strict=True):
        v = v + product(x_part, q_part).float() * scale
    return finish(v, sx[:, None], bias, out)


def w4a8_fp8(
    x: Tensor, sx: Tensor, w: Tensor, bias: Tensor | None, n: int, group: int, out: torch.dtype
) -> Tensor:
    k = x.shape[1]
    q, gs, _ = layout.unpack(Packing("w4a8_fp8", group), w, n, k)
    assert gs is not None
    weight = (q.double() - 8) * _spread(gs.double(), group, k)
    return finish(product(x, weight), sx[:, None], bias, out)


def w4a16(
    x: Tensor, w: Tensor, ws: Tensor | None, bias: Tensor | None, n: int, group: int, asym: bool
) -> Tensor:
    k = x.shape[1]
    packing = Packing("w4a16", group, asym, x.dtype == torch.float16)
    q, gs, zero = layout.unpack(packing, w, n, k)
    middle = 8 if zero is None else _spread(zero.double(), group, k)
    weight = q.double() - middle
    if gs is not None:  # the weight of QTensor.dequantize, rounded to the dtype of x
        weight = (weight.float() * _spread(gs.float(), group, k)).to(x.dtype).double()
    return finish(product(x, weight), ws if group == 0 else None, bias, x.dtype)


def w8a16(x: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, n: int) -> Tensor:
    weight = layout.unpack(Packing("w8a16"), w, n, x.shape[1])[0].view(torch.int8)
    return finish(product(x, weight.double()), ws, bias, x.dtype)


def _spread(of_groups: Tensor, group: int, k: int) -> Tensor:
    """[N, G] -> [N, K]"""
    return of_groups.repeat_interleave(group, 1)[:, :k]
