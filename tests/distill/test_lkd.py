"""LKD: it starts at what it was given, its gradients are the stated ones, and held-out data decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

import zq
from tests.tiny import save_tiny, token_ids
from zq.checkpoint.index import read_index
from zq.checkpoint.reader import reader
from zq.distill import lkd, rounding
from zq.distill.losses import divergence, token_weights, weighted_mse
from zq.distill.rounding import LearnedRounding
from zq.models.capture import capture_inputs, has_head, head, run_block
from zq.numerics.groups import ungroup
from zq.numerics.qtensor import quantize
from zq.numerics.scales import int_range
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


@pytest.mark.parametrize("cached", [1 << 16, 100])
@pytest.mark.parametrize("text", SPECS)
def test_an_update_goes_against_the_straight_through_gradient(text: str, cached: int, monkeypatch) -> None:
    monkeypatch.setattr(rounding, "CACHED", cached)
    layer = _layer(text, 1)
    state = LearnedRounding(layer)
    state.offset.uniform_(-0.4, 0.4)
    if not state.spec.two_level:
        state.stretch.uniform_(-0.05, 0.05)
    gradient = torch.randn(24, 40)
    before = [part.clone().requires_grad_() for part in (state.offset, state.stretch)]
    loss = (_reference(state, *before) * gradient).sum()
    slopes = torch.autograd.grad(loss, before)
    state.update(gradient, 0.01, 0.002)
    after = (state.offset, state.stretch)
    for was, now, slope, step in zip(before, after, slopes, (0.01, 0.002), strict=True):
        if now is state.stretch and state.spec.two_level:  # these scales stay
            assert torch.equal(now, was)
            continue
        clear = slope.abs() > 1e-4
        assert float(clear.float().mean()) > 0.5
        assert torch.allclose(now[clear], (was - step * slope.sign())[clear], atol=1e-6)
        assert torch.equal(now[slope == 0], was[slope == 0])
    assert torch.allclose(layer.weight, _reference(state, *after), atol=1e-6)
    assert torch.equal(layer.weight, state.weight())


def _reference(state: LearnedRounding, offset: torch.Tensor, stretch: torch.Tensor) -> torch.Tensor:
    """The weight from elementary operations, rounding and clipping straight through inside the range."""
    step = state.unit * (1 + stretch)
    zero = 0 if state.zero is None else state.zero
    u = state.latent / step + offset + zero
    low, high = int_range(state.spec)
    hard = torch.round(u).clamp(low, high).detach()
    inside = (u >= low - 0.5) & (u <= high + 0.5)
    q = torch.where(inside, u + (hard - u).detach(), hard)
    return ungroup((q - zero) * step, state.shape, state.spec)


def test_two_level_scales_stay_and_their_rounding_learns(tmp_path: Path) -> None:
    layer = _layer("int4:g16:two-level", 2)
    state = LearnedRounding(layer)
    state.update(torch.randn(24, 40), 0.1, 0.1)
    assert state.offset.any()
    assert not state.stretch.any()
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
    end = _run(tmp_path / "model", tmp_path / "lkd", "{gptq: {}}, {lkd: {iterations: 40, lookahead: 0}}")
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


@pytest.mark.parametrize(("iterations", "checks", "times"), [(10, 4, 4), (400, 4, 4), (3, 4, 3), (7, 1, 1)])
def test_the_state_is_checked_so_many_times(
    iterations: int, checks: int, times: int, tmp_path: Path, monkeypatch
) -> None:
    """Beside the start; the last time at the end."""
    save_tiny("llama", tmp_path / "model")
    measured: list[int] = []
    monkeypatch.setattr(lkd.Course, "loss", lambda self, batches: measured.append(done[-1]) or 1.0)
    done = [0]

    def descend(*args) -> Iterator[int]:
        for i in range(iterations):
            done.append(i + 1)
            yield i + 1

    monkeypatch.setattr(lkd, "_descend", descend)
    _run(tmp_path / "model", tmp_path / "a", f"rtn, {{lkd: {{iterations: {iterations}, checks: {checks}}}}}")
    first = measured[: len(measured) // 2]  # of two blocks
    assert first[0] == 0
    assert len(first[1:]) == times
    assert first[-1] == iterations


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    for name in "ab":
        _run(tmp_path / "model", tmp_path / name, "{rtn: {}}, {lkd: {iterations: 8}}", "int4:g32:two-level")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_norms_learn_when_they_have_a_rate(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    text = RECIPE.replace("STEPS", "{gptq: {}}, {lkd: {iterations: 20, norm_rate: 0.05}}")
    plan = make_plan(tmp_path / "model", Recipe.parse(text.replace("WEIGHTS", "int3:g32")))
    norms = {f"{plan.skeleton.block_prefix(i)}.{p}.weight" for i in (0, 1) for p in plan.skeleton.norms(i)}
    assert {name for name, why in plan.may_change.items() if why == "lkd"} >= norms
    report = run(plan, tmp_path / "out").report
    assert {name for names in report["changed"].values() for name in names} >= norms
    old, new = (read_index(tmp_path / x) for x in ("model", "out"))
    before, after = (reader(index)(sorted(norms)) for index in (old, new))
    assert any(not torch.equal(before[name], after[name]) for name in norms)
    for name in norms:
        assert torch.allclose(before[name], after[name], rtol=0.026)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "bloom", "bert-model"])
def test_the_error_is_measured_behind_the_blocks_that_follow(
    family: str, lookahead: int, tmp_path: Path
) -> None:
    """The loss at the start, by hand: the float model run on from the output of each quantized block."""
    save_tiny(family, tmp_path / "model")
    options = f"iterations: 1, rounding_rate: 0.0, scale_rate: 0.0, lookahead: {lookahead}"
    steps = f"{{rtn: {{}}}}, {{lkd: {{{options}}}}}"
    report = _run(tmp_path / "model", tmp_path / "out", steps)
    plan = make_plan(
        tmp_path / "model", Recipe.parse(RECIPE.replace("STEPS", "rtn").replace("WEIGHTS", "int3:g32"))
    )
    skeleton, read = plan.skeleton, plan.view.read
    skeleton.load_outside(read)
    skeleton.load_tail(read)
    assert plan.windows is not None
    captured = capture_inputs(skeleton, list(plan.windows.split(8)))
    for i in range(skeleton.n_blocks):
        skeleton.load_block(i, read)
    last = len(captured.hidden) - 1
    calls = [calls[last] for calls in captured.calls]
    ours = zq.load(str(tmp_path / "out"))
    blocks = [ours.get_submodule(skeleton.block_prefix(i)) for i in range(skeleton.n_blocks)]
    clean = noisy = captured.hidden[last]
    for i, name in enumerate(report["held_out_loss"]):
        with torch.no_grad():
            clean = run_block(skeleton.block(i), clean, calls[i])
            noisy = run_block(blocks[i], noisy, calls[i])
            a, b = noisy, clean
            for j in range(i + 1, min(i + 1 + lookahead, skeleton.n_blocks)):
                a, b = (run_block(skeleton.block(j), x, calls[j]) for x in (a, b))
            if i + lookahead >= skeleton.n_blocks and has_head(skeleton):
                expected = divergence(head(skeleton, a), head(skeleton, b))
            else:
                weights = _weights_of_all(skeleton, captured, i, lookahead)
                expected = weighted_mse(a, b, weights[-a.shape[0] :])
        assert report["held_out_loss"][name]["start"] == pytest.approx(float(expected), rel=2e-2)


def _weights_of_all(skeleton, captured, i: int, lookahead: int) -> torch.Tensor:
    """Token weights come from the targets of all windows."""
    reached = []
    for batch, hidden in enumerate(captured.hidden):
        for j in range(min(i + 1 + lookahead, skeleton.n_blocks)):
            hidden = run_block(skeleton.block(j), hidden, captured.calls[j][batch])
        reached.append(hidden)
    return token_weights(torch.cat(reached), "normalised")
