// Attention of one new token per row over a static cache: out = softmax(scale q K^T + bias) V over the positions
// first .. last of the row, softmax in float32. IN is the type of q and out; CACHE is Same (k and v in IN), Int8 or
// Fp8 (codes with a float scale for each position of each head).
//
// Memory bound: K and V are read once for up to eight query heads of a key-value head, straight into the registers in
// which mma.sync wants them, since the order in which a product runs over its summed index is free. Products are
// transposed, so that positions and channels are the 16 rows and query heads the 8 columns:
//
//     S [positions, queries] = K Q^T      a thread reads 16-byte pieces of the rows g and g + 8
//     O [channels, queries]  = V^T P      a thread reads pieces of the rows 2t, 2t + 1, 2t + 8, 2t + 9
//
// P is rounded to 16 bits and transposed in registers (movmatrix). Codes become fp16, exactly; the scale of a key
// multiplies its score and that of a value its probability. q is then brought near 2^14 by a power of two (exact too).
//
// A row's positions are cut into chunks, whose size depends on their number, the heads and the device, but not on the
// other rows: a block takes every n-th chunk; its four warps take tiles of it in turn. Blocks that have none come last.
// Sums of a chunk go to a workspace, and the block of a row and head that ends last adds them in order. That is
// one launch, and there is no kernel between this one and the next product.
//
// Args is defined before; attention.cu and token.cu say what its fields are.
#pragma once
#include "mma16.cuh"
#include "piece.cuh"
#include "round8.cuh"

constexpr int WARPS = 4, QUERIES = 8;
constexpr float LOG2E = 1.4426950408889634f, NONE = -1e38f;  // NONE: the score of what is not seen

// ---- what a cache holds ----
struct Same {
  static constexpr int bytes = 2;
  static constexpr float factor = 1.0f;  // what a code as fp16 has to be multiplied by
  static __device__ __forceinline__ u32 low(u32 x) { return x; }
  static __device__ __forceinline__ u32 high(u32 x) { return x; }
};
// Four codes of a word, in fp16: the first two, the last two.
struct Int8Codes {
  static constexpr int bytes = 1;
  static constexpr float factor = 1.0f;
  // 1024 + (code + 128) is put together by bits.
  static __device__ __forceinline__ u32 low(u32 x) {
    return sub_half2(__byte_perm(x ^ 0x80808080u, 0x64646464u, 0x4140), 0x64806480u);
  }
  static __device__ __forceinline__ u32 high(u32 x) {
    return sub_half2(__byte_perm(x ^ 0x80808080u, 0x64646464u, 0x4342), 0x64806480u);
  }
};
#if ZQ_ARCH >= 89
struct Fp8Codes {
  static constexpr int bytes = 1;
  static constexpr float factor = 1.0f;
  static __device__ __forceinline__ u32 low(u32 x) { return half2_of_e4m3((u16)x); }
  static __device__ __forceinline__ u32 high(u32 x) { return half2_of_e4m3((u16)(x >> 16)); }
};
#else
struct Fp8Codes {  // the bits of e4m3, shifted, are those of an fp16 number that is 2^8 times smaller
  static constexpr int bytes = 1;
  static constexpr float factor = 256.0f;
  static __device__ __forceinline__ u32 shifted(u32 x) { return (x & 0x80008000u) | (x >> 1 & 0x3f803f80u); }
  static __device__ __forceinline__ u32 low(u32 x) { return shifted(__byte_perm(x, 0, 0x1404)); }
  static __device__ __forceinline__ u32 high(u32 x) { return shifted(__byte_perm(x, 0, 0x3424)); }
};
#endif
constexpr bool CODES = CACHE::bytes == 1;
template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
constexpr bool HALF = CODES || same<IN, fp16>;
constexpr float LIFT = HALF ? 14.0f : 0.0f;  // probabilities end at 2^LIFT, so that small ones stay normal in fp16

// Heads of up to D channels, padded with zeros to what the pieces of a warp cover.
template <int D> struct Shape {
  static constexpr int tile = D >= 256 ? 16 : D * CACHE::bytes <= 128 ? 64 : 32;  // positions
  static constexpr int k_values = 16 / CACHE::bytes;  // in a piece
  static constexpr int k_pieces = (D / k_values + 3) / 4;
  static constexpr int v_words = CODES && D <= 64 ? 2 : 4;  // so that all threads have a piece
  static constexpr int v_values = v_words * 4 / CACHE::bytes;
  static constexpr int v_pieces = (D / v_values + 7) / 8;
  static constexpr int rows = v_pieces * v_values / 2;  // products of 16 channels
};

__device__ __forceinline__ float largest_of(float x) {  // over the eight rows of a product
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// q of this thread: query head g, in the order of its pieces of K.
template <int D> struct Query {
  using S = Shape<D>;
  u32 word[S::k_pieces][S::k_values / 4][2];
  float factor[2];  // of the scores of the query heads 2t and 2t + 1

  __device__ __forceinline__ void read(const Args &a, const IN *q, int queries) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < S::k_pieces; ++c)
#pragma unroll
      for (int s = 0; s < S::k_values / 4; ++s) {
        const int channel = (c * 4 + t) * S::k_values + 4 * s;
        load(word[c][s], reinterpret_cast<const u8 *>(q + (u64)g * a.d + channel), g < queries && channel < a.d);
      }
    float power = 1.0f;
    if constexpr (CODES) power = lift();
    const float own = a.scale * LOG2E * CACHE::factor * power;
    factor[0] = __shfl_sync(0xffffffffu, own, 8 * t);
    factor[1] = __shfl_sync(0xffffffffu, own, 8 * t + 4);
  }

  // q as fp16, near 2^14; returns the power of two that takes it back.
  __device__ __forceinline__ float lift() {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < S::k_pieces; ++c)
#pragma unroll
      for (int i = 0; i < S::k_values / 2; ++i) {
        const u32 x = word[c][i / 2][i % 2];
        largest = fmaxf(largest, fmaxf(fabsf(to_float(IN{(u16)x})), fabsf(to_float(IN{(u16)(x >> 16)}))));
      }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const int exponent = max((int)(__float_as_uint(largest) >> 23) - 127, -100);
    const float up = __uint_as_float((u32)(127 + 14 - exponent) << 23);
#pragma unroll
    for (int c = 0; c < S::k_pieces; ++c)
#pragma unroll
      for (int i = 0; i < S::k_values / 2; ++i) {
        u32 &x = word[c][i / 2][i % 2];
        x = pack_half(to_float(IN{(u16)x}) * up, to_float(IN{(u16)(x >> 16)}) * up);
      }
    return __uint_as_float((u32)(127 - 14 + exponent) << 23);
  }
};

// What a warp has summed: query heads 2t and 2t + 1 in each thread.
template <int D> struct Sums {
  using S = Shape<D>;
  float out[S::rows][4];
  float top[2], sum[2];
  float unit;  // of values: the largest scale so far

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < S::rows; ++m) out[m][0] = out[m][1] = out[m][2] = out[m][3] = 0;
    top[0] = top[1] = NONE;
    sum[0] = sum[1] = 0;
    unit = CODES ? TINY : 1.0f;
  }

  // Positions base .. base + tile - 1, as far as they lie before `end`. `from`: where positions are counted from.
  __device__ __forceinline__ void add(const Args &a, const Query<D> &q, const u8 *k, const u8 *v, const float *k_scale,
                                      const float *v_scale, const float (&slope)[2], int base, int end, int from) {
    constexpr int N = S::tile / 16;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int k_have = a.d / S::k_values, v_have = a.d / S::v_values;
    u32 kw[N][2][S::k_pieces][4], vw[N][4][S::v_pieces][S::v_words];
    float ks[N][2], vs[N][2];
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int position = base + 16 * n + 8 * r + g;
#pragma unroll
        for (int c = 0; c < S::k_pieces; ++c)
          load(kw[n][r][c], k + position * a.k_position + (c * 4 + t) * 16, position < end && c * 4 + t < k_have);
        if constexpr (CODES) {
          ks[n][r] = position < end ? k_scale[position] : 0.0f;
          vs[n][r] = position < end ? v_scale[position] : 0.0f;
        }
      }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int position = base + 16 * n + 8 * (r / 2) + 2 * t + r % 2;
#pragma unroll
        for (int c = 0; c < S::v_pieces; ++c)
          load(vw[n][r][c], v + position * a.v_position + (c * 8 + g) * (4 * S::v_words),
               position < end && c * 8 + g < v_have);
      }

    float score[N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0;
#pragma unroll
      for (int c = 0; c < S::k_pieces; ++c)
#pragma unroll
        for (int s = 0; s < S::k_values / 4; ++s) {
          const u32(&x)[4] = kw[n][0][c], (&y)[4] = kw[n][1][c];
          if constexpr (CODES) {
            const u32 part[4] = {CACHE::low(x[s]), CACHE::low(y[s]), CACHE::high(x[s]), CACHE::high(y[s])};
            mma_16816<HALF>(score[n], part, q.word[c][s][0], q.word[c][s][1]);
          } else {
            const u32 part[4] = {x[2 * s], y[2 * s], x[2 * s + 1], y[2 * s + 1]};
            mma_16816<HALF>(score[n], part, q.word[c][s][0], q.word[c][s][1]);
          }
        }
    }

    float now[2] = {top[0], top[1]}, wide = unit;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = base + 16 * n + 8 * (i / 2) + g, h = i % 2;
        float x = score[n][i] * q.factor[h];
        if constexpr (CODES) x *= ks[n][i / 2], wide = fmaxf(wide, vs[n][i / 2]);
        if (a.slopes) x = fmaf(rounded<IN>(slope[h] * (float)(position - from)), LOG2E, x);
        score[n][i] = position < end ? x : NONE;
        now[h] = fmaxf(now[h], score[n][i]);
      }
    now[0] = largest_of(now[0]), now[1] = largest_of(now[1]);
    if constexpr (CODES) wide = largest_of(wide);

    const float smaller = CODES ? unit / wide : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float by = exp2_fast(top[h] - now[h]);
      sum[h] *= by;
#pragma unroll
      for (int m = 0; m < S::rows; ++m) out[m][h] *= by * smaller, out[m][h + 2] *= by * smaller;
      top[h] = now[h];
    }
    unit = wide;
    const float inverse = CODES ? 1.0f / wide : 1.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[i] = exp2_fast(score[n][i] - (now[i % 2] - LIFT));
        sum[i % 2] += p[i];
        if constexpr (CODES) p[i] *= vs[n][i / 2] * inverse;
      }
      const u32 b0 = transpose_8x8(HALF ? pack_half(p[0], p[1]) : pack_bf16(p[0], p[1]));
      const u32 b1 = transpose_8x8(HALF ? pack_half(p[2], p[3]) : pack_bf16(p[2], p[3]));
#pragma unroll
      for (int c = 0; c < S::v_pieces; ++c)
#pragma unroll
        for (int w = 0; w < S::v_words; ++w) {
          const u32 x0 = vw[n][0][c][w], x1 = vw[n][1][c][w], x2 = vw[n][2][c][w], x3 = vw[n][3][c][w];
          if constexpr (CODES) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const u32 x = __byte_perm(x0, x1, i ? 0x7362 : 0x5140), y = __byte_perm(x2, x3, i ? 0x7362 : 0x5140);
              const u32 part[4] = {CACHE::low(x), CACHE::high(x), CACHE::low(y), CACHE::high(y)};
              mma_16816<HALF>(out[(c * S::v_words + w) * 2 + i], part, b0, b1);
            }
          } else {
            const u32 part[4] = {__byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632),
                                 __byte_perm(x2, x3, 0x5410), __byte_perm(x2, x3, 0x7632)};
            mma_16816<HALF>(out[c * S::v_words + w], part, b0, b1);
          }
        }
    }
  }
};

#include "merge.cuh"

// What is around a kernel's attention: where q comes from, and what follows once the heads of a block's tile are done.
//
//     MAKES                         q has to be made first, and is not read before it is known that this block has work
//     begin(newest, position)       this block sees the newest position (as the last block of its tile, if none is seen)
//     q()                           [queries, d]
//     end()                         called by all threads of one block for each row and tile, after `out` was written
template <int D, class Around> __device__ __forceinline__ void attend(const Args &a) {
  __shared__ Merged<D> merged;
  __shared__ int arrived;
  pdl_launch();
  pdl_wait();
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
  const int group = a.heads / a.kv_heads, tiles = (group + QUERIES - 1) / QUERIES;
  const int row = blockIdx.y, kv = blockIdx.x / tiles, head = kv * group + blockIdx.x % tiles * QUERIES;
  const int queries = min(QUERIES, (kv + 1) * group - head);
  const u64 at = (u64)row * a.heads + head;  // of the first query head
  IN *out = reinterpret_cast<IN *>(a.out) + at * a.d;

  const int given_first = a.first[row], given_last = a.last[row];
  Around around(a, row, kv, head, queries);
  Query<D> q;
  if constexpr (!Around::MAKES) q.read(a, around.q(), queries);  // before anything waits for the positions
  float slope[2] = {0, 0};
  if (a.slopes) {
    if (2 * t < queries) slope[0] = a.slopes[head + 2 * t];
    if (2 * t + 1 < queries) slope[1] = a.slopes[head + 2 * t + 1];
  }
  const int first = max(given_first, 0), end = min(given_last, a.length - 1) + 1, seen = max(end - first, 0);
  constexpr int step = WARPS * Shape<D>::tile;
  const int chunk = (max(seen < 1024 ? 128 : 256, (seen + a.pieces - 1) / a.pieces) + step - 1) / step * step;
  const int chunks = max((seen + chunk - 1) / chunk, 1), blocks = min(chunks, (int)gridDim.z);
  if ((int)blockIdx.z >= blocks) return;
  if constexpr (Around::MAKES) {
    around.begin((int)blockIdx.z == (chunks - 1) % (int)gridDim.z, given_last);
    q.read(a, around.q(), queries);
  }
  if (seen == 0)
    for (int i = threadIdx.x; i < queries * a.d; i += blockDim.x) out[i] = from_float<IN>(0.0f);

  const u8 *k = reinterpret_cast<const u8 *>(a.k) + row * a.k_batch + kv * a.k_head;
  const u8 *v = reinterpret_cast<const u8 *>(a.v) + row * a.v_batch + kv * a.v_head;
  const float *k_scale = a.k_scale + row * a.ks_batch + kv * a.ks_head;
  const float *v_scale = a.v_scale + row * a.vs_batch + kv * a.vs_head;

  for (int c = blockIdx.z; c < chunks && seen; c += gridDim.z) {
    const int begin = first + c * chunk, until = min(begin + chunk, end);
    Sums<D> own;
    own.clear();
    for (int base = begin + warp * Shape<D>::tile; base < until; base += step)
      own.add(a, q, k, v, k_scale, v_scale, slope, base, until, first);
    merged.put(own, a.d);
    __syncthreads();
    for (int query = 0; query < queries; ++query) {
      float by[WARPS];
      const float2 whole = merged.whole(query, by);
      for (int channel = threadIdx.x; channel < a.d; channel += blockDim.x) {
        float value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) value = fmaf(merged.out[w][query][channel], by[w], value);
        if (chunks == 1) out[query * a.d + channel] = from_float<IN>(value / whole.y);
        else a.partial[((at + query) * a.most + c) * a.d + channel] = value;
      }
      if (chunks > 1 && threadIdx.x == 0) a.sums[(at + query) * a.most + c] = whole;
    }
    __syncthreads();
  }
  if (chunks > 1) {
    __threadfence();
    __syncthreads();
    int *counter = a.counters + (u64)row * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
    __syncthreads();
    if (arrived != blocks - 1) return;
    if (threadIdx.x == 0) *counter = 0;
    __threadfence();
    for (int query = warp; query < queries; query += WARPS)
      combine<D>(a.partial + (at + query) * a.most * a.d, a.sums + (at + query) * a.most, chunks, a.d,
                 out + query * a.d);
  }
  around.end();
}
