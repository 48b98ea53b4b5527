// Shared by all kernels: types, conversions, the programmatic launch hand-over. No toolkit headers.
// ZQ_ARCH is the compute capability that is compiled for, times ten: 80, 89, 90, 100, 120.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i32 = int;

// 16-bit floats travel as bits, since their types come with the toolkit's headers. To nearest even.
__device__ __forceinline__ u16 to_bf16(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float from_half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// The larger; NaN if there is one.
__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

#if ZQ_ARCH >= 89
// Two floats -> two e4m3 codes, `low` in the low byte. To nearest even, beyond +-448 to +-448, NaN to NaN.
__device__ __forceinline__ u16 to_e4m3x2(float low, float high) {
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
#endif

// Four bytes to shared memory, of which the last ones are zeros; both addresses are multiples of four.
__device__ __forceinline__ void copy4(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch. Before `pdl_wait` a kernel may touch only what no earlier kernel writes.
// A kernel that calls `pdl_launch` lets the next one begin; that one still waits for all of this one's writes.
__device__ __forceinline__ void pdl_wait() {
#if ZQ_ARCH >= 90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_launch() {
#if ZQ_ARCH >= 90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
