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

from zq.export.fields import ROOT, is_size, wrong
from zq.spec import AS_FP16, Layout, Scheme, TensorSpec

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
        (transposed, "the layer is transformers' Conv1D, and GPTQ and AWQ know only nn.Linear"),
        (scheme.activations is not None, "GPTQ and AWQ have no quantized activations"),
        (w.format not in formats, f"the format has no {w.format} weights, only {', '.join(formats)}"),
        (w.layout.kind not in ("group", "channel"), "the format has scales per group and per channel only"),
        (w.two_level or w.extras, "the format has codes, one level of scales and zero points only"),
        (w.scale_dtype not in AS_FP16, "scales of the format are fp16"),
        (
            w.layout.kind == "group" and bool(k % (w.layout.size or 1)),
            f"groups of {w.layout.size} do not divide K={k}",
        ),
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
    if not is_size(bits) or f"int{bits}" not in formats:
        raise wrong(ROOT, config, "bits", ", ".join(format[3:] for format in formats))
    if size != -1 and (not is_size(size) or size < 2):
        raise wrong(ROOT, config, "group_size", "-1 and whole numbers from 2 on")
    layout = Layout("channel") if size == -1 else Layout("group", size)
    return TensorSpec(format=f"int{bits}", layout=layout, symmetric=symmetric, scale_dtype="fp16")


def group_size(scheme: Scheme) -> int:
    layout = scheme.weights.layout
    return layout.size or 0 if layout.kind == "group" else -1


def zeros(q_zero: torch.Tensor | None, scale: torch.Tensor, offset: int) -> torch.Tensor:
    """Unsigned zero points int16 [N, G]: `offset` = 2^(bits-1) in the place of a symmetric one."""
    zero = torch.zeros_like(scale, dtype=torch.int16) if q_zero is None else q_zero.to(torch.int16)
    return zero + offset
