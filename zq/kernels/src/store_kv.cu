// What happens between the fused product and attention, for one new token per row or several: q, k and v are split, q and k get
// the norm of their head and their rotary embedding, and k and v are written into the cache, as they are or as 8-bit
// codes with a scale for each head. Rounded to IN wherever the unfused model rounds (transformers' RMSNorm and
// apply_rotary_pos_emb), so that codes are those of the unfused ones. OUT is Int8 or E4m3 where the cache
// holds codes. A warp takes a head.
#include "head.cuh"

struct Args {
  const void *qkv;       // [batch, tokens, (heads + 2 kv_heads) d]
  void *k;               // [batch, kv_heads, length, d], strides below
  void *v;
  float *k_scale;        // [batch, kv_heads, length]; or null: k and v are of type IN
  float *v_scale;
  const void *position;  // [batch, tokens], int or long long: where k and v go
  const void *cos;       // [batch, tokens, rotary]; or null
  const void *sin;
  const void *q_norm;    // [d]; or null
  const void *k_norm;
  void *q;               // [batch, tokens, heads, d]
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
  int tokens;            // of a row of the cache
  float eps;
};

constexpr int WARPS = 4, EACH = 8;

extern "C" __global__ void __launch_bounds__(128) store_kv(const __grid_constant__ Args a) {
  __shared__ float rows[WARPS][32 * EACH];
  pdl_launch();
  pdl_wait();
  const int token = blockIdx.x, warp = threadIdx.x / 32, which = blockIdx.y * WARPS + warp;
  if (which >= a.heads + 2 * a.kv_heads) return;
  const bool is_q = which < a.heads, is_k = !is_q && which < a.heads + a.kv_heads;
  Head<EACH> head;
  head.read(a.qkv, ((u64)token * (a.heads + 2 * a.kv_heads) + which) * a.d, a.d);
  const void *weight = is_q ? a.q_norm : is_k ? a.k_norm : nullptr;
  if (weight) head.norm(weight, a.d, a.eps);
  if ((is_q || is_k) && a.rotary) head.rotate(a, rows[warp], token);
  if (is_q) {
    head.copy(reinterpret_cast<IN *>(a.q) + ((u64)token * a.heads + which) * a.d, a.d);
    return;
  }
  const long long position = a.wide ? reinterpret_cast<const long long *>(a.position)[token]
                                    : reinterpret_cast<const int *>(a.position)[token];
  head.keep(a, is_k, token / a.tokens, (which - a.heads) % a.kv_heads, position);
}
