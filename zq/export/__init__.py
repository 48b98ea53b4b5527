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

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from zq.errors import ZqError
from zq.export import awq, compressed_tensors, fp8, gptq, gptq_other, native
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
    config: dict[str, Any] | None, names: Iterable[str], where: str
) -> tuple[ModuleType, dict[str, Scheme]]:
    """The exporter of the checkpoint at `where`, and which scheme its `quantization_config` gives to each of
    these linear layers. Raises ZqError."""
    exporter = exporter_for(config, where)
    try:
        return exporter, exporter.schemes(config, names)
    except ZqError as error:
        raise ZqError(f"{where}: {error}") from None
