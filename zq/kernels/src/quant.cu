// Activations to 8 bits, row by row, alone or behind a norm or an activation function: one read, one write.
//
// A warp, a block or a cluster of blocks takes a row and keeps it, in the type of the input (IN: bf16, fp16 or float;
// row.cuh). First OP turns the row into what the unfused model would quantize (before.cuh); then the row is scaled and
// rounded to OUT:
//
//     scale = max|y| / top        1 if that is 0, never below the smallest normal number
//     q     = round(y / scale)    to nearest even; y / scale is rounded once, as IEEE 754 asks
//
// top is 127.5 for int8, 448 for e4m3.
#include "before.cuh"
#include "codes8.cuh"

// ---- which values share a scale ----
struct Token {
  template <class Out, class T, int V, class Team>
  static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    Largest<T> largest;
#pragma unroll
    for (int i = 0; i < row.count(); ++i)
      if (V || row.has(i)) largest.take(row.get(i));
    const u32 bits = team.template reduce<Max>(Max::lanes(largest.bits()), 2);
    const float scale = scale_of<Out>(magnitude<T>(bits));
    const Quotient<T> by(scale);
    if (by.lifts()) change(row, [&](Piece &piece, int) { lift<T>(piece, by.lift); });
    u32 total = 0;
    auto *to = reinterpret_cast<Codes<T> *>(row_of<u8>(a.q, team, a.k));
#pragma unroll
    for (int i = 0; i < row.count(); ++i)
      if (V || row.has(i)) total += (u32)write<Out>(row.get(i), by, row.in(to, i), row.has(i));
    if constexpr (Out::sums) total = team.template reduce<Count>(Count::lanes(total), 3);
    if (team.leads() && team.has(a.rows)) {
      a.scale[team.row()] = scale;
      if constexpr (Out::sums) a.rowsum[team.row()] = (int)total;
    }
  }
};
struct Block128 {  // 128 values are 16 neighbouring lanes of 16-bit pieces, or a warp of float pieces
  template <class Out, class T, int V, class Team>
  static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    constexpr int width = 128 / VALUES<T>;
    auto *to = reinterpret_cast<Codes<T> *>(row_of<u8>(a.q, team, a.k));
    float *scales = a.scale + (u64)team.row() * ((a.k + 127) / 128);
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      Piece piece = V || row.has(i) ? row.get(i) : Piece{};
      Largest<T> largest;
      largest.take(piece);
      u32 bits = largest.bits();
#pragma unroll
      for (int step = width / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(ALL, bits, step));
      const float scale = scale_of<Out>(magnitude<T>(bits));
      const Quotient<T> by(scale);
      if (by.lifts()) lift<T>(piece, by.lift);
      write<Out>(piece, by, row.in(to, i), row.has(i));
      if (row.has(i) && row.place(i) % width == 0) scales[row.place(i) / width] = scale;
    }
  }
};

template <class Team, int V> __device__ __forceinline__ void quantize(const Args &a) {
  Team team;
  Row<V> row(team.warp(), team.has(a.rows) ? (u32)a.k / VALUES<IN> : 0);
  OP::template run<IN>(row, a, team);
  SCALES::template run<OUT, IN>(row, a, team);
}

// The name says how many pieces of 16 bytes a thread has and who shares a row.
#define KERNEL(NAME, TEAM, V, THREADS) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Args a) { quantize<TEAM, V>(a); }
KERNEL(quantize_warp, Warp, 4, 256)
KERNEL(quantize_1, Block, 1, 1024)
KERNEL(quantize_4, Block, 4, 896)
KERNEL(quantize_cluster, Cluster, 1, 512)
KERNEL(quantize_long, Block, 0, 1024)
