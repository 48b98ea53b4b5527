"""One cache of cubins for all tests of a run, and every kernel compiled once."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zq.kernels import nvrtc
from zq.kernels.table import UNITS

ARCHS = ("sm_80", "sm_90a", "sm_120")  # the oldest, the one with kernels of its own, the newest


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
    """Every unit for ARCHS, with the compiler's log."""
    pytest.importorskip("cuda.bindings.nvrtc")
    todo = [(unit, arch) for unit in UNITS.values() for arch in ARCHS if arch in unit.archs]

    def one(pair) -> nvrtc.Compiled | Exception:
        try:
            return nvrtc.compile_unit(*pair, verbose=True)
        except Exception as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {(unit.name, arch): made for (unit, arch), made in zip(todo, pool.map(one, todo), strict=True)}


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
