// What the tensor core can do at most: wgmma with A in registers and nothing else, two warpgroups a block.
// Operations: blocks * 2 * 64 * N * 128 * 2 * iterations (N = 128, 256); ZQ_KIND names the types as in scheme.cuh.
#include "ptx90.cuh"
#include "wgmma.cuh"

// data: 128 * (64 + N) * 4 random bytes, at least; sink: one word, never written in practice.
template <int N> __device__ __forceinline__ void loop(const u32* data, int iterations, u32* sink) {
  extern __shared__ __align__(1024) u8 memory[];
  for (int i = threadIdx.x; i < N * 32; i += 256) reinterpret_cast<u32*>(memory)[i] = data[i];
  proxy_fence();
  __syncthreads();
  Fragment f[2];
#pragma unroll
  for (int i = 0; i < 32; ++i) f[i / 16].a[i % 16] = data[N * 32 + i * 256 + threadIdx.x];
  Acc sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = 0;
  const u64 b = descriptor(shared_address(memory));
#pragma unroll 1
  for (int i = 0; i < iterations; i += 2) {
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      wgmma_fence(f[set]);
#pragma unroll
      for (int j = 0; j < 4; ++j) wgmma<N>(sum, f[set].a + 4 * j, b + 2 * j, 1);
      wgmma_commit();
      wgmma_wait<1>();
    }
  }
  wgmma_wait<0>();
  settled(sum);
  u32 all = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) all |= bits(sum[i]);
  if (all == 1) *sink = all;  // so that the sums are wanted
}

extern "C" __global__ void __launch_bounds__(256, 1) n128(const u32* data, int iterations, u32* sink) {
  loop<128>(data, iterations, sink);
}
extern "C" __global__ void __launch_bounds__(256, 1) n256(const u32* data, int iterations, u32* sink) {
  loop<256>(data, iterations, sink);
}
