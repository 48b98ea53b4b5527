"""QTensor: a quantized matrix as codes, scales and a spec; `quantize` and `dequantize`.

    integers   w = (q - z) * s          q in [qmin, qmax], z = 0 when symmetric
    floats     w = value(code) * s
    low rank   w = either of these + A B

All arithmetic is float32 whatever the dtype of the input, so a bf16 division never decides a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.numerics import scales as _scales
from zq.numerics.codebook import codebook
from zq.numerics.groups import group, grouped_scale, stored_scale, ungroup
from zq.numerics.scales import Scale, int_range
from zq.spec import TensorSpec

Chooser = Callable[..., Scale]  # (grouped values, spec, stored dtype, importance or None)
SCALES: dict[str, Chooser] = {
    "absmax": _scales.absmax,
    "mse": _scales.mse,
    "mse-signed": _scales.mse_signed,
}


@dataclass(frozen=True)
class QTensor:
    """A quantized [N, K] matrix.

    codes  [N, K]: int8 q for integers, uint8 bit patterns for floats
    scale  in the stored dtype, shape `zq.spec.scale_shape` (two-level: [N, 1])
    zero   int8, shape of the scales, or None
    sub    int8 [N, G], integer group scales of a two-level spec, or None
    left, right   A [N, r] and B [r, K] in the stored dtype, a correction of rank r = spec.rank, or None
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    sub: Tensor | None
    spec: TensorSpec
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> [N, K] in `dtype`, computed in float32 and rounded once at the end."""
        spec = self.spec
        step = self._scale().step.unsqueeze(-1)
        codes = group(self.codes, spec)
        if not spec.info.is_int:
            values = codebook(spec.format).decode(codes)
        elif self.zero is None:
            values = codes.float()
        else:
            values = codes.float() - grouped_scale(self.zero, spec).float().unsqueeze(-1)
        dense = ungroup(values * step, self.shape, spec)
        if self.left is not None and self.right is not None:
            a, b = self.left.float(), self.right.float()
            for i in range(a.shape[1]):  # in one order: a matrix product gives other bits on every device
                dense = dense + a[:, i, None] * b[i]
        return dense.to(dtype)

    def _scale(self) -> Scale:
        sub = None if self.sub is None else self.sub.int()
        return Scale(grouped_scale(self.scale, self.spec).float(), sub=sub)


def quantize(
    x: Tensor,
    spec: TensorSpec,
    scale: str | Chooser = "absmax",
    scale_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> QTensor:
    """x [N, K] -> QTensor.

    `scale` names how scales are chosen (`SCALES`); `scale_dtype` is how they are stored unless the
    spec says it (default: the dtype of x); with a `generator` rounding is stochastic and seeded.
    Raises ZqError when x is not a matrix or holds NaN or Inf.
    """
    if x.dim() != 2 or x.numel() == 0:
        raise ZqError(f"only non-empty matrices can be quantized, not a tensor of shape {tuple(x.shape)}")
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ZqError(f"{bad} of {x.numel()} values are NaN or Inf; repair the checkpoint first")
    dtype = _scales.DTYPES[spec.scale_dtype] if spec.scale_dtype else scale_dtype or x.dtype
    choose = SCALES[scale] if isinstance(scale, str) else scale
    grouped = group(x.float(), spec)
    found = choose(grouped, spec, dtype)
    return assemble(encode(grouped, spec, found, generator), found, spec, (x.shape[0], x.shape[1]), dtype)


def split_rows(q: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """A QTensor with scales per channel or group as several, of `rows[i]` rows each."""
    none = [None] * len(rows)
    parts = zip(
        q.codes.split(rows),
        q.scale.split(rows),
        none if q.zero is None else q.zero.split(rows),
        none if q.sub is None else q.sub.split(rows),
        strict=True,
    )
    return [QTensor(codes, scale, zero, sub, q.spec) for codes, scale, zero, sub in parts]


def assemble(
    codes: Tensor, scale: Scale, spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype
) -> QTensor:
    """Grouped codes [R, G, S] and scales [R, G] -> QTensor with stored shapes and dtypes."""
    channel = scale.scale if spec.two_level else stored_scale(scale.scale, shape, spec)
    zero = None if scale.zero is None else stored_scale(scale.zero.to(torch.int8), shape, spec)
    sub = None if scale.sub is None else scale.sub.to(torch.int8)
    return QTensor(ungroup(codes, shape, spec).contiguous(), channel.to(dtype), zero, sub, spec)


def encode(x: Tensor, spec: TensorSpec, scale: Scale, generator: torch.Generator | None = None) -> Tensor:
    """Grouped x [R, G, S] -> codes [R, G, S]: int8 q or uint8 bit patterns."""
    normalised = x / scale.step.unsqueeze(-1)
    if spec.info.is_int:
        return _round_int(normalised, spec, scale, generator).to(torch.int8)
    return codebook(spec.format).encode(normalised, generator)


def fake_groups(x: Tensor, spec: TensorSpec, scale: Scale) -> Tensor:
    """Grouped x [R, G, S] -> what a reader of its codes would get, float32."""
    step = scale.step.unsqueeze(-1)
    if spec.info.is_int:
        q = _round_int(x / step, spec, scale)
        return (q if scale.zero is None else q - scale.zero.unsqueeze(-1)) * step
    native = _TORCH_FLOATS.get(spec.format)
    if native is not None:  # the cast rounds to nearest even; it must not overflow to NaN or Inf
        top = codebook(spec.format).max
        return (x / step).clamp(-top, top).to(native).float() * step
    book = codebook(spec.format)
    return book.decode(book.encode(x / step)) * step


_TORCH_FLOATS = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _round_int(x: Tensor, spec: TensorSpec, scale: Scale, generator: torch.Generator | None = None) -> Tensor:
    qmin, qmax = int_range(spec)
    if scale.zero is not None:  # before rounding, as compressed-tensors does: ties go to the even code
        x = x + scale.zero.unsqueeze(-1)
    if generator is None:
        q = torch.round(x)
    else:  # floor(x + u), u uniform in [0, 1): E[q] = x
        q = torch.floor(x + torch.rand(x.shape, generator=generator, device=x.device))
    return q.clamp_(qmin, qmax)


def fake_quantize_tokens(x: Tensor, spec: TensorSpec) -> Tensor:
    """Token-wise dynamic activation quantization, simulated: x [..., K] -> same shape and dtype.

    One absmax scale per row, in float32 as the fused kernels keep it (ZeroQuant, section 3.2).
    """
    rows = group(x.reshape(-1, x.shape[-1]).float(), spec)
    scale = _scales.absmax(rows, spec, torch.float32)
    return fake_groups(rows, spec, scale).reshape(x.shape).to(x.dtype)
