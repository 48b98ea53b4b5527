"""Map: the code values of a format, and rounding a normalised value to one of them.

A codebook lists its values in increasing order with the bit pattern (code) of each; formats that are no
integers or floats number their values from below. Rounding is a binary search among the midpoints; a value
exactly on a midpoint goes to the even code, which is IEEE round-half-to-even for every float of OCP because
neighbouring codes differ in the last mantissa bit. Stochastic rounding goes to the upper neighbour with
probability (x - lower) / (upper - lower).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.formats import FORMATS, KNOWN, FormatInfo
from zq.numerics.maps import dynamic_map, linear_map, normal_map

LARGE = 4096  # values from which a table pays


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

    def to(self, device: torch.device) -> Codebook:
        """The same on a device."""
        if self.values.device == device:
            return self
        return Codebook(self.name, self.bits, self.values.to(device), self.codes.to(device))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x [...] normalised values -> codes [...] uint8. Values beyond the ends go to the ends.

        With a generator the rounding is stochastic (unbiased inside the range), else to nearest even.
        """
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if generator is None and on_cpu and x.numel() >= LARGE:
            table = _direct(self.name)
            if table is not None:
                return _look_up(x.float(), *table)
        here = self.to(x.device)
        return here.codes[nearest(x.float(), here.values, here.codes, generator)]

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] uint8 -> values [...] float32; minus zero is read as zero (other writers use it), and
        a pattern that stands for Inf or NaN gives NaN."""
        table = torch.full((1 << self.bits,), torch.nan, device=self.values.device)
        if FORMATS[self.name].is_float:
            table[1 << (self.bits - 1)] = 0.0
        table[self.codes.long()] = self.values
        return table.to(codes.device)[codes.long()]


def nearest(x: Tensor, values: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x [...] float32, increasing `values` [V] -> index [...] int64 of the value that x rounds to; ties go to
    the even one of `codes` [V]. With `values` [C, V] x is [C, ...], and each row has its own values."""
    shape = x.shape
    x = x.reshape(*values.shape[:-1], -1).contiguous()
    last = values.shape[-1] - 1
    if generator is None:
        midpoints = (values[..., 1:] + values[..., :-1]) / 2
        index = torch.searchsorted(midpoints, x)  # ties go to the lower neighbour
        tie = x == _take(midpoints, index.clamp(max=last - 1))
        index = index + (tie & (index < last) & (codes[index] & 1).bool())
    else:
        lower = (torch.searchsorted(values, x, right=True) - 1).clamp(0, last - 1)
        low = _take(values, lower)
        gap = (_take(values, lower + 1) - low).clamp_min(torch.finfo(torch.float32).tiny)
        index = lower + (torch.rand(x.shape, generator=generator, device=x.device) < (x - low) / gap)
    return index.reshape(shape)


@lru_cache
def _direct(name: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `_look_up` needs instead of a search, which costs a CPU several times as much; None where two
    midpoints have the same upper 16 bits.

    (below [2^16] int64: how many midpoints lie below every float32 with these upper 16 bits; midpoints, and
    infinity; codes, and the even one of each with its upper neighbour)
    """
    book = codebook(name)
    midpoints = (book.values[1:] + book.values[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    ends = torch.where(torch.isfinite(ends), ends, torch.where(upper < 0, -torch.inf, torch.inf))
    below = torch.searchsorted(midpoints, ends.amin(0))
    if bool((torch.searchsorted(midpoints, ends.amax(0), right=True) - below > 1).any()):
        return None
    above = torch.cat([book.codes[1:], book.codes[-1:]])
    even = torch.where((book.codes & 1).bool(), above, book.codes)
    codes = torch.stack([book.codes, even, above])
    return below, torch.cat([midpoints, torch.tensor([torch.inf])]), codes


def _look_up(x: Tensor, below: Tensor, midpoints: Tensor, codes: Tensor) -> Tensor:
    """x [...] float32 -> codes, to nearest even: the upper 16 bits leave two neighbours and one midpoint."""
    flat = x.reshape(-1).contiguous()
    index = below[(flat.view(torch.int32) >> 16).long() & 0xFFFF]
    middle = midpoints[index]
    side = (flat >= middle).to(torch.int64) + (flat > middle)
    return codes.view(-1)[index + side * codes.shape[1]].reshape(x.shape)


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values[index] if values.dim() == 1 else values.gather(-1, index)


@lru_cache
def codebook(name: str) -> Codebook:
    """The codebook of a named format. Raises ZqError for an unknown name."""
    if name not in FORMATS:
        raise ZqError(f"format '{name}' is unknown; allowed: {KNOWN}")
    info = FORMATS[name]
    if info.is_estimated:
        raise ZqError(f"format '{name}' has no values of its own; they are estimated from the data")
    if info.kind in ("int", "float"):
        ordered = sorted(_int_values(info) if info.is_int else _float_values(info))
        values = torch.tensor([value for value, _ in ordered], dtype=torch.float32)
        return Codebook(name, info.bits, values, torch.tensor([c for _, c in ordered], dtype=torch.uint8))
    if info.kind == "dynamic":
        values = dynamic_map(info.bits, info.signed, info.zero)
    else:
        values = linear_map(info.bits, info.signed) if info.kind == "linear" else normal_map(info.bits)
    return Codebook(name, info.bits, values, torch.arange(len(values), dtype=torch.uint8))


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
        value = _magnitude(info, exponent, fraction / (1 << m))
        pairs.append((value, code))
        if value:
            pairs.append((-value, code | 1 << (e + m)))
    return pairs


def _magnitude(info: FormatInfo, exponent: int, fraction: float) -> float:
    """With no mantissa bits the only subnormal (exponent field 0) is zero."""
    if info.descending:
        return (
            fraction * 2.0**-info.bias
            if exponent == 0
            else (1 + fraction) * 2.0 ** (info.bias + 1 - exponent)
        )
    if exponent == 0:
        return fraction * 2.0 ** (1 - info.bias)
    return (1 + fraction) * 2.0 ** (exponent - info.bias)
