"""Chosen scales, against compressed-tensors' observers and against brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.numerics.strategies import INTS, ct_args, matrices, specs
from zq.numerics.groups import group
from zq.numerics.qtensor import fake_groups, quantize
from zq.numerics.scales import MSE_FACTORS, absmax, int_range, mse
from zq.spec import TensorSpec

FP32 = torch.float32
FP16_LEAST = 2.0**-24


def bounds(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amin(-1), x.amax(-1)


@given(
    matrices(),
    st.sampled_from([*INTS, "e4m3fn", *(f"{name}-asym" for name in INTS)]),
    st.sampled_from(["tensor", "channel", "g2", "g5", "g32"]),
)
def test_absmax_is_what_compressed_tensors_calculates(x: torch.Tensor, name: str, layout: str) -> None:
    spec = TensorSpec.parse(f"{name.removesuffix('-asym')}:{layout}" + ":asym" * name.endswith("asym"))
    grouped = group(x, spec)
    found = absmax(grouped, spec, FP32)
    scale, zero = calculate_qparams(*bounds(grouped), ct_args(spec))
    some = grouped.abs().amax(-1) > 0  # for zeros the library takes epsilon, zq takes 1
    assert torch.equal(found.scale[some], scale.reshape(some.shape)[some])
    assert bool((found.scale[~some] == 1).all())
    if found.zero is None:
        assert spec.symmetric
    else:
        assert torch.equal(found.zero[some], zero.reshape(some.shape)[some].int())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4:channel", 7.5 / 7.5),
        ("int4:channel:narrow", 7.5 / 7),
        ("int8:channel", 7.5 / 127.5),
        ("int2:channel", 7.5 / 1.5),
        ("e2m1fn:channel", 7.5 / 6),
        ("e3m2fn:channel", 7.5 / 28),
        ("e2m3fn:channel", 7.5 / 7.5),
        ("e3m0fn:channel", 7.5 / 16),
        ("e5m2:channel", 7.5 / 57344),
    ],
)
def test_the_largest_value_lands_on_the_end_of_the_range(text: str, expected: float) -> None:
    spec = TensorSpec.parse(text)
    x = torch.tensor([[[-7.5, 1.0, 3.0]]])
    assert absmax(x, spec, FP32).scale.item() == torch.tensor(expected).item()


@pytest.mark.parametrize("name", INTS)
def test_ranges(name: str) -> None:
    bits = int(name[3:])
    assert int_range(TensorSpec.parse(f"{name}:channel")) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert int_range(TensorSpec.parse(f"{name}:channel:narrow")) == (
        -(2 ** (bits - 1)) + 1,
        2 ** (bits - 1) - 1,
    )


@given(matrices(), specs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_scales_are_exact_in_their_stored_dtype_and_usable(
    x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype
) -> None:
    grouped = group(x, spec)
    for found in (absmax(grouped, spec, dtype), mse(grouped, spec, dtype)):
        assert torch.equal(found.scale.to(dtype).float(), found.scale)
        assert bool((found.scale > 0).all())
        assert bool(found.scale.isfinite().all())
        if found.sub is not None:
            assert 1 <= int(found.sub.min()) <= int(found.sub.max()) <= 16
        if found.zero is not None:
            qmin, qmax = int_range(spec)
            assert qmin <= int(found.zero.min()) <= int(found.zero.max()) <= qmax


def errors(x: torch.Tensor, spec: TensorSpec, scale: str) -> torch.Tensor:
    """Squared error of every group, in float64, from the finished QTensor."""
    dense = quantize(x, spec, scale).dequantize()
    padded = replace(spec, format="int8", center=False)  # with zeros, which are no error
    return group((dense.double() - x.double()).float().double().square(), padded).sum(-1)


@given(matrices(), specs().filter(lambda spec: not spec.two_level))  # those are chosen by row: test_levels.py
def test_mse_is_never_worse_than_absmax_in_any_group(x: torch.Tensor, spec: TensorSpec) -> None:
    assume(not spec.info.is_estimated or group(x, spec).numel() == x.numel())  # there padding counts too
    best, plain = errors(x, spec, "mse"), errors(x, spec, "absmax")
    if spec.layout.kind == "rank1":
        best, plain = best.sum(), plain.sum()
    elif spec.inner:  # groups inside a group have one factor
        inside = spec.layout.size // spec.inner if spec.layout.size else best.shape[1]
        best, plain = (e.unflatten(1, (-1, inside)).sum(-1) for e in (best, plain))
    assert bool((best <= plain * (1 + 1e-4) + 1e-30).all())


@pytest.mark.parametrize("text", ["int4:g32", "int4:g32:asym", "int3:g32:narrow", "e2m1fn:g32", "e4m3fn:g32"])
def test_mse_finds_the_best_of_its_grid(text: str) -> None:
    spec = TensorSpec.parse(text)
    x = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(3)).pow(3)
    brute = torch.full((8, 1), torch.inf)
    for factor in MSE_FACTORS:
        candidate = absmax(x * factor, spec, FP32)  # the scale that the group would have if it were wider
        brute = torch.minimum(brute, (fake_groups(x, spec, candidate) - x).square().sum(-1))
    found = (fake_groups(x, spec, mse(x, spec, FP32)) - x).square().sum(-1)
    assert torch.allclose(found, brute, rtol=1e-4)
    assert bool((found < (fake_groups(x, spec, absmax(x, spec, FP32)) - x).square().sum(-1)).any())


def test_mse_is_clearly_better_on_four_bits() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec.parse("int4:g64")
    assert errors(x, spec, "mse").sum() < 0.95 * errors(x, spec, "absmax").sum()


@pytest.mark.parametrize(
    "spec", ["int8:channel", "int4:channel:asym", "e4m3fn:channel", "e2m1fn:b8", "int4:g4:two-level"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiny_and_huge_groups_stay_finite(spec: str, dtype: torch.dtype) -> None:
    least = torch.finfo(torch.float32).smallest_normal * 2**-20  # subnormal
    parsed = TensorSpec.parse(spec)
    for size in (least, 1e-30, 1e30, 3.0e38):
        x = torch.tensor([[size, -size, 0.0, size / 3, -size / 3, size / 7, 0.0, -size / 2]])
        q = quantize(x, parsed, "absmax", dtype)
        assert bool(q.scale.isfinite().all())
        assert bool((q.scale.float() >= min(torch.finfo(dtype).tiny, 2.0**-24)).all())
        assert bool(q.dequantize().isfinite().all())


def test_asymmetric_range_beyond_float32_keeps_its_values() -> None:
    x = torch.tensor([[3.0e38, -3.0e38, 1.5e38, 0.0]])
    dense = quantize(x, TensorSpec.parse("int8:channel:asym")).dequantize()
    assert bool(((dense - x).abs() <= 3.0e36).all())


def test_small_fp16_weights_keep_their_codes() -> None:
    """absmax 0.002 needs an int8 scale of 1.6e-5, which fp16 holds as a subnormal number."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).half() * 5e-4
    q = quantize(x, TensorSpec.parse("int8:channel"))
    assert q.scale.dtype == torch.float16
    assert float((q.dequantize() - x.float()).norm() / x.float().norm()) < 0.01
    floor = quantize(torch.full((1, 4), 1e-12), TensorSpec.parse("int8:channel"), scale_dtype=torch.float16)
    assert floor.scale.item() == FP16_LEAST
