"""Steps of many parameters as a few launches of zq's own kernel (zq/kernels/src/optim.cu).

Parameters whose step is computed alike (same kinds of states, dtypes, rate and number of the step) go
together, up to 40 to a launch: their addresses travel in the kernel's parameters, so nothing is copied to the
device before.
Where blocks share scales (tensor, rank1) a launch of `maxima` goes before, and one of `scales` behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels import cuda
from zq.kernels.table_optim import unit_name
from zq.numerics.codebook import codebook
from zq.numerics.scales import reach
from zq.optim import layout
from zq.optim.books import search, tables
from zq.optim.storage import TINY, Factored, Full, Quantized, State
from zq.spec import TensorSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Kind of optim.cu
LAYOUTS = {"block": 0, "tensor": 1, "rank1": 2}
LARGEST = 1 << 31  # elements
WORKSPACE = 1 << 16  # bytes, at least


@dataclass(frozen=True)
class Step:
    """One parameter: `update` is adamw or sgd, `numbers` are the fields of Numbers that are not 0."""

    update: str
    param: Tensor
    grad: Tensor
    states: tuple[State, ...]
    numbers: Mapping[str, float]

    @property
    def unit(self) -> str:
        return unit_name(self.update, tuple(_bits(state) for state in self.states))

    def alike(self) -> tuple[Any, ...]:
        """What parameters of one launch have in common."""
        kinds = tuple(_kind(state) for state in self.states)
        dtypes = self.param.dtype, self.grad.dtype
        return (self.update, place(self.param), *dtypes, kinds, tuple(self.numbers.items()))


def why_not(update: str, param: Tensor, grad: Tensor, states: tuple[State, ...]) -> str | None:
    """Why the kernel cannot take this step; None: it can."""
    index = place(param)
    if index is None:
        return f"the parameter is on {param.device}; the kernel runs on CUDA"
    if param.dtype not in DTYPES or grad.dtype not in DTYPES:
        return "the kernel takes parameters and gradients of float32, bfloat16 and float16"
    if not (param.is_contiguous() and grad.is_contiguous()):
        return "a parameter or its gradient is not contiguous"
    if not 0 < param.numel() < LARGEST:
        return "the parameter is empty or has 2^31 elements or more"
    reason = next(filter(None, map(_why_not, states)), None)
    if reason is not None:
        return reason
    return _missing(index, unit_name(update, tuple(_bits(state) for state in states)))


def run(steps: list[Step]) -> None:
    """All steps, none of which `why_not` refuses. Raises ZqError when CUDA fails."""
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in steps:
        groups.setdefault(step.alike(), []).append(step)
    for group in groups.values():
        for i in range(0, len(group), layout.ITEMS):
            _launch(group[i : i + layout.ITEMS])


def place(param: Tensor) -> int | None:
    """The index of its CUDA device."""
    return param.device.index if param.is_cuda else None


def _launch(steps: list[Step]) -> None:
    first, count = steps[0], len(steps)
    index = place(first.param)
    assert index is not None
    device = cuda.describe(index)
    args = layout.Args(items=count, param=DTYPES[first.param.dtype], grad=DTYPES[first.grad.dtype])
    for name, value in first.numbers.items():
        setattr(args.numbers, name, value)
    for side, state in zip((args.first, args.second), first.states, strict=False):
        if isinstance(state, Quantized):
            _format(state.parsed, state.signed, state.how.keep_sign, str(first.param.device)).fill(side)
    counts = [_shared(step) for step in steps]
    scratch = _workspace(device, counts)
    at = 0 if scratch is None else scratch.data_ptr()
    for item, step, shared in zip(args.item, steps, counts, strict=False):
        item.param, item.grad = step.param.data_ptr(), step.grad.data_ptr()
        item.count, item.columns = step.param.numel(), _columns(step)
        for side, state, size in zip((item.first, item.second), step.states, shared, strict=False):
            _point(side, state, at if size else 0)
            at += _padded(size)

    def launch(entry: str, blocks: Iterator[int], each: int) -> None:
        total = 0
        for item, more in zip(args.item, blocks, strict=False):
            total += more
            item.end = total
        args.blocks = total
        cuda.launch(device, first.unit, entry, (min(total, device.sms * each), 1, 1), layout.THREADS, [args])

    if scratch is not None:
        launch("maxima", (_maxima_blocks(step) for step in steps), 3)
    launch("step", (-(-step.param.numel() // layout.TILE) for step in steps), 4)
    if scratch is not None:
        launch("scales", (-(-_scales(step) // layout.THREADS) for step in steps), 8)


def _point(side: layout.State, state: State, wide: int) -> None:
    if isinstance(state, Full):
        side.values = state.values.data_ptr()
        return
    assert isinstance(state, Quantized)
    side.values, side.scale, side.wide = state.codes.data_ptr(), state.scale[0].data_ptr(), wide
    side.columns = state.scale[1].data_ptr() if len(state.scale) > 1 else 0


def _shared(step: Step) -> list[int]:
    """Bytes of what the kernel reckons new scales from: u32 per row and column, u64 per tensor."""
    kinds = [state.parsed.layout.kind if isinstance(state, Quantized) else "" for state in step.states]
    return [4 * sum(step.param.shape) if kind == "rank1" else 8 if kind == "tensor" else 0 for kind in kinds]


def _scales(step: Step) -> int:
    """Scales that blocks share."""
    return sum(
        sum(map(len, state.scale)) for state in step.states if isinstance(state, Quantized) and state.shared
    )


def _columns(step: Step) -> int:
    """Of a row in the kernel; any where no state is rank 1."""
    rank1 = any(isinstance(s, Quantized) and s.parsed.layout.kind == "rank1" for s in step.states)
    return step.param.shape[1] if rank1 else layout.COLUMNS


def _maxima_blocks(step: Step) -> int:
    columns = _columns(step)
    rows = -(-step.param.numel() // columns)
    return -(-rows // layout.ROWS) * -(-columns // layout.COLUMNS)


def _workspace(device: cuda.Device, counts: list[list[int]]) -> Tensor | None:
    """Zeros, which the kernel leaves zeros. Its sizes are powers of two, so that there are few."""
    total = sum(_padded(size) for sizes in counts for size in sizes)
    if not total:
        return None
    size = max(WORKSPACE, 1 << (total - 1).bit_length())
    return cuda.workspace(device, size, size)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _bits(state: State) -> int:
    return state.parsed.bits if isinstance(state, Quantized) else 32


def _kind(state: State) -> tuple[Any, ...]:
    return (state.spec, state.signed, state.how.keep_sign) if isinstance(state, Quantized) else ()


def _why_not(state: State) -> str | None:
    if isinstance(state, Full):
        return None
    if isinstance(state, Factored):
        return "the factored second moment has no kernel"
    spec, size = state.parsed, state.block
    if state.how.rounding != "nearest":
        return "stochastic rounding has no kernel"
    if spec.bits not in (4, 8) or spec.scale_dtype not in (None, "fp32"):
        return f"{spec} has no kernel; formats of 4 and 8 bits with float32 scales have one"
    if size and (size & (size - 1) or not layout.EACH <= size <= layout.TILE):
        return f"{spec} has no kernel; blocks of 8, 16, ... {layout.TILE} elements have one"
    if spec.layout.kind == "rank1" and len(state.shape) != 2:
        return "rank1 of more than two dimensions has no kernel"
    return None


@lru_cache
def _missing(index: int, unit: str) -> str | None:
    """Why a kernel is not there; loads it, compiling it where necessary."""
    try:
        cuda.functions(cuda.describe(index), unit)
    except ZqError as error:
        return str(error)
    return None


@lru_cache
def _format(spec: TensorSpec, signed: bool, keep_sign: bool, device: str) -> layout.Filled:
    """What states of this format have in common; `signed`: scales carry the sign."""
    found, values = search(spec.format), codebook(spec.format).values
    kind = spec.layout.kind
    book = tables(spec.format, device)
    fields = {
        "book": book.data_ptr(),
        "top": max(values.tolist(), key=abs) if signed else reach(spec),
        "empty": 1.0 if spec.info.zero and kind != "rank1" else TINY,
        "layout": LAYOUTS[kind],
        "block": spec.layout.size or 0,
        "sign": int(signed),
        "shift": found.shift,
        "base": found.base,
        "count": found.count,
        "negative": int(found.negative),
        "plain": int(found.plain),
        "below": found.below if keep_sign else -1,
    }
    return layout.Filled(fields, book)
