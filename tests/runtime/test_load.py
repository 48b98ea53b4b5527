"""zq.load and `import zq` beside transformers: what loads, what is refused, what can be saved again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import zq
from tests.simulate import outputs, recipe
from tests.tiny import save_tiny, token_ids
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("load")
    save_tiny("llama", root / "source", torch.bfloat16)
    for name, rules in {"ct": "* = int4:g32", "zq": "* = e2m1fn:b64"}.items():
        quantize(make_plan(root / "source", recipe(rules)), root / name)
    return {name: root / name for name in ("source", "ct", "zq")}


def test_an_original_model_loads_as_it_is(folders: dict[str, Path]) -> None:
    expected = outputs(AutoModelForCausalLM.from_pretrained(folders["source"]).eval(), token_ids())
    assert torch.equal(outputs(zq.load(str(folders["source"])), token_ids()), expected)


@pytest.mark.parametrize("name", ["ct", "zq"])
def test_another_dtype_computes_with_the_same_codes(name: str, folders: dict[str, Path]) -> None:
    half, full = (zq.load(str(folders[name]), dtype=d) for d in (torch.bfloat16, torch.float32))
    assert outputs(full, token_ids()).dtype == torch.float32
    a, b = outputs(half, token_ids()).float(), outputs(full, token_ids())
    assert float((a - b).norm() / b.norm()) < 0.05
    assert not full.training


@pytest.mark.parametrize("order", ["import zq, transformers", "import transformers, zq"])
def test_import_zq_is_enough_in_a_fresh_process(order: str, folders: dict[str, Path]) -> None:
    code = (
        f"{order}; m, i = transformers.AutoModelForCausalLM.from_pretrained({str(folders['zq'])!r}, "
        "output_loading_info=True); print(len(i['missing_keys']), len(i['unexpected_keys']), "
        "sum(type(x).__name__ == 'QuantLinear' for x in m.modules()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0", "0", "14"]


def test_a_loaded_model_can_be_saved_and_loaded_again(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["zq"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again.eval(), token_ids()), outputs(model.eval(), token_ids()))


def test_two_levels_are_found_again_and_other_readers_see_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As planned here; saved by transformers, which drops zq's entry, the same weights in one level."""
    quantize(make_plan(folders["source"], recipe("* = int4:g32:two-level @ int8:token")), tmp_path / "out")
    assert not any("sub" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    ours = zq.load(str(tmp_path / "out"))
    up = ours.get_submodule("model.layers.0.mlp.up_proj")
    assert str(up.scheme) == "int4:g32:two-level @ int8:token"
    assert up.weight_sub.dtype == torch.int8
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    again = zq.load(str(tmp_path / "saved"))
    one = again.get_submodule("model.layers.0.mlp.up_proj")
    assert str(one.scheme) == "int4:g32 @ int8:token"
    assert torch.equal(one.qtensor.dequantize(), up.qtensor.dequantize())
    assert torch.equal(outputs(again, token_ids()), outputs(ours, token_ids()))


@pytest.mark.parametrize("name", ["ct", "zq"])
@pytest.mark.parametrize("change", ["missing", "left over", "shape", "scale shape", "code shape"])
def test_tensors_that_do_not_fit_are_refused(
    name: str, change: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders[name] / file).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight_scale"
    if change == "missing":
        del tensors[key]
    elif change == "left over":
        tensors["model.layers.0.mlp.other.weight"] = torch.ones(2)
    elif change == "shape":
        tensors["model.norm.weight"] = torch.ones(7).bfloat16()
    else:
        key = key.replace("scale", "packed") if change == "code shape" else key
        tensors[key] = torch.cat([tensors[key], tensors[key]])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError) as caught:
        zq.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    wanted = {
        "missing": "up_proj.weight_scale",
        "left over": "mlp.other.weight",
        "shape": "'model.norm.weight' with [7] instead of [64]",
        "scale shape": "up_proj.weight_scale' with [256",
        "code shape": "up_proj.weight_packed' with [256, ",
    }
    assert wanted[change] in str(caught.value)


def test_foreign_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ZqError, match=r"cannot read .*config\.json"):
        zq.load(str(tmp_path))
    config = json.loads((folders["ct"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folders["ct"] / "model.safetensors").read_bytes())
    with pytest.raises(ZqError, match="is quantized with 'bitsandbytes'; zq reads checkpoints of"):
        zq.load(str(tmp_path))


def test_scales_of_their_own_dtype_do_not_choose_the_dtype(tmp_path: Path) -> None:
    """With groups of 2 there are more fp32 scales than bf16 values beside them."""
    save_tiny("llama", tmp_path / "source", torch.bfloat16)
    quantize(make_plan(tmp_path / "source", recipe("* = int4:g2:s=fp32")), tmp_path / "out")
    assert zq.load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert"])
@pytest.mark.parametrize("stored", ["whole", "base"])
def test_the_native_format_loads_through_the_class_with_and_without_a_head(
    name: str, stored: str, tmp_path: Path
) -> None:
    """What was quantized as one class is, under the other's names, bit for bit the same base model."""
    source, out, again = tmp_path / "source", tmp_path / "out", tmp_path / "again"
    whole = save_tiny(name, source)
    whole_class = type(whole)
    options = {"add_pooling_layer": False} if name == "bert" else {}
    if stored == "base":
        shutil.rmtree(source)
        whole.base_model.save_pretrained(source)
    rules = "* = e2m1fn:b64" + ("; lm_head = e2m1fn:b64" if (name, stored) == ("llama", "whole") else "")
    quantize(make_plan(source, recipe(rules)), out)
    expected = zq.load(out).base_model(token_ids()).last_hidden_state
    alone, info = AutoModel.from_pretrained(out, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert torch.equal(alone.eval()(token_ids()).last_hidden_state, expected)
    inside = whole_class.from_pretrained(out).eval()
    assert torch.equal(inside.base_model(token_ids()).last_hidden_state, expected)
    alone.save_pretrained(again)
    assert torch.equal(zq.load(again)(token_ids()).last_hidden_state, expected), "saved under its own names"


def test_a_layer_of_no_class_is_still_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["zq"], tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(text.replace("layers.0.mlp.up_proj", "layers.0.mlp.upper"))
    for cls in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ZqError, match=r"quantizes '.*mlp.upper', which this model does not have"):
            cls.from_pretrained(tmp_path / "out")
