// A GPU in one thread: every CUDA thread is a fiber, warps and blocks meet where the instructions say, and copies of
// the copy engine land whenever the scheduler likes. Stands for common.cuh, ptx90.cuh, wgmma.cuh and mma.cuh, so that
// scheme.cuh and the kernels run as they are. Semantics from the PTX ISA 9.0.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

using std::max;
using std::min;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct float2 { float x, y; };
struct int2 { int x, y; };
struct Dim { int x = 0, y = 0, z = 0; };

struct Meeting { int arrived = 0, turn = 0; };
struct Barrier { int count = 0, pending = 0, phase = 0; long bytes = 0; };
struct Lane { u32 a[4], b[2], address; };
struct Block {
  std::vector<u8> storage;
  u8* shared;
  Dim index;
  u32 rank;
  Block* first;  // of its cluster
  int order = 0;
  Meeting cluster, all, warps[32], groups[8], named[16];
  std::map<u32, Barrier> barriers;
  std::vector<Lane> lanes;
};
struct Fiber {
  ucontext_t context;
  std::vector<u8> stack;
  Block* block;
  Dim index;
  std::vector<std::function<void()>> asked;
  bool done = false;
};
static Fiber* current;
static ucontext_t scheduler;
static std::vector<std::unique_ptr<Block>> running;  // blocks of one cluster or of several, side by side
static int cluster_blocks;
static std::vector<std::function<void()>> flying;
static long progress;
static int threads_of_block, dynamic_bytes;
static Dim gridDim;
static u32 seed = 1;
static u32 randomly() { return seed = seed * 1664525u + 1013904223u, seed >> 8; }
#define threadIdx (current->index)
#define blockIdx (current->block->index)

static void pause_fiber() { swapcontext(&current->context, &scheduler); }
static void meet(Meeting& m, int count) {
  int turn = m.turn;
  if (++m.arrived == count) m.arrived = 0, ++m.turn, ++progress;
  else
    while (m.turn == turn) pause_fiber();
}
static void __syncthreads() { meet(current->block->all, threads_of_block); }
static void __syncwarp() { meet(current->block->warps[threadIdx.x / 32], 32); }
static void warpgroup_sync() { meet(current->block->groups[threadIdx.x / 128], 128); }
static void named_barrier(int id, int count) { meet(current->block->named[id], count); }
static void named_arrive(int id, int count) {
  Meeting& m = current->block->named[id];
  if (++m.arrived == count) m.arrived = 0, ++m.turn, ++progress;
}
static void cluster_sync() { meet(current->block->first->cluster, threads_of_block * cluster_blocks); }
static void __threadfence() {}
static int atomicAdd(int* p, int v) { int was = *p; *p += v; return was; }
template <class T> T __ldcg(const T* p) { return *p; }
static u32 cluster_rank() { return current->block->rank; }
static u32 cluster_size() { return cluster_blocks; }
static Block* peer(u32 rank) {
  for (auto& block : running)
    if (block->first == current->block->first && block->rank == rank) return block.get();
  abort();
}
static void raise_flag(int* flag) { *flag = 1, ++progress; }
static void lower_flag(int* flag) {
  while (!*flag) pause_fiber();
  *flag = 0;
}
static u32 dynamic_shared_bytes() { return dynamic_bytes; }
static void pdl_wait() {}
static void pdl_launch() {}
static void barrier_init_visible() {}
static void proxy_fence() {}
template <int N> void give_registers() {}
template <int N> void take_registers() {}
static u64 keep_policy() { return 0; }
static u64 usual_policy() { return 0; }
static u64 stream_policy() { return 0; }
static u8* at(Block* b, u32 address, u32 bytes) {
  if (address + bytes > (u32)dynamic_bytes) fprintf(stderr, "shared address %u beyond %d\n", address, dynamic_bytes), abort();
  return b->shared + address;
}
static u64 __cvta_generic_to_shared(const void* p) { return (const u8*)p - current->block->shared; }
static u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

static float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static u32 __funnelshift_r(u32 low, u32 high, int by) { return ((u64)high << 32 | low) >> by; }
static u32 __byte_perm(u32 a, u32 b, u32 pick) {
  u64 both = (u64)b << 32 | a;
  u32 v = 0;
  for (int i = 0; i < 4; ++i) v |= (u32)(both >> (8 * (pick >> (4 * i) & 7)) & 255) << (8 * i);
  return v;
}
static float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
static float from_half(u16 v) {
  int e = v >> 10 & 31, m = v & 1023;
  float x = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
  return v & 0x8000 ? -x : x;
}
static double from_e4m3(u8 v) {
  int e = v >> 3 & 15, m = v & 7;
  if ((v & 127) == 127) return NAN;
  double x = e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9);
  return v & 128 ? -x : x;
}
static u16 narrow(double x, int digits, int least, int bias) {  // to `digits` significant bits, nearest even
  u16 sign = std::signbit(x) ? 0x8000 : 0;
  if (x == 0) return sign;
  int e;
  std::frexp(x, &e);
  int unit = std::max(e - digits, least);
  double a = std::fabs(std::nearbyint(std::ldexp(x, -unit)));  // in units
  if (a >= std::ldexp(1, digits)) a /= 2, ++unit;
  if (a < std::ldexp(1, digits - 1)) return sign | (u16)a;
  return sign | (u16)((unit + digits - 1 + bias) << (digits - 1)) | ((u16)a & ((1 << (digits - 1)) - 1));
}
static u16 to_bf16(float x) { return narrow(x, 8, -133, 127); }
static u16 to_half(float x) { return narrow(x, 11, -24, 15); }
static u32 fma2(u32 a, u32 b, u32 c) {  // double is exact before the one rounding
#define WIDEN(v) (double)(ZQ_HALF ? from_half(v) : from_bf16(v))
#define ONCE(s) \
  (ZQ_HALF ? narrow(WIDEN((a >> s) & 65535) * WIDEN((b >> s) & 65535) + WIDEN((c >> s) & 65535), 11, -24, 15) \
           : narrow(WIDEN((a >> s) & 65535) * WIDEN((b >> s) & 65535) + WIDEN((c >> s) & 65535), 8, -133, 127))
  return ONCE(0) | (u32)ONCE(16) << 16;
}

static u32 select(u32 v, u32 mask, u32 rest) { return (v & mask) | rest; }

// mbarrier
static void settle(Barrier& b) {
  ++progress;
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.count;
}
static void barrier_init(u32 bar, u32 count) { current->block->barriers[bar] = {(int)count, (int)count, 0, 0}; }
static void arrive(Block* at, u32 bar, long bytes) {
  Barrier& b = at->barriers.at(bar);
  if (--b.pending < 0) fprintf(stderr, "too many arrivals\n"), abort();
  b.bytes += bytes;
  settle(b);
}
static void barrier_arrive(u32 bar) { arrive(current->block, bar, 0); }
static void barrier_arrive_expect(u32 bar, u32 bytes) { arrive(current->block, bar, bytes); }
static void barrier_arrive_at(u32 bar, u32 rank) { arrive(peer(rank), bar, 0); }
static void barrier_wait(u32 bar, u32 parity) {
  while (current->block->barriers.at(bar).phase == (int)parity) pause_fiber();
}
static void landed(Block* b, u32 bar, long bytes) {
  b->barriers.at(bar).bytes -= bytes;
  settle(b->barriers.at(bar));
}

// The copy engine
struct Map { const u8* base; long rows, row_bytes, pitch, box; long rest[11]; };
static void bulk_copy(u32 dst, const void* src, u32 bytes, u32 bar, u64) {
  if (dst % 16 || (uintptr_t)src % 16 || bytes % 16) fprintf(stderr, "bulk copy is not aligned\n"), abort();
  Block* b = current->block;
  flying.push_back([=] { memcpy(at(b, dst, bytes), src, bytes), landed(b, bar, bytes); });
}
static void tensor_copy(u32 dst, const Map* map, int x, int y, u32 bar, u64, u16 mask) {
  const Map m = *map;
  const int width = HALF_WIDTH;
  for (u32 rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block* b = mask == 1 ? current->block : peer(rank);
    flying.push_back([=] {
      for (long i = 0; i < m.box; ++i)
        for (long byte = 0; byte < 128; ++byte) {
          long row = y + i, from = (long)x * width + byte;
          u32 address = dst + i * 128 + byte;
          address ^= (address >> 7 & 7) << 4;
          *at(b, address, 1) = row < m.rows && from < m.row_bytes ? m.base[row * m.pitch + from] : 0;
        }
      landed(b, bar, m.box * 128);
    });
  }
}
static uint4 load_from(u32 address, u32 rank) {
  uint4 v;
  memcpy(&v, at(peer(rank), address, 16), 16);
  return v;
}
static void copy16(u32 to, const void* from, bool inside) {
  if (to % 16 || (inside && (uintptr_t)from % 16)) fprintf(stderr, "copy is not aligned\n"), abort();
  if (inside) memcpy(at(current->block, to, 16), from, 16);
  else memset(at(current->block, to, 16), 0, 16);
}
static void copy4(u32 to, const void* from, int bytes) {
  if (to % 4 || (uintptr_t)from % 4) fprintf(stderr, "copy is not aligned\n"), abort();
  Block* b = current->block;
  current->asked.push_back([=] { memset(at(b, to, 4), 0, 4), memcpy(at(b, to, 4), from, bytes); });
}
static void copies_wait_all() {  // no copy is there before the wait
  for (auto& copy : current->asked) copy();
  current->asked.clear();
}
static void copies_commit() {}
template <int N> void copies_wait() { copies_wait_all(); }

#include "scheme.cuh"

// Operands: element k of 32 bytes in registers or in memory
static double element(const u8* bytes, int k, bool is_a) {
  if (WIDE) {
    u16 v;
    memcpy(&v, bytes + 2 * k, 2);
    return ZQ_HALF ? from_half(v) : from_bf16(v);
  }
  if (FP8) return from_e4m3(bytes[k]);
  return is_a && ZQ_KIND == KIND_W4A8_TWO ? (double)bytes[k] : (double)(int8_t)bytes[k];
}
// 32 bytes of row `row` (0 .. 15) of A, from the registers of the four lanes of its warp that hold it.
static void row_of_a(const Lane* warp, int row, u8* out) {
  for (int byte = 0; byte < 32; ++byte) {
    const Lane& lane = warp[row % 8 * 4 + byte % 16 / 4];
    out[byte] = lane.a[(row >= 8) + 2 * (byte >= 16)] >> (8 * (byte % 4));
  }
}
static Lane* my_warp() { return current->block->lanes.data() + threadIdx.x / 32 * 32; }

static void load_matrices(u32 (&b)[4], u32 address) {
  int lane = threadIdx.x % 32;
  my_warp()[lane].address = address;
  __syncwarp();
  for (int i = 0; i < 4; ++i) memcpy(&b[i], at(current->block, my_warp()[8 * i + lane / 4].address, 16) + lane % 4 * 4, 4);
  __syncwarp();
}
static void store_transposed(u32 address, u32 first, u32 second) {
  int lane = threadIdx.x % 32;
  my_warp()[lane].address = address;
  __syncwarp();
  for (int i = 0; i < 2; ++i)
    for (int e = 0; e < 2; ++e) {
      u16 v = (i ? second : first) >> (16 * e);
      memcpy(at(current->block, my_warp()[8 * i + 2 * (lane % 4) + e].address, 16) + lane / 4 * 2, &v, 2);
    }
  __syncwarp();
}
static void mma(Acc (&d)[4], const u32* a, u32 b0, u32 b1) {
  int lane = threadIdx.x % 32;
  memcpy(my_warp()[lane].a, a, 16);
  my_warp()[lane].b[0] = b0, my_warp()[lane].b[1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    u8 row[32], column[32];
    row_of_a(my_warp(), lane / 4 + 8 * (i / 2), row);
    for (int byte = 0; byte < 32; ++byte)  // B: column n in lanes 4 n .. 4 n + 3
      column[byte] = my_warp()[(2 * (lane % 4) + i % 2) * 4 + byte % 16 / 4].b[byte / 16] >> (8 * (byte % 4));
    double sum = d[i];
    for (int k = 0; k < 32 / ACT; ++k) sum += element(row, k, true) * element(column, k, false);
    d[i] = (Acc)sum;
  }
  __syncwarp();
}
static u64 descriptor(u32 address) { return (u64)((address & 0x3FFFF) >> 4); }
static void wgmma_fence(Fragment&) {}
template <class T> void computed(T&) {}
static int unknown(int x) { return x; }
static void wgmma_commit() {}
template <int N> void wgmma_wait() {}
template <int N, class T> void settled(T (&)[N]) {}
template <int N> void wgmma(Acc (&d)[N / 2], const u32* a, u64 b, int more) {
  int lane = threadIdx.x % 32;
  memcpy(my_warp()[lane].a, a, 16);
  warpgroup_sync();
  u8 rows[2][32];
  for (int h = 0; h < 2; ++h) row_of_a(my_warp(), lane / 4 + 8 * h, rows[h]);
  for (int i = 0; i < N / 2; ++i) {
    int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    u8 column[32];
    for (int byte = 0; byte < 32; ++byte) {
      u32 address = (u32)b * 16 + token * 128 + byte;
      column[byte] = *at(current->block, address ^ (address >> 7 & 7) << 4, 1);
    }
    double sum = more ? (double)d[i] : 0;
    for (int k = 0; k < 32 / ACT; ++k) sum += element(rows[i / 2 % 2], k, true) * element(column, k, false);
    d[i] = (Acc)sum;
  }
  warpgroup_sync();
}

// The launch
static std::function<void()> kernel;
static void trampoline() {
  kernel();
  current->done = true, ++progress;
  pause_fiber();
}
// Clusters of `size` blocks, one after the other, or all together, the last ones first.
static int run(Dim grid, int size, int together, int threads, int shared, u32 random) {
  seed = random, gridDim = grid, threads_of_block = threads, dynamic_bytes = shared, cluster_blocks = size;
  const int wave = together ? grid.x : size;
  for (int z = 0; z < grid.z; ++z)
    for (int first = 0; first < grid.x; first += wave) {
      running.clear(), flying.clear();
      std::vector<std::unique_ptr<Fiber>> fibers;
      for (int i = wave - 1; i >= 0; --i) {
        running.push_back(std::make_unique<Block>());
        Block* b = running.back().get();
        b->storage.assign(shared + 1024, 0xFF);
        b->shared = (u8*)(((uintptr_t)b->storage.data() + 1023) / 1024 * 1024);
        b->index = {first + i, 0, z}, b->rank = i % size;
        b->lanes.resize(threads);
        for (int t = 0; t < threads; ++t) {
          fibers.push_back(std::make_unique<Fiber>());
          Fiber* f = fibers.back().get();
          f->stack.resize(1 << 16), f->block = b, f->index = {t, 0, 0};
          getcontext(&f->context);
          f->context.uc_stack.ss_sp = f->stack.data(), f->context.uc_stack.ss_size = f->stack.size();
          makecontext(&f->context, trampoline, 0);
        }
      }
      for (auto& b : running)
        for (auto& other : running)
          if (other->index.x == b->index.x / size * size) b->first = other.get();
      size_t alive = fibers.size();
      for (int idle = 0; alive;) {
        long before = progress;
        if (!flying.empty() && randomly() % 2) {
          size_t i = randomly() % flying.size();
          auto copy = flying[i];
          flying.erase(flying.begin() + i), copy();
        }
        for (auto& f : fibers)
          if (!f->done) {
            current = f.get();
            swapcontext(&scheduler, &current->context);
            alive -= f->done;
          }
        idle = progress == before && flying.empty() ? idle + 1 : 0;
        if (idle > 10) return 1;  // everyone waits
      }
      if (!flying.empty()) return 2;
    }
  return 0;
}
