"""Normalise, second half: choosing the scale of each group.

absmax. The largest magnitude of the group lands on the end of the range:
    full range    s = max|x| / ((2^b - 1) / 2)   (compressed-tensors' convention: /7.5 for 4 bits)
    narrow range  s = max|x| / (2^(b-1) - 1)
    float         s = max|x| / largest code value
    asymmetric    s = (max - min) / (2^b - 1), z = round(qmin - min/s); min <= 0 <= max, so 0 is exact
mse. Among s * f for a grid of factors f, the one with the least sum of squared errors of the group, weighted
by the importance of each input where that is known (the diagonal of a Hessian), each candidate rounded to the
dtype it will be stored in. f > 1 covers ends that are not symmetric (int4: 7.5/7), f < 1 clips outliers.

Scales are rounded to their stored dtype *before* codes are computed, so what is measured in the run
is what a reader of the file gets. An all-zero group gets scale 1 (its codes are all zero); a scale
that would underflow its dtype is raised to the smallest number of that dtype that is normal in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from zq.numerics.codebook import codebook
from zq.spec import TensorSpec

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
}
MSE_FACTORS = (1.0, *(i / 40 for i in range(48, 11, -1)))  # 1 first: ties keep absmax; 1.2 .. 0.3
HALF_MAX = 65280.0  # the largest number of both fp16 and bf16
CACHED = 1 << 17  # values searched at a time on a CPU


@dataclass(frozen=True)
class Scale:
    """scale [R, G] float32 holding values of the stored dtype; zero [R, G] int32 or None.

    Two-level: `scale` is the channel scale [R, 1] and `sub` [R, G] int32 in -15..16, not 0, multiplies it.
    """

    scale: Tensor
    zero: Tensor | None = None
    sub: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """Effective size of one quantization step, [R, G] float32."""
        return self.scale if self.sub is None else self.scale * self.sub


def int_range(spec: TensorSpec) -> tuple[int, int]:
    """(qmin, qmax) of an integer spec."""
    half = 1 << (spec.bits - 1)
    return (-half + 1 if spec.narrow else -half), half - 1


def reach(spec: TensorSpec) -> float:
    """The normalised magnitude on which absmax puts the largest value of a group."""
    if not spec.info.is_int:
        return codebook(spec.format).max
    qmin, qmax = int_range(spec)
    return (qmax - qmin) / 2


def absmax(x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None = None) -> Scale:
    """x [R, G, S] float32 -> Scale. `dtype` is the stored dtype of the floating-point scale."""
    if spec.two_level:
        return _levels().absmax(x, spec, dtype)
    return _derive(x, spec, dtype, 1.0, _bounds(x, spec))


def mse(
    x: Tensor,
    spec: TensorSpec,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    signed: bool = False,
) -> Scale:
    """x [R, G, S] float32 -> the Scale with the least squared error per group over MSE_FACTORS.

    importance: broadcastable to x, weight of each squared error. signed: negative scales are tried too,
    which puts the longer, negative side of a full integer range where the larger weights are.

    Groups do not depend on each other, so on a CPU they are searched in portions that stay in its cache.
    """
    if spec.two_level:
        return _levels().mse(x, spec, dtype, importance, signed)
    axis = 0 if x.shape[0] > 1 else 1
    portion = x.shape[axis] if x.is_cuda else max(1, CACHED * x.shape[axis] // x.numel())
    if importance is not None and importance.shape[axis] > 1:
        portion = x.shape[axis]
    found = [_search(part, spec, dtype, importance, signed) for part in x.split(portion, axis)]
    if len(found) == 1:
        return found[0]

    def join(parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat(parts, axis)  # type: ignore[arg-type]

    scale = join([s.scale for s in found])
    assert scale is not None
    return Scale(scale, join([s.zero for s in found]))


def _levels() -> ModuleType:
    from zq.numerics import levels  # it needs Scale from here

    return levels


def _search(
    x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None, signed: bool
) -> Scale:
    from zq.numerics.qtensor import fake_groups  # rounding belongs there; it needs Scale from here

    bounds = _bounds(x, spec)
    best: Scale | None = None
    least = torch.empty(0)
    for candidate in _candidates(x, spec, dtype, bounds, signed):
        squares = (fake_groups(x, spec, candidate) - x).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(-1)  # [R, G]
        if best is None:
            best, least = candidate, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = _merge(better, candidate, best)
    return best  # type: ignore[return-value]


def mse_signed(x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None = None) -> Scale:
    """`mse` over scales of both signs; the same as `mse` where the range is symmetric."""
    return mse(x, spec, dtype, importance, signed=spec.info.is_int and spec.symmetric and not spec.narrow)


def _candidates(
    x: Tensor, spec: TensorSpec, dtype: torch.dtype, bounds, signed: bool = False
) -> Iterator[Scale]:
    for factor in MSE_FACTORS:
        candidate = _derive(x, spec, dtype, factor, bounds)
        yield candidate
        if signed:
            yield Scale(-candidate.scale)


def _merge(better: Tensor, new: Scale, old: Scale) -> Scale:
    zero = None
    if new.zero is not None and old.zero is not None:
        zero = torch.where(better, new.zero, old.zero)
    return Scale(torch.where(better, new.scale, old.scale), zero=zero)


def _bounds(x: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """(low, high) [R, G] of every group, 0 included; symmetric: both are +-max|x|."""
    if spec.symmetric:
        high = x.abs().amax(-1)
        return -high, high
    low, high = torch.aminmax(x, dim=-1)
    return low.clamp(max=0), high.clamp(min=0)


def _derive(x: Tensor, spec: TensorSpec, dtype: torch.dtype, factor: float, bounds) -> Scale:
    low, high = (b * factor for b in bounds)
    if not spec.symmetric:
        qmin, qmax = int_range(spec)
        steps = high.new_tensor(qmax - qmin)  # a tensor: CUDA multiplies by the reciprocal of a number
        scale = (high - low) / steps
        if bool(torch.isinf(scale).any()):  # the range, not its values, exceeds float32
            scale = high / steps - low / steps
        scale = _store(scale, spec, dtype)
        zero = torch.round(qmin - low / scale).clamp(qmin, qmax).to(torch.int32)
        return Scale(scale, zero=zero)
    return Scale(_store(high / high.new_tensor(reach(spec)), spec, dtype))


def _store(scale: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Round to the stored dtype; 1 for an all-zero group; never 0, infinite or subnormal in float32.

    Subnormal fp16 is allowed: int8 weights below 127.5 * 6.1e-5 = 0.008 would lose codes without it.
    """
    info, least = torch.finfo(dtype), torch.finfo(torch.float32).tiny
    stored = rounded(scale.clamp(max(info.smallest_normal * info.eps, least), info.max), spec, dtype)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def rounded(scale: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """To what a scale of `spec` that is stored in `dtype` can be; float32."""
    stored = scale.to(dtype)
    if spec.scale_dtype == "half":  # fp16 has the narrower range, bf16 the fewer digits
        stored = stored.clamp(-HALF_MAX, HALF_MAX).bfloat16()
    return stored.float()
