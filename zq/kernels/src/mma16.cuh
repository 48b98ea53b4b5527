// What attention.cu asks of the hardware beside common.cuh, one PTX instruction a function (PTX ISA 9.0).
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 sub_half2(u32 a, u32 b) {
  u32 y;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
#if ZQ_ARCH >= 89
__device__ __forceinline__ u32 half2_of_e4m3(u16 codes) {
  u32 y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(codes));
  return y;
}
#endif

// d [16, 8] += a [16, 16] b [16, 8]. Thread 4 g + t of a warp has, with two values in a register,
//     a  rows g, g + 8, g, g + 8; columns 2 t, 2 t, 2 t + 8, 2 t + 8      b  rows 2 t, 2 t + 8; column g
//     d  row g, columns 2 t and 2 t + 1; row g + 8, the same
template <bool HALF> __device__ __forceinline__ void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#define MMA_16816(TYPE)                                                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                            \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (HALF) MMA_16816("f16");
  else MMA_16816("bf16");
#undef MMA_16816
}
// Transposes an 8 x 8 matrix of 16-bit values: thread 4 g + t gives row g, columns 2 t and 2 t + 1, and gets the same
// of the result.
__device__ __forceinline__ u32 transpose_8x8(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
