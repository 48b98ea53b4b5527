// y[M, N] = x[M, K] W[N, K]^T with mma.sync: one kernel for every scheme (scheme.cuh), for every GPU from sm_80 on
// (FP8 from sm_89 on). The same packed weights and the same swap of operands as in gemm_sm90.cu: rows of W are
// the 16 rows of an mma, tokens its 8 columns.
//
// A block computes 128 rows x BT tokens. Eight warps: a quarter of each of WN x ROWS tiles of 64 rows, for a
// share of the tokens. A ring of STAGES stages of 128 k is filled by cp.async. With split > 1 the blocks of a
// tile share K: each writes its sums to the workspace, in the order of registers, and the last one to arrive
// adds all of them in the order of K, so the result does not depend on who is last.
#include "mma.cuh"

constexpr int BLOCK_ROWS = 128;
constexpr int PITCH = BLOCK_ROWS * 2 + 16;  // bytes of a token's outputs while they are transposed
constexpr int PERIOD = PART_STEPS ? PART_STEPS : 1;
constexpr bool SCALED_X = ZQ_KIND == KIND_FP8_BLOCK;

template <int BT, int ROWS, int STAGES> __device__ __forceinline__ void gemm(const Args a) {
  constexpr int WN = 2 / ROWS, WT = 2 / WN;  // warps: 4 along 64 rows, WN along tiles, WT along tokens
  constexpr int THREADS = 256, TOKENS = BT / WT, BLOCKS = TOKENS / 8;
  constexpr u32 X = BT * 128 * ACT, W = 2 * TILE_BYTES, SA = SCALED_X ? BT * 4 : 0, STAGE = X + W + SA;
  extern __shared__ __align__(1024) u8 memory[];
  const u32 ring = (u32)__cvta_generic_to_shared(memory);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int quarter = warp & 3, wn = (warp >> 2) % WN, wt = (warp >> 2) / WN;
  const int blocks_n = (a.N + BLOCK_ROWS - 1) / BLOCK_ROWS, z = blockIdx.z;
  const Tile tile = tile_of<BT>(blockIdx.x, (a.M + BT - 1) / BT, blocks_n);
  const int m0 = tile.m * BT, n0 = tile.n * BLOCK_ROWS;
  const int steps = (a.K + 127) / 128, first = steps * z / a.split, last = steps * (z + 1) / a.split;

  auto fetch = [&](int kt) {
    if (kt < last) {
      const int slot = (kt - first) % STAGES;
      const u32 to = ring + slot * STAGE;
#pragma unroll
      for (int i = 0; i < (BT * 8 * HALVES + THREADS - 1) / THREADS; ++i) {
        const int c = i * THREADS + thread, half = c / (BT * 8), row = c % (BT * 8) / 8, chunk = c % 8;
        const int m = m0 + row, byte = kt * 128 * ACT + half * 128 + chunk * 16;
        const bool inside = m < a.M && byte < a.K * ACT;
        if (BT * 8 * HALVES % THREADS == 0 || c < BT * 8 * HALVES)
          copy16(to + half * BT * 128 + row * 128 + (chunk ^ (row & 7)) * 16,
                 inside ? a.x + (size_t)m * a.ldx * ACT + byte : a.x, inside);
      }
      const u8* from = a.w + ((size_t)tile.n * steps + kt) * W;
      for (int c = thread; c < W / 16; c += THREADS) copy16(to + X + c * 16, from + c * 16, true);
      if (SCALED_X && thread < BT) {
        const bool inside = m0 + thread < a.M;
        copy4(to + X + W + thread * 4, inside ? a.sx + (size_t)(m0 + thread) * steps + kt : a.sx, inside ? 4 : 0);
      }
    }
    copies_commit();
  };

  Sum sum[ROWS][BLOCKS][4];
  Acc part[ROWS][BLOCKS][4];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[r][n][i] = 0;

  pdl_wait();
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(first + i);
  for (int kt = first; kt < last; ++kt) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    fetch(kt + STAGES - 1);
    const u8* stage = memory + (kt - first) % STAGES * STAGE;
    const u32 x = ring + (kt - first) % STAGES * STAGE + wt * TOKENS * 128;
    const bool fresh = (kt - first) % PERIOD == 0;
    const bool due = (kt - first) % PERIOD == PERIOD - 1 || kt + 1 == last;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      Fragment f[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        Words words;
        load(stage + X + (wn * ROWS + r) * TILE_BYTES, quarter * 32 + lane, half, words);
        convert(words, f[r]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // one instruction along k
        const bool starts = j % (4 / PARTS) == 0, ends = (j + 1) % (4 / PARTS) == 0;
        const int p = j / (4 / PARTS);
        u32 b[4];
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) {
          const int row = n * 8 + (lane & 7) + (BLOCKS > 1 ? (lane >> 4) * 8 : 0);
          if (n % 2 == 0)  // two blocks of tokens at once, 32 bytes of k each
            load_matrices(b, x + half * BT * 128 + row * 128 + ((2 * j + (lane >> 3 & 1)) ^ (row & 7)) * 16);
          const u32 b0 = b[2 * (n & 1)], b1 = b[2 * (n & 1) + 1];
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            if constexpr (PART_STEPS == 0) {
              mma(reinterpret_cast<Acc(&)[4]>(sum[r][n]), f[r].a + 4 * j, b0, b1);
            } else {
              if (starts && fresh)
#pragma unroll
                for (int i = 0; i < 4; ++i) part[r][n][i] = 0;
              mma(part[r][n], f[r].a + 4 * j, b0, b1);
              if (ends && due) {
                float2 by = {1.f, 1.f};
                if (SCALED_X)
                  by = reinterpret_cast<const float2*>(stage + X + W)[(wt * TOKENS + n * 8) / 2 + lane % 4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  float scale = f[r].scale[2 * p + (i >> 1)] * (i & 1 ? by.y : by.x);
                  sum[r][n][i] = fmaf((float)part[r][n][i], scale, sum[r][n][i]);
                }
              }
            }
          }
        }
      }
    }
  }
  copies_wait<0>();
  __syncthreads();

  if (a.split > 1) {
    constexpr int VALUES = ROWS * BLOCKS * 4;
    int* const arrived = reinterpret_cast<int*>(a.workspace) + blockIdx.x;
    uint4* const partials = reinterpret_cast<uint4*>(a.workspace + (gridDim.x * 4 + 15) / 16 * 16) +
                            (size_t)blockIdx.x * a.split * (VALUES / 4) * THREADS + thread;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n)
        partials[(z * (VALUES / 4) + r * BLOCKS + n) * THREADS] = {bits(sum[r][n][0]), bits(sum[r][n][1]),
                                                                  bits(sum[r][n][2]), bits(sum[r][n][3])};
    __threadfence();
    __syncthreads();
    __shared__ int order;
    if (thread == 0) order = atomicAdd(arrived, 1);
    __syncthreads();
    if (order != a.split - 1) return;
    __threadfence();
    if (thread == 0) *arrived = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][n][i] = 0;
        for (int other = 0; other < a.split; ++other) {
          uint4 v = __ldcg(&partials[(other * (VALUES / 4) + r * BLOCKS + n) * THREADS]);
          sum[r][n][0] += number<Sum>(v.x), sum[r][n][1] += number<Sum>(v.y);
          sum[r][n][2] += number<Sum>(v.z), sum[r][n][3] += number<Sum>(v.w);
        }
      }
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int local = (wn * ROWS + r) * 64 + quarter * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = n0 + local + 8 * h;
      const float ws = a.scale && n < a.N ? a.scale[n] : 1.f;
      const float bias = a.bias && n < a.N ? load16(a.bias, n, a.out) : 0.f;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int token = wt * TOKENS + b * 8 + lane % 4 * 2 + c, m = m0 + token;
          const float sx = a.sx && !SCALED_X && m < a.M ? a.sx[m] : 1.f;
          const int rowsum = a.rowsum && m < a.M ? a.rowsum[m] : 0;
          const float value = finish(sum[r][b][2 * h + c], ws, sx, rowsum, bias);
          reinterpret_cast<u16*>(memory + token * PITCH)[local + 8 * h] = a.out ? to_half(value) : to_bf16(value);
        }
    }
  }
  __syncthreads();
  for (int c = thread; c < BT * BLOCK_ROWS / 8; c += THREADS) {
    const int token = c / (BLOCK_ROWS / 8), m = m0 + token, n = n0 + c % (BLOCK_ROWS / 8) * 8;
    if (m >= a.M || n >= a.N) continue;
    const u8* from = memory + token * PITCH + (n - n0) * 2;
    u16* to = a.y + (size_t)m * a.N + n;
    if (a.N % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && n + e < a.N; ++e) to[e] = reinterpret_cast<const u16*>(from)[e];
    }
  }
  pdl_launch();
}

#define ENTRY(NAME, BT, ROWS, STAGES)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                             \
      NAME(const u8* x, const float* sx, const int* rowsum, const u8* w, const float* scale, const void* bias,     \
           u16* y, u8* workspace, int M, int N, int K, int ldx, int split, int out) {                              \
    gemm<BT, ROWS, STAGES>({x, sx, rowsum, w, scale, bias, y, workspace, M, N, K, ldx, split, out});               \
  }
ENTRY(t8, 8, 1, 5)
ENTRY(t16, 16, 1, 4)
ENTRY(t32, 32, 1, 4)
ENTRY(t64, 64, 1, 3)
#if ZQ_KIND == KIND_W8A8_INT8 || ZQ_KIND == KIND_W4A8_TWO || (ZQ_KIND == KIND_W4A8_GROUP && !ZQ_GROUP)
ENTRY(t128, 128, 2, 3)  // partial sums beside the sums would not fit the registers
#endif
