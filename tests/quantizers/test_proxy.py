"""Proxy quantization: which columns stay, what they cost, that they are exact and others as without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zq
from tests.quantizers.blocks import distance, link_to, load_block
from tests.tiny import save_tiny, token_ids
from zq.autobits import _sites
from zq.checkpoint.reader import reader
from zq.errors import ZqError
from zq.numerics.qtensor import quantize as quantize_matrix
from zq.numerics.qtensor import without
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.quantizers import proxy
from zq.quantizers.feeders import spreads
from zq.quantizers.gptq import factorise, quantize_weight
from zq.quantizers.search import Trial
from zq.recipe import Bits, Recipe
from zq.sensitivity import _quantized, measure
from zq.spec import TensorSpec

RECIPE = """
rules: [{match: '*', weights: 'int3:g32'}]
steps: [{proxy: {share: 0.05}}, STEP]
calibration: {source: random, samples: 2, length: 32}
"""


def recipe(step: str) -> Recipe:
    return Recipe.parse(RECIPE.replace("STEP", step))


def test_the_feeders_of_a_llama(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = make_plan(tmp_path, recipe("rtn"))
    skeleton, read = plan.skeleton, plan.view.read
    weights = load_file(tmp_path / "model.safetensors")
    skeleton.load_block(1, read)
    found = spreads(skeleton, 1, read)
    at = {site.linears[0].rpartition(".")[2]: site.name for site in skeleton.arch.sites}

    def std(name: str) -> torch.Tensor:
        return weights[f"model.layers.{name}.weight"].std(1)

    heads = skeleton.config.num_attention_heads
    v = std("1.self_attn.v_proj").view(skeleton.config.num_key_value_heads, -1)
    v = v.repeat_interleave(heads // len(v), 0).reshape(-1)  # each key-value head serves several heads
    assert torch.equal(found[at["q_proj"]], std("0.mlp.down_proj"))
    assert torch.equal(found[at["o_proj"]], v)
    assert torch.equal(found[at["gate_proj"]], std("1.self_attn.o_proj"))
    assert torch.equal(found[at["down_proj"]], std("1.mlp.up_proj"))
    skeleton.load_block(0, reader(plan.index))
    first = spreads(skeleton, 0, read)[at["q_proj"]]
    assert torch.equal(first, weights["model.embed_tokens.weight"].std(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gpt-neox", "gptj", "bert"])
def test_every_family_can_be_run(name: str, tmp_path: Path) -> None:
    from tests.tiny import TINY

    family = next(n for n in TINY if n.replace("_", "-").startswith(name))
    save_tiny(family, tmp_path / "model")
    report = quantize(make_plan(tmp_path / "model", recipe("rtn: {}")), tmp_path / "out").report
    assert report["audit"]["passed"]
    assert report["format"] == "zq"


@pytest.mark.parametrize("step", ["{rtn: {scale: mse}}", "{gptq: {}}", "{lkd-classic: {iterations: 2}}"])
def test_kept_columns_are_exact_and_reload(step: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    plan = make_plan(tmp_path / "model", recipe(step))
    result = quantize(plan, tmp_path / "out")
    stored, before = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "model" / "model.safetensors"),
    )
    assert sum(t.nbytes for t in stored.values()) == plan.bytes_after
    for layer, scheme in plan.assigned.items():
        index = stored[f"{layer}.weight_kept_index"].long()
        kept, original = stored[f"{layer}.weight_kept"], before[f"{layer}.weight"]
        assert len(index) == scheme.weights.kept == round(0.05 * original.shape[1])
        if "rtn" in step:
            assert torch.equal(kept, original[:, index])
        model_weight = zq.load(tmp_path / "out").get_submodule(layer).dense(torch.bfloat16)
        assert torch.equal(model_weight[:, index], kept)
    assert result.report["audit"]["passed"]
    with torch.no_grad():
        assert bool(torch.isfinite(zq.load(tmp_path / "out")(token_ids()).logits).all())


def test_kept_columns_do_not_count_for_the_scales_and_lower_the_error() -> None:
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([5, 77])
    x[:, places] *= 30
    spec = TensorSpec.parse("int3:g64")
    q = quantize_matrix(x, spec, places=places)
    rest = quantize_matrix(without(x, places), spec)
    assert torch.equal(q.scale, rest.scale)
    others = [c for c in range(128) if c not in (5, 77)]
    assert torch.equal(q.dequantize()[:, others], rest.dequantize()[:, others])
    assert torch.equal(q.dequantize()[:, places], x[:, places])
    plain = quantize_matrix(x, spec).dequantize()
    assert (q.dequantize() - x).square().sum() < 0.05 * (plain - x).square().sum()


def test_gptq_lets_kept_columns_take_up_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight, places = torch.randn(16, 64, generator=generator), torch.tensor([3, 40])
    hessian = x.T @ x
    factor = factorise(hessian, 0.01)
    spec = TensorSpec.parse("int3:g32")
    q, latent = quantize_weight(weight, factor, spec, torch.float32, places=places)
    assert torch.equal(q.dequantize()[:, places], latent[:, places])
    assert not torch.equal(latent[:, places], weight[:, places])

    def loss(dense: torch.Tensor) -> float:
        return float((x @ (dense - weight).T).square().sum())

    fixed = q.dequantize()
    fixed[:, places] = weight[:, places]
    assert loss(q.dequantize()) < loss(fixed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "steps: [rtn, proxy]",
            "recipe:1: step 'proxy' chooses columns of float weights; put it before 'rtn'",
        ),
        ("steps: [{proxy: {share: 0.6}}, rtn]", "'share: 0.6' is not allowed; allowed: 0.0 to 0.5"),
        ("steps: [{proxy: {share: 0.001}}, rtn]", "is less than one of 64 columns"),
    ],
)
def test_refusals(text: str, words: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    parsed = Recipe.parse(f"{text}\nrules: [{{match: '*', weights: 'int4:g32'}}]\n")
    with pytest.raises(ZqError) as caught:
        make_plan(tmp_path, parsed)
    assert words in str(caught.value)


def test_it_needs_no_data(tmp_path: Path) -> None:
    """Which columns stay is seen in the weights."""
    save_tiny("llama", tmp_path / "model")
    text = "rules: [{match: '*', weights: 'int4:g32'}]\nsteps: [proxy: {share: 0.1}, rtn]\n"
    recipe = Recipe.parse(text + "calibration: {source: none}\n")
    plan = make_plan(tmp_path / "model", recipe)
    assert plan.windows is None
    quantize(plan, tmp_path / "out")
    assert all(layer.scheme.weights.kept for layer in plan.layers if layer.scheme)


def test_a_rule_cannot_ask_for_columns() -> None:
    with pytest.raises(ZqError, match=r"a rule keeps no columns; drop 'keep=4' and add the step"):
        Recipe.parse("rules: [{match: '*', weights: 'int4:g32:keep=4'}]")


@torch.no_grad()
def test_a_search_behind_it_measures_what_will_be_written(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    rule = "{match: '*', weights: 'int3:g32'}"
    _, block = load_block(tmp_path, rule, "{proxy: {share: 0.3}}, {awq: {windows: 8}}, {rtn: {}}")
    proxy.run(block, proxy.Options(share=0.3))
    link = link_to(block, "down_proj")
    searched = Trial(block, 8, "mse").error(link, None)
    wanted = block.forward(block.inputs)
    for layer in link.consumers:
        assert layer.places is not None
        spec = layer.scheme.weights
        layer.replace(quantize_matrix(layer.weight, spec, "mse", torch.float32, places=layer.places))
    written = distance(block.forward(block.inputs), wanted) ** 2
    assert searched == pytest.approx(written, rel=1e-5)


def test_the_sensitivity_is_that_of_the_columns_that_are_rounded(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    bits = Bits(mean=6.0, widths=(3,))
    plan = make_plan(tmp_path, replace(recipe("{rtn: {}}"), bits=bits))
    skeleton, original = plan.skeleton, load_file(tmp_path / "model.safetensors")
    skeleton.load_block(1, plan.view.read)
    found = spreads(skeleton, 1, plan.view.read)
    for site in (site for site in _sites(plan, bits) if site.block == 1):
        spread = found[site.name.rpartition(" ")[2]]
        with _quantized(plan, site, site.schemes[3], spread):
            for layer in site.layers:
                now = skeleton.model.get_submodule(layer.name).weight
                same = (now == original[f"{layer.name}.weight"]).all(0)
                assert layer.scheme is not None
                count = layer.scheme.weights.kept
                assert set(same.nonzero().flatten().tolist()) >= set(spread.topk(count).indices.tolist())
                assert count <= int(same.sum()) < 2 * count
    assert measure(plan, _sites(plan, bits), lambda event: None)
