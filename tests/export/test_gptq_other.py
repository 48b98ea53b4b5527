"""GPTQ of version 1 with zero points, and of version 2 without: read, and made zq's own by an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zq
from tests.export.test_gptq_awq import GPTQ, quantized
from tests.simulate import recipe
from tests.tiny import token_ids
from zq.convert import convert, plan_conversion
from zq.errors import ZqError
from zq.export import exporter_for, gptq, gptq_other
from zq.pipeline import quantize as run
from zq.plan import make_plan


@pytest.mark.parametrize("text", GPTQ)
def test_unpack_takes_back_what_pack_gives(text: str) -> None:
    scheme, q = quantized(text)
    bits = q.spec.bits
    if q.zero is not None:
        q.zero.clamp_(min=1 - (1 << (bits - 1)))
    tensors, own = gptq_other.pack("n", q, scheme), gptq.pack("n", q, scheme)
    assert not torch.equal(tensors["n.qzeros"], own["n.qzeros"])
    back = gptq_other.unpack("n", tensors.__getitem__, scheme, q.shape)
    assert torch.equal(back.dequantize(), q.dequantize())
    config = gptq_other.config({"a.0.x": scheme}, [])
    assert config["checkpoint_format"] == ("gptq" if "asym" in text else "gptq_v2")
    assert exporter_for(config, "here") is gptq_other
    assert exporter_for(gptq.config({"a.0.x": scheme}, []), "here") is gptq
    assert {str(s) for s in gptq_other.schemes(config, ["a.0.x"]).values()} == {text.replace("half", "fp16")}


def test_a_zero_point_that_readers_take_in_two_ways() -> None:
    scheme, q = quantized("int4:g32:asym:s=half")
    tensors = gptq_other.pack("n", q, scheme)
    tensors["n.qzeros"][0, 0] |= 15
    with pytest.raises(ZqError, match=r"'n.qzeros' holds 15, .* for the zero point 16 and some for 0"):
        gptq_other.unpack("n", tensors.__getitem__, scheme, q.shape)


@pytest.mark.parametrize("rule", ["int4:g32", "int4:g32:asym"])
def test_a_checkpoint_of_another_tool(rule: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Zero points as the other version has them: the same model, and zq's own again by an export."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run(make_plan(tiny("llama", torch.bfloat16), recipe(f"* = {rule}", format="gptq")), ours)
    theirs.mkdir()
    config = json.loads((ours / "config.json").read_text())
    stored = config["quantization_config"]
    less = -1 if stored["checkpoint_format"] == "gptq" else 1
    stored["checkpoint_format"] = "gptq_v2" if less < 0 else "gptq"
    (theirs / "config.json").write_text(json.dumps(config))
    tensors = load_file(ours / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qzeros")]:
        nibbles = tensors[name][..., None] >> torch.arange(0, 32, 4) & 15
        nibbles = (nibbles - less).long()
        if bool((nibbles < 0).any()):  # a zero point 0, for which version 1 has no place
            pytest.skip("this model has a zero point 0")
        words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        tensors[name] = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        wanted = zq.load(ours)(token_ids()).logits
        assert torch.equal(zq.load(theirs)(token_ids()).logits, wanted)
    convert(plan_conversion(theirs, "gptq"), tmp_path / "again")
    back = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(ours / "model.safetensors").items():
        assert torch.equal(back[name], tensor), name
