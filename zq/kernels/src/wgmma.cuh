// wgmma with A in registers and B in shared memory: D[64 x N] += A[64 x 32 bytes] B[N x 32 bytes]^T.
// B rows of 128 bytes, 128-byte swizzle, K-major: eight rows are 1024 bytes (PTX ISA 9.0, "wgmma.mma_async").
#pragma once
#include "scheme.cuh"

#if ZQ_KIND == KIND_W4A8_TWO
#define WG_TYPES "k32.s32.u8.s8 "
#elif ZQ_KIND == KIND_W8A8_INT8 || ZQ_KIND == KIND_W4A8_GROUP
#define WG_TYPES "k32.s32.s8.s8 "
#elif ZQ_KIND == KIND_W8A8_FP8 || ZQ_KIND == KIND_FP8_BLOCK || ZQ_KIND == KIND_W4A8_FP8
#define WG_TYPES "k32.f32.e4m3.e4m3 "
#elif ZQ_HALF
#define WG_TYPES "k16.f32.f16.f16 "
#else
#define WG_TYPES "k16.f32.bf16.bf16 "
#endif

#if ZQ_KIND == KIND_W4A8_TWO || ZQ_KIND == KIND_W8A8_INT8 || ZQ_KIND == KIND_W4A8_GROUP
#define WG_REG "+r"
#define WG_TAIL ", more;}"
#elif ZQ_KIND == KIND_W4A16 || ZQ_KIND == KIND_W8A16
#define WG_REG "+f"
#define WG_TAIL ", more, 1, 1, 0;}"
#else
#define WG_REG "+f"
#define WG_TAIL ", more, 1, 1;}"
#endif

#define WG_4(i) WG_REG(d[i]), WG_REG(d[i + 1]), WG_REG(d[i + 2]), WG_REG(d[i + 3])
#define WG_8(i) WG_4(i), WG_4(i + 4)
#define WG_16(i) WG_8(i), WG_8(i + 8)
#define WG_32(i) WG_16(i), WG_16(i + 16)
#define WG_64(i) WG_32(i), WG_32(i + 32)
#define WG_96(i) WG_64(i), WG_32(i + 64)
#define WG_128(i) WG_64(i), WG_64(i + 64)

#define WG_LIST_4 \
  "%0, %1, %2, %3"
#define WG_LIST_8 WG_LIST_4 \
  ", %4, %5, %6, %7"
#define WG_LIST_16 WG_LIST_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WG_LIST_32 WG_LIST_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WG_LIST_64 WG_LIST_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WG_LIST_96 WG_LIST_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WG_LIST_128 WG_LIST_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// `more` = 0 starts a new sum.
template <int N>
__device__ __forceinline__ void wgmma(Acc (&d)[N / 2], const u32* a, u64 b, int more);

#define WG(N, R, A0, A1, A2, A3, B, MORE)                                                              \
  template <>                                                                                          \
  __device__ __forceinline__ void wgmma<N>(Acc(&d)[R], const u32* a, u64 b, int more) {                \
    asm volatile("{.reg .pred more; setp.ne.b32 more, " MORE ", 0;"                                    \
                 " wgmma.mma_async.sync.aligned.m64n" #N WG_TYPES "{" WG_LIST_##R "}, {" A0 ", " A1    \
                 ", " A2 ", " A3 "}, " B WG_TAIL                                                       \
                 : WG_##R(0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));                     \
  }
WG(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
WG(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
WG(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WG(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WG(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WG(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
WG(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

__device__ __forceinline__ u64 descriptor(u32 address) {  // 128-byte swizzle, 1024 bytes from eight rows to the next
  return 1ull << 62 | 64ull << 32 | 1ull << 16 | (u64)((address & 0x3FFFF) >> 4);
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler may not move reads of the sums above the wait, nor the making of A below the fence.
template <int N, class T> __device__ __forceinline__ void settled(T (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : WG_REG(d[i])::"memory");
}
// The same number, of which the compiler knows nothing.
__device__ __forceinline__ int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The compiler may not move what computes these registers behind this point.
__device__ __forceinline__ void computed(Fragment& f) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(f.a[i])::"memory");
}
template <int N> __device__ __forceinline__ void computed(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
__device__ __forceinline__ void wgmma_fence(Fragment& f) {
  computed(f);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
