"""Layers on a CPU: which product each gets, and that it computes what the scheme says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.inputs import activations
from zq.kernels import reference
from zq.kernels.select import gemm_op
from zq.numerics.qtensor import QTensor, quantize
from zq.runtime import cpu, integers
from zq.runtime.cpu import IntegerLinear, PackedLinear
from zq.runtime.integers import FEW, PORTION, codes_of, integer_op, packed_op, product
from zq.runtime.merge import mergeable, merged, reordered
from zq.runtime.served import DenseLinear, KernelLinear, serve
from zq.runtime.serving import ServedLinear
from zq.spec import Scheme, TensorSpec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8 = TensorSpec.parse("int8:token")


def weight(text: str, n: int = 48, k: int = 256, dtype: torch.dtype = BF16, seed: int = 5) -> QTensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    return quantize(x.to(dtype), TensorSpec.parse(text), "mse")


@pytest.fixture(params=[True, False], ids=["with-int8", "without"])
def int8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With torch's INT8 product, where this processor has it, and with the one for those that have not."""
    if request.param and not integers.has_int8():
        pytest.skip("this processor has no exact INT8 product")
    monkeypatch.setattr(integers, "has_int8", lambda: request.param)
    return request.param


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([BF16, FP16, FP32]), st.integers(0, 1 << 30))
def test_codes_are_those_of_the_reference(m: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x = activations(m, k, dtype, seed)
    kept = x.clone()
    codes, step = codes_of(x)
    wanted, scale = reference.quantize(x, torch.int8)
    assert torch.equal(codes, wanted.float())
    filled = x.abs().amax(1) > 0
    assert torch.equal(step[filled, 0], scale[filled])
    assert torch.equal(x, kept)


def test_codes_of_values_at_the_ends_of_float32() -> None:
    x = torch.tensor([[3.4e38, -3.4e38], [1e-45, 0.0], [float("inf"), 1.0], [0.0, 0.0]])
    assert torch.equal(codes_of(x)[0], reference.quantize(x, torch.int8)[0].float())


@pytest.mark.parametrize(
    "text",
    ["int8:channel", "int4:channel", "int4:g128:two-level", "int4:g64:two-level", "int8:channel:narrow"],
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_integers_are_the_operators_to_the_bit(text: str, dtype: torch.dtype, int8: bool) -> None:
    q = weight(text)
    op = gemm_op(Scheme(q.spec, INT8))
    assert op is not None
    x, bias = activations(7, 256, dtype), torch.randn(48).to(dtype)
    for added in (bias, None):
        assert torch.equal(IntegerLinear(q)(x, added), KernelLinear(q, op, dtype)(x, added))


@pytest.mark.parametrize("text", ["int8:channel:asym", "int5:channel", "int2:channel:asym"])
def test_integers_without_an_operator(text: str, int8: bool) -> None:
    q, x = weight(text), activations(5, 256, FP32)
    codes, sx = reference.quantize(x, torch.int8)
    wanted = (codes.double() @ q.dequantize(torch.float64).T) * sx[:, None].double()
    found = IntegerLinear(q)(x, None)
    assert found.dtype == FP32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))


def test_no_sum_saturates(int8: bool) -> None:
    """Bytes at the ends of their range, a long row: 127 * 127 * 8192 is above 2^24 and far above 16 bits."""
    k = 16 * PORTION
    spec = TensorSpec.parse("int8:channel")
    codes = torch.full((16, k), 127, dtype=torch.int8)
    codes[1], codes[2, ::2] = -128, -128
    q = QTensor(codes, torch.ones(16, 1), None, None, spec)
    x = torch.full((3, k), 1.0)
    x[1], x[2, 1::2] = -1.0, -1.0
    rows = codes_of(x)[0].double()
    assert rows.abs().min() == 127
    wanted = rows @ codes.double().T * codes_of(x)[1].double()
    torch.testing.assert_close(IntegerLinear(q)(x, None).double(), wanted, rtol=3e-7, atol=0)


def test_sums_in_portions_are_exact_where_float32_alone_is_not() -> None:
    k = 64 * PORTION
    x, codes = torch.full((1, k), 127.0), torch.full((1, k), 127, dtype=torch.int8)
    x[0, 0], codes[0, 0] = 1.0, 1
    exact = 127 * 127 * (k - 1) + 1
    assert exact > 1 << 24
    assert product(x, codes, None).item() == torch.tensor(float(exact)).item()
    assert product(x, codes, torch.tensor([127], dtype=torch.int8)).item() == -126.0


PACKED = [
    *(("int4:g32", INT8), ("int4:g64", INT8), ("int4:g128", INT8), ("int4:g256", INT8), ("int3:g64", INT8)),
    *(("int4:g64", None), ("int2:g32", None), ("int8:channel", None), ("int6:channel", None)),
]


def exactly(q: QTensor, x: Tensor, acts: TensorSpec | None, bias: Tensor | None) -> Tensor:
    """float64: integers times scales, nothing rounded on the way."""
    wide, sx = x.double(), torch.ones(len(x), 1, dtype=torch.float64)
    if acts is not None:
        codes, scale = reference.quantize(x, torch.int8)
        wide, sx = codes.double(), scale[:, None].double()
    y = wide @ q.dequantize(torch.float64).T * sx
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("text", "acts"), PACKED)
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_product_of_few_rows_is_rounded_at_its_end_only(
    text: str, acts: TensorSpec | None, biased: bool
) -> None:
    q, x = weight(text), activations(7, 256)
    made = PackedLinear(q, acts is not None)
    bias = torch.randn(48).to(BF16) if biased else None
    found, wanted = made(x, bias).double(), exactly(q, x, acts, bias)
    size = x.double().abs() @ q.dequantize(torch.float64).T.abs()  # of what is summed
    # Twice half a digit of bfloat16, that of the product and that of the result, and float32 on the way.
    bound = 2**-8 * (wanted.abs() + (exactly(q, x, acts, None)).abs()) + 1e-5 * size
    assert bool(((found - wanted).abs() <= bound).all())


@pytest.mark.parametrize(("text", "acts"), PACKED)
def test_many_rows_are_no_further_off_than_the_simulation(text: str, acts: TensorSpec | None) -> None:
    q = weight(text, n=256)
    x = torch.randn(FEW, 256, generator=torch.Generator().manual_seed(2)).to(BF16)
    wanted = exactly(q, x, acts, None)
    found, simulated = PackedLinear(q, acts is not None)(x, None), DenseLinear(q, acts, BF16)(x, None)
    apart, allowed = ((y.double() - wanted).norm() for y in (found, simulated))
    assert apart <= 1.1 * allowed


TABLE = [
    ("int8:channel", INT8, BF16, 48, IntegerLinear),
    ("int8:channel", INT8, FP32, 48, IntegerLinear),
    ("int4:g128:two-level", INT8, FP16, 48, IntegerLinear),
    ("int4:g64", INT8, BF16, 48, PackedLinear),
    ("int4:g64", None, BF16, 48, PackedLinear),
    ("int8:channel", None, BF16, 48, PackedLinear),
    ("int4:g64", INT8, FP32, 48, DenseLinear),
    ("int4:g64", None, FP16, 48, DenseLinear),
    ("int4:g64:asym", INT8, BF16, 48, DenseLinear),
    ("int4:g64:s=fp32", INT8, BF16, 48, DenseLinear),
    ("int4:g96", INT8, BF16, 48, DenseLinear),
    ("int4:g64", INT8, BF16, 40, DenseLinear),
    ("int4:channel", None, BF16, 48, DenseLinear),
    ("int6:g64", INT8, BF16, 48, DenseLinear),
    ("int4:g64", TensorSpec.parse("e4m3fn:token"), BF16, 48, DenseLinear),
]


@pytest.mark.parametrize(("text", "acts", "dtype", "n", "way"), TABLE)
def test_which_product_a_layer_gets(
    text: str, acts: TensorSpec | None, dtype: torch.dtype, n: int, way: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = weight(text, n)
    monkeypatch.setattr(cpu, "has_packed", lambda: True)
    assert type(serve(q, acts, dtype)) is way
    monkeypatch.setattr(cpu, "has_packed", lambda: False)
    assert type(serve(q, acts, dtype)) is (DenseLinear if way is PackedLinear else way)


@pytest.mark.parametrize(
    ("text", "acts"), [("int4:g64", INT8), ("int8:channel", None), ("int8:channel", INT8)]
)
@pytest.mark.parametrize("rows", [3, FEW])
def test_joined_and_moved_rows(text: str, acts: TensorSpec | None, rows: int) -> None:
    """What is packed is packed again."""
    parts = []
    for seed, n in enumerate((64, 16, 48)):
        q = weight(text, n, seed=seed)
        parts.append(ServedLinear(serve(q, acts, BF16), torch.randn(n).to(BF16), n, 256))
    x = activations(rows, 256)
    assert mergeable(parts)
    whole = merged(parts)
    alone = torch.cat([part(x) for part in parts], -1)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    close = {"rtol": 2**-7, "atol": 1e-6 * float(alone.abs().max())}  # products of other shapes sum otherwise
    torch.testing.assert_close(whole(x), alone, **close)
    torch.testing.assert_close(reordered(whole, order)(x), alone[:, order], **close)


def test_operators_are_what_torch_asks_of_them() -> None:
    x = activations(4, 256)
    q = weight("int8:channel")
    torch.library.opcheck(integer_op, (x, q.codes, q.scale[:, 0].float(), None, None))
    made = PackedLinear(weight("int4:g64"), True)
    torch.library.opcheck(packed_op, (x, made.codes, made.scale, *made.packed, None, 64, True))
