"""Code values and rounding, against torch's float8 types and tables from the OCP specifications."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.strategies import FLOATS, INTS, MAPS
from zq.errors import ZqError
from zq.numerics.codebook import codebook
from zq.spec import FORMATS

TORCH = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# OCP MX 1.0, tables of FP6 and FP4: every non-negative value.
TABLES = {
    "e2m1fn": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e3m0fn": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "e2m3fn": [i / 8 for i in range(8)]
    + [1 + i / 8 for i in range(8)]
    + [2 + i / 4 for i in range(8)]
    + [4 + i / 2 for i in range(8)],
    "e3m2fn": [i / 16 for i in range(8)]
    + [i / 8 for i in range(4, 8)]
    + [i / 4 for i in range(4, 8)]
    + [i / 2 for i in range(4, 8)]
    + [4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
}


@pytest.mark.parametrize("name", TORCH)
def test_decode_agrees_with_torch_on_all_256_patterns(name: str) -> None:
    patterns = torch.arange(256, dtype=torch.uint8)
    expected = patterns.view(TORCH[name]).float()
    finite = torch.isfinite(expected)
    decoded = codebook(name).decode(patterns)
    assert torch.equal(decoded[finite], expected[finite])
    assert decoded[~finite].isnan().all()
    assert set(codebook(name).values.tolist()) == set(expected[finite].tolist())


@pytest.mark.parametrize("name", TABLES)
def test_narrow_floats_are_the_values_of_the_specification(name: str) -> None:
    book, half = codebook(name), TABLES[name]
    assert book.values.tolist() == sorted({-v for v in half} | set(half))
    assert book.decode(torch.arange(len(half), dtype=torch.uint8)).tolist() == half
    negative = torch.arange(len(half), dtype=torch.uint8) | 1 << (FORMATS[name].bits - 1)
    assert book.decode(negative).tolist() == [-v for v in half]  # minus zero included: -0.0 == 0.0


@pytest.mark.parametrize("name", INTS)
def test_integers_are_twos_complement(name: str) -> None:
    book, bits = codebook(name), FORMATS[name].bits
    assert book.values.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert book.codes.tolist() == [int(v) & (2**bits - 1) for v in book.values.tolist()]


@pytest.mark.parametrize("name", [*FLOATS, *INTS, *MAPS])
def test_values_increase_and_codes_are_distinct(name: str) -> None:
    book = codebook(name)
    assert bool((book.values[1:] > book.values[:-1]).all())
    assert len(set(book.codes.tolist())) == len(book.values)
    assert torch.equal(book.encode(book.values), book.codes)


def halfway(name: str) -> torch.Tensor:
    """Every midpoint and its float32 neighbours, where one rounding differs from another."""
    values = codebook(name).values
    middle = (values[1:] + values[:-1]) / 2
    up, down = torch.full_like(middle, torch.inf), torch.full_like(middle, -torch.inf)
    return torch.cat([middle, torch.nextafter(middle, up), torch.nextafter(middle, down)])


@pytest.mark.parametrize("name", TORCH)
def test_rounding_equals_torchs_cast(name: str) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 50
    x = torch.cat([x, x * 1e-4, x * 1e-6, halfway(name)])
    top = codebook(name).max
    expected = x.clamp(-top, top).to(TORCH[name])
    book = codebook(name)
    codes = book.encode(x)
    assert torch.equal(book.decode(codes), expected.float())
    bits = expected.view(torch.uint8)
    same = (codes == bits) | (bits == 0x80)  # torch keeps the sign of a zero
    assert bool(same.all())


@pytest.mark.parametrize("name", INTS)
def test_rounding_of_integers_is_half_to_even(name: str) -> None:
    book, bits = codebook(name), FORMATS[name].bits
    x = torch.cat([halfway(name), torch.tensor([-1e30, 1e30])])
    expected = x.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(book.decode(book.encode(x)), expected)


@pytest.mark.parametrize("name", TABLES)
def test_midpoints_go_to_the_even_code(name: str) -> None:
    half = TABLES[name]
    for i, (low, high) in enumerate(pairwise(half)):
        even = low if i % 2 == 0 else high
        middle = torch.tensor([(low + high) / 2, -(low + high) / 2])
        book = codebook(name)
        assert book.decode(book.encode(middle)).tolist() == [even, -even]


@given(st.sampled_from([*FLOATS, *MAPS]), st.floats(-1e3, 1e3, width=32))
def test_rounding_finds_the_nearest_value(name: str, x: float) -> None:
    book = codebook(name)
    got = float(book.decode(book.encode(torch.tensor([x])))[0])
    clamped = min(max(x, float(book.values[0])), book.max)
    assert abs(got - clamped) == min(abs(v - clamped) for v in book.values.tolist())


@pytest.mark.parametrize("name", ["int4", "e4m3fn", "e2m1fn", "e3m0fn", "e5m2"])
@pytest.mark.parametrize("x", [0.3, -0.3, 2.6, -5.2, 1.0])
def test_stochastic_rounding_has_the_right_mean_and_only_neighbours(name: str, x: float) -> None:
    book, count = codebook(name), 20_000
    got = book.decode(book.encode(torch.full((count,), x), torch.Generator().manual_seed(7)))
    values = book.values.tolist()
    low, high = max(v for v in values if v <= x), min(v for v in values if v >= x)
    assert set(got.tolist()) <= {low, high}
    p = (x - low) / (high - low) if high > low else 0.0
    sigma = (high - low) * (p * (1 - p) / count) ** 0.5
    assert abs(float(got.double().mean()) - x) <= 4 * sigma + 1e-6


def test_stochastic_rounding_repeats_with_its_seed_and_saturates() -> None:
    book, x = codebook("e2m1fn"), torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    first, again, other = (book.encode(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ends = book.decode(book.encode(torch.tensor([-99.0, 99.0]), torch.Generator().manual_seed(1)))
    assert ends.tolist() == [-6.0, 6.0]


def test_an_unknown_format_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ZqError, match=r"format 'e9m9' is unknown; allowed: int2 to int8, .*e2m1fn"):
        codebook("e9m9")


@pytest.mark.parametrize("name", [*FLOATS, *INTS, *MAPS])
def test_many_values_round_as_few_do(name: str) -> None:
    """Many are looked up, few are searched for."""
    book = codebook(name)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * book.max
    x = torch.cat([x, x * 1e-3, x * 1e-6, halfway(name), book.values, torch.tensor([0.0, -0.0, 1e38, -1e38])])
    few = torch.cat([book.encode(part) for part in x.split(1000)])
    assert torch.equal(book.encode(x), few)
