"""Byte for byte what the compressed-tensors library writes, and its configuration read by its own rules."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.utils.match import match_named_modules
from torch import nn

from zq.errors import ZqError
from zq.export import compressed_tensors as ct
from zq.numerics.qtensor import QTensor, quantize
from zq.spec import Scheme

ACTIVATIONS = ["", " @ int8:token", " @ e4m3fn:token"]
SCHEMES = [
    *(f"int4:g{g}{z}{a}" for g in (32, 64) for z in ("", ":asym", ":narrow") for a in ACTIVATIONS),
    *(f"int{k}:g32:two-level" for k in range(2, 9)),
    "int4:g64:two-level @ int8:token",
    "int8:g32:two-level @ int8:token",
    *(f"int{k}:{layout}{z}" for k in range(2, 9) for layout in ("channel", "g32") for z in ("", ":asym")),
    *(f"int8:{layout} @ int8:token" for layout in ("channel", "tensor", "g32")),
    *(f"e4m3fn:{layout}{a}" for layout in ("channel", "tensor") for a in ("", " @ e4m3fn:token")),
    *(f"e4m3fn:{rows}x32{s}{a}" for rows in (4, 128) for s in ("", ":s=fp32") for a in ("", " @ e4m3fn:g32")),
]
SHAPES = [(32, 128), (6, 64), (33, 192)]


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    """What the library understands when it reads our config.json."""
    group = ct.config({"a.layers.0.x": scheme}, [])["config_groups"]["group_0"]
    return QuantizationScheme(**group)


def unpacked(q: QTensor) -> dict[str, torch.Tensor]:
    """The library's input: a weight that quantizes to exactly our codes, scale and zero point."""
    state = {"weight": q.dequantize(), "weight_scale": products(q)}
    if q.zero is not None:
        state["weight_zero_point"] = q.zero
    return state


def products(q: QTensor) -> torch.Tensor:
    """The scales as one level."""
    return q.scale if q.sub is None else (q.scale * q.sub).to(q.scale.dtype)


def quantized(text: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Scheme, QTensor]:
    scheme = Scheme.parse(text)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0] += 0.5  # zero points that differ
    return scheme, quantize(weight, scheme.weights)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_library(text: str, shape: tuple[int, int]) -> None:
    scheme, q = quantized(text, shape, torch.float32)
    assert ct.refuse(scheme, shape, False, torch.float32) is None
    theirs = library_scheme(scheme)
    compressor = BaseCompressor.get_value_from_registry(ct.format_of(scheme))
    expected = compressor.compress(unpacked(q), theirs)
    got = {name.removeprefix("n."): tensor for name, tensor in ct.pack("n", q, scheme).items()}
    assert set(got) == set(expected) == set(compressor.compression_param_names(theirs))
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert got[name].is_contiguous()
        if tensor.dtype == torch.float8_e4m3fn:  # torch keeps the sign of a zero, zq has one zero
            assert torch.equal(got[name].float(), tensor.float())
        else:
            assert torch.equal(got[name], tensor), name
    restored = compressor.decompress(got, theirs)
    assert torch.equal(restored["weight"], q.dequantize())


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_promise_what_pack_gives_and_unpack_takes_it_back(text: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        scheme, q = quantized(text, shape, dtype)
        packed = ct.pack("n", q, scheme)
        promised = {s.name: (s.dtype, s.shape, s.nbytes) for s in ct.slots("n", scheme, shape, dtype)}
        assert promised == {name: (ct.CODES[t.dtype], tuple(t.shape), t.nbytes) for name, t in packed.items()}
        back = ct.unpack("n", packed.__getitem__, scheme, shape)
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.scale, q.scale)
        assert (back.sub is None) == (q.sub is None)
        assert q.sub is None or torch.equal(back.sub, q.sub)
        assert (back.zero is None) == (q.zero is None)
        assert q.zero is None or torch.equal(back.zero, q.zero)
        assert torch.equal(back.dequantize(dtype), q.dequantize(dtype))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4:g32", "pack-quantized"),
        ("int4:g32 @ int8:token", "pack-quantized"),
        ("int4:g32 @ e4m3fn:token", "pack-quantized"),
        ("int8:channel", "pack-quantized"),
        ("int8:channel @ int8:token", "int-quantized"),
        ("e4m3fn:channel", "float-quantized"),
        ("e4m3fn:channel @ e4m3fn:token", "float-quantized"),
        ("e4m3fn:128x128 @ e4m3fn:g128", "float-quantized"),
    ],
)
def test_formats(text: str, expected: str) -> None:
    scheme = Scheme.parse(text)
    assert ct.format_of(scheme) == expected
    assert ct.config({"n": scheme}, [])["format"] == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4:b64", "no flat blocks"),
        ("int4:g32:two-level:s=fp32", "in the model's dtype"),
        ("int4:g32:s=fp32", "in the model's dtype"),
        ("e4m3fn:channel:s=fp32", "in the model's dtype"),
        ("e4m3fn:4x32:s=bf16", "in the model's dtype"),
        ("e2m1fn:g32", "no e2m1fn weights"),
        ("e5m2:channel", "no e5m2 weights"),
        ("int4:g32 @ e5m2:token", "no e5m2 activations"),
        ("int4:g32 @ int8:token:narrow", "no narrow activations"),
        ("e4m3fn:g32", "scale per channel, tensor or tile"),
        ("e4m3fn:channel @ int8:token", "no INT8 activations"),
        ("int8:channel @ e4m3fn:token", "no INT8 x FP8"),
        ("int4:tensor", "channel or group scales"),
        ("int8:tensor", "channel scales"),
        ("int8:channel:asym @ int8:token", "no zero point"),
        ("int4:g48", "groups of 48 do not divide K=128"),
        ("e4m3fn:128x48", "tiles of 48 inputs do not divide K=128"),
        ("e4m3fn:128x128 @ e4m3fn:token", "activations in groups, e4m3fn:g128, or none"),
        ("int8:128x128", "tiles there for FP8 weights only"),
    ],
)
def test_refusals_say_why(text: str, words: str) -> None:
    reason = ct.refuse(Scheme.parse(text), (32, 128), False, torch.bfloat16)
    assert reason is not None
    assert words in reason


def test_fp8_in_tiles_is_the_librarys_own_preset() -> None:
    theirs = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    ours = library_scheme(Scheme.parse("e4m3fn:128x128 @ e4m3fn:g128"))
    assert (ours.weights, ours.input_activations) == (theirs.weights, theirs.input_activations)


@pytest.mark.parametrize("shape", [(200, 256), (128, 128), (8, 384)])
def test_tiles_of_128_and_what_is_left_at_the_edge(shape: tuple[int, int]) -> None:
    scheme, q = quantized("e4m3fn:128x128 @ e4m3fn:g128", shape, torch.bfloat16)
    theirs, compressor = library_scheme(scheme), BaseCompressor.get_value_from_registry("float-quantized")
    expected = compressor.compress({"weight": q.dequantize(torch.bfloat16), "weight_scale": q.scale}, theirs)
    got = ct.pack("n", q, scheme)
    assert got["n.weight_scale"].shape == (-(-shape[0] // 128), shape[1] // 128)
    assert torch.equal(got["n.weight"].float(), expected["weight"].float())
    assert torch.equal(compressor.decompress(expected, theirs)["weight"], q.dequantize(torch.bfloat16))
    model = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    initialize_module_for_quantization(model, theirs)
    assert model.weight_scale.shape == got["n.weight_scale"].shape
    assert model.weight_scale.dtype == got["n.weight_scale"].dtype


def test_transposed_layers_are_refused() -> None:
    assert "Conv1D" in (ct.refuse(Scheme.parse("int4:g32"), (32, 128), True, torch.bfloat16) or "")


def test_a_layer_of_another_shape_is_refused() -> None:
    scheme, q = quantized("int4:g32", (32, 128), torch.float32)
    packed = ct.pack("n", q, scheme)
    with pytest.raises(ZqError, match=r"'n\.weight_shape' says \(32, 128\) but the model has \(32, 96\)"):
        ct.unpack("n", packed.__getitem__, scheme, (32, 96))


def names(blocks: int = 3) -> list[str]:
    inner = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    return [f"model.layers.{i}.{x}" for i in range(blocks) for x in inner] + ["lm_head"]


ASSIGNMENTS = {
    "one": lambda name: "int4:g32 @ int8:token" if name != "lm_head" else None,
    "mix": lambda name: (
        None
        if name == "lm_head"
        else "int4:g32 @ int8:token"
        if "mlp" in name
        else "int8:channel @ int8:token"
    ),
    "head": lambda name: "int8:channel" if name == "lm_head" else "int4:g32",
    "some blocks": lambda name: (
        None if ".1." in name else "int8:channel" if ".2." in name and "mlp" in name else "int4:g32:asym"
    ),
    "fp8": lambda name: "e4m3fn:channel @ e4m3fn:token" if "mlp" in name else None,
    "fp8 in tiles": lambda name: "e4m3fn:128x128 @ e4m3fn:g128" if "mlp" in name else "int4:g32",
}


def model_of(layers: list[str]) -> nn.Module:
    root = nn.Module()
    for name in layers:
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.add_module(leaf, nn.Linear(2, 2))
    return root


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_config_gives_every_layer_its_scheme_by_the_librarys_own_rules(case: str) -> None:
    wanted = {name: ASSIGNMENTS[case](name) for name in names()}
    assigned = {name: Scheme.parse(text) for name, text in wanted.items() if text}
    skipped = [name for name, text in wanted.items() if not text]
    config = ct.config(assigned, skipped)
    assert ct.schemes(config, names()) == assigned
    theirs = QuantizationConfig.model_validate(config)
    found: dict[str, QuantizationScheme] = {}
    for scheme in theirs.config_groups.values():
        for name, _ in match_named_modules(model_of(names()), scheme.targets, theirs.ignore):
            assert name not in found, "two groups claim one layer"
            found[name] = scheme
    assert set(found) == set(assigned)
    for name, scheme in assigned.items():
        weights = found[name].weights
        assert weights.num_bits == scheme.weights.bits
        assert weights.symmetric == scheme.weights.symmetric
        layout, tiled = scheme.weights.layout, scheme.weights.layout.kind == "tile"
        assert weights.strategy == ("block" if tiled else layout.kind)
        assert weights.group_size == (None if tiled else layout.size)
        assert weights.block_structure == ([layout.rows, layout.size] if tiled else None)
        assert found[name].format == ct.format_of(scheme)
        acts = found[name].input_activations
        assert (acts is None) == (scheme.activations is None)
        wanted = (True, "group", 128) if tiled else (True, "token", None)
        assert acts is None or (acts.dynamic, acts.strategy, acts.group_size) == wanted


@pytest.mark.parametrize("text", SCHEMES)
def test_config_is_the_inverse_of_schemes(text: str) -> None:
    scheme = Scheme.parse(text.replace(":narrow", ""))
    assert ct.schemes(ct.config({"m.layers.0.q": scheme}, ["lm_head"]), ["m.layers.0.q", "lm_head"]) == {
        "m.layers.0.q": scheme
    }


def test_two_level_groups_are_named_beside_what_the_library_knows() -> None:
    assigned = {
        "m.layers.0.q": Scheme.parse("int4:g32:two-level @ int8:token"),
        "m.layers.0.k": Scheme.parse("int4:g32 @ int8:token"),
        "m.layers.0.v": Scheme.parse("int3:g32:two-level"),
    }
    config = ct.config(assigned, [])
    assert config["zq"] == {"two_level": ["group_0", "group_2"]}
    assert ct.schemes(config, assigned) == assigned
    theirs = QuantizationConfig.model_validate(config)
    assert theirs.config_groups["group_0"].weights == theirs.config_groups["group_1"].weights
    dropped = {key: value for key, value in config.items() if key != "zq"}
    for other in (dropped, config | {"zq": None}, config | {"zq": {"two_level": []}}):
        one_level = ct.schemes(other, assigned)
        assert {str(scheme.weights) for scheme in one_level.values()} == {"int4:g32", "int3:g32"}
    assert "zq" not in ct.config({"m.layers.0.k": assigned["m.layers.0.k"]}, [])


def test_scales_that_are_not_two_level_are_refused() -> None:
    scheme, q = quantized("int4:g32", (32, 128), torch.bfloat16)
    packed = ct.pack("n", q, scheme)
    with pytest.raises(ZqError, match=r"'n\.weight_scale' is not integers times one scale per channel"):
        ct.unpack("n", packed.__getitem__, Scheme.parse("int4:g32:two-level"), (32, 128))
