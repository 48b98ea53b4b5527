"""A kernel's own source as a library of the CPU: `common.cuh` and `mma16.cuh` of tests/kernels/host stand for
those of zq/kernels/src, all other headers are zq's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zq.kernels import launch, nvrtc
from zq.kernels.unit import Unit

HOST = Path(__file__).parent / "host"


class Sources:
    """compile(unit, run) -> the library; `run`: C++ that is added to the source, `edits`: {text: other
    text}."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("g++")
        if found is None:
            pytest.skip("needs g++")
        self.compiler, self.folder, self.made = found, folder, {}

    def compile(
        self, unit: Unit, run: str, edits: dict[str, str], arch: int = 90, optimize: str = "-O0"
    ) -> ctypes.CDLL:
        if (unit.name, arch) not in self.made:
            texts = dict(nvrtc.texts(unit.source))
            for old, new in edits.items():
                assert sum(text.count(old) for text in texts.values()) == 1
                texts = {name: text.replace(old, new) for name, text in texts.items()}
            texts[unit.source] += run
            for name, text in texts.items():
                if not (HOST / name).exists():
                    (self.folder / name).write_text(text)
            macros = [f"-D{key}={value}" for key, value in unit.defines]
            library = self.folder / f"{unit.name}_{arch}.so"
            command = [self.compiler, "-std=c++17", optimize, "-ffp-contract=off", "-w", f"-DZQ_ARCH={arch}"]
            command += [f"-I{HOST}", *macros, "-shared", "-fPIC", "-o", str(library)]
            command += ["-x", "c++", str(self.folder / unit.source)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            self.made[unit.name, arch] = ctypes.CDLL(str(library))
        return self.made[unit.name, arch]


def aligned(x: Tensor) -> Tensor:
    """The same in memory that begins at a multiple of 16 bytes, as on a GPU."""
    memory = torch.full((x.numel() * x.element_size() + 16,), 0xFF, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16
    place = memory[begin : begin + x.numel() * x.element_size()].view(x.dtype).view(x.shape)
    return place.copy_(x)


def into(op: str, args: tuple[Any, ...], made: list[Tensor]) -> None:
    """An operator's launch, with its outputs in `made`."""
    kept = launch.prepare(op, args)
    assert [(tuple(x.shape), x.dtype) for x in made] == [(tuple(s), dtype) for s, dtype in kept.outputs]
    launch.address(kept, (*args, *made))
    assert kept.launch is not None
    kept.launch()
