// Pieces to codes of 8 bits: the largest magnitude, then quotients, rounded.
#pragma once
#include "piece.cuh"
#include "quotient.cuh"

// The largest magnitude, by its bits: they are ordered as magnitudes are, with NaN above all. (Packed maxima of floats
// would take fewer instructions, but ptxas 13.0 makes max.xorsign.abs of a product and zero a maximum without .abs.)
template <class T> struct Largest {
  u32 high = 0, low = 0;  // of the upper values of words, and of the lower or only ones

  __device__ __forceinline__ void take(const Piece &piece) {
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if constexpr (sizeof(T) == 4) {
        low = max(low, piece.word[w] & 0x7fffffffu);
      } else {
        high = max(high, piece.word[w] & 0x7fffffffu);
        low = max(low, piece.word[w] & 0x7fffu);
      }
  }
  __device__ __forceinline__ u32 bits() const { return sizeof(T) == 4 ? low : max(low, high >> 16); }
};
template <class T> __device__ __forceinline__ float magnitude(u32 bits) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(bits);
  else return to_float(T{(u16)bits});
}

template <class T> struct Codes {  // of a piece
  u32 word[VALUES<T> / 4];
};
// Writes the codes of a piece, if it is there; returns their sum for Int8. The codes of zeros are zeros.
template <class Out, class T>
__device__ __forceinline__ int write(const Piece &piece, const Quotient<T> &by, Codes<T> *to, bool there) {
  float x[VALUES<T>];
  floats<T>(piece, x);
  Codes<T> codes;
  int sum = 0;
#pragma unroll
  for (int w = 0; w < VALUES<T> / 4; ++w) {
    codes.word[w] = Out::pack(by(x[4 * w]), by(x[4 * w + 1]), by(x[4 * w + 2]), by(x[4 * w + 3]));
    if constexpr (Out::sums) sum = __dp4a((int)codes.word[w], 0x01010101, sum);
  }
  if (there) {
    if constexpr (VALUES<T> == 8) *reinterpret_cast<uint2 *>(to) = uint2{codes.word[0], codes.word[1]};
    else *to = codes;
  }
  return sum;
}
template <class T> __device__ __forceinline__ void lift(Piece &piece, u32 by) {
#pragma unroll
  for (int w = 0; w < 4; ++w) piece.word[w] = mul2<T>(piece.word[w], by);
}
