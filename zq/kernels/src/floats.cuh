// Float types as values, and scales and divisions as IEEE 754 has them. Include common.cuh first.
#pragma once

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
template <class T> constexpr bool IS_HALF = false;
template <> constexpr bool IS_HALF<fp16> = true;
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return from_bf16(x.bits); }
__device__ __forceinline__ float to_float(fp16 x) { return from_half(x.bits); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return {to_bf16(x)}; }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return {to_half(x)}; }

template <class T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

constexpr float TINY = 1.17549435e-38f;
constexpr float HUGE_ = 3.402823466e38f;

// x / scale as __fdiv_rn gives it, without its branches, scale > 0: two corrections of x * (1 / scale), each from an
// exact remainder (Markstein, 1990). `lift`, a power of two, keeps remainders of small and of huge scales normal.
// An infinite x stays infinite. Minus zero may lose its sign. NaN stays.
struct Divisor {
  float lift, divisor, inverse;
  __device__ __forceinline__ explicit Divisor(float scale) {
    lift = scale < 0x1p-60f ? 0x1p80f : scale > 0x1p60f ? 0x1p-80f : 1.0f;
    divisor = scale * lift;
    inverse = __frcp_rn(divisor);
  }
  __device__ __forceinline__ float operator()(float x) const {
    const float a = x * lift, q = a * inverse;
    const float q1 = fmaf(fmaf(-q, divisor, a), inverse, q);
    const float q2 = fmaf(fmaf(-q1, divisor, a), inverse, q1);
    return fabsf(q) < 1e30f ? q2 : q;
  }
};
