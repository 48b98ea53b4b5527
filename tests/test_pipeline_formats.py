"""Every number format and every layout of scales as weights: quantized, audited, reloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zq
from tests.command import run as command
from tests.letters import save_tokenizer
from tests.simulate import block_linears
from tests.tiny import save_tiny, token_ids
from zq.audit import audit_folder
from zq.formats import FORMATS
from zq.models.find import load_config, model_class
from zq.numerics.qtensor import quantize as quantize_matrix
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe
from zq.spec import TensorSpec

LAYOUTS = ["b64", "channel", "g32", "b16:pow2=4", "b32:center", "rank1", "channel:pow2=8:s=fp32"]


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
