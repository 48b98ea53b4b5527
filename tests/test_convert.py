"""zq export: every pair of formats keeps every value, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import zq
from tests.command import run as command
from tests.tiny import save_tiny, token_ids
from zq.audit import audit_folder
from zq.convert import convert, plan_conversion, restate
from zq.errors import ZqError
from zq.numerics.qtensor import quantize as quantize_tensor
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe
from zq.runtime.load import quantization_config
from zq.spec import TensorSpec

Make = Callable[..., Path]
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made(format, spec) -> a tiny Llama in that format; not to be changed."""
    found: dict[tuple[str, str], Path] = {}

    def make(format: str, spec: str) -> Path:
        if (format, spec) not in found:
            weights, lorc, _ = spec.partition(":lorc")
            steps = "[{rtn: {}}, {lorc: {rank: 2, weighting: none}}]" if lorc else "[{rtn: {}}]"
            text = f"rules: [{{match: '*', weights: '{weights}'}}]\nformat: {format}\nsteps: {steps}\n"
            out = tmp_path_factory.mktemp("made") / "out"
            recipe = Recipe.parse(f"{text}calibration: {{source: none}}\n")
            quantize(make_plan(tiny("llama", torch.bfloat16), recipe), out)
            found[format, spec] = out
        return found[format, spec]

    return make


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return zq.load(folder)(token_ids()).logits


PAIRS = [
    ("compressed-tensors", "int4:g32", "gptq"),
    ("compressed-tensors", "int4:g32", "zq"),
    ("compressed-tensors", "int4:g32", "awq"),
    ("compressed-tensors", "int4:g32:asym", "awq"),
    ("compressed-tensors", "int4:g32:two-level", "gptq"),
    ("compressed-tensors", "int4:g32:two-level", "awq"),
    ("compressed-tensors", "int4:g32:two-level", "zq"),
    ("compressed-tensors", "int8:channel", "gptq"),
    ("gptq", "int4:g32", "compressed-tensors"),
    ("gptq", "int3:g64:asym", "compressed-tensors"),
    ("gptq", "int4:channel:asym", "awq"),
    ("awq", "int4:g32:asym", "gptq"),
    ("awq", "int4:g32:asym", "compressed-tensors"),
    ("awq", "int4:g32:asym", "zq"),
    ("zq", "int4:g32:two-level", "compressed-tensors"),
    ("zq", "e4m3fn:40x32", "compressed-tensors"),
    ("zq", "int2:g32:s=half", "gptq"),
    ("zq", "int4:g32:s=bf16", "compressed-tensors"),
]


@pytest.mark.parametrize(("before", "spec", "to"), PAIRS)
def test_the_model_computes_the_same(before: str, spec: str, to: str, made: Make, tmp_path: Path) -> None:
    source, out = made(before, spec), tmp_path / "out"
    report = convert(plan_conversion(source, to), out)
    assert torch.equal(logits(out), logits(source))
    config = quantization_config(out)
    assert config
    assert config["quant_method"] == to
    assert audit_folder(out)["passed"]
    assert report["converted_from"]["quant_method"] == before
    if (source / "generation_config.json").is_file():
        same = "generation_config.json"
        assert (out / same).read_bytes() == (source / same).read_bytes()
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert card["tags"] == ["zq", to]
    back = tmp_path / "back"
    convert(plan_conversion(out, before), back)
    assert torch.equal(logits(back), logits(source))


@pytest.mark.parametrize(
    ("before", "spec", "to", "words"),
    [
        ("compressed-tensors", "int5:g32", "gptq", "no int5 weights"),
        ("compressed-tensors", "int8:channel", "awq", "no int8 weights"),
        ("compressed-tensors", "e4m3fn:channel", "gptq", "no e4m3fn weights"),
        ("zq", "e2m1fn:b32", "compressed-tensors", "no flat blocks"),
        ("zq", "int4:g32:lorc=2", "compressed-tensors", "no low-rank"),
    ],
)
def test_what_the_other_format_cannot_hold(before: str, spec: str, to: str, words: str, made: Make) -> None:
    source = made(before, spec)
    with pytest.raises(ZqError, match=words):
        plan_conversion(source, to)


def test_scales_that_the_other_dtype_does_not_hold_are_refused_and_nothing_stays(
    made: Make, tmp_path: Path
) -> None:
    """fp32 scales of zq's own format in a bf16 model; and a bf16 scale below what fp16 holds."""
    with pytest.raises(ZqError, match="bfloat16 does not hold exactly"):
        convert(plan_conversion(made("zq", "int4:g32:s=fp32"), "compressed-tensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    q = quantize_tensor(torch.full((32, 32), 1e-9).bfloat16(), TensorSpec.parse("int4:g32"))
    with pytest.raises(ZqError, match="'x' has scales that float16 does not hold exactly"):
        restate(q, TensorSpec.parse("int4:g32:s=half"), torch.bfloat16, "x")


def widened(source: Path, folder: Path, factor: float, dtype: torch.dtype = torch.float32) -> Path:
    """A copy as another tool would leave it: wider scales, which config.json does not say."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("weight_scale", ".scales")):
            tensors[name] = (tensor.float() * factor).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


WIDE = [
    ("compressed-tensors", "int4:g32"),
    ("compressed-tensors", "int4:g32:asym"),
    ("compressed-tensors", "int8:channel"),
    ("compressed-tensors", "e4m3fn:channel"),
    ("compressed-tensors", "e4m3fn:tensor"),
    ("compressed-tensors", "e4m3fn:32x32"),
    ("gptq", "int4:g32"),
    ("awq", "int4:g32:asym"),
    ("zq", "int4:g32"),
]


@pytest.mark.parametrize(("format", "spec"), WIDE)
def test_float32_scales_that_no_config_tells_of_are_kept(
    format: str, spec: str, made: Make, tmp_path: Path
) -> None:
    folder = widened(made(format, spec), tmp_path / "wide", 1.001)
    stored = zq.load(made(format, spec)).get_submodule(NAME)
    loaded = zq.load(folder).get_submodule(NAME)
    assert str(loaded.scheme.weights).endswith(":s=fp32")
    assert loaded.scheme.weights.layout == stored.scheme.weights.layout
    wanted = replace(stored.qtensor, scale=stored.qtensor.scale.float() * 1.001)
    assert torch.equal(loaded.dense(torch.float32), wanted.dequantize(torch.float32))
    if format == "compressed-tensors" and "asym" not in spec:
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        theirs = AutoModelForCausalLM.from_pretrained(folder, **options).get_submodule(NAME)
        assert torch.equal(loaded.dense(torch.bfloat16), theirs.weight)
    if format != "zq":
        convert(plan_conversion(folder, "zq"), tmp_path / "zq")
        assert torch.equal(logits(tmp_path / "zq"), logits(folder))


def test_wide_scales_become_narrow_where_that_rounds_none(made: Make, tmp_path: Path) -> None:
    source = made("compressed-tensors", "int4:g32")
    convert(plan_conversion(widened(source, tmp_path / "same", 1), "gptq"), tmp_path / "gptq")
    assert torch.equal(logits(tmp_path / "gptq"), logits(source))
    with pytest.raises(ZqError, match="float16 does not hold exactly"):
        convert(plan_conversion(widened(source, tmp_path / "other", 1.001), "gptq"), tmp_path / "out")
    half = zq.load(widened(source, tmp_path / "half", 1.001, torch.float16)).get_submodule(NAME)
    assert str(half.scheme) == "int4:g32:s=fp32"  # bf16 would round them
    assert torch.equal(half.weight_scale, half.weight_scale.half().float())
    gptq = widened(made("gptq", "int4:g32"), tmp_path / "bf16", 1, torch.bfloat16)
    assert torch.equal(logits(gptq), logits(made("gptq", "int4:g32")))


def test_different_values_are_an_audit_error(made: Make, tmp_path: Path, monkeypatch) -> None:
    from zq.export import gptq

    real = gptq.pack

    def wrong(name, q, scheme):
        tensors = real(name, q, scheme)
        tensors[f"{name}.qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(gptq, "pack", wrong)
    with pytest.raises(ZqError, match=r"audit: '.*' has other values in gptq"):
        convert(plan_conversion(made("compressed-tensors", "int4:g32"), "gptq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(made: Make, tiny: Make, tmp_path: Path) -> None:
    source, out = made("compressed-tensors", "int4:g32"), tmp_path / "out"
    done = command("export", source, "--to", "gptq", "-o", out, "--json").ok().json
    assert done["format"] == "gptq"
    assert "same values" in command("export", source, "--to", "awq", "-o", tmp_path / "b").ok().out
    for words, args in (
        (
            "unknown; allowed: compressed-tensors, zq, gptq, awq",
            (source, "--to", "ggml", "-o", tmp_path / "x"),
        ),
        ("is in format gptq already", (out, "--to", "gptq", "-o", tmp_path / "x")),
        ("is not quantized; give zq quantize", (tiny("llama"), "--to", "gptq", "-o", tmp_path / "x")),
        ("exists and is not empty", (source, "--to", "gptq", "-o", out)),
    ):
        failed = command("export", *args)
        assert failed.code == 2
        assert words in failed.err
        assert not (tmp_path / "x").exists()
    assert (
        "--to ggml is unknown"
        in command("quantize", tiny("llama"), "--w4a16", "--to", "ggml", "--dry-run").err
    )


def test_a_fine_fp16_scale_is_named(made: Make, tmp_path: Path) -> None:
    """A checkpoint of another tool, whose fp16 scales have more digits than bf16."""
    source = tmp_path / "source"
    convert(plan_conversion(made("compressed-tensors", "int4:g32"), "gptq"), source)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".scales"))
    tensors[name] = tensors[name] * (1 + 2**-10)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = convert(plan_conversion(source, "zq"), tmp_path / "zq")
    assert report["notes"] == []
    with pytest.raises(ZqError, match="bfloat16 does not hold exactly"):
        convert(plan_conversion(source, "compressed-tensors"), tmp_path / "ct")
    report = convert(plan_conversion(source, "awq"), tmp_path / "awq")
    assert "1 layers have fp16 scales that bf16 does not hold" in report["notes"][0]
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert config["quantization_config"]["version"] == "gemm"


def test_a_checkpoint_without_its_tensors_is_refused(made: Make, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = quantization_config(made("gptq", "int4:g32"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZqError, match=r"tensors are missing, first '.*qweight'"):
        plan_conversion(tmp_path / "model", "zq")


def edited(
    source: Path, folder: Path, change: Callable[[dict], object], **tensors: torch.Tensor | None
) -> Path:
    """A copy with another quantization_config and other tensors (None: without it)."""
    config = json.loads((source / "config.json").read_text())
    change(config["quantization_config"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    held = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group"), 'actorder is "group"'),
        (lambda c: c.update(transform_config={"R1": {}}), "transform_config"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (
            lambda c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
            "output_activations is .* zq reads null",
        ),
        (lambda c: c.update(ignore=5), "ignore is 5; zq reads a list of names"),
        (lambda c: c.update(ignore=["re:("]), "no regex"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=64), "do not have the shape"),
    ],
)
def test_what_a_foreign_config_says_beside_is_refused(change, words: str, made: Make, tmp_path: Path) -> None:
    source = edited(made("compressed-tensors", "int4:g32"), tmp_path / "x", change)
    with pytest.raises(ZqError, match=words):
        plan_conversion(source, "zq")


def test_a_gptq_checkpoint_of_another_kind(made: Make, tmp_path: Path) -> None:
    for i, change in enumerate(({"lm_head": True}, {"desc_act": True})):
        source = edited(
            made("gptq", "int4:g32"), tmp_path / str(i), lambda c, change=change: c.update(change)
        )
        with pytest.raises(ZqError, match=next(iter(change))):
            plan_conversion(source, "zq")
    source = edited(
        made("awq", "int4:g32:asym"), tmp_path / "awq", lambda c: c.update(modules_to_not_convert="lm_head")
    )
    with pytest.raises(ZqError, match="zq reads a list of names"):
        plan_conversion(source, "zq")


def test_tensors_that_the_model_lacks_or_does_not_know(made: Make, tmp_path: Path) -> None:
    source = made("gptq", "int4:g32")
    none = edited(source, tmp_path / "none", lambda c: None, **{"model.norm.weight": None})
    with pytest.raises(ZqError, match=r"1 tensors are missing, first 'model\.norm\.weight'"):
        plan_conversion(none, "zq")
    more = edited(source, tmp_path / "more", lambda c: None, **{"model.extra.bias": torch.zeros(3)})
    with pytest.raises(ZqError, match=r"belong to no part of this model, first 'model\.extra\.bias'"):
        plan_conversion(more, "zq")


@pytest.mark.parametrize("name", ["llama-tied", "bert-nopooler", "gpt2", "opt"])
def test_other_families_and_dtypes(name: str, tiny: Make, tmp_path: Path) -> None:
    text = "rules: [{match: '*', weights: 'int8:channel'}]\nformat: zq\ncalibration: {source: none}\n"
    source = tmp_path / "zq"
    quantize(make_plan(tiny(name, torch.float16), Recipe.parse(text)), source)
    if name == "gpt2":
        with pytest.raises(ZqError, match="Conv1D"):
            plan_conversion(source, "compressed-tensors")
        return
    convert(plan_conversion(source, "compressed-tensors"), tmp_path / "ct")
    plain = tmp_path / "plain"
    text = text.replace("format: zq", "format: compressed-tensors")
    quantize(make_plan(tiny(name, torch.float16), Recipe.parse(text)), plain)
    assert quantization_config(tmp_path / "ct") == quantization_config(plain)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ct", plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_interrupt_leaves_nothing(made: Make, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_conversion(made("gptq", "int4:g32"), "zq"), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()


def test_the_licence_stays_on_the_card(made: Make, tmp_path: Path) -> None:
    source = shutil.copytree(made("gptq", "int4:g32"), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/name\n---\n# x\n")
    convert(plan_conversion(source, "zq"), tmp_path / "out")
    card = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (card["license"], card["base_model"]) == ("apache-2.0", "org/name")


def test_an_output_inside_the_source(made: Make) -> None:
    source = made("compressed-tensors", "int4:g32")
    before = sorted(source.rglob("*"))
    for out in (source / "new", source / ".." / source.name / "a" / "b"):
        done = command("export", source, "--to", "gptq", "-o", out)
        assert done.code == 2
        assert f"lies in {source}, the checkpoint it is made from; choose another -o" in done.err
    assert sorted(source.rglob("*")) == before
