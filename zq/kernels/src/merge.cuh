// Second half of attend.cuh, which includes it after `Sums`: what warps and blocks have summed becomes one result.
#pragma once

// The sums of the four warps of a block.
template <int D> struct Merged {
  float out[WARPS][QUERIES][D + 1];
  float top[WARPS][QUERIES], sum[WARPS][QUERIES];

  __device__ __forceinline__ void put(Sums<D> &own, int d) {
    using S = Shape<D>;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) own.sum[h] += __shfl_xor_sync(0xffffffffu, own.sum[h], step);
      if (g == 0) top[warp][2 * t + h] = own.top[h], sum[warp][2 * t + h] = own.sum[h];
#pragma unroll
      for (int m = 0; m < S::rows; ++m) {
        const int channel = (m / (S::v_values / 2) * 8 + g) * S::v_values + m % (S::v_values / 2) * 2;
        if (channel < d) {
          out[warp][2 * t + h][channel] = own.out[m][h] * own.unit * CACHE::factor;
          out[warp][2 * t + h][channel + 1] = own.out[m][h + 2] * own.unit * CACHE::factor;
        }
      }
    }
  }
  // {largest score, sum} of a query head, and in `by` what the sums of each warp count.
  __device__ __forceinline__ float2 whole(int query, float (&by)[WARPS]) const {
    float largest = top[0][query], total = 0;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) largest = fmaxf(largest, top[w][query]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      by[w] = exp2_fast(top[w][query] - largest);
      total = fmaf(sum[w][query], by[w], total);
    }
    return {largest, total};
  }
};

// A warp adds the chunks of one query head, in their order. A thread has four neighbouring channels at a time.
template <int D> __device__ __forceinline__ void combine(const float *partial, const float2 *sums, int chunks, int d, IN *out) {
  constexpr int SETS = (D + 127) / 128, AHEAD = 16;
  const int lane = threadIdx.x % 32;
  float largest = NONE, total = 0;
  for (int c = lane; c < chunks; c += 32) largest = fmaxf(largest, __ldcg(sums + c).x);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  float4 value[SETS];
#pragma unroll
  for (int e = 0; e < SETS; ++e) value[e] = {0, 0, 0, 0};
  for (int begin = 0; begin < chunks; begin += 32) {
    const float2 own = begin + lane < chunks ? __ldcg(sums + begin + lane) : float2{NONE, 0};
    const float weight = exp2_fast(own.x - largest);
    total = fmaf(own.y, weight, total);
    for (int some = begin; some < min(begin + 32, chunks); some += AHEAD) {
      float4 x[AHEAD][SETS];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i)
#pragma unroll
        for (int e = 0; e < SETS; ++e) {
          const int channel = 4 * (lane + 32 * e);
          const float4 *from = reinterpret_cast<const float4 *>(partial + (u64)(some + i) * d + channel);
          x[i][e] = some + i < chunks && channel < d ? __ldcg(from) : float4{0, 0, 0, 0};
        }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const float by = __shfl_sync(0xffffffffu, weight, some - begin + i);
#pragma unroll
        for (int e = 0; e < SETS; ++e) {
          value[e].x = fmaf(by, x[i][e].x, value[e].x), value[e].y = fmaf(by, x[i][e].y, value[e].y);
          value[e].z = fmaf(by, x[i][e].z, value[e].z), value[e].w = fmaf(by, x[i][e].w, value[e].w);
        }
      }
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
#pragma unroll
  for (int e = 0; e < SETS; ++e) {
    const int channel = 4 * (lane + 32 * e);
    if (channel >= d) continue;
    out[channel] = from_float<IN>(value[e].x / total), out[channel + 1] = from_float<IN>(value[e].y / total);
    out[channel + 2] = from_float<IN>(value[e].z / total), out[channel + 3] = from_float<IN>(value[e].w / total);
  }
}
