"""SmoothQuant: the formula, what it gains, and that the run plans, writes and audits what it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zq
from tests.quantizers.blocks import link_to, load_block, recipe
from tests.simulate import auto_class, outputs
from tests.tiny import TINY, save_tiny, token_ids
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.quantizers.search import input_magnitudes, weight_magnitudes
from zq.quantizers.smoothquant import Options, run, smooth

W8A8 = "{match: '*', weights: 'int8:channel', activations: 'int8:token'}"
RTN = "{rtn: {scale: absmax}}"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights = (torch.exp(2 * torch.randn(48, generator=generator)) for _ in range(2))
    inputs[4] = 0.0
    weights[9] = 0.0
    naive = [float(x) ** alpha / float(w) ** (1 - alpha) if x > 0 and w > 0 else None
             for x, w in zip(inputs, weights, strict=True)]  # fmt: skip
    live = [s for s in naive if s is not None]
    middle = (max(live) * min(live)) ** 0.5
    expected = [1.0 if s is None else s / middle for s in naive]
    assert torch.allclose(smooth(inputs, weights, alpha), torch.tensor(expected), rtol=1e-4)


def test_extremes_stay_within_bounds() -> None:
    inputs = torch.tensor([1e-38, 1e-20, 1.0, 3e4, 0.0])
    scale = smooth(inputs, torch.ones(5), 1.0)
    assert bool((scale > 0).all())
    assert float(scale.max() / scale.min()) <= 1.001e5
    assert torch.equal(smooth(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3))


@torch.no_grad()
def test_magnitudes_are_those_of_the_whole_text(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _, block = load_block(tmp_path, W8A8, f"{{smoothquant: {{}}}}, {RTN}")
    seen: dict[str, list[torch.Tensor]] = {link.name: [] for link in block.links}
    for link in block.links:
        watch = lambda m, args, name=link.name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))  # noqa: E731
        link.consumers[-1].module.register_forward_pre_hook(watch)
    found = input_magnitudes(block)
    for link, (largest, mean) in zip(block.links, found, strict=True):
        x = torch.cat(seen[link.name]).abs()
        assert x.shape[0] == 8 * 16
        assert torch.equal(largest, x.amax(0))
        assert torch.allclose(mean, x.mean(0), rtol=1e-5)
    q, k, v = (block.module.get_submodule(f"self_attn.{x}_proj").weight.abs() for x in "qkv")  # type: ignore
    largest, mean = weight_magnitudes(block.links[0])
    assert torch.equal(largest, torch.cat([q, k, v]).amax(0))
    assert torch.allclose(mean, torch.cat([q, k, v]).mean(0))


@torch.no_grad()
def test_it_folds_the_formula(tmp_path: Path) -> None:
    """Of shared value channels the largest magnitudes count, of inputs and of weights."""
    save_tiny("llama", tmp_path)
    _, block = load_block(tmp_path, W8A8, f"{{smoothquant: {{}}}}, {RTN}")
    link = link_to(block, "o_proj")
    old = link.consumers[0].weight.clone()
    inputs = input_magnitudes(block)[block.links.index(link)][0]
    heads = [x.reshape(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).reshape(-1)
             for x in (inputs, old.abs().amax(0))]  # fmt: skip
    run(block, Options(alpha=0.7))
    assert torch.allclose(link.consumers[0].weight, old * smooth(*heads, 0.7), rtol=1e-5)
    facts = block.facts["smoothing"]
    assert [fact["producer"] for fact in facts] == [link.name for link in block.links]
    assert {fact["alpha"] for fact in facts} == {0.7}


def planted(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A model whose norms make three channels a hundred times larger than the others."""
    save_tiny(name, folder, dtype)
    tensors = load_file(folder / "model.safetensors")
    for key, value in tensors.items():
        if "layernorm" in key:
            value[[3, 17, 40]] *= 100
        if key.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        ):
            value[:, [3, 17, 40]] /= 30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("options", ["alpha: 0.5", "search: true", "alpha: 0.8, windows: 1"])
def test_planted_outliers_cost_much_less(options: str, tmp_path: Path) -> None:
    source = planted(tmp_path / "model")
    errors = []
    for i, steps in enumerate((RTN, f"{{smoothquant: {{{options}}}}}, {RTN}")):
        report = quantize(make_plan(source, recipe(W8A8, steps)), tmp_path / str(i)).report
        errors.append(list(report["output_error"].values())[-1])
        assert report["audit"]["passed"] is True
    assert errors[1] < 0.1 * errors[0]
    assert report["audit"]["changed_tensors"] == sum(map(len, report["changed"].values())) == 4
    norms = [f"model.layers.0.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")]
    assert report["changed"]["0"] == norms
    assert len(report["smoothing"]["1"]) == 4
    if "search" in options:
        for link in (x for links in report["smoothing"].values() for x in links):
            assert link["end"] <= link["start"]


@pytest.mark.parametrize("name", TINY)
def test_every_family_written_and_reloaded(name: str, tmp_path: Path) -> None:
    """At 8 bits the written model must answer as the original does, in zq and in transformers alike: a scale
    that was folded on one side only would show."""
    save_tiny(name, tmp_path / "model")
    steps = "{smoothquant: {}}, {awq: {scale: absmax, windows: 4}}, {rtn: {}}"
    rules = "{match: '*', weights: 'int8:channel'}"
    report = quantize(make_plan(tmp_path / "model", recipe(rules, steps)), tmp_path / "out").report
    assert list(report["output_error"].values())[-1] < 1e-3
    original, ours = zq.load(tmp_path / "model"), zq.load(tmp_path / "out")
    expected, got = outputs(original, token_ids()), outputs(ours, token_ids())
    assert float((got - expected).square().sum() / expected.square().sum()) < 2e-3
    theirs = auto_class(original).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(theirs, token_ids()), got)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("model", "out"))
    folded = {name for names in report["changed"].values() for name in names}
    differing = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    assert differing <= folded
    assert folded == differing


@pytest.mark.parametrize("step", ["gptq: {asymmetry: 0.5}", "rtn: {}}, {lkd: {iterations: 8}"])
def test_other_steps_go_on_from_the_folded_weights(step: str, tmp_path: Path) -> None:
    source = planted(tmp_path / "model", "qwen2", torch.bfloat16)
    errors = []
    for i, first in enumerate(("", "{smoothquant: {}}, ")):
        text = recipe(W8A8.replace("int8:channel", "int6:g32"), f"{first}{{{step}}}", samples=32)
        report = quantize(make_plan(source, text), tmp_path / str(i)).report
        errors.append(list(report["output_error"].values())[-1])
    assert errors[1] < 0.5 * errors[0]


def test_a_changed_norm_keeps_its_own_dtype(tmp_path: Path) -> None:
    source = planted(tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.float() if "norm" in n else t for n, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quantize(
        make_plan(source, recipe(W8A8, f"{{smoothquant: {{}}}}, {RTN}")), tmp_path / "out"
    ).report
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in (n for names in report["changed"].values() for n in names):
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], tensors[name])
        assert torch.equal(after[name].bfloat16().float(), after[name])


def test_the_plan_says_what_may_change(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    plan = make_plan(tmp_path, recipe(W8A8, f"{{smoothquant: {{}}}}, {{awq: {{}}}}, {RTN}"))
    leaves = ("ln_1.weight", "ln_1.bias", "attn.c_attn.bias", "ln_2.weight", "ln_2.bias")
    names = {f"transformer.h.{i}.{leaf}" for i in range(2) for leaf in leaves}
    assert set(plan.may_change) == names
    said = {row["name"] for row in plan.rows() if row["why"].endswith(", changed by smoothquant and awq")}
    assert said == names
    assert make_plan(tmp_path, recipe(W8A8, RTN)).may_change == {}


@pytest.mark.parametrize(
    ("name", "rules", "note"),
    [
        ("llama", W8A8, None),
        (
            "opt-post",
            W8A8,
            "smoothquant: 8 of 12 quantized layers stay as they are, no exact link leads to them, first "
            "model.decoder.layers.0.self_attn.q_proj",
        ),
        (
            "bert",
            W8A8.replace("*", "@mlp"),
            "smoothquant: no exact link leads to any quantized layer of this model, so nothing is scaled",
        ),
    ],
)
def test_layers_without_a_link_are_said(name: str, rules: str, note: str | None, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "model")
    plan = make_plan(tmp_path / "model", recipe(rules, f"{{smoothquant: {{}}}}, {RTN}"))
    assert [n for n in plan.notes if n.startswith("smoothquant")] == ([note] if note else [])
    report = quantize(plan, tmp_path / "out").report
    assert bool(report["changed"]) is (name != "bert")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (f"{RTN}, {{smoothquant: {{}}}}", "step 'smoothquant' scales float weights; put it before 'rtn'"),
        (f"{{smoothquant: {{alpha: 1.5}}}}, {RTN}", "'alpha: 1.5' is not allowed; allowed: 0.0 to 1.0"),
        (f"{{smoothquant: {{alpha: -1}}}}, {RTN}", "'alpha: -1' is not allowed; allowed: 0.0 to 1.0"),
        (f"{{smoothquant: {{windows: 0}}}}, {RTN}", "'windows: 0' is not allowed; allowed: 1 to"),
        (f"{{smoothquant: {{alpha: true}}}}, {RTN}", "'alpha' must be float, not True"),
    ],
)
def test_what_a_recipe_cannot_ask(steps: str, words: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ZqError) as caught:
        make_plan(tmp_path, recipe(W8A8, steps))
    assert words in str(caught.value)


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    assert make_plan(tmp_path, recipe(W8A8, f"{{smoothquant: {{alpha: 1}}}}, {RTN}")).steps[0][1].alpha == 1


def test_it_needs_tokens(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    wanted = recipe(W8A8, f"{{smoothquant: {{}}}}, {RTN}")
    with pytest.raises(ZqError, match="needs calibration tokens"):
        make_plan(tmp_path, type(wanted).parse(str(wanted).replace("source: random", "source: none")))
