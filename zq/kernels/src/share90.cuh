// Which part of the work a block of gemm_sm90.cu does, and how blocks that compute one tile add their sums.
//
// Whole tiles go round: every stride-th one is a block's, so that neighbours read the same rows of W and x at the
// same time. `Evenly`, the tiles that do not fill a round, and one round more, are divided by their steps after
// that: a block takes an equal, contiguous part of all (tile, step) pairs, so all end together. Of these its last
// tile, which the next block ends, comes first: its sums go to the workspace and a flag goes up. The tile that it
// ends comes last: it adds what the blocks before it have left there, in their order, so the result does not
// depend on time. It waits for lower numbers only, which began before it, and which have waited for nothing.
#pragma once
#include "ptx90.cuh"
#include "scheme.cuh"

struct Segment {
  int work, first, last;  // steps first .. last - 1 of a tile
};

struct Share {
  int works, steps, stride, place;  // place: 0 .. stride - 1
  int first, last, rounds;          // steps of whole tiles, and how many of them
  int even, begin, end;             // from tile `even` on: this block has pairs begin .. end - 1
  int count;                        // of segments

  __device__ __forceinline__ Share(int works, int steps, int stride, int place, int first, int last, bool evenly)
      : works(works), steps(steps), stride(stride), place(place), first(first), last(last) {
    rounds = evenly ? max(works / stride - 1, 0) : (works - place + stride - 1) / stride;
    even = evenly ? rounds * stride : works;
    begin = (works - even) * steps * place / stride, end = (works - even) * steps * (place + 1) / stride;
    count = rounds + (end > begin ? (end - 1) / steps - begin / steps + 1 : 0);
  }
  __device__ __forceinline__ Segment operator[](int i) const {
    if (i < rounds) return {place + i * stride, first, last};
    const int tile = (end - 1) / steps - (i - rounds);
    return {even + tile, max(begin - tile * steps, 0), min(end - tile * steps, steps)};
  }
  // The block that has the first step of a tile that is cut.
  __device__ __forceinline__ int beginner(int work) const {
    return (((work - even) * steps + 1) * stride - 1) / ((works - even) * steps);
  }
};

// The sums of a thread, 16 bytes at a time, those of a warpgroup side by side.
template <int ROWS, int COUNT> __device__ __forceinline__ void put(const Sum (&sum)[ROWS][COUNT], uint4* to) {
#pragma unroll
  for (int i = 0; i < ROWS * COUNT / 4; ++i) {
    const Sum* v = sum[i * 4 / COUNT] + i * 4 % COUNT;
    to[i * 128] = {bits(v[0]), bits(v[1]), bits(v[2]), bits(v[3])};
  }
}
template <int ROWS, int COUNT, class Read> __device__ __forceinline__ void add(Sum (&sum)[ROWS][COUNT], Read read) {
#pragma unroll
  for (int i = 0; i < ROWS * COUNT / 4; ++i) {
    const uint4 v = read(i * 128);
    Sum* to = sum[i * 4 / COUNT] + i * 4 % COUNT;
    to[0] += number<Sum>(v.x), to[1] += number<Sum>(v.y);
    to[2] += number<Sum>(v.z), to[3] += number<Sum>(v.w);
  }
}

// The workspace: a flag for each warpgroup of a block, zero before and after; then their sums.
template <int ROWS, int COUNT> struct Workspace {
  int* flags;
  uint4* sums;
  int group, t;

  __device__ __forceinline__ Workspace(u8* memory, int blocks, int group, int t)
      : flags(reinterpret_cast<int*>(memory) + group),
        sums(reinterpret_cast<uint4*>(memory + (blocks * 8 + 15) / 16 * 16) + group * SLOT + t), group(group), t(t) {}
  __device__ __forceinline__ void leave(const Sum (&sum)[ROWS][COUNT], int block, int barrier) const {
    put(sum, sums + (size_t)block * 2 * SLOT);
    __threadfence();
    named_barrier(barrier, 128);
    if (t == 0) raise_flag(flags + 2 * block);
  }
  // Adds what blocks from .. to - 1 have left.
  __device__ __forceinline__ void take(Sum (&sum)[ROWS][COUNT], int from, int to, int barrier) const {
    for (int block = from + t; block < to; block += 128) lower_flag(flags + 2 * block);
    named_barrier(barrier, 128);
    for (int block = from; block < to; ++block)
      add(sum, [&](int i) { return __ldcg(sums + (size_t)block * 2 * SLOT + i); });
  }
  static constexpr int SLOT = ROWS * COUNT / 4 * 128;
};
