"""Quantile and k-means codebooks against plain loops and brute force."""

from __future__ import annotations

import pytest
import torch

from zq.formats import FORMATS
from zq.numerics.estimate import estimate, lloyd, quantiles
from zq.numerics.qtensor import quantize
from zq.spec import TensorSpec

NORMAL = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3


@pytest.mark.parametrize("bits", range(3, 9))
def test_quantiles_are_means_of_neighbouring_quantiles(bits: int) -> None:
    n = 1 << bits
    got = quantiles(NORMAL.sort(-1).values, n)
    edges = torch.quantile(NORMAL.double(), torch.linspace(0, 1, n + 1, dtype=torch.float64), dim=1).T
    assert torch.allclose(got.double(), (edges[:, 1:] + edges[:, :-1]) / 2, atol=1e-6)


@pytest.mark.parametrize("bits", range(3, 9))
def test_a_quantile_codebook_has_zero_reaches_one_and_uses_its_codes_evenly(bits: int) -> None:
    book = estimate(NORMAL, FORMATS[f"quantile{bits}"])
    assert book.shape == (2, 1 << bits)
    assert bool((book.diff(dim=-1) >= 0).all())
    assert book.abs().amax(-1).tolist() == [1, 1]
    assert bool((book == 0).any(-1).all())
    raw = quantiles(NORMAL.sort(-1).values, 1 << bits)[0]
    used = torch.bincount((NORMAL[0][:, None] - raw).abs().argmin(-1), minlength=1 << bits)
    middle = used[1:-1].float()  # the outermost codes also take what lies beyond them
    assert bool((middle > 0.5 * 4096 / (1 << bits)).all())


def naive_lloyd(z: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    for _ in range(30):
        near = (z[:, None] - values).abs().argmin(-1)
        for c in range(len(values)):
            mine = near == c
            if bool(mine.any()):
                values = values.clone()
                values[c] = (z[mine] * weight[mine]).sum() / weight[mine].sum()
        values = values.sort().values
    return values


def test_lloyd_equals_the_plain_algorithm() -> None:
    z = NORMAL[:1, :500].sort(-1).values.double()
    weight = torch.rand(1, 500, generator=torch.Generator().manual_seed(1)).double() + 0.1
    start = quantiles(z, 8).double()
    got = lloyd(z, [start], weight)
    assert torch.allclose(got[0], naive_lloyd(z[0], start[0], weight[0]), atol=2e-4)


def test_weights_move_the_codebook_and_lower_the_weighted_error() -> None:
    z, info = NORMAL[:1], FORMATS["kmeans3"]
    weight = 1 + 50.0 * (z > 0.3)
    errors = []
    for book in (estimate(z, info, weight), estimate(z, info)):
        nearest = (z[0][:, None] - book[0]).abs().amin(-1)
        errors.append(float((weight[0] * nearest.square()).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_a_row_of_few_values_is_exact_under_kmeans() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0, 3.0, 5.0, -7.0, 0.5, 0.25] * 8, [1.0] * 64])
    back = quantize(x, TensorSpec.parse("kmeans3:channel")).dequantize()
    assert torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("name", ["quantile3", "kmeans3"])
def test_channels_have_codebooks_of_their_own_and_other_layouts_one(name: str) -> None:
    x = torch.cat([NORMAL[:1], NORMAL[1:].sign() * NORMAL[1:].square()])
    q = quantize(x, TensorSpec.parse(f"{name}:channel"))
    assert q.book is not None
    assert q.book.shape == (2, 8)
    assert not torch.equal(q.book[0], q.book[1])
    alone = [quantize(row[None], TensorSpec.parse(f"{name}:channel")).dequantize() for row in x]
    assert torch.equal(q.dequantize(), torch.cat(alone))
    together = quantize(x, TensorSpec.parse(f"{name}:g64"))
    assert together.book is not None
    assert together.book.shape == (1, 8)


def test_kmeans_beats_every_fixed_format_of_its_width_per_channel() -> None:
    x = NORMAL.pow(3)
    errors = {
        name: float((quantize(x, TensorSpec.parse(f"{name}:channel"), "mse").dequantize() - x).square().sum())
        for name, info in FORMATS.items()
        if info.bits == 4 and info.signed
    }
    assert min(errors, key=lambda name: errors[name]) == "kmeans4"
