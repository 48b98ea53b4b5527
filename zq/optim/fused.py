"""Steps of many parameters as a few launches of zq's own kernel (zq/kernels/src/optim.cu).

Parameters whose step is computed alike (same kinds of states, dtypes, rate and number of the step) go
together, up to 40 to a launch: their addresses travel in the kernel's parameters, so nothing is copied to the
device before.
Where blocks share scales (tensor, rank1) a launch of `maxima` goes before, and one of `scales` behind. The
means of a factored second moment are torch's operations before all.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from zq.optim.config import FACTORED
from zq.optim.storage import TINY, Factored, Full, Quantized, State
from zq.spec import TensorSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Kind of optim.cu
PLAIN = (Tensor, torch.nn.Parameter)  # others, such as DTensor, need not have an address
LAYOUTS = {"block": 0, "tensor": 1, "rank1": 2}
LARGEST = 1 << 31  # elements
WORKSPACE = 1 << 16  # bytes, at least


@dataclass(frozen=True)
class Entry:
    """One parameter as the kernel knows it, without its gradient.

    alike   what parameters of one launch have in common, but for the gradient's dtype and the numbers
    wide    bytes from which the kernel reckons new scales of each state, see `_wide`
    blocks  of each pass: maxima, step, scales
    """

    states: tuple[State, ...]
    unit: str
    alike: tuple[Any, ...]
    item: layout.Item
    wide: tuple[int, ...]
    blocks: tuple[int, int, int]

    def holds(self, param: Tensor, states: tuple[State, ...]) -> bool:
        """Whether it is still about this memory."""
        return self.item.param == param.data_ptr() and self.states == states


@dataclass(frozen=True)
class Batch:
    """Parameters that are stepped alike, with their gradients. numbers: fields of Numbers that are not 0."""

    numbers: Mapping[str, float]
    entries: list[tuple[Entry, Tensor]]


def entry(update: str, param: Tensor, states: tuple[State, ...]) -> Entry | str:
    """The parameter for the kernel, or why it cannot take it. update: adamw or sgd."""
    index = place(param)
    if index is None:
        return f"the parameter is on {param.device}; the kernel runs on CUDA"
    if type(param) not in PLAIN:
        return f"the parameter is a {type(param).__name__}; the kernel takes plain tensors"
    if param.dtype not in DTYPES:
        return f"the parameter is {param.dtype}; the kernel takes float32, bfloat16 and float16"
    if not param.is_contiguous():
        return "the parameter is not contiguous"
    if not 0 < param.numel() < LARGEST:
        return "the parameter is empty or has 2^31 elements or more"
    unit = unit_name(update, tuple(_bits(state) for state in states))
    reason = next(filter(None, map(_why_not, states)), None) or _missing(index, unit)
    if reason is not None:
        return reason
    columns = _columns(param, states)
    item = layout.Item(param=param.data_ptr(), count=param.numel(), columns=columns)
    for side, state in zip((item.first, item.second), states, strict=False):
        _point(side, state)
    rows = -(-param.numel() // columns)
    shared = sum(sum(map(len, s.scale)) for s in states if isinstance(s, Quantized) and s.shared)
    blocks = (
        -(-rows // layout.ROWS) * -(-columns // layout.COLUMNS),
        -(-param.numel() // layout.TILE),
        -(-shared // layout.THREADS),
    )
    alike = (index, param.device, DTYPES[param.dtype], unit, *map(_kind, states))
    return Entry(states, unit, alike, item, tuple(_wide(param, state) for state in states), blocks)


def refused(grad: Tensor) -> str | None:
    """Why the kernel cannot take a gradient."""
    if type(grad) not in PLAIN:
        return f"a gradient is a {type(grad).__name__}; the kernel takes plain tensors"
    if grad.dtype not in DTYPES:
        return f"a gradient is {grad.dtype}; the kernel takes float32, bfloat16 and float16"
    return None if grad.is_contiguous() else "a gradient is not contiguous"


def run(batch: Batch) -> None:
    """A step of every parameter. Raises ZqError when CUDA fails."""
    for each, grad in batch.entries:
        for state in each.states:
            if isinstance(state, Factored):
                state.absorb(grad, batch.numbers["keep"])
    for i in range(0, len(batch.entries), layout.ITEMS):
        _launch(batch.numbers, batch.entries[i : i + layout.ITEMS])


def place(param: Tensor) -> int | None:
    """The index of its CUDA device."""
    return param.device.index if param.is_cuda else None


def _launch(numbers: Mapping[str, float], entries: list[tuple[Entry, Tensor]]) -> None:
    first, grad = entries[0]
    index, on, dtype = first.alike[:3]
    device = cuda.describe(index)
    args = layout.Args(items=len(entries), param=dtype, grad=DTYPES[grad.dtype])
    for name, value in numbers.items():
        setattr(args.numbers, name, value)
    for side, state in zip((args.first, args.second), first.states, strict=False):
        if isinstance(state, Quantized):
            _format(state.parsed, state.signed, state.how.keep_sign, str(on)).fill(side)
    items = args.item
    for i, (each, grad) in enumerate(entries):
        each.item.grad = grad.data_ptr()
        items[i] = each.item

    def launch(entry: str, which: int, on_each: int) -> None:
        total = 0
        for i, (each, _) in enumerate(entries):
            total += each.blocks[which]
            items[i].end = total
        args.blocks = total
        grid = (min(total, device.sms * on_each), 1, 1)
        cuda.launch(device, first.unit, entry, grid, layout.THREADS, [args])

    if not any(first.wide):
        launch("step", 1, 4)
        return
    scratch = _workspace(device, sum(sum(each.wide) for each, _ in entries))
    at = scratch.data_ptr()
    for i, (each, _) in enumerate(entries):
        for side, size in zip((items[i].first, items[i].second), each.wide, strict=False):
            side.wide = at
            at += size
    launch("maxima", 0, 3)
    launch("step", 1, 4)
    launch("scales", 2, 8)


def _point(side: layout.State, state: State) -> None:
    if isinstance(state, Full):
        side.values = state.values.data_ptr()
        return
    if isinstance(state, Factored):
        side.scale, side.columns = state.share.data_ptr(), state.column.data_ptr()
        return
    side.values, side.scale = state.codes.data_ptr(), state.scale[0].data_ptr()
    side.columns = state.scale[1].data_ptr() if len(state.scale) > 1 else 0


def _wide(param: Tensor, state: State) -> int:
    """u32 for each row and column, or u64 for the tensor, as bytes; 0 where no blocks share scales."""
    kind = state.parsed.layout.kind if isinstance(state, Quantized) else ""
    size = {"rank1": 4 * sum(param.shape), "tensor": 8}.get(kind, 0)
    return -(-size // 8) * 8


def _columns(param: Tensor, states: tuple[State, ...]) -> int:
    """Of a row in the kernel; any where no state is rank 1 or factored."""
    rank1 = any(isinstance(s, Quantized) and s.parsed.layout.kind == "rank1" for s in states)
    of_factors = (s.columns for s in states if isinstance(s, Factored))
    return param.shape[1] if rank1 else next(of_factors, layout.COLUMNS)


def _workspace(device: cuda.Device, total: int) -> Tensor:
    """Zeros, which the kernel leaves zeros. Sizes are powers of two, so that there are few."""
    size = max(WORKSPACE, 1 << (total - 1).bit_length())
    scratch = cuda.workspace(device, size, size)
    assert scratch is not None
    return scratch


def _bits(state: State) -> int | str:
    if isinstance(state, Factored):
        return FACTORED
    return state.parsed.bits if isinstance(state, Quantized) else 32


def _kind(state: State) -> tuple[Any, ...]:
    return (state.spec, state.signed, state.how.keep_sign) if isinstance(state, Quantized) else ()


def _why_not(state: State) -> str | None:
    if not isinstance(state, Quantized):
        return None
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
        "power": (spec.layout.size or 1).bit_length() - 1,
        "sign": int(signed),
        "shift": found.shift,
        "base": found.base,
        "count": found.count,
        "negative": int(found.negative),
        "plain": int(found.plain),
        "below": found.below if keep_sign else -1,
    }
    return layout.Filled(fields, book)
