// Torch's pointwise operations as its CUDA kernels round them (torch 2.11; aten/src/ATen/native/cuda), so that a fused
// step gives what the operations give one by one. On a CPU torch rounds some of them otherwise.
#pragma once

// x.lerp(y, w)
__device__ __forceinline__ float lerp(float x, float y, float w) {
  return fabsf(w) < 0.5f ? fmaf(w, y - x, x) : fmaf(w - 1.0f, y - x, y);
}
// x.add(y, alpha=a)
__device__ __forceinline__ float add(float x, float y, float a) { return fmaf(a, y, x); }
// x.addcmul(y, z, value=a)
__device__ __forceinline__ float addcmul(float x, float y, float z, float a) { return fmaf(a, y * z, x); }
// x.addcdiv(y, z, value=a)
__device__ __forceinline__ float addcdiv(float x, float y, float z, float a) {
  return fmaf(a, __fdiv_rn(y, z), x);
}
// x / number, which is a number of Python: torch divides 1 by it in float64 and rounds that
__device__ __forceinline__ float over(float x, float, float inverse) { return x * inverse; }
