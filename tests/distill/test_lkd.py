"""LKD: it starts at what it was given, its gradients are the stated ones, and held-out data decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

import zq
from tests.tiny import save_tiny, token_ids
from zq.distill.losses import token_weights, weighted_mse
from zq.distill.rounding import LearnedRounding
from zq.errors import ZqError
from zq.numerics.qtensor import quantize
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.quantizers.method import Layer
from zq.recipe import Recipe
from zq.spec import Scheme

SPECS = ["int4:g16", "int3:channel", "int4:g16:asym", "int4:g16:two-level", "int4:g32:narrow", "int2:tensor"]


def _layer(text: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(seed)
    module = nn.Linear(40, 24, bias=False, dtype=dtype).requires_grad_(False)
    layer = Layer("probe", "mlp", module, False, Scheme.parse(text))
    layer.replace(quantize(layer.weight, layer.scheme.weights, "mse", torch.bfloat16))
    return layer


@pytest.mark.parametrize("text", SPECS)
def test_it_starts_at_the_given_quantization(text: str) -> None:
    layer = _layer(text)
    assert layer.quantized is not None
    state = LearnedRounding(layer)
    assert torch.equal(state.weight(), layer.quantized.dequantize())
    hard = state.harden()
    assert torch.equal(hard.codes, layer.quantized.codes)
    assert torch.equal(hard.scale, layer.quantized.scale)


@pytest.mark.parametrize("text", SPECS)
def test_gradients_are_those_of_straight_through_rounding(text: str) -> None:
    layer = _layer(text, 1)
    state = LearnedRounding(layer)
    with torch.no_grad():
        state.offset.uniform_(-0.4, 0.4)
        state.stretch.uniform_(-0.05, 0.05)
    target = torch.randn(24, 40)
    loss = (state.weight() * target).sum()
    found = torch.autograd.grad(loss, state.parameters)
    expected = torch.autograd.grad((_reference(state) * target).sum(), state.parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def _reference(state: LearnedRounding) -> torch.Tensor:
    """The same weight from elementary operations, rounding and clipping straight through inside the range."""
    from zq.numerics.groups import ungroup
    from zq.numerics.scales import int_range

    step = state.unit * (1 + state.stretch * (not state.spec.two_level))
    zero = 0 if state.zero is None else state.zero
    u = state.latent / step + state.offset + zero
    low, high = int_range(state.spec)
    q = u + (torch.round(u) - u).detach()
    inside = (u >= low - 0.5) & (u <= high + 0.5)
    q = torch.where(inside, q.clamp(low, high) + (q - q.clamp(low, high)) * 0, q.detach().clamp(low, high))
    q = torch.where(inside, q + (q.detach().clamp(low, high) - q.detach()), q)
    return ungroup((q - zero) * step, state.shape, state.spec)


def test_two_level_scales_stay_and_their_rounding_learns(tmp_path: Path) -> None:
    layer = _layer("int4:g16:two-level", 2)
    state = LearnedRounding(layer)
    offset, stretch = torch.autograd.grad((state.weight() * torch.randn(24, 40)).sum(), state.parameters)
    assert offset.any()
    assert not stretch.any()
    with torch.no_grad():
        state.offset.fill_(1.0)
        state.stretch.fill_(0.1)
    hard, given = state.harden(), layer.quantized
    assert given is not None
    assert hard.sub is not None
    assert given.sub is not None
    assert torch.equal(hard.scale, given.scale)
    assert torch.equal(hard.sub, given.sub)
    inside = (given.codes > -8) & (given.codes < 7)
    assert torch.equal(hard.codes[inside], given.codes[inside] + 1)
    save_tiny("llama", tmp_path / "model")
    two_level = "int3:g32:two-level"
    start = _run(tmp_path / "model", tmp_path / "gptq", "{gptq: {}}", two_level)
    end = _run(tmp_path / "model", tmp_path / "lkd", "{gptq: {}}, {lkd: {iterations: 40}}", two_level)
    assert end["format"] == "compressed-tensors"
    last = [list(report["output_error"].values())[-1] for report in (start, end)]
    assert last[1] < 0.9 * last[0]


def test_token_weights() -> None:
    targets = torch.ones(2, 8, 4)
    targets[0, 0] = 100.0
    targets[1, 7] = 1e-4
    weights = token_weights(targets, "normalised")
    assert weights[0, 0] < 0.01 * weights[0, 1]
    assert weights[1, 7] <= 3.01 * weights.median()
    assert bool((token_weights(targets, "mse") == 1).all())
    outputs = targets + 1
    assert weighted_mse(outputs, targets, torch.ones(2, 8)) == pytest.approx(1.0)


RECIPE = """
rules: [{match: '*', weights: 'WEIGHTS', activations: 'int8:token'}]
steps: [STEPS]
calibration: {source: random, samples: 96, length: 32}
"""


def _run(folder: Path, out: Path, steps: str, weights: str = "int3:g32") -> dict:
    text = RECIPE.replace("STEPS", steps).replace("WEIGHTS", weights)
    return run(make_plan(folder, Recipe.parse(text)), out).report


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "bert-model", "qwen2"])
def test_it_improves_on_its_start(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    start = _run(tmp_path / "model", tmp_path / "gptq", "{gptq: {}}")
    end = _run(tmp_path / "model", tmp_path / "lkd", "{gptq: {}}, {lkd: {iterations: 40}}")
    last = [list(report["output_error"].values())[-1] for report in (start, end)]
    assert last[1] < 0.9 * last[0]
    for loss in end["held_out_loss"].values():
        assert loss["end"] <= loss["start"]
    if family != "gpt2":
        theirs = AutoModel.from_pretrained(tmp_path / "lkd")
        ours = zq.load(str(tmp_path / "lkd"))
        if family != "opt":  # transformers' compressed-tensors takes one scale for OPT's 2-D inputs
            base = getattr(ours, ours.base_model_prefix, ours)
            with torch.no_grad():
                assert torch.equal(theirs(token_ids())[0], base(token_ids())[0])


def test_zero_learning_keeps_the_start(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    _run(tmp_path / "model", tmp_path / "a", "{gptq: {}}")
    steps = "{gptq: {}}, {lkd: {iterations: 4, rounding_rate: 0.0, scale_rate: 0.0}}"
    _run(tmp_path / "model", tmp_path / "b", steps)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    for name in "ab":
        _run(tmp_path / "model", tmp_path / name, "{rtn: {}}, {lkd: {iterations: 8}}", "int4:g32:two-level")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_it_needs_a_step_before_it(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(ZqError, match="put gptq or rtn before it"):
        _run(tmp_path / "model", tmp_path / "out", "{lkd: {}}")


def test_it_refuses_to_select_on_what_it_trained_on(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    text = RECIPE.replace("STEPS", "{rtn: {}}, {lkd: {iterations: 2}}").replace("WEIGHTS", "int4:g32")
    plan = make_plan(tmp_path / "model", Recipe.parse(text.replace("samples: 96", "samples: 4")))
    with pytest.raises(ZqError, match="holds windows out"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
