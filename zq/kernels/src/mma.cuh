// Products that every GPU from sm_80 on has: mma.sync (PTX ISA 9.0), and the copies before them.
#pragma once
#include "copies.cuh"
#include "scheme.cuh"

__device__ __forceinline__ void mma(Acc (&d)[4], const u32* a, u32 b0, u32 b1) {
#define MMA(TYPES, REG)                                                                                        \
  asm volatile("mma.sync.aligned." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
               : REG(d[0]), REG(d[1]), REG(d[2]), REG(d[3])                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#if ZQ_KIND == KIND_W4A8_TWO
  MMA("m16n8k32.row.col.s32.u8.s8.s32", "+r");
#elif ZQ_KIND == KIND_W8A8_INT8 || ZQ_KIND == KIND_W4A8_GROUP
  MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
#elif ZQ_KIND == KIND_W8A8_FP8 || ZQ_KIND == KIND_FP8_BLOCK || ZQ_KIND == KIND_W4A8_FP8
  MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32", "+f");
#elif ZQ_HALF
  MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
#else
  MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
#endif
}
