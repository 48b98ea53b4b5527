"""zq.load and `import zq` beside transformers: what loads, what is refused, what can be saved again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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


@pytest.mark.parametrize("name", ["ct", "zq"])
@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
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
    else:
        tensors["model.norm.weight"] = torch.ones(7).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError) as caught:
        zq.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    wanted = {
        "missing": "up_proj.weight_scale",
        "left over": "mlp.other.weight",
        "shape": "model.norm.weight",
    }
    assert wanted[change] in str(caught.value)


def test_foreign_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ZqError, match=r"cannot read .*config\.json"):
        zq.load(str(tmp_path))
    config = json.loads((folders["ct"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folders["ct"] / "model.safetensors").read_bytes())
    with pytest.raises(ZqError, match="is quantized with 'gptq'; zq reads checkpoints of"):
        zq.load(str(tmp_path))
