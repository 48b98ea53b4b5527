// y[M, N] = x[M, K] W[N, K]^T on Hopper, one kernel for every scheme (scheme.cuh) and every number of tokens.
//
// The operands are swapped: rows of W are the 64 rows of a wgmma and tokens its columns, so a tile of 8 tokens
// wastes nothing and weights go from shared memory through registers, where they are dequantized, into the
// tensor core. A block is one producer warpgroup and two consumer warpgroups of 64 ROWS weights each; for few
// tokens, where waiting is most of the work, there are two more, and the two pairs take turns at the stages. The
// producer fills a ring of stages of 128 k: packed weights by bulk copies, activations by tensor copies that
// swizzle and fill with zeros beyond M and K. Consumers hold two sets of A registers: one is dequantized while
// the tensor core reads the other.
//
// Clusters: with split = 1 the blocks of a cluster take neighbouring rows of W and the same tokens, and each
// fetches its share of x for all (multicast); blocks are persistent. With split > 1 the blocks of a cluster
// share one tile of y, each a range of K, and rank 0 adds their sums in the order of ranks. With split = 0 all
// blocks share the tiles evenly (share90.cuh).
//
// -DZQ_PLAIN=1 copies x, 2 the weights, 3 both with ordinary loads: slow, to find out which copy is wrong.
#include "output90.cuh"
#include "share90.cuh"
#include "wgmma.cuh"

#ifndef ZQ_PLAIN
#define ZQ_PLAIN 0
#endif

constexpr int WARPGROUPS = 2;  // that consume a stage
constexpr int FEW = PART_STEPS ? 32 : 64;  // tokens, up to which two pairs of them take turns
constexpr int FEWEST = 16;  // tokens, up to which two blocks share a multiprocessor instead
constexpr int PERIOD = PART_STEPS ? PART_STEPS : 1;
template <int I> struct Index { static constexpr int value = I; };

template <int BT, int ROWS> struct Shape {
  static constexpr int BLOCKS = BT <= FEWEST ? 2 : 1;  // of a multiprocessor
  static constexpr int TURNS = BT > FEWEST && BT <= FEW ? 2 : 1;
  static constexpr int THREADS = 128 * (WARPGROUPS * TURNS + 1);
  static constexpr int TILES = WARPGROUPS * ROWS;  // of 64 rows
  static constexpr u32 X = BT * 128 * ACT;         // bytes of a stage
  static constexpr u32 W = TILES * TILE_BYTES;
  static constexpr u32 SA = SCALED_STEPS ? BT * 4 : 0;
  // Of each warpgroup: what its epilogue needs. In the first, sums are transposed, and exchanged in a split.
  static constexpr u32 TURN = (BT < 64 ? BT : 64) * PITCH;
  static constexpr u32 EXCHANGE = BT <= 64 ? 64 * ROWS * BT * 4 : 0;
  static constexpr u32 AREA = TURN > EXCHANGE ? TURN : EXCHANGE;
  static constexpr u32 EXTRA = WARPGROUPS * (AREA + sizeof(Terms<BT, ROWS>));
};

template <int BT, int ROWS> __device__ __forceinline__ void gemm(const Map* map, const Args a) {
  using S = Shape<BT, ROWS>;
  extern __shared__ __align__(1024) u8 memory[];
  // Each pair always takes the same stages: a barrier cannot tell a phase from the last but one.
  const int stages = (dynamic_shared_bytes() - S::EXTRA) / (S::X + S::W + S::SA + 16) / S::TURNS * S::TURNS;
  u8* const w_ring = memory + stages * S::X;
  u8* const extra = w_ring + stages * S::W;
  float* const sa_ring = reinterpret_cast<float*>(extra + S::EXTRA);
  const u32 x_ring = shared_address(memory);
  const u32 full = shared_address(sa_ring) + stages * S::SA, empty = full + 8 * stages;

  const int thread = threadIdx.x, warpgroup = thread >> 7, t = thread & 127, lane = thread & 31;
  const u32 blocks = cluster_size(), rank = blocks > 1 ? cluster_rank() : 0;
  const bool split = a.split > 1, evenly = a.split == 0;
  const u32 sharing = split ? 1 : blocks, place = split ? 0 : rank;  // blocks that read the same x, and which this is
  if (thread == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(full + 8 * i, 1 + (S::SA ? 1 : 0));
      barrier_init(empty + 8 * i, 4 * WARPGROUPS * sharing);
    }
    barrier_init_visible();
  }
  __syncthreads();
  if (blocks > 1) cluster_sync();

  const int steps = (a.K + 127) / 128;
  const int first = split ? steps * rank / blocks : 0, last = split ? steps * (rank + 1) / blocks : steps;
  const int tiles64 = (a.N + 127) / 128 * 2, tiles_m = (a.M + BT - 1) / BT;
  const int blocks_n = (tiles64 + S::TILES - 1) / S::TILES, groups_n = (blocks_n + sharing - 1) / sharing;
  const Share share(tiles_m * groups_n, steps, gridDim.x / blocks, blockIdx.x / blocks, first, last, evenly);
  int s = 0;
  u32 phase = 0;
  auto advance = [&](int by = 1) {
    if ((s += by) >= stages) s -= stages, phase ^= 1;
  };

  if (warpgroup == 0) {
    if constexpr (S::TURNS == 1 && S::BLOCKS == 1) give_registers<40>();
    if constexpr (S::BLOCKS == 2) give_registers<32>();
    if constexpr (S::TURNS == 2) give_registers<32>();
    const u64 w_policy = tiles_m == 1 ? stream_policy() : usual_policy();
    auto copy_w = [&](int n, int kt) {
#pragma unroll
      for (int i = 0; i < S::TILES / 2; ++i) {
        const int pair = min((int)(n * sharing + place) * S::TILES / 2 + i, tiles64 / 2 - 1);
        const u8* from = a.w + ((size_t)pair * steps + kt) * 2 * TILE_BYTES;
        const u32 to = s * S::W + i * 2 * TILE_BYTES;
#if ZQ_PLAIN & 2
        for (int c = t; c < 2 * TILE_BYTES / 16; c += 128)
          reinterpret_cast<uint4*>(w_ring + to)[c] = reinterpret_cast<const uint4*>(from)[c];
#else
        bulk_copy(shared_address(w_ring) + to, from, 2 * TILE_BYTES, full + 8 * s, w_policy);
#endif
      }
    };
#if ZQ_PLAIN
    pdl_wait();
    for (int i = 0; i < share.count; ++i) {
      const Segment segment = share[i];
      Tile tile = tile_of<BT>(segment.work, tiles_m, groups_n);
      for (int kt = segment.first; kt < segment.last; ++kt, advance()) {
        barrier_wait(empty + 8 * s, phase ^ 1);
#if ZQ_PLAIN & 1
        for (int c = t; c < BT * 8 * HALVES; c += 128) {
          int half = c / (BT * 8), row = c % (BT * 8) / 8, chunk = c % 8, m = tile.m * BT + row;
          int byte = kt * 128 * ACT + half * 128 + chunk * 16;
          uint4 v = {0, 0, 0, 0};
          if (m < a.M && byte < a.K * ACT) v = *reinterpret_cast<const uint4*>(a.x + (size_t)m * a.ldx * ACT + byte);
          *reinterpret_cast<uint4*>(memory + s * S::X + half * BT * 128 + row * 128 + (chunk ^ row % 8) * 16) = v;
        }
        proxy_fence();
#endif
#if ZQ_PLAIN & 2
        copy_w(tile.n, kt);
#endif
        if (S::SA)
          for (int i = t; i < BT; i += 128) {
            int m = tile.m * BT + i;
            sa_ring[s * BT + i] = m < a.M ? a.sx[(size_t)m * steps + kt] : 0.f;
          }
        named_barrier(8, 128);
        if (t == 0) {
          barrier_arrive_expect(full + 8 * s, (ZQ_PLAIN & 1 ? 0 : S::X) + (ZQ_PLAIN & 2 ? 0 : S::W));
#if !(ZQ_PLAIN & 2)
          copy_w(tile.n, kt);
#endif
#if !(ZQ_PLAIN & 1)
          for (int h = 0; h < HALVES; ++h)
            tensor_copy(x_ring + s * S::X + h * BT * 128 + place * (BT / sharing) * 128, map,
                        kt * 128 + h * 64, tile.m * BT + place * (BT / sharing), full + 8 * s, keep_policy(),
                        (1 << sharing) - 1);
#endif
          if (S::SA) barrier_arrive(full + 8 * s);
        }
      }
    }
#else
    if (thread == 0) {
      // Weights do not depend on the kernel before this one; x does.
      int early = 0;
      if (share.count) {
        const Segment segment = share[0];
        const Tile tile = tile_of<BT>(segment.work, tiles_m, groups_n);
        for (; early < min(stages, segment.last - segment.first); ++early, advance()) {
          barrier_arrive_expect(full + 8 * s, S::X + S::W);
          copy_w(tile.n, segment.first + early);
        }
      }
      pdl_launch();
      pdl_wait();
      s = 0, phase = 0;
      const u64 x_policy = keep_policy();
      const u32 slice = place * (BT / sharing);
      int done = 0;
      for (int i = 0; i < share.count; ++i) {
        const Segment segment = share[i];
        const Tile tile = tile_of<BT>(segment.work, tiles_m, groups_n);
        for (int kt = segment.first; kt < segment.last; ++kt, ++done, advance()) {
          if (done >= early) {
            barrier_wait(empty + 8 * s, phase ^ 1);
            barrier_arrive_expect(full + 8 * s, S::X + S::W);
            copy_w(tile.n, kt);
          }
#pragma unroll 1
          for (int h = 0; h < HALVES; ++h)
            tensor_copy(x_ring + s * S::X + h * BT * 128 + slice * 128, map, kt * 128 + h * 64, tile.m * BT + slice,
                        full + 8 * s, x_policy, (1 << sharing) - 1);
        }
      }
    }
    if (S::SA && (thread >> 5) == 1) {  // scales of x change with k: a second warp fetches them
      pdl_wait();
      for (int i = 0; i < share.count; ++i) {
        const Segment segment = share[i];
        const Tile tile = tile_of<BT>(segment.work, tiles_m, groups_n);
        float ahead[(BT + 31) / 32];
        auto fetch = [&](int kt) {
#pragma unroll
          for (int i = 0; i < (BT + 31) / 32; ++i) {
            int token = i * 32 + lane, m = tile.m * BT + token;
            ahead[i] = token < BT && m < a.M && kt < segment.last ? a.sx[(size_t)m * steps + kt] : 0.f;
          }
        };
        fetch(segment.first);
        for (int kt = segment.first; kt < segment.last; ++kt, advance()) {
          barrier_wait(empty + 8 * s, phase ^ 1);
#pragma unroll
          for (int i = 0; i < (BT + 31) / 32; ++i)
            if (i * 32 + lane < BT) sa_ring[s * BT + i * 32 + lane] = ahead[i];
          __syncwarp();
          if (lane == 0) barrier_arrive(full + 8 * s);
          fetch(kt + 1);
        }
      }
    }
#endif
    if (split) cluster_sync();
  } else {
    if constexpr (S::TURNS == 1 && S::BLOCKS == 1) take_registers<232>();
    if constexpr (S::BLOCKS == 2) take_registers<104>();
    if constexpr (S::TURNS == 2) take_registers<112>();
    // Written so that the ring's index lies in uniform registers where it can, which takes fewer instructions.
    const int turn = S::TURNS == 1 ? 0 : (warpgroup - 1) / WARPGROUPS;
    const int group = warpgroup - 1 - turn * WARPGROUPS;
    u8* const area = extra + group * S::AREA;
    auto& terms = reinterpret_cast<Terms<BT, ROWS>*>(extra + WARPGROUPS * S::AREA)[group];
    Sum sum[ROWS][BT / 2];
    Fragment f[2];
    auto release = [&](int slot) {  // by a warp that has read it
      __syncwarp();
      if (sharing == 1) {
        if (lane == 0) barrier_arrive(empty + 8 * slot);
      } else if (lane < sharing) {
        barrier_arrive_at(empty + 8 * slot, lane);
      }
    };
    // Codes are read ahead of their conversion, while the tensor core is busy. Not those of eight bits, which are
    // operands as they are (in registers of their own they would make the compiler serialize the products), nor
    // with partial sums, which wait for the tensor core anyway and take the registers.
    constexpr bool AHEAD = (FOUR || WIDE) && PART_STEPS == 0;
    Words words;
    const u8* tile64;
    auto load_ahead = [&](int i) {  // the i-th fragment of a stage
      tile64 = w_ring + s * S::W + (group * ROWS + i / HALVES) * TILE_BYTES;
      if (AHEAD) load(tile64, t, i % HALVES, words);
    };
    auto make = [&](Fragment& fragment) {
      if (!AHEAD) load(tile64, t, 0, words);
      convert(words, fragment);
    };
    auto load_stage = [&] {
      barrier_wait(full + 8 * s, phase);
      load_ahead(0);
    };

    // While the sums of one warpgroup leave the tensor core, it works for the other: they take turns, or else they
    // would compute together and wait together.
    constexpr bool ALTERNATE = PART_STEPS == 1 && S::TURNS == 1 && S::BLOCKS == 1;
    if (ALTERNATE && group == 1) named_arrive(5, 256);

    pdl_wait();
    s = turn;
    int taken = 0;  // stages by all
    for (int i = 0; i < share.count; ++i) {
      const Segment segment = share[i];
      const bool ends = segment.last == last;  // else another block ends the tile
      const int skipped = (taken ^ turn) & (S::TURNS - 1);
      const int count = (segment.last - segment.first - skipped + S::TURNS - 1) / S::TURNS;  // steps of this warpgroup
      taken += segment.last - segment.first;
      const Tile tile = tile_of<BT>(segment.work, tiles_m, groups_n);
      const int m0 = tile.m * BT, n0 = ((int)(tile.n * sharing + place) * S::TILES + group * ROWS) * 64;
      if (turn == 0 && ends) ask_terms(a, terms, m0, n0, t);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < BT / 2; ++i) sum[r][i] = 0;

      if (count) load_stage();
      if constexpr (PART_STEPS == 0) {
        constexpr int FRAGMENTS = ROWS * HALVES;
        int before = -1;  // the stage that the tensor core may still be reading
        auto step = [&](auto set, bool more) {
          const int slot = s;
#pragma unroll
          for (int i = 0; i < FRAGMENTS; ++i) {
            Fragment& now = f[(set.value + i) & 1];
            make(now);
            wgmma_fence(now);
            const u64 x = descriptor(x_ring + slot * S::X + i % HALVES * BT * 128);
#pragma unroll
            for (int j = 0; j < 4; ++j) wgmma<BT>(sum[i / HALVES], now.a + 4 * j, x + 2 * j, 1);
            wgmma_commit();
            if (i + 1 < FRAGMENTS) load_ahead(i + 1);
            if (i + 1 == FRAGMENTS) {
              advance(S::TURNS);
              if (more) load_stage();
            }
            wgmma_wait<1>();
            if (i == 0 && before >= 0) release(before);
          }
          before = slot;
        };
        int i = 0;
        for (; i + 1 < count; i += 2) step(Index<0>{}, true), step(Index<FRAGMENTS & 1>{}, i + 2 < count);
        if (i < count) step(Index<0>{}, false);
        wgmma_wait<0>();
        if (before >= 0) release(before);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) settled(sum[r]);
      } else if constexpr (PERIOD > 1) {
        Acc part[BT / 2];
        int before = -1, i = 0;
        auto issue = [&](Fragment& now, bool first, bool more) {  // returns the stage that it reads
          const int slot = s;
          make(now);
          wgmma_fence(now);
          const u64 x = descriptor(x_ring + slot * S::X);
#pragma unroll
          for (int j = 0; j < 4; ++j) wgmma<BT>(part, now.a + 4 * j, x + 2 * j, j > 0 || !first);
          wgmma_commit();
          advance(S::TURNS);
          if (more) load_stage();
          return slot;
        };
        auto leave = [&] {
          settled(part);
#pragma unroll
          for (int j = 0; j < BT / 2; ++j) sum[0][j] += part[j];
        };
        for (; i + PERIOD <= count; i += PERIOD) {
#pragma unroll
          for (int p = 0; p < PERIOD; ++p) {
            const int slot = issue(f[p & 1], p == 0, i + p + 1 < count);
            if (p < PERIOD - 1) wgmma_wait<1>();
            if (p == PERIOD - 1) wgmma_wait<0>();
            if (p > 0) release(before);
            before = slot;
          }
          release(before);
          leave();
        }
        if (i < count) {
          for (bool first = true; i < count; ++i, first = false) {
            const int slot = issue(f[0], first, i + 1 < count);
            wgmma_wait<0>();
            release(slot);
          }
          leave();
        }
      } else {
        static_assert(ROWS == 1 && HALVES == 1, "parts take registers");
        Acc part[BT / 2];
        if (count) make(f[0]);
        auto step = [&](auto set, int i) {
          Fragment &now = f[set.value], &next = f[set.value ^ 1];
          const int slot = s;
          const u64 x = descriptor(x_ring + slot * S::X);
#pragma unroll
          for (int p = 0; p < PARTS; ++p) {
            if (ALTERNATE) named_barrier(5 + group, 256);
            wgmma_fence(now);
#pragma unroll
            for (int j = p * 4 / PARTS; j < (p + 1) * 4 / PARTS; ++j)
              wgmma<BT>(part, now.a + 4 * j, x + 2 * j, j > p * 4 / PARTS);
            wgmma_commit();
            if (ALTERNATE) named_arrive(6 - group, 256);
            if (p == 0) advance(S::TURNS);
            // In a branch, even where there is always a next step: or the compiler would convert behind the wait.
            if (p == 0 && i + 1 < unknown(count)) load_stage(), make(next), computed(next);
            wgmma_wait<0>();
            settled(part);
#pragma unroll
            for (int j = 0; j < BT / 8; ++j) {
              float2 by = {1.f, 1.f};
              if (S::SA) by = reinterpret_cast<const float2*>(sa_ring + slot * BT)[4 * j + lane % 4];
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float scale = now.scale[2 * p + (e >> 1)] * (e & 1 ? by.y : by.x);
                sum[0][4 * j + e] = fmaf((float)part[4 * j + e], scale, sum[0][4 * j + e]);
              }
            }
            computed(sum[0]);
          }
          release(slot);  // behind the sums: its branch keeps the compiler from moving them behind the next turn
        };
        int i = 0;
        for (; i + 1 < count; i += 2) step(Index<0>{}, i), step(Index<1>{}, i + 1);
        if (i < count) step(Index<0>{}, i);
      }

      uint4* const handed = reinterpret_cast<uint4*>(area) + t;
      if constexpr (S::TURNS == 2) {
        named_barrier(3 + group, 256);  // the last tile has been written
        if (turn == 1) put(sum, handed);
        named_barrier(3 + group, 256);
        if (turn == 0) add(sum, [&](int i) { return handed[i]; });
      }
      if (split) {
        if (S::EXCHANGE && rank > 0 && turn == 0) put(sum, handed);
        cluster_sync();
        if constexpr (S::EXCHANGE) {
          if (rank == 0 && turn == 0)
            for (u32 other = 1; other < blocks; ++other)
              add(sum, [&](int i) { return load_from(shared_address(handed + i), other); });
        }
        if (rank > 0) break;
      }
      if (turn > 0) continue;
      if (evenly) {
        const Workspace<ROWS, BT / 2> workspace(a.workspace, gridDim.x, group, t);
        if (!ends) {
          workspace.leave(sum, share.place, 1 + group);
          continue;
        }
        if (segment.first > 0) workspace.take(sum, share.beginner(segment.work), share.place, 1 + group);
      }
      write_tile(a, sum, terms, area, m0, n0, t, 1 + group);
    }
    if (ALTERNATE && group == 0) named_barrier(5, 256);  // the last turn that was given
  }
  if (blocks > 1) cluster_sync();  // no block may leave while another reads or writes its shared memory
}

#define ENTRY(NAME, BT, ROWS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(Shape<BT, ROWS>::THREADS, Shape<BT, ROWS>::BLOCKS)                                                \
      NAME(const __grid_constant__ Map map, const u8* x, const float* sx, const int* rowsum, const u8* w,       \
           const float* scale, const void* bias, u16* y, u8* workspace, int M, int N, int K, int ldx, int split, \
           int out) {                                                                                           \
    gemm<BT, ROWS>(&map, {x, sx, rowsum, w, scale, bias, y, workspace, M, N, K, ldx, split, out});              \
  }
ENTRY(t8, 8, 1)
ENTRY(t16, 16, 1)
ENTRY(t32, 32, 1)
ENTRY(t64, 64, 1)
ENTRY(t128, 128, 1)
#if ZQ_KIND == KIND_W8A8_INT8 || ZQ_KIND == KIND_W4A8_TWO || (ZQ_KIND == KIND_W4A8_GROUP && !ZQ_GROUP)
ENTRY(t256, 256, 1)
ENTRY(t128x2, 128, 2)
#elif ZQ_KIND == KIND_W4A16 || ZQ_KIND == KIND_W8A16
ENTRY(t128x2, 128, 2)
#endif
