"""Every number format and every layout of scales as weights: quantized, audited, reloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import zq
from tests.command import run as command
from tests.letters import save_tokenizer
from tests.simulate import block_linears
from tests.tiny import random_model, save_tiny, token_ids
from zq.audit import audit_folder
from zq.formats import FORMATS
from zq.models.find import load_config, model_class
from zq.numerics.qtensor import quantize as quantize_matrix
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe
from zq.runtime.linear import QuantLinear
from zq.spec import TensorSpec

LAYOUTS = ["b64", "channel", "g32", "b16:pow2=4", "b32:center", "rank1", "channel:pow2=8:s=fp32", "5x32"]


def specs() -> list[str]:
    """Every format once, the layouts in turn; unsigned formats subtract the least value of a group."""
    found = []
    for i, (name, info) in enumerate(FORMATS.items()):
        layout = LAYOUTS[i % len(LAYOUTS)] if info.signed else "b32:center"
        found.append(f"{name}:{layout}")
    return [*found, *(f"{name}:{layout}" for name in ("kmeans3", "quantile4", "int4") for layout in LAYOUTS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, torch.bfloat16)
    return folder


def recipe(names: list[str], wanted: list[str], step: str) -> Recipe:
    rules = "".join(f'  - {{match: "{n}", weights: "{w}"}}\n' for n, w in zip(names, wanted, strict=False))
    rest = '  - {match: "*", weights: "int8:channel"}\n' if len(wanted) < len(names) else ""
    tokens = "calibration: {source: random, samples: 2, length: 32}\n"
    return Recipe.parse(f"rules:\n{rules}{rest}steps: [{step}]\nformat: zq\n{tokens}")


def linears(source: Path) -> dict[str, torch.Tensor]:
    model = model_class(load_config(source)).from_pretrained(source)
    return {name: model.get_submodule(name).weight.detach() for name in block_linears(model)}


@pytest.mark.parametrize("part", range(8))
def test_every_format_is_a_weight_format(part: int, source: Path, tmp_path: Path) -> None:
    weights = linears(source)
    wanted = specs()[part::8]
    names = list(weights)
    while wanted:
        now, wanted = wanted[: len(names)], wanted[len(names) :]
        out = tmp_path / str(len(wanted))
        result = quantize(make_plan(source, recipe(names, now, "rtn: {scale: absmax-signed}")), out)
        assert result.report["format"] == "zq"
        assert audit_folder(out)["passed"]
        model = zq.load(out)
        for name, text in zip(names, now, strict=False):
            x = weights[name]
            alone = quantize_matrix(x, TensorSpec.parse(text), "absmax-signed").dequantize(torch.bfloat16)
            assert torch.equal(model.get_submodule(name).dense(torch.bfloat16), alone), text
            lost = (alone.float() - x.float()).square().mean() / x.float().square().mean()
            assert float(lost) < (0.6 if text.startswith("int2") else 0.25), text


@pytest.mark.parametrize("step", ["rtn: {scale: mse}", "rtn: {scale: mse-signed}", "gptq: {}"])
def test_all_steps_take_them(step: str, source: Path, tmp_path: Path) -> None:
    names = list(linears(source))
    wanted = [f"kmeans3:{layout}" for layout in LAYOUTS] + [f"dynamic4:{layout}" for layout in LAYOUTS]
    result = quantize(make_plan(source, recipe(names, wanted[: len(names)], step)), tmp_path / "out")
    assert result.report["audit"]["passed"]
    assert all(math.isfinite(error) for error in result.report["output_error"].values())
    with torch.no_grad():
        assert bool(torch.isfinite(zq.load(tmp_path / "out")(token_ids()).logits).all())


def test_what_is_stored_is_what_the_plan_promised(source: Path, tmp_path: Path) -> None:
    names = list(linears(source))
    wanted = ["kmeans3:channel", "nf3:b64:pow2=16", "ulinear4:b32:center", "dynamic4:rank1"]
    plan = make_plan(source, recipe(names, wanted, "rtn: {scale: absmax}"))
    quantize(plan, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    n, k = linears(source)[names[0]].shape
    assert stored[f"{names[0]}.weight_codebook"].shape == (n, 8)
    n, k = linears(source)[names[1]].shape
    assert stored[f"{names[1]}.weight_shift"].shape == (1, math.ceil(n * k / 16 * 4 / 32))
    n, k = linears(source)[names[2]].shape
    assert stored[f"{names[2]}.weight_center"].shape == (math.ceil(n * k / 32),)
    n, k = linears(source)[names[3]].shape
    assert stored[f"{names[3]}.weight_scale"].shape == (n + k,)
    assert sum(t.nbytes for t in stored.values()) == plan.bytes_after
    schemes = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["schemes"]
    assert set(wanted) <= set(schemes)


def test_weights_of_zeros_stay_zeros(source: Path, tmp_path: Path) -> None:
    """Also in formats without a zero: what comes back is below the normal numbers."""
    for text in [f"{name}:b16" for name, info in FORMATS.items() if info.signed] + ["dynamic4:rank1"]:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        x[1] = 0
        x[:, 5] = 0
        back = quantize_matrix(x, TensorSpec.parse(text)).dequantize()
        assert bool(torch.isfinite(back).all()), text
        assert float(back[1].abs().max()) <= torch.finfo(torch.float32).tiny, text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_power_of_two_groups_are_finer_and_exact_powers(dtype: torch.dtype) -> None:
    make: Callable[..., torch.Generator] = torch.Generator().manual_seed
    x = torch.randn(8, 256, generator=make(0)) * torch.randn(
        8, 32, generator=make(1)
    ).exp().repeat_interleave(8, 1)
    plain = quantize_matrix(x, TensorSpec.parse("int4:g64"), scale_dtype=dtype)
    inner = quantize_matrix(x, TensorSpec.parse("int4:g64:pow2=8"), scale_dtype=dtype)
    assert inner.shift is not None
    assert torch.equal(inner.scale, plain.scale)
    errors = [float((q.dequantize() - x).square().sum()) for q in (inner, plain)]
    assert errors[0] < 0.5 * errors[1]
    outer, small = x.reshape(8, 4, 64).abs().amax(-1), x.reshape(8, 32, 8).abs().amax(-1)
    wanted = (outer.repeat_interleave(8, 1) / small).log2().floor().clamp(0, 15)
    assert torch.equal(inner.shift.float(), wanted)


def test_the_command_line_quantizes_inspects_and_evaluates_them(tmp_path: Path) -> None:
    model, out, file = tmp_path / "model", tmp_path / "out", tmp_path / "recipe.yaml"
    save_tiny("llama", model)
    save_tokenizer(model)
    file.write_text(
        "rules:\n"
        '  - {match: "*.q_proj", weights: "kmeans3:channel"}\n'
        '  - {match: "@attention", weights: "quantile4:b64"}\n'
        '  - {match: "@mlp", weights: "dynamic4:b64"}\n'
        "steps: [{proxy: {share: 0.05}}, {rtn: {scale: mse-signed}}]\n"
        "calibration: {source: random, samples: 2, length: 32}\n"
    )
    command("quantize", model, "--recipe", file, "-o", out).ok()
    command("inspect", out, "--audit").ok()
    words = ("--against", model, "--windows", "2", "--length", "32", "--json")
    found = json.loads(command("eval", out, *words).ok().out)
    assert "kl" in json.dumps(found)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose inputs tiles of 128 divide, with outputs (of k, v and gate) that end inside one."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_hidden_layers": 2, "vocab_size": 160, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **more, architectures=["LlamaForCausalLM"], pad_token_id=None)
    random_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_fp8_in_tiles_everywhere(wide: Path, tmp_path: Path) -> None:
    """zq.load and transformers compute the same to the bit; to zq's own format and back nothing is lost."""
    out = tmp_path / "out"
    made = command("quantize", wide, "--fp8-block", "-o", out, "--json").ok().json
    assert made["format"] == "compressed-tensors"
    assert audit_folder(out)["passed"]
    stored = load_file(out / "model.safetensors")
    path = "model.layers.1.self_attn.k_proj"
    assert stored[f"{path}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{path}.weight_scale"].shape == (1, 1)
    with torch.no_grad():
        ours = zq.load(out)(token_ids()).logits
        assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(out)(token_ids()).logits)
        plain = AutoModelForCausalLM.from_pretrained(wide)(token_ids()).logits
        weights_only = zq.load(out)
        for module in weights_only.modules():
            if isinstance(module, QuantLinear):
                module.scheme = replace(module.scheme, activations=None)
        unrounded = weights_only(token_ids()).logits
    assert 0 < float((ours - plain).square().mean()) < 0.03 * float(plain.square().mean())
    assert not torch.equal(ours, unrounded)
    command("export", out, "--to", "zq", "-o", tmp_path / "own").ok()
    assert torch.equal(zq.load(tmp_path / "own")(token_ids()).logits, ours)
    command("export", tmp_path / "own", "--to", "compressed-tensors", "-o", tmp_path / "back").ok()
    back = tmp_path / "back" / "model.safetensors"
    assert back.read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "steps", ["- gptq: {}", "- awq: {}\n- rtn: {}", "- rtn: {}\n- lkd: {iterations: 4, batch: 2}"]
)
def test_the_other_methods_with_tiles(steps: str, wide: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"extends: fp8-block\nsteps:\n{steps}\ncalibration: {{samples: 4, length: 32}}\n"
    )
    made = command("quantize", wide, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out", "--json").ok()
    assert made.json["format"] == "compressed-tensors"
    assert made.json["audit"]["passed"]


def test_tiles_that_do_not_divide_the_inputs(source: Path, tmp_path: Path) -> None:
    """zq's own format holds them; when another is asked for, nothing is written."""
    made = (
        command("quantize", source, "--fp8-block", "--calib", "random", "-o", tmp_path / "own", "--json")
        .ok()
        .json
    )
    assert made["format"] == "zq"
    assert "tiles of 128 inputs do not divide K=64" in str(made["notes"])
    out = tmp_path / "out"
    done = command("quantize", source, "--fp8-block", "--to", "compressed-tensors", "-o", out)
    assert done.code == 2
    assert "tiles of 128 inputs do not divide K=64" in done.err
    assert not out.exists()
