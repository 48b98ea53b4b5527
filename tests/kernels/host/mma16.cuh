// In place of zq/kernels/src/mma16.cuh. Fragments as in the PTX ISA 9.0, section 9.7.14.
#pragma once
#include "common.cuh"

static u32 sub_half2(u32 a, u32 b) {
  return pack_half(from_half((u16)a) - from_half((u16)b), from_half(a >> 16) - from_half(b >> 16));
}
#if ZQ_ARCH >= 89
static float from_e4m3(u8 x) {
  const int e = x >> 3 & 15, m = x & 7;
  if ((x & 127) == 127) return NAN;
  const float y = e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9);
  return x & 128 ? -y : y;
}
static u32 half2_of_e4m3(u16 codes) { return pack_half(from_e4m3((u8)codes), from_e4m3(codes >> 8)); }
#endif

struct Operands {
  u32 a[4], b[2];
};
static_assert(sizeof(Operands) == sizeof(Exchange));
template <bool HALF> void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const Exchange *all = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const u32 x = all[warp + row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2] >> k % 2 * 16;
      const u32 y = all[warp + column * 4 + k % 8 / 2].words[4 + k / 8] >> k % 2 * 16;
      sum += HALF ? (double)from_half((u16)x) * from_half((u16)y) : (double)from_bf16((u16)x) * from_bf16((u16)y);
    }
    d[i] = (float)(d[i] + sum);
  }
}
static u32 transpose_8x8(u32 x) {
  const Exchange *all = exchange(x);
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2, warp = threadIdx.x / 32 * 32;
  const u32 low = all[warp + column * 4 + row / 2].words[0] >> row % 2 * 16 & 0xffff;
  const u32 high = all[warp + (column + 1) * 4 + row / 2].words[0] >> row % 2 * 16 & 0xffff;
  return low | high << 16;
}
