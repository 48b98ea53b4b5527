"""What an optimizer is given, checked before anything changes: options of groups and gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Options of torch's optimizers that say how a step is computed, not what comes out: those of a file are left.
HOW = ("foreach", "capturable", "differentiable")
UNDONE = {
    "amsgrad": "zq's optimizers keep no maximum of the second moment",
    "capturable": "a step of zq cannot be captured into a CUDA graph (call step() after each replay)",
    "differentiable": "no gradient passes through a step of zq",
}


def options(group: Mapping[str, Any], where: str = "") -> None:
    """Of a parameter group; `where` is put before the message. Raises ZqError."""
    for name in ("lr", "eps", "weight_decay", "momentum", "dampening"):
        if name in group:
            _number(name, group[name], where)
    if "betas" in group:
        betas = group["betas"]
        pair = isinstance(betas, Sequence) and len(betas) == 2 and all(is_number(beta) for beta in betas)
        if not pair or not all(0 <= float(beta) < 1 for beta in betas):
            raise ZqError(f"{where}betas={betas!r} is not allowed; allowed: two numbers from 0 to below 1")
    if "momentum" in group and group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ZqError(f"{where}nesterov=True needs momentum and no dampening; give momentum=0.9, dampening=0")
    for name in ("maximize", *UNDONE, "foreach"):
        if where and name in HOW:
            continue
        value = group.get(name)
        if value not in (None, True, False):
            raise ZqError(f"{where}{name}={value!r} is not allowed; allowed: True, False")
        if value and name in UNDONE:
            raise ZqError(f"{where}{name}=True is not possible: {UNDONE[name]}; give {name}=False")
    if group.get("decoupled_weight_decay", True) is False and group.get("weight_decay"):
        raise ZqError(
            f"{where}weight decay there is part of the gradient (torch's Adam), zq's AdamW decays the "
            "weights; give weight_decay=0"
        )


def gradient(param: Tensor, grad: Tensor) -> None:
    """Raises ZqError for what cannot be stepped."""
    if grad.is_sparse:
        raise ZqError("a gradient is sparse; zq's optimizers take dense ones (Embedding(sparse=False))")
    if param.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ZqError(
            f"a parameter of shape {list(param.shape)} is {str(param.dtype).removeprefix('torch.')}; "
            f"allowed: {allowed} (of complex ones torch.view_as_real)"
        )


def is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(name: str, value: Any, where: str) -> None:
    if not is_number(value) or not 0 <= float(value) < math.inf:
        raise ZqError(f"{where}{name}={value!r} is not allowed; allowed: a number from 0")
