"""Linear layers whose three products are integer ones: ShiftQuant (arXiv:2411.10948), reconstructed.

The paper's text was not at hand; this is zq's reading of it. A product sums over an inner index k. Each row
of an operand has a scale of its own, which costs nothing, since it can be taken out of the sum. A scale for
each k cannot, but a power of two can stay inside: with r_k the largest magnitude at k, relative to the rows,

    g_k = min(floor(log2(1 / r_k)), groups - 1)       codes = round(x / (row scale * 2^-g_k))
    operand = codes << (groups - 1 - g_k)             product = sum_k operand_a operand_b * row scales

so nothing is clipped, the step at k is at most twice that of a scale of its own, and the whole is one plain
INT8 product with INT32 sums: the shifted codes of 4, 5 and 6 bits fit a byte with up to 5, 4 and 3 groups,
those of 8 bits with one. Gradients are rounded stochastically, which leaves their mean alone; weights and
activations to nearest.

What it saves: bits of what is stored and sent, against INT8 with one scale for all k. It saves no
multiplications: 4-bit codes take as long as INT8, which is what to compare with, not FP16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zq.errors import ZqError
from zq.quantizers.method import Layer

BITS = (4, 5, 6, 7, 8)
GRADIENTS = ("float", "int8", "int6", "int4")  # as the option of a step
LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Precision:
    """bits: of every code. groups: of inner indices; 0 means as many as fit a byte. Raises ZqError."""

    bits: int = 8
    groups: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ZqError(f"integer training with {self.bits} bits is not possible; allowed: 4 to 8")
        if not 0 <= self.groups <= self.most:
            raise ZqError(
                f"{self.groups} groups do not fit a byte with {self.bits} bits; allowed: up to {self.most}"
            )

    @property
    def top(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def most(self) -> int:
        """7 << 4 = 112, 31 << 2 = 124, 127: the most groups whose shifted codes fit a byte."""
        return 1 + int(math.log2(127 / self.top))


def precision_of(gradients: str) -> Precision | None:
    """Of one of GRADIENTS."""
    return None if gradients == "float" else Precision(int(gradients.removeprefix("int")))


@dataclass(frozen=True)
class Operand:
    """codes int8 [M, K], shifts folded in; scale float32 [M, 1]. Their product is what they stand for."""

    codes: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        return self.codes.float() * self.scale


def encode(x: Tensor, precision: Precision, stochastic: bool = False, shared: bool = False) -> Operand:
    """x [M, K] -> Operand with K as the inner index. stochastic: unbiased rounding with torch's generator of
    the device (the pipeline seeds that for every block). shared: one scale for all rows."""
    x = x.float()
    row = x.abs().amax(keepdim=True) if shared else x.abs().amax(1, keepdim=True)
    row = row.clamp_min(LEAST)
    groups = precision.groups or precision.most
    reach = (x / row).abs().amax(0).clamp_min(LEAST)
    place = torch.floor(-torch.log2(reach)).clamp(0, groups - 1)
    place = torch.where(torch.ldexp(reach, place) > 1, (place - 1).clamp_min(0), place)  # log2 is rounded
    steps = torch.ldexp(x / row * precision.top, place)
    codes = torch.floor(steps + torch.rand_like(steps)) if stochastic else torch.round(steps)
    codes = codes.clamp_(-precision.top, precision.top)  # 127 + u rounds up where u is 1 - 2^-24
    folded = torch.ldexp(codes, groups - 1 - place).to(torch.int8)
    scale = row * (1 / (precision.top * 2.0 ** (groups - 1)))  # CUDA would turn a quotient into this
    return Operand(folded, scale.expand(len(x), 1))


def product(a: Operand, b: Operand) -> Tensor:
    """sum_k a[m, k] b[n, k] -> float32 [M, N]; exact up to the last, floating-point scaling.

    Raises ZqError when the sums could exceed INT32 (K over 133,000).
    """
    if a.codes.shape[1] * 127 * 127 >= 1 << 31:
        raise ZqError(f"integer sums over {a.codes.shape[1]} products exceed INT32; use fewer at once")
    return _matmul(a.codes, b.codes).float() * a.scale * b.scale.T


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] x int8 [N, K] -> int32 [M, N]. CUDA's wants multiples of 8, more than 16 rows, and both
    with K innermost in memory, which codes of a transposed tensor do not have."""
    if not a.is_cuda:
        return torch._int_mm(a, b.T)  # pyright: ignore[reportPrivateImportUsage]
    m, n, k = len(a), len(b), a.shape[1]
    inner = -k % 8
    a = nn.functional.pad(a, (0, inner, 0, max(24, m + -m % 8) - m))
    b = nn.functional.pad(b, (0, inner, 0, -n % 8))
    return torch._int_mm(a.contiguous(), b.contiguous().T)[:m, :n]  # pyright: ignore[reportPrivateImportUsage]


class _Linear(torch.autograd.Function):
    """y = x W^T + bias of x [M, K], W [N, K]; `whole`: y comes from integers too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, p: Precision, whole: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.precision, ctx.biased = p, bias is not None
        if not whole:
            return nn.functional.linear(x, weight, bias)
        y = product(encode(x, p), encode(weight, p)).to(x.dtype)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        p, into_x, into_w = ctx.precision, None, None
        if ctx.needs_input_grad[0]:  # inner index: outputs
            into_x = product(encode(grad, p, stochastic=True), encode(weight.T, p)).to(x.dtype)
        if ctx.needs_input_grad[1]:  # inner index: tokens
            into_w = product(encode(grad.T, p, stochastic=True), encode(x.T, p)).to(weight.dtype)
        return into_x, into_w, grad.sum(0) if ctx.biased else None, None, None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision, whole: bool = True
) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]. Both gradients are integer products of `precision`; the
    forward product too when `whole`."""
    if not x.numel():
        return nn.functional.linear(x, weight, bias)
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, precision, whole)
    return y.view(*x.shape[:-1], len(weight))


class IntegerLinear(nn.Linear):
    """`nn.Linear` that computes all three products in integers of `precision`."""

    precision = Precision()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.precision)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.precision.bits}"


def integer_layers(model: nn.Module, precision: Precision, skip: tuple[str, ...] = ()) -> list[str]:
    """Make the linear layers of a model IntegerLinear, in place, parameters and all; returns their names.
    `skip`: ends of names of layers that stay as they are."""
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith(skip or ("\0",)):
            module.__class__ = IntegerLinear
            vars(module)["precision"] = precision
            found.append(name)
    return found


@contextmanager
def integer_gradients(layers: list[Layer], precision: Precision | None) -> Iterator[None]:
    """Inside, the gradients that pass the layers are integer products; None changes nothing."""
    if precision is None:
        yield
        return
    for layer in layers:
        _replace_forward(layer, precision)
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward


def _replace_forward(layer: Layer, precision: Precision) -> None:
    module = layer.module

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        bias: Any = module.bias
        return linear(x, weight.T if layer.transposed else weight, bias, precision, whole=False)

    module.forward = forward
