// Attention of tokens to those of the same row of a batch (a prompt, a text, an encoder's input) and what follows it:
// out = softmax(scale q K^T + mask) V, softmax in float32, zeros for a token that sees nothing; written as it is (IN),
// or, where OUT is Int8 or E4m3, quantized token by token as quant.cu does it. Keys and values may be copied into a
// cache on the way.
//
// Four warps take 64 queries of a head, 16 each; keys come 64 at a time through shared memory, the next ones while
// these are used. What a warp gives its products (mma.sync m16n8k16):
//
//     S [16 queries, 64 keys] = Q K^T        O [16 queries, D channels] += P V
//
// The scale of a token is that of all its heads, so blocks of a cluster have all of them: `per` each, side by side.
// They tell each other their largest magnitudes, once. The first one has made the sums of codes zero before that.
#include "codes8.cuh"
#include "mma16.cuh"
#include "copies.cuh"

struct Place {           // of heads [batch, tokens, heads, d]: strides in bytes
  u64 batch, token, head;
};
struct Args {
  const void *q;         // [batch, tokens, heads, d]
  const void *k;         // [batch, tokens, kv_heads, d]
  const void *v;
  const void *mask;      // [batch, tokens], IN, added to the scores of a key; or null
  void *k_to;            // [batch, kv_heads, >= tokens, d]; or null
  void *v_to;
  void *out;             // [batch, tokens, heads, d], IN or codes
  float *steps;          // [batch, tokens], scales of codes
  int *rowsum;           // [batch, tokens], sums of codes, INT8 only
  Place q_at, k_at, v_at, k_to_at, v_to_at;
  int heads;
  int kv_heads;
  int tokens;
  int d;
  int causal;
  int per;               // heads of a block
  float scale;
  int unused;
};

constexpr int ROWS = 64, KEYS = 64, THREADS = 128;  // of a head
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOW = -6e4f, NONE = -1e30f;  // what a mask adds to hide a key is less than LOW; the score of what is not seen
constexpr float LIFT = IS_HALF<IN> ? 14.0f : 0.0f;  // probabilities end at 2^LIFT, so that small ones stay normal in fp16
constexpr int BLOCKS = ZQ_ARCH == 120 ? 1 : 2;  // on a multiprocessor: shared memory of sm_120 holds one

// ROWS rows of a head in shared memory, spread so that eight of them lie in different banks. A thread has a piece of 16
// bytes of every STEP-th row.
template <int D> struct Tile {
  static constexpr u32 pitch = 2 * D + 16, bytes = ROWS * pitch;
  static constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
  static __device__ __forceinline__ int row() { return threadIdx.x % THREADS / PIECES; }
  static __device__ __forceinline__ int byte() { return threadIdx.x % PIECES * 16; }
  static __device__ __forceinline__ u32 place() { return row() * pitch + byte(); }
};

// Rows in memory, `rows` of them, of which tiles are read one after the other.
template <int D> struct Source {
  using T = Tile<D>;
  const u8 *from;
  u64 step;
  int left;  // rows from the thread's first one on; none where its channels are beyond d

  __device__ __forceinline__ Source(const void *base, u64 stride, int first, int rows, int d)
      : from(reinterpret_cast<const u8 *>(base) + (first + T::row()) * stride + T::byte()), step(stride * T::STEP),
        left(T::byte() < 2 * d ? rows - first - T::row() : 0) {}
  __device__ __forceinline__ void fetch(u32 to) {
#pragma unroll
    for (int i = 0; i < ROWS / T::STEP; ++i) {
      const bool inside = left > 0;
      copy16(to + T::place() + i * T::STEP * T::pitch, from, inside);
      if (inside) from += step;
      left -= T::STEP;
    }
  }
};

// The other way.
template <int D> __device__ __forceinline__ void copy_tile(u32 from, u8 *to, u64 stride, int rows, int d) {
  using T = Tile<D>;
#pragma unroll 1
  for (int row = T::row(), i = 0; i < ROWS / T::STEP; ++i, row += T::STEP)
    if (row < rows && T::byte() < 2 * d)
      *reinterpret_cast<uint4 *>(to + row * stride + T::byte()) = load_shared(from + row * T::pitch + T::byte());
}

// Over the four threads of a row of a fragment.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

// 16 queries of a warp: rows g and g + 8 in a thread, columns 2 t and 2 t + 1 of each eight.
template <int D> struct Sums {
  float out[D / 8][4];
  float top[2] = {NONE, NONE}, sum[2] = {0, 0};

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0;
  }

  // `q`: the warp's queries; `row`: the thread's first one; `first`: of the keys; `mask` of a batch.
  __device__ __forceinline__ void add(const Args &a, u32 q, u32 k, u32 v, const IN *mask, int row, int first) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const u32 k_row = k + (lane % 8 + lane / 16 * 8) * Tile<D>::pitch + lane / 8 % 2 * 16;
    const u32 v_row = v + lane % 16 * Tile<D>::pitch + lane / 16 * 16;
    float score[KEYS / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      u32 query[4];
      load_matrices(query, q + lane % 16 * Tile<D>::pitch + lane / 16 * 16 + c * 32);
      u32 part[KEYS / 16][4];
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) load_matrices(part[n], k_row + n * 16 * Tile<D>::pitch + c * 32);
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
        mma_16816<IS_HALF<IN>>(score[n], query, part[n / 2][n % 2 * 2], part[n / 2][n % 2 * 2 + 1]);
    }

    const auto change = [&](auto f) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = f(score[n][i], 8 * n + i % 2, i / 2 * 8);
    };
    const int key = first + 2 * t;
    if (mask)
      change([&](float x, int more, int) {
        const float added = key + more < a.tokens ? to_float(mask[key + more]) : 0.0f;
        return added < LOW ? NONE : fmaf(added, 1.0f / a.scale, x);
      });
    const int seen = a.causal ? min(row + 1, a.tokens) : a.tokens, below = a.causal ? min(row + 9, a.tokens) : a.tokens;
    if (a.causal || first + KEYS > a.tokens)
      change([&](float x, int more, int down) { return key + more < (down ? below : seen) ? x : NONE; });
    const float factor = a.scale * LOG2E;
    float now[2] = {top[0], top[1]};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most[4] = {NONE, NONE, NONE, NONE};
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) most[n % 4] = fmaxf(most[n % 4], fmaxf(score[n][2 * h], score[n][2 * h + 1]));
      now[h] = fmaxf(now[h], fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      now[h] = row_max(now[h]);
      const float by = exp2_fast((top[h] - now[h]) * factor);
      sum[h] *= by, top[h] = now[h], now[h] = now[h] > NONE ? LIFT - now[h] * factor : 0;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) out[n][2 * h] *= by, out[n][2 * h + 1] *= by;
    }
#pragma unroll
    for (int s = 0; s < KEYS / 16; ++s) {
      u32 p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&x)[4] = score[2 * s + i / 2];
        const int h = i % 2;
        const float low = exp2_fast(fmaf(x[2 * h], factor, now[h])), high = exp2_fast(fmaf(x[2 * h + 1], factor, now[h]));
        sum[h] += low + high;
        p[i] = pack2<IN>(low, high);
      }
#pragma unroll
      for (int c = 0; c < D / 16; c += 4) {
        u32 part[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_transposed(part[i], v_row + s * 16 * Tile<D>::pitch + (c + i) * 32);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          mma_16816<IS_HALF<IN>>(out[2 * c + i], p, part[i / 2][i % 2 * 2], part[i / 2][i % 2 * 2 + 1]);
      }
    }
  }

  // The row g + 8 h in 16 bits: a word for each eight channels.
  __device__ __forceinline__ void finish(int h, u32 (&word)[D / 8]) {
    const float whole = row_sum(sum[h]), inverse = whole == 0.0f ? 0.0f : 1.0f / whole;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) word[n] = pack2<IN>(out[n][2 * h] * inverse, out[n][2 * h + 1] * inverse);
  }
};

// Rows of a warp, which has put them into shared memory, as `pieces` of 16 bytes each.
__device__ __forceinline__ void write_rows(u32 from, u32 pitch, u8 *to, u64 stride, int rows, int pieces) {
  __syncwarp();
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < 16 * pieces; i += 32) {
    const int row = i / pieces, piece = i % pieces;
    if (row < rows) *reinterpret_cast<uint4 *>(to + row * stride + 16 * piece) = load_shared(from + row * pitch + 16 * piece);
  }
}

template <int D> __device__ __forceinline__ void attend(const Args &a) {
  using T = Tile<D>;
  const int warp = threadIdx.x % THREADS / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int own = threadIdx.x / THREADS, head = blockIdx.x * a.per + own, tile = gridDim.y - 1 - blockIdx.y;
  const int batch = blockIdx.z, kv = min(head, a.heads - 1) / (a.heads / a.kv_heads);
  const bool has = head < a.heads;
  const u32 memory = dynamic_shared() + own * 5 * T::bytes;
  const u32 q_tile = memory, k_tiles = memory + T::bytes, v_tiles = memory + 3 * T::bytes;
  pdl_launch();
  pdl_wait();
#ifdef OUT
  if (OUT::sums && cluster_rank() == 0 && threadIdx.x < ROWS && tile * ROWS + (int)threadIdx.x < a.tokens)
    a.rowsum[(u64)batch * a.tokens + tile * ROWS + threadIdx.x] = 0;
  cluster_arrive();
#endif

  const int there = has ? a.tokens : 0, blocks = (a.causal ? tile : (a.tokens - 1) / KEYS) + 1;
  const auto source = [&](const void *base, const Place &at, int which, int first) {
    const u8 *from = reinterpret_cast<const u8 *>(base) + batch * at.batch + which * at.head;
    return Source<D>(from, at.token, first, there, a.d);
  };
  Source<D> k = source(a.k, a.k_at, kv, 0), v = source(a.v, a.v_at, kv, 0);
  const auto fetch = [&](int block) {
    k.fetch(k_tiles + block % 2 * T::bytes), v.fetch(v_tiles + block % 2 * T::bytes);
    copies_commit();
  };
  source(a.q, a.q_at, min(head, a.heads - 1), tile * ROWS).fetch(q_tile);
  fetch(0);

  const u32 mine = q_tile + warp * 16 * T::pitch;  // rows of this warp, and of no other
  const IN *mask = a.mask ? reinterpret_cast<const IN *>(a.mask) + (u64)batch * a.tokens : nullptr;
  const bool keeps = a.k_to && has && head % (a.heads / a.kv_heads) == 0;
  Sums<D> sums;
  for (int block = 0; block < blocks; ++block) {
    if (block + 1 < blocks) {
      fetch(block + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    const u32 k_tile = k_tiles + block % 2 * T::bytes, v_tile = v_tiles + block % 2 * T::bytes;
    if (keeps && block == tile) {
      const Place &to_k = a.k_to_at, &to_v = a.v_to_at;
      u8 *k_to = reinterpret_cast<u8 *>(a.k_to) + batch * to_k.batch + kv * to_k.head + tile * KEYS * to_k.token;
      u8 *v_to = reinterpret_cast<u8 *>(a.v_to) + batch * to_v.batch + kv * to_v.head + tile * KEYS * to_v.token;
      copy_tile<D>(k_tile, k_to, to_k.token, a.tokens - tile * KEYS, a.d);
      copy_tile<D>(v_tile, v_to, to_v.token, a.tokens - tile * KEYS, a.d);
    }
    sums.add(a, mine, k_tile, v_tile, mask, tile * ROWS + warp * 16 + g, block * KEYS);
    if (block + 1 < blocks) __syncthreads();  // before these keys are overwritten
  }

  u32 word[2][D / 8];
  sums.finish(0, word[0]), sums.finish(1, word[1]);
  const int first = tile * ROWS + warp * 16, rows = has ? min(a.tokens - first, 16) : 0;  // of this warp
  const u64 token = (u64)batch * a.tokens + first, values = (u64)a.heads * a.d;
#ifndef OUT
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      store_shared(mine + (g + 8 * h) * T::pitch + 16 * n + 4 * t, word[h][n], true);
  write_rows(mine, T::pitch, reinterpret_cast<u8 *>(a.out) + 2 * (token * values + head * a.d), 2 * values, rows,
             a.d / 8);
#else
  const u32 words = dynamic_shared() + a.per * 5 * T::bytes;  // of all heads [heads, ROWS], in each block of the cluster
  const auto largest = [=](int head, int row) { return words + 4 * (head * ROWS + row); };
  const int row = warp * 16 + g, ranks = cluster_size();
  cluster_wait();  // all blocks are there
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Largest<IN> own_largest;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4)
      own_largest.take({word[h][n], word[h][n + 1], word[h][n + 2], word[h][n + 3]});
    u32 bits = own_largest.bits();
    bits = max(bits, __shfl_xor_sync(ALL, bits, 1));
    bits = max(bits, __shfl_xor_sync(ALL, bits, 2));
    if (has)
#pragma unroll 1
      for (int rank = t; rank < ranks; rank += 4) store_remote(largest(head, row + 8 * h), rank, bits);
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    u32 bits = 0;
#pragma unroll 1
    for (int other = t; other < a.heads; other += 4) bits = max(bits, shared_word(largest(other, row + 8 * h)));
    bits = max(bits, __shfl_xor_sync(ALL, bits, 1));
    bits = max(bits, __shfl_xor_sync(ALL, bits, 2));
    const float scale = scale_of<OUT>(magnitude<IN>(bits));
    const Quotient<IN> by(scale);
    if (by.lifts())
#pragma unroll
      for (int n = 0; n < D / 8; ++n) word[h][n] = mul2<IN>(word[h][n], by.lift);
    int sum = 0;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      const auto at = [&](int i) { return by(to_float(IN{(u16)(word[h][n + i / 2] >> 16 * (i % 2))})); };
      const u32 codes = OUT::pack(at(0), at(1), at(2), at(3));
      if constexpr (OUT::sums) sum = __dp4a((int)codes, 0x01010101, sum);
      const u32 to = mine + (g + 8 * h) * T::pitch + 8 * n + 2 * t;
      set_shared_half(to, (u16)codes), set_shared_half(to + 8, (u16)(codes >> 16));
    }
    if constexpr (OUT::sums) {
      sum += __shfl_xor_sync(ALL, sum, 1);
      sum += __shfl_xor_sync(ALL, sum, 2);
      if (t == 0 && g + 8 * h < rows) atomicAdd(a.rowsum + token + g + 8 * h, sum);
    }
    if (head == 0 && t == 0 && g + 8 * h < rows) a.steps[token + g + 8 * h] = scale;
  }
  write_rows(mine, T::pitch, reinterpret_cast<u8 *>(a.out) + token * values + head * a.d, values, rows, a.d / 16);
#endif
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) text_64(const __grid_constant__ Args a) { attend<64>(a); }
extern "C" __global__ void __launch_bounds__(256, 1) text_128(const __grid_constant__ Args a) { attend<128>(a); }
