"""optim.cu itself, compiled for the CPU (tests/kernels/host), in the place of a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.on_cpu import HOST
from zq.kernels import nvrtc
from zq.kernels.cuda import Device
from zq.kernels.table import UNITS
from zq.optim import fused

ENTRIES = ("step", "maxima", "scales")
RUN = """
extern "C" void run(const Args *a, int entry, int blocks, int threads) {
  run_blocks(blocks, threads, [=] { entry == 0 ? step(*a) : entry == 1 ? maxima(*a) : scales(*a); });
}
extern "C" int size() { return sizeof(Args); }
"""


class Host:
    """Kernels by unit, compiled when they are asked for, in either rounding of torch's pointwise operations:
    that of a CPU, or that of a GPU, which the kernels have."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++")
        self.compiler, self.folder = compiler, folder
        self.made: dict[tuple[str, str], ctypes.CDLL] = {}
        self.launched: list[tuple[str, str, int]] = []
        self.scratch: dict[int, Tensor] = {}
        self.rounding = "cpu"
        text = nvrtc.texts("optim.cu")
        (folder / "optim.cpp").write_text(text["optim.cu"] + RUN)
        (folder / "gpu").mkdir()
        (folder / "gpu" / "pointwise.cuh").write_text(text["pointwise.cuh"])

    def library(self, name: str) -> ctypes.CDLL:
        key = name, self.rounding
        if key not in self.made:
            macros = [f"-D{key}={value}" for key, value in UNITS[name].defines]
            paths = [HOST, nvrtc.SOURCES]
            if self.rounding == "gpu":
                paths.insert(0, self.folder / "gpu")
            file = self.folder / f"{name}.{self.rounding}.so"
            command = [self.compiler, "-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
            command += [*(f"-I{path}" for path in paths), *macros, "-DZQ_ARCH=90"]
            command += ["-shared", "-fPIC", "-Wl,-Bsymbolic"]  # the C library has a `step` of its own
            subprocess.run([*command, "-o", str(file), str(self.folder / "optim.cpp")], check=True)
            self.made[key] = ctypes.CDLL(str(file))
        return self.made[key]

    def launch(self, device, unit, entry, grid, block, arguments, **options) -> None:
        self.launched.append((unit, entry, grid[0]))
        library = self.library(unit)
        assert library.size() == ctypes.sizeof(arguments[0]) <= 4096
        library.run(ctypes.byref(arguments[0]), ENTRIES.index(entry), grid[0], block)

    def workspace(self, device, size: int, zeroed: int) -> Tensor:
        assert size == zeroed
        return self.scratch.setdefault(size, torch.zeros(size, dtype=torch.uint8))

    def used(self, monkeypatch: pytest.MonkeyPatch, rounding: str = "cpu") -> Host:
        """From now on parameters in CPU memory are stepped here, unless `fused=False`."""
        self.launched.clear()
        self.scratch.clear()
        self.rounding = rounding
        gpu = Device(0, "sm_90a", 90, 2, 232448, None)  # few multiprocessors: blocks have several turns
        replaced: dict[str, Callable] = {"describe": lambda index: gpu, "functions": lambda device, name: {}}
        for name, value in {**replaced, "launch": self.launch, "workspace": self.workspace}.items():
            monkeypatch.setattr(fused.cuda, name, value)
        monkeypatch.setattr(fused, "place", lambda param: 0)
        # torch's vector code for CPUs leaves some roots an ulp away; a GPU rounds them as IEEE 754 asks
        monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.pow(x.double(), 0.5).float())
        return self
