// A head of q, k or v of a new token: its norm, its rotary embedding, its place in the cache. Rounded to IN wherever the
// unfused model rounds (transformers' RMSNorm and apply_rotary_pos_emb).
#pragma once
#include "cache.cuh"
#include "piece.cuh"
#include "round8.cuh"

struct Fused : Cache {
  const void *qkv;       // [batch, tokens, (heads + 2 kv_heads) d]
  const void *cos;       // [batch, tokens, rotary]; or null
  const void *sin;
  const void *q_norm;    // [d]; or null
  const void *k_norm;
  int rotary;            // the first channels of a head; 0: none
  int interleaved;       // pairs are neighbours (GPT-J), not halves
  int tokens;            // of a row of the cache
  float eps;
};

__device__ __forceinline__ float at(const void *base, u64 i) { return to_float(reinterpret_cast<const IN *>(base)[i]); }
// Consecutive numbers, zeros unless `inside`; `from` is a multiple of their size.
template <int N> __device__ __forceinline__ void read(float (&x)[N], const void *from, u64 first, bool inside) {
  u32 word[N / 2];
  load(word, reinterpret_cast<const IN *>(from) + first, inside);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(IN{(u16)(word[i / 2] >> 16 * (i % 2))});
}

// Cosines and sines of a token at the channels of a thread, EACH from EACH * lane on.
template <int EACH, int LANES = 32> struct Turn {
  float cos[EACH], sin[EACH];

  __device__ __forceinline__ Turn(const Fused &a, int token) {
    const int first = threadIdx.x % LANES * EACH;
    const u64 base = (u64)token * a.rotary + first;
    if (a.rotary % EACH == 0) {
      read(cos, a.cos, base, first < a.rotary), read(sin, a.sin, base, first < a.rotary);
      return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (first + i < a.rotary) cos[i] = at(a.cos, base + i), sin[i] = at(a.sin, base + i);
  }
};

// Of LANES threads of a warp, EACH channels in a thread.
template <int EACH, int LANES = 32> struct Head {
  static constexpr int ROW = LANES * EACH / 32 * 33;  // floats, spread so that fewer threads want the same bank
  float x[EACH];

  static __device__ __forceinline__ int first() { return threadIdx.x % LANES * EACH; }
  static __device__ __forceinline__ int spread(int channel) { return channel + channel / 32; }
  static __device__ __forceinline__ bool inside(int d) { return first() < d; }

  __device__ __forceinline__ void take(const Fused &a, u64 which) {
    read(x, a.qkv, which * a.d + first(), inside(a.d));
  }

  __device__ __forceinline__ void norm(const void *weight, int d, float eps) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) squares = fmaf(x[i], x[i], squares);
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) squares += __shfl_xor_sync(ALL, squares, step);
    const float inverse = 1.0f / sqrtf(squares / (float)d + eps);
    if (!inside(d)) return;
    float by[EACH];
    read(by, weight, first(), true);
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = rounded<IN>(by[i] * rounded<IN>(x[i] * inverse));
  }

  // `row`: room for the head, of these threads alone. All threads of a warp come here; which of them are `turned`
  // may differ.
  __device__ __forceinline__ void rotate(const Fused &a, const Turn<EACH, LANES> &by, float *row, bool turned = true) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EACH; ++i) row[spread(first() + i)] = x[i];
    __syncwarp();
    const int half = a.rotary / 2;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int channel = first() + i;
      if (!turned || channel >= a.rotary) continue;
      const bool lower = a.interleaved ? i % 2 == 0 : channel < half;
      const int away = a.interleaved ? 1 : half;
      const float other = lower ? -row[spread(channel + away)] : row[spread(channel - away)];
      x[i] = rounded<IN>(rounded<IN>(x[i] * by.cos[i]) + rounded<IN>(other * by.sin[i]));
    }
  }

  __device__ __forceinline__ void copy(IN *to, int d) const {
    u32 word[EACH / 2];
#pragma unroll
    for (int i = 0; i < EACH / 2; ++i) word[i] = pack2<IN>(x[2 * i], x[2 * i + 1]);
    if (inside(d)) store(to + first(), word);
  }

  template <class Code> __device__ __forceinline__ void quantize(u8 *to, float *scale, int d) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) largest = max_nan(largest, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) largest = max_nan(largest, __shfl_xor_sync(ALL, largest, step));
    const float by = scale_of(largest, Code::top);
    const Divisor divide(by);
    const auto code = [&](int i) { return i < EACH ? divide(x[i % EACH]) : 0.0f; };
    u32 word[(EACH + 3) / 4];
#pragma unroll
    for (int i = 0; i < EACH; i += 4) word[i / 4] = Code::pack(code(i), code(i + 1), code(i + 2), code(i + 3));
    if (inside(d)) {
      if constexpr (EACH == 2) *reinterpret_cast<u16 *>(to + first()) = (u16)word[0];
      else store(to + first(), word);
    }
    if (threadIdx.x % LANES == 0) *scale = by;
  }

  // Into the cache at `position`, as it is or in codes.
  __device__ __forceinline__ void keep(const Cache &a, bool is_k, int batch, int kv, long long position) const {
    if (position < 0 || position >= a.length) return;
    u8 *to = is_k ? (u8 *)a.k + batch * a.k_batch + kv * a.k_head + position * a.k_position
                  : (u8 *)a.v + batch * a.v_batch + kv * a.v_head + position * a.v_position;
#ifdef OUT
    float *scale =
        is_k ? a.k_scale + batch * a.ks_batch + kv * a.ks_head : a.v_scale + batch * a.vs_batch + kv * a.vs_head;
    quantize<OUT>(to, scale + position, a.d);
#else
    copy(reinterpret_cast<IN *>(to), a.d);
#endif
  }
};
