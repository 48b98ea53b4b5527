"""What the tensor cores expect in each register, written from the PTX ISA and from nothing else; and kernels
compiled for this machine, with emulator.h for a GPU.

PTX ISA 9.0: matrix fragments for mma.m16n8k32 and for mma.m16n8k16 with floating point types, register
fragments for wgmma.m64nNk32 and k16, shared memory layout with 128-byte swizzling.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "zq" / "kernels" / "src"
COMPILER = shutil.which("g++") or shutil.which("clang++")
REPLACED = {
    "extern __shared__ __align__(1024) u8 memory[];": "u8* const memory = current->block->shared;",
    "__shared__ int order;": "int& order = current->block->order;",
}
EMULATED = ("common.cuh", "ptx90.cuh", "wgmma.cuh", "mma.cuh", "scheme.cuh")
PIECES = r"""
extern "C" int tile_bytes() { return TILE_BYTES; }
extern "C" int scales() { return 2 * PARTS; }
extern "C" void registers(const u8* tile, u32* a, float* scale) {
  for (int t = 0; t < 128; ++t)
    for (int half = 0; half < HALVES; ++half) {
      Words words;
      Fragment f;
      load(tile, t, half, words);
      convert(words, f);
      memcpy(a + (half * 128 + t) * 16, f.a, sizeof f.a);
      memcpy(scale + t * 2 * PARTS, f.scale, sizeof f.scale);
    }
}
extern "C" void tiles(int tiles_m, int groups_n, int* out) {
  for (int work = 0; work < tiles_m * groups_n; ++work) {
    Tile tile = tile_of<TOKENS>(work, tiles_m, groups_n);
    out[2 * work] = tile.m, out[2 * work + 1] = tile.n;
  }
}
"""


def build(folder: Path, macros: tuple, source: str = "", more: str = PIECES) -> ctypes.CDLL:
    """`source` of zq/kernels/src ("": only scheme.cuh), then `more`, behind emulator.h, as a library."""
    text = _inlined(source) if source else ""
    for here, there in REPLACED.items():
        text = text.replace(here, there)
    scheme = (SOURCES / "scheme.cuh").read_text().replace('#include "common.cuh"', "")
    (folder / "scheme.cuh").write_text(scheme)
    (folder / "kernel.cpp").write_text(f'#include "emulator.h"\n{text}\n{more}')
    flags = [f"-D{name}={value}" for name, value in (*macros, ("ZQ_ARCH", 90), ("ZQ_HOST", 1))]
    library = folder / "kernel.so"
    assert COMPILER
    command = [
        COMPILER,
        "-std=c++17",
        "-O1" if source else "-O0",
        "-shared",
        "-fPIC",
        "-w",
        *flags,
        f"-I{folder}",
        f"-I{HERE}",
    ]
    subprocess.run([*command, folder / "kernel.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def _inlined(source: str) -> str:
    """The text of a source and of what it includes, without what emulator.h stands for."""
    text = (SOURCES / source).read_text().replace("#pragma once", "")
    return re.sub(r'#include "(.*)"', lambda found: "" if found[1] in EMULATED else _inlined(found[1]), text)


def place_of_a(width: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, k) [128 threads, 4 registers, elements of a register] of the A operand of one wgmma, elements of
    `width` bytes. For wgmma.m64nNk32 and k16 alike: warp w has rows 16 w .. 16 w + 15."""
    thread, register, element = np.meshgrid(
        np.arange(128), np.arange(4), np.arange(4 // width), indexing="ij"
    )
    warp, lane = thread // 32, thread % 32
    group, within = lane >> 2, lane % 4  # groupID and threadID_in_group of the PTX ISA
    row = 16 * warp + np.where((register == 0) | (register == 2), group, group + 8)
    if width == 1:  # m16n8k32: col = threadID_in_group * 4 + (i & 3) for i < 8, + 16 for i >= 8
        column = within * 4 + element + np.where(register < 2, 0, 16)
    else:  # m16n8k16: col = threadID_in_group * 2 + (i & 1) for i < 4, + 8 for i >= 4
        column = within * 2 + element + np.where(register < 2, 0, 8)
    return row, column


def gather_a(registers: np.ndarray, width: int) -> np.ndarray:
    """registers uint32 [halves, 128, 16], the A operands of a tile -> its elements [64, 128] as raw uint8 or
    uint16."""
    kind = np.uint8 if width == 1 else np.uint16
    row, column = place_of_a(width)
    tile = np.zeros((64, 128), kind)
    per = 32 // width  # k of one instruction
    instructions = registers.reshape(-1, 128, 4, 4).transpose(0, 2, 1, 3).reshape(-1, 128, 4)
    for i, words in enumerate(instructions):
        tile[row, column + per * i] = np.ascontiguousarray(words).view(kind).reshape(row.shape)
    return tile


def swizzled(row: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """Where a byte of a row of 128 bytes lies in the 128-byte swizzle: bits 4-6 of the address are replaced
    by their exclusive or with bits 7-9."""
    address = row * 128 + byte
    return address ^ ((address >> 7 & 7) << 4)
