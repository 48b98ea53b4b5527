// Attention of one new token per row over a static cache (attend.cuh), of queries that are there.
#include "cache.cuh"
#include "floats.cuh"

struct Args : Cache {
  const void *q;         // [batch, heads, d]
  const int *first;      // [batch]
  const int *last;       // [batch], included
  const float *slopes;   // [heads], ALiBi; or null
  void *out;             // [batch, heads, d]
  int *counters;         // [batch, kv_heads * tiles of queries], zero before and after
  float *partial;        // [batch, heads, most, d], not normalised
  float2 *sums;          // [batch, heads, most], the largest score (base 2) and the sum of a chunk
  int most;              // chunks that a row can have
  int pieces;            // chunks that fill the device: longer rows have longer chunks, not more
  float scale;
};

#include "attend.cuh"

struct Given {
  static constexpr bool MAKES = false;
  const IN *from;
  __device__ __forceinline__ Given(const Args &a, int row, int, int head, int)
      : from(reinterpret_cast<const IN *>(a.q) + ((u64)row * a.heads + head) * a.d) {}
  __device__ __forceinline__ const IN *q() const { return from; }
  __device__ __forceinline__ void begin(bool, int) {}
  __device__ __forceinline__ void end() {}
};

extern "C" __global__ void __launch_bounds__(128, 2) attention_64(const __grid_constant__ Args a) { attend<64, Given>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) attention_96(const __grid_constant__ Args a) { attend<96, Given>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) attention_128(const __grid_constant__ Args a) { attend<128, Given>(a); }
extern "C" __global__ void __launch_bounds__(128, 2) attention_256(const __grid_constant__ Args a) { attend<256, Given>(a); }
