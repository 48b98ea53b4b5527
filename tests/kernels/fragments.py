"""What the tensor cores expect in each register, written from the PTX ISA and from nothing else; and the code
that fills those registers, compiled for this machine.

PTX ISA 9.0: "Matrix Fragments for mma.m16n8k32", "... mma.m16n8k16 with floating point type", "Register Fragments
for wgmma.m64nNk32 / k16", "Shared memory matrix layout: 128-byte swizzling mode".
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

SOURCES = Path(__file__).resolve().parents[2] / "zq" / "kernels" / "src"
COMPILER = shutil.which("g++") or shutil.which("clang++")

# CUDA's built-ins, for the host. Assembly is dropped: the functions that use it are not called here.
SHIM = r"""
#include <cstdint>
#include <cmath>
#include <cstring>
#include <algorithm>
#define __device__
#define __forceinline__ inline
#define asm(...)
using std::min;
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
inline float __uint_as_float(uint32_t v) { float f; memcpy(&f, &v, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t v; memcpy(&v, &f, 4); return v; }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int by) { return (((uint64_t)high << 32 | low) >> by); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t pick) {
  uint64_t both = (uint64_t)b << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= (uint32_t)(both >> (8 * (pick >> (4 * i) & 7)) & 255) << (8 * i);
  return v;
}
// a * b + c on bfloat16 or half pairs, through double: exact before the one rounding.
inline double widen(uint32_t v) {
#if ZQ_HALF
  int e = v >> 10 & 31, m = v & 1023;
  double x = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
  return v & 0x8000 ? -x : x;
#else
  return __uint_as_float(v << 16);
#endif
}
inline uint32_t narrow(double x) {
  if (x == 0) return std::signbit(x) ? 0x8000 : 0;
  int e;
  std::frexp(x, &e);
#if ZQ_HALF
  int unit = std::max(e - 11, -24);
#else
  int unit = e - 8;
#endif
  double r = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  uint32_t sign = r < 0 ? 0x8000 : 0;
#if ZQ_HALF
  std::frexp(r, &e);
  double a = std::fabs(r);
  if (e - 1 < -14) return sign | (uint32_t)std::ldexp(a, 24);
  return sign | ((e - 1 + 15) << 10) | ((uint32_t)std::ldexp(a, 11 - e) & 1023);
#else
  return __float_as_uint((float)r) >> 16;
#endif
}
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t low = narrow(widen(a & 65535) * widen(b & 65535) + widen(c & 65535));
  return low | narrow(widen(a >> 16) * widen(b >> 16) + widen(c >> 16)) << 16;
}
#include "scheme.cuh"
extern "C" int tile_bytes() { return TILE_BYTES; }
extern "C" int halves() { return HALVES; }
extern "C" int scales() { return 2 * PARTS; }
extern "C" void registers(const u8* tile, u32* a, float* scale) {
  for (int t = 0; t < 128; ++t)
    for (int half = 0; half < HALVES; ++half) {
      Fragment f;
      dequantize(tile, t, half, f);
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


def build(folder: Path, macros: tuple[tuple[str, str], ...], tokens: int = 128) -> ctypes.CDLL:
    """zq/kernels/src/scheme.cuh as a library for the host."""
    source = folder / "host.cpp"
    source.write_text(SHIM)
    library = folder / "host.so"
    defines = [
        f"-D{name}={value}" for name, value in (*macros, ("ZQ_ARCH", 80), ("ZQ_HOST", 1), ("TOKENS", tokens))
    ]
    assert COMPILER
    subprocess.run(
        [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-w",
            *defines,
            f"-I{SOURCES}",
            source,
            "-o",
            library,
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def place_of_a(width: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, k) [128 threads, 4 registers, elements of a register] of the A operand of one wgmma, elements of `width`
    bytes. For wgmma.m64nNk32 and k16 alike: warp w has rows 16 w .. 16 w + 15."""
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
    """registers uint32 [halves, 128, 16], the A operands of a tile -> the tile's elements [64, 128] as raw uint8 or
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
    """Where byte `byte` of a row of 128 bytes lies in the 128-byte swizzle: bits 4-6 of the address are replaced by
    their exclusive or with bits 7-9."""
    address = row * 128 + byte
    return address ^ ((address >> 7 & 7) << 4)
