"""Dynamic, linear, normal and descending float maps: published tables, the formulas again, bitsandbytes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from zq.errors import ZqError
from zq.formats import FORMATS
from zq.numerics.codebook import codebook
from zq.numerics.maps import dynamic_map, linear_map, normal_map
from zq.numerics.qtensor import quantize
from zq.spec import TensorSpec

# The 4-bit maps of the 8-bit and 4-bit optimizer papers, and NF4 of the QLoRA paper (appendix E).
DYNAMIC4 = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0]
DYNAMIC4 += [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
UDYNAMIC4 = [0, 0.00325, 0.00775, 0.02125, 0.04375, 0.06625, 0.08875, 0.15625]
UDYNAMIC4 += [0.26875, 0.38125, 0.49375, 0.60625, 0.71875, 0.83125, 0.94375, 1]
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
NF4 += [0.7229568362236023, 1.0]
DESCENDING = {
    "e2m1paper": [0, 0.0625, 2, 3, 4, 6, 8, 12],  # bitsandbytes' fp4
    "e2m1bnb": [0, 0.125, 1, 1.5, 2, 3, 4, 6],
    "e3m0paper": [0, 0.5, 1, 2, 4, 8, 16, 32],
    "e2m0bnb": [0, 1, 2, 4],
}


def by_hand(bits: int, signed: bool) -> list[float]:
    """The dynamic map once more: a decade of the exponent i has 2^i fractions (twice as many unsigned)."""
    values = {0.0, 1.0}
    for i in range(bits - 1):
        count = 2**i if signed else 2 ** (i + 1)
        for j in range(count):
            value = 10.0 ** (i - bits + 2) * (0.1 + 0.9 * (j + 0.5) / count)
            values |= {value, -value} if signed else {value}
    return sorted(values)


def test_dynamic_maps_of_4_bits_are_those_of_the_papers() -> None:
    assert dynamic_map(4).tolist() == pytest.approx(DYNAMIC4, rel=1e-6)
    assert dynamic_map(4, signed=False).tolist() == pytest.approx(UDYNAMIC4, rel=1e-6)
    without = dynamic_map(4, signed=False, zero=False)
    assert without.tolist() == pytest.approx(UDYNAMIC4[1:], rel=1e-6)
    assert float(without[0]) == pytest.approx(0.00325)


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_the_formula(bits: int, signed: bool) -> None:
    values = dynamic_map(bits, signed)
    assert len(values) == 1 << bits
    assert values.tolist() == pytest.approx(by_hand(bits, signed), rel=1e-6)
    nonzero = dynamic_map(bits, signed, zero=False)
    assert torch.equal(nonzero, values[values != 0])


def test_the_8_bit_dynamic_map_has_the_ends_that_were_published() -> None:
    signed, unsigned = dynamic_map(8), dynamic_map(8, signed=False)
    assert float(signed[0]) == pytest.approx(-0.99297, abs=1e-5)
    assert float(signed[-2]) == pytest.approx(0.99297, abs=1e-5)
    assert float(signed[signed > 0][0]) == pytest.approx(5.5e-7)
    assert float(unsigned[1]) == pytest.approx(3.25e-7)
    assert float(unsigned[-2]) == pytest.approx(0.99648, abs=1e-5)
    assert -1.0 not in signed.tolist()
    assert float(signed[-1]) == float(unsigned[-1]) == 1.0


@pytest.mark.parametrize("bits", range(3, 9))
def test_linear_maps_have_no_zero_and_even_steps(bits: int) -> None:
    unsigned, signed = linear_map(bits, signed=False), linear_map(bits)
    assert unsigned.tolist() == [(i + 1) / 2**bits for i in range(2**bits)]
    assert torch.allclose(signed, torch.linspace(-1, 1, 2**bits), atol=1e-7)
    assert 0.0 not in signed.tolist()
    assert torch.equal(signed, -signed.flip(0))


def test_nf4_is_the_table_of_the_paper() -> None:
    assert normal_map(4).tolist() == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("bits", range(3, 9))
def test_normal_maps_are_quantiles_of_a_normal_distribution(bits: int) -> None:
    """Neighbours on each side have one probability mass between them, by the error function."""
    values = normal_map(bits).double()
    assert len(values) == 1 << bits
    assert values.min() == -1
    assert values.max() == 1
    assert int((values == 0).sum()) == 1
    assert int((values > 0).sum()) == 1 << (bits - 1)
    n = 1 << bits
    top = 1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2
    scale = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * top - 1, dtype=torch.float64)))
    masses = 0.5 * torch.erf(values * scale / math.sqrt(2))
    for side, count in ((masses[values >= 0], n // 2), (masses[values <= 0], n // 2 - 1)):
        assert torch.allclose(side.diff(), torch.full_like(side.diff(), (top - 0.5) / count), atol=1e-6)


@pytest.mark.parametrize("name", DESCENDING)
def test_descending_floats_are_their_tables(name: str) -> None:
    half = DESCENDING[name]
    assert codebook(name).values.tolist() == sorted({-v for v in half} | set(half))


def test_the_papers_4_bit_float_is_that_of_ocps_rules_up_to_scale() -> None:
    ours, ocp = codebook("e3m0paper").values, codebook("e3m0fn").values
    assert torch.equal(ours / ours[-1], ocp / ocp[-1])


def test_every_width_from_3_to_8_has_every_kind() -> None:
    kinds = Counter((info.bits, info.kind) for info in FORMATS.values() if info.bits > 2)
    for bits in range(3, 9):
        assert all(kinds[bits, kind] for kind in ("int", "float", "dynamic", "linear", "normal"))
        assert kinds[bits, "dynamic"] == 4
        for flavour in ("bnb", "paper", "fn"):
            if bits < 8 or flavour != "fn":
                assert any(i.bits == bits and n.endswith(flavour) for n, i in FORMATS.items() if i.is_float)


def test_estimated_formats_have_no_codebook_of_their_own() -> None:
    with pytest.raises(ZqError, match="estimated from the data"):
        codebook("kmeans4")


@pytest.mark.parametrize("name", ["dynamic4", "dynamic8", "quantile4", "kmeans3", "int4", "int8"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_with_a_sign_brings_the_largest_magnitude_back(name: str, sign: int) -> None:
    """The hazard: the dynamic map has 1 but not -1, so without it a negative maximum loses 11 % at 4 bits."""
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)
    x[0, ::64] = sign * (3 + torch.arange(64) / 64)
    spec = TensorSpec.parse(f"{name}:b64")
    plain, carried = (quantize(x, spec, s).dequantize()[0, ::64] for s in ("absmax", "absmax-signed"))
    if name == "kmeans3":
        return
    assert torch.allclose(carried, x[0, ::64], rtol=1e-6)
    if name == "dynamic4" and sign < 0:
        assert torch.allclose(plain, 0.8875 * x[0, ::64], rtol=1e-6)


def test_the_maps_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for bits in range(3, 9):
        for signed in (True, False):
            theirs = functional.create_dynamic_map(signed, bits - 1, bits)
            theirs = theirs.unique()
            assert torch.equal(dynamic_map(bits, signed), theirs), (bits, signed)
    assert torch.allclose(normal_map(4), functional.get_4bit_type("nf4", device="cpu"), atol=1e-6)
    fp4 = functional.get_4bit_type("fp4", device="cpu").unique()
    ours = codebook("e2m1paper").values
    assert torch.allclose(ours / ours[-1], fp4, rtol=1e-3)  # their table has rounded constants
    for name, info in FORMATS.items():
        if name.endswith("bnb"):
            theirs = functional.create_fp8_map(True, info.exponent, info.mantissa, info.bits).unique()
            mine = codebook(name).values
            assert torch.equal(mine / mine[-1], theirs), name
