"""The references of the products against float64 and against exact integers."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.inputs import BF16, FP8, FP16, activations, gemm_calls, normal, whole
from zq.kernels import layout, reference
from zq.kernels.layout import Packing
from zq.numerics.qtensor import quantize
from zq.spec import TensorSpec

SHAPE = (3, 40, 160)


def close(y, exact, terms):
    """Within the rounding to the output's dtype and a few float32 steps of the sum of magnitudes."""
    step = torch.finfo(y.dtype).eps
    assert ((y.double() - exact).abs() <= step * exact.abs() + 2e-6 * terms + 1e-30).all()


def dense(spec_text, n, k, dtype=torch.float32):
    """A quantized random weight."""
    return quantize(normal(n, k, seed=3).to(dtype), TensorSpec.parse(spec_text), "mse")


def unsigned(codes):
    return (codes.short() + 8).to(torch.uint8)


@pytest.mark.parametrize("out", [BF16, FP16])
def test_w8a8_is_exact(out):
    m, n, k = SHAPE
    q = dense("int8:channel", n, k)
    x8, sx, _ = reference.quant_int8(activations(m, k))
    ws, bias = q.scale.reshape(-1), normal(n, seed=4, dtype=out)
    y = reference.w8a8_int8(x8, sx, layout.pack(Packing("w8a8"), q.codes.view(torch.uint8)), ws, bias, n, out)
    for i in range(m):
        for j in range(n):
            acc = sum(a * b for a, b in zip(x8[i].tolist(), q.codes[j].tolist(), strict=True))
            step = ws[j] * sx[i]
            assert y[i, j] == (torch.tensor(acc).float() * step + bias[j].float()).to(out)


@pytest.mark.parametrize("group", [64, 128])
def test_two_level_is_the_checkpoint(group):
    """A two-level QTensor, signed group scales included, through `two_level` and `pack`: exact sums."""
    m, n, k = SHAPE
    q = quantize(
        normal(n, k, seed=3), TensorSpec.parse(f"int4:g{group}:two-level"), "mse-signed", torch.float32
    )
    assert q.sub is not None
    assert (q.sub < 0).any()
    x8, sx, rowsum = reference.quant_int8(activations(m, k))
    codes, sub, offset = layout.two_level(q)
    packed = layout.pack(Packing("w4a8_two", group), codes, sub, offset)
    y = reference.w4a8_int8(x8, sx, rowsum, packed, q.scale.reshape(-1).float(), None, n, group, BF16)
    whole_weight = q.codes.long() * q.sub.long().repeat_interleave(group, 1)[:, :k]
    acc = x8.long() @ whole_weight.T
    assert torch.equal(y, (acc.float() * (q.scale.reshape(-1).float() * sx[:, None])).to(BF16))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_groups_against_float64(group, kind):
    m, n, k = SHAPE
    q = dense(f"int4:g{group}", n, k)
    bias = normal(n, seed=4, dtype=BF16)
    x = activations(m, k)
    if kind == "int8":
        x8, sx, _ = reference.quant_int8(x)
        packed = layout.pack(Packing("w4a8_group", group), unsigned(q.codes), q.scale)
        y = reference.w4a8_int8_group(x8, sx, packed, None, bias, n, group, BF16)
    else:
        x8, sx = reference.quant_fp8(x)
        packed = layout.pack(Packing("w4a8_fp8", group), unsigned(q.codes), q.scale)
        y = reference.w4a8_fp8(x8, sx, packed, bias, n, group, BF16)
    a, b = x8.double() * sx.double()[:, None], q.dequantize().double()
    close(y, a @ b.T + bias.double(), a.abs() @ b.abs().T)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("spec", ["int4:g32", "int4:g64", "int4:g128:asym", "int4:g32:asym", "int4:channel"])
def test_w4a16_is_the_dequantized_layer(spec, dtype):
    m, n, k = SHAPE
    q = dense(spec, n, k, dtype)
    x, bias = activations(m, k, dtype), normal(n, seed=4, dtype=dtype)
    group = q.spec.layout.size or 0
    packing = Packing("w4a16", group, not q.spec.symmetric, dtype == FP16)
    zero = None if q.zero is None else unsigned(q.zero)
    scale, ws = (q.scale, None) if group else (None, q.scale.reshape(-1).float())
    y = reference.w4a16(
        x, layout.pack(packing, unsigned(q.codes), scale, zero), ws, bias, n, group, zero is not None
    )
    b = q.dequantize(dtype if group else torch.float32).double()
    close(y, x.double() @ b.T + bias.double(), x.double().abs() @ b.abs().T)


def test_fp8_and_eight_bit_weights_against_float64():
    m, n, k = SHAPE
    x = activations(m, k)
    weight = normal(n, k, seed=5).to(FP8)
    ws = normal(n, seed=6).abs()
    xf, sf = reference.quant_fp8(x)
    a, b = xf.double() * sf.double()[:, None], weight.double() * ws.double()[:, None]
    packed = layout.pack(Packing("w8a8"), weight.view(torch.uint8))
    close(reference.w8a8_fp8(xf, sf, packed, ws, None, n, BF16), a @ b.T, a.abs() @ b.abs().T)
    xb, sb = reference.quant_fp8_block128(x)
    blocks = normal(1, 2, seed=7).abs()
    packed = layout.pack(Packing("fp8_block"), weight.view(torch.uint8), blocks)
    a = xb.double() * sb.double().repeat_interleave(128, 1)[:, :k]
    b = weight.double() * blocks.double().repeat_interleave(128, 1)[:, :k]
    close(reference.fp8_block128(xb, sb, packed, None, n, BF16), a @ b.T, a.abs() @ b.abs().T)
    codes = whole(0, 256, n, k)
    b = codes.view(torch.int8).double() * ws.double()[:, None]
    y = reference.w8a16(x, layout.pack(Packing("w8a16"), codes), ws, None, n)
    close(y, x.double() @ b.T, x.double().abs() @ b.abs().T)


def test_the_inputs_of_other_tests_are_finite():
    for name, args in gemm_calls(*SHAPE):
        y = getattr(reference, name)(*args)
        assert torch.isfinite(y).all(), name
        assert y.abs().max() > 0
