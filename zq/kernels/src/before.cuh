// What happens to a row before it is quantized: OP of quant.cu. Each leaves in the row what the unfused model would
// quantize, with the roundings to T (bf16, fp16) that the unfused model makes.
//
// What no earlier kernel writes, the vectors of a norm, is asked for before the wait for that kernel.
#pragma once
#include "row.cuh"

struct Args {
  const void *x;         // [rows, k]; SiluMul: [rows, 2 k], gate then up
  const void *residual;  // [rows, k], Add... only
  const void *weight;    // [k], norms only
  const void *bias;      // [k], LayerNorm only
  void *sum;             // [rows, k], x + residual, Add... only; PostLayerNorm: what is quantized
  void *q;               // [rows, k]
  float *scale;          // [rows]; Block128: [rows, ceil(k / 128)]
  int *rowsum;           // [rows], Int8 only
  int rows;
  int k;
  float inverse_k;       // 1 / k
  float eps;
};

template <class T, class Team> __device__ __forceinline__ uint4 *row_of(const void *base, const Team &team, int k) {
  return reinterpret_cast<uint4 *>(const_cast<T *>(reinterpret_cast<const T *>(base)) + (u64)team.row() * k);
}

// A vector of k: of a thread with one piece it is there early, else it is read when it is needed.
template <int V> struct Vector {
  const uint4 *from;
  Piece kept;
  __device__ __forceinline__ Vector(const void *from, const Row<V> &row) : from(reinterpret_cast<const uint4 *>(from)) {
    if constexpr (V == 1) kept = read(row, 0);
  }
  __device__ __forceinline__ Piece get(const Row<V> &row, int i) const {
    if constexpr (V == 1) return kept;
    else return read(row, i);
  }
  __device__ __forceinline__ Piece read(const Row<V> &row, int i) const {
    return row.has(i) ? Piece::of(*row.in(from, i)) : Piece{};
  }
};

// The next kernel may begin, which waits for this one where it has to; what earlier ones wrote is there.
__device__ __forceinline__ void meet_neighbours() {
  pdl_launch();
  pdl_wait();
}

struct Plain {
  template <class T, int V, class Team> static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    meet_neighbours();
    load(row, row_of<T>(a.x, team, a.k));
  }
};

template <bool Add, bool Keep, class T, int V, class Team>
__device__ __forceinline__ void load_sum(Row<V> &row, const Args &a, Team &team) {
  meet_neighbours();
  load(row, row_of<T>(a.x, team, a.k));
  if constexpr (Add) {
    const uint4 *residual = row_of<T>(a.residual, team, a.k);
    Row<V> other(team.warp(), row.pieces);
    if constexpr (V > 0) load(other, residual);
    change(row, [&](Piece &piece, int i) {
      const Piece more = V ? other.get(i) : Piece::of(*row.in(residual, i));
#pragma unroll
      for (int w = 0; w < 4; ++w) piece.word[w] = add2<T>(piece.word[w], more.word[w]);
    });
    if constexpr (Keep) store(row, row_of<T>(a.sum, team, a.k));
  }
}

// total / k, rounded once (but for the last bit of some).
__device__ __forceinline__ float mean_of(float total, const Args &a) {
  const float mean = total * a.inverse_k, better = fmaf(fmaf(-mean, (float)a.k, total), a.inverse_k, mean);
  return fabsf(mean) < 1e38f ? better : mean;
}
// 1 / sqrt(x), both rounded (but for the last bit of some).
__device__ __forceinline__ float inverse_root(float x) {
  if (!(x > 1e-30f && x < 1e30f)) return 1.0f / sqrtf(x);
  const float inverse = reciprocal_root_fast(x), near = x * inverse;
  const float root = fmaf(fmaf(-near, near, x), 0.5f * inverse, near);
  return fmaf(fmaf(-root, inverse, 1.0f), inverse, inverse);
}
// Sum of f(x) over the values of a piece, in two chains.
template <class T, class F> __device__ __forceinline__ float sum_of(const Piece &piece, F f) {
  float x[VALUES<T>];
  floats<T>(piece, x);
  float even = f(0.0f, x[0]), odd = f(0.0f, x[1]);
#pragma unroll
  for (int j = 2; j < VALUES<T>; j += 2) even = f(even, x[j]), odd = f(odd, x[j + 1]);
  return even + odd;
}

template <bool Add> struct RmsNorm_ {  // T(weight * T(x / sqrt(mean(x^2) + eps))), as transformers computes it
  template <class T, int V, class Team> static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    const Vector<V> weight(a.weight, row);
    load_sum<Add, true, T>(row, a, team);
    const float squares =
        total(row, team, 0, [](const Piece &piece) { return sum_of<T>(piece, [](float s, float x) { return fmaf(x, x, s); }); });
    const float inverse = inverse_root(mean_of(squares, a) + a.eps);
    change(row, [&](Piece &piece, int i) {
      const Piece by = weight.get(row, i);
      float x[VALUES<T>];
      floats<T>(piece, x);
#pragma unroll
      for (int w = 0; w < 4; ++w) piece.word[w] = mul2<T>(by.word[w], pack2<T>(x[2 * w] * inverse, x[2 * w + 1] * inverse));
    });
  }
};
using RmsNorm = RmsNorm_<false>;
using AddRmsNorm = RmsNorm_<true>;

// T((x - mean) / sqrt(variance + eps) * weight + bias). Post: that is what the next residual is, and is written.
template <bool Add, bool Post = false> struct LayerNorm_ {
  template <class T, int V, class Team> static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    const Vector<V> weight(a.weight, row), bias(a.bias, row);
    load_sum<Add, !Post, T>(row, a, team);
    const float values =
        total(row, team, 0, [](const Piece &piece) { return sum_of<T>(piece, [](float s, float x) { return s + x; }); });
    const float mean = mean_of(values, a);
    const float squares = total(row, team, 1, [&](const Piece &piece) {
      return sum_of<T>(piece, [&](float s, float x) { return fmaf(x - mean, x - mean, s); });
    });
    const float inverse = inverse_root(mean_of(squares, a) + a.eps);
    change(row, [&](Piece &piece, int i) {
      float x[VALUES<T>], by[VALUES<T>], more[VALUES<T>];
      floats<T>(piece, x), floats<T>(weight.get(row, i), by), floats<T>(bias.get(row, i), more);
#pragma unroll
      for (int j = 0; j < VALUES<T>; ++j) x[j] = fmaf((x[j] - mean) * inverse, by[j], more[j]);
#pragma unroll
      for (int w = 0; w < 4; ++w) piece.word[w] = pack2<T>(x[2 * w], x[2 * w + 1]);
    });
    if constexpr (Post) store(row, row_of<T>(a.sum, team, a.k));
  }
};
using LayerNorm = LayerNorm_<false>;
using AddLayerNorm = LayerNorm_<true>;
using PostLayerNorm = LayerNorm_<true, true>;

struct SiluMul {  // T(T(silu(gate)) * up)
  static __device__ __forceinline__ float silu(float x) {
    return x * reciprocal_fast(1.0f + exp2_fast(-1.44269504f * x));
  }
  template <class T> static __device__ __forceinline__ void apply(Piece &gate, const Piece &up) {
    float x[VALUES<T>];
    floats<T>(gate, x);
#pragma unroll
    for (int w = 0; w < 4; ++w) gate.word[w] = mul2<T>(pack2<T>(silu(x[2 * w]), silu(x[2 * w + 1])), up.word[w]);
  }
  template <class T, int V, class Team> static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    meet_neighbours();
    const uint4 *gate = row_of<T>(a.x, team, 2 * a.k), *up = gate + row.pieces;
    load(row, gate);
    Row<V> other(team.warp(), row.pieces);
    if constexpr (V > 0) load(other, up);
    change(row, [&](Piece &piece, int i) { apply<T>(piece, V ? other.get(i) : Piece::of(*row.in(up, i))); });
  }
};

// x times the share of the normal distribution below x. The share beyond |x| is 2 to a polynomial in |x|, whose weighted
// error is the least that degree 8 allows (Lawson's iteration): 4e-8 of 1, which falls to -infinity.
struct GeluErf {
  static __device__ __forceinline__ float of(float x) {
    const float a = fabsf(x);
    float p = fmaf(-2.7720512e-6f, a, 3.8620772e-5f);
    p = fmaf(p, a, -1.8254772e-4f);
    p = fmaf(p, a, -1.4586984e-4f);
    p = fmaf(p, a, 7.0754713e-3f);
    p = fmaf(p, a, -5.2505028e-2f);
    p = fmaf(p, a, -0.45920491f);
    p = fmaf(p, a, -1.1511058f);
    const float beyond = exp2_fast(fmaf(p, a, -1.0f));
    return x * (x > 0.0f ? 1.0f - beyond : beyond);
  }
};
struct GeluTanh {  // x / (1 + exp(-2 u)) = x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
  static __device__ __forceinline__ float of(float x) {
    return x * reciprocal_fast(1.0f + exp2_fast(x * fmaf(x * x, -0.10294324f, -2.30220819f)));
  }
};
template <class Function> struct Apply {  // T(f(x))
  template <class T, int V, class Team> static __device__ __forceinline__ void run(Row<V> &row, const Args &a, Team &team) {
    meet_neighbours();
    load(row, row_of<T>(a.x, team, a.k));
    change(row, [](Piece &piece, int) {
      float x[VALUES<T>];
      floats<T>(piece, x);
#pragma unroll
      for (int w = 0; w < 4; ++w) piece.word[w] = pack2<T>(Function::of(x[2 * w]), Function::of(x[2 * w + 1]));
    });
  }
};
using Gelu = Apply<GeluErf>;
using GeluNew = Apply<GeluTanh>;
