"""Tiny models with quantized layers, made without a file, and how far two of them are apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.simulate import block_linears
from tests.tiny import build_tiny
from zq.models.layout import is_transposed
from zq.numerics.qtensor import quantize
from zq.runtime import served
from zq.runtime.linear import replace_linear
from zq.spec import Scheme

SchemeOf = str | Callable[[str], str | None]
W8A8, W4A8 = "int8:channel @ int8:token", "int4:g64 @ int8:token"
TWO_LEVEL, W4A16, W8A16 = "int4:g64:two-level @ int8:token", "int4:g64", "int8:channel"


def w4w8a8(name: str) -> str:
    """ZeroQuant's mix: INT4 feed-forward, INT8 attention."""
    return W8A8 if "att" in name.replace("attention.output", "attn") else W4A8


SCHEMES: dict[str, SchemeOf] = {
    "w8a8": W8A8,
    "w4a8": W4A8,
    "two-level": TWO_LEVEL,
    "w4a16": W4A16,
    "w4w8a8": w4w8a8,
}


def quantized(name: str, scheme: SchemeOf, dtype: torch.dtype = torch.bfloat16, model: Any = None) -> Any:
    """`build_tiny(name)`, or `model`, with the linears of its blocks as QuantLinear. scheme: for all of them,
    or by full name (None: as it is)."""
    model = build_tiny(name, dtype) if model is None else model
    for path in block_linears(model):
        text = scheme if isinstance(scheme, str) else scheme(path)
        if text is None:
            continue
        old = model.get_submodule(path)
        weight = old.weight.detach().T if is_transposed(old) else old.weight.detach()
        parsed = Scheme.parse(text)
        new = replace_linear(model, path, parsed, dtype)
        new.set_weight(quantize(weight, parsed.weights, "mse"))
    return model


def in_float32(model: nn.Module) -> Any:
    """The same codes and scales in a float32 model, unoptimized."""
    return copy.deepcopy(model).float()


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def force_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose on this machine what a Hopper GPU gets; its operators are their references here."""
    monkeypatch.setattr(served, "capability", lambda device: 90)
