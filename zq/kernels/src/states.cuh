// Optimizer states in memory, eight neighbouring elements at a time: float32, or codes with scales.
//
// A value of a quantized state is table[code] * step. Its step is the scale of its block of neighbours, that of the
// tensor, or the smaller of the scales of its row and its column (rank 1). To encode, x / step is rounded to the
// nearest value of the format, halfway to the even code: the sign, the exponent and the first bits of the mantissa
// leave two candidates, and the middle between them decides (zq/optim/books.py makes the tables).
// Include common.cuh and floats.cuh first.
#pragma once

constexpr int THREADS = 256, EACH = 8, TILE = THREADS * EACH;
enum Layout { BLOCK, TENSOR, RANK1 };

struct Format {
  const uint4 *book;
  float top;               // a magnitude of top * scale lands on the last value
  float empty;             // the scale of what is all zero
  int layout;
  int block, power;        // elements of a block: 2^power, 8 to 2048
  int sign;                // the scale has the sign of the largest magnitude
  int shift, base, count;  // of the search: bucket = (bits of |q| >> shift) - base, inside 0 .. count - 1
  int negative;            // 1: negative values have buckets of their own behind these
  int plain;               // 1: the code of a value is its number
  int below;               // what a negative value gets instead of zero; -1: zero
};

struct State {
  void *values;    // float32 [n], or words of codes
  float *scale;    // [blocks], [1], or [rows]
  float *columns;  // [columns], rank 1
  void *wide;      // what new scales must cover: u64 [1], or u32 [rows + columns]; zeros between two steps
};

template <int Bits> struct alignas(16) Book {
  static constexpr int values = 1 << Bits;
  float table[values];   // by code
  float middle[values];  // between a value and the next, by number; NaN behind the last
  u8 codes[values];      // by number
  u8 first[Bits == 8 ? 2912 : 80];  // the least number that the values of a bucket can have
};

__device__ __forceinline__ float stored(float widest, const Format &f) {
  const float scale = __fdiv_rn(widest, f.top), size = fabsf(scale);
  if (scale == 0.0f) return f.empty;
  const float kept = size < TINY ? TINY : size > HUGE_ ? HUGE_ : size;  // NaN stays
  return scale < 0.0f ? -kept : kept;
}

// Of several values the one of largest magnitude, the first where there are more, as the largest number.
__device__ __forceinline__ u64 key_of(float x, u32 place) {
  const u32 bits = __float_as_uint(x);
  return (u64)(bits & 0x7fffffffu) << 32 | (0x7fffffffu - place) << 1 | bits >> 31;
}
__device__ __forceinline__ float value_of(u64 key, const Format &f) {
  return __uint_as_float((u32)(key >> 32) | (f.sign ? (u32)key << 31 : 0u));
}
__device__ __forceinline__ u32 size_of(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The largest of `threads` neighbouring threads, a power of two; every thread of the block must come here.
template <class A> __device__ __forceinline__ A largest(A value, int threads, A *part) {
  for (int step = 1; step < threads && step < 32; step *= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value ? other : value;
  }
  if (threads > 32) {
    const int warp = threadIdx.x / 32, warps = threads / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[warp] = value;
    __syncthreads();
    for (int i = 0; i < warps; ++i) {
      const A other = part[warp / warps * warps + i];
      value = other > value ? other : value;
    }
  }
  return value;
}

// Eight elements from `start` on, of which `left` exist (less than one: none); zeros for the others.
template <class T> __device__ __forceinline__ void load(const void *from, u32 start, int left, float (&x)[EACH]) {
  const T *place = reinterpret_cast<const T *>(from) + start;
  if (left >= EACH && reinterpret_cast<u64>(place) % 16 == 0) {
    alignas(16) T kept[EACH];
#pragma unroll
    for (int i = 0; i < (int)(EACH * sizeof(T) / 16); ++i)
      reinterpret_cast<uint4 *>(kept)[i] = reinterpret_cast<const uint4 *>(place)[i];
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = to_float(kept[i]);
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = i < left ? to_float(place[i]) : 0.0f;
  }
}
template <class T> __device__ __forceinline__ void store(void *to, u32 start, int left, const float (&x)[EACH]) {
  T *place = reinterpret_cast<T *>(to) + start;
  if (left >= EACH && reinterpret_cast<u64>(place) % 16 == 0) {
    alignas(16) T kept[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) kept[i] = from_float<T>(x[i]);
#pragma unroll
    for (int i = 0; i < (int)(EACH * sizeof(T) / 16); ++i)
      reinterpret_cast<uint4 *>(place)[i] = reinterpret_cast<const uint4 *>(kept)[i];
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (i < left) place[i] = from_float<T>(x[i]);
  }
}

struct Full {
  static constexpr bool quantized = false, known = false;
  struct Shared {};
  __device__ __forceinline__ Full(const Format &, Shared &) {}
  __device__ __forceinline__ bool shares() const { return false; }
  __device__ __forceinline__ void read(const State &s, u32 start, int left, int, float (&x)[EACH]) const {
    load<float>(s.values, start, left, x);
  }
  __device__ __forceinline__ void write(const State &s, u32 start, int left, u32, int, const float (&x)[EACH]) const {
    store<float>(s.values, start, left, x);
  }
};

// The outer product of two vectors, which are those of after this step already: rows in `scale`, and `columns`.
struct Factored {
  static constexpr bool quantized = false, known = true;
  struct Shared {};
  __device__ __forceinline__ Factored(const Format &, Shared &) {}
  __device__ __forceinline__ bool shares() const { return false; }
  __device__ __forceinline__ void read(const State &s, u32 start, int left, int k, float (&x)[EACH]) const {
    u32 row = start / k, column = start % k;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      x[i] = i < left ? s.scale[row] * s.columns[column] : 0.0f;
      if (++column == k) column = 0, ++row;
    }
  }
  __device__ __forceinline__ void write(const State &, u32, int, u32, int, const float (&)[EACH]) const {}
};

template <int Bits> struct Codes {
  static constexpr bool quantized = true, known = false;
  static constexpr int words = Bits / 4;  // of eight codes
  struct Shared {
    Book<Bits> book;
    u64 part[THREADS / 32];
  };
  const Format &f;
  Shared &kept;

  // The tables are there after the next barrier.
  __device__ __forceinline__ Codes(const Format &format, Shared &shared) : f(format), kept(shared) {
    uint4 *to = reinterpret_cast<uint4 *>(&shared.book);
    for (int i = threadIdx.x; i < (int)(sizeof(Book<Bits>) / 16); i += blockDim.x) to[i] = format.book[i];
  }
  __device__ __forceinline__ bool shares() const { return f.layout != BLOCK; }

  __device__ __forceinline__ void read(const State &s, u32 start, int left, int k, float (&x)[EACH]) const {
    const u32 per = 32 / Bits, skip = start % per * Bits;
    const u32 *from = reinterpret_cast<const u32 *>(s.values) + start / per;
    u32 data[words];
    if (words == 2 && start % EACH == 0 && left >= EACH) {
      const u64 both = *reinterpret_cast<const u64 *>(from);
      data[0] = (u32)both;
      data[words - 1] = (u32)(both >> 32);
    } else {
      const int there = left < 1 ? 0 : (skip + (left < EACH ? left : EACH) * Bits + 31) / 32;  // words
#pragma unroll
      for (int i = 0; i < words; ++i) {
        data[i] = i < there ? from[i] >> skip : 0;
        if (skip && i + 1 < there) data[i] |= from[i + 1] << (32 - skip);
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = kept.book.table[data[i / per] >> i % per * Bits & ((1 << Bits) - 1)];
    if (left < 1) return;
    if (f.layout == RANK1) {
      u32 row = start / k, column = start % k;
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i < left) {
          x[i] *= fminf(s.scale[row], s.columns[column]);
          if (++column == k) column = 0, ++row;
        }
    } else {
      const float step = s.scale[f.layout == BLOCK ? start >> f.power : 0];
#pragma unroll
      for (int i = 0; i < EACH; ++i) x[i] *= step;
    }
  }

  // `count` elements in all. Every thread of the block must come here; `start` is a multiple of eight.
  __device__ __forceinline__ void write(const State &s, u32 start, int left, u32 count, int k, const float (&x)[EACH]) const {
    u32 data[words] = {};
    if (f.layout == RANK1) {
      const u32 *rows = reinterpret_cast<const u32 *>(s.wide), *columns = rows + count / k;
      u32 row = start / k, column = start % k;
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i < left) {
          // The smaller of two scales is the scale of the smaller: rounding keeps their order.
          const float step = stored(__uint_as_float(min(rows[row], columns[column])), f);
          data[i * Bits / 32] |= code(x[i], __fdiv_rn(x[i], step)) << i * Bits % 32;
          if (++column == k) column = 0, ++row;
        }
    } else {
      const float step = f.layout == BLOCK ? of_block(s, start, left, x)
                                           : stored(value_of(*reinterpret_cast<const u64 *>(s.wide), f), f);
      const Divisor by(fabsf(step));
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const float quotient = by(step < 0.0f ? -x[i] : x[i]);
        if (i < left) data[i * Bits / 32] |= code(x[i], quotient) << i * Bits % 32;
      }
    }
    u32 *to = reinterpret_cast<u32 *>(s.values) + start / (32 / Bits);
    if (words == 2 && left >= EACH)
      *reinterpret_cast<u64 *>(to) = (u64)data[words - 1] << 32 | data[0];
    else
#pragma unroll
      for (int i = 0; i < words; ++i)
        if (i * 32 / Bits < left) to[i] = data[i];
  }

  // The scale of the block that these elements belong to.
  __device__ __forceinline__ float of_block(const State &s, u32 start, int left, const float (&x)[EACH]) const {
    float widest;
    if (f.sign) {
      u64 key = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const u64 other = key_of(x[i], start + i);
        key = other > key ? other : key;
      }
      widest = value_of(largest(key, f.block / EACH, kept.part), f);
    } else {
      u32 size = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) size = max(size, size_of(x[i]));
      widest = __uint_as_float(largest(size, f.block / EACH, reinterpret_cast<u32 *>(kept.part)));
    }
    const float step = stored(widest, f);
    if (left > 0 && (start & (f.block - 1)) == 0) s.scale[start >> f.power] = step;
    return step;
  }

  // Of q = x / step.
  __device__ __forceinline__ u32 code(float x, float q) const {
    const u32 bits = __float_as_uint(q);
    int bucket = min(max((int)((bits & 0x7fffffffu) >> f.shift) - f.base, 0), f.count - 1);
    if (bits >> 31) bucket = f.negative ? bucket + f.count : 0;
    u32 number = kept.book.first[bucket];
    const float middle = kept.book.middle[number];
    if (q > middle || (q == middle && (of(number) & 1))) ++number;
    const u32 found = of(number);
    return f.below >= 0 && x < 0.0f && kept.book.table[found] == 0.0f ? f.below : found;
  }
  __device__ __forceinline__ u32 of(u32 number) const { return f.plain ? number : kept.book.codes[number]; }
};
