"""Optimizer states in memory: dequantized and quantized again a part at a time, never as a whole.

Each class holds one state of one parameter and reads and writes flat ranges of its elements as float32:

    Full       float32
    Quantized  codes and scales in one of zq's formats; flat blocks, one scale for the tensor, or rank-1
    Factored   row and column means of the second moment (Adafactor, arXiv:1804.04235):
               v_ij = r_i c_j / mean(r), tensors of more dimensions taken as [first, rest]

Scales that many parts share (tensor, rank-1) must be known before the first part is written: `begin`, then
`widen` with every part's new values, then `write`. Until `finish`, `read` goes by the old scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zq.numerics.codebook import codebook
from zq.numerics.groups import group
from zq.numerics.packing import pack, packed_words, unpack
from zq.numerics.scales import DTYPES, carries_sign, reach, store
from zq.optim.config import FACTORED, FLOAT, States
from zq.spec import Layout, TensorSpec

PART = 1 << 20  # elements that are worked on at once
TINY = torch.finfo(torch.float32).tiny
Values = Callable[[int, int], Tensor]  # a flat range of elements -> float32


class Full:
    """float32, as torch keeps it."""

    unit, shared, spec = 1, False, FLOAT

    def __init__(self, like: Tensor) -> None:
        self.values = torch.zeros(like.shape, dtype=torch.float32, device=like.device)

    def read(self, start: int, stop: int) -> Tensor:
        return self.values.view(-1)[start:stop].clone()

    def write(self, start: int, stop: int, x: Tensor, generator: torch.Generator | None = None) -> None:
        self.values.view(-1)[start:stop] = x

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


class Quantized:
    """Codes packed to `bits`, and scales float32 (or as the spec says): [blocks], [1], or for rank-1 one
    tensor per dimension. Rounded as zq.numerics.qtensor.quantize rounds the tensor with scale `absmax`."""

    def __init__(self, like: Tensor, spec: TensorSpec, how: States) -> None:
        self.shape, self.how = tuple(like.shape), how
        if spec.layout.kind == "rank1" and like.dim() < 2:
            spec = TensorSpec(format=spec.format, layout=Layout("block", 128), scale_dtype=spec.scale_dtype)
        self.parsed, self.spec = spec, str(spec)
        kind, device = spec.layout.kind, like.device
        self.block = spec.layout.size or 0
        self.row = like.numel() // like.shape[0] if kind == "rank1" else 1
        self.unit = math.lcm(self.block or 1, self.row, 32)
        self.shared = kind != "block"
        self.signed = how.scale == "absmax-signed" and kind != "rank1" and carries_sign(spec)
        book = codebook(spec.format).to(device)
        self.book, self.table = book, book.decode(torch.arange(1 << spec.bits, device=device))
        longest = max(book.values.tolist(), key=abs)
        self.top = torch.tensor(longest if self.signed else reach(spec), device=device)  # CUDA divides by it
        lengths = {"rank1": self.shape, "tensor": (1,)}.get(kind) or (-(-like.numel() // (self.block or 1)),)
        dtype = DTYPES[spec.scale_dtype or "fp32"]
        self.scale = [torch.ones(n, dtype=dtype, device=device) for n in lengths]
        self.wide: list[Tensor] = []
        words = packed_words(like.numel(), spec.bits)
        self.codes = torch.zeros(words, dtype=torch.int32, device=device)
        if self.shared:
            self.begin()
        zeros = torch.zeros(min(PART // self.unit * self.unit or self.unit, like.numel()), device=device)
        for start, stop in parts(like.numel(), self):
            self.write(start, stop, zeros[: stop - start])
        self.finish()

    def begin(self) -> None:
        self.wide = [torch.zeros_like(s, dtype=torch.float32) for s in self.scale]

    def widen(self, start: int, stop: int, x: Tensor) -> None:
        """Let the scales cover x, the new values of a range."""
        if self.parsed.layout.kind == "tensor":
            new = x.gather(0, x.abs().argmax(0, keepdim=True))
            new = new if self.signed else new.abs()
            self.wide[0].copy_(torch.where(new.abs() > self.wide[0].abs(), new, self.wide[0]))
            return
        x = x.abs().view(-1, *self.shape[1:])
        rows = slice(start // self.row, stop // self.row)
        for i, wide in enumerate(self.wide):
            others = [d for d in range(x.dim()) if d != i]
            part = wide[rows] if i == 0 else wide
            part.copy_(torch.maximum(part, x.amax(others)))

    def finish(self) -> None:
        if self.wide:
            self.scale = [
                self._stored(w / self.top).to(s.dtype) for w, s in zip(self.wide, self.scale, strict=True)
            ]
            self.wide = []

    def read(self, start: int, stop: int) -> Tensor:
        bits = self.parsed.bits
        words = self.codes[start * bits // 32 :][: packed_words(stop - start, bits)]
        values = self.table[unpack(words[None], bits, stop - start)[0].long()]
        return values * self._steps(start, stop, [s.float() for s in self.scale])

    def write(self, start: int, stop: int, x: Tensor, generator: torch.Generator | None = None) -> None:
        if self.block:
            grouped = group(x[None], self.parsed)[0]
            if self.signed:
                widest = grouped.gather(1, grouped.abs().argmax(1, keepdim=True)).squeeze(1)
            else:
                widest = grouped.abs().amax(1)
            stored = self._stored(widest / self.top)
            self.scale[0][start // self.block :][: len(stored)] = stored.to(self.scale[0].dtype)
            steps = stored.repeat_interleave(self.block)[: stop - start]
        else:
            new = (
                [self._stored(w / self.top) for w in self.wide]
                if self.wide
                else [s.float() for s in self.scale]
            )
            steps = self._steps(start, stop, new)
        codes = self.book.encode(x / steps, generator)
        if self.how.keep_sign:
            lost = (x < 0) & (self.table[codes.long()] == 0)
            below = self.book.codes[(torch.searchsorted(self.book.values, 0.0) - 1).clamp_min(0)]
            codes = torch.where(lost, below, codes)
        bits = self.parsed.bits
        words = pack(codes[None], bits)[0]
        self.codes[start * bits // 32 :][: len(words)] = words

    def _steps(self, start: int, stop: int, scale: list[Tensor]) -> Tensor:
        """The step of every element of a range."""
        if self.block:
            return scale[0][start // self.block : -(-stop // self.block)].repeat_interleave(self.block)[
                : stop - start
            ]
        if self.parsed.layout.kind == "tensor":
            return scale[0]
        rows = slice(start // self.row, stop // self.row)
        step = None
        for i, s in enumerate(scale):
            shape = [1] * len(self.shape)
            shape[i] = -1
            s = (s[rows] if i == 0 else s).view(shape)
            step = s if step is None else torch.minimum(step, s)
        assert step is not None
        return step.reshape(-1)

    def _stored(self, scale: Tensor) -> Tensor:
        """Rounded to its dtype; what is all zero gets 1 where the format has a zero, else the least scale."""
        exact = self.parsed.info.zero and self.parsed.layout.kind != "rank1"
        return store(scale, self.parsed, self.scale[0].dtype, exact)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, **{f"scale{i}": s for i, s in enumerate(self.scale)}}


class Factored:
    """Row means [N] and column means [K], float32, of a tensor of at least two dimensions. share [N]: the row
    means over their own mean, for the kernel; of the last `absorb`."""

    shared, spec = False, FACTORED

    def __init__(self, like: Tensor) -> None:
        self.shape = tuple(like.shape)
        n = like.shape[0]
        self.columns = like.numel() // n
        self.unit = self.columns
        self.row = torch.zeros(n, device=like.device)
        self.column = torch.zeros(self.columns, device=like.device)
        self.share = torch.zeros_like(self.row)

    def means(self, values: Values) -> tuple[Tensor, Tensor]:
        """Row and column means of a tensor that is given in parts."""
        row, column = torch.empty_like(self.row), torch.zeros_like(self.column)
        for start, stop in parts(len(self.row) * self.columns, self):
            x = values(start, stop).view(-1, self.columns)
            row[start // self.columns : stop // self.columns] = x.mean(1)
            column += x.sum(0)
        return row, column / len(row)

    def absorb(self, grad: Tensor, beta: float) -> None:
        """The means become beta times themselves and 1 - beta times those of the squared gradient. NaN and
        Inf count as zero."""
        flat = grad.reshape(-1)
        row, column = self.means(
            lambda start, stop: flat[start:stop].float().nan_to_num(0.0, 0.0, 0.0).square()
        )
        self.row.lerp_(row, 1 - beta)
        self.column.lerp_(column, 1 - beta)
        self.share.copy_(self._shares())

    def _shares(self) -> Tensor:
        return self.row / self.row.mean().clamp_min(TINY)

    def read(self, start: int, stop: int) -> Tensor:
        rows = slice(start // self.columns, stop // self.columns)
        return (self._shares()[rows, None] * self.column).view(-1)

    def tensors(self) -> dict[str, Tensor]:
        return {"row": self.row, "column": self.column}


State = Full | Quantized | Factored


def parts(count: int, *states: State) -> Iterator[tuple[int, int]]:
    """Flat ranges that every state can read and write, of about PART elements."""
    unit = 1
    for state in states:
        a, b = unit, state.unit
        while b:  # math.gcd cannot be compiled
            a, b = b, a % b
        unit = unit * state.unit // a
    size = max(1, PART // unit) * unit
    return ((start, min(start + size, count)) for start in range(0, count, size))


def new(like: Tensor, spec: str, how: States) -> State:
    """A state of zeros for a parameter."""
    if spec == FLOAT:
        return Full(like)
    if spec == FACTORED:
        if like.dim() >= 2:
            return Factored(like)
        spec = "ulinear4:b128"
    return Quantized(like, TensorSpec.parse(spec), how)


def fill(state: State, values: Values, count: int) -> None:
    """Let a state hold the values, given in flat ranges."""
    if isinstance(state, Factored):
        state.row, state.column = state.means(values)
        return
    if isinstance(state, Quantized) and state.shared:
        state.begin()
        for part in parts(count, state):
            state.widen(*part, values(*part))
    for part in parts(count, state):
        state.write(*part, values(*part))
    if isinstance(state, Quantized):
        state.finish()


def packed(state: State) -> Any:
    """As it is saved: torch's own float32 tensor, or a mapping of plain tensors and text."""
    if isinstance(state, Full):
        return state.values
    return {"spec": state.spec, "shape": list(state.shape), **state.tensors()}
