"""States are rounded as zq's numerics round, whatever the size of the parts; packed, filled, factored."""

from __future__ import annotations

import pytest
import torch

from zq.numerics.qtensor import quantize
from zq.optim import storage
from zq.optim.config import States
from zq.optim.storage import Factored, Full, Quantized, fill, new, parts
from zq.spec import TensorSpec

SPECS = ["dynamic8:b256", "udynamic8:b256", "dynamic4:b128", "ulinear4:b128", "udynamic4nz:b64", "int8:b2048"]
SPECS += [
    "dynamic4:tensor",
    "ulinear4:rank1",
    "udynamic8:rank1",
    "dynamic5:b32",
    "nf3:b64:s=bf16",
    "e4m3fn:b64",
]


def values(shape: tuple[int, ...], spec: str, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
    x[0] = 0
    return x if TensorSpec.parse(spec).info.signed else x.square()


def held(x: torch.Tensor, spec: str, how: States | None = None) -> Quantized:
    state = new(x, spec, how or States())
    assert isinstance(state, Quantized)
    fill(state, lambda start, stop: x.reshape(-1)[start:stop], x.numel())
    return state


def whole(state: storage.State, count: int) -> torch.Tensor:
    return torch.cat([state.read(*part) for part in parts(count, state)])


@pytest.mark.parametrize("part", [256, 1 << 20])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(96, 70), (33, 131), (2, 5000)])
def test_a_state_is_rounded_as_numerics_round(
    shape: tuple[int, int], spec: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART", part)
    x = values(shape, spec)
    state = held(x, spec)
    wanted = quantize(x, TensorSpec.parse(spec), "absmax", torch.float32)
    assert torch.equal(whole(state, x.numel()), wanted.dequantize().reshape(-1))
    bits = TensorSpec.parse(spec).bits
    assert state.codes.nbytes == -(-x.numel() * bits // 32) * 4
    assert torch.equal(torch.cat([s.float() for s in state.scale]), wanted.scale.float().reshape(-1))


@pytest.mark.parametrize("spec", ["dynamic8:b256", "dynamic4:tensor", "int4:b64"])
def test_a_scale_may_carry_the_sign(spec: str) -> None:
    x = values((40, 64), spec)
    got = whole(held(x, spec, States(scale="absmax-signed")), x.numel())
    wanted = quantize(x, TensorSpec.parse(spec), "absmax-signed", torch.float32).dequantize()
    assert torch.allclose(got, wanted.reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("spec", [*SPECS, "factored"])
def test_a_new_state_is_zero(spec: str) -> None:
    state = new(torch.zeros(70, 50), spec, States())
    assert float(whole(state, 3500).abs().max()) <= torch.finfo(torch.float32).tiny


def test_rank1_is_the_least_of_the_maxima_along_every_dimension() -> None:
    x = torch.rand(6, 7, 11, generator=torch.Generator().manual_seed(0)) + 0.1
    state = held(x, "udynamic8:rank1")
    assert [len(s) for s in state.scale] == [6, 7, 11]
    a, b, c = x.amax((1, 2)), x.amax((0, 2)), x.amax((0, 1))
    wanted = torch.minimum(torch.minimum(a[:, None, None], b[:, None]), c)
    assert torch.equal(state._steps(0, x.numel(), state.scale), wanted.reshape(-1))
    assert (whole(state, x.numel()) - x.reshape(-1)).abs().max() < 0.01
    assert held(x.reshape(-1), "udynamic8:rank1").spec == "udynamic8:b128"


def test_factored_means_are_adafactors() -> None:
    x = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0))
    state = Factored(x)
    state.absorb(x.sqrt(), 0.9)
    flat = 0.1 * x.reshape(5, 12)
    wanted = flat.mean(1, keepdim=True) * flat.mean(0) / flat.mean()
    assert torch.allclose(whole(state, 60), wanted.reshape(-1), rtol=1e-5)
    assert isinstance(new(torch.zeros(9), "factored", States()), Quantized)


def test_keeping_the_sign_leaves_no_negative_value_at_zero() -> None:
    x = torch.linspace(-1, 1, 256).pow(9).reshape(2, 128)
    plain = whole(held(x, "dynamic4:b256"), 256)
    kept = whole(held(x, "dynamic4:b256", States(keep_sign=True)), 256)
    x = x.reshape(-1)
    assert bool((plain[x < 0] == 0).any())
    assert bool((kept[x < 0] < 0).all())
    assert torch.equal(plain[plain != 0], kept[plain != 0])


def test_full_states_are_float32_copies() -> None:
    state = Full(torch.zeros(3, 4, dtype=torch.bfloat16))
    state.write(2, 6, torch.arange(4.0))
    assert state.read(0, 7).tolist() == [0, 0, 0, 1, 2, 3, 0]
