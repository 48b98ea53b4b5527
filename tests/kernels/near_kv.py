"""How far decode_attention and attend_text may be from their references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zq.kernels import reference_kv


def of_magnitudes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with the magnitudes of the values."""
    v = args[2]
    sizes = v.float().abs().clamp(max=127 if v.dtype == torch.int8 else None, min=0)
    return (*args[:2], sizes.to(v.dtype), *args[3:])


def worst(found: Tensor, args: tuple[Any, ...], sums: float = 1e-5) -> float:
    """Error over what is allowed: the rounding of both outputs and of the probabilities to 16 bits, and
    `sums`, that of float32 sums.

    The errors of probabilities are random, but an error of all of them at once is bounded by the mean
    magnitude of the values. An output can be subnormal, where the likely positions have the value zero; the
    steps there are fixed, 2^-24 in FP16."""
    wanted = reference_kv.decode_attention(*args).double()
    magnitude = reference_kv.decode_attention(*of_magnitudes(args)).double()
    return _worst(found, wanted, magnitude, args[0].dtype, sums)


def worst_text(found: Tensor, args: tuple[Any, ...], sums: float = 1e-5) -> float:
    """The same of attend_text. A cache is not written."""
    args = *args[:4], None, None, *args[6:]
    wanted = reference_kv.attend_text(*args).double()
    magnitude = reference_kv.attend_text(*args[:2], args[2].abs(), *args[3:]).double()
    return _worst(found, wanted, magnitude, args[0].dtype, sums)


def _worst(found: Tensor, wanted: Tensor, magnitude: Tensor, dtype: torch.dtype, sums: float) -> float:
    assert torch.isfinite(wanted).all()
    of = torch.finfo(dtype)
    step = max(of.smallest_normal * of.eps, 1e-30)
    allowed = of.eps / 2 * (wanted.abs() + magnitude) * 1.01 + sums * magnitude + step
    ratio = (found.double() - wanted).abs() / allowed
    return float("inf") if bool(ratio.isnan().any()) else ratio.max().item()
