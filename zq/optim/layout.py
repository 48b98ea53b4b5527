"""The structures that zq/kernels/src/optim.cu and states.cuh read, as ctypes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ITEMS = 40
THREADS, EACH = 256, 8
TILE = THREADS * EACH
ROWS, COLUMNS = 64, 256


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class Format(ctypes.Structure):
    """Of all states of a launch."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "book"),
        *_fields(ctypes.c_float, "top empty"),
        *_fields(ctypes.c_int, "layout block power sign shift base count negative plain below"),
    )


class State(ctypes.Structure):
    """Addresses of one state."""

    _fields_ = _fields(ctypes.c_void_p, "values scale columns wide")


class Numbers(ctypes.Structure):
    """Of all parameters of a launch."""

    _fields_ = (
        *_fields(ctypes.c_float, "rate decay keep add lerp root inverse eps"),
        *_fields(ctypes.c_int, "nesterov fresh"),
    )


class Item(ctypes.Structure):
    """One parameter."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "param grad"),
        *_fields(State, "first second"),
        ("count", ctypes.c_uint32),
        *_fields(ctypes.c_int, "columns end unused"),
    )


class Args(ctypes.Structure):
    """All that a kernel gets; at most 4 KB."""

    _fields_ = (
        *_fields(Format, "first second"),
        ("numbers", Numbers),
        *_fields(ctypes.c_int, "param grad items blocks"),
        ("item", Item * ITEMS),
    )


@dataclass(frozen=True)
class Filled:
    """Values of a Format, and the memory that its book lies in."""

    fields: dict[str, Any]
    book: Tensor

    def fill(self, to: Format) -> None:
        for name, value in self.fields.items():
            setattr(to, name, value)
