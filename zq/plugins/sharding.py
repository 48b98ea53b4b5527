"""How servers cut a quantized layer: its tensors by kind, and what cannot be cut. No server is imported.

A server fuses layers along N (q, k and v; gate and up) and splits them between devices along N (column
parallel) or K (row parallel). Each kind of tensor follows in its own way:

    packed    int32 words along K                along N: rows; along K: whole words and groups only
    packed_n  int32 words along N (zero points)  along N: whole words only; along K: groups
    group     one value for a group              along N: rows; along K: groups
    channel   one value for a row                along N: rows; along K: the same on every device
    tensor    one value for a weight             one for each fused layer
    plain     facts about the whole weight       the same everywhere, not used
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zq.engines import plugin_refuses
from zq.errors import ZqError
from zq.export.native import from_unsigned
from zq.numerics.levels import levels
from zq.numerics.packing import packed_words
from zq.numerics.packing import unpack as unpack_bits
from zq.numerics.qtensor import QTensor
from zq.spec import Layout, TensorSpec

ALIGNED = "lower the tensor parallel size, or quantize again with"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one device holds of a layer. sizes: outputs of each fused layer; k: inputs; whole_n, whole_k: of
    the layer on all devices."""

    name: str
    sizes: tuple[int, ...]
    k: int
    whole_n: int
    whole_k: int

    @property
    def n(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a layer on one device; `kind` as in the module's docstring."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str


def refuse(spec: TensorSpec, name: str) -> None:
    """Raises ZqError for what the plug-in does not serve, by name."""
    reason = plugin_refuses(spec)
    if reason:
        raise ZqError(f"'{name}' is {spec}: {reason}, or serve it with `zq serve --engine transformers`")


def parts(spec: TensorSpec, shard: Shard, storage: str) -> list[Part]:
    """The tensors that a checkpoint of this storage ("zq" or "compressed-tensors") gives to this shard.

    Scales are float32 whatever the checkpoint has, so that loading never rounds them. Raises ZqError when the
    shard would cut a group or a packed word, or when the weight cannot be served.
    """
    refuse(spec, shard.name)
    _check_inputs(spec, shard)
    n, k, kind = shard.n, shard.k, spec.layout.kind
    groups = math.ceil(k / (spec.layout.size or k))
    scales = {"tensor": (len(shard.sizes),), "channel": (n, 1), "group": (n, groups)}[kind]
    found = [
        Part(name="weight_packed", shape=(n, packed_words(k, spec.bits)), dtype=torch.int32, kind="packed")
    ]
    if storage == "compressed-tensors":
        found.append(Part(name="weight_scale", shape=scales, dtype=torch.float32, kind=kind))
        found.append(Part(name="weight_shape", shape=(2,), dtype=torch.int64, kind="plain"))
        if not spec.symmetric:
            _check_outputs(spec, shard)
            shape = (packed_words(n, spec.bits), scales[1])
            cut = "packed_n" if kind == "group" else "packed_channel"
            found.append(Part(name="weight_zero_point", shape=shape, dtype=torch.int32, kind=cut))
        return found
    outer = ((n, 1), "channel") if spec.two_level else (scales, kind)
    found.append(Part(name="weight_scale", shape=outer[0], dtype=torch.float32, kind=outer[1]))
    more = [
        ("weight_sub", spec.two_level, torch.int8),
        ("weight_zero", not spec.symmetric, torch.int8),
        ("weight_center", spec.center, torch.float32),
    ]
    return found + [
        Part(name=name, shape=scales, dtype=dtype, kind=kind) for name, there, dtype in more if there
    ]


def _check_inputs(spec: TensorSpec, shard: Shard) -> None:
    k, whole, bits = shard.k, shard.whole_k, spec.bits
    if k == whole:
        return
    size = spec.layout.size if spec.layout.kind == "group" else None
    if size and k % size:
        raise ZqError(
            f"'{shard.name}': {whole} inputs in groups of {size} cannot be split into {whole // k} shards of "
            f"{k}; {ALIGNED} groups that divide {k}"
        )
    if k * bits % 32:
        raise ZqError(
            f"'{shard.name}': a shard of {k} inputs of {bits} bits ends inside a 32-bit word; {ALIGNED} 4 or "
            "8 bits"
        )


def _check_outputs(spec: TensorSpec, shard: Shard) -> None:
    alone = len(shard.sizes) == 1 and shard.n == shard.whole_n
    cut = next((n for n in shard.sizes if n * spec.bits % 32), None)
    if cut is not None and not alone:
        raise ZqError(
            f"'{shard.name}': the zero points of {cut} outputs of {spec.bits} bits end inside a 32-bit word; "
            f"{ALIGNED} symmetric weights"
        )


def assemble(spec: TensorSpec, shard: Shard, storage: str, tensors: dict[str, Tensor]) -> QTensor:
    """The loaded tensors of a shard as one weight; a scale per weight becomes one per channel."""
    codes = from_unsigned(unpack_bits(tensors["weight_packed"], spec.bits, shard.k), spec)
    scale = tensors["weight_scale"]
    if storage == "compressed-tensors":
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            rows = unpack_bits(zero.T.contiguous(), spec.bits, shard.n)
            zero = from_unsigned(rows, spec).T.contiguous()
        return _in_levels(QTensor(codes, scale, zero, None, spec))
    zero, center = tensors.get("weight_zero"), tensors.get("weight_center")
    if spec.layout.kind == "tensor":
        spec = replace(spec, layout=Layout("channel"))
        scale, zero, center = (_spread(each, shard.sizes) for each in (scale, zero, center))
        assert scale is not None
    return QTensor(codes, scale, zero, tensors.get("weight_sub"), spec, center=center)


def _spread(values: Tensor | None, sizes: tuple[int, ...]) -> Tensor | None:
    """[fused layers] -> [N, 1]"""
    if values is None:
        return None
    return values.repeat_interleave(torch.tensor(sizes, device=values.device))[:, None]


def _in_levels(q: QTensor) -> QTensor:
    """Group scales that are integers times a scale per channel as these two, which a kernel needs: whether a
    compressed-tensors checkpoint was made so is seen in the scales themselves."""
    spec = q.spec
    size = spec.layout.size if spec.layout.kind == "group" else 0
    if spec.format != "int4" or not spec.symmetric or size not in (64, 128) or q.shape[1] % size:
        return q
    found = levels(q.scale, replace(spec, two_level=True))
    if found is None:
        return q
    return QTensor(q.codes, found[0], None, found[1], replace(spec, two_level=True))
