// Scales and quotients of round8.cuh in fewer instructions, for values of 16 bits. tests/kernels/test_division.py has
// the proof, by trying all of them.
#pragma once
#include "round8.cuh"

// scale_of by a product and its correction.
template <class Code> __device__ __forceinline__ float scale_of(float largest) {
  if (!(largest > 0x1p-100f && largest < 0x1p120f)) return scale_of(largest, Code::top);
  constexpr float inverse = 1.0f / Code::top;
  const float scale = largest * inverse;
  return fmaf(fmaf(-scale, Code::top, largest), inverse, scale);
}

// x / scale as __fdiv_rn gives it, for x of a 16-bit type T and a scale that is the largest |x| of a row over Int8::top
// or E4m3::top: x is multiplied by 1 / scale in two parts, of which the first has so few bits that its product is
// exact. Quotients that no code depends on may be wrong in the last bit.
//
// Where 1 / scale is too small for that (bf16), a power of two times x is wanted, over the same power times scale: `lift`.
template <class T> struct Quotient {
  float high, low;
  u32 lift = 0;  // two of T

  __device__ __forceinline__ explicit Quotient(float scale) {
    const bool tiny = scale < 0x1p-60f, huge = scale > 0x1p60f;
    if (sizeof(T) == 2 && !IS_HALF<T>) {
      lift = tiny ? 0x67806780u : huge ? 0x17801780u : 0;  // 2^80, 2^-80
      scale *= tiny ? 0x1p80f : huge ? 0x1p-80f : 1.0f;
    }
    const float inverse = reciprocal_fast(scale);
    high = __uint_as_float(__float_as_uint(inverse) & (IS_HALF<T> ? 0xfffff800u : 0xffffff00u));
    low = fmaf(-high, scale, 1.0f) * inverse;
    if (IS_HALF<T> && huge) high = low = 0x1p-120f;  // of a row with infinity
  }
  __device__ __forceinline__ bool lifts() const { return lift != 0; }
  __device__ __forceinline__ float operator()(float x) const { return fmaf(x, low, x * high); }
};
template <> struct Quotient<float> : Divisor {
  static constexpr u32 lift = 0;
  using Divisor::Divisor;
  static constexpr __device__ __forceinline__ bool lifts() { return false; }
};
