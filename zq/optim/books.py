"""Tables with which a kernel decodes and encodes a format (`Book`, `Format` of zq/kernels/src/states.cuh).

To round q, its sign, exponent and first bits of the mantissa name a bucket: floats between two neighbours of
so few bits. No bucket holds more than one midpoint between values of the format, so the number of midpoints
below the bucket leaves two candidates, as in zq.numerics.codebook. Buckets begin below the least midpoint
that is not zero, and the last one reaches to infinity; negative ones follow where a midpoint is negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zq.numerics.codebook import Codebook, codebook

BUCKETS = {8: 2912, 4: 80}  # by bits of a code
MANTISSA = 23  # bits of float32


@dataclass(frozen=True)
class Search:
    """bucket = (bits of |q| >> shift) - base, inside 0 .. count - 1; with `negative`, those of negative q lie
    `count` behind.

    plain: the code of a value is its number. below: the code of the greatest negative value.
    """

    shift: int
    base: int
    count: int
    negative: bool
    plain: bool
    below: int


@lru_cache
def search(name: str) -> Search:
    """For a format of 8 or 4 bits; all that zq knows have one."""
    book = codebook(name)
    middle = _middle(book)
    patterns, negative = middle.abs().view(torch.int32), middle < 0
    shift = next(s for s in range(MANTISSA, 0, -1) if _apart(patterns >> s, negative))
    keys = (patterns >> shift)[middle != 0]
    base = int(keys.min()) - 1
    return Search(
        shift=shift,
        base=base,
        count=int(keys.max()) - base + 1,
        negative=bool(negative.any()),
        plain=torch.equal(book.codes, torch.arange(len(book.codes), dtype=torch.uint8)),
        below=int(book.codes[max(int((book.values < 0).sum()) - 1, 0)]),
    )


@lru_cache
def tables(name: str, device: str) -> Tensor:
    """uint8, a Book on a device."""
    book, found = codebook(name), search(name)
    size = 1 << book.bits
    middle = torch.full((size,), torch.nan)
    middle[: len(book.values) - 1] = _middle(book)
    codes = torch.zeros(size, dtype=torch.uint8)
    codes[: len(book.codes)] = book.codes
    first = torch.zeros(BUCKETS[book.bits], dtype=torch.uint8)
    numbers = _first(found, middle[: len(book.values) - 1])
    first[: len(numbers)] = numbers
    floats = torch.cat([book.decode(torch.arange(size)), middle])
    return torch.cat([floats.view(torch.uint8), codes, first]).to(device)


def _middle(book: Codebook) -> Tensor:
    return (book.values[1:] + book.values[:-1]) / 2


def _apart(keys: Tensor, negative: Tensor) -> bool:
    """Whether no two midpoints of one sign share a key."""
    return all(len(keys[side].unique()) == int(side.sum()) for side in (negative, ~negative))


def _first(found: Search, middle: Tensor) -> Tensor:
    """uint8 [buckets]: midpoints below every float of the bucket."""
    edges = torch.arange(found.base, found.base + found.count + 1, dtype=torch.int32) << found.shift
    magnitudes = edges.view(torch.float32)
    low = magnitudes[:-1].clone()
    low[0] = 0.0
    numbers = torch.searchsorted(middle, low)
    if found.negative:  # from -high on; the lowest float of the last bucket is minus infinity
        high = (edges - 1).view(torch.float32)[1:].clone()
        high[-1] = torch.inf
        numbers = torch.cat([numbers, torch.searchsorted(middle, -high)])
    return numbers.to(torch.uint8)
