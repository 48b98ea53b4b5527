"""The kernels themselves, compiled for this machine and run by an emulator of the GPU (emulator.h): integer schemes
bit for bit, the others within the rounding of the output. It shows that every index, predicate and barrier is right,
not that the hardware reads descriptors and fragments as the PTX ISA says."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.fragments import COMPILER, SOURCES
from tests.kernels.test_layout import example
from zq.kernels import layout, tiles
from zq.kernels.table_gemm import macros
from zq.kernels.tiles import Config

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
LAUNCH = """
struct Call { void* entry; const void *x, *sx, *rowsum, *w, *scale, *bias; void *y, *workspace;
              int M, N, K, ldx, split, out; };
using P = const float*;
extern "C" int launch(Call c, int gx, int gz, int cluster_size, int threads, int shared, int box, int random) {
#ifdef MAPPED
  Map map = {(const u8*)c.x, c.M, (long)c.K * ACT, (long)c.ldx * ACT, box};
  auto f = (void (*)(Map, const u8*, P, const int*, const u8*, P, const void*, u16*, void*, int, int, int, int, int,
                     int))c.entry;
  kernel = [=] {
    f(map, (const u8*)c.x, (P)c.sx, (const int*)c.rowsum, (const u8*)c.w, (P)c.scale, c.bias, (u16*)c.y, c.workspace,
      c.M, c.N, c.K, c.ldx, c.split, c.out);
  };
#else
  auto f = (void (*)(const u8*, P, const int*, const u8*, P, const void*, u16*, u8*, int, int, int, int, int,
                     int))c.entry;
  kernel = [=] {
    f((const u8*)c.x, (P)c.sx, (const int*)c.rowsum, (const u8*)c.w, (P)c.scale, c.bias, (u16*)c.y, (u8*)c.workspace,
      c.M, c.N, c.K, c.ldx, c.split, c.out);
  };
#endif
  return run({gx, 1, gz}, cluster_size, threads, shared, random);
}
"""


class Call(ctypes.Structure):
    _fields_ = (
        *(
            (f, ctypes.c_void_p)
            for f in ("entry", "x", "sx", "rowsum", "w", "scale", "bias", "y", "workspace")
        ),
        *((f, ctypes.c_int) for f in ("m", "n", "k", "ldx", "split", "out")),
    )


def build(
    folder: Path, op: str, p: layout.Packing, source: str, more: tuple[tuple[str, object], ...] = ()
) -> ctypes.CDLL:
    text = (SOURCES / source).read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#include"))
    text = text.replace(
        "extern __shared__ __align__(1024) u8 memory[];", "u8* const memory = current->block->shared;"
    )
    text = text.replace("__shared__ int order;", "int& order = current->block->order;")
    scheme = (SOURCES / "scheme.cuh").read_text().replace('#include "common.cuh"', "")
    (folder / "scheme.cuh").write_text(scheme)
    (folder / "kernel.cpp").write_text(f'#include "emulator.h"\n{text}\n{LAUNCH}')
    mapped = source == "gemm_sm90.cu"
    defines = [*macros(op, p), ("ZQ_ARCH", 90), ("ZQ_HOST", 1), ("HALF_WIDTH", p.act_bytes), *more]
    flags = [f"-D{name}={value}" for name, value in defines] + ["-DMAPPED"] * mapped
    library = folder / "kernel.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *flags, f"-I{folder}", f"-I{HERE}"]
    subprocess.run([*command, folder / "kernel.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def operands(op: str, p: layout.Packing, m: int, n: int, k: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(m + n + k)
    codes, scale, offset = example(p, n, k)
    if op in ("w8a8_fp8", "fp8_block128"):
        codes = torch.randn(n, k, generator=g).to(torch.float8_e4m3fn).view(torch.uint8)

    def spread(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(p.group, 1)[:, :k]

    if p.kind in ("w8a8", "fp8_block", "w8a16"):
        weight = codes.view(torch.float8_e4m3fn if "fp8" in op else torch.int8).double()
    elif p.kind == "w4a8_two":
        weight = codes.double() * spread(scale) + spread(offset) - 128
    else:
        weight = codes.double() - (8 if offset is None else spread(offset))
        weight = weight if scale is None else weight * spread(scale)
    if p.kind == "fp8_block":
        weight = weight * scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    if p.act_bytes == 2:
        weight, x = weight.to(p.float16).double(), torch.randn(m, k, generator=g).to(p.float16)
    elif "fp8" in op:
        x = torch.randn(m, k, generator=g).to(torch.float8_e4m3fn)
    else:
        x = torch.randint(-128, 128, (m, k), generator=g).to(torch.int8)
    found = {
        "x": x,
        "w": layout.pack(p, codes, scale, offset),
        "bias": torch.randn(n, generator=g).bfloat16(),
    }
    value = x.double()
    if op == "fp8_block128":
        found["sx"] = torch.rand(m, -(-k // 128), generator=g) + 0.5
        value = value * found["sx"].double().repeat_interleave(128, 1)[:, :k]
    elif p.act_bytes == 1:
        found["sx"] = (torch.rand(m, generator=g) + 0.5) / 100
    if op == "w4a8_int8":
        found["rowsum"] = x.sum(-1, dtype=torch.int32)
    if p.group == 0 and p.kind != "fp8_block" or p.kind == "w4a8_two":
        found["scale"] = torch.rand(n, generator=g) + 0.5
    factor = torch.ones(())
    if "scale" in found:
        factor = factor * found["scale"]
    if op != "fp8_block128" and "sx" in found:
        factor = factor * found["sx"][:, None]
    found["right"] = (value @ weight.T).float() * factor + found["bias"].float()
    found["terms"] = (value.abs() @ weight.abs().T).float() * factor
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
    for key in ("x", "sx", "rowsum", "w", "scale"):
        setattr(call, key, given[key].data_ptr() if key in given else None)
    call.bias, call.y, call.workspace = bias.data_ptr(), y.data_ptr(), workspace.data_ptr()
    grid_x, _, grid_z = c.grid
    status = library.launch(call, grid_x, grid_z, c.cluster, c.block, c.shared, c.map_rows, random)
    assert status == 0, "everyone waits" if status == 1 else "a copy landed after the end"
    assert bool(y[m:].isnan().all())
    assert not bool(workspace[: c.zeroed].any())
    return y[:m]


def check(op: str, given: dict[str, Tensor], y: Tensor) -> None:
    right = given["right"].to(y.dtype)
    if op in ("w8a8_int8", "w4a8_int8"):
        assert torch.equal(y, right)
    else:
        unit = 2.0**-8 if y.dtype == torch.bfloat16 else 2.0**-10
        assert bool(
            ((y.float() - given["right"]).abs() <= unit * right.float().abs() + 1e-5 * given["terms"]).all()
        )


SCHEMES = [
    ("w4a8_int8", tiles.packing("w4a8_int8", 128)),
    ("w4a8_int8", tiles.packing("w4a8_int8", 64)),
    ("w8a8_int8", tiles.packing("w8a8_int8")),
    ("w8a8_fp8", tiles.packing("w8a8_fp8")),
    ("fp8_block128", tiles.packing("fp8_block128")),
    ("w4a8_int8_group", tiles.packing("w4a8_int8_group")),
    ("w4a8_int8_group", tiles.packing("w4a8_int8_group", 128)),
    ("w4a8_int8_group", tiles.packing("w4a8_int8_group", 32)),
    ("w4a8_fp8", tiles.packing("w4a8_fp8", 64)),
    ("w4a8_fp8", tiles.packing("w4a8_fp8", 128)),
    ("w4a16", tiles.packing("w4a16")),
    ("w4a16", tiles.packing("w4a16", 32, asym=True, half=True)),
    ("w4a16", tiles.packing("w4a16", 128)),
    ("w8a16", tiles.packing("w8a16", half=True)),
]
NAMES = [tiles.unit_name(op, p, 0)[4:] for op, p in SCHEMES]


@pytest.mark.parametrize(("op", "p"), SCHEMES, ids=NAMES)
def test_mma(op: str, p: layout.Packing, tmp_path: Path) -> None:
    library = build(tmp_path, op, p, "gemm_mma.cu")
    for (m, n, k), split in itertools.product([(3, 200, 400), (70, 130, 1168)], (1, 3)):
        given = operands(op, p, m, n, k)
        out = p.float16 if p.act_bytes == 2 else torch.float16 if split == 3 else torch.bfloat16
        for tile in tiles.tiles(op, p, 80):
            if m > 4 * tile.tokens or tile.tokens > 8 * m:
                continue
            c = tiles.portable(op, p, tile, split, (m, n), 0)
            check(op, given, compute(library, c, given, 0, out))


@pytest.mark.parametrize(("op", "p"), SCHEMES, ids=NAMES)
def test_sm90(op: str, p: layout.Packing, tmp_path: Path) -> None:
    library = build(tmp_path, op, p, "gemm_sm90.cu")
    m, n, k = 70, 330, 1168
    given = operands(op, p, m, n, k)
    for number, (tile, (cluster, split)) in enumerate(
        itertools.product(tiles.tiles(op, p, 90), ((1, 1), (2, 1), (2, 2)))
    ):
        if tile.tokens < 32 or (split > 1 and tile.tokens > 64):
            continue
        c = tiles.persistent(
            op, p, tile, cluster, split, (m, n), 2
        )  # two multiprocessors: several tiles for each
        check(
            op, given, compute(library, c, given, number, p.float16 if p.act_bytes == 2 else torch.bfloat16)
        )


@pytest.mark.parametrize("tokens", [8, 16])
def test_sm90_with_few_tokens(tokens: int, tmp_path: Path) -> None:
    op, p = SCHEMES[0]
    library = build(tmp_path, op, p, "gemm_sm90.cu")
    given = operands(op, p, tokens - 3, 200, 1168)
    tile = tiles.Tile(tokens)
    for split in (1, 4, 8):
        c = tiles.persistent(op, p, tile, split, split, (tokens - 3, 200), 16)
        for random in range(3):
            check(op, given, compute(library, c, given, random, torch.float16))


@pytest.mark.parametrize("plain", [1, 2, 3])
def test_ordinary_loads(plain: int, tmp_path: Path) -> None:
    op, p = SCHEMES[0]
    library = build(tmp_path, op, p, "gemm_sm90.cu", (("ZQ_PLAIN", plain),))
    given = operands(op, p, 40, 200, 400)
    for cluster in (1, 2):
        c = tiles.persistent(op, p, tiles.Tile(64), cluster, 1, (40, 200), 4)
        check(op, given, compute(library, c, given, 0, torch.bfloat16))
