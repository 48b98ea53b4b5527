"""Linears of a model made ready for serving, one after the other: no weight is there twice for long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zq.errors import ZqError
from zq.runtime.linear import QuantLinear
from zq.runtime.served import serve


class ServedLinear(nn.Module):
    """A linear of `served` (zq/runtime/served.py) and its bias: x [..., K] -> [..., N]."""

    def __init__(self, served: nn.Module, bias: Tensor | None, n: int, k: int) -> None:
        super().__init__()
        self.served: Any = served
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.in_features, self.out_features = k, n

    @property
    def takes(self) -> torch.dtype | None:
        return self.served.takes

    def forward(self, x: Tensor) -> Tensor:
        return self.served(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.served.way}, bias={self.bias is not None}"


def served(linear: QuantLinear, dtype: torch.dtype, device: torch.device) -> ServedLinear:
    """The same layer on `device`, for inputs of `dtype`. Its codes move there and are packed."""
    q = linear.to(device).qtensor
    bias = None if linear.bias is None else linear.bias.to(device, dtype)
    return ServedLinear(serve(q, linear.scheme.activations, dtype), bias, *q.shape)


def serve_linears(
    model: Any, device: torch.device, keep: Callable[[str], bool] = lambda name: False
) -> dict[str, str]:
    """Put a ServedLinear on `device` in the place of every QuantLinear, in the dtype of the model, apart from
    those to `keep`. Returns {full name: what computes it}."""
    names = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and not keep(n)]
    ways = {}
    for name in names:
        made = served(model.get_submodule(name), model.dtype, device)
        model.set_submodule(name, made)
        ways[name] = made.served.way
    if names:
        refuse_saving(model)
    return ways


def refuse_saving(model: Any) -> None:
    """`save_pretrained` of a model whose codes are packed says so (`may_be_saved`)."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.packed = True


def may_be_saved(quantizer: Any) -> bool:
    """Raises ZqError when the codes of the model have been packed for kernels."""
    if getattr(quantizer, "packed", False):
        raise ZqError(
            "this model is packed for kernels and cannot be saved; load it with "
            "zq.load(FOLDER, kernels=False), or copy the folder that it came from"
        )
    return True
