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

// ---- one, two or four words ----
template <int WORDS> __device__ __forceinline__ void load(u32 (&to)[WORDS], const void *from, bool inside) {
  if constexpr (WORDS == 4) {
    const uint4 x = inside ? *reinterpret_cast<const uint4 *>(from) : uint4{0, 0, 0, 0};
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (WORDS == 2) {
    const uint2 x = inside ? *reinterpret_cast<const uint2 *>(from) : uint2{0, 0};
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = inside ? *reinterpret_cast<const u32 *>(from) : 0;
  }
}
template <int WORDS> __device__ __forceinline__ void store(void *to, const u32 (&word)[WORDS]) {
  if constexpr (WORDS == 4) *reinterpret_cast<uint4 *>(to) = uint4{word[0], word[1], word[2], word[3]};
  else if constexpr (WORDS == 2) *reinterpret_cast<uint2 *>(to) = uint2{word[0], word[1]};
  else *reinterpret_cast<u32 *>(to) = word[0];
}

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
