"""Code values of the formats that are neither integers nor floats, in [-1, 1], increasing.

dynamic_map   8-bit optimizers (Dettmers et al. 2021, arXiv:2110.02861): decades 10^-i, each divided twice as
              finely as the one below it; at `bits` = 8 the values of bitsandbytes to the last bit.
              1 is a value and -1 is none: a block whose largest magnitude is negative comes back as -0.993
              of it at 8 bits, -0.8875 at 4, unless the scale carries the sign (`absmax-signed`).
linear_map    4-bit optimizers (Li et al. 2023, arXiv:2309.01507): T(i) = (i + 1) / 2^b, without zero; with a
              sign 2^b evenly spaced values from -1 to 1, of which zero is none.
normal_map    NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, appendix E) for any number of bits.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor


def dynamic_map(bits: int, signed: bool = True, zero: bool = True) -> Tensor:
    """float32 [2^bits], or one value fewer without zero. Every decade in float32, as published."""
    decades = bits - 1
    parts = [torch.tensor([0.0, 1.0] if zero else [1.0])]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, (1 << (i + (not signed))) + 1)
        values = 10 ** (i - decades + 1) * ((edges[:-1] + edges[1:]) / 2)
        parts += [values, -values] if signed else [values]
    return torch.cat(parts).sort().values


def linear_map(bits: int, signed: bool = True) -> Tensor:
    """float32 [2^bits]."""
    count = 1 << bits
    if signed:
        return torch.tensor([(2 * i - (count - 1)) / (count - 1) for i in range(count)])
    return torch.tensor([(i + 1) / count for i in range(count)])


def normal_map(bits: int) -> Tensor:
    """float32 [2^bits]: 2^(bits-1) - 1 negative values, zero, 2^(bits-1) positive ones.

    Quantiles of N(0, 1) at probabilities evenly spaced between 1/2 and 1 - (1/(2n) + 1/(2n-2))/2, n = 2^bits,
    on each side, divided by the largest.
    """
    count = 1 << bits
    offset = 1 - (1 / (2 * count) + 1 / (2 * count - 2)) / 2
    positive = _quantiles(offset, count // 2)
    negative = [-x for x in _quantiles(offset, count // 2 - 1)]
    values = torch.tensor([*negative, 0.0, *positive], dtype=torch.float64).sort().values
    return (values / values.max()).float()


def _quantiles(offset: float, count: int) -> list[float]:
    """At `count` probabilities from `offset` on the way to 1/2, which is left out."""
    step = (offset - 0.5) / count
    return [NormalDist().inv_cdf(offset - i * step) for i in range(count)]
