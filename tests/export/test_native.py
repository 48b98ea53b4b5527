"""zq's own format: every spec there is, packed and taken back exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.strategies import matrices, specs
from zq.checkpoint.writer import CODES
from zq.errors import ZqError
from zq.export import EXPORTERS, exporter_for, native
from zq.numerics.qtensor import quantize
from zq.spec import Scheme, TensorSpec


@given(
    matrices(),
    specs().filter(lambda s: s.layout.kind != "token" and (s.info.signed or s.center)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_spec_survives(x: torch.Tensor, spec: TensorSpec, dtype: torch.dtype) -> None:
    scheme, shape = Scheme(spec), (x.shape[0], x.shape[1])
    q = quantize(x, spec, scale_dtype=dtype)
    packed = native.pack("n", q, scheme)
    promised = {s.name: (s.dtype, s.shape, s.nbytes) for s in native.slots("n", scheme, shape, dtype)}
    assert promised == {n: (CODES[t.dtype], tuple(t.shape), t.nbytes) for n, t in packed.items()}
    assert packed["n.weight_packed"].nbytes == math.ceil(shape[1] * spec.bits / 32) * 4 * shape[0]
    back = native.unpack("n", packed.__getitem__, scheme, shape)
    assert torch.equal(back.codes, q.codes)
    assert back.codes.dtype == q.codes.dtype
    assert torch.equal(back.dequantize(dtype), q.dequantize(dtype))
    assert native.refuse(scheme, shape, True, dtype) is None


def test_config_round_trip_and_refusals() -> None:
    assigned = {
        "a.0.q": Scheme.parse("int4:g32:two-level @ int8:token"),
        "a.0.k": Scheme.parse("e2m1fn:b64:s=fp32"),
        "a.1.q": Scheme.parse("int4:g32:two-level @ int8:token"),
    }
    config = native.config(assigned, ["lm_head"])
    assert native.schemes(config, [*assigned, "lm_head"]) == assigned
    assert len(config["schemes"]) == 2
    with pytest.raises(ZqError, match=r"quantizes 'a\.1\.q', which this model does not have"):
        native.schemes(config, ["a.0.q", "a.0.k"])
    with pytest.raises(ZqError, match=r"zq format version 2 is unknown .* upgrade zq"):
        native.schemes(config | {"format_version": 2}, assigned)
    for listed, words in (
        (["a.0.q"], r"schemes is \[\"a\.0\.q\"\]; zq reads a mapping"),
        ({"int4:g32": [["a.0.q"]]}, r"schemes\.int4:g32 is \[\[\"a\.0\.q\"\]\]; zq reads a list of names"),
        ({"int4:g32": ["a.0.q"], "int8:g32": ["a.0.q"]}, "schemes lists 'a.0.q' twice"),
        ({"int9:g32": ["a.0.q"]}, "schemes: format 'int9' is unknown"),
        ({"int4:gauto": ["a.0.q"]}, "schemes has 'int4:gauto', whose group size was never chosen"),
    ):
        with pytest.raises(ZqError, match=f"quantization_config.{words}"):
            native.schemes(config | {"schemes": listed}, assigned)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "is not quantized; zq reads"),
        ({}, "is not quantized; zq reads"),
        (
            {"quant_method": "bitsandbytes"},
            "is quantized with 'bitsandbytes'; zq reads checkpoints of: compressed-tensors, zq, gptq, awq",
        ),
    ],
)
def test_foreign_checkpoints_are_refused(config: dict | None, words: str) -> None:
    with pytest.raises(ZqError, match=words):
        exporter_for(config, "HERE")


def test_exporters_are_found_by_their_method() -> None:
    for name, module in EXPORTERS.items():
        assert exporter_for({"quant_method": name}, "HERE") is module
