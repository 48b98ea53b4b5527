"""What a tensor is quantized to, as one value with one spelling: `parse(str(x)) == x`.

    int4:g128            4-bit integers, one scale per 128 consecutive inputs of a row (group along K)
    int4:gauto           a group size that fits the model: the largest of 128, 64, 32 that divides every K
    int8:channel         one scale per output channel (row of an [N, K] weight)
    e4m3fn:128x128       one scale per tile of 128 rows and 128 inputs; tiles at the edges may be smaller
    int8:token           one scale per token (row of a [tokens, K] activation), measured at run time
    int4:g64:asym        with an integer zero point
    int4:g64:narrow      restricted range [-7, 7] instead of [-8, 7]
    int4:g128:two-level  integer group scale (up to 16) under a floating-point channel scale
    e2m1fn:b64           4-bit floats in flat blocks of 64 values
    dynamic4:rank1       the scale of a value is the smaller of its row's and its column's largest magnitude
    nf3:b64:pow2=16      every 16 values have a power of two of their own, 2^0 .. 2^-15, under the scale
    int4:b64:center      the mean of every block is subtracted and stored (unsigned formats: the least value)
    int4:g64:s=fp32      scales stored in fp32 (default: the dtype of the checkpoint)
    int4:g64:s=half      scales stored in fp16, with values that bf16 holds too
    int4:g32:asym:s=short  scales stored in fp16, of 7 binary digits: zero points times scales are in fp16 too
    int4:g64:lorc=8      plus a correction of rank 8; the step `lorc` makes it, no rule can ask for it
    int4:g64:keep=12     12 input columns stay in the dtype of the model; only the step `proxy` asks for it

A `Scheme` is a weight spec and, when activations are quantized too, an activation spec:
`int4:g128 @ int8:token`. Activations of FP8 under weights in tiles have a scale per token and group of
inputs, as wide as the tiles: `e4m3fn:128x128 @ e4m3fn:g128` (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).

This module is pure data and imports no torch, so that `zq --help` is instant.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from zq.errors import ZqError
from zq.formats import FORMATS, KNOWN, FormatInfo

LayoutKind = Literal["tensor", "channel", "token", "group", "block", "rank1", "tile"]
AS_FP16 = ("fp16", "half", "short")  # dtypes of scales that lie in the file as fp16
SCALE_DTYPES = ("fp32", "bf16", *AS_FP16)
ACTIVATIONS = ("int8", "e4m3fn", "e5m2")
AUTO = 0  # group size still to be chosen


@dataclass(frozen=True)
class Layout:
    """Which values share a scale. `size` is the group or block length (AUTO = 0: to be chosen), of a tile its
    inputs; `rows` are those of a tile, else 1."""

    kind: LayoutKind
    size: int | None = None
    rows: int = 1

    def __str__(self) -> str:
        if self.kind == "tile":
            return f"{self.rows}x{self.size}"
        if self.kind in ("group", "block"):
            return self.kind[0] + (str(self.size) if self.size else "auto")
        return self.kind

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Raises ZqError when `text` is not a layout."""
        if text in ("tensor", "channel", "token", "rank1"):
            return cls(text)  # type: ignore[arg-type]
        if text == "gauto":
            return cls("group", AUTO)
        if tile := re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text):
            return cls("tile", int(tile[2]), int(tile[1]))
        found = re.fullmatch(r"([gb])(\d{1,7})", text)
        if not found or int(found[2]) < 2:
            raise ZqError(
                f"scale layout '{text}' is unknown; allowed: tensor, channel, token, gauto, "
                "gN (group of N >= 2 inputs), bN (flat block of N >= 2 values), RxK (tile of R rows and K "
                "inputs), rank1"
            )
        return cls("group" if found[1] == "g" else "block", int(found[2]))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Format + scale layout + how the range is used. See the module docstring for the spelling."""

    format: str
    layout: Layout
    symmetric: bool = True
    narrow: bool = False
    two_level: bool = False
    inner: int = 0
    center: bool = False
    scale_dtype: str | None = None
    rank: int = 0
    kept: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ZqError(f"format '{self.format}' is unknown; allowed: {KNOWN}")
        if not self.info.is_int and not self.symmetric:
            raise ZqError(f"'{self}': only integer formats have a zero point; drop 'asym'")
        if self.narrow and not (self.info.is_int and self.symmetric):
            raise ZqError(f"'{self}': 'narrow' is for symmetric integers only; drop it")
        if self.two_level and self.layout.kind != "group":
            raise ZqError(f"'{self}': 'two-level' needs groups along K, for example int4:g128")
        if self.two_level and not (self.info.is_int and self.symmetric):
            raise ZqError(f"'{self}': 'two-level' is for symmetric integers only")
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_DTYPES:
            raise ZqError(f"scale dtype '{self.scale_dtype}' is unknown; allowed: {', '.join(SCALE_DTYPES)}")
        if self.layout.kind == "rank1" and (self.inner or self.center or not self.symmetric):
            raise ZqError(
                f"'{self}': rank1 scales go with no 'asym', 'center' or 'pow2'; drop it or take blocks"
            )
        if self.center and (self.inner or self.two_level or not self.symmetric):
            raise ZqError(f"'{self}': 'center' goes with no 'asym', 'two-level' or 'pow2'; drop one")
        if self.inner:
            self._check_inner()

    def _check_inner(self) -> None:
        size = self.layout.size
        if self.two_level or not self.symmetric or self.layout.kind == "tile":
            raise ZqError(f"'{self}': 'pow2' goes with no 'asym', 'two-level' or tiles; drop one")
        if size is not None and (size == AUTO or size % self.inner or size == self.inner):
            raise ZqError(
                f"'{self}': groups of pow2={self.inner} must divide the larger group or block; give for "
                f"example {self.format}:{self.layout.kind[0]}{8 * self.inner}:pow2={self.inner}"
            )

    @property
    def extras(self) -> bool:
        """Whether a weight has more to it than codes, scales of one or two levels, and zero points."""
        return bool(self.rank or self.kept or self.center or self.inner)

    @property
    def info(self) -> FormatInfo:
        return FORMATS[self.format]

    @property
    def bits(self) -> int:
        return self.info.bits

    def __str__(self) -> str:
        parts = [self.format, str(self.layout)]
        parts += ["asym"] * (not self.symmetric) + ["narrow"] * self.narrow
        parts += ["two-level"] * self.two_level + ["center"] * self.center
        parts += [f"pow2={self.inner}"] if self.inner else []
        parts += [f"s={self.scale_dtype}"] if self.scale_dtype else []
        parts += [f"lorc={self.rank}"] if self.rank else []
        parts += [f"keep={self.kept}"] if self.kept else []
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Inverse of `str`. Raises ZqError naming the part that is wrong."""
        name, *rest = str(text).strip().split(":")
        if not rest:
            raise ZqError(
                f"'{text}' says no scale layout; write FORMAT:LAYOUT, for example int4:g128 or int8:channel"
            )
        options: dict[str, object] = {}
        for part in rest[1:]:
            key, value = _option(part, text)
            if key in options:
                raise ZqError(f"'{text}' says '{part}' twice; drop one")
            options[key] = value
        return cls(format=name, layout=Layout.parse(rest[0]), **options)  # type: ignore[arg-type]

    def with_group(self, size: int) -> TensorSpec:
        """The same spec with `size` in place of an automatic group size."""
        auto = self.layout == Layout("group", AUTO)
        return replace(self, layout=Layout("group", size)) if auto else self


def _option(part: str, text: str) -> tuple[str, object]:
    flags: dict[str, tuple[str, object]] = {
        "asym": ("symmetric", False),
        "narrow": ("narrow", True),
        "two-level": ("two_level", True),
        "center": ("center", True),
    }
    if part in flags:
        return flags[part]
    if part.startswith("s="):
        return "scale_dtype", part[2:]
    numbers = {"lorc": "rank", "keep": "kept", "pow2": "inner"}
    found = re.fullmatch("(lorc|keep|pow2)=([1-9][0-9]{0,6})", part)
    if found and part != "pow2=1":
        return numbers[found[1]], int(found[2])
    raise ZqError(
        f"'{part}' in '{text}' is unknown; allowed: asym, narrow, two-level, center, pow2=N (N >= 2), "
        f"s={'|'.join(SCALE_DTYPES)}"
    )


@dataclass(frozen=True)
class Scheme:
    """What happens to one linear layer: its weight, and its input when activations are quantized."""

    weights: TensorSpec
    activations: TensorSpec | None = None

    def __post_init__(self) -> None:
        if self.weights.layout.kind == "token":
            raise ZqError(f"weights '{self.weights}': 'token' is for activations; use 'channel'")
        if not self.weights.info.signed and not self.weights.center:
            raise ZqError(f"weights '{self.weights}': the format has no negative values; add ':center'")
        act = self.activations
        if act is None:
            return
        # Scales made at run time are float32, and there is no error to correct before it.
        plain = TensorSpec(format=act.format, layout=act.layout, narrow=act.narrow)
        by_token = act.layout.kind == "token" and act.format in ACTIVATIONS
        if act != plain or not (by_token or act == self._under_tiles):
            under = f", and under {self.weights.layout} weights {self._under_tiles}" * bool(self._under_tiles)
            raise ZqError(
                f"activations '{act}' are not supported; allowed: int8:token, e4m3fn:token, e5m2:token{under}"
            )

    @property
    def _under_tiles(self) -> TensorSpec | None:
        """FP8 activations in groups as wide as the tiles of the weights; None where these have none."""
        layout = self.weights.layout
        if layout.kind != "tile" or self.weights.format != "e4m3fn" or (layout.size or 0) < 2:
            return None
        return TensorSpec(format="e4m3fn", layout=Layout("group", layout.size))

    def __str__(self) -> str:
        return f"{self.weights} @ {self.activations}" if self.activations else str(self.weights)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Inverse of `str`. Raises ZqError naming the part that is wrong."""
        weights, at, acts = text.partition("@")
        return cls(TensorSpec.parse(weights.strip()), TensorSpec.parse(acts.strip()) if at else None)

    def with_group(self, size: int) -> Scheme:
        return replace(self, weights=self.weights.with_group(size))


def scale_shape(spec: TensorSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scale tensor of an [N, K] tensor: tensor [1], channel/token [N, 1], group [N, G],
    block [B], tile [rows of tiles, G], rank1 [N + K] (rows, then columns). A ragged last group, block or tile
    counts as one."""
    n, k = shape
    kind, size = spec.layout.kind, spec.layout.size or 0
    if kind == "tensor":
        return (1,)
    if kind == "rank1":
        return (n + k,)
    if kind in ("channel", "token"):
        return (n, 1)
    if kind in ("group", "tile"):
        return (math.ceil(n / spec.layout.rows), math.ceil(k / size))
    return (math.ceil(n * k / size),)


def choose_group_size(ks: set[int]) -> int | None:
    """The largest of 128, 64 and 32 that divides every input size; None when none does."""
    return next((g for g in (128, 64, 32) if all(k % g == 0 for k in ks)), None)


def inner_shape(spec: TensorSpec, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, power-of-two groups in a row) of an [N, K] tensor with `pow2` (zq/numerics/groups.py)."""
    n, k = shape
    rows, length = (1, n * k) if spec.layout.kind in ("tensor", "block") else (n, k)
    outer = spec.layout.size or length
    return rows, math.ceil(length / outer) * math.ceil(outer / spec.inner)


def codebook_shape(spec: TensorSpec, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the stored codebook of an estimated format: one per channel with that layout, else one."""
    return (shape[0] if spec.layout.kind == "channel" else 1), 1 << spec.bits
