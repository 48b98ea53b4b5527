// A row of activations and the threads that share it: who has what, and sums and maxima over all of them.
//
// A thread has V pieces of 16 bytes, in registers. Of 32 V pieces in a row a warp has each thread's first ones side by
// side, then its second ones, and so on; 32 pieces side by side are a group. Long rows (V = 0) lie in shared memory.
//
// The order of a sum does not depend on V, on how many warps there are or on how they are spread: first the values of a
// piece, then the pieces of a group, then neighbouring groups, two by two. So a token gives the same codes with any
// number of others. (Rows in shared memory have their own order; which rows those are depends on their length only.)
#pragma once
#include "piece.cuh"

// ---- the pieces that a thread has: i = 0 .. count() - 1, of which the last may be missing ----
template <int V> struct Row {
  static constexpr int groups = V;
  Piece kept[V];
  int first, pieces;  // of the thread; of the row

  __device__ __forceinline__ Row(int warp, int pieces) : first(warp * 32 * V + threadIdx.x % 32), pieces(pieces) {}
  static constexpr __device__ __forceinline__ int count() { return V; }
  __device__ __forceinline__ Piece get(int i) const { return kept[i]; }
  __device__ __forceinline__ void set(int i, const Piece &piece) { kept[i] = piece; }
  __device__ __forceinline__ int place(int i) const { return first + 32 * i; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < pieces; }
  // Where piece i is in memory, when each piece takes an A there.
  template <class A> __device__ __forceinline__ A *in(A *row, int i) const { return row + (u32)first + 32 * i; }
};

extern __shared__ uint4 long_row[];  // a thread reads only what it wrote, so there is no barrier

template <> struct Row<0> {
  static constexpr int groups = 1;
  int pieces;

  __device__ __forceinline__ Row(int, int pieces) : pieces(pieces) {}
  __device__ __forceinline__ int count() const { return (pieces + blockDim.x - 1) / blockDim.x; }
  __device__ __forceinline__ Piece get(int i) const { return Piece::of(long_row[place(i)]); }
  __device__ __forceinline__ void set(int i, const Piece &piece) { long_row[place(i)] = piece.bits(); }
  __device__ __forceinline__ int place(int i) const { return i * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < pieces; }
  template <class A> __device__ __forceinline__ A *in(A *row, int i) const { return row + place(i); }
};

template <int V> __device__ __forceinline__ void load(Row<V> &row, const uint4 *from) {
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if (row.has(i)) row.set(i, Piece::of(load_once(row.in(from, i))));
    else if (V) row.set(i, {});
}
// f(piece, i) for every piece of the thread; what it leaves in `piece` is kept. Missing pieces in registers are zeros
// that are computed too: without branches between them, pieces do not wait for each other.
template <int V, class F> __device__ __forceinline__ void change(Row<V> &row, F f) {
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if (V || row.has(i)) {
      Piece piece = row.get(i);
      f(piece, i);
      row.set(i, piece);
    }
}
template <int V> __device__ __forceinline__ void store(const Row<V> &row, uint4 *to) {
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if (row.has(i)) *row.in(to, i) = row.get(i).bits();
}

// ---- what is reduced: words, 0 being neutral ----
struct Sum {  // of floats
  static __device__ __forceinline__ u32 combine(u32 a, u32 b) {
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
  }
  static __device__ __forceinline__ u32 lanes(u32 value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) value = combine(value, __shfl_xor_sync(ALL, value, step));
    return value;
  }
};
struct Count {  // of integers
  static __device__ __forceinline__ u32 combine(u32 a, u32 b) { return a + b; }
  static __device__ __forceinline__ u32 lanes(u32 value) { return (u32)__reduce_add_sync(ALL, (int)value); }
};
struct Max {  // of the bits of magnitudes, among which those of NaN are the largest
  static __device__ __forceinline__ u32 combine(u32 a, u32 b) { return max(a, b); }
  static __device__ __forceinline__ u32 lanes(u32 value) { return __reduce_max_sync(ALL, value); }
};

// Sums of groups, one in each value[i] of the lanes, and of those: at each of the first steps a lane gives one half of
// its values away for the other half of those of another lane.
template <int N> __device__ __forceinline__ float fold(float (&value)[N], int step = 16) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & step;
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float kept = upper ? value[i + N / 2] : value[i], given = upper ? value[i] : value[i + N / 2];
      half[i] = kept + __shfl_xor_sync(ALL, given, step);
    }
    const float total = fold(half, step / 2);
    return total + __shfl_xor_sync(ALL, total, step);
  } else {
    float total = value[0];
#pragma unroll
    for (; step > 0; step /= 2) total += __shfl_xor_sync(ALL, total, step);
    return total;
  }
}

// ---- the threads of a row ----
// In shared memory each warp has a word for each of the reductions of a kernel: four times 128.
constexpr int PARTS = 128;
__device__ __forceinline__ u32 word(u32 parts, int at, int i) { return parts + 4 * (at * PARTS + i); }
template <class By> __device__ __forceinline__ u32 quad(uint4 a) {
  return By::combine(By::combine(a.x, a.y), By::combine(a.z, a.w));
}
// Of all words up to `count`, which zeros follow.
template <class By> __device__ __forceinline__ u32 reduce_words(u32 words, int count) {
  const auto of_four = [&](int i) { return quad<By>(load_shared(words + 16 * i)); };
  if (count <= 4) return of_four(0);
  if (count <= 16) return quad<By>({of_four(0), of_four(1), of_four(2), of_four(3)});
  const int lane = threadIdx.x % 32;
  return By::lanes(4 * lane < count ? of_four(lane) : 0);
}

struct Warp {  // a warp has a row
  __device__ __forceinline__ int row() const { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }
  __device__ __forceinline__ bool has(int rows) const { return row() < rows; }
  __device__ __forceinline__ int warp() const { return 0; }
  __device__ __forceinline__ bool leads() const { return threadIdx.x % 32 == 0; }
  template <class By> __device__ __forceinline__ u32 reduce(u32 value, int) { return value; }
};
struct Block {
  u32 parts = shared_words();
  __device__ __forceinline__ int row() const { return blockIdx.x; }
  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ bool leads() const { return threadIdx.x == 0; }
  // Each call has an `at` of its own, so that no barrier is needed between two of them.
  template <class By> __device__ __forceinline__ u32 reduce(u32 value, int at) {
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    if (warps == 1) return value;
    const bool first = lane == 0;
    store_shared(word(parts, at, first ? warp() : lane), first ? value : 0, first || (warp() == 0 && lane >= warps));
    __syncthreads();
    return reduce_words<By>(word(parts, at, 0), warps);
  }
};
#if ZQ_ARCH >= 90
struct Cluster {  // up to eight blocks of up to sixteen warps
  u32 parts = shared_words(), size = cluster_size(), rank = cluster_rank();
  bool met = false;
  __device__ __forceinline__ Cluster() {
    for (u32 i = threadIdx.x; i < 4 * PARTS; i += blockDim.x)
      store_shared(word(parts, 0, i), 0, i % PARTS >= size * (blockDim.x / 32));
    cluster_arrive();
  }
  __device__ __forceinline__ int row() const { return blockIdx.x / size; }
  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ int warp() const { return rank * (blockDim.x / 32) + threadIdx.x / 32; }
  __device__ __forceinline__ bool leads() const { return rank == 0 && threadIdx.x == 0; }
  template <class By> __device__ __forceinline__ u32 reduce(u32 value, int at) {
    const u32 lane = threadIdx.x % 32;
    if (!met) cluster_wait(), met = true;  // all blocks are there
    if (lane < size) store_remote(word(parts, at, warp()), lane, value);
    cluster_arrive();
    cluster_wait();
    return reduce_words<By>(word(parts, at, 0), size * (blockDim.x / 32));
  }
};
#else
using Cluster = Block;
#endif

// Sum of f(piece, i) over the row.
template <int V, class Team, class F> __device__ __forceinline__ float total(const Row<V> &row, Team &team, int at, F f) {
  float own[Row<V>::groups] = {};
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if constexpr (V > 0) {
      const float sum = f(row.get(i));
      own[i] = row.has(i) ? sum : 0.0f;
    } else if (row.has(i)) {
      own[0] += f(row.get(i));
    }
  return __uint_as_float(team.template reduce<Sum>(__float_as_uint(fold(own)), at));
}
