// What happens between the fused product and attention, for one new token per row or several: q, k and v are split, q and k get
// the norm of their head and their rotary embedding, and k and v are written into the cache, as they are or as 8-bit
// codes with a scale for each head. Rounded to IN wherever the unfused model rounds (transformers' RMSNorm and
// apply_rotary_pos_emb), so that codes are those of the unfused ones. OUT is Int8 or E4m3 where the cache
// holds codes. A warp takes a head of a token, then others of it, and reads the next while it makes one. Of a prompt it
// takes as many heads at once as 16 bytes in each thread hold, unless they have norms or become codes.
#include "head.cuh"

struct Args : Fused {
  const void *position;  // [batch, tokens], int or long long: where k and v go
  void *q;               // [batch, tokens, heads, d]
  int wide;              // position is long long
};

constexpr int WARPS = 4;

template <int EACH> __device__ __forceinline__ void store_heads(const Args &a) {
  __shared__ float rows[WARPS][Head<EACH>::ROW];
  pdl_launch();
  pdl_wait();
  const int token = blockIdx.x, warp = threadIdx.x / 32, all = a.heads + 2 * a.kv_heads;
  const u64 base = (u64)token * all;
  int which = blockIdx.y * WARPS + warp;
  if (which >= all) return;
  Head<EACH> next;
  next.take(a, base + which);
  const Turn<EACH> turn(a, token);
  const long long position = a.wide ? reinterpret_cast<const long long *>(a.position)[token]
                                    : reinterpret_cast<const int *>(a.position)[token];
  for (; which < all; which += gridDim.y * WARPS) {
    Head<EACH> head = next;
    const int then = which + gridDim.y * WARPS;
    if (then < all) next.take(a, base + then);
    const bool is_q = which < a.heads, is_k = !is_q && which < a.heads + a.kv_heads;
    const void *weight = is_q ? a.q_norm : is_k ? a.k_norm : nullptr;
    if (weight) head.norm(weight, a.d, a.eps);
    if ((is_q || is_k) && a.rotary) head.rotate(a, turn, rows[warp]);
    if (is_q) head.copy(reinterpret_cast<IN *>(a.q) + ((u64)token * a.heads + which) * a.d, a.d);
    else head.keep(a, is_k, token / a.tokens, (which - a.heads) % a.kv_heads, position);
  }
}

#ifndef OUT
template <int LANES> __device__ __forceinline__ void store_rows(const Args &a) {
  constexpr int EACH = 8, HEADS = 32 / LANES;
  __shared__ float rows[WARPS][HEADS][Head<EACH, LANES>::ROW];
  pdl_launch();
  pdl_wait();
  const int token = blockIdx.x, warp = threadIdx.x / 32, own = threadIdx.x % 32 / LANES;
  const int all = a.heads + 2 * a.kv_heads, stride = gridDim.y * WARPS * HEADS;
  const u64 base = (u64)token * all;
  int begin = (blockIdx.y * WARPS + warp) * HEADS;
  if (begin >= all) return;
  Head<EACH, LANES> next;
  if (begin + own < all) next.take(a, base + begin + own);
  const Turn<EACH, LANES> turn(a, token);
  const long long position = a.wide ? reinterpret_cast<const long long *>(a.position)[token]
                                    : reinterpret_cast<const int *>(a.position)[token];
  for (; begin < all; begin += stride) {
    Head<EACH, LANES> head = next;
    const int which = begin + own, kv = which - a.heads;
    if (which + stride < all) next.take(a, base + which + stride);
    if (a.rotary) head.rotate(a, turn, rows[warp][own], which < a.heads + a.kv_heads);
    if (kv < 0) head.copy(reinterpret_cast<IN *>(a.q) + ((u64)token * a.heads + which) * a.d, a.d);
    else if (which < all) head.keep(a, kv < a.kv_heads, token / a.tokens, kv % a.kv_heads, position);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(128) store_kv_64(const __grid_constant__ Args a) { store_heads<2>(a); }
extern "C" __global__ void __launch_bounds__(128) store_kv_128(const __grid_constant__ Args a) { store_heads<4>(a); }
extern "C" __global__ void __launch_bounds__(128) store_kv_256(const __grid_constant__ Args a) { store_heads<8>(a); }
#ifndef OUT
extern "C" __global__ void __launch_bounds__(128) store_rows_64(const __grid_constant__ Args a) { store_rows<8>(a); }
extern "C" __global__ void __launch_bounds__(128) store_rows_128(const __grid_constant__ Args a) { store_rows<16>(a); }
#endif
