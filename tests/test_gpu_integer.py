"""On a CUDA device integer products are those of the CPU, and layers of 8, 6 and 4 bits train there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distill.test_integer import PRECISIONS, uneven
from zq.distill import integer
from zq.distill.integer import IntegerLinear, Precision, encode, integer_layers, linear, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# CUDA's integer product wants more than 16 rows and multiples of 8: below, beside and above that.
SHAPES = [(1, 1, 1), (1, 8, 16), (16, 7, 33), (17, 9, 64), (24, 64, 40), (100, 130, 259), (33, 576, 1536)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_codes_are_those_of_the_cpu(precision: Precision) -> None:
    x = uneven(37, 129)
    here, there = encode(x, precision), encode(x.cuda(), precision)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scale, there.scale.cpu())


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_are_those_of_the_cpu_to_the_bit(m: int, n: int, k: int, bits: int) -> None:
    a, b = encode(uneven(m, k), Precision(bits)), encode(uneven(n, k, 1), Precision(bits))
    moved = [integer.Operand(each.codes.cuda(), each.scale.cuda()) for each in (a, b)]
    assert torch.equal(product(*moved).cpu(), product(a, b))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    torch.manual_seed(0)
    x, draws = uneven(3, 5).cuda(), 4000
    found = torch.stack([encode(x, Precision(bits), stochastic=True).dense() for _ in range(draws)]).double()
    assert bool(((found.mean(0) - x).abs() <= 4.5 * found.std(0) / draws**0.5 + 1e-6).all())


def passed(precision: Precision | None, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of a layer, on the CPU in float32; None: of a float layer."""
    torch.manual_seed(0)
    parts = [torch.randn(4, 24, 48), torch.randn(36, 48) / 7, torch.randn(36)]
    moved = [t.to(device, dtype).requires_grad_() for t in parts]
    y = nn.functional.linear(*moved) if precision is None else linear(*moved, precision=precision)
    grad = uneven(96, 36).view(4, 24, 36).to(device, dtype)
    return [t.detach().float().cpu() for t in (y, *torch.autograd.grad(y, moved, grad))]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_layer_is_that_of_the_cpu(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients rounded to nearest, since the devices draw other random numbers."""
    monkeypatch.setattr(integer, "encode", lambda x, p, stochastic=False: encode(x, p))
    here, there = (passed(Precision(bits), device, torch.float32) for device in ("cpu", "cuda"))
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (6, 0.08), (4, 0.35)])
def test_gradients_are_near_the_float_ones(bits: int, most: float, dtype: torch.dtype) -> None:
    for ours, exact in zip(passed(Precision(bits), "cuda", dtype), passed(None, "cuda", dtype), strict=True):
        assert float((ours - exact).norm() / exact.norm()) < most


def test_no_rows_and_one_row() -> None:
    layer = IntegerLinear(6, 4).cuda()
    assert layer(torch.zeros(0, 6, device="cuda")).shape == (0, 4)
    assert layer(torch.ones(6, device="cuda")).shape == (4,)


@pytest.mark.parametrize("bits", [6, 4])
def test_layers_train_as_on_the_cpu(bits: int) -> None:
    def trained(device: str) -> float:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 1))
        x = torch.randn(256, 16)
        y = x[:, :4].sum(1, keepdim=True).sin().to(device)
        x, model = x.to(device), model.to(device)
        integer_layers(model, Precision(bits), skip=("3",))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    here, there = trained("cpu"), trained("cuda")
    assert max(here, there) < 0.1
    assert 0.4 < there / here < 2.5
