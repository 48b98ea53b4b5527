"""zq's own format, for everything that no common format expresses. `quant_method: zq`.

For a linear layer NAME with an [N, K] weight, whatever the layout of its scales:

    NAME.weight_packed  int32 [N, ceil(K*bits/32)]   codes, dense (numerics/packing.py)
    NAME.weight_scale   model dtype or s=...         zq.spec.scale_shape; two-level: [N, 1]
    NAME.weight_zero    int8, shape of the scales    asymmetric only
    NAME.weight_sub     int8 [N, G]                  two-level only
    NAME.weight_lorc_a  model dtype [N, r]           lorc=r only: the weight is dequantize(codes) + A B
    NAME.weight_lorc_b  model dtype [r, K]
    NAME.weight_shift   int32 [R, ceil(G*4/32)]      pow2=p only: exponents, packed (zq.spec.inner_shape)
    NAME.weight_center  as the scales                center only
    NAME.weight_codebook    dtype of the scales      estimated formats only; zq.spec.codebook_shape
    NAME.weight_kept    model dtype [N, M]           keep=M only: input columns that were not quantized
    NAME.weight_kept_index  int32 [M]                and where they are along K; their codes mean nothing

Integer codes are offset binary, u = q + 2^(bits-1); float codes are the format's bit pattern,
others the number of the value, counted from the least.
config.json lists the layers of each scheme by name, so nothing is quantized or skipped by a pattern.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.writer import CODES, Slot
from zq.errors import ZqError
from zq.export.fields import ROOT, shown, strings, wrong
from zq.numerics.packing import pack as pack_bits
from zq.numerics.packing import packed_words
from zq.numerics.packing import unpack as unpack_bits
from zq.numerics.qtensor import QTensor
from zq.numerics.scales import DTYPES, SHIFT_BITS
from zq.spec import AUTO, Layout, Scheme, TensorSpec, codebook_shape, inner_shape, scale_shape

FORMAT_VERSION = 1
Read = Callable[[str], Tensor]


def adapt(scheme: Scheme) -> Scheme:
    """As it is."""
    return scheme


def refuse(scheme: Scheme, shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> str | None:
    """The native format holds every scheme."""
    return None


def refuse_all(assigned: dict[str, Scheme], skipped: list[str]) -> str | None:
    """Every mix of schemes has a place."""
    return None


def slots(name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Slot]:
    spec = scheme.weights
    n, k = shape
    scale_dtype = DTYPES[spec.scale_dtype] if spec.scale_dtype else dtype
    scales = scale_shape(spec, shape)
    result = [
        Slot(f"{name}.weight_packed", "I32", (n, packed_words(k, spec.bits))),
        Slot(f"{name}.weight_scale", CODES[scale_dtype], (n, 1) if spec.two_level else scales),
    ]
    if not spec.symmetric:
        result.append(Slot(f"{name}.weight_zero", "I8", scales))
    if spec.two_level:
        result.append(Slot(f"{name}.weight_sub", "I8", scales))
    if spec.rank:
        result.append(Slot(f"{name}.weight_lorc_a", CODES[dtype], (n, spec.rank)))
        result.append(Slot(f"{name}.weight_lorc_b", CODES[dtype], (spec.rank, k)))
    if spec.inner:
        rows, groups = inner_shape(spec, shape)
        result.append(Slot(f"{name}.weight_shift", "I32", (rows, packed_words(groups, SHIFT_BITS))))
    if spec.center:
        result.append(Slot(f"{name}.weight_center", CODES[scale_dtype], scales))
    if spec.info.is_estimated:
        result.append(Slot(f"{name}.weight_codebook", CODES[scale_dtype], codebook_shape(spec, shape)))
    if spec.kept:
        result.append(Slot(f"{name}.weight_kept", CODES[dtype], (n, spec.kept)))
        result.append(Slot(f"{name}.weight_kept_index", "I32", (spec.kept,)))
    return result


def pack(name: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    tensors = {
        f"{name}.weight_packed": pack_bits(to_unsigned(q.codes, q.spec), q.spec.bits),
        f"{name}.weight_scale": q.scale,
    }
    if q.zero is not None:
        tensors[f"{name}.weight_zero"] = q.zero
    if q.sub is not None:
        tensors[f"{name}.weight_sub"] = q.sub
    if q.left is not None and q.right is not None:
        tensors[f"{name}.weight_lorc_a"], tensors[f"{name}.weight_lorc_b"] = q.left, q.right
    if q.shift is not None:
        tensors[f"{name}.weight_shift"] = pack_bits(q.shift, SHIFT_BITS)
    if q.center is not None:
        tensors[f"{name}.weight_center"] = q.center
    if q.book is not None:
        tensors[f"{name}.weight_codebook"] = q.book
    if q.kept is not None and q.places is not None:
        tensors[f"{name}.weight_kept"], tensors[f"{name}.weight_kept_index"] = q.kept, q.places
    return tensors


def unpack(name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Raises ZqError when the places of kept columns do not fit the layer."""
    spec = scheme.weights

    def part(suffix: str, wanted: object) -> Tensor | None:
        return read(f"{name}.weight_{suffix}") if wanted else None

    shift, places = part("shift", spec.inner), part("kept_index", spec.kept)
    if places is not None and not bool(((places >= 0) & (places < shape[1])).all()):
        raise ZqError(
            f"'{name}.weight_kept_index' names columns that the layer does not have; download again"
        )
    return QTensor(
        from_unsigned(unpack_bits(read(f"{name}.weight_packed"), spec.bits, shape[1]), spec),
        read(f"{name}.weight_scale"),
        part("zero", not spec.symmetric),
        part("sub", spec.two_level),
        spec,
        part("lorc_a", spec.rank),
        part("lorc_b", spec.rank),
        None if shift is None else unpack_bits(shift, SHIFT_BITS, inner_shape(spec, shape)[1]),
        part("center", spec.center),
        part("codebook", spec.info.is_estimated),
        part("kept", spec.kept),
        places,
    )


def config(assigned: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    by_scheme: dict[str, list[str]] = defaultdict(list)
    for name, scheme in assigned.items():
        by_scheme[str(scheme)].append(name)
    return {"quant_method": "zq", "format_version": FORMAT_VERSION, "schemes": dict(by_scheme)}


def schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Raises ZqError for a config from a newer format or with layers that the model does not have."""
    version, known = config.get("format_version"), set(names)
    if version != FORMAT_VERSION:
        raise ZqError(
            f"zq format version {shown(version)} is unknown (this zq reads {FORMAT_VERSION}); upgrade zq"
        )
    result: dict[str, Scheme] = {}
    path, listed = f"{ROOT}.schemes", config.get("schemes")
    if not isinstance(listed, dict):
        raise wrong(ROOT, config, "schemes", "a mapping of schemes to lists of layers")
    for text in listed:
        try:
            scheme = Scheme.parse(text)
        except ZqError as error:
            raise ZqError(f"{path}: {error}") from None
        if scheme.weights.layout == Layout("group", AUTO):
            raise ZqError(f"{path} has '{text}', whose group size was never chosen; quantize again")
        for layer in strings(path, listed, text):
            if layer not in known:
                raise ZqError(
                    f"{path} quantizes '{layer}', which this model does not have; download it again"
                )
            if layer in result:
                raise ZqError(f"{path} lists '{layer}' twice; download it again")
            result[layer] = scheme
    return result


def to_unsigned(codes: Tensor, spec: TensorSpec) -> Tensor:
    """int8 q -> offset binary uint8; float bit patterns stay."""
    if not spec.info.is_int:
        return codes
    if spec.bits == 8:
        return codes.view(torch.uint8) ^ 128
    return (codes + (1 << (spec.bits - 1))).view(torch.uint8)


def from_unsigned(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Inverse of `to_unsigned`."""
    if not spec.info.is_int:
        return codes
    if spec.bits == 8:
        return (codes ^ 128).view(torch.int8)
    return codes.view(torch.int8) - (1 << (spec.bits - 1))
