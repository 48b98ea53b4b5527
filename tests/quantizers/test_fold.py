"""Folding: the function stays, every half of it alone would change it, and what is stored is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models.test_arch import EXPECTED_LINKS
from tests.quantizers.blocks import distance, link_to, load_block, random_scale
from tests.tiny import TINY, save_tiny
from zq.quantizers.fold import divided, fold, shared

ALL = "{match: '*', weights: 'int8:channel'}"
STEPS = "{smoothquant: {}}, {rtn: {}}"


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_every_link_of_every_family_keeps_the_function(name: str, tiny: Callable[..., Path]) -> None:
    _, block = load_block(tiny(name), ALL, STEPS)
    assert len(block.links) == EXPECTED_LINKS[name]
    assert block.module is not None
    for seed, link in enumerate(block.links):
        before = block.forward(block.inputs)
        kept = {n: p.clone() for n, p in block.module.named_parameters()}
        fold(block, link, random_scale(link, seed))
        assert distance(block.forward(block.inputs), before) < 1e-5, link.name
        whole = {n: p.clone() for n, p in block.module.named_parameters()}
        producer = link.name.removeprefix(f"{block.name}.")
        consumers = [layer.name.removeprefix(f"{block.name}.") for layer in link.consumers]
        for half in ([producer], consumers):
            for path in half:
                for leaf in ("weight", "bias"):
                    if f"{path}.{leaf}" in kept:
                        block.module.get_parameter(f"{path}.{leaf}").copy_(kept[f"{path}.{leaf}"])
            assert distance(block.forward(block.inputs), before) > 1e-3, (link.name, half)
            for path, value in whole.items():
                block.module.get_parameter(path).copy_(value)
        for layer in link.consumers:  # the module computes with the float32 weight, here without rounding
            assert layer.folded is not None
            assert layer.folded.dtype == torch.float32
            module = layer.module.weight.T if layer.transposed else layer.module.weight
            assert torch.equal(module, layer.folded)
    changed = {name for link in block.links for name in _stored(link)}
    assert block.changed == changed


def _stored(link) -> set[str]:
    bias = {f"{link.name}.bias"} if getattr(link.producer, "bias", None) is not None else set()
    return bias | (set() if link.layer else {f"{link.name}.weight"})


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bloom"])
def test_all_links_of_a_bf16_block_at_once(name: str, tiny: Callable[..., Path]) -> None:
    """Only the computation is bf16: norms are exact and folded weights are float32."""
    _, block = load_block(tiny(name, torch.bfloat16), ALL, STEPS)
    before = block.forward(block.inputs)
    originals = {layer.name: layer.weight.float() for layer in block.layers}
    total = {layer.name: torch.ones(layer.weight.shape[1]) for layer in block.layers}
    for seed, link in enumerate(block.links):
        scale = fold(block, link, random_scale(link, seed))
        for layer in link.consumers:
            total[layer.name] = scale
    assert distance(block.forward(block.inputs), before) < 0.01
    producers = {link.name for link in block.links}
    for layer in block.layers:
        if layer.name not in producers:
            expected = originals[layer.name] * total[layer.name]
            assert torch.equal(layer.weight.float(), expected)
            assert torch.equal(layer.original, layer.weight)


@torch.no_grad()
def test_value_heads_share_a_scale(tiny: Callable[..., Path]) -> None:
    _, block = load_block(tiny("llama"), ALL, STEPS)
    link = link_to(block, "o_proj")  # 4 query heads of 16, 2 value heads
    wanted = random_scale(link)
    heads = fold(block, link, wanted).reshape(2, 2, 16)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(heads[:, 0], wanted.reshape(2, 2, 16).amax(1))
    assert torch.equal(shared(heads.reshape(-1), link), heads.reshape(-1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_is_stored_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """New weight times scale is the old weight, although the quotient was rounded; zeros stay."""
    save_tiny("llama", tmp_path, dtype)
    _, block = load_block(tmp_path, ALL, STEPS)
    link = link_to(block, "up_proj")
    norm = link.producer.get_parameter("weight")
    norm[3], norm[5] = 0, -norm[5]
    old = norm.float().clone()
    wanted = random_scale(link)
    wanted[7] = 1e30  # the quotient underflows: left alone in float16
    new = divided(link, wanted)
    assert torch.equal(new.weight.to(dtype).float(), new.weight)
    assert torch.allclose(new.weight * new.scale, old, rtol=2**-23, atol=0)
    assert new.weight[3] == 0
    assert new.scale[3] == 1
    assert new.weight[5] < 0 < new.scale[5]
    rest = [c for c in range(64) if c not in (3, 7)]
    assert torch.allclose(new.scale[rest], wanted[rest], rtol=2**-7)
    assert not torch.equal(new.scale[rest], wanted[rest])
    if dtype == torch.float16:
        assert new.scale[7] == 1


@torch.no_grad()
def test_no_quotient_leaves_the_range_of_the_dtype(tmp_path: Path) -> None:
    save_tiny("opt", tmp_path, torch.float16)
    _, block = load_block(tmp_path, ALL, STEPS)
    link = link_to(block, "fc1")
    link.producer.get_parameter("weight")[0] = 60000
    link.producer.get_parameter("bias")[1] = -60000
    new = divided(link, torch.full((64,), 1 / 300))
    assert new.bias is not None
    assert bool(torch.isfinite(new.weight.half()).all())
    assert bool(torch.isfinite(new.bias.half()).all())
    assert 0.9 < new.scale[0] < 1.1
    assert 0.9 < new.scale[1] < 1.1
    assert new.scale[2] == pytest.approx(1 / 300, rel=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "consumer", "rows"),
    [
        ("gpt2", "attn.c_proj", list(range(128, 192))),
        ("bloom", "self_attention.dense", [48 * (c // 16) + 32 + c % 16 for c in range(64)]),
    ],
)
def test_fused_producers_change_their_values_only(
    name: str, consumer: str, rows: list[int], tiny: Callable[..., Path]
) -> None:
    _, block = load_block(tiny(name), ALL, STEPS)
    link = link_to(block, consumer)
    assert link.layer is not None
    weight, bias = link.layer.weight.clone(), link.producer.get_parameter("bias").clone()
    scale = fold(block, link, random_scale(link))
    weight[rows] /= scale[:, None]
    bias[rows] /= scale
    assert torch.equal(link.layer.weight, weight)
    assert torch.equal(link.producer.get_parameter("bias"), bias)


@torch.no_grad()
def test_a_producer_that_is_not_quantized_and_consumers_that_are_not(tmp_path: Path) -> None:
    """v_proj is stored as it is: its folded weight is rounded to bf16 and written. Without all of q, k and v
    quantized their norm is left alone."""
    save_tiny("llama", tmp_path, torch.bfloat16)
    plan, block = load_block(tmp_path, "{match: '*.v_proj', skip: true}, " + ALL, STEPS)
    paths = [link.name.removeprefix("model.layers.0.") for link in block.links]
    assert paths == ["self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
    link = block.links[0]
    assert link.layer is None
    before, old = block.forward(block.inputs), link.producer.get_parameter("weight").clone()
    scale = fold(block, link, random_scale(link))
    per_row = torch.ones(32).index_copy(0, link.channels, scale)
    assert torch.equal(link.producer.get_parameter("weight"), (old.float() / per_row[:, None]).bfloat16())
    assert distance(block.forward(block.inputs), before) < 0.01
    assert block.changed == {"model.layers.0.self_attn.v_proj.weight"}
    norms = [f"model.layers.{i}.post_attention_layernorm.weight" for i in range(2)]
    values = [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]
    assert set(plan.may_change) == {*norms, *values}


@torch.no_grad()
def test_the_teacher_reads_what_the_block_reads(tiny: Callable[..., Path]) -> None:
    """The correction of inherited errors compares their inputs: with nothing quantized these are equal."""
    _, block = load_block(tiny("llama"), ALL, "{smoothquant: {}}, {gptq: {asymmetry: 0.5}}")
    for seed, link in enumerate(block.links):
        fold(block, link, random_scale(link, seed))
    for site in block.sites:
        hessian, cross = block.second_moments(site, with_cross=True)
        assert cross is not None
        assert float(cross.norm()) < 1e-4 * float(hessian.norm())
