"""Every family, quantized, audited, reloaded three ways, against the simulated model: bit for bit."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zq
from tests.simulate import SchemeOf, auto_class, block_linears, outputs, recipe, simulated
from tests.tiny import TINY, save_tiny, token_ids
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe

ATTENTION = re.compile(r"attn|attention(?!\.output\.LayerNorm)")


def is_attention(name: str) -> bool:
    return ATTENTION.search(name) is not None


# Name -> (rules, scheme by layer, dtype of the checkpoint, format expected unless the family has Conv1D).
SCHEMES: dict[str, tuple[str, SchemeOf, torch.dtype, str]] = {
    "w8a8": (
        "* = int8:channel @ int8:token",
        lambda name: "int8:channel @ int8:token",
        torch.float32,
        "compressed-tensors",
    ),
    "w4a16": ("* = int4:g32", lambda name: "int4:g32", torch.bfloat16, "compressed-tensors"),
    "two-level": (
        "* = int4:g32:two-level",
        lambda name: "int4:g32:two-level",
        torch.bfloat16,
        "compressed-tensors",
    ),
    "native": (
        "@attention = int4:g32:two-level @ int8:token; @mlp = e2m1fn:b64",
        lambda name: "int4:g32:two-level @ int8:token" if is_attention(name) else "e2m1fn:b64",
        torch.bfloat16,
        "zq",
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_quantized_reloaded_and_equal_to_the_simulated_model(
    name: str, scheme: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    rules, scheme_of, dtype, expected_format = SCHEMES[scheme]
    source, out = tiny(name, dtype), tmp_path / "out"
    result = quantize(make_plan(source, recipe(rules)), out)
    reference = simulated(source, scheme_of)
    assert set(result.report["layers"]) == set(block_linears(reference))
    assert result.report["audit"]["passed"] is True
    assert result.report["format"] == ("zq" if name == "gpt2" else expected_format)
    expected = outputs(reference, token_ids())
    assert torch.equal(outputs(zq.load(str(out)), token_ids()), expected)
    model, info = auto_class(reference).from_pretrained(out, output_loading_info=True)
    # The class builds a pooler for every checkpoint, quantized or not, unless it is told not to.
    pooler = {"pooler.dense.weight", "pooler.dense.bias"} if name.endswith("-nopooler") else set()
    assert set(info["missing_keys"]) == pooler
    for problem in ("unexpected_keys", "mismatched_keys"):
        assert not info[problem], (problem, info[problem])
    if name.startswith("opt") and scheme == "w8a8":
        expected = outputs(simulated(source, scheme_of, library=True), token_ids())
    assert torch.equal(outputs(model.eval(), token_ids()), expected)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert abs(written - result.report["bytes_after"]) < 40_000  # the header


def test_mixed_precision_in_one_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """ZeroQuant's mix, with exact tensors compared one by one."""
    for name in ("llama", "bert", "gpt_neox"):
        rules = "@mlp = int4:g32 @ int8:token; @attention = int8:channel @ int8:token"
        source, out = tiny(name), tmp_path / name
        quantize(make_plan(source, recipe(rules, scale="absmax")), out)
        reference = simulated(
            source,
            lambda n: "int8:channel @ int8:token" if is_attention(n) else "int4:g32 @ int8:token",
            "absmax",
        )
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["format"] == "mixed-precision"
        model = auto_class(reference).from_pretrained(out).eval()
        assert torch.equal(outputs(model, token_ids()), outputs(reference, token_ids()))


def test_a_named_layer_outside_of_the_blocks_is_quantized_too(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    quantize(make_plan(source, recipe("lm_head = int8:channel; *.0.* = int4:g32")), out)
    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight_packed" in tensors
    assert "model.layers.1.mlp.up_proj.weight" in tensors, "no rule names block 1"
    assert "model.layers.0.mlp.up_proj.weight_packed" in tensors


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "opt"])
def test_untouched_tensors_are_the_bytes_of_the_source_and_ties_stay(
    name: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tiny(name, torch.bfloat16), tmp_path / "out"
    quantize(make_plan(source, recipe("* = int8:channel")), out)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    weights = {f"{n}.weight" for n in block_linears(zq.load(str(source)))}
    kept = set(before) - weights
    assert kept == {n for n in after if not re.search(r"\.weight_(packed|scale|shape)$", n)}
    assert all(torch.equal(before[n], after[n]) for n in kept)
    loaded = zq.load(str(out))
    head, inputs = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight.data_ptr() == inputs.weight.data_ptr()


def test_mixed_dtypes_shards_and_facts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """fp32 norms in a bf16 model keep their dtype; several shards; the report counts what is written."""
    source, out = tmp_path / "mixed", tmp_path / "out"
    save_tiny("llama", source, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.float() if "norm" in n else t for n, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = make_plan(source, recipe("* = int4:g32"), shard_bytes=20_000)
    result = quantize(plan, out, command="zq quantize X")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3
    after = {n: t for file in shards for n, t in load_file(file).items()}
    assert after["model.norm.weight"].dtype == torch.float32
    assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert plan.bytes_after == sum(t.nbytes for t in after.values()) == result.report["bytes_after"]
    assert result.report["bytes_before"] == sum(t.nbytes for t in tensors.values())
    quantized = [n for n in after if re.search(r"weight_(packed|scale|shape)$", n)]
    values = sum(math.prod(after[n].tolist()) for n in after if n.endswith("weight_shape"))
    bits = 8 * sum(after[n].nbytes for n in quantized) / values
    assert result.report["bits_per_weight"] == pytest.approx(bits)
    assert json.loads((out / "zq_report.json").read_text()) == result.report
    assert {p.name for p in out.iterdir() if p.name.startswith(".")} == set()


def test_progress_names_every_unit_and_errors_grow_from_zero(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    events: list[dict] = []
    source = tiny("llama")
    result = quantize(make_plan(source, recipe("*.1.* = int4:g32")), tmp_path / "out", progress=events.append)
    assert events[0] == {"calibration": result.report["calibration"]}
    assert [e["unit"] for e in events[1:]] == ["outside", "model.layers.0", "model.layers.1", "tail"]
    errors = result.report["output_error"]
    assert errors["0"] == 0.0, "block 0 is not quantized"
    assert 1e-5 < errors["1"] < 0.5


def test_the_measured_error_is_that_of_the_simulated_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """||q - f||^2 / ||f||^2 of the hidden states after the last block, from two whole models."""
    source = tiny("llama")
    plan = make_plan(source, recipe("* = int4:g32 @ int8:token"))
    result = quantize(plan, tmp_path / "out")
    assert plan.windows is not None
    hidden = []
    for scheme_of in (lambda n: None, lambda n: "int4:g32 @ int8:token"):
        model, caught = simulated(source, scheme_of), []
        model.model.layers[-1].register_forward_hook(lambda m, a, out, c=caught: c.append(out))
        with torch.no_grad():
            model(plan.windows)
        hidden.append(caught[0][0] if isinstance(caught[0], tuple) else caught[0])
    expected = float((hidden[1] - hidden[0]).square().sum() / hidden[0].square().sum())
    assert result.report["output_error"]["1"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "bad", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_tensor_and_leave_nothing(bad: str, value: float, tmp_path: Path) -> None:
    source, out = tmp_path / "bad", tmp_path / "sub" / "out"
    save_tiny("llama", source)
    tensors = load_file(source / "model.safetensors")
    tensors[bad].reshape(-1)[3] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError) as caught:
        quantize(make_plan(source, recipe("* = int4:g32")), out)
    assert bad in str(caught.value)
    assert "NaN or Inf" in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("*.up_prj = int4:g32", "rule '*.up_prj' matches no linear layer"),
        ("* = int4:g48", "which groups of 48 do not divide; sizes that fit every layer: 16, 32, 64"),
        ("lm_head = int8:channel", "shares its weight with model.embed_tokens.weight"),
    ],
)
def test_plans_that_cannot_be(rules: str, words: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(ZqError) as caught:
        make_plan(tiny("llama-tied"), recipe(rules))
    assert words in str(caught.value)


def test_automatic_groups_and_a_format_that_is_asked_for(tiny: Callable[..., Path]) -> None:
    plan = make_plan(tiny("llama"), recipe("* = int4:gauto"))
    assert {str(s) for s in plan.assigned.values()} == {"int4:g64"}
    assert any("group size 64: 128 does not divide 64" in note for note in plan.notes)
    assert make_plan(tiny("llama"), recipe("* = int4:g32", format="zq")).format == "zq"
    with pytest.raises(ZqError, match=r"compressed-tensors cannot hold .* no flat blocks; use --to zq"):
        make_plan(tiny("llama"), recipe("* = int4:b64", format="compressed-tensors"))


def test_ragged_groups_in_the_native_format(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    quantize(make_plan(source, recipe("* = int4:g48:asym", format="zq")), out)
    expected = outputs(simulated(source, lambda name: "int4:g48:asym"), token_ids())
    assert torch.equal(outputs(zq.load(str(out)), token_ids()), expected)


def test_no_calibration_gives_the_same_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama")
    text = str(recipe("* = int4:g32"))
    quantize(make_plan(source, Recipe.parse(text)), tmp_path / "a")
    none = make_plan(source, Recipe.parse(text.replace("source: random", "source: none")))
    report = quantize(none, tmp_path / "b").report
    assert report["output_error"] == {}
    same = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert same[0] == same[1]


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_that_stores_both_copies(equal: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Equal copies stay tied and are written once; two that differ stay two, as in transformers."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("llama-tied"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not equal:
        tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError, match=r"'lm_head' shares its weight with model.embed_tokens.weight"):
        make_plan(source, recipe("* = int8:channel; lm_head = int8:channel"))
    plan = make_plan(source, recipe("* = int8:channel"))
    assert any("they are stored and differ" in note for note in plan.notes) is not equal
    quantize(plan, out)
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not equal
    expected = outputs(simulated(source, lambda name: "int8:channel"), token_ids())
    assert torch.equal(outputs(zq.load(out), token_ids()), expected)
    model = auto_class(zq.load(source)).from_pretrained(out)
    assert torch.equal(outputs(model.eval(), token_ids()), expected)
