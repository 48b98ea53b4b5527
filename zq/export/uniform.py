"""What the two older formats, GPTQ and AWQ, have in common: one scheme for every linear layer of the blocks.

Scales are stored as fp16, and loaders cast them to the dtype they compute in, so zq gives them values that
bf16 holds as well (`s=half`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from zq.errors import ZqError
from zq.spec import Layout, Scheme, TensorSpec

IN_BLOCK = re.compile(r"(^|\.)\d+\.")


def in_blocks(names: Iterable[str]) -> list[str]:
    """The layers whose names hold a number: those of the blocks."""
    return [name for name in names if IN_BLOCK.search(name)]


def adapted(scheme: Scheme, symmetric: bool) -> Scheme:
    """The scheme with scales as these formats store them."""
    return replace(scheme, weights=replace(scheme.weights, scale_dtype="half", symmetric=symmetric))


def unfit(scheme: Scheme, shape: tuple[int, int], transposed: bool, formats: tuple[str, ...]) -> str | None:
    """Why such a format, with weights of `formats`, cannot hold this layer, or None."""
    w, (n, k) = scheme.weights, shape
    problems = [
        (transposed, "its layer is transformers' Conv1D; zq writes it for nn.Linear only"),
        (scheme.activations is not None, "it has no quantized activations"),
        (w.format not in formats, f"it has no {w.format} weights, only {', '.join(formats)}"),
        (w.layout.kind not in ("group", "channel"), "it needs a scale per group or per channel"),
        (w.two_level or w.extras, "it has codes, one level of scales and zero points only"),
        (w.scale_dtype not in ("half", "fp16"), "its scales are fp16"),
        (w.layout.kind == "group" and bool(k % (w.layout.size or 1)), f"its groups do not divide K={k}"),
        (bool(n % 32 or k % 32), f"both sides of [{n}, {k}] must be multiples of 32"),
    ]
    return next((reason for hit, reason in problems if hit), None)


def only(assigned: dict[str, Scheme], method: str) -> str | None:
    """Why one checkpoint of this kind cannot hold these layers together, or None."""
    outside = sorted(set(assigned) - set(in_blocks(assigned)))
    if outside:
        return f"{method} quantizes only layers inside the blocks, not '{outside[0]}'"
    found = sorted({str(scheme) for scheme in assigned.values()})
    if len(found) > 1:
        return f"{method} has one scheme for all layers, not {' and '.join(found[:2])}"
    return None


def spec(config: dict[str, Any], formats: tuple[str, ...], symmetric: bool) -> TensorSpec:
    """The weight spec of a config with `bits` and `group_size` (-1: a scale per channel). Raises ZqError."""
    bits, size = config.get("bits"), config.get("group_size")
    if f"int{bits}" not in formats or not isinstance(size, int) or (size < 2 and size != -1):
        raise ZqError(
            f"quantization_config has bits {bits!r} and group_size {size!r}; allowed: "
            f"{', '.join(f[3:] for f in formats)} bits, a group_size from 2 on or -1"
        )
    layout = Layout("channel") if size == -1 else Layout("group", size)
    return TensorSpec(format=f"int{bits}", layout=layout, symmetric=symmetric, scale_dtype="fp16")


def strings(config: dict[str, Any], key: str) -> list[str]:
    """A list of names. Raises ZqError for anything else."""
    listed = config.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise ZqError(f"'{key}' in quantization_config is no list of names: {listed!r}; download it again")
    return listed


def group_size(scheme: Scheme) -> int:
    layout = scheme.weights.layout
    return layout.size or 0 if layout.kind == "group" else -1


def zeros(q_zero: torch.Tensor | None, scale: torch.Tensor, offset: int) -> torch.Tensor:
    """Unsigned zero points int16 [N, G]: `offset` = 2^(bits-1) in the place of a symmetric one."""
    zero = torch.zeros_like(scale, dtype=torch.int16) if q_zero is None else q_zero.to(torch.int16)
    return zero + offset
