"""The kernels themselves, compiled for this machine and run by an emulator of the GPU (emulator.h): integer
schemes bit for bit, the others within the rounding of the output. It shows that every index, predicate and
barrier is right, not that the hardware reads descriptors and fragments as the PTX ISA says."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels import gpu_cases
from tests.kernels.fragments import COMPILER, build
from zq.kernels import layout, tiles
from zq.kernels.table_gemm import macros
from zq.kernels.tiles import Config

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
LAUNCH = """
struct Call { void* entry; const u8* x; const float* sx; const int* rowsum; const u8* w; const float* scale;
              const void* bias; u16* y; u8* workspace; int M, N, K, ldx, split, out; };
extern "C" int launch(Call c, int gx, int gz, int blocks, int together, int threads, int shared, int box,
                      int random) {
#ifdef MAPPED
  Map map = {c.x, c.M, (long)c.K * ACT, (long)c.ldx * ACT, box};
#define FIRST_TYPE Map,
#define FIRST map,
#else
#define FIRST_TYPE
#define FIRST
#endif
  auto f = (void (*)(FIRST_TYPE const u8*, const float*, const int*, const u8*, const float*, const void*,
                     u16*, u8*, int, int, int, int, int, int))c.entry;
  kernel = [=] {
    f(FIRST c.x, c.sx, c.rowsum, c.w, c.scale, c.bias, c.y, c.workspace,
      c.M, c.N, c.K, c.ldx, c.split, c.out);
  };
  return run({gx, 1, gz}, blocks, together, threads, shared, random);
}
"""


class Call(ctypes.Structure):
    _fields_ = (
        *((f, ctypes.c_void_p) for f in ("entry", "x", "sx", "rowsum", "w", "ws", "bias", "y", "workspace")),
        *((f, ctypes.c_int) for f in ("m", "n", "k", "ldx", "split", "out")),
    )


def compiled(folder: Path, op: str, p: layout.Packing, source: str, plain: int = 0) -> ctypes.CDLL:
    more = [("HALF_WIDTH", p.act_bytes), ("ZQ_PLAIN", plain)] + [("MAPPED", 1)] * (source == "gemm_sm90.cu")
    return build(folder, (*macros(op, p), *more), source, LAUNCH)


def operands(op: str, p: layout.Packing, m: int, n: int, k: int) -> dict[str, Tensor]:
    """The same random products as on a GPU, without what surrounds x; `right` is the answer in float32."""
    case = gpu_cases.make(op, p, m, n, k, torch.float32, bias=True, seed=m + n + k)
    found = {key: case[key] for key in ("x", "w", "bias", "sx", "rowsum", "ws") if key in case}
    factor = gpu_cases.factor(case)
    found["right"] = case["exact"].float() * factor
    found["terms"] = case["terms"].float() * factor
    return found


def compute(
    library: ctypes.CDLL, c: Config, given: dict[str, Tensor], random: int, out: torch.dtype
) -> Tensor:
    (m, k), n = given["x"].shape, given["bias"].shape[0]
    y = torch.full((m + 1, n), torch.nan, dtype=out)
    bias = given["bias"].to(out)
    workspace = torch.full((c.workspace + 16,), 255, dtype=torch.uint8)
    workspace[: c.zeroed] = 0
    call = Call(m=m, n=n, k=k, ldx=k, split=c.split, out=int(out == torch.float16))
    call.entry = ctypes.cast(getattr(library, c.entry), ctypes.c_void_p).value
    for key in ("x", "sx", "rowsum", "w", "ws"):
        setattr(call, key, given[key].data_ptr() if key in given else None)
    call.bias, call.y, call.workspace = bias.data_ptr(), y.data_ptr(), workspace.data_ptr()
    grid_x, _, grid_z = c.grid
    status = library.launch(
        call, grid_x, grid_z, c.cluster, int(c.split == 0), c.block, c.shared, c.map_rows, random
    )
    assert status == 0, "everyone waits" if status == 1 else "a copy landed after the end"
    assert bool(y[m:].isnan().all())
    assert not bool(workspace[: c.zeroed].any())
    return y[:m]


def check(op: str, given: dict[str, Tensor], y: Tensor) -> None:
    exact = given["right"] + given["bias"].to(y.dtype).float()
    right = exact.to(y.dtype)
    if op in ("w8a8_int8", "w4a8_int8"):
        assert torch.equal(y, right)
    else:
        unit = 2.0**-8 if y.dtype == torch.bfloat16 else 2.0**-10
        assert bool(((y.float() - exact).abs() <= unit * exact.abs() + 1e-5 * given["terms"]).all())


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")


SCHEMES = [  # one for every way through the kernels; the registers of all are tested in test_layout.py
    ("w4a8_int8", tiles.packing("w4a8_int8", 128)),
    ("w8a8_fp8", tiles.packing("w8a8_fp8")),
    ("fp8_block128", tiles.packing("fp8_block128")),
    ("w4a8_int8_group", tiles.packing("w4a8_int8_group", 32)),
    ("w4a16", tiles.packing("w4a16", 32, asym=True, half=True)),
    ("w8a16", tiles.packing("w8a16")),
]
NAMES = [tiles.unit_name(op, p, 0)[4:] for op, p in SCHEMES]


@pytest.mark.parametrize(("op", "p"), SCHEMES, ids=NAMES)
def test_mma(op: str, p: layout.Packing, tmp_path: Path) -> None:
    library = compiled(tmp_path, op, p, "gemm_mma.cu")
    for (m, n, k), split in itertools.product([(3, 200, 400), (70, 130, 592)], (1, 3)):
        given = operands(op, p, m, n, k)
        out = p.float16 if p.act_bytes == 2 else torch.float16 if split == 3 else torch.bfloat16
        for tile in tiles.tiles(op, p, 80):
            if m > 4 * tile.tokens or tile.tokens > 8 * m:
                continue
            c = tiles.portable(op, p, tile, split, (m, n), 0)
            check(op, given, compute(library, c, given, 0, out))


@pytest.mark.parametrize(("op", "p"), SCHEMES, ids=NAMES)
def test_sm90(op: str, p: layout.Packing, tmp_path: Path) -> None:
    library = compiled(tmp_path, op, p, "gemm_sm90.cu")
    m, n, k = 70, 330, 592
    given = operands(op, p, m, n, k)
    for number, (tile, (cluster, split)) in enumerate(
        itertools.product(tiles.tiles(op, p, 90), ((1, 1), (2, 1), (2, 2)))
    ):
        if tile.tokens < 64 or (split > 1 and tile.tokens > 64):
            continue
        c = tiles.persistent(
            op, p, tile, cluster, split, (m, n, k), 2
        )  # two multiprocessors: several tiles for each
        check(
            op, given, compute(library, c, given, number, p.float16 if p.act_bytes == 2 else torch.bfloat16)
        )


@pytest.mark.parametrize("tokens", [8, 16])
def test_sm90_with_few_tokens(tokens: int, tmp_path: Path) -> None:
    op, p = SCHEMES[0]
    library = compiled(tmp_path, op, p, "gemm_sm90.cu")
    given = operands(op, p, tokens - 3, 200, 1168)
    tile = tiles.Tile(tokens)
    for split in (1, 3, 4, 7, 8):
        c = tiles.persistent(op, p, tile, split, split, (tokens - 3, 200, 1168), 16)
        for random in range(3):
            check(op, given, compute(library, c, given, random, torch.float16))


@pytest.mark.parametrize(("op", "p"), SCHEMES, ids=NAMES)
def test_pairs_of_warpgroups_take_turns(op: str, p: layout.Packing, tmp_path: Path) -> None:
    """Several tiles for a block, of an odd number of steps and of one, so that the pairs change places."""
    library = compiled(tmp_path, op, p, "gemm_sm90.cu")
    tile = tiles.Tile(32)
    assert tiles.turns(op, p, tile) == 2
    for k, out in ((592, torch.bfloat16), (96, torch.float16)):
        given = operands(op, p, 13, 330, k)
        c = tiles.persistent(op, p, tile, 1, 1, (13, 330, k), 2)
        check(op, given, compute(library, c, given, k, p.float16 if p.act_bytes == 2 else out))


@pytest.mark.parametrize(("op", "p"), SCHEMES, ids=NAMES)
def test_blocks_share_the_tiles_evenly(op: str, p: layout.Packing, tmp_path: Path) -> None:
    """A tile for less than a block, for one and a half, for several; floats add up the same at any timing."""
    library = compiled(tmp_path, op, p, "gemm_sm90.cu")
    out = p.float16 if p.act_bytes == 2 else torch.bfloat16
    for (m, n, k), tokens, sms in [
        ((29, 330, 592), 32, 4),  # 3 tiles of 5 steps, 4 blocks
        ((13, 330, 592), 16, 2),  # 3 tiles of 5 steps, 4 blocks
        ((7, 130, 1168), 8, 3),  # 2 tiles of 10 steps, 6 blocks
        ((70, 1000, 400), 64, 3),  # 16 tiles of 4 steps, 3 blocks
        ((120, 300, 300), 128, 2),  # 3 tiles of 3 steps, 2 blocks
    ]:
        given = operands(op, p, m, n, k)
        tile = tiles.Tile(tokens)
        c = tiles.persistent(op, p, tile, 1, 0, (m, n, k), sms)
        assert c.grid[0] == sms * tiles.resident(tile)
        first = compute(library, c, given, 1, out)
        check(op, given, first)
        assert torch.equal(first, compute(library, c, given, 2, out))


@pytest.mark.parametrize("plain", [1, 3])
def test_ordinary_loads(plain: int, tmp_path: Path) -> None:
    op, p = SCHEMES[0]
    library = compiled(tmp_path, op, p, "gemm_sm90.cu", plain)
    given = operands(op, p, 40, 200, 400)
    for cluster in (1, 2):
        c = tiles.persistent(op, p, tiles.Tile(64), cluster, 1, (40, 200, 400), 4)
        check(op, given, compute(library, c, given, 0, torch.bfloat16))
