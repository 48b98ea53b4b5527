"""QuantLinear, against an nn.Linear with the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.simulate import int8_tokens
from zq.models.layout import is_linear, linear_shape, linear_shapes
from zq.numerics.qtensor import quantize
from zq.runtime.linear import QuantLinear, replace_linear
from zq.spec import Scheme

SCHEMES = ["int4:g32", "int4:g32:asym @ int8:token", "int3:g48:two-level", "e2m1fn:b64:s=fp32", "int8:tensor"]


def layer(text: str, bias: bool, dtype: torch.dtype) -> tuple[QuantLinear, nn.Linear]:
    """A QuantLinear [48, 160] and the plain layer that it must equal."""
    scheme = Scheme.parse(text)
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize(weight, scheme.weights)
    made = QuantLinear(160, 48, scheme, bias=bias, dtype=dtype)
    made.set_weight(q)
    plain = nn.Linear(160, 48, bias=bias, dtype=dtype)
    plain.weight.data = q.dequantize(dtype)
    if made.bias is not None:
        made.bias.data = plain.bias.detach()
    return made, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("text", SCHEMES)
@torch.no_grad()
def test_forward(text: str, bias: bool, dtype: torch.dtype) -> None:
    made, plain = layer(text, bias, dtype)
    x = torch.randn(2, 5, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = int8_tokens(x) if "@" in text else x
    assert torch.equal(made(x), plain(given))
    assert made(x).dtype == dtype
    assert text in repr(made)


def test_the_state_survives_saving_copying_and_casting() -> None:
    made, _ = layer("int4:g32:asym", True, torch.float32)
    fresh = QuantLinear(160, 48, made.scheme, bias=True, dtype=torch.float32)
    assert set(made.state_dict()) == {"weight_packed", "weight_scale", "weight_zero", "bias"}
    fresh.load_state_dict(made.state_dict())
    x = torch.randn(3, 160)
    assert torch.equal(fresh(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    half = copy.deepcopy(made).bfloat16()
    assert half.weight_packed.dtype == torch.int32, "codes are never cast"
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert "_dense" not in made.state_dict()


def test_a_new_weight_replaces_the_cached_one() -> None:
    made, _ = layer("int4:g32", False, torch.float32)
    x = torch.randn(3, 160)
    before = made(x)
    made.set_weight(quantize(torch.ones(48, 160), made.scheme.weights))
    assert not torch.equal(made(x), before)


def test_replacing_keeps_the_bias_and_the_place() -> None:
    model = nn.Sequential(nn.Linear(160, 48), nn.Sequential(Conv1D(48, 160)))
    assert [is_linear(m) for m in model.modules()] == [False, True, False, True]
    assert linear_shape(model[0]) == linear_shape(model[1][0]) == (48, 160)
    assert linear_shapes(model) == {"0": (48, 160), "1.0": (48, 160)}
    for name in ("0", "1.0"):
        bias = model.get_submodule(name).bias.detach().clone()
        new = replace_linear(model, name, Scheme.parse("int8:channel"), torch.float32)
        assert model.get_submodule(name) is new
        assert new.bias is not None
        assert torch.equal(new.bias, bias)
        assert (new.in_features, new.out_features) == (160, 48)
