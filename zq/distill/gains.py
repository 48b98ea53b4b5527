"""Learned gains of the norms of a block: gamma(t) = gamma_0 (1 + t), by the sign of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedGain:
    """The weight [D] of one norm. `rate` is the relative change that all iterations can make, times two."""

    def __init__(self, norm: nn.Module, rate: float) -> None:
        weight = norm.weight
        assert isinstance(weight, Tensor)
        self.rate = rate
        self.parameter: Tensor = weight
        self.start = weight.detach().float().clone()
        self.change = torch.zeros_like(self.start)

    def follow(self, gradient: Tensor, fall: Tensor) -> None:
        """Go against `gradient` [D]; the norm computes with the new weight afterwards."""
        self.change.sub_((gradient.float() * self.start).sign_().mul_(self.rate * fall))
        self.soften()

    def soften(self) -> None:
        """Let the norm compute with the weight as it is now."""
        self.parameter.data.copy_(self.start * (1 + self.change))

    def settle(self) -> None:
        """The same: it is written as it is used, rounded to the dtype of the model."""
        self.soften()

    def state(self) -> tuple[Tensor, ...]:
        return (self.change.clone(),)

    def restore(self, state: tuple[Tensor, ...]) -> None:
        self.change.copy_(state[0])
