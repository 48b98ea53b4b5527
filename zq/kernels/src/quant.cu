// Activations to 8 bits, row by row, alone or behind a norm or an activation function: one read, one write.
//
// A block takes a row and keeps it, in the type of the input (IN: bf16, fp16 or float): V pieces of 16 bytes in the
// registers of each thread, or, for long rows (V = 0), in shared memory. First OP turns the row into what the
// unfused model would quantize, with the roundings to IN that the unfused model makes; then the row is scaled and
// rounded to OUT:
//
//     scale = max|y| / top        1 if that is 0, never below the smallest normal number
//     q     = round(y / scale)    to nearest even; y / scale is rounded once, as IEEE 754 asks
//
// top is 127.5 for int8, 448 for e4m3.
#include "round8.cuh"

struct Args {
  const void *x;         // [rows, k]; SiluMul: [rows, 2 k], gate then up
  const void *residual;  // [rows, k], Add... only
  const void *weight;    // [k], norms only
  const void *bias;      // [k], LayerNorm only
  void *sum;             // [rows, k], x + residual, Add... only; PostLayerNorm: what is quantized
  void *q;               // [rows, k]
  float *scale;          // [rows]; Block128: [rows, ceil(k / 128)]
  int *rowsum;           // [rows], Int8 only
  int k;
  float eps;
};

// ---- reductions over the block; every thread gets the result ----
struct Max {
  static __device__ __forceinline__ float combine(float a, float b) { return max_nan(a, b); }
};
struct Sum {
  template <class A> static __device__ __forceinline__ A combine(A a, A b) { return a + b; }
};

template <class By, int Lanes = 32, class A> __device__ __forceinline__ A lanes(A value) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2)
    value = By::combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Each call of a kernel needs its own `part`, so that no barrier is needed between two of them.
// Identity 0 serves sums and maxima of magnitudes.
template <class By, class A> __device__ __forceinline__ A block(A value, A *part) {
  value = lanes<By>(value);
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return value;
  if (lane == 0) part[threadIdx.x / 32] = value;
  __syncthreads();
  return lanes<By>(lane < warps ? part[lane] : A(0));
}

// ---- a piece: 16 bytes of a row ----
template <class T> struct alignas(16) Piece {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};
template <class T> __device__ __forceinline__ Piece<T> read_piece(const void *from, int place) {
  const uint4 bits = reinterpret_cast<const uint4 *>(from)[place];
  return *reinterpret_cast<const Piece<T> *>(&bits);
}
template <class T> __device__ __forceinline__ void write_piece(void *to, int place, const Piece<T> &piece) {
  reinterpret_cast<uint4 *>(to)[place] = *reinterpret_cast<const uint4 *>(&piece);
}

// The pieces of a row that one thread has: i = 0 .. count() - 1, of which the last may be missing.
template <class T, int V> struct Row {
  Piece<T> kept[V];
  int pieces;  // of the whole row

  static constexpr __device__ __forceinline__ int count() { return V; }
  __device__ __forceinline__ Piece<T> get(int i) const { return kept[i]; }
  __device__ __forceinline__ void set(int i, const Piece<T> &piece) { kept[i] = piece; }
  __device__ __forceinline__ int place(int i) const { return i * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < pieces; }
};

extern __shared__ uint4 long_row[];  // a thread reads only what it wrote, so there is no barrier

template <class T> struct Row<T, 0> {
  int pieces;

  __device__ __forceinline__ int count() const { return (pieces + blockDim.x - 1) / blockDim.x; }
  __device__ __forceinline__ Piece<T> get(int i) const { return read_piece<T>(long_row, place(i)); }
  __device__ __forceinline__ void set(int i, const Piece<T> &piece) { write_piece(long_row, place(i), piece); }
  __device__ __forceinline__ int place(int i) const { return i * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < pieces; }
};

// f(piece, place) for every piece of the thread; what it leaves in `piece` is kept.
template <class T, int V, class F> __device__ __forceinline__ void change(Row<T, V> &row, F f) {
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if (row.has(i)) {
      Piece<T> piece = row.get(i);
      f(piece, row.place(i));
      row.set(i, piece);
    }
}

template <class T, int V> __device__ __forceinline__ void load(Row<T, V> &row, const T *from) {
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if (row.has(i)) row.set(i, read_piece<T>(from, row.place(i)));
}

// Sum of f(value) over the values of the thread.
template <class T, int V, class F> __device__ __forceinline__ float sum(const Row<T, V> &row, F f) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < row.count(); ++i)
    if (row.has(i)) {
      const Piece<T> piece = row.get(i);
#pragma unroll
      for (int j = 0; j < Piece<T>::size; ++j) total += f(to_float(piece.value[j]));
    }
  return total;
}

template <class T> __device__ __forceinline__ const T *row_of(const void *base, int k) {
  return reinterpret_cast<const T *>(base) + (u64)blockIdx.x * k;
}

// ---- what happens to a row before it is quantized ----
struct Plain {
  template <class T, int V> static __device__ __forceinline__ void run(Row<T, V> &row, const Args &a, float (*)[32]) {
    load(row, row_of<T>(a.x, a.k));
  }
};

template <bool Add, bool Keep = true, class T, int V> __device__ __forceinline__ void load_sum(Row<T, V> &row, const Args &a) {
  load(row, row_of<T>(a.x, a.k));
  if constexpr (Add)
    change(row, [&](Piece<T> &piece, int place) {
      const Piece<T> other = read_piece<T>(row_of<T>(a.residual, a.k), place);
#pragma unroll
      for (int j = 0; j < Piece<T>::size; ++j)
        piece.value[j] = from_float<T>(to_float(piece.value[j]) + to_float(other.value[j]));
      if constexpr (Keep) write_piece(const_cast<T *>(row_of<T>(a.sum, a.k)), place, piece);
    });
}

template <bool Add> struct RmsNorm_ {  // T(weight * T(x / sqrt(mean(x^2) + eps))), as transformers computes it
  template <class T, int V> static __device__ __forceinline__ void run(Row<T, V> &row, const Args &a, float (*part)[32]) {
    load_sum<Add>(row, a);
    const float squares = block<Sum>(sum(row, [](float x) { return x * x; }), part[0]);
    const float inverse = 1.0f / sqrtf(squares / (float)a.k + a.eps);
    change(row, [&](Piece<T> &piece, int place) {
      const Piece<T> weight = read_piece<T>(a.weight, place);
#pragma unroll
      for (int j = 0; j < Piece<T>::size; ++j) {
        const T normed = from_float<T>(to_float(piece.value[j]) * inverse);
        piece.value[j] = from_float<T>(to_float(weight.value[j]) * to_float(normed));
      }
    });
  }
};
using RmsNorm = RmsNorm_<false>;
using AddRmsNorm = RmsNorm_<true>;

// T((x - mean) / sqrt(variance + eps) * weight + bias). Post: that is what the next residual is, and is written.
template <bool Add, bool Post = false> struct LayerNorm_ {
  template <class T, int V> static __device__ __forceinline__ void run(Row<T, V> &row, const Args &a, float (*part)[32]) {
    load_sum<Add, !Post>(row, a);
    const float mean = block<Sum>(sum(row, [](float x) { return x; }), part[0]) / (float)a.k;
    const float squares = block<Sum>(sum(row, [&](float x) { return (x - mean) * (x - mean); }), part[1]);
    const float inverse = 1.0f / sqrtf(squares / (float)a.k + a.eps);
    change(row, [&](Piece<T> &piece, int place) {
      const Piece<T> weight = read_piece<T>(a.weight, place), bias = read_piece<T>(a.bias, place);
#pragma unroll
      for (int j = 0; j < Piece<T>::size; ++j) {
        const float normed = (to_float(piece.value[j]) - mean) * inverse;
        piece.value[j] = from_float<T>(normed * to_float(weight.value[j]) + to_float(bias.value[j]));
      }
      if constexpr (Post) write_piece(const_cast<T *>(row_of<T>(a.sum, a.k)), place, piece);
    });
  }
};
using LayerNorm = LayerNorm_<false>;
using AddLayerNorm = LayerNorm_<true>;
using PostLayerNorm = LayerNorm_<true, true>;

struct SiluMul {  // T(T(silu(gate)) * up)
  template <class T, int V> static __device__ __forceinline__ void run(Row<T, V> &row, const Args &a, float (*)[32]) {
    const T *gate = row_of<T>(a.x, 2 * a.k);
    load(row, gate);
    change(row, [&](Piece<T> &piece, int place) {
      const Piece<T> up = read_piece<T>(gate + a.k, place);
#pragma unroll
      for (int j = 0; j < Piece<T>::size; ++j) {
        const float g = to_float(piece.value[j]);
        const T silu = from_float<T>(g / (1.0f + expf(-g)));
        piece.value[j] = from_float<T>(to_float(silu) * to_float(up.value[j]));
      }
    });
  }
};

struct GeluErf {
  static __device__ __forceinline__ float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
};
struct GeluTanh {
  static __device__ __forceinline__ float of(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
};
template <class Function> struct Apply {  // T(f(x))
  template <class T, int V> static __device__ __forceinline__ void run(Row<T, V> &row, const Args &a, float (*)[32]) {
    load(row, row_of<T>(a.x, a.k));
    change(row, [](Piece<T> &piece, int) {
#pragma unroll
      for (int j = 0; j < Piece<T>::size; ++j) piece.value[j] = from_float<T>(Function::of(to_float(piece.value[j])));
    });
  }
};
using Gelu = Apply<GeluErf>;
using GeluNew = Apply<GeluTanh>;

template <class T> __device__ __forceinline__ float magnitude(const Piece<T> &piece) {
  float largest = 0;
#pragma unroll
  for (int j = 0; j < Piece<T>::size; ++j) largest = Max::combine(largest, fabsf(to_float(piece.value[j])));
  return largest;
}

// Writes the codes of a piece; returns their sum for Int8.
template <class Out, class T> __device__ __forceinline__ int write(const Piece<T> &piece, Divisor by, u32 *to) {
  int sum = 0;
#pragma unroll
  for (int w = 0; w < Piece<T>::size / 4; ++w) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = by(to_float(piece.value[4 * w + j]));
    const u32 word = Out::pack(y[0], y[1], y[2], y[3]);
    to[w] = word;
    if constexpr (Out::sums) sum = __dp4a((int)word, 0x01010101, sum);
  }
  return sum;
}

// ---- which values share a scale ----
struct Token {
  template <class Out, class T, int V> static __device__ __forceinline__ void run(const Row<T, V> &row, const Args &a, float (*part)[32]) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < row.count(); ++i)
      if (row.has(i)) largest = Max::combine(largest, magnitude(row.get(i)));
    const float scale = scale_of(block<Max>(largest, part[2]), Out::top);
    const Divisor by(scale);
    int total = 0;
    u32 *to = reinterpret_cast<u32 *>(reinterpret_cast<u8 *>(a.q) + (u64)blockIdx.x * a.k);
#pragma unroll
    for (int i = 0; i < row.count(); ++i)
      if (row.has(i)) total += write<Out>(row.get(i), by, to + row.place(i) * (Piece<T>::size / 4));
    if constexpr (Out::sums) total = block<Sum>(total, reinterpret_cast<int *>(part[3]));
    if (threadIdx.x == 0) {
      a.scale[blockIdx.x] = scale;
      if constexpr (Out::sums) a.rowsum[blockIdx.x] = total;
    }
  }
};
struct Block128 {  // 128 values are 16 neighbouring lanes of 16-bit pieces, or a warp of float pieces
  template <class Out, class T, int V> static __device__ __forceinline__ void run(const Row<T, V> &row, const Args &a, float (*)[32]) {
    constexpr int width = 128 / Piece<T>::size;
    u32 *to = reinterpret_cast<u32 *>(reinterpret_cast<u8 *>(a.q) + (u64)blockIdx.x * a.k);
    float *scales = a.scale + (u64)blockIdx.x * ((a.k + 127) / 128);
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      const float own = row.has(i) ? magnitude(row.get(i)) : 0.0f;
      const float scale = scale_of(lanes<Max, width>(own), Out::top);
      if (row.has(i)) {
        write<Out>(row.get(i), Divisor(scale), to + row.place(i) * (Piece<T>::size / 4));
        if (row.place(i) % width == 0) scales[row.place(i) / width] = scale;
      }
    }
  }
};

template <int V> __device__ __forceinline__ void quantize(const Args &a) {
  __shared__ float part[4][32];
  pdl_wait();
  pdl_launch();
  Row<IN, V> row;
  row.pieces = a.k / Piece<IN>::size;
  OP::template run<IN, V>(row, a, part);
  SCALES::template run<OUT>(row, a, part);
}

extern "C" __global__ void __launch_bounds__(1024) quantize_1(const __grid_constant__ Args a) { quantize<1>(a); }
extern "C" __global__ void __launch_bounds__(1024) quantize_4(const __grid_constant__ Args a) { quantize<4>(a); }
extern "C" __global__ void __launch_bounds__(1024) quantize_long(const __grid_constant__ Args a) { quantize<0>(a); }
