"""The division of floats.cuh (struct Divisor) step by step in exact arithmetic: it is IEEE's."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

TINY = Fraction(2) ** -126
MAX = Fraction(torch.finfo(torch.float32).max)


def rounded(x: Fraction) -> Fraction:
    """To the nearest float32, ties to even; no overflow happens here."""
    if x == 0:
        return x
    exponent = max(math.frexp(float(abs(x)))[1], -125) if abs(x) >= TINY else -125
    while abs(x) >= Fraction(2) ** exponent:
        exponent += 1
    while exponent > -125 and abs(x) < Fraction(2) ** (exponent - 1):
        exponent -= 1
    unit = Fraction(2) ** (exponent - 24)
    return round(x / unit) * unit  # round() of a Fraction is to even


def divided(x: float, scale: float) -> Fraction:
    """The lines of the kernel; fma(a, b, c) = rounded(a b + c)."""
    a, s = Fraction(x), Fraction(scale)
    lift = Fraction(2) ** 80 if s < Fraction(2) ** -60 else Fraction(2) ** -80 if s > 2**60 else Fraction(1)
    divisor = rounded(s * lift)
    inverse = rounded(1 / divisor)
    a = rounded(a * lift)
    q = rounded(a * inverse)
    q1 = rounded(rounded(-q * divisor + a) * inverse + q)
    return rounded(rounded(-q1 * divisor + a) * inverse + q1)


def floats(count: int, seed: int) -> list[float]:
    """Positive normal float32 of all exponents."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0x00800000, 0x7F7FFFFF, count, dtype=np.uint32)
    return [float(value) for value in bits.view(np.float32)]


def test_rounded_is_float32():
    for x in floats(300, 0):
        for other in (x * 1.0000001, x / 3, x * (1 + 2**-24)):
            assert rounded(Fraction(other)) == Fraction(float(np.float32(other)))
    assert rounded(TINY / 3) == Fraction(float(np.float32(float(TINY / 3))))


@pytest.mark.parametrize("top", [127.5, 448.0])
def test_codes_are_those_of_ieee_division(top):
    """x of every size up to the absmax of its row, from float32 and from bf16. Where the quotient is above
    2^-40 it is the correctly rounded one; below, both round to code 0."""
    for largest in [*floats(600, 1), float(TINY), 2.0**-149, 1.5 * 2.0**-60, float(MAX)]:
        step = np.float32(largest) / np.float32(top)
        scale = float(np.float32(1) if step == 0 else np.clip(step, float(TINY), None))
        for ratio in (1.0, 0.75, 0.1234567, 63.5 / 127.5, 1e-3, 1e-8):
            x32 = np.float32(largest * ratio)
            bf16 = struct.unpack("<f", struct.pack("<I", int(x32.view(np.uint32)) & 0xFFFF0000))[0]
            for x in (float(x32), -bf16):
                exact = np.float32(x) / np.float32(scale)
                ours = divided(x, scale)
                if abs(exact) > 2.0**-40:
                    assert ours == Fraction(float(exact)), (x, scale)
                else:
                    assert abs(ours) < 2.0**-39


def test_ties_stay_ties():
    """Quotients of exactly k + 1/2 decide which code is even."""
    for k in range(127):
        for scale in (2.0**-7, 3 * 2.0**-20, 2.0**-100, 2.0**100):
            assert divided((k + 0.5) * scale, scale) == Fraction(2 * k + 1, 2)


@pytest.mark.parametrize(
    ("bits", "mask", "step"), [(8, 0xFFFFFF00, 1), (11, 0xFFFFF800, 37)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize(("top", "smaller"), [(127.5, 9), (448.0, 19)], ids=["int8", "e4m3"])
def test_codes_of_16_bits_are_those_of_ieee_division(bits, mask, step, top, smaller):
    """struct Quotient and scale_of of quotient.cuh: all numbers of `bits` bits over the scales of rows whose
    largest is one of them (every 37th of fp16; all of them passed once), with a reciprocal that may be two
    units off. Powers of two change nothing."""
    numbers = np.arange(1 << bits - 1, 1 << bits, dtype=np.float64)
    x = (numbers[:, None] * 2.0 ** -np.arange(smaller)).reshape(-1)
    for largest in numbers[::step]:
        scale = np.float32(largest) / np.float32(top)
        inverse = np.float32(1 / top)
        first = np.float32(largest) * inverse
        rest = np.float32(largest - float(first) * top)
        assert np.float32(float(rest) * float(inverse) + float(first)) == scale
        row = x[x <= largest]
        for units in (-2, 0, 2):
            reciprocal = ((np.float32(1) / scale).view(np.uint32) + np.int32(units)).astype(np.uint32)
            high = (reciprocal & np.uint32(mask)).view(np.float32)
            low = np.float32(1 - float(high) * float(scale)) * reciprocal.view(np.float32)
            ours = (row * float(low) + row * float(high)).astype(np.float32)  # exact before it is rounded
            exact = row.astype(np.float32) / scale
            assert (_codes(ours, top) == _codes(exact, top)).all()


def _codes(x, top):
    if top == 127.5:
        return np.rint(x)
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
