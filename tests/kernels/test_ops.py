"""Operators: registered properly, checked strictly, and the same as what zq's figures are measured with."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.inputs import BF16, FP8, FP16, activations, gemm_calls, normal, quant_calls
from zq.errors import ZqError
from zq.kernels import ops, reference
from zq.numerics.qtensor import fake_quantize_tokens
from zq.spec import TensorSpec

Z = torch.ops.zq
CALLS = [*quant_calls(3, 64), *gemm_calls(3, 40, 160)]


def call(name, args):
    return getattr(Z, name)(*args)


def flat(made):
    """Outputs as tensors that torch.equal takes."""
    made = made if isinstance(made, tuple) else (made,)
    return [each.view(torch.uint8) if each.dtype == FP8 else each for each in made]


@pytest.mark.parametrize(("name", "args"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name, args):
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if args[0].dtype == FP8:  # that test multiplies every input, which torch cannot do with FP8
        utilities.remove("test_schema")
    torch.library.opcheck(getattr(Z, name).default, args, test_utils=utilities)


def test_every_operator_is_called_here():
    """Those of the cache: test_ops_kv.py."""
    assert {name for name, _ in CALLS} == set(ops.QUANT_OPS) | set(ops.GEMM_OPS)
    assert set(ops.QUANT_OPS) | set(ops.GEMM_OPS) | set(ops.KV_OPS) == set(ops.SCHEMAS)


@pytest.mark.parametrize(
    ("name", "args"), CALLS[::5], ids=lambda value: value if isinstance(value, str) else ""
)
def test_compiles_into_one_graph(name, args):
    """With M unknown; a tensor's shape must not be asked for anything that the graph cannot say."""
    torch._dynamo.reset()  # it counts compilations of one line
    compiled = torch.compile(lambda *a: call(name, a), fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(flat(compiled(*args)), flat(call(name, args)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("k", [16, 208])
def test_quantized_activations_are_those_of_the_runtime(dtype, k):
    x = activations(40, k, dtype)
    q, scale, rowsum = Z.quant_int8(x)
    fake = fake_quantize_tokens(x, TensorSpec.parse("int8:token"))
    assert torch.equal((q.float() * scale[:, None]).to(dtype), fake)
    assert rowsum.tolist() == [sum(row) for row in q.tolist()]
    q, scale = Z.quant_fp8(x)
    fake = fake_quantize_tokens(x, TensorSpec.parse("e4m3fn:token"))
    assert torch.equal((q.float() * scale[:, None]).to(dtype), fake)


def test_extreme_rows():
    rows = [
        [0.0] * 16,
        [-0.0] * 16,
        [5.0] * 16,
        [1e-45] * 16,
        [3e38, 1e-3] * 8,
        [torch.inf, 1.0] * 8,
        [-torch.inf] * 16,
    ]
    q, scale, rowsum = Z.quant_int8(torch.tensor(rows))
    assert scale[:2].tolist() == [1.0, 1.0]
    assert (q[:2] == 0).all()
    assert (q[2] == 127).all()
    assert torch.isfinite(scale).all()
    assert scale.min() >= torch.finfo(torch.float32).tiny
    assert q[5].tolist() == [127, 0] * 8
    assert (q[6] == -128).all()
    assert torch.equal(rowsum, q.sum(1, dtype=torch.int32))
    poisoned = torch.ones(2, 16)
    poisoned[1, 3] = torch.nan
    assert torch.isnan(Z.quant_int8(poisoned)[1]).tolist() == [False, True]
    assert torch.isnan(Z.quant_fp8(poisoned)[1]).tolist() == [False, True]


def test_blocks_of_128_are_rows_of_their_own():
    x = activations(5, 272)
    q, scale = Z.quant_fp8_block128(x)
    assert scale.shape == (5, 3)
    for block in range(3):
        part = x[:, 128 * block : 128 * block + 128].contiguous()
        alone, alone_scale = Z.quant_fp8(part)
        assert torch.equal(q[:, 128 * block : 128 * block + 128].float(), alone.float())
        assert torch.equal(scale[:, block], alone_scale)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_fused_operators_are_the_unfused_ones(dtype):
    """transformers' RMSNorm, torch's layer_norm, SiLU and GELU in that dtype, then quantized: norms of the
    runtime differ by their order of summation, which moves a code only where it crosses a boundary."""
    x, residual = activations(64, 256, dtype), normal(64, 256, seed=1, dtype=dtype)
    weight, bias = normal(256, seed=2, dtype=dtype), normal(256, seed=3, dtype=dtype)
    wide = x.float()
    rms = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    total = x + residual
    layer = torch.nn.functional.layer_norm(total, (256,), weight, bias, 1e-5)
    silu = torch.nn.functional.silu(x) * residual
    gelu = torch.nn.functional.gelu(x, approximate="tanh")
    int8 = torch.int8
    for unfused, (q, scale, rowsum, *more) in (
        (rms, Z.rms_norm_quant(x, weight, 1e-5, int8)),
        (layer, Z.add_layer_norm_quant(x, residual, weight, bias, 1e-5, int8)),
        (silu, Z.silu_mul_quant(torch.cat((x, residual), 1), int8)),
        (gelu, Z.gelu_quant(x, "tanh", int8)),
    ):
        wanted, wanted_scale, _ = Z.quant_int8(unfused)
        assert (q.int() - wanted.int()).abs().max() <= 1
        assert (q != wanted).float().mean() < 0.01
        assert torch.allclose(scale, wanted_scale, rtol=2**-7)
        assert torch.equal(rowsum, q.sum(1, dtype=torch.int32))
        assert all(torch.equal(each, total) for each in more)


@pytest.mark.parametrize("out", [torch.int8, FP8])
def test_a_norm_that_is_kept_is_what_was_quantized(out):
    x, residual = activations(64, 256), normal(64, 256, seed=1, dtype=BF16)
    weight, bias = normal(256, seed=2, dtype=BF16), normal(256, seed=3, dtype=BF16)
    *wanted, total = Z.add_layer_norm_quant(x, residual, weight, bias, 1e-5, out)
    *found, normed = Z.post_layer_norm_quant(x, residual, weight, bias, 1e-5, out)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(normed, reference.layer_norm(total, weight, bias, 1e-5))


def test_norms_against_float64():
    x = activations(64, 256, torch.float32)
    weight, bias = normal(256, seed=2), normal(256, seed=3)
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    centred = wide - wide.mean(-1, keepdim=True)
    layer = (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    )
    assert torch.allclose(reference.rms_norm(x, weight, 1e-5).double(), rms, rtol=1e-5, atol=1e-6)
    assert torch.allclose(reference.layer_norm(x, weight, bias, 1e-5).double(), layer, rtol=1e-4, atol=1e-4)


X, W = torch.zeros(2, 32, dtype=BF16), torch.zeros(32, dtype=BF16)
X8, SX, WS = torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), torch.ones(8)
PACKED = torch.zeros(128 * 128, dtype=torch.uint8)
MISUSES = [
    ("quant_int8", (X[0],), r"x has shape \[32\], expected \[M, K\] with K a multiple of 16"),
    ("quant_int8", (X[:, :20],), r"with K a multiple of 16"),
    ("quant_int8", (X.T.contiguous().T,), "x is not contiguous"),
    ("quant_int8", (X.double(),), "x is float64; allowed: bfloat16, float16, float32"),
    ("rms_norm_quant", (X, W[:16], 1e-5, torch.int8), r"weight has shape \[16\], expected \[32\]"),
    ("rms_norm_quant", (X, W.float(), 1e-5, torch.int8), "weight is float32; allowed: bfloat16"),
    ("rms_norm_quant", (X, W, 1e-5, BF16), "dtype is bfloat16; allowed: int8, float8_e4m3fn"),
    (
        "add_rms_norm_quant",
        (X, X[:1], W, 1e-5, torch.int8),
        r"residual has shape \[1, 32\], expected \[2, 32\]",
    ),
    ("silu_mul_quant", (torch.zeros(2, 48, dtype=BF16), torch.int8), "twice a multiple of 16"),
    ("gelu_quant", (X, "erf", torch.int8), "approximate is erf; allowed: none, tanh"),
    ("gelu_quant", (X.float(), "none", torch.int8), "x is float32; allowed: bfloat16, float16"),
    ("w8a8_int8", (X, SX, PACKED, WS, None, 8, BF16), "x is bfloat16; allowed: int8"),
    ("w8a8_int8", (X8, SX, PACKED[1:], WS, None, 8, BF16), r"w has shape \[16383\], expected \[16384\]"),
    ("w8a8_int8", (X8, SX, PACKED, WS, None, 8, torch.float32), "out is float32; allowed: bfloat16, float16"),
    ("w8a8_int8", (X8, SX[:1], PACKED, WS, None, 8, BF16), r"sx has shape \[1\], expected \[2\]"),
    ("w8a8_int8", (X8, SX, PACKED, WS.half(), None, 8, BF16), "ws is float16; allowed: float32"),
    ("w8a8_int8", (X8, SX, PACKED, WS, WS, 8, BF16), "bias is float32; allowed: bfloat16"),
    ("w8a8_int8", (X8, SX, PACKED, WS.to("meta"), None, 8, BF16), "ws is on meta, the input on cpu"),
    (
        "w4a16",
        (X, PACKED[:8192], None, None, 8, 0, False),
        r"ws is missing; give a float32 tensor of shape \[8\]",
    ),
    ("w4a16", (X, PACKED, WS, None, 8, 64, False), "ws is given and group is 64"),
    ("w4a16", (X, PACKED, None, None, 8, 48, False), "no kernel computes packing 'w4a16' with group 48"),
]


@pytest.mark.parametrize(
    ("name", "args", "message"), MISUSES, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(MISUSES)]
)
def test_misuse(name, args, message):
    with pytest.raises(ZqError, match=message) as raised:
        call(name, args)
    assert str(raised.value).count("\n") == 0


def test_sums_that_may_not_fit_are_refused():
    x = torch.zeros(1, 65552, dtype=torch.int8, device="meta")
    with pytest.raises(ZqError, match="K = 65552 is more than 65536"):
        Z.w8a8_int8(x, x, x, x, None, 8, BF16)
    assert 255 * 128 * 65536 < 2**31


def test_no_rows():
    q, scale, rowsum = Z.quant_int8(X[:0])
    assert (q.shape, scale.shape, rowsum.shape) == ((0, 32), (0,), (0,))
    assert Z.w8a8_int8(q, scale, PACKED, WS, None, 8, BF16).shape == (0, 8)
