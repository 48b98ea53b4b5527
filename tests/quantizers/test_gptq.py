"""GPTQ against the definition: one column at a time, the inverse Hessian recomputed at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import zq
from tests.quantizers.blocks import load_block
from tests.tiny import save_tiny, token_ids
from zq.errors import ZqError
from zq.numerics.groups import group
from zq.numerics.qtensor import quantize
from zq.numerics.scales import mse
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.quantizers.gptq import Options, correction, factorise, quantize_weight
from zq.quantizers.gptq import run as run_method
from zq.recipe import Recipe
from zq.spec import TensorSpec

SPECS = [
    "int4:g16",
    "int3:channel",
    "int4:g16:asym",
    "int4:g16:narrow",
    "int2:tensor",
    "e2m1fn:g16",
    "int4:b24",
    "int4:5x16",
]


def _problem(n: int = 12, k: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(400, k, generator=generator, dtype=torch.float64) @ (mix * 0.3 + torch.eye(k))
    return torch.randn(n, k, generator=generator, dtype=torch.float64), x.T @ x


def _naive(weight: Tensor, hessian: Tensor, damp: float, order: Tensor, scale: Tensor, zero: Tensor | None,
           values: Tensor) -> Tensor:  # fmt: skip
    """Optimal brain quantization in a fixed order. scale, zero [N, K]; values: what a code can be."""
    w = weight.clone()
    h = hessian + torch.eye(len(hessian), dtype=hessian.dtype) * damp * hessian.diagonal().mean()
    left = order.tolist()
    result = torch.empty_like(w)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        k, rest = left[0], left[1:]
        z = 0.0 if zero is None else zero[:, k]
        ideal = w[:, k] / scale[:, k] + z
        nearest = (ideal[:, None] - values).abs().argmin(1)
        result[:, k] = (values[nearest] - z) * scale[:, k]
        error = (w[:, k] - result[:, k]) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0, 1:]
        left = rest
    return result


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("columns", [1, 7, 128])
@pytest.mark.parametrize("text", SPECS)
def test_equals_one_column_at_a_time(text: str, columns: int, order: str) -> None:
    spec, (weight, hessian) = TensorSpec.parse(text), _problem()
    factor = factorise(hessian, 0.01, order)
    q, latent = quantize_weight(weight, factor, spec, torch.float32, columns=columns)
    ones = q.__class__(torch.ones_like(q.codes), q.scale, None, q.sub, q.spec)
    step = ones.dequantize().double() if spec.info.is_int else _float_step(q, spec)
    zero = None if q.zero is None else q.zero.double().repeat_interleave(16, 1)
    values = _values(spec)
    expected = _naive(weight, hessian, 0.01, factor.order, step, zero, values)
    assert torch.allclose(q.dequantize().double(), expected, atol=1e-5)
    again = torch.round(latent / step) if spec.info.is_int else None
    if again is not None:
        z = 0 if zero is None else zero
        assert torch.equal((again + z).clamp(values.min(), values.max()), q.codes.double())


def _values(spec: TensorSpec) -> Tensor:
    if spec.info.is_int:
        half = 1 << (spec.bits - 1)
        return torch.arange(-half + spec.narrow, half, dtype=torch.float64)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    return torch.cat([-magnitudes.flip(0)[:-1], magnitudes])


def _float_step(q, spec: TensorSpec) -> Tensor:
    return q.scale.double().repeat_interleave(spec.layout.size or 1, 1)


def test_worse_than_nearest_in_weights_and_better_in_outputs() -> None:
    weight, hessian = _problem(64, 96, 1)
    spec = TensorSpec.parse("int4:g32")
    q, _ = quantize_weight(weight, factorise(hessian, 0.01), spec, torch.float32)
    gptq, nearest = (
        q.dequantize().double() - weight,
        quantize(weight.float(), spec, "mse").dequantize() - weight,
    )
    assert gptq.square().sum() > 1.1 * nearest.square().sum()
    assert (gptq @ hessian * gptq).sum() < 0.6 * (nearest @ hessian * nearest).sum()


def test_a_diagonal_hessian_is_round_to_nearest() -> None:
    weight, spec = _problem()[0], TensorSpec.parse("int4:g16")
    q, latent = quantize_weight(
        weight, factorise(torch.eye(48, dtype=torch.float64), 0.01), spec, torch.float32
    )
    assert torch.equal(latent, weight)
    assert torch.equal(q.codes, quantize(weight.float(), spec, "mse").codes)


def test_dead_and_dependent_inputs_still_factorise() -> None:
    _, hessian = _problem()
    hessian[3], hessian[:, 3] = 0, 0
    hessian[5], hessian[:, 5] = hessian[4], hessian[:, 4]
    factor = factorise(hessian, 1e-12)
    assert bool(torch.isfinite(factor.upper).all())
    with pytest.raises(ZqError, match="cannot be factorised"):
        factorise(torch.full((4, 4), torch.nan, dtype=torch.float64), 0.01)


def test_correction_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(300, 24, generator=generator, dtype=torch.float64)
    seen = clean + 0.3 * torch.randn(300, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    hessian, cross = seen.T @ seen, (clean - seen).T @ seen
    best = torch.linalg.lstsq(seen, clean @ weight.T).solution.T
    for order in ("activation", "natural"):
        found = correction(weight, cross, factorise(hessian, 0.0, order))
        assert torch.allclose(weight + found, best, atol=1e-8)


@pytest.mark.parametrize("tokens", [8, 16])
def test_the_correction_of_few_tokens_and_dead_inputs_stays_small(tokens: int) -> None:
    """H is singular; without damping the step of least squares would have no bound."""
    generator = torch.Generator().manual_seed(4)
    clean = torch.randn(tokens, 24, generator=generator)
    seen = clean + 0.1 * torch.randn(tokens, 24, generator=generator)
    seen[:, 3] = 0
    weight = torch.randn(8, 24, generator=generator)
    wanted = clean @ weight.T
    step = correction(weight, (clean - seen).T @ seen, factorise(seen.T @ seen, 0.0))
    assert float((seen @ (weight + step).T - wanted).norm()) < 0.5 * float((seen @ weight.T - wanted).norm())
    assert float(step.norm()) < float(weight.norm())


RECIPE = """
rules: [{match: '*', weights: 'int3:g32', activations: 'int8:token'}]
steps: [STEP]
calibration: {source: random, samples: 16, length: 32}
"""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "bloom", "bert-model"])
def test_in_the_pipeline_it_beats_nearest(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    errors = []
    for step in ("rtn: {}", "gptq: {}", "gptq: {asymmetry: 0.5, order: natural}"):
        recipe = Recipe.parse(RECIPE.replace("STEP", f"{{{step}}}"))
        out = tmp_path / str(len(errors))
        report = run(make_plan(tmp_path / "model", recipe), out).report
        errors.append(list(report["output_error"].values())[-1])
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


@pytest.mark.parametrize("samples", [1, 16])
def test_no_damping_at_all(samples: int, tmp_path: Path) -> None:
    """OPT's ReLU makes inputs that are always zero; one window of 32 tokens makes H singular."""
    save_tiny("opt", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in (n for n in tensors if n.endswith("fc1.bias")):
        tensors[name][3] = -9.0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    errors = []
    for i, options in enumerate(("", "damp: 0.0, asymmetry: 0.5")):
        text = RECIPE.replace("STEP", f"{{gptq: {{{options}}}}}").replace(
            "samples: 16", f"samples: {samples}"
        )
        report = run(make_plan(tmp_path / "model", Recipe.parse(text)), tmp_path / str(i)).report
        errors.append(list(report["output_error"].values())[-1])
    assert errors[1] < errors[0]


def test_an_overflow_is_named_by_its_layer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.float16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 2000
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    plan = make_plan(tmp_path / "model", Recipe.parse(RECIPE.replace("STEP", "{gptq: {}}")))
    with pytest.raises(
        ZqError, match=r"^'model\.layers\.\d\.\S+': the Hessian of its .*NaN or Inf .*bfloat16"
    ):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_signed_scales_reload_in_transformers(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    recipe = Recipe.parse(RECIPE.replace("STEP", "{gptq: {scale: mse-signed}}"))
    run(make_plan(tmp_path / "model", recipe), tmp_path / "out")
    ours = zq.load(str(tmp_path / "out"))
    assert any(bool((m.weight_scale < 0).any()) for m in ours.modules() if hasattr(m, "weight_scale"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(ours(token_ids()).logits, theirs(token_ids()).logits)


def test_layers_outside_the_blocks_are_rounded_to_nearest(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    text = RECIPE.replace("STEP", "{gptq: {}}").replace(
        "rules: [", "rules: [{match: lm_head, weights: 'int8:channel'}, "
    )
    plan = make_plan(tmp_path / "model", Recipe.parse(text))
    assert "lm_head" in run(plan, tmp_path / "out").report["layers"]


def test_it_needs_tokens(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    text = RECIPE.replace("STEP", "{gptq: {}}").replace("source: random", "source: none")
    with pytest.raises(ZqError, match="needs calibration tokens"):
        make_plan(tmp_path / "model", Recipe.parse(text))


@torch.no_grad()
@pytest.mark.parametrize(("windows", "count"), [(0, 3), (1, 1), (8, 1), (17, 2), (24, 3)])
def test_the_hessian_is_that_of_the_first_windows(windows: int, count: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    found = []
    for options, kept in ((Options(windows=windows), 3), (Options(), count)):
        _, block = load_block(tmp_path, "{match: '*', weights: 'int3:g32'}", "{gptq: {}}", samples=24)
        assert [len(hidden) for hidden in block.inputs] == [8, 8, 8]
        block.inputs = block.inputs[:kept]
        run_method(block, options)
        found.append([layer.weight.clone() for layer in block.layers])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_importance_is_the_power_of_the_diagonal_that_weighs_errors() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 64) * torch.exp(torch.randn(64))
    weight, spec = torch.randn(16, 64), TensorSpec.parse("int3:g32")
    factor = factorise(x.T @ x, 0.01)
    for importance in (0.0, 0.5, 1.0):
        found = quantize_weight(weight, factor, spec, torch.float32, importance=importance)[0]
        weights = group(factor.diagonal.pow(importance).expand(1, -1), spec)
        assert torch.equal(found.scale, mse(group(weight, spec), spec, torch.float32, weights).scale)
    plain = quantize(weight, spec, "mse")
    assert torch.equal(
        quantize_weight(weight, factor, spec, torch.float32, importance=0.0)[0].scale, plain.scale
    )
    assert not torch.equal(quantize_weight(weight, factor, spec, torch.float32)[0].scale, plain.scale)
