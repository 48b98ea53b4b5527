"""A kernel that is launched again and again: everything but addresses is made once."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zq.kernels import cuda


@dataclass(frozen=True)
class Scratch:
    """Memory that a kernel needs while it runs, see `cuda.workspace`. fields: pointers of its arguments, by
    their offset from the beginning of that memory."""

    size: int
    zeroed: int
    fields: Mapping[str, int]


@dataclass(frozen=True)
class Mapped:
    """The matrix x as a kernel's first parameter, a tensor map; see `cuda.tensor_map`."""

    rows: int
    k: int
    width: int
    box_rows: int


class Launch:
    """A kernel, its grid and its arguments without addresses, to be launched again and again.

    arguments: a structure whose size is a multiple of 8; each of its fields is a parameter of the kernel when
    `spread`, else the whole is one. Between setting addresses and launching, a thread must not meet another
    one's, so each thread makes its own.
    """

    def __init__(  # noqa: PLR0913
        self,
        device: cuda.Device,
        unit: str,
        entry: str,
        grid: cuda.GRID,
        block: int,
        arguments: ctypes.Structure,
        *,
        spread: bool = False,
        shared: int = 0,
        cluster: int = 1,
        pdl: bool = False,
        scratch: Scratch | None = None,
        mapped: Mapped | None = None,
    ) -> None:
        self.device, self.unit, self.entry, self.grid, self.block = device, unit, entry, grid, block
        self.arguments, self.scratch, self.mapped = arguments, scratch, mapped
        self.options = grid, block, shared, cluster, pdl and device.number >= 90
        kind = type(arguments)
        names = [name for name, *_ in kind._fields_]  # type: ignore[misc]
        self.places = {
            name: getattr(kind, name).offset // 8
            for name, what, *_ in kind._fields_  # type: ignore[misc]
            if what is ctypes.c_void_p
        }
        self.slots = (ctypes.c_uint64 * (ctypes.sizeof(kind) // 8)).from_buffer(arguments)
        begin = ctypes.addressof(arguments)
        params = [begin + getattr(kind, name).offset for name in names] if spread else [begin]
        self.params = (ctypes.c_void_p * (len(params) + (mapped is not None)))(
            *[0] * (mapped is not None), *params
        )
        self.address = ctypes.addressof(self.params)
        self.configs: dict[int, tuple[Any, int]] = {}  # by stream
        self.function = 0

    def __call__(self) -> None:
        """Launch on the current stream of the device; addresses are set. Raises ZqError."""
        device = self.device
        if not self.function:
            self.function = int(cuda.functions(device, self.unit)[self.entry])
        cuda.enter(device)
        stream = cuda.raw_stream(device.index)
        found = self.configs.get(stream)
        if found is None:
            config = cuda.configuration(*self.options, stream)
            found = self.configs[stream] = config, int(config.getPtr())
        kept: Any = None  # until it is launched
        if self.scratch is not None:
            kept = cuda.workspace(device, self.scratch.size, self.scratch.zeroed)
            self.lend(kept)
        if self.mapped is not None:
            m, x = self.mapped, self.slots[self.places["x"]]
            described = cuda.tensor_map(x, m.rows, m.k, m.k, m.width, m.box_rows)
            self.params[0] = described.getPtr()
        status = cuda.library().cuLaunchKernelEx(found[1], self.function, self.address, None)
        if status:
            cuda.failed(status, f"launch {self.unit}")

    def lend(self, memory: Tensor) -> None:
        """Point the fields of `scratch` into it."""
        assert self.scratch is not None
        begin = memory.data_ptr()
        for name, offset in self.scratch.fields.items():
            self.slots[self.places[name]] = begin + offset
