"""AWQ checkpoints ("gemm" version), as transformers (with gptqmodel), vLLM and SGLang read them. 4 bits.

For a linear layer NAME with an [N, K] weight in groups along K:

    NAME.qweight  I32 [K, N/8]   unsigned codes, packed along N
    NAME.qzeros   I32 [G, N/8]   unsigned zero points, the same way
    NAME.scales   F16 [G, N]

    w = (q - zero) * scale

Of the eight columns in a word the nibbles, from the lowest on, hold 0, 2, 4, 6, 1, 3, 5, 7. Every checkpoint
has zero points, so zq writes asymmetric weights. Spec: AutoAWQ's packer and vLLM's reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.writer import Slot
from zq.export import uniform
from zq.export.fields import ROOT, strings, wrong
from zq.export.native import from_unsigned, to_unsigned
from zq.numerics.packing import pack as pack_bits
from zq.numerics.packing import unpack as unpack_bits
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme, scale_shape

FORMATS = ("int4",)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column in each nibble of a word
Read = Callable[[str], Tensor]


def adapt(scheme: Scheme) -> Scheme:
    """Zero points, and scales that both half precisions hold; as it is where there are none to have."""
    weights = replace(scheme.weights, narrow=False)
    if not weights.info.is_int or weights.two_level or weights.extras:
        return scheme
    return uniform.adapted(replace(scheme, weights=weights), symmetric=False)


def refuse(scheme: Scheme, shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> str | None:
    """Why AWQ cannot hold this layer, or None."""
    no_zeros = "AWQ's weights have zero points; add 'asym'" if scheme.weights.symmetric else None
    return uniform.unfit(scheme, shape, transposed, FORMATS) or no_zeros


def refuse_all(assigned: dict[str, Scheme], skipped: list[str]) -> str | None:
    """Why one AWQ checkpoint cannot hold these layers together, or None."""
    return uniform.only(assigned, "AWQ")


def slots(name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Slot]:
    n, k = shape
    groups = scale_shape(scheme.weights, shape)[1]
    return [
        Slot(f"{name}.qweight", "I32", (k, n // 8)),
        Slot(f"{name}.qzeros", "I32", (groups, n // 8)),
        Slot(f"{name}.scales", "F16", (groups, n)),
    ]


def pack(name: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": _pack(to_unsigned(q.codes, q.spec).T),
        f"{name}.qzeros": _pack(uniform.zeros(q.zero, q.scale, 8).T),
        f"{name}.scales": q.scale.T.contiguous(),
    }


def unpack(name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    spec, n = scheme.weights, shape[0]
    codes = _unpack(read(f"{name}.qweight"), n).T.contiguous()
    zero = _unpack(read(f"{name}.qzeros"), n).T.contiguous()
    return QTensor(
        from_unsigned(codes, spec),
        read(f"{name}.scales").T.contiguous(),
        from_unsigned(zero, spec),
        None,
        spec,
    )


def config(assigned: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": uniform.group_size(next(iter(assigned.values()))),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(skipped) or None,
    }


def schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Every linear layer inside the blocks but `modules_to_not_convert`, parts of names. Raises ZqError."""
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise wrong(ROOT, config, "version", '"gemm"')
    if config.get("zero_point", True) is not True:
        raise wrong(ROOT, config, "zero_point", "true")
    spec = uniform.spec(config, FORMATS, symmetric=False)
    left = strings(ROOT, config, "modules_to_not_convert")
    taken = [name for name in uniform.in_blocks(names) if not any(part in name for part in left)]
    return dict.fromkeys(taken, Scheme(spec))


def _pack(values: Tensor) -> Tensor:
    """[R, N] unsigned nibbles -> int32 [R, N/8]."""
    rows, n = values.shape
    ordered = values.reshape(rows, n // 8, 8)[:, :, list(ORDER)]
    return pack_bits(ordered.reshape(rows, n).contiguous(), 4)


def _unpack(words: Tensor, n: int) -> Tensor:
    """Inverse of `_pack`; uint8."""
    values = unpack_bits(words, 4, n).reshape(len(words), n // 8, 8)
    back = [ORDER.index(i) for i in range(8)]
    return values[:, :, back].reshape(len(words), n)
