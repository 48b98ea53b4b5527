"""Products of a CPU with integer weights, through torch's own kernels.

    integer_linear   INT8 activations, a scale per channel: sums of integers, exact whatever their order

        y = round(float32(x (q - z)) * (scale * sx) + bias)

    packed_linear    bfloat16 activations, or the codes of INT8 ones, and scales per group of 4-bit weights
                     or per channel of 8-bit ones: sums in float32

        y = round(x W^T sx + bias)

both as zq/kernels/reference.py has it. As operators (`integer_op`, `packed_op`) torch.compile, which would
change how they round, leaves them alone; outside of it the plain functions save what calling an operator
costs. Large tensors are changed in place: fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

PORTION = 512  # inputs of INT8 x (INT8 - zero point) whose sum stays below 2^24
FEW = 48  # rows from which a product in bfloat16 is worth unpacking the weight
REACH = 127.5  # codes of INT8, zq's int8:token
TINY, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@functools.cache
def has_int8() -> bool:
    """Whether torch's INT8 product is exact and fast here: oneDNN on a processor that sums bytes in 32 bits
    (VNNI). Older ones saturate in 16 bits, and without oneDNN it is a plain loop."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


@functools.cache
def has_packed() -> bool:
    """Whether torch has kernels, not plain loops, for packed weights here: AVX2 or AVX-512."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (codes of `reference.quantize` as float32 [M, K], scale [M, 1] float32; that of a row of
    zeros is another one)."""
    step = (x.abs().amax(-1, keepdim=True).float() / REACH).clamp_(TINY, MOST)
    wide = x.float() if x.dtype != torch.float32 else x.clone()
    return wide.div_(step).round_().clamp_(-128, 127), step


def integer_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [M, K] of a floating-point dtype, quantized to INT8 here, token by token; codes [N, K] int8; scale
    [N] float32 and zero [N] int8 or None -> [M, N] in the dtype of x."""
    q, sx = codes_of(x)
    if has_int8():
        acc = torch.ops.aten._int_mm(q.to(torch.int8), codes.t())
        if zero is not None:
            acc -= q.sum(1, keepdim=True).int() * zero.int()
    else:
        acc = product(q, codes, zero)
    return _finish((scale * sx).mul_(acc), bias, x.dtype)


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y float32 [M, N], which is changed."""
    return (y if bias is None else y.add_(bias)).to(dtype)


integer_op = torch.library.custom_op("zq::integer_linear", integer_linear, mutates_args=())


@integer_op.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def product(x: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    """x [M, K] float32 whole numbers of INT8, codes [N, K] int8, zero [N] or None -> [M, N] float32, exact
    before it is rounded to float32, out of products in float32: for processors without INT8 ones."""
    if x.shape[1] <= PORTION:
        return _portion(x, codes, zero)
    parts = zip(x.split(PORTION, 1), codes.split(PORTION, 1), strict=True)
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    for x_part, codes_part in parts:
        total += _portion(x_part, codes_part, zero)
    return total.float()


def _portion(x: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    acc = x @ codes.float().T
    return acc if zero is None else acc - x.sum(1, keepdim=True) * zero.float()


def pack4(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] in -8..7, scale bfloat16 [N, G] -> what torch's 4-bit product takes: (nibbles uint8
    [N, K / 2] in an order of its own, bfloat16 [G, N, 2] of scales and zeros)."""
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().add_(8), 1)
    both = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    return nibbles, both


def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    nibbles: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    group: int,
    quantize: bool,
) -> Tensor:
    """x bfloat16 [M, K]; codes int8 [N, K], scale bfloat16 [N, G]; nibbles, scales: of `pack4`, None for
    8-bit weights with a scale per channel. quantize: x to INT8, token by token. -> bfloat16 [M, N].

    From FEW rows on the weight is dequantized to bfloat16 for this call, as the simulation does once.
    """
    sx = None
    if quantize:
        q, sx = codes_of(x)
        x = q.bfloat16()  # exact
    if x.shape[0] >= FEW:
        wide = codes.bfloat16()
        wide.view(wide.shape[0], scale.shape[1], -1).mul_(scale.unsqueeze(-1))
        y = linear(x, wide)
    elif nibbles is not None:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), nibbles, group, scales)
    else:
        y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scale[:, 0])
    if sx is None and bias is None:
        return y
    wide = y.float()
    return _finish(wide if sx is None else wide.mul_(sx), bias, x.dtype)


packed_op = torch.library.custom_op("zq::packed_linear", packed_linear, mutates_args=())


@packed_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    nibbles: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    group: int,
    quantize: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])
