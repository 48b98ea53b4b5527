// One step of an optimizer (UPDATE: AdamW or Sgd) for a list of parameters, whose states are FIRST and SECOND
// (Full, Codes<8>, Codes<4>, Factored, None). Everything is read once and written once:
//
//     maxima   only where all blocks of a tensor share scales: what the new values reach
//     step     states are decoded, updated in float32 and encoded; the parameter is updated
//     scales   behind `maxima`: the new scales, and zeros for the next step
//
// The order of operations and their roundings are those of zq/optim/kernel.py on a GPU. A thread has eight
// neighbouring elements; a block of 256 threads has 2048, in which every block of a format lies whole.
#include "common.cuh"
#include "floats.cuh"
#include "pointwise.cuh"
#include "states.cuh"

constexpr int ITEMS = 40;     // as many as the 4 KB of a kernel's parameters hold
constexpr int ROWS = 64, COLUMNS = 256;  // of a block of `maxima`: each warp has every eighth row
enum Kind { FLOAT, BF16, FP16 };

struct Numbers {
  float rate;         // minus the learning rate; AdamW: over 1 - beta1^t
  float decay;        // AdamW: 1 - rate * decay
  float keep, add;    // AdamW: beta2, 1 - beta2; Sgd: momentum, 1 - dampening
  float lerp;         // 1 - beta1
  float root, inverse, eps;  // root of 1 - beta2^t, 1 / root
  int nesterov, fresh;  // fresh: the first step of Sgd, which has no momentum yet
};

struct Item {
  void *param;
  const void *grad;
  State first, second;
  u32 count;
  int columns;  // of a row, where a state is rank 1 or factored; else any
  int end;      // blocks of this item and those before
  int unused;
};

struct Args {
  Format first, second;
  Numbers numbers;
  int param, grad;  // Kind
  int items, blocks;
  Item item[ITEMS];
};

struct None {
  static constexpr bool quantized = false, known = false;
  struct Shared {};
  __device__ __forceinline__ None(const Format &, Shared &) {}
  __device__ __forceinline__ bool shares() const { return false; }
  __device__ __forceinline__ void read(const State &, u32, int, int, float (&)[EACH]) const {}
  __device__ __forceinline__ void write(const State &, u32, int, u32, int, const float (&)[EACH]) const {}
};

// p, m and v become new; g is finite.
struct AdamW {
  static constexpr bool needs_param = false;  // to know the new states
  static __device__ __forceinline__ void states(const Numbers &n, float &g, float, float &m, float &v) {
    m = lerp(m, g, n.lerp);
    if constexpr (!SECOND::known) v = addcmul(v * n.keep, g, g, n.add);
  }
  static __device__ __forceinline__ float param(const Numbers &n, float, float p, float m, float v) {
    return addcdiv(p * n.decay, m, over(__fsqrt_rn(v), n.root, n.inverse) + n.eps, n.rate);
  }
};
struct Sgd {
  static constexpr bool needs_param = true;
  static __device__ __forceinline__ void states(const Numbers &n, float &g, float p, float &m, float &) {
    if (n.decay != 0.0f) g = add(g, p, n.decay);
    m = n.fresh ? g : add(m * n.keep, g, n.add);
  }
  static __device__ __forceinline__ float param(const Numbers &n, float g, float p, float m, float) {
    return add(p, n.nesterov ? add(g, m, n.keep) : m, n.rate);
  }
};

constexpr bool CAREFUL = FIRST::quantized || SECOND::quantized || SECOND::known;  // gradients that are NaN or Inf count as zero

__device__ __forceinline__ void load_as(int kind, const void *from, u32 start, int left, float (&x)[EACH]) {
  if (kind == BF16) load<bf16>(from, start, left, x);
  else if (kind == FP16) load<fp16>(from, start, left, x);
  else load<float>(from, start, left, x);
}
__device__ __forceinline__ void store_as(int kind, void *to, u32 start, int left, const float (&x)[EACH]) {
  if (kind == BF16) store<bf16>(to, start, left, x);
  else if (kind == FP16) store<fp16>(to, start, left, x);
  else store<float>(to, start, left, x);
}
__device__ __forceinline__ bool is_finite(float x) { return size_of(x) < 0x7f800000u; }

// The item that a block works on.
__device__ __forceinline__ int item_of(const Args &a, int block) {
  int low = 0, high = a.items - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (block < a.item[middle].end) high = middle;
    else low = middle + 1;
  }
  return low;
}
__device__ __forceinline__ int begin_of(const Args &a, int i) { return i ? a.item[i - 1].end : 0; }

extern "C" __global__ void __launch_bounds__(THREADS, 4) step(const __grid_constant__ Args a) {
  __shared__ FIRST::Shared kept_first;
  __shared__ SECOND::Shared kept_second;
  const FIRST first(a.first, kept_first);
  const SECOND second(a.second, kept_second);
  __syncthreads();
  for (int block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    const int number = item_of(a, block);
    const Item &item = a.item[number];
    const u32 start = (u32)(block - begin_of(a, number)) * TILE + threadIdx.x * EACH;
    const int left = (int)(item.count - start);
    float p[EACH], g[EACH], m[EACH], v[EACH];
    load_as(a.param, item.param, start, left, p);
    load_as(a.grad, item.grad, start, left, g);
    first.read(item.first, start, left, item.columns, m);
    second.read(item.second, start, left, item.columns, v);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const bool fine = !CAREFUL || is_finite(g[i]);
      float slope = fine ? g[i] : 0.0f;
      UPDATE::states(a.numbers, slope, p[i], m[i], v[i]);
      const float now = UPDATE::param(a.numbers, slope, p[i], m[i], v[i]);
      p[i] = fine ? now : p[i];
      m[i] = fine ? m[i] : 0.0f;
      v[i] = fine ? v[i] : 0.0f;
    }
    // Behind the last element zeros were loaded, but with decay and eps they need not stay zeros.
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (i >= left) m[i] = v[i] = 0.0f;
    store_as(a.param, item.param, start, left, p);
    first.write(item.first, start, left, item.count, item.columns, m);
    second.write(item.second, start, left, item.count, item.columns, v);
  }
}

// What the values of a block of `maxima` reach. Rank 1: columns of this thread over its rows, rows at once.
template <class Kept, bool = Kept::quantized> struct Wide {
  const Kept &kept;
  const State &s;
  u32 columns[EACH];
  u64 key;
  __device__ __forceinline__ Wide(const Kept &kept, const State &s) : kept(kept), s(s), columns{}, key(0) {}

  __device__ __forceinline__ void row(u32 row, u32 start, int left, const float (&x)[EACH]) {
    if (kept.f.layout == RANK1) {
      u32 widest = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i < left) {
          columns[i] = max(columns[i], size_of(x[i]));
          widest = max(widest, size_of(x[i]));
        }
      widest = largest<u32>(widest, 32, nullptr);
      if (threadIdx.x % 32 == 0 && widest) atomicMax(reinterpret_cast<u32 *>(s.wide) + row, widest);
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i < left) {
          const u64 other = key_of(x[i], start + i);
          key = other > key ? other : key;
        }
    }
  }
  // part: zeros before and after
  __device__ __forceinline__ void finish(u32 rows, u32 column, u32 k, u32 *part) {
    if (kept.f.layout == RANK1) {
      u32 *mine = part + threadIdx.x % 32 * EACH;
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (columns[i]) atomicMax(mine + i, columns[i]);
      __syncthreads();
      const u32 widest = part[threadIdx.x];
      part[threadIdx.x] = 0;
      if (column + threadIdx.x < k && widest)
        atomicMax(reinterpret_cast<u32 *>(s.wide) + rows + column + threadIdx.x, widest);
      __syncthreads();
    } else {
      key = largest<u64>(key, 32, nullptr);
      if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<u64 *>(s.wide), key);
    }
  }
};
template <class Kept> struct Wide<Kept, false> {
  __device__ __forceinline__ Wide(const Kept &, const State &) {}
  __device__ __forceinline__ void row(u32, u32, int, const float (&)[EACH]) {}
  __device__ __forceinline__ void finish(u32, u32, u32, u32 *) {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 3) maxima(const __grid_constant__ Args a) {
  __shared__ FIRST::Shared kept_first;
  __shared__ SECOND::Shared kept_second;
  __shared__ u32 part[COLUMNS];
  const FIRST first(a.first, kept_first);
  const SECOND second(a.second, kept_second);
  part[threadIdx.x] = 0;
  __syncthreads();
  const bool widens_first = first.shares(), widens_second = second.shares();
  for (int block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    const int number = item_of(a, block);
    const Item &item = a.item[number];
    const u32 k = item.columns, across = (k + COLUMNS - 1) / COLUMNS, rows = (item.count + k - 1) / k;
    const u32 place = block - begin_of(a, number);
    const u32 corner = place % across * COLUMNS, column = corner + threadIdx.x % 32 * EACH;
    Wide<FIRST> wide_first(first, item.first);
    Wide<SECOND> wide_second(second, item.second);
    for (int i = threadIdx.x / 32; i < ROWS; i += THREADS / 32) {
      const u32 row = place / across * ROWS + i, start = row * k + column;
      const int left = row < rows ? min((int)(k - column), (int)(item.count - start)) : 0;
      float p[EACH] = {}, g[EACH], m[EACH] = {}, v[EACH] = {};
      load_as(a.grad, item.grad, start, left, g);
      if (UPDATE::needs_param) load_as(a.param, item.param, start, left, p);
      if (widens_first) first.read(item.first, start, left, k, m);
      if (widens_second) second.read(item.second, start, left, k, v);
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        float slope = is_finite(g[j]) ? g[j] : 0.0f;
        UPDATE::states(a.numbers, slope, p[j], m[j], v[j]);
      }
      if (widens_first) wide_first.row(row, start, left, m);
      if (widens_second) wide_second.row(row, start, left, v);
    }
    if (widens_first) wide_first.finish(rows, corner, k, part);
    if (widens_second) wide_second.finish(rows, corner, k, part);
  }
}

// The scale `i` of the state, if it has so many that its blocks share; else `i` is less by their number.
template <class Kept>
__device__ __forceinline__ bool settle(const Format &f, const State &s, const Item &item, u32 &i) {
  if constexpr (Kept::quantized) {
    if (f.layout == TENSOR) {
      if (i-- == 0) {
        u64 *wide = reinterpret_cast<u64 *>(s.wide);
        s.scale[0] = stored(value_of(*wide, f), f);
        *wide = 0;
        return true;
      }
    } else if (f.layout == RANK1) {
      const u32 rows = item.count / item.columns, count = rows + item.columns;
      if (i < count) {
        u32 *wide = reinterpret_cast<u32 *>(s.wide) + i;
        (i < rows ? s.scale[i] : s.columns[i - rows]) = stored(__uint_as_float(*wide), f);
        *wide = 0;
        return true;
      }
      i -= count;
    }
  }
  return false;
}

extern "C" __global__ void __launch_bounds__(THREADS) scales(const __grid_constant__ Args a) {
  for (int block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    const int number = item_of(a, block);
    const Item &item = a.item[number];
    u32 i = (u32)(block - begin_of(a, number)) * THREADS + threadIdx.x;
    if (!settle<FIRST>(a.first, item.first, item, i)) settle<SECOND>(a.second, item.second, item, i);
  }
}
