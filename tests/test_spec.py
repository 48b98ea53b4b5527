"""Specs: one value, one spelling, and errors that say what is allowed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zq.errors import ZqError
from zq.spec import FORMATS, SCALE_DTYPES, Layout, Scheme, TensorSpec, choose_group_size, scale_shape

layouts = st.one_of(
    st.sampled_from(["tensor", "channel", "gauto", "rank1"]),
    st.builds("{}{}".format, st.sampled_from("gb"), st.integers(2, 9_999_999)),
    st.builds("{}x{}".format, st.integers(1, 9_999_999), st.integers(1, 9_999_999)),
)


@st.composite
def weight_specs(draw: st.DrawFn) -> TensorSpec:
    name, layout = draw(st.sampled_from(list(FORMATS))), Layout.parse(draw(layouts))
    options: list[dict] = [{}, {"center": True}, {"inner": layout.size // 2 if layout.size else 4}]
    if layout.kind == "rank1" or (layout.kind == "group" and not layout.size):
        options = [{}]
    elif layout.size and (layout.size % 2 or layout.size < 4 or layout.kind == "tile"):
        options = [{}, {"center": True}]
    if not FORMATS[name].signed:
        options, layout = [{"center": True}], Layout("channel")
    if name.startswith("int") and layout.kind != "rank1":
        options += [{"symmetric": False}, {"narrow": True}]
        if layout.kind == "group":
            options += [{"two_level": True}, {"two_level": True, "narrow": True}]
    return TensorSpec(
        format=name,
        layout=layout,
        scale_dtype=draw(st.sampled_from([None, *SCALE_DTYPES])),
        rank=draw(st.sampled_from([0, 0, 1, 64])),
        kept=draw(st.sampled_from([0, 0, 1, 64])),
        **draw(st.sampled_from(options)),
    )


activation_specs = st.sampled_from(["int8:token", "e4m3fn:token", "e5m2:token", "int8:token:narrow"])
schemes = st.one_of(
    st.builds(Scheme, weight_specs(), st.one_of(st.none(), activation_specs.map(TensorSpec.parse))),
    st.builds("e4m3fn:{0}x{1} @ e4m3fn:g{1}".format, st.integers(1, 999), st.integers(2, 999)).map(
        Scheme.parse
    ),
)


@given(weight_specs())
def test_a_spec_survives_its_spelling(spec: TensorSpec) -> None:
    assert TensorSpec.parse(str(spec)) == spec
    assert TensorSpec.parse(f"  {spec} ") == spec


@given(schemes)
def test_a_scheme_survives_its_spelling(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


def test_every_part_of_the_spelling_counts() -> None:
    spec = TensorSpec.parse("int4:g128:asym:s=fp32")
    assert spec == TensorSpec(format="int4", layout=Layout("group", 128), symmetric=False, scale_dtype="fp32")
    assert str(spec) == "int4:g128:asym:s=fp32"
    assert TensorSpec.parse("int4:g64:two-level:narrow") == TensorSpec(
        format="int4", layout=Layout("group", 64), narrow=True, two_level=True
    )
    assert str(Scheme.parse("int4:g128@int8:token")) == "int4:g128 @ int8:token"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4", "write FORMAT:LAYOUT"),
        ("", "write FORMAT:LAYOUT"),
        ("int9:channel", "allowed: int2"),
        ("e4m3:channel", "e4m3fn"),
        ("int4:row", "allowed: tensor, channel, token"),
        ("int4:g1", "N >= 2"),
        ("int4:g", "N >= 2"),
        ("int4:g-4", "N >= 2"),
        ("int4:g99999999", "unknown"),
        ("int4:bauto", "unknown"),
        ("e4m3fn:128x", "RxK (tile of R rows and K inputs)"),
        ("e4m3fn:0x128", "unknown"),
        ("e4m3fn:128x128:pow2=16", "tiles; drop one"),
        ("int4:4x16:two-level", "needs groups along K"),
        ("int4:g64:", "allowed: asym"),
        ("int4:g64:sym", "allowed: asym, narrow, two-level"),
        ("int4:g64:pow2=1", "pow2=N (N >= 2)"),
        ("int4:g64:pow2=64", "must divide the larger group"),
        ("int4:gauto:pow2=16", "must divide the larger group"),
        ("int4:b64:pow2=24", "must divide the larger group"),
        ("int4:g64:pow2=16:two-level", "drop one"),
        ("int4:g64:asym:center", "drop one"),
        ("int4:rank1:center", "rank1 scales go with no"),
        ("nf9:channel", "from 3 to 8 bits"),
        ("nf4:g64:asym", "drop 'asym'"),
        ("int4:g64:asym:asym", "twice"),
        ("int4:g64:s=fp32:s=bf16", "twice"),
        ("int4:g64:s=fp8", "allowed: fp32, bf16, fp16"),
        ("e2m1fn:g64:asym", "drop 'asym'"),
        ("e2m1fn:g64:narrow", "symmetric integers only"),
        ("int4:g64:asym:narrow", "symmetric integers only"),
        ("int4:channel:two-level", "needs groups along K"),
        ("int4:b64:two-level", "needs groups along K"),
        ("int4:g64:two-level:asym", "symmetric integers only"),
        ("e2m1fn:g64:two-level", "symmetric integers only"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ZqError) as caught:
        TensorSpec.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4:token", "'token' is for activations"),
        ("udynamic4:b64", "add ':center'"),
        ("int4:g64 @ dynamic8:token", "allowed: int8:token"),
        ("int4:g64 @ int8:token:center", "allowed: int8:token"),
        ("int4:g64 @ int8:channel", "allowed: int8:token"),
        ("int4:g64 @ int4:token", "allowed: int8:token"),
        ("int4:g64 @ int8:token:asym", "allowed: int8:token"),
        ("int4:g64 @ int8:token:s=bf16", "allowed: int8:token"),
        ("int4:g64 @ e4m3fn:g64", "allowed: int8:token, e4m3fn:token, e5m2:token"),
        ("e4m3fn:128x128 @ e4m3fn:g64", "under 128x128 weights e4m3fn:g128"),
        ("e4m3fn:128x128 @ int8:g128", "under 128x128 weights e4m3fn:g128"),
        ("e4m3fn:channel @ e4m3fn:g128", "allowed: int8:token, e4m3fn:token, e5m2:token"),
        ("int4:g64 @", "write FORMAT:LAYOUT"),
        ("int4:g64 @ int8:token @ int8:token", "unknown"),
        ("@ int8:token", "write FORMAT:LAYOUT"),
    ],
)
def test_a_wrong_scheme_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ZqError) as caught:
        Scheme.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("int8:tensor", (1,)),
        ("int8:channel", (6, 1)),
        ("int8:token", (6, 1)),
        ("int4:g32", (6, 4)),
        ("int4:g33", (6, 4)),
        ("int4:g100", (6, 1)),
        ("int4:b64", (10,)),
        ("int4:rank1", (106,)),
        ("e4m3fn:4x32", (2, 4)),
        ("e4m3fn:128x128", (1, 1)),
    ],
)
def test_scale_shapes_of_a_6_by_100_matrix(text: str, shape: tuple[int, ...]) -> None:
    assert scale_shape(TensorSpec.parse(text), (6, 100)) == shape


def test_group_sizes() -> None:
    assert choose_group_size({256, 512}) == 128
    assert choose_group_size({576, 1536}) == 64
    assert choose_group_size({96, 128}) == 32
    assert choose_group_size({100, 128}) is None
    auto, fixed = Scheme.parse("int4:gauto @ int8:token"), Scheme.parse("int4:g32")
    assert str(auto.with_group(64)) == "int4:g64 @ int8:token"
    assert fixed.with_group(64) == fixed
    assert Scheme.parse("int8:channel").with_group(64) == Scheme.parse("int8:channel")


@pytest.mark.parametrize("module", ["zq", "zq.spec", "zq.recipe", "zq.errors", "zq.cli.main"])
def test_importing_needs_no_torch(module: str) -> None:
    if module == "zq.cli.main" and find_spec("zq.cli") is None:
        pytest.skip("no CLI in this tree")
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
