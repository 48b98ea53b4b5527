"""How far a tensor is from another, and which tensor it is."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantization noise, 10 log10(||x||^2 / ||x - y||^2), in dB; 200 when they are equal.

    Both must be finite. Values are divided by the largest magnitude first: squares of 1e38 overflow.
    """
    x = reference.float()
    top = float(x.abs().max()) or 1.0
    noise = float(((x - candidate.float()) / top).square().sum(dtype=torch.float64))
    signal = float((x / top).square().sum(dtype=torch.float64))
    if noise == 0:
        return 200.0
    return round(10 * math.log10(max(signal, 1e-300) / noise), 3)


def tensor_hash(x: Tensor) -> str:
    """sha256 of the bytes of a tensor, in row-major order."""
    flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
