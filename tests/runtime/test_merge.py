"""Merging and reordering products change no bit of any output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.kernels.inputs import activations
from tests.runtime.quantized import force_kernels
from zq.numerics.qtensor import quantize
from zq.runtime.linear import QuantLinear
from zq.runtime.merge import mergeable, merged, reorderable, reordered
from zq.runtime.serving import ServedLinear, served
from zq.spec import Scheme

CPU = torch.device("cpu")
TEXTS = (
    *("int8:channel @ int8:token", "int4:g64 @ int8:token", "int4:g64:two-level @ int8:token"),
    *("int4:channel @ int8:token", "int4:g32 @ e4m3fn:token", "e4m3fn:channel @ e4m3fn:token"),
    *("int4:g64", "int4:g32:asym", "int4:channel", "int8:channel", "int3:g64:asym @ int8:token", "nf4:g32"),
)


def linear(text: str, n: int, bias: bool, seed: int, k: int = 256) -> ServedLinear:
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme.parse(text)
    made = QuantLinear(k, n, scheme, bias=bias, dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=generator).bfloat16()
    made.set_weight(quantize(weight, scheme.weights, "mse"))
    if made.bias is not None:
        made.bias.data = torch.randn(n, generator=generator).bfloat16()
    return served(made, torch.bfloat16, CPU)


@pytest.fixture(params=[True, False], ids=["operators", "cpu"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        force_kernels(monkeypatch)
    return request.param


@pytest.mark.parametrize("sizes", [(128, 256, 64), (48, 16, 16), (192, 128)])
@pytest.mark.parametrize("text", TEXTS)
def test_one_product(text: str, sizes: tuple[int, ...], kernels: bool) -> None:
    """Sizes that fill rows of 128 and sizes that do not; a bias here and there."""
    parts = [linear(text, n, i != 1, i) for i, n in enumerate(sizes)]
    x = activations(5, 256)
    wanted = torch.cat([part(x) for part in parts], -1)
    assert mergeable(parts)
    one = merged(parts)
    assert torch.equal(one(x), wanted)
    assert one.out_features == sum(sizes)


@pytest.mark.parametrize("text", TEXTS)
def test_another_order(text: str, kernels: bool) -> None:
    part, x = linear(text, 96, True, 3), activations(5, 256)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    wanted = part(x)[:, order]
    assert torch.equal(reordered(part, order)(x), wanted)
    assert torch.equal(part(x)[:, order], wanted), "the one before is as it was"


TILES = "e4m3fn:128x128 @ e4m3fn:g128"


@pytest.mark.parametrize(("sizes", "whole"), [((128, 256), True), ((128, 64), False), ((192, 128), False)])
def test_tiles_are_merged_where_none_would_cross(sizes: tuple[int, ...], whole: bool, kernels: bool) -> None:
    parts, x = [linear(TILES, n, True, i) for i, n in enumerate(sizes)], activations(5, 256)
    assert mergeable(parts) is (whole or not kernels)
    assert mergeable(parts[:1])
    assert reorderable(parts[0]) is not kernels
    if mergeable(parts):
        assert torch.equal(merged(parts)(x), torch.cat([part(x) for part in parts], -1))


@pytest.mark.parametrize("make", [nn.Linear, lambda k, n: Conv1D(n, k)])
def test_another_order_of_a_plain_linear(make: Any) -> None:
    part, x = make(256, 96), torch.randn(5, 256)
    nn.init.normal_(part.bias)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    found: Tensor = reordered(part, order)(x)
    torch.testing.assert_close(found, part(x)[:, order])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("int8:channel @ int8:token", "int4:g64 @ int8:token"),
        ("int4:g64 @ int8:token", "int4:g32 @ int8:token"),
        ("int4:g64 @ int8:token", "int4:g64"),
        ("int4:g32:asym", "int3:g32:asym"),
    ],
)
def test_what_is_not_merged(one: str, other: str, kernels: bool) -> None:
    parts = [linear(one, 128, False, 0), linear(other, 128, False, 1)]
    # Where both are dequantized to 16-bit weights anyway, they may be.
    assert mergeable(parts) is ("@" not in one and not kernels)
    assert not mergeable([parts[0], nn.Linear(256, 128)])
