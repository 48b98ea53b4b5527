"""The values that a weight can take, in steps of its scale, numbered so that neighbours differ by one.

    place(x)    where x lies: number i for value i, in between in proportion
    value(i)    the i-th value; between two numbers in proportion, so it undoes `place`

An integer is its own number, up to the zero point. Rounding a place is rounding to the nearest value, since
the middle between two values lies in the middle between their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zq.numerics.codebook import codebook
from zq.numerics.qtensor import QTensor
from zq.numerics.scales import int_range

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Numbers run from `low` to `high`. Integers: zero [R, G, 1] float32, or None where it is 0. Others:
    values [V] or [R, V] float32, increasing, and the code of each as uint8 [V]."""

    low: int
    high: int
    zero: Tensor | None = None
    values: Tensor | None = None
    codes: Tensor | None = None

    @classmethod
    def of(cls, q: QTensor, zero: Tensor | None) -> Grid:
        """That of a quantized weight; `zero` [R, G] where it has one."""
        if q.spec.info.is_int:
            return cls(*int_range(q.spec), zero=None if zero is None else zero.float().unsqueeze(-1))
        if q.book is not None:
            book = q.book.float()
            codes = torch.arange(book.shape[1], dtype=torch.uint8, device=book.device)
            return cls(0, book.shape[1] - 1, values=book[0] if len(book) == 1 else book, codes=codes)
        fixed = codebook(q.spec.format).to(q.codes.device)
        return cls(0, len(fixed.values) - 1, values=fixed.values, codes=fixed.codes)

    def place(self, x: Tensor, rows: slice) -> Tensor:
        """x [r, G, S] in steps -> its place among the numbers; beyond the ends in steps of the last gap."""
        if self.values is None:
            return x if self.zero is None else x + self.zero[rows]
        values = self.values if self.values.dim() == 1 else self.values[rows]
        flat = x.reshape(*values.shape[:-1], -1).contiguous()
        below = (torch.searchsorted(values, flat, right=True) - 1).clamp_(0, self.high - 1)
        least, next_ = _take(values, below), _take(values, below + 1)
        return (below + (flat - least) / (next_ - least).clamp_min(TINY)).reshape(x.shape)

    def value(self, number: Tensor, rows: slice) -> Tensor:
        """number [r, G, S] float32 from `low` to `high` -> the value in steps."""
        if self.values is None:
            return number if self.zero is None else number - self.zero[rows]
        values = self.values if self.values.dim() == 1 else self.values[rows]
        flat = number.reshape(*values.shape[:-1], -1)
        below = flat.floor().long().clamp_(0, self.high - 1)
        least = _take(values, below)
        return (least + (flat - below) * (_take(values, below + 1) - least)).reshape(number.shape)

    def encode(self, number: Tensor) -> Tensor:
        """Whole numbers [...] -> codes as stored."""
        return number.to(torch.int8) if self.codes is None else self.codes[number.long()]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes as stored [...] -> their numbers, float32."""
        if self.codes is None:
            return codes.float()
        numbers = torch.zeros(256, device=codes.device)
        numbers[self.codes.long()] = torch.arange(len(self.codes), dtype=torch.float32, device=codes.device)
        return numbers[codes.long()]


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values[index] if values.dim() == 1 else values.gather(-1, index)
