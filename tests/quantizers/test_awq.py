"""AWQ: the search against brute force on copies of the block; activations quantized where the scheme says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.quantizers.blocks import load_block, recipe
from tests.simulate import int8_tokens
from tests.tiny import save_tiny
from zq.models.capture import run_block
from zq.numerics.qtensor import quantize as to_codes
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.quantizers import awq
from zq.quantizers.awq import GRID, Options, protect, run
from zq.quantizers.fold import fold
from zq.quantizers.method import Block, BlockLink
from zq.quantizers.search import Trial, input_magnitudes
from zq.spec import TensorSpec

W3 = "{match: '*', weights: 'int3:g32'}"
W3A8 = "{match: '*', weights: 'int3:g32', activations: 'int8:token'}"
STEPS = "{awq: {}}, {rtn: {}}"


def test_the_formula() -> None:
    inputs, weights = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 4.0, 2.0, 1.0])
    assert torch.allclose(protect(inputs, None, 0.5), torch.tensor([2.0, 1.0, 3**0.5, 3.0]) / 3**0.5)
    assert torch.equal(protect(inputs, None, 0.0), torch.ones(4))
    duo = torch.tensor([2.0, 0.5, 1.5**0.5, 3.0]) / 1.5**0.5
    assert torch.allclose(protect(inputs, weights, 0.5), duo)
    assert GRID[0] == 0.0
    assert (len(GRID), GRID[-1]) == (20, 0.95)


@torch.no_grad()
def _naive(block: Block, link: BlockLink, scale: Tensor, batches: int, choose: str) -> float:
    """The error of a scale, on a copy of the block with plain tensor operations (Llama only)."""
    module = copy.deepcopy(block.module)
    assert module is not None

    def of(name: str) -> torch.nn.Module:
        return module.get_submodule(name.removeprefix(f"{block.name}."))

    producer = of(link.name)
    per_row = torch.ones(producer.weight.shape[0])
    per_row[link.channels] = scale
    producer.weight.data /= per_row.reshape(-1, *[1] * (producer.weight.ndim - 1))
    for layer in link.consumers:
        weight = of(layer.name).weight
        weight.data = to_codes(weight.data * scale, layer.scheme.weights, choose).dequantize()
        if layer.scheme.activations:
            of(layer.name).register_forward_pre_hook(lambda m, args: (int8_tokens(args[0]),))
    error = power = 0.0
    for i in range(batches):
        wanted = run_block(block.module, block.inputs[i], block.calls[i])  # type: ignore[arg-type]
        got = run_block(module, block.inputs[i], block.calls[i])
        error, power = error + float((got - wanted).square().sum()), power + float(wanted.square().sum())
    return error / power


@torch.no_grad()
@pytest.mark.parametrize(
    "rules", [W3, W3A8, "{match: '*', weights: 'int8:channel', activations: 'int8:token'}"]
)
@pytest.mark.parametrize(("windows", "batches"), [(1, 1), (8, 1), (15, 1), (16, 2), (100, 3)])
def test_it_folds_the_best_of_the_grid(rules: str, windows: int, batches: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _, block = load_block(tmp_path, rules, STEPS, samples=24)
    _, reference = load_block(tmp_path, rules, STEPS, samples=24)
    means = [mean for _, mean in input_magnitudes(reference)]
    run(block, Options(windows=windows))
    for link, mean, fact in zip(reference.links, means, block.facts["smoothing"], strict=True):
        if link.name.endswith("v_proj"):
            mean = mean.reshape(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).reshape(-1)
        errors = {r: _naive(reference, link, protect(mean, None, r), batches, "mse") for r in GRID}
        ratio = min(errors, key=errors.__getitem__)
        assert fact["producer"] == link.name
        assert fact["start"] == pytest.approx(errors[0.0], rel=1e-3)
        assert fact["end"] == pytest.approx(errors[ratio], rel=1e-3)
        assert (fact["ratio"] or 0.0) == ratio
        if ratio:
            fold(reference, link, protect(mean, None, ratio))
    for mine, other in zip(block.layers, reference.layers, strict=True):
        assert torch.allclose(mine.weight, other.weight, rtol=1e-5)
    assert block.changed == reference.changed


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "bert"])
def test_a_trial_changes_nothing(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, torch.bfloat16)
    _, block = load_block(tmp_path, W3A8, STEPS)
    assert block.module is not None
    before = {name: p.clone() for name, p in block.module.named_parameters()}
    trial = Trial(block, 8, "absmax")
    for link in block.links:
        assert trial.error(link, None) > 0
        trial.choose(link, {1.0: torch.linspace(0.5, 2.0, len(link.channels))})
        assert len(link.consumers[0].module._forward_pre_hooks) == 0
    assert all(torch.equal(before[name], p) for name, p in block.module.named_parameters())
    assert block.changed == set()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "bloom", "gptj", "opt", "bert"])
def test_a_trial_measures_what_a_fold_does(family: str, tmp_path: Path) -> None:
    """In every layout: fold for real and round the consumers, and the error is the one that was predicted."""
    save_tiny(family, tmp_path)
    for i in range(len(load_block(tmp_path, W3, STEPS)[1].links)):
        _, block = load_block(tmp_path, W3, STEPS)
        link = block.links[i]
        trial = Trial(block, 8, "mse")
        scale = torch.exp(torch.linspace(-1, 1, len(link.channels)))
        predicted = trial.error(link, scale)
        fold(block, link, scale)
        for layer in link.consumers:
            layer.replace(to_codes(layer.weight, TensorSpec.parse("int3:g32"), "mse"))
        got = [block.run(block.inputs[b], b) for b in trial.wanted]
        error = sum(float((g - w).square().sum()) for g, w in zip(got, trial.wanted.values(), strict=True))
        assert predicted == pytest.approx(error / trial.power, rel=1e-3)


@pytest.mark.parametrize("options", ["", "duo: true", "scale: mse-signed, windows: 4"])
def test_in_the_pipeline(options: str, tmp_path: Path) -> None:
    """Never worse per link, and better in all where activations have outliers."""
    from tests.quantizers.test_smoothquant import planted

    source = planted(tmp_path / "model")
    errors = []
    for i, first in enumerate(("", f"{{awq: {{{options}}}}}, ")):
        steps = f"{first}{{rtn: {{scale: mse}}}}"
        report = quantize(make_plan(source, recipe(W3, steps)), tmp_path / str(i)).report
        errors.append(list(report["output_error"].values())[-1])
    for links in report["smoothing"].values():
        assert all(link["end"] <= link["start"] for link in links)
    assert errors[1] < 0.8 * errors[0]


def test_where_nothing_is_better_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of bad scales only: every tensor is what it would be without the step."""
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    bad = torch.Generator().manual_seed(0)
    monkeypatch.setattr(awq, "protect", lambda x, w, r: torch.exp(4 * torch.randn(x.shape, generator=bad)))
    files = []
    for i, steps in enumerate((STEPS, "{rtn: {}}")):
        report = quantize(make_plan(tmp_path / "model", recipe(W3, steps)), tmp_path / str(i)).report
        files.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert report["changed"] == {}


def test_only_where_activations_are_quantized(tmp_path: Path) -> None:
    """Links to the attention alone: the plan promises their norms, and no others change."""
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    rules = f"{{match: '@attention', weights: 'int3:g32', activations: 'int8:token'}}, {W3}"
    plans = [
        make_plan(tmp_path / "model", recipe(rules, f"{{awq: {{where: {where}}}}}, {{rtn: {{}}}}"))
        for where in ("all", "activations")
    ]
    assert set(plans[1].may_change) < set(plans[0].may_change)
    assert all("input_layernorm" in name for name in plans[1].may_change)
    report = quantize(plans[1], tmp_path / "out").report
    found = {link["producer"].split(".")[-1] for links in report["smoothing"].values() for link in links}
    assert found == {"input_layernorm", "v_proj"}


def test_it_is_left_out_where_no_activations_are_quantized(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    steps = "{awq: {where: activations}}, {gptq: {}}"
    plan = make_plan(tmp_path / "model", recipe(W3, steps))
    assert [method.name for method, _ in plan.steps] == ["gptq"]
    assert plan.may_change == {}
    assert not [note for note in plan.notes if "awq" in note]
    quantize(plan, tmp_path / "a")
    quantize(make_plan(tmp_path / "model", recipe(W3, "{gptq: {}}")), tmp_path / "b")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b
