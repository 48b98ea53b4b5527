// Everything between the fused product of q, k and v and the product after attention, for one new token per row: heads
// get their norm and rotary embedding, k and v go into the cache, attention over it (attend.cuh), and its rows are
// quantized token by token. The same numbers as store_kv, attention and quant give one after the other.
//
// Each block makes the query heads of its tile. The block that sees the newest position also makes its key and value
// (of several tiles each writes the same), and reads them as it reads all others. The block that is the last of a row to
// end quantizes it.
#include "codes8.cuh"
#include "head.cuh"

struct Args : Fused {
  const int *first;      // [batch]
  const int *last;       // [batch], included: where k and v go
  const float *slopes;   // [heads], ALiBi; or null
  void *out;             // [batch, heads, d], before it is quantized
  u8 *codes;             // [batch, heads d]
  float *steps;          // [batch], their scales
  int *rowsum;           // [batch], INT8 only
  int *counters;         // [batch, kv_heads * tiles of queries], zero before and after
  int *ended;            // [batch], zero before and after: tiles of a row that are done
  float *partial;        // [batch, heads, most, d], not normalised
  float2 *sums;          // [batch, heads, most], the largest score (base 2) and the sum of a chunk
  int most;              // chunks that a row can have
  int pieces;            // chunks that fill the device
  int fp8;               // codes are e4m3, else INT8
  float scale;
};

#include "attend.cuh"

template <int D> struct Token {
  static constexpr bool MAKES = true;
  static constexpr int EACH = D <= 64 ? 2 : D <= 128 ? 4 : 8, HEADS = (QUERIES + 2 + WARPS - 1) / WARPS;
  static constexpr int KEPT = 8;  // pieces of a row that a thread keeps
  const Args &a;
  const int row, kv, queries;
  Head<EACH> mine[HEADS];  // heads warp, warp + WARPS, ... of the queries, the key and the value
  const IN *made;

  __device__ __forceinline__ Token(const Args &a, int row, int kv, int head, int queries)
      : a(a), row(row), kv(kv), queries(queries) {
    const u64 base = (u64)row * (a.heads + 2 * a.kv_heads);
#pragma unroll
    for (int n = 0; n < HEADS; ++n) {
      const int which = threadIdx.x / 32 + WARPS * n;
      const int place = which < queries ? head + which : a.heads + kv + (which > queries ? a.kv_heads : 0);
      if (which < queries + 2) mine[n].take(a, base + place);
    }
  }
  __device__ __forceinline__ const IN *q() const { return made; }

  __device__ __forceinline__ void begin(bool newest, int position) {
    __shared__ float rows[WARPS][Head<EACH>::ROW];
    alignas(16) __shared__ IN heads[QUERIES * D];
    const int warp = threadIdx.x / 32;
    const Turn<EACH> turn(a, row);
#pragma unroll
    for (int n = 0; n < HEADS; ++n) {
      const int which = warp + WARPS * n;
      const bool is_q = which < queries, is_k = which == queries;
      if (which >= queries + (newest ? 2 : 0)) break;
      const void *weight = is_q ? a.q_norm : is_k ? a.k_norm : nullptr;
      if (weight) mine[n].norm(weight, a.d, a.eps);
      if ((is_q || is_k) && a.rotary) mine[n].rotate(a, turn, rows[warp]);
      if (is_q) mine[n].copy(heads + which * a.d, a.d);
      else mine[n].keep(a, is_k, row, kv, position);
    }
    __syncthreads();
    made = heads;
  }

  __device__ __forceinline__ void end() {
    __shared__ int others;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) others = atomicAdd(a.ended + row, 1);
    __syncthreads();
    if (others != (int)gridDim.x - 1) return;
    if (threadIdx.x == 0) a.ended[row] = 0;
    __threadfence();
    if (a.fp8) quantize<E4m3>();
    else quantize<Int8>();
  }

  // As quant.cu does it.
  template <class Out> __device__ __forceinline__ void quantize() {
    __shared__ u32 words[2][WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = a.heads * a.d / VALUES<IN>;
    const uint4 *from = reinterpret_cast<const uint4 *>(a.out) + (u64)row * pieces;
    auto *to = reinterpret_cast<Codes<IN> *>(a.codes) + (u64)row * pieces;
    Piece kept[KEPT];
    Largest<IN> largest;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int place = threadIdx.x + 32 * WARPS * i;
      kept[i] = place < pieces ? Piece::of(__ldcg(from + place)) : Piece{};
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) largest.take(kept[i]);
    for (int place = threadIdx.x + 32 * WARPS * KEPT; place < pieces; place += 32 * WARPS)
      largest.take(Piece::of(__ldcg(from + place)));
    const u32 top = __reduce_max_sync(ALL, largest.bits());
    if (lane == 0) words[0][warp] = top;
    __syncthreads();
    const float scale =
        scale_of<Out>(magnitude<IN>(max(max(words[0][0], words[0][1]), max(words[0][2], words[0][3]))));
    const Quotient<IN> by(scale);
    const auto put = [&](Piece piece, int place) {
      if (by.lifts()) lift<IN>(piece, by.lift);
      return write<Out>(piece, by, to + place, place < pieces);
    };
    int sum = 0;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) sum += put(kept[i], threadIdx.x + 32 * WARPS * i);
    for (int place = threadIdx.x + 32 * WARPS * KEPT; place < pieces; place += 32 * WARPS)
      sum += put(Piece::of(__ldcg(from + place)), place);
    if constexpr (Out::sums) {
      const u32 total = (u32)__reduce_add_sync(ALL, sum);
      if (lane == 0) words[1][warp] = total;
      __syncthreads();
      if (threadIdx.x == 0) a.rowsum[row] = (int)(words[1][0] + words[1][1] + words[1][2] + words[1][3]);
    }
    if (threadIdx.x == 0) a.steps[row] = scale;
  }
};

extern "C" __global__ void __launch_bounds__(128, 2) token_64(const __grid_constant__ Args a) { attend<64, Token<64>>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) token_96(const __grid_constant__ Args a) { attend<96, Token<96>>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) token_128(const __grid_constant__ Args a) { attend<128, Token<128>>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) token_256(const __grid_constant__ Args a) { attend<256, Token<256>>(a); }
