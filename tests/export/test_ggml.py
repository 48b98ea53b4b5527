"""Every block decodes, by the reference decoder of the gguf package, to zq's own values to the bit."""

from __future__ import annotations

import pytest
import torch

gguf = pytest.importorskip("gguf")
from gguf.quants import dequantize  # noqa: E402

from zq.errors import ZqError  # noqa: E402
from zq.export import ggml  # noqa: E402
from zq.numerics.qtensor import QTensor, quantize  # noqa: E402
from zq.spec import Scheme  # noqa: E402

CASES = [
    ("int4:g32", "Q4_0"),
    ("int4:g64", "Q4_0"),
    ("int4:channel", "Q4_0"),
    ("int4:tensor", "Q4_0"),
    ("int8:g32", "Q8_0"),
    ("int8:channel", "Q8_0"),
    ("int4:g32:two-level", "Q4_K"),
    ("int4:g128:two-level", "Q4_K"),
    ("int6:channel", "Q6_K"),
    ("int6:g16:two-level", "Q6_K"),
    ("int6:g64:two-level", "Q6_K"),
]


def quantized(text: str, k: int = 512) -> QTensor:
    weight = torch.randn(24, k) * 0.02 * torch.rand(24, 1).add(0.1)
    scheme = ggml.adapt(Scheme.parse(text))
    assert ggml.refuse(scheme, (24, k)) is None
    return quantize(weight, scheme.weights, "mse")


def decoded(kind: str, blocks: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize(("text", "kind"), CASES)
def test_blocks_decode_to_the_same_values(text: str, kind: str) -> None:
    q = quantized(text)
    found, blocks = ggml.encode(q)
    assert found == kind
    assert torch.equal(decoded(kind, blocks), q.dequantize())


def test_a_row_that_no_super_block_divides_takes_smaller_ones() -> None:
    q = quantized("int4:g32:two-level", 288)
    kind, blocks = ggml.encode(q)
    assert kind == "Q4_0"
    assert torch.equal(decoded(kind, blocks), q.dequantize())


def test_negative_scales() -> None:
    weight = torch.randn(8, 512)
    for text, kind in (("int4:g32:s=fp16", "Q4_0"), ("int4:g32:two-level:s=fp16", "Q4_0")):
        q = quantize(weight, Scheme.parse(text).weights, "mse-signed")
        assert bool(((q.scale if q.sub is None else q.sub) < 0).any())
        found, blocks = ggml.encode(q)
        assert found == kind
        assert torch.equal(decoded(kind, blocks), q.dequantize())


def test_minimums_that_fp16_does_not_hold_are_refused_and_others_kept() -> None:
    spec = Scheme.parse("int4:g32:asym:s=fp16").weights
    q = quantize(torch.randn(8, 64), spec)
    with pytest.raises(ZqError, match="zero points times its scales are not in fp16"):
        ggml.encode(q)
    short = QTensor(q.codes, (q.scale.float() * 0 + 0.375).half(), q.zero, None, spec)
    kind, blocks = ggml.encode(short)
    assert kind == "Q4_1"
    assert torch.equal(decoded(kind, blocks), short.dequantize())


@pytest.mark.parametrize("layout", ["g32", "g64", "channel", "tensor"])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_scales_of_seven_digits_have_minimums_in_fp16(layout: str, scale: str) -> None:
    """From the least numbers of fp16 to ones near its largest."""
    spec = ggml.adapt(Scheme.parse(f"int4:{layout}:asym")).weights
    assert str(spec).endswith(":s=short")
    sizes = torch.logspace(-8, 4.7, 64)[:, None]
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) + 0.7) * sizes
    q = quantize(weight, spec, scale)
    kind, blocks = ggml.encode(q)
    assert kind == "Q4_1"
    assert torch.equal(decoded(kind, blocks), q.dequantize())
    exact = quantize(weight, Scheme.parse(f"int4:{layout}:asym:s=fp32").weights, scale)
    normal = (sizes[:, 0] > 1e-3) & (sizes[:, 0] < 1e3)
    assert bool(q.dequantize().isfinite().all())
    error, least = ((x.dequantize() - weight)[normal].square().sum(1) for x in (q, exact))
    assert bool((error < 1.1 * least + 1e-30).all())


def test_scales_that_fp16_does_not_hold_are_refused() -> None:
    q = quantize(torch.randn(8, 64), Scheme.parse("int8:g32:s=fp32").weights)
    with pytest.raises(ZqError, match="its scales are not in fp16"):
        ggml.encode(q)


@pytest.mark.parametrize(
    ("text", "k", "words"),
    [
        ("int4:g32 @ int8:token", 64, "activations"),
        ("int3:g32", 64, "no int3 blocks"),
        ("e4m3fn:channel", 64, "no e4m3fn blocks"),
        ("int8:g32:asym", 64, "symmetric"),
        ("int4:b64", 64, "along the inputs"),
        ("int4:32x64", 64, "along the inputs"),
        ("int4:g16", 64, "no multiple of the 32"),
        ("int8:g32:two-level", 64, "no two-level int8"),
        ("int4:channel", 48, "K=48 is no multiple of 32"),
        ("int6:channel", 64, "K=64 is no multiple of 256"),
        ("int6:g64", 256, "one free scale in 256"),
    ],
)
def test_what_no_block_holds(text: str, k: int, words: str) -> None:
    assert words in str(ggml.refuse(Scheme.parse(text), (8, k)))
