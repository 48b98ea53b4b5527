// What a scheme means to a matrix kernel: sizes of a packed tile and how its codes become A registers.
// The layout is that of zq/kernels/layout.py. Chosen by -D:
//   ZQ_KIND   one of the KIND_* below        ZQ_GROUP  inputs per scale in the loop, 0 = none
//   ZQ_ASYM   zero points (w4a16)            ZQ_HALF   16-bit activations and group scales are fp16
#pragma once
#include "common.cuh"

#define KIND_W8A8_INT8 0
#define KIND_W8A8_FP8 1
#define KIND_FP8_BLOCK 2
#define KIND_W4A8_TWO 3
#define KIND_W4A8_GROUP 4
#define KIND_W4A8_FP8 5
#define KIND_W4A16 6
#define KIND_W8A16 7

constexpr bool WIDE = ZQ_KIND == KIND_W4A16 || ZQ_KIND == KIND_W8A16;  // 16-bit activations
constexpr bool FP8 = ZQ_KIND == KIND_W8A8_FP8 || ZQ_KIND == KIND_FP8_BLOCK || ZQ_KIND == KIND_W4A8_FP8;
constexpr bool FOUR = ZQ_KIND == KIND_W4A8_TWO || ZQ_KIND == KIND_W4A8_GROUP || ZQ_KIND == KIND_W4A8_FP8 ||
                      ZQ_KIND == KIND_W4A16;
constexpr int ACT = WIDE ? 2 : 1;               // bytes of an activation
constexpr int HALVES = ACT;                     // a tile is 128 k: 128 bytes of X a row, once or twice
constexpr int GROUP = ZQ_GROUP ? ZQ_GROUP : 128;
constexpr int GROUPS = ZQ_GROUP ? 128 / GROUP : 0;  // scales of a row in a tile
constexpr int CODE_BYTES = FOUR ? 4096 : 8192;  // of a tile of 64 rows
constexpr int SCALE_BYTES =
    ZQ_KIND == KIND_FP8_BLOCK ? 16
    : 32 * GROUPS * (ZQ_KIND == KIND_W4A8_TWO || (ZQ_KIND == KIND_W4A16 && !ZQ_ASYM) ? 4 : 8);
constexpr int TILE_BYTES = CODE_BYTES + SCALE_BYTES;

// Partial sums that leave the accumulator of the tensor core before the end of K: every `PART_STEPS` steps,
// or `GROUPS` times in a step. Integers need it for floating-point group scales only; FP8 also because the
// tensor core adds with fewer bits than float32 has.
constexpr bool GROUP_PARTS = (ZQ_KIND == KIND_W4A8_GROUP && ZQ_GROUP) || ZQ_KIND == KIND_W4A8_FP8;
constexpr int PART_STEPS = GROUP_PARTS || ZQ_KIND == KIND_FP8_BLOCK ? 1 : ZQ_KIND == KIND_W8A8_FP8 ? 4 : 0;
constexpr int PARTS = GROUP_PARTS ? GROUPS : 1;  // in a step

template <bool INT> struct Number { using type = float; };
template <> struct Number<true> { using type = int; };
using Acc = Number<!FP8 && !WIDE>::type;                        // of the tensor core
using Sum = Number<!FP8 && !WIDE && PART_STEPS == 0>::type;     // of the whole of K

// What a thread reads of a tile for four instructions: chunks of codes, and the scales of its two rows.
constexpr int CHUNKS = CODE_BYTES / 2048 / HALVES;
constexpr int PAIR_WORDS = ZQ_KIND == KIND_W4A8_TWO ? 1 : GROUP_PARTS ? 2 : 1 + ZQ_ASYM;  // of a group's scales
constexpr int SCALE_WORDS =
    ZQ_KIND == KIND_FP8_BLOCK ? 1 : PAIR_WORDS * (GROUPS > 1 ? GROUPS / HALVES : GROUPS);
struct Words {
  u32 q[4 * CHUNKS];
  u32 scale[SCALE_WORDS ? SCALE_WORDS : 1];
};
// What both kernels are called with.
struct Args {
  const u8* x;
  const float* sx;
  const int* rowsum;
  const u8* w;
  const float* scale;
  const void* bias;
  u16* y;
  u8* workspace;
  int M, N, K, ldx, split, out;
};

// For one thread: the A registers of four instructions, and the scales that multiply their sums.
struct Fragment {
  u32 a[16];
  float scale[2 * PARTS];
};

#ifndef ZQ_HOST  // tests compile this file for the host, and bring their own of these two
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {  // two 16-bit floats
  u32 d;
#if ZQ_HALF
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}
__device__ __forceinline__ u32 select(u32 v, u32 mask, u32 rest) {  // v & mask | rest, one instruction
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(v), "r"(mask), "r"(rest));
  return d;
}
#endif
constexpr u32 MAGIC = ZQ_HALF ? 0x64006400u : 0x43004300u;  // 1024 or 128: adding an integer sets low bits
constexpr u32 ONE = ZQ_HALF ? 0x3C003C00u : 0x3F803F80u;
constexpr u32 SIGNS = 0x80008000u;

// Bytes 0 .. 15 are the e4m3 codes of 0 .. 15 times 2^-9; a negative is stored one short.
__device__ __forceinline__ u32 signed_e4m3(u32 v) {
  u32 m = v & 0x87878787u;
  return m + ((m & 0x80808080u) >> 7);
}

// tile: in shared memory; t: 0 .. 127 in the warpgroup; half: which 128 bytes of X (16-bit activations).
__device__ __forceinline__ void load(const u8* tile, int t, int half, Words& w) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    uint4 v = reinterpret_cast<const uint4*>(tile)[(half * CHUNKS + i) * 128 + t];
    w.q[4 * i] = v.x, w.q[4 * i + 1] = v.y, w.q[4 * i + 2] = v.z, w.q[4 * i + 3] = v.w;
  }
  const u8* scales = tile + CODE_BYTES;
  if constexpr (GROUPS > 0) {
    const int pair = (t >> 5) * 8 + ((t & 31) >> 2);
    scales += (pair * GROUPS + half * 64 / GROUP) * PAIR_WORDS * 4;
  }
  if constexpr (SCALE_WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < SCALE_WORDS / 4; ++i) {
      uint4 v = reinterpret_cast<const uint4*>(scales)[i];
      w.scale[4 * i] = v.x, w.scale[4 * i + 1] = v.y, w.scale[4 * i + 2] = v.z, w.scale[4 * i + 3] = v.w;
    }
  } else if constexpr (SCALE_WORDS % 2 == 0) {
    uint2 v = *reinterpret_cast<const uint2*>(scales);
    w.scale[0] = v.x, w.scale[1] = v.y;
  } else {
    w.scale[0] = *reinterpret_cast<const u32*>(scales);
  }
}

__device__ __forceinline__ void convert(const Words& w, Fragment& f) {
  if constexpr (ZQ_KIND == KIND_W4A8_TWO) {
    u32 s0, s1, o0, o1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j * 32 % GROUP == 0) {
        u32 v = w.scale[j * 32 / GROUP];
        s0 = v & 0xFF, s1 = (v >> 8) & 0xFF;
        o0 = __byte_perm(v, 0, 0x2222), o1 = __byte_perm(v, 0, 0x3333);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 q = w.q[2 * j + h];
        f.a[4 * j + 2 * h] = (q & 0x0F0F0F0Fu) * s0 + o0;  // four bytes at once: no byte exceeds 255
        f.a[4 * j + 2 * h + 1] = ((q >> 4) & 0x0F0F0F0Fu) * s1 + o1;
      }
    }
  } else if constexpr (ZQ_KIND == KIND_W4A8_GROUP) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      f.a[2 * i] = (w.q[i] << 4) & 0xF0F0F0F0u;
      f.a[2 * i + 1] = w.q[i] & 0xF0F0F0F0u;
    }
  } else if constexpr (ZQ_KIND == KIND_W4A8_FP8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      f.a[2 * i] = signed_e4m3(w.q[i]);
      f.a[2 * i + 1] = signed_e4m3(__funnelshift_r(w.q[i], w.q[i], 4));
    }
  } else if constexpr (ZQ_KIND == KIND_W4A16) {
    u32 s0 = ONE, s1 = ONE, z0 = (MAGIC | 0x00080008u) ^ SIGNS, z1 = z0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (GROUPS && j * 16 % GROUP == 0) {
        u32 v = w.scale[j * 16 / GROUP * PAIR_WORDS];
        s0 = __byte_perm(v, 0, 0x1010), s1 = __byte_perm(v, 0, 0x3232);
        if (ZQ_ASYM) {
          v = w.scale[j * 16 / GROUP * PAIR_WORDS + 1];
          z0 = __byte_perm(v, 0, 0x1010) ^ SIGNS, z1 = __byte_perm(v, 0, 0x3232) ^ SIGNS;
        }
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        u32 v = fma2(select(w.q[j] >> (4 * p), 0x000F000Fu, MAGIC), ONE, p & 1 ? z1 : z0);  // exact
        f.a[4 * j + p] = GROUPS ? fma2(v, p & 1 ? s1 : s0, SIGNS) : v;
      }
    }
  } else if constexpr (ZQ_KIND == KIND_W8A16) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        u32 v = w.q[i] >> (8 * p);
        // low seven bits minus the sign bit, both on top of MAGIC
        f.a[2 * i + p] = fma2(select(v, 0x00800080u, MAGIC), ONE ^ SIGNS, select(v, 0x007F007Fu, MAGIC));
      }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) f.a[i] = w.q[i];
  }
  // 1/16: the codes are multiples of 16. 512: they are multiples of 2^-9.
  constexpr float unit = ZQ_KIND == KIND_W4A8_FP8 ? 512.f : 0.0625f;
#pragma unroll
  for (int g = 0; g < 2 * PARTS; ++g)
    f.scale[g] = GROUP_PARTS                 ? __uint_as_float(w.scale[g]) * unit
                 : ZQ_KIND == KIND_FP8_BLOCK ? __uint_as_float(w.scale[0])
                                             : 1.f;
}

// (sum, what it is a sum of) -> the value before rounding. Three roundings, in the order of the CPU reference.
__device__ __forceinline__ float finish(Sum sum, float ws, float sx, int rowsum, float bias) {
  if constexpr (ZQ_KIND == KIND_W4A8_TWO) sum -= 128 * rowsum;
  if constexpr (ZQ_KIND == KIND_W4A8_GROUP && !ZQ_GROUP) sum = sum / 16;  // codes were multiples of 16
  return (float)sum * (ws * sx) + bias;
}

__device__ __forceinline__ u32 pack2(float low, float high, int out) {
  return out ? (u32)to_half(low) | (u32)to_half(high) << 16 : (u32)to_bf16(low) | (u32)to_bf16(high) << 16;
}
__device__ __forceinline__ float load16(const void* p, int i, int out) {
  u16 v = reinterpret_cast<const u16*>(p)[i];
  return out ? from_half(v) : from_bf16(v);
}

template <class T> __device__ __forceinline__ T number(u32 bits);
template <> __device__ __forceinline__ int number<int>(u32 bits) { return (int)bits; }
template <> __device__ __forceinline__ float number<float>(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 bits(int x) { return (u32)x; }
__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }

// The tile of a block: a stripe of 2048 tokens sweeps all rows of W, so that x stays in the L2 cache.
struct Tile {
  int m, n;  // in tiles
};
template <int BT> __device__ __forceinline__ Tile tile_of(int work, int tiles_m, int groups_n) {
  constexpr int STRIPE = BT >= 128 ? 2048 / BT : 32;
  int stripe = work / (STRIPE * groups_n), within = work - stripe * STRIPE * groups_n;
  int width = min(STRIPE, tiles_m - stripe * STRIPE);
  int n = within / width;
  return {stripe * STRIPE + within - n * width, n};
}
