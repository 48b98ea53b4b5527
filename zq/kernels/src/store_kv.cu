// What happens between the fused product and attention, for one new token per row: q, k and v are split, q and k get
// the norm of their head and their rotary embedding, and k and v are written into the cache, as they are or as 8-bit
// codes with a scale for each head. Rounded to IN wherever the unfused model rounds (transformers' RMSNorm and
// apply_rotary_pos_emb), so that codes are those of the unfused ones. OUT is Int8 or E4m3 where the cache
// holds codes. A warp takes a head.
#include "round8.cuh"

struct Args {
  const void *qkv;       // [batch, (heads + 2 kv_heads) d]
  void *k;               // [batch, kv_heads, length, d], strides below
  void *v;
  float *k_scale;        // [batch, kv_heads, length]; or null: k and v are of type IN
  float *v_scale;
  const void *position;  // [batch], int or long long: where k and v go
  const void *cos;       // [batch, rotary]; or null
  const void *sin;
  const void *q_norm;    // [d]; or null
  const void *k_norm;
  void *q;               // [batch, heads, d]
  u64 k_batch;           // strides in bytes
  u64 k_head;
  u64 k_position;
  u64 v_batch;
  u64 v_head;
  u64 v_position;
  u64 ks_batch;          // strides of the scales in elements
  u64 ks_head;
  u64 vs_batch;
  u64 vs_head;
  int heads;
  int kv_heads;
  int length;
  int d;
  int rotary;            // the first channels of a head; 0: none
  int interleaved;       // pairs are neighbours (GPT-J), not halves
  int wide;              // position is long long
  float eps;
};

constexpr int WARPS = 4, EACH = 8;  // channels of a thread, at most: lane, lane + 32, ...

constexpr u32 ALL = 0xffffffffu;
__device__ __forceinline__ float rounded(float x) { return to_float(from_float<IN>(x)); }
__device__ __forceinline__ float at(const void *base, u64 i) { return to_float(reinterpret_cast<const IN *>(base)[i]); }

struct Head {
  float x[EACH];

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
      if (channel < d) x[i] = rounded(at(weight, channel) * rounded(x[i] * inverse));
    }
  }

  // `row`: room for the head, of this warp alone
  __device__ __forceinline__ void rotate(const Args &a, float *row, int batch) {
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
      x[i] = rounded(rounded(x[i] * at(a.cos, place)) + rounded(other * at(a.sin, place)));
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
};

extern "C" __global__ void __launch_bounds__(128) store_kv(const __grid_constant__ Args a) {
  __shared__ float rows[WARPS][32 * EACH];
  pdl_launch();
  pdl_wait();
  const int batch = blockIdx.y, warp = threadIdx.x / 32, which = blockIdx.x * WARPS + warp;
  if (which >= a.heads + 2 * a.kv_heads) return;
  const bool is_q = which < a.heads, is_k = !is_q && which < a.heads + a.kv_heads;
  Head head;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int channel = threadIdx.x % 32 + 32 * i;
    const u64 place = ((u64)batch * (a.heads + 2 * a.kv_heads) + which) * a.d + channel;
    head.x[i] = channel < a.d ? at(a.qkv, place) : 0.0f;
  }
  const void *weight = is_q ? a.q_norm : is_k ? a.k_norm : nullptr;
  if (weight) head.norm(weight, a.d, a.eps);
  if ((is_q || is_k) && a.rotary) head.rotate(a, rows[warp], batch);
  if (is_q) {
    head.copy(reinterpret_cast<IN *>(a.q) + ((u64)batch * a.heads + which) * a.d, a.d);
    return;
  }
  const int kv = (which - a.heads) % a.kv_heads;
  const long long position = a.wide ? reinterpret_cast<const long long *>(a.position)[batch]
                                    : reinterpret_cast<const int *>(a.position)[batch];
  if (position < 0 || position >= a.length) return;
  u8 *to = is_k ? reinterpret_cast<u8 *>(a.k) + batch * a.k_batch + kv * a.k_head + position * a.k_position
                : reinterpret_cast<u8 *>(a.v) + batch * a.v_batch + kv * a.v_head + position * a.v_position;
#ifdef OUT
  float *scale = is_k ? a.k_scale + batch * a.ks_batch + kv * a.ks_head : a.v_scale + batch * a.vs_batch + kv * a.vs_head;
  head.quantize<OUT>(to, scale + position, a.d);
#else
  head.copy(reinterpret_cast<IN *>(to), a.d);
#endif
}
