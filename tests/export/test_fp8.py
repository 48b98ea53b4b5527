"""FP8 in tiles as transformers, DeepSeek and Qwen store it: read, checked, written, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizers_utils import should_convert_module

import zq
from tests.command import run
from tests.letters import save_tokenizer
from tests.tiny import random_model, token_ids
from zq.audit import audit_folder
from zq.checkpoint.writer import CODES
from zq.convert import convert, plan_conversion
from zq.errors import ZqError
from zq.export import exporter_for, fp8
from zq.numerics.qtensor import quantize
from zq.runtime.linear import QuantLinear
from zq.spec import Scheme

SCHEME = str(fp8.SCHEME)
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
RAGGED = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


def save_model(folder: Path, sizes: dict[str, int]) -> Path:
    more = {"num_hidden_layers": 2, "vocab_size": 160, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **more, architectures=["LlamaForCausalLM"], pad_token_id=None)
    random_model(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One scale per tile -> one per value."""
    return scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def by_hand(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What DeepSeek's own scripts do, tile by tile."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[place].float().abs().max() / 448
            codes[place] = (weight[place].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}


def by_transformers(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    op = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))
    return {name.removeprefix("x."): tensor for name, tensor in op.convert({"x.weight": weight}).items()}


def theirs(
    source: Path, folder: Path, make=by_hand, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """The model as another tool would leave it, but what `modules_to_not_convert` says."""
    folder.mkdir()
    stored = json.loads((source / "config.json").read_text())
    stored["quantization_config"] = CONFIG | config
    (folder / "config.json").write_text(json.dumps(stored))
    save_tokenizer(folder)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        left = config.get("modules_to_not_convert") or ()
        if ".layers." not in name or tensor.dim() == 1 or layer in left:
            tensors[name] = tensor
            continue
        made = make(tensor)
        made["weight_scale_inv"] = made["weight_scale_inv"].to(dtype)
        tensors |= {f"{layer}.{kind}": part for kind, part in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def changed(source: Path, folder: Path, tensors: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """A copy with other fields in quantization_config, and other tensors (None: without it)."""
    folder.mkdir()
    stored = json.loads((source / "config.json").read_text())
    stored["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(stored))
    held = load_file(source / "model.safetensors") | tensors
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), SIZES)


@pytest.fixture(scope="module")
def foreign(model: Path) -> Path:
    return theirs(model, model.parent / "foreign")


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return zq.load(folder)(token_ids()).logits


@pytest.mark.parametrize("shape", [(128, 256), (384, 128)])
def test_unpack_takes_back_what_pack_gives(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, fp8.SCHEME.weights)
    packed = fp8.pack("n", q, fp8.SCHEME)
    promised = {s.name: (s.dtype, s.shape) for s in fp8.slots("n", fp8.SCHEME, shape, torch.bfloat16)}
    assert promised == {name: (CODES[t.dtype], tuple(t.shape)) for name, t in packed.items()}
    back = fp8.unpack("n", packed.__getitem__, fp8.SCHEME, shape)
    assert torch.equal(back.codes, q.codes)
    scale = packed["n.weight_scale_inv"]
    assert torch.equal(packed["n.weight"].float() * spread(scale, weight.shape), q.dequantize())


@pytest.mark.parametrize("make", [by_hand, by_transformers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_transformers(make, dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    """And of the definition, to the bit: in float32, and rounded once."""
    folder = theirs(model, tmp_path / "x", make, dtype)
    stored = load_file(folder / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    found = 0
    for name, module in zq.load(folder).named_modules():
        if isinstance(module, QuantLinear):
            found += 1
            assert str(module.scheme) == SCHEME
            weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"]
            wanted = weight.float() * spread(scale, weight.shape)
            assert torch.equal(module.dense(torch.float32), wanted), name
            dense = loaded.get_submodule(name).weight
            assert dense.dtype == torch.bfloat16
            assert torch.equal(module.dense(torch.bfloat16), dense), name
    assert found == 14


@pytest.mark.parametrize("to", ["compressed-tensors", "zq"])
def test_an_export_and_back(to: str, foreign: Path, tmp_path: Path) -> None:
    """float32 scales stay float32, in a model of bf16."""
    report = convert(plan_conversion(foreign, to), tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(foreign))
    assert audit_folder(tmp_path / "out")["passed"]
    assert report["schemes"] == [SCHEME]
    assert ["14 layers have float32 scales" in note for note in report["notes"]] == [True] * (to != "zq")
    convert(plan_conversion(tmp_path / "out", "fp8"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in load_file(foreign / "model.safetensors").items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].float(), tensor.float()), name


def test_scales_in_bf16_need_no_note(model: Path, tmp_path: Path) -> None:
    folder = theirs(model, tmp_path / "x", dtype=torch.bfloat16)
    report = convert(plan_conversion(folder, "compressed-tensors"), tmp_path / "out")
    assert report["notes"] == []
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        stored(token_ids())  # which dequantizes
    module = zq.load(folder).get_submodule(UP)
    assert torch.equal(stored.get_submodule(UP).weight, module.dense(torch.bfloat16))


def test_quantized_by_zq(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = run("quantize", model, "--fp8-block", "--to", "fp8", "-o", out, "--json").ok().json
    assert made["format"] == "fp8"
    assert made["audit"]["passed"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == CONFIG | {"fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}
    run("inspect", out, "--audit").ok()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    module = zq.load(out).get_submodule(UP)
    assert torch.equal(loaded.get_submodule(UP).weight, module.dense(torch.bfloat16))
    assert "is in format fp8 already" in run("export", out, "--to", "fp8", "-o", tmp_path / "x").err
    assert run("generate", out, "hello", "--max-tokens", "2").ok().out


@pytest.mark.parametrize(
    ("text", "shape", "transposed", "words"),
    [
        (SCHEME, (128, 128), True, "Conv1D"),
        ("e4m3fn:channel @ e4m3fn:token", (128, 128), False, f"has {SCHEME} only"),
        ("e4m3fn:128x128", (128, 128), False, f"has {SCHEME} only"),
        ("e4m3fn:64x64 @ e4m3fn:g64", (128, 128), False, f"has {SCHEME} only"),
        (SCHEME, (192, 128), False, "do not divide both sides of [192, 128]"),
    ],
)
def test_what_it_cannot_hold(text: str, shape: tuple[int, int], transposed: bool, words: str) -> None:
    assert fp8.refuse(fp8.SCHEME, (256, 384), False, torch.bfloat16) is None
    assert words in (fp8.refuse(fp8.adapt(Scheme.parse(text)), shape, transposed, torch.bfloat16) or "")
    assert "not 'lm_head'" in (fp8.refuse_all({"lm_head": fp8.SCHEME}, []) or "")


NAMES = [
    "model.layers.1.mlp.up_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\]; zq reads \[128, 128\]"),
        ({"weight_block_size": None}, r"weight_block_size is null; zq reads \[128, 128\]"),
        ({"weight_block_size": [128.0, 128]}, r"weight_block_size is \[128.0, 128\]; zq reads \[128, 128\]"),
        ({"activation_scheme": "static"}, 'is "static"; zq reads "dynamic" .scales made for each token'),
        ({"fmt": "e5m2"}, 'fmt is "e5m2"; zq reads "e4m3" or null'),
        ({"scale_fmt": "ue8m0"}, 'scale_fmt is "ue8m0"; zq reads "float" or null'),
        ({"modules_to_convert": ["embed_tokens"]}, "modules_to_convert is .* zq reads null"),
        ({"modules_to_not_convert": "lm_head"}, 'is "lm_head"; zq reads a list of names'),
        (
            {"modules_to_not_convert": ["a"], "ignored_layers": ["b"]},
            "ignored_layers is .* zq reads null or the",
        ),
        (
            {"modules_to_not_convert": [], "ignored_layers": ["lm_head"]},
            "ignored_layers is .* zq reads null or",
        ),
        ({"modules_to_not_convert": ["down_proj"]}, "leaves out 'down_proj', .* covers '.*1.mlp.down_proj'"),
        ({"ignored_layers": ["model.layers.11"]}, r"covers 'model\.layers\.11\.mlp\.up_proj' and for vLLM"),
        (
            {"modules_to_not_convert": ["(.*)*x"]},
            "transformers takes for a pattern .* list the full names of",
        ),
        (
            {"modules_to_not_convert": ["model.layers.1.mlp.gate_up_proj"]},
            "vLLM takes for layers that it fuses",
        ),
        ({"modules_to_not_convert": ["norm"]}, "does not leave out 'lm_head', .* add it to modules_to_not"),
        ({"modules_to_not_convert": []}, "does not leave out 'lm_head'"),
    ],
)
def test_what_a_config_says_otherwise(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ZqError, match=words):
        fp8.schemes(CONFIG | fields, NAMES)
    with pytest.raises(ZqError, match="activation_scheme is missing"):
        fp8.schemes({"quant_method": "fp8"}, NAMES)


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_layers_that_stay(key: str) -> None:
    assert exporter_for(CONFIG, "here") is fp8
    assert fp8.schemes(CONFIG, NAMES) == dict.fromkeys(NAMES[:3], fp8.SCHEME)
    both = {key: ["lm_head"] for key in fp8.LISTS}
    assert fp8.schemes(CONFIG | both, NAMES) == fp8.schemes(CONFIG, NAMES)
    listed = ["lm_head", NAMES[2], "model.layers.1.mlp.up", "model.layers.1.input_layernorm"]
    assert list(fp8.schemes(CONFIG | {key: listed}, NAMES)) == NAMES[:2]
    assert fp8.schemes(fp8.config({NAMES[0]: fp8.SCHEME}, NAMES[1:]), NAMES) == {NAMES[0]: fp8.SCHEME}


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "up_proj",
        "model.layers.1",
        "model.layers",
        "",
        "mlp.up_proj",
        "mlp",
        "layers.1",
        "model.",
    ],
)
def test_the_rule_is_that_of_transformers(entry: str) -> None:
    for name in NAMES:
        assert fp8._covers(entry, name) is not should_convert_module(name, [entry]), name


NAN = float("nan")
BROKEN = [
    ({f"{UP}.weight_scale_inv": None}, f"1 tensors are missing, first '{UP}.weight_scale_inv'"),
    ({f"{UP}.weight_scale_inv": torch.ones(2, 3)}, "with [2, 3] instead of [3, 2]"),
    (
        {f"{UP}.weight_scale_inv": torch.ones(3, 2, dtype=torch.uint8)},
        "with U8 instead of BF16 or F16 or F32",
    ),
    ({f"{UP}.weight": torch.ones(384, 256)}, "with F32 instead of F8_E4M3"),
    ({f"{UP}.weight_scale": torch.ones(1)}, f"belong to no part of this model, first '{UP}.weight_scale'"),
    ({f"{UP}.weight_scale_inv": torch.tensor([[NAN, 1], [1, 1], [1, 1]])}, "1 tensors of scales hold NaN"),
]


@pytest.mark.parametrize(("tensors", "words"), BROKEN)
def test_tensors_that_do_not_fit(tensors: dict, words: str, foreign: Path, tmp_path: Path) -> None:
    folder = changed(foreign, tmp_path / "x", tensors)
    done = run("doctor", folder, "--for", "vllm")
    assert done.code == 2
    assert words in done.out + done.err
    assert run("serve", folder, "--engine", "vllm", "--print").code == 2
    for read in (zq.load, lambda x: convert(plan_conversion(x, "zq"), tmp_path / "out")):
        with pytest.raises(ZqError):
            read(folder)


def test_a_weight_that_is_no_number(foreign: Path, tmp_path: Path) -> None:
    codes = load_file(foreign / "model.safetensors")[f"{UP}.weight"]
    codes[3, 5] = NAN
    folder = changed(foreign, tmp_path / "x", {f"{UP}.weight": codes})
    with pytest.raises(ZqError, match=rf"'{UP}\.weight' holds 1 NaN or Inf; quantize or download"):
        zq.load(folder)


def test_a_list_that_the_tensors_contradict(model: Path, foreign: Path, tmp_path: Path) -> None:
    left = theirs(model, tmp_path / "left", modules_to_not_convert=["lm_head", DOWN])
    assert not isinstance(zq.load(left).get_submodule(DOWN), QuantLinear)
    assert "FP8 in tiles" in run("doctor", left, "--for", "vllm", "--for", "sglang").ok().out
    more = changed(left, tmp_path / "more", {}, modules_to_not_convert=["lm_head"])
    assert f"1 tensors are missing, first '{DOWN}.weight_scale_inv'" in run("doctor", more).out
    less = changed(foreign, tmp_path / "less", {}, modules_to_not_convert=["lm_head", DOWN])
    assert f"belong to no part of this model, first '{DOWN}.weight_scale_inv'" in run("doctor", less).out
    none = {f"{DOWN}.weight_scale_inv": None}
    bare = changed(foreign, tmp_path / "bare", none, modules_to_not_convert=["lm_head", DOWN])
    assert f"first '{DOWN}.weight' with F8_E4M3 instead of BF16 or F16 or F32" in run("doctor", bare).out


def test_the_doctor_and_the_server(foreign: Path) -> None:
    said = run("doctor", foreign, "--json").ok().json
    loads = {name.partition(":")[0]: entry["loads"] for name, entry in said.items()}
    assert loads == {"vllm": True, "sglang": True, "transformers": True, "llama.cpp": False}
    assert said["vllm:0.33:sm90"]["kernels"] == {SCHEME: "FP8 in tiles (DeepGEMM)"}
    assert said["sglang:0.5:sm90"]["kernels"] == {SCHEME: "FP8 in tiles"}
    assert "leaves activations in 16 bits" in said["transformers:5"]["warnings"][0]
    split = run("doctor", foreign, "--for", "vllm:tp=2")
    assert split.code == 2
    assert "tiles of 128 cannot be split between 2 devices" in split.out
    printed = run("serve", foreign, "--engine", "vllm", "--print").ok().out
    assert f"--model {foreign}" in printed.replace("\n", " ")


def test_tiles_that_end_at_an_edge(tmp_path: Path) -> None:
    """Outputs of k and v that 128 does not divide: read by the definition, refused by servers as fused
    layers, and not written."""
    source = save_model(tmp_path / "source", RAGGED)
    folder = theirs(source, tmp_path / "x")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"]
    assert tuple(weight.shape) == (64, 128)
    wanted = weight.float() * spread(scale, weight.shape)
    assert torch.equal(zq.load(folder).get_submodule(name).dense(torch.float32), wanted)
    assert "wrong tiles or not at all where 128 does not divide [64, 128]" in run("doctor", folder).out
    assert run("doctor", folder, "--for", "vllm").code == 2
    run("export", folder, "--to", "compressed-tensors", "-o", tmp_path / "ct").ok()
    assert torch.equal(logits(tmp_path / "ct"), logits(folder))
    refused = run("quantize", source, "--fp8-block", "--to", "fp8", "-o", tmp_path / "out")
    assert refused.code == 2
    assert "tiles of 128 do not divide both sides of [64, 128]" in refused.err
    assert "use --to zq" in refused.err
