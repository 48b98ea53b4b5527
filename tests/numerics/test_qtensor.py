"""quantize and dequantize, against compressed-tensors, torch's casts and loops over single values."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.strategies import INTS, ct_args, matrices, specs
from zq.errors import ZqError
from zq.numerics.codebook import codebook
from zq.numerics.groups import group, ungroup
from zq.numerics.qtensor import QTensor, encode, fake_groups, quantize
from zq.numerics.scales import Scale, absmax, int_range
from zq.spec import TensorSpec, scale_shape

FP32 = torch.float32


@given(
    matrices(),
    st.sampled_from([*INTS, "e4m3fn", *(f"{name}-asym" for name in INTS)]),
    st.sampled_from(["tensor", "channel", "g2", "g8", "g32"]),
)
def test_values_equal_the_fake_quantization_of_compressed_tensors(
    x: torch.Tensor, name: str, layout: str
) -> None:
    size = int(layout[1:]) if layout[0] == "g" else 1
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % size))  # the library knows no ragged groups
    spec = TensorSpec.parse(f"{name.removesuffix('-asym')}:{layout}" + ":asym" * name.endswith("asym"))
    grouped = group(x, spec)
    args = ct_args(spec)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    shape = scale_shape(spec, (x.shape[0], x.shape[1]))
    theirs = fake_quantize(x, scale.reshape(shape), zero.reshape(shape), args)
    q = quantize(x, spec)
    ours = q.dequantize()
    zeros = (grouped.abs().amax(-1, keepdim=True) == 0).expand(grouped.shape).reshape(x.shape)
    assert torch.equal(ours[~zeros], theirs[~zeros])
    assert not ours[zeros].any()


@given(matrices(), st.sampled_from([("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]))
def test_fp8_equals_torchs_cast(x: torch.Tensor, pair: tuple[str, torch.dtype]) -> None:
    name, dtype = pair
    q = quantize(x, TensorSpec.parse(f"{name}:channel"))
    top = torch.finfo(dtype).max
    bits = (x / q.scale).clamp(-top, top).to(dtype)
    assert torch.equal(q.codes.view(dtype).float(), bits.float())
    assert torch.equal(q.dequantize(), bits.float() * q.scale)


@given(matrices(), specs())
def test_dequantize_value_by_value(x: torch.Tensor, spec: TensorSpec) -> None:
    """w = (q - z) * s + c or value(code) * s + c, with the scale that belongs to position (i, j)."""
    q = quantize(x, spec)
    n, k = x.shape
    dense = q.dequantize()
    for i, j in {(0, 0), (n - 1, k - 1), (n // 2, k // 2), (0, k - 1)}:
        expected = value_at(q, i, j, k) * step_at(q, i, j, k)
        if q.center is not None:
            expected = expected + q.center.float()[stored_at(spec, i, j, k)]
        assert float(dense[i, j]) == float(expected)


def stored_at(spec: TensorSpec, i: int, j: int, k: int) -> tuple[int, ...]:
    """Where the scale of position (i, j) of a matrix with k columns is stored."""
    size = spec.layout.size or 1
    flat = {"tensor": (0,), "channel": (i, 0), "token": (i, 0), "group": (i, j // size)}
    flat["tile"] = (i // spec.layout.rows, j // size)
    return flat.get(spec.layout.kind) or ((i * k + j) // size,)


def step_at(q: QTensor, i: int, j: int, k: int) -> torch.Tensor:
    spec, scale = q.spec, q.scale.float()
    if spec.layout.kind == "rank1":
        return torch.minimum(scale[i], scale[q.shape[0] + j])
    place = stored_at(spec, i, j, k)
    step = scale[i, 0] if spec.two_level else scale[place]
    if q.sub is not None:
        step = step * q.sub[place].float()
    if q.shift is not None:
        whole = spec.layout.kind in ("tensor", "block")
        row, column = (0, i * k + j) if whole else (i, j)
        step = step * 0.5 ** float(q.shift[row, column // spec.inner])
    return step


def value_at(q: QTensor, i: int, j: int, k: int) -> torch.Tensor:
    code = q.codes[i, j]
    if q.book is not None:
        return q.book[i if len(q.book) > 1 else 0, int(code)].float()
    if not q.spec.info.is_int:
        return codebook(q.spec.format).decode(code.reshape(1))[0]
    return code.float() - (0.0 if q.zero is None else q.zero[stored_at(q.spec, i, j, k)].float())


@given(matrices(), specs())
def test_every_value_is_within_half_a_step_or_at_the_end(x: torch.Tensor, spec: TensorSpec) -> None:
    if not spec.info.is_int:
        return
    q = quantize(x, spec, scale_dtype=FP32)
    step = q.scales().step.unsqueeze(-1)
    low, high = int_range(spec)
    codes = group(q.codes, spec).float()
    error = group(q.dequantize(), spec) - group(x, spec)
    inside = (codes > low) & (codes < high)
    most = step.expand(error.shape) * 0.5001 + 1e-6 * x.abs().max() * spec.center
    assert bool((error.abs()[inside] <= most[inside]).all())


@given(matrices(), st.sampled_from(INTS), st.sampled_from(["channel", "g5", "tensor"]))
def test_the_integer_path_equals_the_codebook_path(x: torch.Tensor, name: str, layout: str) -> None:
    spec = TensorSpec.parse(f"{name}:{layout}")
    grouped = group(x, spec)
    scale = absmax(grouped, spec, FP32)
    book = codebook(name)
    by_book = book.decode(book.encode(grouped / scale.step.unsqueeze(-1)))
    assert torch.equal(encode(grouped, spec, scale).float(), by_book)


@given(matrices(), specs())
def test_fake_groups_is_what_a_reader_gets(x: torch.Tensor, spec: TensorSpec) -> None:
    grouped = group(x, spec)
    found = absmax(grouped, spec, FP32)
    fake = fake_groups(grouped, spec, found)
    q = quantize(x, TensorSpec.parse(str(spec).split(":s=")[0]), scale_dtype=FP32)
    assert torch.equal(q.dequantize(), ungroup(fake, (x.shape[0], x.shape[1]), spec))


@given(
    matrices(),
    st.sampled_from(["int4:g32", "int4:g32:asym", "int3:g32:two-level", "e2m1fn:g32", "e2m1fn:b32"]),
)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_padding_changes_no_value(scale: str, x: torch.Tensor, text: str) -> None:
    """A ragged tail quantizes as it would alone; a flat block as in one long row."""
    spec = TensorSpec.parse(text)
    got = quantize(x, spec, scale).dequantize()
    if spec.layout.kind == "block":
        flat = x.reshape(-1)
        parts = [
            quantize(p.reshape(1, -1), TensorSpec.parse("e2m1fn:channel"), scale) for p in flat.split(32)
        ]
        assert torch.equal(got.reshape(-1), torch.cat([p.dequantize().reshape(-1) for p in parts]))
        return
    if spec.two_level:
        x32 = torch.nn.functional.pad(x, (0, -x.shape[1] % 32))
        assert torch.equal(got, quantize(x32, spec, scale).dequantize()[:, : x.shape[1]])
        return
    alone = TensorSpec.parse(text.replace("g32", "channel"))
    parts = [quantize(p.contiguous(), alone, scale).dequantize() for p in x.split(32, dim=1)]
    assert torch.equal(got, torch.cat(parts, dim=1))


@pytest.mark.parametrize(
    "text", ["int4:g4", "int4:g4:asym", "int4:g4:two-level", "e4m3fn:channel", "e2m1fn:b4"]
)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_zero_groups_are_exact_and_have_a_usable_scale(text: str, scale: str) -> None:
    x = torch.zeros(2, 8)
    x[0, :4] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    q = quantize(x, TensorSpec.parse(text), scale)
    assert not q.dequantize()[0, 4:].any()
    assert not q.dequantize()[1].any()
    assert bool(q.scale.isfinite().all())
    assert bool((q.scale > 0).all())


@pytest.mark.parametrize("name", ["int2", "int4", "int8"])
def test_zero_is_exact_with_a_zero_point(name: str) -> None:
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 1  # 0 lies outside of the data
    x[:, ::5] = 0
    dense = quantize(x, TensorSpec.parse(f"{name}:g16:asym")).dequantize()
    assert not dense[x == 0].any()


def test_ties_with_a_zero_point_go_where_the_library_sends_them() -> None:
    """x / s = 2.5 and z = 1: 3.5 rounds to 4, while 2.5 rounded first would give 3."""
    spec = TensorSpec.parse("int4:channel:asym")
    x = torch.arange(-6, 6.5, 0.5).reshape(1, -1)
    for zero in (-1, 0, 1, 2):
        found = Scale(torch.ones(1, 1), zero=torch.full((1, 1), zero, dtype=torch.int32))
        theirs = fake_quantize(x, found.scale, torch.full((1, 1), zero).to(torch.int8), ct_args(spec))
        assert torch.equal(fake_groups(x.unsqueeze(1), spec, found).reshape(x.shape), theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(ZqError, match="1 of 12 values are NaN or Inf"):
        quantize(x, TensorSpec.parse("int4:channel"))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 2, 2)])
def test_only_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ZqError, match="only non-empty matrices"):
        quantize(torch.ones(shape), TensorSpec.parse("int4:channel"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes_and_shapes(dtype: torch.dtype) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for text in (
        "int4:g16",
        "int4:g16:asym",
        "int4:g16:two-level",
        "e2m1fn:b7",
        "int8:tensor",
        "e4m3fn:channel",
    ):
        spec = TensorSpec.parse(text)
        q = quantize(x, spec)
        assert q.scale.dtype == dtype
        assert tuple(q.scale.shape) == ((6, 1) if spec.two_level else scale_shape(spec, (6, 40)))
        assert q.codes.dtype == (torch.int8 if spec.info.is_int else torch.uint8)
        assert q.codes.shape == (6, 40)
        assert (q.zero is None) == spec.symmetric
        assert q.zero is None or (q.zero.dtype == torch.int8 and q.zero.shape == q.scale.shape)
        assert (q.sub is None) == (not spec.two_level)
        assert q.sub is None or (q.sub.dtype == torch.int8 and q.sub.shape == (6, 3))
    assert quantize(x, TensorSpec.parse("int4:g16:s=fp32")).scale.dtype == torch.float32
    assert quantize(x, TensorSpec.parse("int4:g16"), scale_dtype=torch.float16).scale.dtype == torch.float16


def test_codes_follow_the_stored_scale_not_the_exact_one() -> None:
    """A scale rounded to bf16 after the codes were chosen would cost up to half a step at the end."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    q = quantize(x, TensorSpec.parse("int8:channel:s=bf16"))
    expected = torch.round(x / q.scale.float()).clamp(-128, 127)
    assert torch.equal(q.codes.float(), expected)


def test_arithmetic_is_float32_for_bf16_weights() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide, narrow = (quantize(t, TensorSpec.parse("int4:g32:s=bf16")) for t in (x.float(), x))
    assert torch.equal(wide.codes, narrow.codes)
    assert torch.equal(narrow.dequantize(torch.bfloat16), wide.dequantize().bfloat16())


@pytest.mark.parametrize(
    "text", ["int4:channel", "int4:channel:asym", "int8:g16", "e4m3fn:channel", "e2m1fn:channel"]
)
def test_stochastic_rounding_is_unbiased_and_repeats(text: str) -> None:
    """4 sigma per value: the variance of one draw is p (1 - p) step^2 <= gap^2 / 4."""
    spec = TensorSpec.parse(text)
    x = torch.linspace(-0.9, 0.9, 16).repeat(1, 1)
    x[0, 0], x[0, 15] = -1.0, 1.0
    count = 4000
    big = torch.cat([x] * count).contiguous()
    dense = quantize(big, spec, generator=torch.Generator().manual_seed(5)).dequantize().double()
    mean, inner = dense.mean(0), slice(1, 15)
    gap = dense.amax(0) - dense.amin(0)
    sigma = gap / 2 / count**0.5
    assert bool(((mean - x[0]).abs()[inner] <= 4 * sigma[inner] + 1e-6).all())
    assert bool((gap[inner] > 0).any())
    again = quantize(big, spec, generator=torch.Generator().manual_seed(5)).dequantize()
    other = quantize(big, spec, generator=torch.Generator().manual_seed(6)).dequantize()
    assert torch.equal(dense.float(), again)
    assert not torch.equal(again, other)


def test_two_level_dequantizes_with_sub_times_scale() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    q = quantize(x, TensorSpec.parse("int4:g16:two-level"))
    assert q.sub is not None
    step = (q.scale * q.sub.float()).repeat_interleave(16, dim=1)
    assert torch.equal(q.dequantize(), q.codes.float() * step)
    assert torch.equal(Scale(q.scale, sub=q.sub.int()).step, q.scale * q.sub.float())
