"""What hypothesis draws for numerics: specs, matrices, and compressed-tensors' arguments for a spec."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import strategies as st
from torch import Tensor

from zq.spec import FORMATS, TensorSpec

INTS = [f"int{k}" for k in range(2, 9)]
FLOATS = [name for name, info in FORMATS.items() if info.is_float]
MAPS = [n for n, i in FORMATS.items() if not (i.is_int or i.is_float or i.is_estimated)]
ESTIMATED = [name for name, info in FORMATS.items() if info.is_estimated]
LAYOUTS = ["tensor", "channel", "token", "g2", "g5", "g32", "b3", "b64", "rank1", "3x5", "2x32"]


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    """Any spec that can quantize a matrix."""
    names = draw(st.sampled_from([INTS, FLOATS, MAPS, ESTIMATED]))
    name = draw(st.sampled_from(names))
    layout = draw(st.sampled_from(LAYOUTS))
    options = ["", ":center", ":pow2=4", ":pow2=8"]
    if name in INTS:
        options += [":asym", ":narrow"] + [":two-level"] * layout.startswith("g")
    if layout == "rank1":
        options = ["", ":narrow"] if name in INTS else [""]
    elif layout not in ("g32", "b64", "tensor", "channel", "token"):
        options = [option for option in options if "pow2" not in option]
    dtype = draw(st.sampled_from(["", ":s=fp32", ":s=bf16", ":s=fp16"]))
    return TensorSpec.parse(f"{name}:{layout}{draw(st.sampled_from(options))}{dtype}")


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """float32 [1..9, 1..80] of any magnitude, with zero groups, outliers and rows of one sign."""
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 80))
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    kind = draw(st.sampled_from(["plain", "sparse", "outlier", "one sign"]))
    if kind == "sparse":
        x = x * (x > 1)
    if kind == "outlier":
        x[0, 0] = 100.0
    if kind == "one sign":
        x = x.abs() + 0.5
    return x * 10.0 ** draw(st.integers(-4, 4))


def ct_args(spec: TensorSpec, *, dynamic: bool = False) -> QuantizationArgs:
    """The same quantization in the words of compressed-tensors."""
    return QuantizationArgs(
        num_bits=spec.bits,
        type="int" if spec.info.is_int else "float",
        symmetric=spec.symmetric,
        strategy="block" if spec.layout.kind == "tile" else spec.layout.kind,
        group_size=spec.layout.size if spec.layout.kind == "group" else None,
        block_structure=[spec.layout.rows, spec.layout.size] if spec.layout.kind == "tile" else None,
        dynamic=dynamic,
    )
