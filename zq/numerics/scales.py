"""Normalise, second half: choosing the scale of each group.

absmax. The largest magnitude of the group lands on the end of the range:
    full range    s = max|x| / ((2^b - 1) / 2)   (compressed-tensors' convention: /7.5 for 4 bits)
    narrow range  s = max|x| / (2^(b-1) - 1)
    float         s = max|x| / largest code value
    asymmetric    s = (max - min) / (2^b - 1), z = round(qmin - min/s); min <= 0 <= max, so 0 is exact
mse. Among s * f for a grid of factors f, the one with the least sum of squared errors of the group, weighted
by the importance of each input where that is known (the diagonal of a Hessian), each candidate rounded to the
dtype it will be stored in. f > 1 covers ends that are not symmetric (int4: 7.5/7), f < 1 clips outliers.

absmax-signed, mse-signed. Where the ends of the range differ (int4: -8 and 7; dynamic maps have no -1) the
scale may be negative: the largest magnitude lands exactly on the longer end, or both signs are searched.
pow2. Groups inside a group of scale s have step s 2^-e, e = min(floor(log2(max|outer| / max|inner|)), 15).
center. The mean of a group (the least value, for formats without a sign) is subtracted first.

Scales are rounded to their stored dtype *before* codes are computed, so what is measured in the run
is what a reader of the file gets. An all-zero group gets scale 1 (its codes are all zero), and
where the format has no zero the least one, whose products are below the normal numbers; a scale
that would underflow its dtype is raised to the smallest number of that dtype that is normal in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from zq.numerics.codebook import codebook
from zq.numerics.estimate import estimate
from zq.spec import TensorSpec

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    "short": torch.float16,
}
MSE_FACTORS = (1.0, *(i / 40 for i in range(48, 11, -1)))  # 1 first: ties keep absmax; 1.2 .. 0.3
HALF_MAX = 65280.0  # the largest number of both fp16 and bf16
CACHED = 1 << 17  # values searched at a time on a CPU
SHIFT_BITS = 4  # of the exponent of a power-of-two group


@dataclass(frozen=True)
class Scale:
    """scale [R, G] float32 holding values of the stored dtype; zero [R, G] int32 or None.

    Two-level: `scale` is the channel scale [R, 1] and `sub` [R, G] int32 in -15..16, not 0, multiplies it.
    Power-of-two groups: `scale` [R, outer groups], `shift` [R, G] int32 in 0..15.
    center [R, G] float32 in the stored dtype; book [1 or R, 2^bits] float32, of estimated formats.
    """

    scale: Tensor
    zero: Tensor | None = None
    sub: Tensor | None = None
    shift: Tensor | None = None
    center: Tensor | None = None
    book: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """Effective size of one quantization step, [R, G] float32."""
        if self.shift is not None:
            inside = self.shift.shape[1] // self.scale.shape[1]
            powers = torch.tensor([0.5**e for e in range(1 << SHIFT_BITS)], device=self.scale.device)
            return self.scale.repeat_interleave(inside, 1) * powers[self.shift.long()]
        return self.scale if self.sub is None else self.scale * self.sub


def int_range(spec: TensorSpec) -> tuple[int, int]:
    """(qmin, qmax) of an integer spec."""
    half = 1 << (spec.bits - 1)
    return (-half + 1 if spec.narrow else -half), half - 1


def reach(spec: TensorSpec) -> float:
    """The normalised magnitude on which absmax puts the largest value of a group."""
    low, high = _ends(spec)
    return (high - low) / 2 if spec.info.is_int else high


def _ends(spec: TensorSpec) -> tuple[float, float]:
    """The least and the largest normalised value; of estimated formats, what they are normalised to."""
    if spec.info.is_int:
        return int_range(spec)
    if spec.info.is_estimated:
        return -1.0, 1.0
    values = codebook(spec.format).values
    return float(values[0]), float(values[-1])


def carries_sign(spec: TensorSpec) -> bool:
    """Whether a negative scale can be better: one end of the range reaches further than the other."""
    low, high = _ends(spec)
    plain = spec.symmetric and spec.layout.kind != "rank1" and spec.info.signed
    return plain and (-low != high or spec.info.is_estimated)


def absmax(
    x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None = None, signed: bool = False
) -> Scale:
    """x [R, G, S] float32 -> Scale. `dtype` is the stored dtype of the floating-point scale.

    importance: broadcastable to x, counts for k-means only. signed: the scale carries the sign.
    """
    if spec.two_level:
        return _levels().absmax(x, spec, dtype)
    center, x = _centered(x, spec, dtype)
    found = _derive(x, spec, dtype, 1.0, _bounds(x, spec, signed))
    return replace(found, center=center, book=_book(x, spec, dtype, found, importance))


def absmax_signed(x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None = None) -> Scale:
    """`absmax` with the value of largest magnitude on the longer end; the same where the ends are alike."""
    return absmax(x, spec, dtype, importance, signed=carries_sign(spec) and not spec.two_level)


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
    Estimated code values are those of `absmax`.
    """
    if spec.two_level:
        return _levels().mse(x, spec, dtype, importance, signed)
    center, x = _centered(x, spec, dtype)
    book = None
    if spec.info.is_estimated:
        start = _derive(x, spec, dtype, 1.0, _bounds(x, spec, signed))
        book = _book(x, spec, dtype, start, importance)
    axis, portion = _portion(x, spec, importance)
    parts = x.split(portion, axis)
    books = [book] * len(parts) if book is None or len(book) == 1 else list(book.split(portion))
    found = [_search(p, spec, dtype, importance, signed, b) for p, b in zip(parts, books, strict=True)]

    def join(parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat(parts, axis)  # type: ignore[arg-type]

    scale = join([s.scale for s in found])
    assert scale is not None
    zero, shift = join([s.zero for s in found]), join([s.shift for s in found])
    return Scale(scale, zero, shift=shift, center=center, book=book)


def _portion(x: Tensor, spec: TensorSpec, importance: Tensor | None) -> tuple[int, int]:
    """(axis, length along it) of what is searched at once: whole groups that stay in the cache of a CPU."""
    axis = 0 if x.shape[0] > 1 else 1
    whole = x.shape[axis]
    if x.is_cuda or spec.layout.kind == "rank1" or (importance is not None and importance.shape[axis] > 1):
        return axis, whole
    portion = max(1, CACHED * whole // x.numel())
    if spec.inner and axis == 1:
        inside = spec.layout.size // spec.inner if spec.layout.size else whole
        portion = max(1, portion // inside) * inside
    return axis, portion


def _levels() -> ModuleType:
    from zq.numerics import levels  # it needs Scale from here

    return levels


def _search(
    x: Tensor,
    spec: TensorSpec,
    dtype: torch.dtype,
    importance: Tensor | None,
    signed: bool,
    book: Tensor | None,
) -> Scale:
    from zq.numerics.qtensor import fake_groups  # rounding belongs there; it needs Scale from here

    bounds = _bounds(x, spec)
    best: Scale | None = None
    least = torch.empty(0)
    for candidate in _candidates(x, spec, dtype, bounds, signed):
        squares = (fake_groups(x, spec, replace(candidate, book=book)) - x).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(-1)  # [R, G]
        if spec.layout.kind == "rank1":  # one factor for all: rows and columns would not agree on others
            error = error.sum().expand_as(error)
        if candidate.shift is not None:
            error = error.unflatten(1, (candidate.scale.shape[1], -1)).sum(-1)
        if best is None:
            best, least = candidate, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = _merge(better, candidate, best)
    return best  # type: ignore[return-value]


def mse_signed(x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None = None) -> Scale:
    """`mse` over scales of both signs; the same as `mse` where the range is symmetric."""
    return mse(x, spec, dtype, importance, signed=carries_sign(spec))


def _candidates(
    x: Tensor, spec: TensorSpec, dtype: torch.dtype, bounds, signed: bool = False
) -> Iterator[Scale]:
    for factor in MSE_FACTORS:
        candidate = _derive(x, spec, dtype, factor, bounds)
        yield candidate
        if signed:
            yield replace(candidate, scale=-candidate.scale)


def _merge(better: Tensor, new: Scale, old: Scale) -> Scale:
    zero = None
    if new.zero is not None and old.zero is not None:
        zero = torch.where(better, new.zero, old.zero)
    return replace(old, scale=torch.where(better, new.scale, old.scale), zero=zero)


def _centered(x: Tensor, spec: TensorSpec, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """(what is subtracted [R, G], as stored, or None; the rest [R, G, S])."""
    if not spec.center:
        return None, x
    most = torch.finfo(dtype).max
    center = (x.mean(-1) if spec.info.signed else x.amin(-1)).clamp(-most, most).to(dtype).float()
    return center, x - center.unsqueeze(-1)


def _book(
    x: Tensor, spec: TensorSpec, dtype: torch.dtype, scale: Scale, importance: Tensor | None
) -> Tensor | None:
    """Code values [1 or R, 2^bits] of an estimated format, as stored; rows for the layout `channel`."""
    if not spec.info.is_estimated:
        return None
    rows = x.shape[0] if spec.layout.kind == "channel" else 1
    step = scale.step.unsqueeze(-1)
    weight = None
    if spec.info.kind == "kmeans":
        mass = (step / step.abs().amax()).square()
        weight = (mass if importance is None else mass * importance).expand_as(x).reshape(rows, -1)
    return estimate((x / step).reshape(rows, -1), spec.info, weight).to(dtype).float()


def _bounds(x: Tensor, spec: TensorSpec, signed: bool = False) -> tuple[Tensor, Tensor]:
    """(low, high) [R, G] of every group, 0 included; symmetric: both are +-max|x|, and when `signed` high is
    such that the value of largest magnitude comes to lie on the longer end."""
    if not spec.symmetric:
        low, high = torch.aminmax(x, dim=-1)
        return low.clamp(max=0), high.clamp(min=0)
    if spec.layout.kind == "rank1":
        top = x.abs().squeeze(-1)
        high = torch.minimum(top.amax(1, keepdim=True), top.amax(0, keepdim=True))
    elif signed:
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
        low, top = _ends(spec)
        high = extreme * (reach(spec) / (low if -low > top else top))
    else:
        high = x.abs().amax(-1)
    return -high, high


def _derive(x: Tensor, spec: TensorSpec, dtype: torch.dtype, factor: float, bounds) -> Scale:
    low, high = (b.float() * factor for b in bounds)
    if not spec.symmetric:
        qmin, qmax = int_range(spec)
        steps = _number(high, qmax - qmin)
        scale = (high - low) / steps  # infinite where the range, not its values, exceeds float32
        scale = torch.where(torch.isinf(scale), high / steps - low / steps, scale)
        scale = store(scale, spec, dtype)
        zero = torch.round(qmin - low / scale).clamp(qmin, qmax).to(torch.int32)
        return Scale(scale, zero=zero)
    scale = high / _number(high, reach(spec))
    shift = None
    if spec.inner:
        inside = spec.layout.size // spec.inner if spec.layout.size else scale.shape[1]
        inner = scale.unflatten(1, (-1, inside))
        scale = inner.gather(-1, inner.abs().argmax(-1, keepdim=True))
        ratio = scale.abs() / inner.abs()  # NaN where all is zero, infinite where only the inner group is
        shift = torch.log2(ratio).floor().nan_to_num().clamp(0, (1 << SHIFT_BITS) - 1).int().flatten(1)
        scale = scale.squeeze(-1)
    exact = spec.info.zero and spec.layout.kind != "rank1"
    return Scale(store(scale, spec, dtype, exact), shift=shift)


def _number(like: Tensor, value: float) -> Tensor:
    """To divide by. With a plain number CUDA multiplies by its reciprocal, and a number that is copied to the
    device cannot be recorded in a CUDA graph."""
    return like.new_full((), value)


def store(scale: Tensor, spec: TensorSpec, dtype: torch.dtype, exact: bool = True) -> Tensor:
    """Round to the stored dtype; never 0, infinite or subnormal in float32. An all-zero group gets 1 when its
    values come back `exact` whatever the scale, else the least.

    Subnormal fp16 is allowed: int8 weights below 127.5 * 6.1e-5 = 0.008 would lose codes without it.
    """
    info, least = torch.finfo(dtype), torch.finfo(torch.float32).tiny
    stored = rounded(scale.abs().clamp(max(info.smallest_normal * info.eps, least), info.max), spec, dtype)
    stored = torch.where(scale < 0, -stored, stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored) if exact else stored


def rounded(scale: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """To what a scale of `spec` that is stored in `dtype` can be; float32."""
    stored = scale.to(dtype)
    if spec.scale_dtype in ("half", "short"):  # fp16 has the narrower range, bf16 the fewer digits
        most = HALF_MAX if spec.scale_dtype == "half" else HALF_MAX / 16
        stored = stored.clamp(-most, most).bfloat16()
    if spec.scale_dtype == "short":  # the last digit goes, to nearest even
        bits = stored.view(torch.int16)
        stored = (bits + (bits >> 1 & 1) & ~1).view(torch.bfloat16)
    return stored.float()
