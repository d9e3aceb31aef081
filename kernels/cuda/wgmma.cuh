// The matrix product of a warpgroup (Hopper): 4 warps, 128 threads, and both matrices in shared memory.
//
// After the PTX manual, sections 9.7.15 (wgmma) and 8.6 (proxies). The instruction is asynchronous twice over. Its sums
// are registers that nobody may look at before `wgmma_wait`; and it reads shared memory in its own way (the "async
// proxy"), which sees what threads and cp.async have written only after each writer's `fence_proxy_async`.
#pragma once

#include "ptx.cuh"

#ifdef __CUDACC__

// 16 bytes, by way of registers. (No PTX; as in ptx.cuh.)
template <class T> PTX void copy16(T* to, const T* from) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

#define SUMS_0_63 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
    "%62, %63"
#define SUMS_64_127 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, " \
    "%121, %122, %123, %124, %125, %126, %127"
#define IN_OUT_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define IN_OUT_16(d, i) IN_OUT_4(d, i), IN_OUT_4(d, i + 4), IN_OUT_4(d, i + 8), IN_OUT_4(d, i + 12)
#define IN_OUT_64(d, i) IN_OUT_16(d, i), IN_OUT_16(d, i + 16), IN_OUT_16(d, i + 32), IN_OUT_16(d, i + 48)

// What this thread has written to shared memory, wgmma may read; others' threads after a barrier.
PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
// What this thread has done to the sums' registers comes before the wgmma that follows.
PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int KEEP> PTX void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(KEEP) : "memory");
}

// `sum` (64 x N) += A (64 x 16) B (16 x N), which lie in shared memory as their descriptors say; what follows these is:
// add to the sums, neither matrix negated, A along the depth (K-major), B along its columns (MN-major).
#define WGMMA_128(name)                                                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" SUMS_0_63 "}, %64, %65, "          \
                 "1, 1, 1, 0, 1;\n"                                                                                   \
                 : IN_OUT_64(sum, 0)                                                                                  \
                 : "l"(a), "l"(b)                                                                                     \
                 : "memory")
#define WGMMA_256(name)                                                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." name "." name " {" SUMS_0_63 ", " SUMS_64_127 "}, "   \
                 "%128, %129, 1, 1, 1, 0, 1;\n"                                                                       \
                 : IN_OUT_64(sum, 0), IN_OUT_64(sum, 64)                                                              \
                 : "l"(a), "l"(b)                                                                                     \
                 : "memory")
template <class T> constexpr bool IS_BFLOAT16 = false;
template <> constexpr bool IS_BFLOAT16<__nv_bfloat16> = true;
template <int N, class T = half> PTX void wgmma(float (&sum)[N / 2], uint64_t a, uint64_t b) {
    static_assert(N == 128 || N == 256, "the columns of B for which the instruction is written out here");
    if constexpr (N == 128 && IS_BFLOAT16<T>) WGMMA_128("bf16");
    else if constexpr (N == 128) WGMMA_128("f16");
    else if constexpr (IS_BFLOAT16<T>) WGMMA_256("bf16");
    else WGMMA_256("f16");
}

// All have waited. The compiler does not know that the sums are made only then: this keeps what reads them behind it.
template <int COUNT> PTX void wgmma_done(float (&sum)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

#else

template <class T> PTX void copy16(T* to, const T* from) {
    emulator::watch(from, 16, false, __builtin_return_address(0));
    emulator::watch(to, 16, true, __builtin_return_address(0));
    std::memcpy(to, from, 16);
}
PTX unsigned shared_address(const void* p) { return emulator::shared_address(p); }
PTX void fence_proxy_async() { emulator::fence_proxy(); }
PTX void wgmma_fence() { emulator::fence_sums(); }
PTX void wgmma_commit() { emulator::commit_products(); }
template <int KEEP> PTX void wgmma_wait(HERE) { emulator::finish_products(KEEP, at); }
template <class T> EMULATOR float number_at(const void* p) { return (float)emulator::from_memory<T>(p); }
template <int N, class T = half> PTX void wgmma(float (&sum)[N / 2], uint64_t a, uint64_t b, HERE) {
    emulator::multiply_later(sum, N, a, b, number_at<T>, at, __builtin_return_address(0));
}
template <int COUNT> PTX void wgmma_done(float (&)[COUNT]) {}
#endif

// A descriptor: where a matrix begins in shared memory, and how it goes on from there. It lies in rows of 128 bytes, 8
// of them in 1,024; each row's 16-byte pieces are permuted by the row's number modulo 8 (the "128-byte swizzle"), so
// that the same piece of 8 rows lies in all banks. `stride` is the way, in bytes, to the next 8 rows; `leading` that to
// the next 64 columns of an MN-major matrix, in which a row is 64 columns at one depth (K-major: not used). After the
// manual's section on matrix descriptors; CUTLASS (mma_sm90_desc.hpp, mma_traits_sm90_gmma.hpp), ThunderKittens and
// DeepGEMM fill them in the same way.
PTX uint64_t swizzled_128b(const void* begin, unsigned leading, unsigned stride) {
    return 1ull << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 | shared_address(begin) >> 4;
}
// Where piece number `piece` of a row lies: its place in numbers from the beginning of the tile.
PTX int swizzled(int row, int piece) { return row * 64 + (piece ^ row % 8) * 8; }
