"""Weights made ready for serving compute what zq's reference does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.inputs import activations
from zq.kernels.select import gemm_op, kernel_op
from zq.numerics.qtensor import QTensor, fake_quantize_tokens, quantize
from zq.runtime.cpu import IntegerLinear, PackedLinear
from zq.runtime.linear import QuantLinear
from zq.runtime.served import NAMES, DenseLinear, KernelLinear, serve, units
from zq.spec import Scheme, TensorSpec

BF16 = torch.bfloat16
OP = "fp8_block128"
INT8 = TensorSpec.parse("int8:token")


def weight(text: str, n: int = 48, k: int = 256, dtype: torch.dtype = BF16) -> QTensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(5)) * 0.02
    return quantize(x.to(dtype), TensorSpec.parse(text), "mse")


@pytest.mark.parametrize(
    "text", ["int3:g64", "e2m1fn:g32", "e4m3fn:channel", "int4:g64:center", "nf4:channel"]
)
@pytest.mark.parametrize("acts", [None, "e4m3fn:token"])
def test_what_is_dequantized_is_what_zq_load_computes(text: str, acts: str | None) -> None:
    q, x = weight(text), activations(3, 256)
    spec = TensorSpec.parse(acts) if acts else None
    linear = QuantLinear(256, 48, Scheme(q.spec, spec), bias=False, dtype=BF16)
    linear.set_weight(q)
    assert torch.equal(DenseLinear(q, spec, BF16)(x, None), linear(x))


@pytest.mark.parametrize(
    ("text", "acts", "way"),
    [
        ("int8:channel", INT8, IntegerLinear),
        ("int4:g64", INT8, PackedLinear),
        ("int3:g64:asym", INT8, DenseLinear),
        ("int4:g64:center", INT8, DenseLinear),
        ("e4m3fn:channel", TensorSpec.parse("e4m3fn:token"), DenseLinear),
        ("e4m3fn:128x128", TensorSpec.parse("e4m3fn:g128"), DenseLinear),
    ],
)
def test_any_shape_of_input(text: str, acts: TensorSpec | None, way: type) -> None:
    made = serve(weight(text), acts, BF16)
    assert type(made) is way
    x = activations(6, 256)
    assert torch.equal(made(x.reshape(2, 3, 256), None).reshape(6, 48), made(x, None))


def test_activations_count() -> None:
    """A layer that forgot them would give the product with x as it is."""
    q, x = weight("int4:g64"), torch.randn(4, 256)
    dense = q.dequantize()
    found = serve(q, INT8, torch.float32)(x, None)
    with_them, without = fake_quantize_tokens(x, INT8) @ dense.T, x @ dense.T
    assert float((found - with_them).abs().max()) < 1e-5 < float((found - without).abs().max())


@pytest.mark.parametrize(
    ("text", "op"),
    [
        ("int4:g64", "w4a16"),
        ("int4:g64:asym", "w4a16"),
        ("int4:channel", "w4a16"),
        ("int8:channel", "w8a16"),
        ("int4:g128 @ e4m3fn:token", "w4a8_fp8"),
        ("e4m3fn:channel @ e4m3fn:token", "w8a8_fp8"),
        ("e4m3fn:128x128 @ e4m3fn:g128", "fp8_block128"),
        ("e4m3fn:128x128:s=fp32 @ e4m3fn:g128", "fp8_block128"),
        ("int8:channel @ int8:token", "w8a8_int8"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_packed_weights_are_the_weights(text: str, op: str, dtype: torch.dtype) -> None:
    """Through the operator's reference, so packing, scales and the order of arguments are right."""
    scheme = Scheme.parse(text)
    assert gemm_op(scheme) == op
    q, x = weight(str(scheme.weights)), (torch.randn(5, 256) / 4).to(dtype)
    bias = torch.randn(48).to(dtype)
    seen = x.float() if scheme.activations is None else fake_quantize_tokens(x.float(), scheme.activations)
    wanted = seen @ q.dequantize().T + bias.float()
    found: Tensor = KernelLinear(q, op, dtype)(x, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("text", "k", "dtype", "capability", "op"),
    [
        ("int4:g64 @ int8:token", 256, BF16, 90, "w4a8_int8_group"),
        ("int4:g64 @ int8:token", 256, BF16, 75, None),
        ("int4:g64 @ int8:token", 264, BF16, 90, None),
        ("int4:g64 @ int8:token", 1 << 17, BF16, 90, None),
        ("int4:g64", 1 << 17, BF16, 90, "w4a16"),
        ("int4:g64 @ int8:token", 256, torch.float32, 90, None),
        ("e4m3fn:channel @ e4m3fn:token", 256, BF16, 80, None),
        ("e4m3fn:channel @ e4m3fn:token", 256, BF16, 89, "w8a8_fp8"),
        ("e4m3fn:128x128 @ e4m3fn:g128", 272, BF16, 90, "fp8_block128"),
        ("e4m3fn:128x128 @ e4m3fn:g128", 264, BF16, 90, None),
        ("e4m3fn:128x128 @ e4m3fn:g128", 256, BF16, 80, None),
        ("int3:g64 @ int8:token", 256, BF16, 90, None),
    ],
)
def test_where_a_kernel_is_used(
    text: str, k: int, dtype: torch.dtype, capability: int, op: str | None
) -> None:
    assert kernel_op(Scheme.parse(text), k, NAMES[dtype], capability) == op


def test_the_units_that_are_loaded_exist() -> None:
    from zq.kernels.table import UNITS

    two_level, tiles = "int4:g128:two-level @ int8:token", "e4m3fn:128x128 @ e4m3fn:g128"
    for text in ("int4:g64 @ int8:token", two_level, tiles, "int4:g32:asym", "int8:channel"):
        scheme = Scheme.parse(text)
        op = gemm_op(scheme)
        assert op is not None
        for dtype in (BF16, torch.float16):
            for capability in (80, 90):
                names = units(op, scheme, dtype, capability)
                assert set(names) <= set(UNITS)
                assert len(names) == 1 + (scheme.activations is not None)


def test_it_compiles_as_one_graph() -> None:
    """vLLM compiles models as one graph, with the number of tokens unknown."""
    x = activations(4, 256)
    for text in ("int4:g64", "int8:channel", "int3:g64:asym"):
        for acts in (INT8, TensorSpec.parse("e4m3fn:token"), None):
            made = serve(weight(text), acts, BF16)
            whole = torch.compile(made, fullgraph=True, dynamic=True, backend="eager")
            assert torch.equal(whole(x, None), made(x, None))
            torch.compiler.reset()
    for text in ("e4m3fn:128x128", "e4m3fn:32x64"):
        acts = TensorSpec.parse(f"e4m3fn:g{text.rpartition('x')[2]}")
        for made in (serve(weight(text), acts, BF16), KernelLinear(weight("e4m3fn:128x128"), OP, BF16)):
            whole = torch.compile(made, fullgraph=True, dynamic=True, backend="eager")
            assert torch.equal(whole(x, None), made(x, None))
            torch.compiler.reset()


def test_tiles_take_rows_as_they_are() -> None:
    """Their scales within a row come from no operator that norms or activates."""
    made = KernelLinear(weight("e4m3fn:128x128"), OP, BF16)
    assert made.takes is None
    assert made.ws is None
