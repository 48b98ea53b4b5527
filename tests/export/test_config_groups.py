"""What other tools and people leave in quantization_config: refused by the name that the file has for it."""

from __future__ import annotations

import pytest

from zq.errors import ZqError
from zq.export import compressed_tensors as ct
from zq.spec import Scheme

MISSING = ...  # one that has the same name in every process
DAMAGED = [  # (path of the field, its value, what the error says of it)
    ("zq", ["group_0"], 'zq is ["group_0"]; zq reads a mapping'),
    ("zq", {"two_level": 5}, "zq.two_level is 5; zq reads a list of names of config_groups"),
    ("zq", {"two_level": ["nope"]}, 'zq.two_level is ["nope"]; zq reads a list of names of config_groups'),
    ("zq", {}, "zq.two_level is missing; zq reads a list of names"),
    ("config_groups", [], "config_groups is []; zq reads a mapping of mappings"),
    ("config_groups", {"group_0": []}, 'config_groups is {"group_0": []}; zq reads a mapping of mappings'),
    ("format", 5, "format is 5; zq reads the name of a format or null"),
    ("ignore", "lm_head", 'ignore is "lm_head"; zq reads a list of names'),
    ("ignore", ["re:("], "ignore has 're:(', no regex"),
    ("group_0.targets", [5], "group_0.targets is [5]; zq reads a list of names"),
    ("group_0.format", "int-quantized", 'group_0 is stored as "int-quantized", and zq reads'),
    ("group_0.output_activations", {"num_bits": 8}, 'output_activations is {"num_bits": 8}; zq reads null'),
    ("group_0.weights", None, "group_0.weights is null; zq reads a mapping"),
    ("group_0.weights.type", None, 'group_0.weights.type is null; zq reads "int" or "float"'),
    ("group_0.weights.type", MISSING, "weights.type is missing"),
    (
        "group_0.weights.num_bits",
        "8",
        'group_0.weights.num_bits is "8"; zq reads whole numbers from 2 to 8 there',
    ),
    ("group_0.weights.num_bits", 9, "weights.num_bits is 9; zq reads whole numbers from 2 to 8"),
    ("group_0.weights.num_bits", True, "weights.num_bits is true"),
    ("group_0.weights.symmetric", "false", 'weights.symmetric is "false"; zq reads true or false'),
    ("group_0.weights.actorder", "group", 'weights.actorder is "group"; zq reads null, "weight" or "static"'),
    ("group_0.weights.dynamic", True, "weights.dynamic is true; zq reads false (stored scales)"),
    (
        "group_0.weights.strategy",
        "bogus",
        'strategy is "bogus"; zq reads "tensor", "channel", "group", "block"',
    ),
    ("group_0.weights.strategy", "rank1", 'strategy is "rank1"'),
    ("group_0.weights.strategy", "token", 'strategy is "token"'),
    ("group_0.weights.group_size", None, "weights.group_size is null; zq reads whole numbers from 2 on"),
    ("group_0.weights.group_size", "32", 'weights.group_size is "32"'),
    ("group_0.input_activations", [], "input_activations is []; zq reads a mapping"),
    ("group_0.input_activations", {}, "input_activations.type is missing"),
    ("group_0.input_activations.num_bits", 4, "input_activations.num_bits is 4; zq reads 8 there"),
    (
        "group_0.input_activations.symmetric",
        False,
        "input_activations.symmetric is false; zq reads true there",
    ),
    ("group_0.input_activations.dynamic", "local", 'dynamic is "local"; zq reads true (scales made for each'),
    ("group_0.input_activations.strategy", "tensor", 'strategy is "tensor"; zq reads "token", "group"'),
]


@pytest.mark.parametrize(("path", "value", "said"), DAMAGED, ids=lambda value: str(value)[:40])
def test_damaged_fields_are_named_as_the_file_has_them(path: str, value: object, said: str) -> None:
    config = ct.config({"m.layers.0.q": Scheme.parse("int4:g32 @ int8:token")}, [])
    *parents, key = path.split(".")
    at = config["config_groups"] if parents else config
    for parent in parents:
        at = at[parent]
    if value is MISSING:
        del at[key]
    else:
        at[key] = value
    with pytest.raises(ZqError) as caught:
        ct.schemes(config, ["m.layers.0.q"])
    assert said in str(caught.value)
    assert str(caught.value).startswith("quantization_config.")
    assert str(caught.value).endswith(" again")


@pytest.mark.parametrize("structure", [MISSING, None, [], [128], 128, [0, -1], ["a", "b"], [128, True]])
def test_tiles_of_no_size(structure: object) -> None:
    config = ct.config({"m.layers.0.q": Scheme.parse("e4m3fn:128x128")}, [])
    weights = config["config_groups"]["group_0"]["weights"]
    weights["block_structure"] = structure
    if structure is MISSING:
        del weights["block_structure"]
    with pytest.raises(ZqError, match=r"group_0\.weights\.block_structure is .*; zq reads two whole numbers"):
        ct.schemes(config, ["m.layers.0.q"])


def test_what_no_scheme_can_be() -> None:
    """Fields that are right alone, and not together."""
    config = ct.config({"m.layers.0.q": Scheme.parse("int8:channel @ int8:token")}, [])
    config["zq"] = {"two_level": ["group_0"]}
    with pytest.raises(ZqError, match=r"zq\.two_level names 'group_0': .* needs groups"):
        ct.schemes(config, ["m.layers.0.q"])
    activations = config["config_groups"]["group_0"]["input_activations"]
    activations |= {"strategy": "group", "group_size": 32}
    with pytest.raises(ZqError, match=r"config_groups\.group_0: activations 'int8:g32' are not supported"):
        ct.schemes(config, ["m.layers.0.q"])
