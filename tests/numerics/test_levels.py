"""Two-level scales: exact in both worlds, found again, and as good as every pair tried one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.strategies import matrices
from zq.numerics import levels
from zq.numerics.groups import group
from zq.numerics.qtensor import SCALES, fake_groups, quantize
from zq.numerics.scales import Scale, int_range
from zq.spec import TensorSpec

BF16 = torch.bfloat16
SPECS = ["int2:g5", "int3:g32", "int4:g16", "int4:g64", "int4:g32:narrow", "int5:g16", "int8:g32"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT4 = TensorSpec.parse("int4:g16:two-level")


def two_level(text: str) -> TensorSpec:
    return TensorSpec.parse(f"{text}:two-level")


def uneven(n: int = 24, groups: int = 10, size: int = 16, seed: int = 0) -> torch.Tensor:
    """[n, groups, size] with groups whose spread differs by a factor of four."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.25 + 0.75 * torch.rand(n, groups, 1, generator=generator)
    return torch.randn(n, groups, size, generator=generator) * spread


def errors(
    x: torch.Tensor, spec: TensorSpec, scale: Scale, weight: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """[R]"""
    return ((fake_groups(x, spec, scale) - x).double().square() * weight).sum((1, 2))


@given(matrices(), st.sampled_from(SPECS), st.sampled_from(DTYPES), st.sampled_from(list(SCALES)))
def test_products_are_group_scales_and_are_found_again(
    x: torch.Tensor, text: str, dtype: torch.dtype, scale: str
) -> None:
    spec = two_level(text)
    q = quantize(x, spec, scale, dtype)
    assert q.sub is not None
    exact = q.scale.float() * q.sub
    products = exact.to(dtype)
    assert torch.equal(products.float(), exact)
    assert bool(products.isfinite().all())
    found = levels.levels(products, spec)
    assert found is not None
    channel, sub = found
    assert (channel.dtype, channel.shape, sub.dtype, sub.shape) == (
        dtype,
        q.scale.shape,
        torch.int8,
        q.sub.shape,
    )
    assert torch.equal(channel, q.scale)
    assert torch.equal(sub, q.sub)
    assert all(math.gcd(*row) == 1 for row in sub.tolist())


@pytest.mark.parametrize("name", [f"int{bits}{narrow}" for bits in range(2, 9) for narrow in ("", ":narrow")])
def test_codes_times_subs_fit_int8(name: str) -> None:
    bits, _, narrow = name.partition(":")
    spec = two_level(f"{bits}:g16" + ":narrow" * bool(narrow))
    ends, (least, most) = int_range(spec), levels.sub_range(spec)
    products = [end * sub for end in ends for sub in (least, most)]
    assert -128 <= min(products) <= max(products) <= 127
    assert most == 16 or not -128 <= ends[0] * (most + 1) <= ends[1] * (most + 1) <= 127
    assert (least, most) == (-15, 16) or name != "int4"


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 3.0, 0.7],
        [1.0, 17.0],
        [1.0, -16.0],
        [1.0, 0.0],
        [1.0, math.inf],
        [15.0, 16.0, 0.5],
        [255.0, 254.0],
    ],
)
def test_other_scales_have_no_levels(row: list[float]) -> None:
    scales = torch.tensor([[1.0] * len(row), row], dtype=BF16)
    assert levels.levels(scales, INT4) is None
    assert levels.levels(scales[:1], INT4) is not None


def test_the_channel_scale_is_the_largest() -> None:
    scales = torch.tensor([[0.75, -2.25, 3.0], [17.0, 255.0, 17.0], [2.0**-126, 2.0**-122, 2.0**-126]])
    found = levels.levels(scales.to(BF16), INT4)
    assert found is not None
    assert found[0].tolist() == [[0.75], [17.0], [2.0**-126]]
    assert found[1].tolist() == [[1, -3, 4], [1, 15, 1], [1, 16, 1]]


def pairs(spec: TensorSpec, dtype: torch.dtype, signed: bool, octaves: int = 12) -> list[tuple[float, int]]:
    """Every (channel scale of 5 bits, sub) whose product is exact, by plain arithmetic; largest first 1.0."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    least, most = levels.sub_range(spec)
    subs = [s for s in range(least if signed else 1, most + 1) if s]

    def exact(m: int, s: int) -> bool:
        product = m * abs(s)
        return product >> ((product & -product).bit_length() - 1) < 1 << bits

    return [(m / 16 * 2.0**-e, s) for e in range(octaves) for m in range(16, 32) for s in subs if exact(m, s)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mse_is_nearly_the_best_of_all_pairs(dtype: torch.dtype, weighted: bool, signed: bool) -> None:
    x = uneven(12)
    weight = (
        torch.rand(1, 10, 16, generator=torch.Generator().manual_seed(1)).pow(3)
        if weighted
        else torch.ones(1, 10, 16)
    )
    found = errors(x, INT4, levels.mse(x, INT4, dtype, weight, signed), weight)
    best: dict[float, torch.Tensor] = {}
    for channel, sub in pairs(INT4, dtype, signed):
        scale = Scale(torch.full((12, 10), channel * sub))
        now = ((fake_groups(x, INT4, scale) - x).double().square() * weight).sum(-1)
        best[channel] = torch.minimum(best.get(channel, now), now)
    brute = torch.stack([e.sum(-1) for e in best.values()]).amin(0)
    assert bool((found >= brute * (1 - 1e-6)).all())
    assert bool((found <= brute * 1.15).all())
    assert found.sum() <= 1.02 * brute.sum()


@given(matrices(), st.sampled_from(SPECS), st.sampled_from(DTYPES), st.booleans())
def test_mse_is_never_worse_than_absmax_in_any_row(
    x: torch.Tensor, text: str, dtype: torch.dtype, signed: bool
) -> None:
    spec = two_level(text)
    grouped = group(x, spec)
    best = errors(grouped, spec, levels.mse(grouped, spec, dtype, signed=signed))
    assert bool((best <= errors(grouped, spec, levels.absmax(grouped, spec, dtype)) * (1 + 1e-5)).all())


def test_absmax_clips_nothing_and_wastes_little() -> None:
    x = uneven(200)
    wanted = x.abs().amax(-1) / 7.5
    found = levels.absmax(x, INT4, BF16)
    assert bool((found.step >= wanted * (1 - 1e-3)).all())
    assert 1 <= float((found.step.square().sum() / wanted.square().sum()).sqrt()) < 1.08


def test_it_costs_little_and_less_than_rounding_free_scales() -> None:
    """Channel scales of 4 bits, with which all of 1 .. 15 are exact in bf16, and the nearest sub."""
    x = uneven(256, 12, 64)
    spec, free = two_level("int4:g64"), TensorSpec.parse("int4:g64")
    alone = SCALES["mse"](x, free, BF16)
    top = alone.scale.amax(-1, keepdim=True) / 15
    unit = torch.exp2(torch.floor(torch.log2(top)) - 3)
    channel = (top / unit).round() * unit
    rounded = Scale(channel, sub=(alone.scale / channel).round().clamp(1, 15).int())
    free_error, naive = errors(x, free, alone).sum(), errors(x, spec, rounded).sum()
    joint = errors(x, spec, levels.mse(x, spec, BF16)).sum()
    assert joint < 1.04 * free_error
    assert joint - free_error < 0.8 * (naive - free_error)


def test_importance_decides_where_the_error_goes() -> None:
    x = uneven()
    weight = torch.ones(1, 10, 16)
    weight[:, 3] = 1000.0
    plain, weighted = levels.mse(x, INT4, BF16), levels.mse(x, INT4, BF16, weight)
    assert errors(x, INT4, weighted, weight).sum() < errors(x, INT4, plain, weight).sum()
    assert errors(x, INT4, weighted).sum() > errors(x, INT4, plain).sum()


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x = uneven()
    whole = levels.mse(x, INT4, BF16)
    monkeypatch.setattr(levels, "CACHED", 1)
    alone = levels.mse(x, INT4, BF16)
    assert torch.equal(whole.step, alone.step)
