"""Which operators and compile units the layers of a checkpoint need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from zq.kernels.table import UNITS
from zq.kernels.table_kv import CACHES, TEXT_OUT, kv_units, text_unit
from zq.kernels.tiles import packing, unit_name
from zq.kernels.unit import Unit
from zq.spec import Scheme

INPUTS = {"bf16": ("bf16",), "fp16": ("fp16",), "fp32": ("bf16", "fp16")}  # fp32 models are served in 16 bits
OUTPUTS = {  # of a scheme's activations -> OUT and SCALES of quant.cu
    "int8:token": ("Int8", "Token"),
    "e4m3fn:token": ("E4m3", "Token"),
    "e4m3fn:g128": ("E4m3", "Block128"),
}
FP8_BLOCK128 = Scheme.parse("e4m3fn:128x128 @ e4m3fn:g128")
GROUPS = (0, 32, 64, 128)  # 0: one scale per channel
MULTIPLE = 16  # of K: rows are read 16 bytes at a time
INT8_K = 65536  # beyond it sums of INT8 products may not fit 32 bits
FAMILIES = (90, 0)  # Hopper, all others


def gemm_op(scheme: Scheme) -> str | None:
    """The operator that computes a layer of this scheme; None: no kernel does, it is dequantized."""
    weights, activations = scheme.weights, scheme.activations
    kind = weights.layout.kind
    if kind == "tile":
        plain = replace(scheme, weights=replace(weights, scale_dtype=None))  # the kernel's own are float32
        return "fp8_block128" if plain == FP8_BLOCK128 else None
    group = {"group": weights.layout.size or 0, "channel": 0}.get(kind)
    if group not in GROUPS or weights.extras:
        return None
    inputs = None if activations is None else activations.format
    if weights.two_level:
        return "w4a8_int8" if (weights.format, inputs) == ("int4", "int8") and group >= 64 else None
    if not weights.symmetric:
        return "w4a16" if (weights.format, inputs) == ("int4", None) and group else None
    if weights.format == "int4":
        return {None: "w4a16", "int8": "w4a8_int8_group", "e4m3fn": "w4a8_fp8" if group else None}.get(inputs)
    if group:
        return None
    by_formats = {("int8", None): "w8a16", ("int8", "int8"): "w8a8_int8", ("e4m3fn", "e4m3fn"): "w8a8_fp8"}
    return by_formats.get((weights.format, inputs))


def missed(schemes: Iterable[Scheme]) -> list[str]:
    """A note on each scheme that asks for the grid of a kernel, which does not take it."""
    return [
        f"no kernel takes {scheme}: on a GPU zq dequantizes it; two-level scales want groups of 64 or 128"
        for scheme in sorted(schemes, key=str)
        if scheme.weights.two_level and scheme.activations and gemm_op(scheme) is None
    ]


def kernel_op(scheme: Scheme, k: int, dtype: str, sm: int) -> str | None:
    """The operator that computes a layer of `k` inputs in `dtype` (bf16, fp16, fp32) on a CUDA device of
    compute capability sm / 10, or None."""
    op = gemm_op(scheme)
    least = 89 if op and "fp8" in op else 80
    int8 = scheme.activations is not None and scheme.activations.format == "int8"
    if op is None or sm < least or k % MULTIPLE or (int8 and k > INT8_K) or dtype == "fp32":
        return None
    return op


def units_for(schemes: Iterable[Scheme], dtype: str, decoder: bool = False) -> list[Unit]:
    """The units that layers of these schemes need in a model of `dtype` (bf16, fp16, fp32), activations alone
    or fused included, in the order of the table. decoder: with those of its steps, over caches of all kinds.
    None at all where no kernel computes a layer."""
    names: set[str] = set()
    outputs: set[tuple[str, str]] = set()
    for scheme in schemes:
        op = gemm_op(scheme)
        if op is None:
            continue
        weights = scheme.weights
        group = (weights.layout.size or 0) if weights.layout.kind == "group" else 0
        for kind in INPUTS[dtype]:
            packed = packing(op, group, not weights.symmetric, kind == "fp16")
            names |= {unit_name(op, packed, arch) for arch in FAMILIES}
        if scheme.activations is not None:
            outputs.add(OUTPUTS[str(scheme.activations)])
    if names and decoder:
        names |= {name for kind in INPUTS[dtype] for name in _cache_units(kind, outputs)}
    return [unit for unit in UNITS.values() if unit.name in names or _quantizes(unit, INPUTS[dtype], outputs)]


def _cache_units(kind: str, outputs: set[tuple[str, str]]) -> list[str]:
    """What writes and reads caches in steps, what rounds the keys and values of prompts, and attention of
    prompts, whose rows come out as the layers want them."""
    steps = [name for kv in CACHES for name in kv_units(kind, kv)]
    rows = [short for short, out in TEXT_OUT.items() if out is None or (out, "Token") in outputs]
    return [*steps, *(f"plain_{kv}_{kind}" for kv in CACHES if kv), *(text_unit(kind, x) for x in rows)]


def _quantizes(unit: Unit, inputs: tuple[str, ...], outputs: set[tuple[str, str]]) -> bool:
    defines = dict(unit.defines)
    if unit.source != "quant.cu" or defines["IN"] not in inputs:
        return False
    return (defines["OUT"], defines["SCALES"]) in outputs
