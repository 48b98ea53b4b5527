// A head of q, k or v of a new token: its norm, its rotary embedding, its place in the cache. Rounded to IN wherever the
// unfused model rounds (transformers' RMSNorm and apply_rotary_pos_emb).
#pragma once
#include "piece.cuh"
#include "round8.cuh"

__device__ __forceinline__ float at(const void *base, u64 i) { return to_float(reinterpret_cast<const IN *>(base)[i]); }

// Channels lane, lane + 32, ... of a head in each thread of a warp.
template <int EACH> struct Head {
  float x[EACH];

  __device__ __forceinline__ void read(const void *qkv, u64 first, int d) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int channel = threadIdx.x % 32 + 32 * i;
      x[i] = channel < d ? at(qkv, first + channel) : 0.0f;
    }
  }

  __device__ __forceinline__ void norm(const void *weight, int d, float eps) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) squares = fmaf(x[i], x[i], squares);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(ALL, squares, step);
    const float inverse = 1.0f / sqrtf(squares / (float)d + eps);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int channel = threadIdx.x % 32 + 32 * i;
      if (channel < d) x[i] = rounded<IN>(at(weight, channel) * rounded<IN>(x[i] * inverse));
    }
  }

  // `row`: room for the head, of this warp alone
  template <class Args> __device__ __forceinline__ void rotate(const Args &a, float *row, int batch) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) row[threadIdx.x % 32 + 32 * i] = x[i];
    __syncwarp();
    const int half = a.rotary / 2;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int channel = threadIdx.x % 32 + 32 * i;
      if (channel >= a.rotary) continue;
      const bool lower = a.interleaved ? channel % 2 == 0 : channel < half;
      const int away = a.interleaved ? 1 : half;
      const float other = lower ? -row[channel + away] : row[channel - away];
      const u64 place = (u64)batch * a.rotary + channel;
      x[i] = rounded<IN>(rounded<IN>(x[i] * at(a.cos, place)) + rounded<IN>(other * at(a.sin, place)));
    }
  }

  __device__ __forceinline__ void copy(IN *to, int d) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int channel = threadIdx.x % 32 + 32 * i;
      if (channel < d) to[channel] = from_float<IN>(x[i]);
    }
  }

  template <class Code> __device__ __forceinline__ void quantize(u8 *to, float *scale, int d) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) largest = max_nan(largest, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = max_nan(largest, __shfl_xor_sync(ALL, largest, step));
    const float by = scale_of(largest, Code::top);
    const Divisor divide(by);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int channel = threadIdx.x % 32 + 32 * i;
      if (channel < d) to[channel] = (u8)Code::pack(divide(x[i]), 0, 0, 0);
    }
    if (threadIdx.x % 32 == 0) *scale = by;
  }

  // Into the cache at `position`, as it is or in codes.
  template <class Args>
  __device__ __forceinline__ void keep(const Args &a, bool is_k, int batch, int kv, long long position) const {
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
