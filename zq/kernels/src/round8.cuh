// Rounding to 8 bits: INT8 and e4m3 codes and their scale.
#pragma once
#include "common.cuh"
#include "floats.cuh"

// ---- 8-bit codes, four in a word ----
struct Int8 {
  static constexpr float top = 127.5f;
  static constexpr bool sums = true;
  static __device__ __forceinline__ u32 pack(float a, float b, float c, float d) {  // NaN gives 0
    return pack_s8(__float2int_rn(a), __float2int_rn(b), __float2int_rn(c), __float2int_rn(d));
  }
};
// Before sm_89 there is no instruction for it, and a cache is all that is rounded to e4m3.
#if ZQ_ARCH < 89
__device__ __forceinline__ u32 e4m3_code(float x) {
  const u32 bits = __float_as_uint(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (size > 0x7f800000u) return sign | 0x7fu;
  if (size >= 0x43e00000u) return sign | 0x7eu;  // from 448 on
  if (size < 0x3c800000u)  // below 2^-6: steps of 2^-9
    return sign | (u32)__float2int_rn(__uint_as_float(size) * 512.0f);
  return sign | ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
}
__device__ __forceinline__ u16 to_e4m3x2(float low, float high) { return e4m3_code(low) | e4m3_code(high) << 8; }
#endif
struct E4m3 {
  static constexpr float top = 448.0f;
  static constexpr bool sums = false;
  static __device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
    return (u32)to_e4m3x2(a, b) | (u32)to_e4m3x2(c, d) << 16;
  }
};

__device__ __forceinline__ float scale_of(float largest, float top) {
  const float scale = __fdiv_rn(largest, top);
  if (scale == 0.0f) return 1.0f;
  return scale < TINY ? TINY : scale > HUGE_ ? HUGE_ : scale;  // NaN stays
}
