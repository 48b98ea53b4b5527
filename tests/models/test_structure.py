"""Every family has a structure, and what it names is there."""

from __future__ import annotations

import pytest

from tests.tiny import TINY, build_tiny
from zq.models.families import FAMILIES
from zq.models.layout import base_prefix
from zq.models.structure import STRUCTURES, structure_of


def test_every_family_has_one() -> None:
    assert STRUCTURES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_what_it_names_is_in_the_block(name: str) -> None:
    model = build_tiny(name)
    structure = structure_of(model.config)
    assert structure is not None
    arch = FAMILIES[model.config.model_type]
    block = model.get_submodule(f"{base_prefix(model)}{arch.blocks}.0")
    paths = [*filter(None, structure.norms), structure.attention]
    paths += [f"{structure.attention}.{norm}" for norm in structure.head_norms or ()]
    for path in paths:
        assert block.get_submodule(path) is not None
    attention = block.get_submodule(structure.attention)
    assert getattr(attention, structure.head_dim) == (32 if name == "qwen3" else 16)
    assert set(filter(None, structure.norms)) <= set(arch.norms)
    assert {site.name for site in arch.sites} == {"qkv", "out", "up", "down"}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *(("llama", "serial"), ("opt", "serial"), ("opt-post", "post"), ("gptj", "parallel")),
        *(("gpt_neox", "parallel"), ("gpt_neox-serial", "serial"), ("bloom", "serial")),
        *(("bloom-post", "normed"), ("bert", "post")),
    ],
)
def test_variants(name: str, order: str) -> None:
    structure = structure_of(TINY[name]())
    assert structure is not None
    assert structure.order == order


def test_a_block_of_another_kind_has_none() -> None:
    config = TINY["bert"]()
    config.is_decoder = True
    assert structure_of(config) is None
