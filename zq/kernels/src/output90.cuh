// From the sums of a tile to y, for one warpgroup of gemm_sm90.cu.
#pragma once
#include "ptx90.cuh"
#include "scheme.cuh"

constexpr bool SCALED_STEPS = ZQ_KIND == KIND_FP8_BLOCK;     // x has a scale for each token and step of 128 k,
constexpr bool SCALED_TOKENS = ACT == 1 && !SCALED_STEPS;    // or one for each token
constexpr int PITCH = 144;  // bytes of a token's 64 outputs while they are transposed: no bank conflicts

// What turns the sums of BT tokens x ROWS times 64 rows into outputs, in shared memory.
template <int BT, int ROWS> struct Terms {
  float sx[BT];
  int rowsum[BT];
  float scale[64 * ROWS];
  u16 bias[64 * ROWS];
};

// Asks for the terms of tokens from m0 and rows from n0 on, zeros outside. They have come after copies_wait_all.
template <int BT, int ROWS>
__device__ __forceinline__ void ask_terms(const Args& a, Terms<BT, ROWS>& terms, int m0, int n0, int t) {
#pragma unroll
  for (int i = t; i < BT; i += 128) {
    const int bytes = m0 + i < a.M ? 4 : 0, from = bytes ? m0 + i : 0;
    if (SCALED_TOKENS) copy4(shared_address(terms.sx + i), a.sx + from, bytes);
    if (ZQ_KIND == KIND_W4A8_TWO) copy4(shared_address(terms.rowsum + i), a.rowsum + from, bytes);
  }
  if (a.scale && t < 64 * ROWS)
    copy4(shared_address(terms.scale + t), a.scale + min(n0 + t, a.N - 1), n0 + t < a.N ? 4 : 0);
  const int pair = n0 + 2 * t;
  if (a.bias && t < 32 * ROWS)
    copy4(shared_address(terms.bias + 2 * t), reinterpret_cast<const u16*>(a.bias) + (pair < a.N ? pair : 0),
          2 * max(0, min(2, a.N - pair)));
}

__device__ __forceinline__ void store_row(u16* to, const u8* from, int count, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    return;
  }
#pragma unroll 1
  for (int e = 0; e < count; ++e) to[e] = reinterpret_cast<const u16*>(from)[e];
}

// turn: bytes to transpose min(BT, 64) tokens in; barrier: a named barrier of the warpgroup.
template <int BT, int ROWS>
__device__ __forceinline__ void write_tile(const Args& a, const Sum (&sum)[ROWS][BT / 2], const Terms<BT, ROWS>& terms,
                                           u8* turn, int m0, int n0, int t, int barrier) {
  constexpr int PIECE = BT < 64 ? BT : 64;
  const int warp = t >> 5, lane = t & 31;
  copies_wait_all();
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float ws[2], bias[2];
#pragma unroll
    for (int piece = 0; piece < BT / PIECE; ++piece) {
      named_barrier(barrier, 128);  // terms are there, and the last piece has been read
      if (piece == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = r * 64 + warp * 16 + lane / 4 + 8 * h;
          ws[h] = a.scale ? terms.scale[row] : 1.f;
          bias[h] = a.bias ? load16(terms.bias, row, a.out) : 0.f;
        }
      }
#pragma unroll
      for (int j = 0; j < PIECE / 8; ++j) {
        const Sum* v = sum[r] + (piece * PIECE / 8 + j) * 4;
        const int pair = (piece * PIECE + j * 8) / 2 + lane % 4;  // of tokens
        float2 sx = {1.f, 1.f};
        int2 rowsum = {0, 0};
        if (SCALED_TOKENS) sx = reinterpret_cast<const float2*>(terms.sx)[pair];
        if (ZQ_KIND == KIND_W4A8_TWO) rowsum = reinterpret_cast<const int2*>(terms.rowsum)[pair];
        float value[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          value[2 * h] = finish(v[2 * h], ws[h], sx.x, rowsum.x, bias[h]);
          value[2 * h + 1] = finish(v[2 * h + 1], ws[h], sx.y, rowsum.y, bias[h]);
        }
        const int token = j * 8 + lane % 8, column = warp * 16 + lane / 8 % 2 * 8;
        store_transposed(shared_address(turn) + token * PITCH + column * 2, pack2(value[0], value[1], a.out),
                         pack2(value[2], value[3], a.out));
      }
      named_barrier(barrier, 128);
#pragma unroll
      for (int i = 0; i < (PIECE * 8 + 127) / 128; ++i) {
        const int c = i * 128 + t, token = c / 8, m = m0 + piece * PIECE + token, n = n0 + r * 64 + c % 8 * 8;
        if (token < PIECE && m < a.M && n < a.N)
          store_row(a.y + (size_t)m * a.N + n, turn + token * PITCH + c % 8 * 16, min(8, a.N - n), a.N % 8 == 0);
      }
    }
  }
}
