"""Which kernels a checkpoint needs."""

from __future__ import annotations

import pytest

from zq.kernels.ops import SCHEMAS
from zq.kernels.select import gemm_op, missed, units_for
from zq.kernels.table import UNITS
from zq.recipe import load, shipped
from zq.spec import Scheme

OPS = {
    "int8:channel @ int8:token": "w8a8_int8",
    "e4m3fn:channel @ e4m3fn:token": "w8a8_fp8",
    "int4:g128:two-level @ int8:token": "w4a8_int8",
    "int4:g64:two-level @ int8:token": "w4a8_int8",
    "int4:g32:two-level @ int8:token": None,
    "int4:g128:two-level": None,
    "int4:g64 @ int8:token": "w4a8_int8_group",
    "int4:channel @ int8:token": "w4a8_int8_group",
    "int4:g64:narrow @ e4m3fn:token": "w4a8_fp8",
    "int4:channel @ e4m3fn:token": None,
    "int4:g32": "w4a16",
    "int4:channel": "w4a16",
    "int4:g32:asym": "w4a16",
    "int4:channel:asym": None,
    "int4:g128:asym @ int8:token": None,
    "int4:g16": None,
    "int4:g128:lorc=8": None,
    "int8:channel": "w8a16",
    "int8:g128": None,
    "int8:tensor": None,
    "e4m3fn:channel": None,
    "e4m3fn:128x128 @ e4m3fn:g128": "fp8_block128",
    "e4m3fn:128x128:s=fp32 @ e4m3fn:g128": "fp8_block128",
    "e4m3fn:128x128 @ e4m3fn:token": None,
    "e4m3fn:64x128 @ e4m3fn:g128": None,
    "e4m3fn:128x128:center @ e4m3fn:g128": None,
    "e4m3fn:128x128": None,
    "int3:g128": None,
    "int8:channel @ e4m3fn:token": None,
    "int8:channel @ e5m2:token": None,
    "e2m1fn:b64": None,
    "int4:g64:keep=4": None,
    "int4:g64:center": None,
    "int4:channel:pow2=4": None,
}


@pytest.mark.parametrize(("text", "op"), OPS.items())
def test_operator_of_a_scheme(text, op):
    assert gemm_op(Scheme.parse(text)) == op
    assert op is None or op in SCHEMAS


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_scheme_has_kernels(name):
    """Where the automatic group size is one of 32, 64 and 128, as it is."""
    schemes = [rule.scheme.with_group(64) for rule in load(name).rules if rule.scheme]
    for scheme in schemes:
        op = gemm_op(scheme)
        assert op is not None
        assert any(op in unit.ops for unit in units_for([scheme], "bf16"))


def test_units():
    found = units_for([Scheme.parse("int8:channel @ int8:token")], "bf16")
    quant = {unit.name for unit in found if unit.source == "quant.cu"}
    assert {"plain_int8_bf16", "silumul_int8_bf16"} <= quant
    assert all(name.endswith("_int8_bf16") for name in quant)
    assert {op for unit in found for op in unit.ops if op in ("w8a8_int8", "w4a16")} == {"w8a8_int8"}
    both = units_for([Scheme.parse("int8:channel @ int8:token")], "fp32")
    assert {unit.name for unit in both} > {unit.name for unit in found}
    assert units_for([Scheme.parse("int3:g64")], "bf16") == []
    assert found == [unit for unit in UNITS.values() if unit in found]


def test_a_decoder_needs_its_caches():
    schemes = [Scheme.parse("int4:g64")]
    without, found = units_for(schemes, "bf16"), units_for(schemes, "bf16", decoder=True)
    more = {unit.name for unit in found} - {unit.name for unit in without}
    caches = ("", "_int8", "_fp8")
    steps = {f"{what}{kv}_bf16" for what in ("attention", "store_kv", "token") for kv in caches}
    assert more == steps | {"plain_int8_bf16", "plain_fp8_bf16", "text_bf16"}
    for text, short in (("int4:g64 @ int8:token", "int8"), ("e4m3fn:channel @ e4m3fn:token", "fp8")):
        names = {unit.name for unit in units_for([Scheme.parse(text)], "bf16", decoder=True)}
        assert {name for name in names if name.startswith("text")} == {"text_bf16", f"text_{short}_bf16"}
    assert units_for([Scheme.parse("int3:g64")], "bf16", decoder=True) == []


def test_weights_alone_need_no_quantized_activations():
    found = units_for([Scheme.parse("int4:g64")], "fp16")
    assert {unit.ops for unit in found} == {("w4a16",)}
    assert all("fp16" in unit.name and "g64" in unit.name and "asym" not in unit.name for unit in found)


def test_two_level_scales_that_miss_their_kernel_are_named():
    schemes = [Scheme.parse(f"int4:g{size}:two-level @ int8:token") for size in (32, 64, 128)]
    (note,) = missed([*schemes, Scheme.parse("int4:g32:two-level"), Scheme.parse("int4:g32 @ int8:token")])
    assert "int4:g32:two-level @ int8:token" in note
    assert "groups of 64 or 128" in note
