"""Integer products: exact, unbiased, never clipped; gradients near the float ones; layers that train."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.tiny import save_tiny
from zq.distill import lkd
from zq.distill.integer import (
    BITS,
    IntegerLinear,
    Precision,
    encode,
    integer_gradients,
    integer_layers,
    linear,
    product,
)
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.quantizers.method import Layer
from zq.recipe import Recipe
from zq.spec import Scheme

PRECISIONS = [Precision(bits, groups) for bits in BITS for groups in range(1, Precision(bits).most + 1)]


def uneven(m: int, k: int, seed: int = 0) -> torch.Tensor:
    """[m, k] whose columns differ in size by factors of thousands, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(1.5 * torch.randn(k, generator=generator))
    return torch.randn(m, k, generator=generator) * spread


def test_how_many_groups_fit_a_byte() -> None:
    assert {bits: Precision(bits).most for bits in BITS} == {4: 5, 5: 4, 6: 3, 7: 2, 8: 1}


@pytest.mark.parametrize(("bits", "groups"), [(3, 0), (9, 0), (8, 2), (4, 6), (6, -1)])
def test_what_does_not_fit_is_refused(bits: int, groups: int) -> None:
    with pytest.raises(ZqError, match="allowed"):
        Precision(bits, groups)


@given(
    st.sampled_from(PRECISIONS),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1e-30, 1.0, 3e37]),
)
def test_codes_are_never_clipped_and_off_by_less_than_a_step(
    p: Precision, seed: int, stochastic: bool, shared: bool, size: float
) -> None:
    x = uneven(5, 17, seed)
    x[:, 3] = 0
    x = x / x.abs().max() * size
    q = encode(x, p, stochastic, shared)
    groups = p.groups or p.most
    error = (q.codes.double() * q.scale.double() - x.double()).abs()
    row = (x.abs().amax() if shared else x.abs().amax(1, keepdim=True)).double()
    reach = (x.double() / row.clamp_min(1e-37)).abs().amax(0)
    place = torch.floor(-torch.log2(reach.clamp_min(1e-37)) + 1e-6).clamp(0, groups - 1)
    step = row / p.top * 2.0**-place
    assert bool((error <= step * (1 if stochastic else 0.5) * 1.01 + 1e-36).all())


@pytest.mark.parametrize("p", PRECISIONS, ids=str)
def test_a_product_is_that_of_the_dense_operands(p: Precision) -> None:
    a, b = encode(uneven(9, 33), p, stochastic=True), encode(uneven(7, 33, 1), p)
    exact = (a.codes.double() @ b.codes.double().T) * a.scale.double() * b.scale.double().T
    assert torch.allclose(product(a, b).double(), exact, rtol=1e-6, atol=0)


def test_sums_that_could_overflow_are_refused() -> None:
    x = encode(torch.ones(1, 134000), Precision())
    with pytest.raises(ZqError, match="INT32"):
        product(x, x)
    most = encode(torch.ones(1, 133000), Precision())
    assert float(product(most, most)) == pytest.approx(133000, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    torch.manual_seed(0)
    x, p, draws = uneven(3, 5), Precision(bits), 4000
    found = torch.stack([encode(x, p, stochastic=True).dense() for _ in range(draws)]).double()
    spread = found.std(0) / math.sqrt(draws)
    assert bool(((found.mean(0) - x).abs() <= 4.5 * spread + 1e-6).all())
    assert float((encode(x, p).dense() - x).abs().max()) > 0


def test_shifts_bring_the_variance_near_that_of_a_scale_for_every_index() -> None:
    x, p = uneven(64, 1024), Precision(4)
    own = (x.abs().amax(0) / p.top).square().mean()

    def variance(groups: int) -> float:
        places = torch.floor(-torch.log2(x.abs().amax(0) / x.abs().max())).clamp(0, groups - 1)
        return float((x.abs().max() / p.top * 2.0**-places).square().mean() / own)

    torch.manual_seed(0)

    def measured(groups: int) -> float:
        errors = encode(x, Precision(4, groups), stochastic=True, shared=True).dense() - x
        return float(errors.square().mean())

    assert variance(1) > 20
    assert variance(5) < 4
    assert measured(5) < measured(2) / 4 < measured(1) / 8


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (6, 0.08), (4, 0.35)])
def test_gradients_are_near_the_float_ones(bits: int, most: float) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 24, 48), torch.randn(32, 48) / 7, torch.randn(32)
    grad = uneven(96, 32).view(4, 24, 32)
    pairs = []
    for p in (None, Precision(bits)):
        parts = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = nn.functional.linear(*parts) if p is None else linear(*parts, precision=p)
        pairs.append([y.detach(), *torch.autograd.grad(y, parts, grad)])
    for ours, theirs in zip(*pairs, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < most
    assert torch.allclose(pairs[0][3], pairs[1][3])


def test_layers_are_replaced_in_place_and_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 1))
    weights = [p.data_ptr() for p in model.parameters()]
    assert integer_layers(model, Precision(6), skip=("3",)) == ["0", "2"]
    assert [type(m) for m in model] == [IntegerLinear, nn.GELU, IntegerLinear, nn.Linear]
    assert "bits=6" in repr(model)
    assert [p.data_ptr() for p in model.parameters()] == weights
    x = torch.randn(256, 16)
    y = x[:, :4].sum(1, keepdim=True).sin()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_inside_and_nothing_afterwards(transposed: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 6)
    if transposed:  # GPT-2 keeps [K, N]
        from transformers.pytorch_utils import Conv1D

        module = Conv1D(6, 8)
    layer = Layer("probe", "mlp", module, transposed, Scheme.parse("int4:channel"))
    x = torch.randn(5, 8, requires_grad=True)
    plain = module(x)
    with integer_gradients([layer], Precision(4)):
        inside = module(x)
        (found,) = torch.autograd.grad(inside.sum(), x)
    assert torch.allclose(inside, plain)  # the forward product is the module's own
    (exact,) = torch.autograd.grad(plain.sum(), x)
    assert 0 < float((found - exact).norm()) < 0.5 * float(exact.norm())
    assert "forward" not in vars(module)


def held_out_losses(model: Path, gradients: str, seed: int, out: Path) -> list[dict[str, float]]:
    """Of every block, each from the float model's inputs."""
    recipe = Recipe.parse(
        f"seed: {seed}\nrules: [{{match: '*', weights: 'int3:g32'}}]\nsteps:\n- rtn: {{}}\n"
        f"- lkd: {{iterations: 40, gradients: {gradients}, lookahead: 0, inputs: float}}\n"
        "calibration: {source: random, samples: 64, length: 16}\n"
    )
    return list(quantize(make_plan(model, recipe), out).report["held_out_loss"].values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_distillation_with_integer_gradients_improves(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    for gradients in ("int8", "int6", "int4"):
        found = held_out_losses(tmp_path / "model", gradients, 0, tmp_path / gradients)
        assert all(loss["end"] < 0.95 * loss["start"] for loss in found)


def test_distillation_with_int8_ends_within_2_percent_of_float(tmp_path: Path) -> None:
    """In the mean over blocks and seeds: single ones differ by 6 % either way, and more seeds give 1.00."""
    save_tiny("llama", tmp_path / "model")
    ratios = []
    for seed in range(6):
        theirs, ours = (
            held_out_losses(tmp_path / "model", gradients, seed, tmp_path / f"{gradients}{seed}")
            for gradients in ("float", "int8")
        )
        ratios += [math.log(b["end"] / a["end"]) for a, b in zip(theirs, ours, strict=True)]
    assert len(set(ratios)) == 12
    assert abs(sum(ratios) / 12) < 0.02


def test_the_rounding_of_gradients_follows_the_seed(tmp_path, monkeypatch) -> None:
    """And not what was drawn before; windows and their order are the same for all seeds."""
    save_tiny("llama", tmp_path / "model")
    in_order = lambda windows, size, count, seed: torch.arange(count * size).view(count, size) % windows  # noqa: E731
    monkeypatch.setattr(lkd, "shuffled", in_order)

    def written(name: str, seed: int, global_seed: int) -> bytes:
        torch.manual_seed(global_seed)
        recipe = Recipe.parse(
            f"seed: {seed}\nrules: [{{match: '*', weights: 'int3:g32'}}]\n"
            "steps: [{rtn: {}}, {lkd: {iterations: 30, gradients: int8, lookahead: 0}}]\n"
            "calibration: {source: random, samples: 64, length: 16}\n"
        )
        windows = torch.randint(100, (64, 16), generator=torch.Generator().manual_seed(7))
        quantize(replace(make_plan(tmp_path / "model", recipe), windows=windows), tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = written("a", seed=0, global_seed=0)
    assert first == written("b", seed=0, global_seed=1)
    assert first != written("c", seed=1, global_seed=0)


def test_no_rows() -> None:
    layer = IntegerLinear(6, 4)
    assert layer(torch.zeros(0, 6)).shape == (0, 4)
    assert layer(torch.zeros(2, 0, 6)).shape == (2, 0, 4)
