"""One cache of cubins for all tests of a run, and kernels compiled once.

All for all architectures take minutes (`make kernels`). Here every unit of quant.cu, of optim.cu and of the
cache is compiled for one architecture, and the matrix kernels with the schemes of the recipes, each by both
of their sources.
"""

from __future__ import annotations

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zq.kernels import nvrtc
from zq.kernels.table import QUANT_UNITS, UNITS
from zq.kernels.table_kv import KV_UNITS
from zq.kernels.table_optim import OPTIM_UNITS

ARCHS = ("sm_80", "sm_90a", "sm_120")  # the oldest, the one with kernels of its own, the newest


GEMMS = (
    ("sm90_w4a8_int8_g128", "sm_90a"),
    ("sm90_w4a8_fp8_g128", "sm_90a"),
    ("sm90_w4a16_g128", "sm_90a"),
    ("sm90_w8a8_int8", "sm_90a"),
    ("mma_w4a8_int8_g128", "sm_80"),
    ("mma_w4a16_g64_asym", "sm_80"),
    ("mma_w8a8_fp8", "sm_120"),
)


def chosen() -> list[tuple[str, str]]:
    """(unit, architecture) of what is compiled."""
    archs = itertools.cycle(ARCHS)
    found = []
    for unit in (*QUANT_UNITS, *KV_UNITS, *OPTIM_UNITS):
        found.append((unit.name, next(arch for arch in archs if arch in unit.archs)))
    return [*found, *GEMMS]


@pytest.fixture(scope="session")
def cubins(tmp_path_factory) -> Path:
    """A cache folder, as ZQ_CACHE."""
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture
def cache(cubins: Path, monkeypatch) -> Path:
    """The same, set."""
    monkeypatch.setenv("ZQ_CACHE", str(cubins))
    return cubins


@pytest.fixture(scope="session")
def compiled() -> dict[tuple[str, str], nvrtc.Compiled | Exception]:
    """What `chosen` says, with the compiler's log."""
    pytest.importorskip("cuda.bindings.nvrtc")

    def one(pair: tuple[str, str]) -> nvrtc.Compiled | Exception:
        try:
            return nvrtc.compile_unit(UNITS[pair[0]], pair[1], verbose=True)
        except Exception as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen(), pool.map(one, chosen()), strict=True))


def resources(log: str) -> dict[str, tuple[int, int]]:
    """{entry: (registers, bytes of spill stores)} from the log of a verbose compilation."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        assert registers
        assert spills
        found[part.split("'")[0]] = (int(registers[1]), int(spills[1]))
    return found
