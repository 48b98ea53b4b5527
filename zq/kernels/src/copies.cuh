// Copies to shared memory and from it into fragments, one PTX instruction a function: cp.async, ldmatrix (PTX ISA 9.0).
#pragma once
#include "common.cuh"

__device__ __forceinline__ void copy16(u32 to, const void* from, bool inside) {  // zeros, if it is not
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Four 8 x 8 matrices of 16-bit values; threads 8 i .. 8 i + 7 give the addresses of the rows of matrix i. Thread
// 4 g + t gets row g, columns 2 t and 2 t + 1 of each; `transposed`: column g, rows 2 t and 2 t + 1.
__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&b)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ u32 shared_word(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void set_shared_half(u32 to, u16 value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory");
}
__device__ __forceinline__ u32 dynamic_shared() {
  extern __shared__ uint4 dynamic_words[];
  return (u32)__cvta_generic_to_shared(dynamic_words);
}
