"""Descriptions: complete, consistent, and every link exact by construction.

A link says that dividing producer channels by s and multiplying the consumers' input channels by s
changes nothing. With s a power of two no rounding happens, so block outputs must be equal bit for
bit; a wrong layout, a lost consumer or a norm on the residual stream changes them grossly.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tiny import TINY, token_ids
from zq.models.arch import KINDS, Arch, Link, producer_channels
from zq.models.capture import capture_inputs, run_block
from zq.models.families import FAMILIES

EXPECTED_LINKS = {
    "llama": 4,
    "llama-tied": 4,
    "mistral": 4,
    "qwen2": 4,
    "qwen3": 4,
    "gpt2": 3,
    "opt": 4,
    "opt-post": 2,  # both norms feed the residual stream
    "gptj": 2,
    "gpt_neox": 3,
    "gpt_neox-serial": 3,
    "bloom": 3,
    "bloom-post": 1,
    "bert": 1,
    "bert-model": 1,
    "bert-nopooler": 1,
    "roberta": 1,
}


def test_every_family_has_a_tiny_model():
    assert {TINY[name]().model_type for name in TINY} == set(FAMILIES)
    assert len(FAMILIES) == 11


@pytest.mark.parametrize("arch", FAMILIES.values(), ids=FAMILIES.keys())
def test_description_is_consistent(arch: Arch):
    linears = [path for site in arch.sites for path in site.linears]
    assert len(linears) == len(set(linears))
    assert {site.kind for site in arch.sites} == set(KINDS)
    for link in arch.links:
        assert set(link.consumers) <= set(linears)
        if link.kind == "norm":
            assert link.producer in arch.norms
        else:
            assert link.kind == "linear"
            assert link.producer in linears
    assert set(arch.writers) <= set(linears)
    if arch.writers:  # what rotate relies on: all linears but the writers read the stream, through a norm
        read = [path for link in arch.links if link.kind == "norm" for path in link.consumers]
        assert sorted([*read, *arch.writers]) == sorted(linears)
        assert len([link for link in arch.links if link.channels == "kv"]) == 1
        assert len(arch.tail) == 1
    assert arch.site_of("nowhere") is None
    assert linears[0] in arch.site_of(linears[0]).linears  # type: ignore[union-attr]


def _linear_axes(module: nn.Module) -> tuple[int, int]:
    """(axis of outputs, axis of inputs) of the weight."""
    return (1, 0) if isinstance(module, Conv1D) else (0, 1)


@torch.no_grad()
def _fold(block: nn.Module, link: Link, heads: int) -> None:
    """Apply a power-of-two fold along the link, through plain tensor operations."""
    producer = block.get_submodule(link.producer)
    consumers = [block.get_submodule(path) for path in link.consumers]
    out_axis, in_axis = _linear_axes(consumers[0])
    out_axis = 0 if link.kind == "norm" else _linear_axes(producer)[0]
    n, k = producer.weight.shape[out_axis], consumers[0].weight.shape[in_axis]
    source = torch.tensor(producer_channels(link, n=n, k=k, heads=heads))
    scale = torch.ones(n)
    scale[source] = 2.0 ** torch.randint(
        -2, 3, (n,), generator=torch.Generator().manual_seed(3)
    ).index_select(0, source)
    assert not torch.equal(scale, torch.ones(n))
    shape = [1] * producer.weight.ndim
    shape[out_axis] = n
    producer.weight.div_(scale.view(shape))
    if getattr(producer, "bias", None) is not None:
        producer.bias.div_(scale)
    for consumer in consumers:
        axis = _linear_axes(consumer)[1]
        shape = [1, 1]
        shape[axis] = k
        consumer.weight.mul_(scale[source].view(shape))


@pytest.mark.parametrize("name", TINY)
def test_links_leave_the_block_unchanged(name, saved):
    stored = saved(name)
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    captured = capture_inputs(skeleton, [token_ids()])
    links = skeleton.arch.active_links(skeleton.config)
    assert len(links) == EXPECTED_LINKS[name]
    for link in links:
        outputs = []
        for folded in (False, True):
            skeleton.load_block(0, stored.read)
            if folded:
                _fold(skeleton.block(0), link, skeleton.config.num_attention_heads)
            outputs.append(run_block(skeleton.block(0), captured.hidden[0], captured.calls[0][0]))
        assert torch.equal(*outputs), link


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (  # GPT-J's norm feeds the MLP too
            "gptj",
            Link(
                producer="ln_1",
                consumers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
                kind="norm",
            ),
        ),
        ("gpt_neox", replace(FAMILIES["gpt_neox"].links[1], channels="qkv")),
        ("gpt2", replace(FAMILIES["gpt2"].links[1], channels="qkv_heads")),
        ("opt-post", replace(FAMILIES["opt"].links[2], when=())),
        ("bloom-post", replace(FAMILIES["bloom"].links[2], when=())),
    ],
)
def test_a_wrong_link_is_noticed(name, wrong, saved):
    stored = saved(name)
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    captured = capture_inputs(skeleton, [token_ids()])
    skeleton.load_block(0, stored.read)
    before = run_block(skeleton.block(0), captured.hidden[0], captured.calls[0][0])
    _fold(skeleton.block(0), wrong, skeleton.config.num_attention_heads)
    after = run_block(skeleton.block(0), captured.hidden[0], captured.calls[0][0])
    assert (before - after).abs().max() > 1e-2


def test_producer_channels_layouts():
    def channels(layout: str, **sizes: int) -> list[int]:
        link = Link(producer="p", consumers=("c",), kind="linear", channels=layout)
        return producer_channels(link, **sizes)

    assert channels("same", n=4, k=4, heads=2) == [0, 1, 2, 3]
    assert channels("kv", n=4, k=8, heads=4) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert channels("qkv", n=12, k=4, heads=2) == [8, 9, 10, 11]
    assert channels("qkv_heads", n=12, k=4, heads=2) == [4, 5, 10, 11]
    with pytest.raises(ValueError, match="does not fit"):
        channels("same", n=4, k=8, heads=2)
