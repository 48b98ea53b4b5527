"""Whether quantized activations are right. Codes of x itself are equal to the last bit. Behind a norm or an
activation function each code must be the rounding of a value that is no further from the reference's than
rounding allows: a sum in another order and a function of the device move values by a few float32 units, and
then one may fall on the other side of a boundary of its 16-bit type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zq.kernels import reference

EXACT = {"quant_int8", "quant_fp8", "quant_fp8_block128"}
RARELY = 0.01  # of the codes of rows with equal scales may differ
FLOAT = 2.0**-20  # a few units of float32, relative to the terms of a sum


def values(name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """(what is quantized, how far from it float32 may be: sizes of its terms times FLOAT), as float64."""
    x, *more = args
    if name in ("rms_norm_quant", "add_rms_norm_quant"):
        total = x + more.pop(0) if name.startswith("add") else x
        y = reference.rms_norm(total, *more[:2])
        terms = y.double()
    elif "layer_norm" in name:
        total = x if name == "layer_norm_quant" else x + more.pop(0)
        weight, bias, eps, _ = more
        y = reference.layer_norm(total, weight, bias, eps)
        wide = total.double()
        inverse = (wide.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        terms = (wide.abs() + wide.mean(-1, keepdim=True).abs()) * inverse * weight.double().abs()
        terms = terms + bias.double().abs()
    elif name == "silu_mul_quant":
        y = reference.silu_mul(x)
        terms = y.double()
    else:  # 1 - 1 of a tail
        y, terms = reference.gelu(x, more[0]), x.double()
    return y.double(), FLOAT * terms.abs()


def unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next number of a float type, float64, for x of float64."""
    facts = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp_min(facts.smallest_normal)))
    return torch.exp2(exponent) * facts.eps


def verdict(name: str, args: tuple[Any, ...], made: list[Tensor], wanted: list[Tensor]) -> str:
    """ "" when `made` is right; tensors of the CPU, `wanted` is the reference's."""
    for a, b in zip(made, wanted, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
    if name in EXACT:
        apart = sum(int((a.double() != b.double()).sum()) for a, b in zip(made, wanted, strict=True))
        return f"{apart} values differ" if apart else ""
    q, scale, rowsum = made[:3]
    if rowsum.numel() and not torch.equal(rowsum, q.sum(-1, dtype=torch.int32)):
        return "a sum of codes is wrong"
    if name.startswith("add") and not torch.equal(made[3], wanted[3]):
        return "x + residual is wrong"
    y, slack = values(name, args)
    slack = slack + 2 * unit(y, args[0].dtype)
    if name.startswith("post") and not bool(((made[3].double() - y).abs() <= slack).all()):
        return "the norm is wrong"
    if not torch.equal(scale.isfinite(), wanted[1].isfinite()):
        return "a row is finite in one of both only"
    whole = y.isfinite().all(-1)
    if not torch.equal(q[~whole].double(), wanted[0][~whole].double()):
        return "a row with infinity differs"
    q, codes, scale, y, slack = (
        q[whole].double(),
        wanted[0][whole].double(),
        scale[whole].double(),
        y[whole],
        slack[whole],
    )
    step = torch.ones_like(q) if made[0].dtype == torch.int8 else _step(q)
    off = (q * scale[:, None] - y).abs() - (step / 2 * scale[:, None] * (1 + 1e-5) + slack)
    if bool((off > 0).any()):
        row, column = divmod(int(off.argmax()), q.shape[1])
        what = f"{q[row, column]:g} * {scale[row]:g} for {y[row, column]:g}"
        return f"{int((off > 0).sum())} codes are wrong, as at {row}, {column}: {what}"
    same = scale == wanted[1][whole].double()
    rate = float((q[same] != codes[same]).double().mean()) if bool(same.any()) else 0.0
    return f"{rate:.2%} of the codes differ" if rate > RARELY else ""


def _step(q: Tensor) -> Tensor:
    """Distance to the next larger e4m3 number."""
    return torch.exp2(torch.floor(torch.log2(q.abs().clamp_min(2.0**-6))) - 3)
