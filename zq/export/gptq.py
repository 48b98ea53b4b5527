"""GPTQ checkpoints, as transformers (with gptqmodel), vLLM and SGLang read them.

For a linear layer NAME with an [N, K] weight of b bits in groups along K:

    NAME.qweight  I32 [K*b/32, N]   unsigned codes, packed along K, least significant bit first
    NAME.qzeros   I32 [G, N*b/32]   unsigned zero points, packed along N; format "gptq" holds zero - 1
    NAME.scales   F16 [G, N]
    NAME.g_idx    I32 [K]           k // group: zq's static groups leave no order behind

    w = (q - zero) * scale          symmetric: zero = 2^(b-1)

`checkpoint_format` is "gptq" (v1) for symmetric weights, which every engine reads, and "gptq_v2" for
asymmetric ones, whose zero point 0 the first has no room for. The other two are read (gptq_other.py). Spec:
AutoGPTQ and gptqmodel's readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.writer import Slot
from zq.errors import ZqError
from zq.export import uniform
from zq.export.fields import ROOT, shown, wrong
from zq.export.native import from_unsigned, to_unsigned
from zq.numerics.packing import pack as pack_bits
from zq.numerics.packing import unpack as unpack_bits
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme, TensorSpec, scale_shape

FORMATS = ("int2", "int3", "int4", "int8")
VERSIONS = ("gptq_v2", "gptq")  # by how much smaller than the zero point the stored one is
Read = Callable[[str], Tensor]


def adapt(scheme: Scheme) -> Scheme:
    """Scales that both half precisions hold."""
    return uniform.adapted(scheme, scheme.weights.symmetric)


def refuse(scheme: Scheme, shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> str | None:
    """Why GPTQ cannot hold this layer, or None."""
    return uniform.unfit(scheme, shape, transposed, FORMATS)


def refuse_all(assigned: dict[str, Scheme], skipped: list[str]) -> str | None:
    """Why one GPTQ checkpoint cannot hold these layers together, or None."""
    left = uniform.in_blocks(skipped)
    if left:
        return f"GPTQ quantizes every linear layer of a block, and '{left[0]}' is skipped"
    return uniform.only(assigned, "GPTQ")


def slots(name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Slot]:
    spec, (n, k) = scheme.weights, shape
    groups = scale_shape(spec, shape)[1]
    return [
        Slot(f"{name}.qweight", "I32", (k * spec.bits // 32, n)),
        Slot(f"{name}.qzeros", "I32", (groups, n * spec.bits // 32)),
        Slot(f"{name}.scales", "F16", (groups, n)),
        Slot(f"{name}.g_idx", "I32", (k,)),
    ]


def pack(name: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    return packed(name, q, below(q.spec))


def packed(name: str, q: QTensor, less: int) -> dict[str, Tensor]:
    """less: how much smaller than the zero point the stored one is."""
    bits, k = q.spec.bits, q.shape[1]
    zero = uniform.zeros(q.zero, q.scale, 1 << (bits - 1)) - less
    return {
        f"{name}.qweight": pack_bits(to_unsigned(q.codes, q.spec), bits).T.contiguous(),
        f"{name}.qzeros": pack_bits(zero.T.contiguous(), bits),
        f"{name}.scales": q.scale.T.contiguous(),
        f"{name}.g_idx": _groups(q.spec, k).to(torch.int32).to(q.codes.device),
    }


def unpack(name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Raises ZqError when the groups are not those of the scheme, as after act-order."""
    return unpacked(name, read, scheme, shape, below(scheme.weights))


def unpacked(name: str, read: Read, scheme: Scheme, shape: tuple[int, int], less: int) -> QTensor:
    """less: as in `packed`. Raises ZqError."""
    spec, (n, k) = scheme.weights, shape
    if not torch.equal(read(f"{name}.g_idx").cpu().long(), _groups(spec, k)):
        raise ZqError(
            f"'{name}.g_idx' gives inputs to groups in another order than theirs (act-order, desc_act); zq "
            "reads static groups only, quantize again"
        )
    codes = unpack_bits(read(f"{name}.qweight").T.contiguous(), spec.bits, k)
    zero = unpack_bits(read(f"{name}.qzeros"), spec.bits, n).T.to(torch.int16) + less
    if bool((zero >> spec.bits).any()):
        raise ZqError(
            f"'{name}.qzeros' holds {zero.max() - 1}, which some readers of version 1 take for the zero "
            f"point {zero.max()} and some for 0; zq reads those from 1 to {zero.max() - 1}, quantize again"
        )
    signed = zero - (1 << (spec.bits - 1))
    if spec.symmetric and bool(signed.any()):
        raise ZqError(f"'{name}.qzeros' is not symmetric, as config.json says; quantize or download again")
    return QTensor(
        from_unsigned(codes, spec),
        read(f"{name}.scales").T.contiguous(),
        None if spec.symmetric else signed.to(torch.int8).contiguous(),
        None,
        spec,
    )


def config(assigned: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    scheme = next(iter(assigned.values()))
    return {
        "quant_method": "gptq",
        "bits": scheme.weights.bits,
        "group_size": uniform.group_size(scheme),
        "desc_act": False,
        "sym": scheme.weights.symmetric,
        "lm_head": False,
        "checkpoint_format": VERSIONS[below(scheme.weights)],
        "pack_dtype": "int32",
    }


def schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """GPTQ quantizes every linear layer inside the blocks. Raises ZqError for what zq cannot read."""
    symmetric = config.get("sym", True)
    if not isinstance(symmetric, bool):
        raise wrong(ROOT, config, "sym", "true or false")
    spec = uniform.spec(config, FORMATS, symmetric)
    if config.get("checkpoint_format", "gptq") not in VERSIONS:
        raise wrong(ROOT, config, "checkpoint_format", " or ".join(map(shown, reversed(VERSIONS))))
    if config.get("lm_head"):
        raise wrong(ROOT, config, "lm_head", "false")
    if config.get("desc_act") and config.get("group_size") != -1:  # another order of inputs
        raise wrong(ROOT, config, "desc_act", "false (static groups)")
    for key in ("dynamic", "modules_in_block_to_quantize"):
        if config.get(key):
            raise wrong(ROOT, config, key, "null (one scheme for all layers of a block)")
    return dict.fromkeys(uniform.in_blocks(names), Scheme(spec))


def below(spec: TensorSpec) -> int:
    """How much smaller than the zero point the stored one is, where zq writes it: index of its version."""
    return 1 if spec.symmetric else 0


def _groups(spec: TensorSpec, k: int) -> Tensor:
    """The group of every input, int64 [K]."""
    size = spec.layout.size if spec.layout.kind == "group" else k
    return torch.arange(k) // (size or k)
