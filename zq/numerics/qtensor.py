"""QTensor: a quantized matrix as codes, scales and a spec; `quantize` and `dequantize`.

    integers   w = (q - z) * s          q in [qmin, qmax], z = 0 when symmetric
    others     w = value(code) * s      from the format's codebook, or the one stored beside
    center     w = either of these + c
    low rank   w = any of these + A B
    kept       w = as it was, in some input columns

All arithmetic is float32 whatever the dtype of the input, so a bf16 division never decides a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.numerics import scales as _scales
from zq.numerics.codebook import codebook, nearest
from zq.numerics.groups import counted, group, grouped_scale, stored_scale, ungroup
from zq.numerics.scales import Scale, int_range
from zq.spec import TensorSpec

Chooser = Callable[..., Scale]  # (grouped values, spec, stored dtype, importance or None)
SCALES: dict[str, Chooser] = {
    "absmax": _scales.absmax,
    "absmax-signed": _scales.absmax_signed,
    "mse": _scales.mse,
    "mse-signed": _scales.mse_signed,
}


@dataclass(frozen=True)
class QTensor:
    """A quantized [N, K] matrix.

    codes  [N, K]: int8 q for integers, uint8 bit patterns for others
    scale  in the stored dtype, shape `zq.spec.scale_shape` (two-level: [N, 1])
    zero   int8, shape of the scales, or None
    sub    int8 [N, G], integer group scales of a two-level spec, or None
    left, right   A [N, r] and B [r, K] in the stored dtype, a correction of rank r = spec.rank, or None
    shift  uint8 [R, G] (`zq.spec.inner_shape`), exponents of power-of-two groups, or None
    center in the stored dtype, shape of the scales, or None
    book   in the stored dtype, shape `zq.spec.codebook_shape`, of estimated formats
    kept, places   columns [N, M] in the dtype of the model and their int32 [M] positions along K, or None
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    sub: Tensor | None
    spec: TensorSpec
    left: Tensor | None = None
    right: Tensor | None = None
    shift: Tensor | None = None
    center: Tensor | None = None
    book: Tensor | None = None
    kept: Tensor | None = None
    places: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> [N, K] in `dtype`, computed in float32 and rounded once at the end."""
        scale = self.scales()
        dense = ungroup(_decode(group(self.codes, self.spec), self.spec, scale), self.shape, self.spec)
        if self.left is not None and self.right is not None:
            a, b = self.left.float(), self.right.float()
            for i in range(a.shape[1]):  # in one order: a matrix product gives other bits on every device
                dense = dense + a[:, i, None] * b[i]
        if self.kept is not None and self.places is not None:
            dense = dense.index_copy(1, self.places.long(), self.kept.float())
        return dense.to(dtype)

    def scales(self) -> Scale:
        """What is stored beside the codes, grouped [R, G] and in float32."""
        spec, rows = self.spec, self.shape[0]
        return Scale(
            grouped_scale(self.scale, spec, rows).float(),
            None if self.zero is None else grouped_scale(self.zero, spec),
            None if self.sub is None else self.sub.int(),
            None if self.shift is None else self.shift.int(),
            None if self.center is None else grouped_scale(self.center, spec).float(),
            None if self.book is None else self.book.float(),
        )


def quantize(
    x: Tensor,
    spec: TensorSpec,
    scale: str | Chooser = "absmax",
    scale_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    places: Tensor | None = None,
) -> QTensor:
    """x [N, K] -> QTensor.

    `scale` names how scales are chosen (`SCALES`); `scale_dtype` is how they are stored unless the
    spec says it (default: the dtype of x); with a `generator` rounding is stochastic and seeded. The input
    columns `places` int [M] stay as they are and do not count for the scales.
    Raises ZqError when x is not a matrix or holds NaN or Inf.
    """
    if x.dim() != 2 or x.numel() == 0:
        raise ZqError(f"only non-empty matrices can be quantized, not a tensor of shape {tuple(x.shape)}")
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ZqError(f"{bad} of {x.numel()} values are NaN or Inf; repair the checkpoint first")
    dtype = _scales.DTYPES[spec.scale_dtype] if spec.scale_dtype else scale_dtype or x.dtype
    choose = SCALES[scale] if isinstance(scale, str) else scale
    grouped = group(x.float() if places is None else without(x.float(), places), spec)
    weights = counted((x.shape[0], x.shape[1]), spec)
    found = choose(grouped, spec, dtype, None if weights is None else weights.to(x.device))
    q = assemble(encode(grouped, spec, found, generator), found, spec, (x.shape[0], x.shape[1]), dtype)
    return q if places is None else keep(q, x, places, scale_dtype or x.dtype)


def without(x: Tensor, places: Tensor) -> Tensor:
    """x [N, K] with zeros in the columns `places`."""
    return x.index_fill(1, places.long(), 0)


def keep(q: QTensor, x: Tensor, places: Tensor, dtype: torch.dtype) -> QTensor:
    """The same with the columns `places` of x [N, K], rounded to `dtype` only."""
    columns = x.index_select(1, places.long()).to(dtype).contiguous()
    return replace(q, kept=columns, places=places.to(torch.int32))


def split_rows(q: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """A QTensor with scales per channel or group as several, of `rows[i]` rows each."""
    if len(rows) == 1:
        return [q]
    none = [None] * len(rows)
    fields = ("codes", "scale", "zero", "sub", "shift", "center", "book", "kept")
    found = [getattr(q, name) for name in fields]
    pieces = [none if tensor is None else tensor.split(rows) for tensor in found]
    return [replace(q, **dict(zip(fields, part, strict=True))) for part in zip(*pieces, strict=True)]


def assemble(
    codes: Tensor, scale: Scale, spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype
) -> QTensor:
    """Grouped codes [R, G, S] and scales [R, G] -> QTensor with stored shapes and dtypes."""
    channel = scale.scale if spec.two_level else stored_scale(scale.scale, shape, spec)
    return QTensor(
        ungroup(codes, shape, spec).contiguous(),
        channel.to(dtype),
        None if scale.zero is None else stored_scale(scale.zero.to(torch.int8), shape, spec),
        None if scale.sub is None else scale.sub.to(torch.int8),
        spec,
        shift=None if scale.shift is None else scale.shift.to(torch.uint8),
        center=None if scale.center is None else stored_scale(scale.center, shape, spec).to(dtype),
        book=None if scale.book is None else scale.book.to(dtype),
    )


def encode(x: Tensor, spec: TensorSpec, scale: Scale, generator: torch.Generator | None = None) -> Tensor:
    """Grouped x [R, G, S] -> codes [R, G, S]: int8 q or uint8 bit patterns."""
    if scale.center is not None:
        x = x - scale.center.unsqueeze(-1)
    normalised = x / scale.step.unsqueeze(-1)
    if spec.info.is_int:
        return _round_int(normalised, spec, scale, generator).to(torch.int8)
    if scale.book is None:
        return codebook(spec.format).encode(normalised, generator)
    numbers = torch.arange(scale.book.shape[1], device=x.device)
    return nearest(normalised, scale.book, numbers, generator).to(torch.uint8)


def _decode(codes: Tensor, spec: TensorSpec, scale: Scale) -> Tensor:
    """Grouped codes [R, G, S] -> values [R, G, S] float32."""
    if scale.book is not None:
        values = scale.book.gather(1, codes.reshape(len(scale.book), -1).long()).reshape(codes.shape)
    elif not spec.info.is_int:
        values = codebook(spec.format).decode(codes)
    else:
        values = codes.float() if scale.zero is None else codes.float() - scale.zero.float().unsqueeze(-1)
    values = values * scale.step.unsqueeze(-1)
    return values if scale.center is None else values + scale.center.unsqueeze(-1)


def fake_groups(x: Tensor, spec: TensorSpec, scale: Scale) -> Tensor:
    """Grouped x [R, G, S] -> what a reader of its codes would get, float32."""
    native = _TORCH_FLOATS.get(spec.format)
    if scale.center is not None or (native is None and not spec.info.is_int):
        return _decode(encode(x, spec, scale), spec, scale)
    step = scale.step.unsqueeze(-1)
    if spec.info.is_int:
        q = _round_int(x / step, spec, scale)
        return (q if scale.zero is None else q.sub_(scale.zero.unsqueeze(-1))).mul_(step)
    assert native is not None
    top = codebook(spec.format).max  # the cast rounds to nearest even; it must not overflow to NaN or Inf
    return (x / step).clamp(-top, top).to(native).float() * step


_TORCH_FLOATS = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _round_int(x: Tensor, spec: TensorSpec, scale: Scale, generator: torch.Generator | None = None) -> Tensor:
    """In place: x [R, G, S] float32 in steps of the scale -> codes in float32."""
    qmin, qmax = int_range(spec)
    if scale.zero is not None:  # before rounding, as compressed-tensors does: ties go to the even code
        x.add_(scale.zero.unsqueeze(-1))
    if generator is None:
        x.round_()
    else:  # floor(x + u), u uniform in [0, 1): E[q] = x
        x.add_(torch.rand(x.shape, generator=generator, device=x.device)).floor_()
    return x.clamp_(qmin, qmax)


def fake_quantize_tokens(x: Tensor, spec: TensorSpec) -> Tensor:
    """Token-wise dynamic activation quantization, simulated: x [..., K] -> same shape and dtype.

    One absmax scale per row, or per group of a row, in float32 as the fused kernels keep it (ZeroQuant,
    section 3.2).
    """
    # 16-bit values are not widened first: their extremes are exact, and quotients by float32 are float32.
    rows = group(x.reshape(-1, x.shape[-1]), spec)
    rows = rows if rows.element_size() == 2 else rows.float()
    scale = _scales.absmax(rows, spec, torch.float32)
    return fake_groups(rows, spec, scale).flatten(1)[:, : x.shape[-1]].reshape(x.shape).to(x.dtype)
