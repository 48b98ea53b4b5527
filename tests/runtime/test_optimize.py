"""zq.optimize: the fused model computes what the unoptimized one simulates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zq
from tests.runtime.quantized import (
    SCHEMES,
    W4A8,
    W4A16,
    W8A8,
    W8A16,
    distance,
    force_kernels,
    in_float32,
    quantized,
)
from tests.simulate import outputs, recipe
from tests.tiny import TINY, build_tiny, random_model, save_tiny, token_ids
from zq.errors import ZqError
from zq.kernels.table import UNITS
from zq.models.layout import is_linear
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.runtime.blocks.block import FusedBlock
from zq.runtime.blocks.site import Activation, Norm
from zq.runtime.linear import QuantLinear

# The bounds of docs/runtime.md.
FROM_SIMULATION = 4e-2  # bf16, relative to the simulation in bf16
FROM_FLOAT32 = 1.1  # bf16, relative to the distance of the simulation in bf16 from that in float32
IN_FLOAT32 = 2e-2  # a code that flips on a boundary; without activations' codes there are none:
IN_FLOAT32_16 = 2e-6


def fused_blocks(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_operators(name: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, through the operators: no further from float32 than what it replaces."""
    force_kernels(monkeypatch)
    model, ids = quantized(name, SCHEMES[scheme]), token_ids()
    exact, simulated = outputs(in_float32(model), ids), outputs(model, ids)
    found = outputs(zq.optimize(model), ids)
    assert found.dtype == torch.bfloat16
    assert 0 < len(fused_blocks(model)) == model.config.num_hidden_layers
    assert distance(found, simulated) < FROM_SIMULATION
    assert distance(found, exact) < FROM_FLOAT32 * distance(simulated, exact)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_the_cpus_own_way(name: str, scheme: str) -> None:
    model, ids = quantized(name, SCHEMES[scheme], torch.float32), token_ids()
    simulated = outputs(model, ids)
    assert model is zq.optimize(model)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert len(fused_blocks(model)) == model.config.num_hidden_layers
    bound = IN_FLOAT32_16 if scheme == "w4a16" else IN_FLOAT32
    assert distance(outputs(model, ids), simulated) < bound


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text", [W8A16, "int4:g32:asym", "int4:channel @ int8:token", "int4:g64 @ e4m3fn:token"]
)
def test_other_operators(name: str, text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    force_kernels(monkeypatch)
    model, ids = quantized(name, text, dtype), token_ids()
    exact, simulated = outputs(in_float32(model), ids), outputs(model, ids)
    found = outputs(zq.optimize(model), ids)
    assert all("kernel" in way for way in model.zq_fused.linears)
    assert distance(found, exact) < 1.5 * max(distance(simulated, exact), 1e-3)


def test_what_was_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    force_kernels(monkeypatch)
    model, report = zq.optimize(quantized("llama", W4A8), report=True)
    assert report is model.zq_fused
    assert str(report).splitlines() == [
        "linears: 14 x zq's kernel w4a8_int8_group",
        "fused: 2 x q, k, v in one product, 2 x gate and up in one product, 4 x norm + quantization, "
        "2 x activation + quantization, 2 x block",
        "as they were: 1 x linear: not quantized",
        "CUDA graphs: no",
    ]
    assert zq.optimize(model, report=True)[1] is report, "a second time changes nothing"


SOME: dict[str, tuple[Callable[[str], str | None], str]] = {
    "a bf16 block": (lambda name: None if ".0." in name else W4A8, "1 x block: no layer is quantized by zq"),
    "a bf16 layer": (lambda name: None if "up_proj" in name else W4A8, "3 x linear: not quantized"),
    "a bf16 qkv": (lambda name: None if "self_attn" in name else W4A8, "9 x linear: not quantized"),
    "without activations": (lambda name: W4A16 if "v_proj" in name else W4A8, ""),
    "no kernel": (lambda name: "int3:g32 @ int8:token" if "down" in name else W8A8, ""),
    "powers of two": (lambda name: "int4:g64:pow2=16 @ int8:token" if "gate" in name else W4A8, ""),
}


@pytest.mark.parametrize("what", SOME)
def test_what_is_mixed_falls_back_where_it_must(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_kernels(monkeypatch)
    rule, left = SOME[what]
    model, ids = quantized("llama", rule), token_ids()
    exact, simulated = outputs(in_float32(model), ids), outputs(model, ids)
    found = outputs(zq.optimize(model), ids)
    assert distance(found, exact) < FROM_FLOAT32 * distance(simulated, exact)
    assert left in str(model.zq_fused)
    assert len(fused_blocks(model)) == 2 - (what == "a bf16 block")


@pytest.mark.parametrize(
    ("name", "changes", "fused"),
    [
        ("gpt2", {"reorder_and_upcast_attn": True}, False),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, True),
        ("gpt2", {"activation_function": "relu"}, True),
        ("llama", {"hidden_act": "gelu"}, True),
        ("opt", {"layer_norm_elementwise_affine": False}, True),
        ("opt", {"enable_bias": False}, True),
        ("gptj", {"rotary_dim": 16}, True),
        ("bloom", {"n_head": 8}, True),
        ("bert", {"hidden_act": "relu"}, True),
    ],
)
def test_variants(name: str, changes: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force_kernels(monkeypatch)
    config = TINY[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = quantized(name, W8A8, model=random_model(config, torch.bfloat16))
    ids = token_ids()
    exact, simulated = outputs(in_float32(model), ids), outputs(model, ids)
    found = outputs(zq.optimize(model), ids)
    assert bool(fused_blocks(model)) is fused
    assert distance(found, exact) < FROM_FLOAT32 * distance(simulated, exact)


def test_padding_and_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    force_kernels(monkeypatch)
    ids, mask = token_ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = mask[2, :2] = 0
    for name in ("llama", "bloom", "gptj", "roberta"):
        model = quantized(name, W8A8)
        if name == "llama":
            model.set_attn_implementation("eager")
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask)[0]
            found = zq.optimize(model)(input_ids=ids, attention_mask=mask)[0]
        seen = mask.bool()
        assert distance(found[seen], wanted[seen]) < FROM_SIMULATION


def test_hidden_states_are_there_and_attentions_are_refused() -> None:
    model, ids = quantized("llama", W8A8, torch.float32), token_ids()
    with torch.no_grad():
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
        found = zq.optimize(model)(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    for here, there in zip(found, wanted, strict=True):
        assert distance(here, there) < IN_FLOAT32
    with pytest.raises(ZqError, match="no attention weights to return"):
        model(input_ids=ids, output_attentions=True)


def test_a_copy_is_a_model_of_its_own() -> None:
    model, ids = zq.optimize(quantized("qwen3", W8A8, torch.float32)), token_ids()
    wanted = outputs(model, ids)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(outputs(other, ids), wanted)


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom", "bert"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_on_top(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_kernels(monkeypatch)
    torch._dynamo.reset()
    model = zq.optimize(quantized(name, W4A8))
    compiled: Any = torch.compile(model, backend=backend)
    for batch, length in ((2, 16), (3, 9)):
        ids = token_ids(batch, length)
        assert torch.equal(outputs(compiled, ids), outputs(model, ids))


def test_units_of_fused_operators_exist() -> None:
    model = zq.optimize(quantized("llama", W8A8)), zq.optimize(quantized("gpt2", W8A8))
    parts = [part for each in model for part in each.modules() if isinstance(part, (Norm, Activation))]
    names = {f"{unit}_{kind}" for part in parts for unit in part.units for kind in ("int8_bf16", "fp8_fp16")}
    assert len(names) == 12
    assert names <= set(UNITS)


def test_a_checkpoint_is_not_saved_from_packed_codes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", torch.bfloat16)
    quantize(make_plan(tmp_path / "source", recipe(f"* = {W4A8}")), tmp_path / "out")
    model = zq.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    zq.optimize(model)
    with pytest.raises(ZqError, match="packed for kernels and cannot be saved"):
        model.save_pretrained(tmp_path / "third")
    assert not list((tmp_path / "third").glob("*.safetensors"))


def test_an_original_model_stays_what_it_is() -> None:
    model, ids = build_tiny("llama"), token_ids()
    wanted = outputs(model, ids)
    optimized, report = zq.optimize(model, report=True)
    assert torch.equal(outputs(optimized, ids), wanted)
    assert report.left["block: no layer is quantized by zq"] == 2
    assert sum(is_linear(module) for module in optimized.modules()) == 15
