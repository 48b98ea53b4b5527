"""AdamW and SGD with states of 32, 8 or 4 bits, in the place of torch's optimizers of these names.

    8 bits   first moment dynamic8, second udynamic8, blocks of 256 (Dettmers et al. 2021, arXiv:2110.02861;
             the paper has blocks of 2048, bitsandbytes 256)
    4 bits   first moment dynamic4 in blocks of 128, second ulinear4, rank-1 (Li et al. 2023,
             arXiv:2309.01507)

`states` (a mapping or a YAML file, zq/optim/config.py) says otherwise for each state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zq.optim.base import Given, StoredOptimizer
from zq.optim.kernel import adamw_step_, sgd_step_


class AdamW(StoredOptimizer):
    """Decoupled weight decay (arXiv:1711.05101). Parameters of any float dtype, states float32 or quantized.

    Takes torch's arguments: `maximize` and `foreach` (which changes nothing), and amsgrad, capturable and
    differentiable at their defaults. Raises ZqError for these, for numbers out of range, and for `bits` or
    `states` that cannot be.
    """

    names = ("exp_avg", "exp_avg_sq")
    update_name = "adamw"

    def __init__(  # noqa: PLR0913 (torch's)
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bits: int = 32,
        states: Given = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"amsgrad": amsgrad, "maximize": maximize, "foreach": foreach}
        defaults |= {"capturable": capturable, "differentiable": differentiable}
        super().__init__(params, {**defaults, "bits": bits, "states": states}, fused)

    def numbers(self, group: dict[str, Any], step: int) -> dict[str, float]:
        """As `adamw_step_` has them."""
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        root = (1 - beta2**step) ** 0.5
        return {
            "rate": -lr / (1 - beta1**step),
            "decay": 1 - lr * group["weight_decay"],
            "keep": beta2,
            "add": 1 - beta2,
            "lerp": 1 - beta1,
            "root": root,
            "inverse": 1 / root,
            "eps": group["eps"],
        }

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter."""
        step = int(state["step"])
        adamw_step_(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            group=group,
            step=step,
            generator=self.generator(param, group, step),
        )


class SGD(StoredOptimizer):
    """Stochastic gradient descent with momentum, damping, Nesterov and L2 decay as in torch.

    Without momentum there is no state. Torch's arguments and ZqError as in AdamW.
    """

    names = ("momentum_buffer",)
    update_name = "sgd"

    def __init__(  # noqa: PLR0913 (torch's)
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        bits: int = 32,
        states: Given = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        defaults |= {"foreach": foreach, "differentiable": differentiable}
        super().__init__(params, {**defaults, "bits": bits, "states": states}, fused)

    def wanted(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Nothing without momentum."""
        return self.names if group["momentum"] else ()

    def numbers(self, group: dict[str, Any], step: int) -> dict[str, float]:
        """As `sgd_step_` has them."""
        found = {"rate": -float(group["lr"]), "decay": group["weight_decay"], "keep": group["momentum"]}
        more = {"nesterov": int(group["nesterov"]), "fresh": int(step == 1)}
        return {**found, "add": 1 - group["dampening"], **more}

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter."""
        if not group["momentum"]:
            decay = group["weight_decay"]
            grad = grad.add(param, alpha=decay) if decay else grad
            param.add_(grad, alpha=-float(group["lr"]))
            return
        step = int(state["step"])
        sgd_step_(
            param,
            grad,
            state["momentum_buffer"],
            group=group,
            step=step,
            generator=self.generator(param, group, step),
        )
