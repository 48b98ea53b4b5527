// 16 bytes of a row: two floats of 16 bits in a word, or one of 32.
#pragma once
#include "common.cuh"
#include "floats.cuh"

constexpr u32 ALL = 0xffffffffu;

// ---- 16-bit floats, two in a word ----
template <class T> __device__ __forceinline__ u32 pack2(float low, float high) {
  return IS_HALF<T> ? pack_half(low, high) : pack_bf16(low, high);
}
template <class T> __device__ __forceinline__ u32 add2(u32 a, u32 b) { return IS_HALF<T> ? add_half2(a, b) : add_bf16x2(a, b); }
template <class T> __device__ __forceinline__ u32 mul2(u32 a, u32 b) { return IS_HALF<T> ? mul_half2(a, b) : mul_bf16x2(a, b); }

// ---- a piece: 16 bytes of a row ----
struct Piece {
  u32 word[4];
  static __device__ __forceinline__ Piece of(const uint4 &bits) { return {{bits.x, bits.y, bits.z, bits.w}}; }
  __device__ __forceinline__ uint4 bits() const { return {word[0], word[1], word[2], word[3]}; }
};
template <class T> constexpr int VALUES = 16 / (int)sizeof(T);
template <class T> __device__ __forceinline__ void floats(const Piece &piece, float (&x)[VALUES<T>]) {
#pragma unroll
  for (int w = 0; w < 4; ++w)
    if constexpr (sizeof(T) == 4) {
      x[w] = __uint_as_float(piece.word[w]);
    } else if constexpr (IS_HALF<T>) {
      x[2 * w] = from_half((u16)piece.word[w]);
      x[2 * w + 1] = from_half((u16)(piece.word[w] >> 16));
    } else {
      x[2 * w] = __uint_as_float(piece.word[w] << 16);
      x[2 * w + 1] = __uint_as_float(piece.word[w] & 0xffff0000u);
    }
}
