"""How far what a quantized block leads to is from what the float block led to, per token."""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 3.0


def token_weights(targets: Tensor, loss: str) -> Tensor:
    """targets [S, T, D] -> weights [S, T] with mean about 1.

    "mse" weighs all tokens alike. "normalised" divides by the power of the token's target, at most CLIP
    times the median weight, so that the few tokens of massive magnitude do not decide everything.
    """
    power = torch.stack([t.float().square().mean(-1) for t in targets])
    if loss == "mse":
        return torch.ones_like(power)
    weights = 1 / (power + 1e-6)
    return (weights / weights.mean()).clamp(max=CLIP * (weights / weights.mean()).median())


def weighted_mse(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """mean over tokens of weight * mean over channels of (y - target)^2; a scalar float32."""
    return (weights * (outputs.float() - targets.float()).square().mean(-1)).mean()


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """mean over tokens of KL(softmax(targets) || softmax(logits)), nats; a scalar float32; both [..., V]."""
    wanted = torch.log_softmax(targets.float(), -1)
    return (wanted.exp() * (wanted - torch.log_softmax(logits.float(), -1))).sum(-1).mean()
