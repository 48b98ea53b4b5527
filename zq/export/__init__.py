"""Output formats. Each module offers the same eight functions:

adapt(scheme)                            -> the scheme as this format always stores it
refuse(scheme, shape, transposed, dtype) -> why the format cannot hold this layer, or None
refuse_all(assigned, skipped)            -> why it cannot hold these layers together, or None
slots(name, scheme, shape, dtype)        -> the tensors it will write, before any work
pack(name, qtensor, scheme)              -> those tensors
unpack(name, read, scheme, shape)        -> the QTensor again; exact inverse of pack
config(assigned, skipped)                -> "quantization_config" of config.json
schemes(config, names)                   -> which scheme that config gives to each named linear layer
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from zq.checkpoint.index import COMPUTE, CheckpointIndex, main_dtype
from zq.errors import ZqError
from zq.export import awq, compressed_tensors, fp8, gptq, gptq_other, native
from zq.numerics.scales import DTYPES
from zq.spec import Scheme

EXPORTERS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors,
    "zq": native,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
}


def asked_as(format: str) -> str:
    """How a user asks for a format."""
    return f"--to {format} (in a recipe, format: {format})"


def exporter_for(config: dict[str, Any] | None, where: str) -> ModuleType:
    """The exporter whose checkpoint this `quantization_config` describes. Raises ZqError."""
    if config is not None and not isinstance(config, dict):
        raise ZqError(f"{where}: quantization_config is {config!r}, not a mapping; download it again")
    method = (config or {}).get("quant_method")
    if not isinstance(method, str) or method not in EXPORTERS:
        has = f"is quantized with {method!r}" if method else "is not quantized"
        raise ZqError(f"{where} {has}; zq reads checkpoints of: {', '.join(EXPORTERS)}; give one of these")
    if method == "gptq" and gptq_other.describes(config or {}):
        return gptq_other
    return EXPORTERS[method]


def schemes_of(
    config: dict[str, Any] | None, index: CheckpointIndex, shapes: dict[str, tuple[int, int]]
) -> tuple[ModuleType, dict[str, Scheme]]:
    """The exporter of a checkpoint, and which scheme its `quantization_config` gives to each of these linear
    layers. Raises ZqError."""
    exporter = exporter_for(config, str(index.root))
    try:
        assigned = exporter.schemes(config, shapes)
    except ZqError as error:
        raise ZqError(f"{index.root}: {error}") from None
    return exporter, _as_stored(exporter, assigned, index, shapes) if assigned else {}


def _as_stored(
    exporter: ModuleType,
    assigned: dict[str, Scheme],
    index: CheckpointIndex,
    shapes: dict[str, tuple[int, int]],
) -> dict[str, Scheme]:
    """The schemes with float32 scales (`s=fp32`) where the dtype that they say, else the model's, would round
    those of the file: other tools store them wider than a config says."""
    slots = {name: exporter.slots(name, x, shapes[name], torch.float32) for name, x in assigned.items()}
    dtype = main_dtype(index, {slot.name for each in slots.values() for slot in each})
    wide = set()
    for name, scheme in assigned.items():
        scale = next(slot.name for slot in slots[name] if slot.dtype in COMPUTE)
        said = scheme.weights.scale_dtype
        own = DTYPES[said] if said else dtype
        found = COMPUTE.get(index.tensors[scale].dtype, own) if scale in index.tensors else own
        if torch.promote_types(found, own) != own:
            wide.add(scheme)
    fp32 = {x: replace(x, weights=replace(x.weights, scale_dtype="fp32")) for x in wide}
    return {name: fp32.get(scheme, scheme) for name, scheme in assigned.items()}
