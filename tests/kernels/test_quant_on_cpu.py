"""quant.cu itself, compiled for the CPU (tests/kernels/host/common.cuh), against the references."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.kernels.inputs import BF16, FP16, activations, quant_calls, row_shapes
from tests.kernels.near_quant import EXACT, verdict
from tests.kernels.on_cpu import Sources, aligned, into
from zq.kernels import checks, launch, reference
from zq.kernels.table import UNITS

ENTRIES = UNITS["plain_int8_bf16"].entries
RUN = f"""
extern "C" void run(const Args *a, int entry, int blocks, int threads, int cluster) {{
  void (*const entries[])(Args) = {{{", ".join(ENTRIES)}}};
  run_grid({{blocks, 1, 1}}, threads, [=] {{ entries[entry](*a); }}, false, cluster);
}}
"""
EDITS = {"extern __shared__ uint4 long_row[];": "static uint4 long_row[16384];"}
HOST = launch.cuda.Device(0, "sm_90a", 90, 132, 232448, None)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """name of a unit -> its `run`, compiled when it is asked for."""
    sources = Sources(tmp_path_factory.mktemp("host"))
    return lambda name: sources.compile(UNITS[name], RUN, EDITS)


@pytest.fixture
def on_host(host, monkeypatch):
    """Operators launch there; memory is that of the CPU."""
    monkeypatch.setattr(launch.cuda, "describe", lambda index: HOST)
    launched = []

    def run(it) -> None:
        launched.append(it.entry)
        cluster = it.options[3]
        host(it.unit).run(ctypes.byref(it.arguments), ENTRIES.index(it.entry), it.grid[0], it.block, cluster)

    monkeypatch.setattr(launch.Launch, "__call__", run)
    return launched


def run_into_nan(name: str, args: tuple) -> list[Tensor]:
    made = []
    for shape, dtype in getattr(checks, name)(*args):
        made.append(aligned(torch.zeros(shape, dtype=dtype)))
        made[-1].view(torch.uint8).fill_(0xFF) if made[-1].numel() else None
    into(name, args, made)
    return made


def compare(name: str, args: tuple) -> None:
    args = tuple(aligned(arg) if isinstance(arg, Tensor) else arg for arg in args)
    made = run_into_nan(name, args)
    assert verdict(name, args, made, list(getattr(reference, name)(*args))) == "", name


@pytest.mark.parametrize(
    ("k", "entries"),
    [
        (16, {"quantize_1", "quantize_warp"}),
        (272, {"quantize_1", "quantize_warp"}),
        (1040, {"quantize_1", "quantize_4"}),
        (8208, {"quantize_cluster", "quantize_4"}),
        (33280, {"quantize_long"}),
    ],
)
def test_every_operator(k, entries, on_host):
    """The second entry is that of rows before which nothing is computed."""
    for name, args in quant_calls(3, k):
        compare(name, args)
    assert set(on_host) == entries


@pytest.mark.parametrize("k", [16, 176, 1040, 4112, 8208])
def test_every_way_gives_the_same_codes(k, on_host, monkeypatch):
    """So a token does not depend on how many others there are."""
    for name, args in quant_calls(3, k):
        args = tuple(aligned(arg) if isinstance(arg, Tensor) else arg for arg in args)
        first = None
        for shape in row_shapes(k // 8):
            monkeypatch.setattr(launch, "row_shape", lambda *_, shape=shape: shape)
            made = run_into_nan(name, args)
            first = first or made
            for a, b in zip(made, first, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (name, shape)


@pytest.mark.parametrize("dtype", [FP16, torch.float32])
@pytest.mark.parametrize("k", [48, 1552])
def test_other_inputs(k, dtype, on_host):
    x = activations(4, k, dtype)
    for name in sorted(EXACT):
        compare(name, (x,))


def test_extreme_rows(on_host):
    rows = [[0.0] * 16, [5.0] * 16, [1e-45] * 16, [3e38, 1e-3] * 8, [torch.inf, 1.0] * 8, [-torch.inf] * 16]
    rows += [[2.0**-e * (1 + i / 16) for i in range(16)] for e in range(-120, 149, 3)]
    for name in ("quant_int8", "quant_fp8"):
        compare(name, (torch.tensor(rows),))
    poisoned = aligned(torch.ones(2, 64))
    poisoned[1, 33] = torch.nan
    made = [aligned(torch.zeros(shape, dtype=dtype)) for shape, dtype in checks.quant_int8(poisoned)]
    into("quant_int8", (poisoned,), made)
    assert torch.isnan(made[1]).tolist() == [False, True]


def test_every_bf16_number(on_host):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    x = bits[torch.isfinite(bits)]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    for name in ("quant_int8", "quant_fp8"):
        compare(name, (x[: len(x) // 32 * 32].reshape(-1, 32),))
