// In place of zq/kernels/src/pointwise.cuh: the same operations as torch rounds them on a CPU (AVX2, AVX-512), so
// that the rest of a fused step can be compared to the bit with torch's operations there.
#pragma once

static float lerp(float x, float y, float w) {
  return std::fabs(w) < 0.5f ? std::fma(w, y - x, x) : std::fma(w - 1.0f, y - x, y);
}
static float add(float x, float y, float a) { return std::fma(a, y, x); }
static float addcmul(float x, float y, float z, float a) { return std::fma(a * y, z, x); }
static float addcdiv(float x, float y, float z, float a) { return x + a * y / z; }
static float over(float x, float number, float) { return x / number; }
