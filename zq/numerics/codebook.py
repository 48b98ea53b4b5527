"""Map: the code values of a format, and rounding a normalised value to one of them.

A codebook lists its values in increasing order with the bit pattern (code) of each. Rounding is a
binary search among the midpoints; a value exactly on a midpoint goes to the even code, which is
IEEE round-half-to-even for every eXmY format because neighbouring codes differ in the last mantissa
bit. Stochastic rounding goes to the upper neighbour with probability (x - lower) / (upper - lower).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.spec import FORMATS, FormatInfo


@dataclass(frozen=True)
class Codebook:
    """`values` [V] float32, strictly increasing; `codes` [V] uint8, the bit pattern of each value."""

    name: str
    bits: int
    values: Tensor
    codes: Tensor

    @property
    def max(self) -> float:
        """The top positive value."""
        return float(self.values[-1])

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x [...] normalised values -> codes [...] uint8. Values beyond the ends go to the ends.

        With a generator the rounding is stochastic (unbiased inside the range), else to nearest even.
        """
        values, codes = self.values.to(x.device), self.codes.to(x.device)
        x = x.float()
        if generator is None:
            midpoints = (values[1:] + values[:-1]) / 2
            index = torch.bucketize(x, midpoints)  # ties go to the lower neighbour
            tie = x == midpoints[index.clamp(max=len(midpoints) - 1)]
            index = index + (tie & (index < len(midpoints)) & (codes[index] & 1).bool())
        else:
            lower = (torch.bucketize(x, values, right=True) - 1).clamp(0, len(values) - 2)
            gap = values[lower + 1] - values[lower]
            up = torch.rand(x.shape, generator=generator, device=x.device) < (x - values[lower]) / gap
            index = lower + up
        return codes[index]

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] uint8 -> values [...] float32; minus zero is read as zero (other writers use it), and
        a pattern that stands for Inf or NaN gives NaN."""
        table = torch.full((1 << self.bits,), torch.nan)
        if not FORMATS[self.name].is_int:
            table[1 << (self.bits - 1)] = 0.0
        table[self.codes.long()] = self.values
        return table.to(codes.device)[codes.long()]


@lru_cache
def codebook(name: str) -> Codebook:
    """The codebook of a named format. Raises ZqError for an unknown name."""
    if name not in FORMATS:
        raise ZqError(f"format '{name}' is unknown; allowed: {', '.join(FORMATS)}")
    info = FORMATS[name]
    pairs = _int_values(info) if info.is_int else _float_values(info)
    ordered = sorted(pairs)
    return Codebook(
        name,
        info.bits,
        torch.tensor([value for value, _ in ordered], dtype=torch.float32),
        torch.tensor([code for _, code in ordered], dtype=torch.uint8),
    )


def _int_values(info: FormatInfo) -> list[tuple[float, int]]:
    half, mask = 1 << (info.bits - 1), (1 << info.bits) - 1
    return [(float(q), q & mask) for q in range(-half, half)]


def _float_values(info: FormatInfo) -> list[tuple[float, int]]:
    """All finite values; minus zero is left out, so that every value has one code."""
    e, m = info.exponent, info.mantissa
    pairs = []
    for code in range(1 << (e + m)):
        exponent, fraction = code >> m, code & ((1 << m) - 1)
        top = exponent == (1 << e) - 1
        if (info.top_reserved == "ieee" and top) or (
            info.top_reserved == "nan" and top and fraction == (1 << m) - 1
        ):
            continue
        if exponent == 0:  # subnormal; with no mantissa bits the only such value is zero
            value = fraction / (1 << m) * 2.0 ** (1 - info.bias)
        else:
            value = (1 + fraction / (1 << m)) * 2.0 ** (exponent - info.bias)
        pairs.append((value, code))
        if value:
            pairs.append((-value, code | 1 << (e + m)))
    return pairs
