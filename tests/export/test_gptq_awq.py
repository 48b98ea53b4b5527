"""GPTQ and AWQ: golden words, dequantized as their readers do it, and whole checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import zq
from tests.engines import engine_python
from tests.simulate import recipe
from tests.tiny import token_ids
from zq.errors import ZqError
from zq.export import awq, gptq
from zq.numerics.qtensor import QTensor, quantize
from zq.pipeline import quantize as run
from zq.plan import make_plan
from zq.recipe import Recipe
from zq.spec import Scheme

GPTQ = [
    f"int{b}:{g}{z}:s=half" for b in (2, 3, 4, 8) for g in ("g32", "g64", "channel") for z in ("", ":asym")
]
AWQ = [f"int4:{g}:asym:s=half" for g in ("g32", "g64", "channel")]
CASES = [(gptq, text) for text in GPTQ] + [(awq, text) for text in AWQ]


def quantized(text: str, n: int = 64, k: int = 192) -> tuple[Scheme, QTensor]:
    scheme = Scheme.parse(text)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[0] += 0.5
    return scheme, quantize(weight, scheme.weights, "mse-signed", torch.bfloat16)


@pytest.mark.parametrize(("module", "text"), CASES)
def test_slots_promise_what_pack_gives_and_unpack_takes_it_back(module, text: str) -> None:
    scheme, q = quantized(text)
    assert module.refuse(scheme, q.shape, False, torch.bfloat16) is None
    tensors = module.pack("a.layers.0.x", q, scheme)
    promised = {
        s.name: (s.dtype, s.shape) for s in module.slots("a.layers.0.x", scheme, q.shape, torch.float32)
    }
    codes = {torch.int32: "I32", torch.float16: "F16"}
    assert promised == {name: (codes[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    back = module.unpack("a.layers.0.x", tensors.__getitem__, scheme, q.shape)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    read = module.schemes(module.config({"a.layers.0.x": scheme}, ["lm_head"]), ["a.layers.0.x", "lm_head"])
    assert {name: str(s) for name, s in read.items()} == {"a.layers.0.x": text.replace("half", "fp16")}


@pytest.mark.parametrize("text", GPTQ)
def test_gptq_as_a_naive_reader_sees_it(text: str) -> None:
    scheme, q = quantized(text)
    tensors = {name[2:]: t for name, t in gptq.pack("n", q, scheme).items()}
    bits, (n, k) = q.spec.bits, q.shape

    def stream(words: Tensor, i: int) -> int:
        """Value i of a stream of 32-bit words."""
        whole = sum((int(word) & 0xFFFFFFFF) << (32 * j) for j, word in enumerate(words))
        return whole >> (bits * i) & (2**bits - 1)

    version = gptq.config({"n": scheme}, [])["checkpoint_format"]
    assert version == ("gptq_v2" if "asym" in text else "gptq")
    for row, column in ((0, 0), (1, 31), (n - 1, k - 1), (7, 100)):
        group = int(tensors["g_idx"][column])
        code = stream(tensors["qweight"][:, row], column)
        zero = stream(tensors["qzeros"][group], row) + (1 if version == "gptq" else 0)
        value = (code - zero) * float(tensors["scales"][group, row])
        assert value == pytest.approx(float(q.dequantize()[row, column]), abs=1e-7)


def test_awq_as_a_naive_reader_sees_it() -> None:
    scheme, q = quantized("int4:g64:asym:s=half")
    tensors = {name[2:]: t for name, t in awq.pack("n", q, scheme).items()}
    place = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # nibble of each column, as AutoAWQ documents it
    for row, column in ((0, 0), (1, 31), (63, 191), (5, 64), (14, 77)):
        group, word, shift = column // 64, row // 8, 4 * place[row % 8]
        code = int(tensors["qweight"][column, word]) >> shift & 15
        zero = int(tensors["qzeros"][group, word]) >> shift & 15
        value = (code - zero) * float(tensors["scales"][group, row])
        assert value == pytest.approx(float(q.dequantize()[row, column]), abs=1e-7)


def test_golden_words() -> None:
    """By hand: codes 0 to 7 along the packed side; symmetric zero points of GPTQ v1 are 7, of AWQ 8."""
    codes = torch.arange(32, dtype=torch.int8).remainder(8) - 8
    scheme = Scheme.parse("int4:channel:s=half")
    q = QTensor(codes.repeat(32, 1), torch.ones(32, 1).half(), None, None, scheme.weights)
    tensors = gptq.pack("n", q, scheme)
    assert tensors["n.qweight"][:, 0].tolist() == [0x76543210] * 4
    assert tensors["n.qzeros"].tolist() == [[0x77777777] * 4]
    q = QTensor(codes.repeat(32, 1).T.contiguous(), torch.ones(32, 1).half(), None, None, scheme.weights)
    tensors = awq.pack("n", q, scheme)
    assert tensors["n.qweight"][0].tolist() == [0x75316420] * 4
    assert [word & 0xFFFFFFFF for word in tensors["n.qzeros"][0].tolist()] == [0x88888888] * 4


def test_words_are_those_of_gptqmodel(tmp_path: Path) -> None:
    """Every width, group and version, packed by the library's own layers in an environment of its own."""
    python = engine_python("gptq")
    cases, inputs, wanted = [], {}, {}
    for i, (module, text) in enumerate(CASES):
        scheme, q = quantized(text)
        name, bits = f"x{i}", q.spec.bits
        zeros = torch.zeros(q.scale.shape) if q.zero is None else q.zero.float()
        inputs |= {f"{name}.weight": q.dequantize(), f"{name}.scales": q.scale.float()}
        inputs |= {f"{name}.zeros": (zeros + 2 ** (bits - 1)).contiguous()}
        version = "" if module is awq else module.config({"n": scheme}, [])["checkpoint_format"]
        case = {"name": name, "awq": module is awq, "bits": bits, "version": version}
        cases.append(case | {"group": q.spec.layout.size or -1})
        packed = module.pack(name, q, scheme)
        wanted |= {key: tensor for key, tensor in packed.items() if not key.endswith("g_idx")}
    files = [tmp_path / file for file in ("cases.json", "in.safetensors", "out.safetensors")]
    files[0].write_text(json.dumps(cases))
    save_file(inputs, files[1])
    script = Path(__file__).with_name("gptqmodel_packs.py")
    subprocess.run([python, "-I", str(script), *map(str, files)], check=True, capture_output=True)
    theirs = load_file(files[2])
    assert set(theirs) == set(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(theirs[key], tensor), (key, cases[int(key[1:].split(".")[0])])


@pytest.mark.parametrize(
    ("module", "text", "shape", "transposed", "words"),
    [
        (gptq, "int4:g32:s=half", (32, 64), True, "Conv1D"),
        (gptq, "int4:g32:s=half @ int8:token", (32, 64), False, "no quantized activations"),
        (gptq, "int5:g32:s=half", (32, 64), False, "no int5 weights"),
        (gptq, "int4:b32:s=half", (32, 64), False, "per group and per channel"),
        (gptq, "int4:g32:two-level:s=half", (32, 64), False, "one level"),
        (gptq, "int4:g32", (32, 64), False, "scales of the format are fp16"),
        (gptq, "int4:g64:s=half", (32, 96), False, "do not divide K=96"),
        (gptq, "int4:g32:s=half", (24, 64), False, "multiples of 32"),
        (awq, "int4:g32:s=half", (32, 64), False, "add 'asym'"),
        (awq, "int8:g32:asym:s=half", (32, 64), False, "no int8 weights"),
    ],
)
def test_what_they_cannot_hold(module, text, shape, transposed, words: str) -> None:
    reason = module.refuse(Scheme.parse(text), shape, transposed, torch.bfloat16)
    assert reason
    assert words in reason


def test_layers_that_do_not_go_together() -> None:
    four, eight = Scheme.parse("int4:g32:s=half"), Scheme.parse("int8:g32:s=half")
    both = {"a.0.x": four, "a.0.y": eight}
    for module in (gptq, awq):
        assert "one scheme for all layers" in module.refuse_all(both, [])
        assert "not 'lm_head'" in module.refuse_all({"a.0.x": four, "lm_head": four}, [])
        assert module.refuse_all({"a.0.x": four}, ["lm_head"]) is None
    assert "'a.0.y' is skipped" in gptq.refuse_all({"a.0.x": four}, ["a.0.y"])
    assert awq.refuse_all({"a.0.x": four}, ["a.0.y"]) is None


@pytest.mark.parametrize(
    ("module", "change", "words"),
    [
        (gptq, {"bits": 5}, "bits is 5; zq reads 2, 3, 4, 8 there"),
        (gptq, {"bits": "4"}, 'bits is "4"; zq reads 2, 3, 4, 8 there'),
        (gptq, {"group_size": 0}, "group_size is 0; zq reads -1 and whole numbers from 2 on"),
        (gptq, {"group_size": "64"}, 'group_size is "64"'),
        (gptq, {"sym": "false"}, 'sym is "false"; zq reads true or false'),
        (
            gptq,
            {"checkpoint_format": "marlin"},
            'checkpoint_format is "marlin"; zq reads "gptq" or "gptq_v2"',
        ),
        (gptq, {"lm_head": True}, "lm_head is true; zq reads false"),
        (gptq, {"desc_act": True}, "desc_act is true; zq reads false (static groups)"),
        (gptq, {"dynamic": {"-:x": {}}}, 'dynamic is {"-:x": {}}; zq reads null (one scheme for all layers'),
        (awq, {"version": "gemv"}, 'version is "gemv"; zq reads "gemm"'),
        (awq, {"zero_point": False}, "zero_point is false; zq reads true"),
        (awq, {"bits": 8}, "bits is 8; zq reads 4 there"),
        (awq, {"modules_to_not_convert": "x"}, 'modules_to_not_convert is "x"; zq reads a list of names'),
    ],
)
def test_configs_that_cannot_be_read(module, change: dict, words: str) -> None:
    text = "int4:g32:s=half" if module is gptq else "int4:g32:asym:s=half"
    config = module.config({"a.0.x": Scheme.parse(text)}, []) | change
    with pytest.raises(ZqError, match=re.escape(f"quantization_config.{words}")):
        module.schemes(config, ["a.0.x"])


def test_act_order_and_false_symmetry_are_refused() -> None:
    scheme, q = quantized("int4:g32:s=half")
    tensors = gptq.pack("n", q, scheme)
    mixed = tensors | {"n.g_idx": tensors["n.g_idx"].flip(0)}
    with pytest.raises(ZqError, match="act-order"):
        gptq.unpack("n", mixed.__getitem__, scheme, q.shape)
    crooked = tensors | {"n.qzeros": tensors["n.qzeros"] + 1}
    with pytest.raises(ZqError, match="not symmetric"):
        gptq.unpack("n", crooked.__getitem__, scheme, q.shape)


@pytest.mark.parametrize(
    ("format", "rule"), [("gptq", "int4:g32"), ("gptq", "int8:channel:asym"), ("awq", "int4:g32")]
)
def test_a_whole_checkpoint(format: str, rule: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Written, audited and loaded; the model computes as the compressed-tensors one of the same spec does."""
    source = tiny("llama", torch.bfloat16)
    wanted = recipe(f"* = {rule}", format=format)
    report = run(make_plan(source, wanted), tmp_path / "out").report
    assert report["audit"]["passed"]
    if format == "awq":
        assert any("becomes int4:g32:asym:s=half" in note for note in report["notes"])
        rule += ":asym"
    plain = f"rules: [{{match: '*', weights: '{rule}:s=half'}}]\nformat: zq\ncalibration: {{source: none}}\n"
    run(make_plan(source, Recipe.parse(plain)), tmp_path / "zq")
    ours, other = zq.load(tmp_path / "out"), zq.load(tmp_path / "zq")
    with torch.no_grad():
        assert torch.equal(ours(token_ids()).logits, other(token_ids()).logits)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert kept["quant_method"] == format


def test_scales_in_half_are_in_both_precisions() -> None:
    weight = (
        torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 6, 64)[:, None]
    )
    for text in ("int4:g32:s=half", "int8:channel:asym:s=half", "e4m3fn:g32:s=half"):
        for scale in ("absmax", "mse"):
            stored = quantize(weight, Scheme.parse(text).weights, scale).scale
            assert stored.dtype == torch.float16
            assert torch.equal(stored.bfloat16().float(), stored.float())
            assert bool(torch.isfinite(stored).all())
