"""The kernel's tables, searched as it does, give the codes of zq.numerics.codebook for every format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zq.formats import FORMATS
from zq.numerics.codebook import codebook, nearest
from zq.optim.books import BUCKETS, search, tables

NAMES = [name for name, info in FORMATS.items() if info.bits in (4, 8) and not info.is_estimated]


def encoded(name: str, q: Tensor) -> Tensor:
    """The lines of `code` in states.cuh."""
    found, raw, size = search(name), tables(name, "cpu"), 1 << codebook(name).bits
    middle = raw[4 * size : 8 * size].view(torch.float32)
    codes, first = raw[8 * size : 9 * size], raw[9 * size :]
    bits = q.view(torch.int32)
    bucket = (((bits & 0x7FFFFFFF) >> found.shift) - found.base).clamp(0, found.count - 1)
    bucket = torch.where(bits < 0, bucket + found.count if found.negative else 0, bucket)
    number = first[bucket.long()].long()
    between = middle[number]
    odd = (number if found.plain else codes[number]) & 1
    number = number + ((q > between) | ((q == between) & odd.bool()))
    return number.to(torch.uint8) if found.plain else codes[number]


def near(x: Tensor) -> Tensor:
    """The numbers, and the floats beside them."""
    ends = torch.tensor([torch.inf, -torch.inf])
    return torch.cat([x, *(torch.nextafter(x, end) for end in ends)])


@pytest.mark.parametrize("name", NAMES)
def test_every_number_gets_the_nearest_value(name: str) -> None:
    book = codebook(name)
    middle = (book.values[1:] + book.values[:-1]) / 2
    found = search(name)
    edges = (torch.arange(found.base, found.base + found.count + 2, dtype=torch.int32) << found.shift).view(
        torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * 10.0 ** torch.randint(
        -9, 4, (20000,), generator=generator
    )
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.inf, -torch.inf])
    q = torch.cat([near(torch.cat([book.values, middle, edges, -edges])), spread, special])
    assert torch.equal(encoded(name, q), book.codes[nearest(q, book.values, book.codes)])


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_are_as_the_kernel_expects(name: str) -> None:
    book, found = codebook(name), search(name)
    size = 1 << book.bits
    raw = tables(name, "cpu")
    assert raw.dtype == torch.uint8
    assert len(raw) == 9 * size + BUCKETS[book.bits]
    assert len(raw) % 16 == 0
    table = raw[: 4 * size].view(torch.float32)
    assert torch.equal(table.nan_to_num(7.5), book.decode(torch.arange(size)).nan_to_num(7.5))
    assert found.count * (1 + found.negative) <= BUCKETS[book.bits]
    if FORMATS[name].signed:
        assert book.decode(torch.tensor([found.below])) == book.values[book.values < 0].max()
