// In place of zq/kernels/src/common.cuh: enough of CUDA to run quant.cu, optim.cu, attention.cu and store_kv.cu on a CPU,
// one block at a time.
//
// A thread of the block is a fiber (switched by _longjmp, which asks the system nothing); fibers take turns, one turn up
// to the next shuffle or barrier. The threads of a warp meet the same shuffles, so after a turn of everyone every value
// is there. Two buffers, used in turn, keep a fast thread from overwriting what a slow one still reads.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using std::max;
using std::min;

struct Index {
  int x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

struct Fiber {
  std::vector<char> stack = std::vector<char>(1 << 16);
  ucontext_t context;
  jmp_buf place;
  int turn = 0, cluster_turn = -1;
  bool begun = false, ended = false;
  std::vector<std::function<void()>> asked;  // copies that are on their way
};
static std::deque<Fiber> fibers;  // of a block, or of the blocks of a cluster one after the other
static int cluster_blocks, rank_of_block;
static Fiber &fiber() { return fibers[rank_of_block * blockDim.x + threadIdx.x]; }
static jmp_buf scheduler;
struct Exchange {
  u32 words[6];
};
static Exchange exchanged[2][8][1024];

static void let_others() {
  if (!_setjmp(fiber().place)) _longjmp(scheduler, 1);
}
static int next_turn() {
  const int turn = fiber().turn++;
  let_others();
  return turn;
}
static void __syncwarp() { next_turn(); }
struct Barrier {
  int arrived = 0, turn = 0;
  int arrive(int threads) {
    const int turn_now = turn;
    if (++arrived == threads) arrived = 0, ++turn;
    return turn_now;
  }
  void wait(int turn_then) const {
    while (turn == turn_then) let_others();
  }
};
static Barrier of_blocks[8], of_cluster;
static void __syncthreads() {
  Barrier &barrier = of_blocks[rank_of_block];
  barrier.wait(barrier.arrive(blockDim.x));
}
static u32 cluster_rank() { return rank_of_block; }
static u32 cluster_size() { return cluster_blocks; }
static void cluster_arrive() {
  if (fiber().cluster_turn >= 0) abort();  // twice without a wait
  fiber().cluster_turn = of_cluster.arrive(blockDim.x * cluster_blocks);
}
static void cluster_wait() {
  if (fiber().cluster_turn < 0) abort();
  of_cluster.wait(fiber().cluster_turn);
  fiber().cluster_turn = -1;
}
static uint4 words_of_blocks[8][(2048 + 229376) / 16];  // what is dynamic lies behind the first
static u32 *word_of(u32 address, int rank = rank_of_block) { return &words_of_blocks[rank]->x + address / 4; }
static u32 shared_words() { return 0; }
static uint4 load_shared(u32 from) { return *(const uint4 *)word_of(from); }
static void store_shared(u32 to, u32 value, bool if_true) {
  if (if_true) *word_of(to) = value;
}
static void store_remote(u32 to, u32 rank, u32 value) { *word_of(to, rank) = value; }
// What every thread of the block gave; the caller reads those of its own warp.
template <class A> const Exchange *exchange(const A &value) {
  static_assert(sizeof value <= sizeof(Exchange));
  std::memcpy(&exchanged[fiber().turn % 2][rank_of_block][threadIdx.x], &value, sizeof value);
  const int turn = next_turn();
  return exchanged[turn % 2][rank_of_block];
}
template <class A> A taken(const Exchange *all, int thread) {
  A value;
  std::memcpy(&value, &all[thread], sizeof value);
  return value;
}
template <class A> A __shfl_xor_sync(u32, A value, int step) { return taken<A>(exchange(value), threadIdx.x ^ step); }
static u32 __reduce_max_sync(u32, u32 value) {
  const Exchange *all = exchange(value);
  for (int lane = 0; lane < 32; ++lane) value = std::max(value, taken<u32>(all, threadIdx.x / 32 * 32 + lane));
  return value;
}
static int __reduce_add_sync(u32, int value) {
  const Exchange *all = exchange(value);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += taken<int>(all, threadIdx.x / 32 * 32 + lane);
  return sum;
}
template <class A> A __shfl_sync(u32, A value, int lane) {
  return taken<A>(exchange(value), threadIdx.x / 32 * 32 + lane % 32);
}
static void __threadfence() {}
static int atomicAdd(int *to, int value) { return *to += value, *to - value; }
template <class A> A __ldcg(const A *from) { return *from; }

static std::function<void()> body;
static void run_fiber() {
  for (;;) {
    body();
    fiber().asked.clear(), fiber().ended = true;
    let_others();
  }
}
static void resume(Fiber &fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}
// Runs `kernel` as a grid of blocks of `threads` threads, cluster after cluster, the last ones first if `backwards`.
static void run_grid(Index grid, int threads, std::function<void()> kernel, bool backwards = false, int cluster = 1) {
  body = kernel;
  blockDim.x = threads, gridDim = grid, cluster_blocks = cluster;
  if ((int)fibers.size() < threads * cluster) fibers.resize(threads * cluster);
  for (int i = 0, all = grid.x * grid.y * grid.z; i < all; i += cluster) {
    const int first = backwards ? all - cluster - i : i;
    for (int t = 0; t < threads * cluster; ++t) fibers[t].turn = 0, fibers[t].cluster_turn = -1, fibers[t].ended = false;
    for (int left = threads * cluster; left > 0;)
      for (int t = 0; t < threads * cluster; ++t)
        if (!fibers[t].ended) {
          threadIdx.x = t % threads, rank_of_block = t / threads;
          const int block = first + rank_of_block;
          blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
          resume(fibers[t]);
          left -= fibers[t].ended;
        }
  }
}
static void run_blocks(int blocks, int threads, std::function<void()> kernel) {
  run_grid({blocks, 1, 1}, threads, kernel);
}

template <class A> void atomicMax(A *place, A value) { *place = std::max(*place, value); }

static float __fdiv_rn(float a, float b) { return a / b; }
static float __fsqrt_rn(float a) { return std::sqrt(a); }
static float __frcp_rn(float a) { return 1.0f / a; }
static int __float2int_rn(float x) {  // saturates, NaN gives 0
  if (std::isnan(x)) return 0;
  return x >= 2147483647.0f ? 2147483647 : x <= -2147483648.0f ? -2147483647 - 1 : (int)std::nearbyint(x);
}
static int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
  return c;
}
static u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static float of_bits(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static u32 __float_as_uint(float x) { return bits_of(x); }
static float __uint_as_float(u32 x) { return of_bits(x); }
static u32 __byte_perm(u32 a, u32 b, u32 pick) {
  const u64 both = (u64)b << 32 | a;
  u32 y = 0;
  for (int i = 0; i < 4; ++i) y |= (u32)(both >> 8 * (pick >> 4 * i & 7) & 255) << 8 * i;
  return y;
}
static u16 to_bf16(float x) {
  const u32 bits = bits_of(x);
  return std::isnan(x) ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float from_bf16(u16 x) { return of_bits((u32)x << 16); }
static u16 to_half(float x) {
  _Float16 y = (_Float16)x;
  u16 bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
static float from_half(u16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return (float)y;
}
static uint4 load_once(const uint4 *from) { return *from; }
static u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
static u32 pack_half(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
template <class F> u32 of_bf16x2(u32 a, u32 b, F f) {
  return pack_bf16(f(from_bf16(a), from_bf16(b)), f(from_bf16(a >> 16), from_bf16(b >> 16)));
}
template <class F> u32 of_half2(u32 a, u32 b, F f) {
  return pack_half(f(from_half(a), from_half(b)), f(from_half(a >> 16), from_half(b >> 16)));
}
static float plus(float a, float b) { return a + b; }
static float times(float a, float b) { return a * b; }
static u32 add_bf16x2(u32 a, u32 b) { return of_bf16x2(a, b, plus); }
static u32 mul_bf16x2(u32 a, u32 b) { return of_bf16x2(a, b, times); }
static u32 add_half2(u32 a, u32 b) { return of_half2(a, b, plus); }
static u32 mul_half2(u32 a, u32 b) { return of_half2(a, b, times); }
static u32 pack_s8(int a, int b, int c, int d) {
  u32 word = 0;
  for (int x : {d, c, b, a}) word = word << 8 | (u8)std::min(std::max(x, -128), 127);
  return word;
}
static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
static float exp2_fast(float x) { return flushed(std::exp2(flushed(x))); }
static float reciprocal_fast(float x) { return flushed(1.0f / flushed(x)); }
static float reciprocal_root_fast(float x) { return (float)(1.0 / std::sqrt((double)flushed(x))); }
static float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }
#if ZQ_ARCH >= 89
static u8 to_e4m3(float x) {
  const u8 sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const double y = std::min(std::fabs((double)x), 448.0);
  const int exponent = y < 0x1p-6 ? -6 : std::ilogb(y);
  const int steps = (int)std::nearbyint(std::ldexp(y, 3 - exponent));  // 8 .. 16 for normal numbers, else 0 .. 8
  return sign | std::min(steps + 8 * (exponent + 6), 0x7e);
}
static u16 to_e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
#endif
static void pdl_wait() {}
static void pdl_launch() {}
