"""Products of INT8 activations and integer weights on a CPU, exact whatever the order of summation.

    y = round(sum over groups of float32(x (q - z)) * scale * sx + bias)

as zq/kernels/reference.py has it, but fast enough to serve with: codes are multiplied as float32, where sums
of integers below 2^24 are exact. It is one operator, `zq::integer_linear`, which torch.compile leaves alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq.kernels import reference

PORTION = 512  # inputs of INT8 x (INT8 - zero point) whose sum stays below 2^24


def product(x: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    """x [M, S] float32 whole numbers of INT8, codes [N, S] int8, zero [N] or None -> [M, N] float32, exact
    before it is rounded to float32."""
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


@torch.library.custom_op("zq::integer_linear", mutates_args=())
def integer_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """x [M, K] of a floating-point dtype, quantized to INT8 here, token by token; codes [N, K] int8; scale
    [N, G] float32 and zero [N, G] int8 for groups of `group` inputs, the last may be ragged; group 0: one
    scale per channel -> [M, N] in the dtype of x."""
    q, sx = reference.quantize(x, torch.int8)
    wide = q.float()
    if group == 0:
        acc = product(wide, codes, None if zero is None else zero[:, 0])
        return reference.finish(acc, scale[:, 0] * sx[:, None], bias, x.dtype)
    v = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float32)
    for i, (x_part, codes_part) in enumerate(zip(wide.split(group, 1), codes.split(group, 1), strict=True)):
        v += product(x_part, codes_part, None if zero is None else zero[:, i]) * scale[:, i]
    return reference.finish(v, sx[:, None], bias, x.dtype)


@integer_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])
