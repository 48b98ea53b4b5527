"""Orthogonal matrices that are cheap to multiply with.

    hadamard   Q = diag(s) (H_2^k (x) H_m) / sqrt(n), s random signs: every entry has the same magnitude, so
               an outlier of one channel is spread evenly over all (QuaRot, arXiv:2404.00456)
    random     Q uniform over all orthogonal matrices: any size, n^2 operations per row

Computed in float64: sums of bfloat16 weights of like size are then exact, in whatever order they are taken.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from zq.numerics import hadamard

CHUNK = 1 << 18  # values at a time: their float64 copies stay in the cache


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q [size, size] = diag(signs) (H (x) base) * scale, H Sylvester's matrix of order size / len(base)."""

    size: int
    signs: Tensor
    base: Tensor
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """x Q: float64 [..., c * size] -> the same shape; each run of `size` values on its own (heads)."""
        m = len(self.base)
        runs = x.reshape(*x.shape[:-1], -1, self.size) * self.signs.to(x.device)
        runs = runs.reshape(*runs.shape[:-1], self.size // m, m)
        if m > 1:
            runs = runs @ self.base.to(x.device)
        return hadamard.walsh(runs).mul_(self.scale).reshape(x.shape)


def hadamard_rotation(size: int, seed: str) -> Rotation | None:
    """A randomised Hadamard matrix, the same for the same seed; None when there is none of this size."""
    found = hadamard.split(size)
    if found is None:
        return None
    signs = torch.randint(0, 2, (size,), generator=_generator(seed)).double() * 2 - 1
    return Rotation(size, signs, hadamard.base(found[1]).double(), size**-0.5)


def random_rotation(size: int, seed: str) -> Rotation:
    """Uniform over the orthogonal matrices: QR of normal numbers, the diagonal of R made positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=_generator(seed), dtype=torch.float64))
    return Rotation(size, torch.ones(size, dtype=torch.float64), q * r.diagonal().sign(), 1.0)


def rotate_weight(
    weight: Tensor,
    outputs: Rotation | None,
    gamma: Tensor | None,
    inputs: Rotation | None,
    device: torch.device | str,
) -> Tensor:
    """Out^T W diag(gamma) In in the dtype of W, computed in float64 on `device`, a part at a time.

    weight [n, k]; outputs, inputs: block-diagonal over n and k where they are smaller; gamma [k].
    """
    result = torch.empty_like(weight)
    whole = outputs is not None and outputs.size == len(weight)  # then only columns can be taken apart
    dim, rotation = (1, inputs) if whole else (0, outputs)
    block = rotation.size if rotation else 1
    step = max(1, CHUNK // weight.shape[1 - dim] // block) * block
    for start in range(0, weight.shape[dim], step):
        size = min(step, weight.shape[dim] - start)
        x = weight.narrow(dim, start, size).to(device, torch.float64)
        if gamma is not None:
            scale = gamma.narrow(0, start, size) if whole else gamma
            x = x * scale.to(device, torch.float64)
        if inputs is not None:
            x = inputs.apply(x)
        if outputs is not None:
            x = outputs.apply(x.T).T
        result.narrow(dim, start, size).copy_(x)
    return result


def _generator(seed: str) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
