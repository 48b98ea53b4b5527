"""One step of AdamW or SGD for one parameter in torch operations; zq/optim/fused.py gives the same on CUDA.

    AdamW    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
             p = p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    SGD      g = g + wd p,  m = mu m + (1 - d) g (first step: g)
             p = p - lr m, with Nesterov p - lr (g + mu m)

in float32 and in torch's order of operations, so that with float32 states the result is torch's to the bit.
The update takes m and v as they are before they are quantized again (8-bit optimizers, arXiv:2110.02861).
With quantized states an element whose gradient is NaN or Inf is left as it is and its states become zero, as
in bitsandbytes: one NaN would otherwise be the scale of its whole block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zq.optim.storage import Factored, Full, Quantized, State, Values, parts


def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: State,
    exp_avg_sq: State,
    *,
    group: Mapping[str, Any],
    step: int,
    generator: torch.Generator | None = None,
) -> None:
    """Changes `param` and both states in place. `param` and `grad` have one shape and device, any float
    dtype; `group` has lr, betas, eps and weight_decay; `step` counts from 1; with a `generator` states are
    rounded stochastically."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    flat, gradient = _flat(param), grad.reshape(-1)
    careful = not (isinstance(exp_avg, Full) and isinstance(exp_avg_sq, Full))

    def slope(start: int, stop: int) -> Tensor:
        g = gradient[start:stop].float()
        return g.nan_to_num(0.0, 0.0, 0.0) if careful else g

    def first(start: int, stop: int) -> Tensor:
        return exp_avg.read(start, stop).lerp_(slope(start, stop), 1 - beta1)

    def second(start: int, stop: int) -> Tensor:
        if isinstance(exp_avg_sq, Factored):
            return exp_avg_sq.read(start, stop)
        g = slope(start, stop)
        return exp_avg_sq.read(start, stop).mul_(beta2).addcmul_(g, g, value=1 - beta2)

    if isinstance(exp_avg_sq, Factored):
        exp_avg_sq.absorb(grad, beta2)
    _widen(exp_avg, first, flat, exp_avg_sq)
    _widen(exp_avg_sq, second, flat, exp_avg)
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for start, stop in parts(flat.numel(), exp_avg, exp_avg_sq):
        m, v = first(start, stop), second(start, stop)
        old = flat[start:stop]
        now = old.float() if old.dtype != torch.float32 else old.clone()
        now.mul_(1 - lr * group["weight_decay"]).addcdiv_(
            m, (v.sqrt() / root).add_(group["eps"]), value=-rate
        )
        if careful:
            fine = torch.isfinite(gradient[start:stop])
            now = torch.where(fine, now, old.float())
            m, v = torch.where(fine, m, 0.0), torch.where(fine, v, 0.0)
        old.copy_(now)
        exp_avg.write(start, stop, m, generator)  # type: ignore[union-attr]
        if not isinstance(exp_avg_sq, Factored):
            exp_avg_sq.write(start, stop, v, generator)
    _finish(param, flat, exp_avg, exp_avg_sq)


def sgd_step_(
    param: Tensor,
    grad: Tensor,
    buffer: State,
    *,
    group: Mapping[str, Any],
    step: int,
    generator: torch.Generator | None = None,
) -> None:
    """Changes `param` and its momentum `buffer` in place; `group` has lr, momentum, dampening, nesterov and
    weight_decay; otherwise as `adamw_step_`."""
    momentum, decay = group["momentum"], group["weight_decay"]
    flat, gradient = _flat(param), grad.reshape(-1)
    careful = not isinstance(buffer, Full)

    def slope(start: int, stop: int) -> Tensor:
        g = gradient[start:stop].float()
        g = g.nan_to_num(0.0, 0.0, 0.0) if careful else g
        return g.add(flat[start:stop].float(), alpha=decay) if decay else g

    def moved(start: int, stop: int) -> Tensor:
        if step == 1:
            return slope(start, stop).clone()
        return buffer.read(start, stop).mul_(momentum).add_(slope(start, stop), alpha=1 - group["dampening"])

    _widen(buffer, moved, flat, buffer)
    for start, stop in parts(flat.numel(), buffer):
        m, old = moved(start, stop), flat[start:stop]
        way = slope(start, stop).add(m, alpha=momentum) if group["nesterov"] else m
        now = old.float().add(way, alpha=-float(group["lr"]))
        if careful:
            fine = torch.isfinite(gradient[start:stop])
            now, m = torch.where(fine, now, old.float()), torch.where(fine, m, 0.0)
        old.copy_(now)
        buffer.write(start, stop, m, generator)  # type: ignore[union-attr]
    _finish(param, flat, buffer)


def _flat(param: Tensor) -> Tensor:
    return param.detach().reshape(
        -1
    )  # a view where the memory allows, else a copy that `_finish` writes back


def _widen(state: State, values: Values, flat: Tensor, other: State) -> None:
    """Scales that all parts share cover the new values before the first part is written."""
    if isinstance(state, Quantized) and state.shared:
        state.begin()
        for part in parts(flat.numel(), state, other):
            state.widen(*part, values(*part))


def _finish(param: Tensor, flat: Tensor, *states: State) -> None:
    for state in states:
        if isinstance(state, Quantized):
            state.finish()
    if not param.is_contiguous():
        param.detach().copy_(flat.view(param.shape))
