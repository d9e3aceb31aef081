// Inline PTX, each instruction with what the emulator does in its place; those of warpgroups are wgmma.cuh's. After the
// PTX manual, section 9.7.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char name##_raw[]; \
    type* name = reinterpret_cast<type*>(name##_raw)

#define PTX __device__ __forceinline__

// Several numbers in one instruction; `p` is a multiple of their size. (No PTX, but g++ would take them apart.)
PTX float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
PTX void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
PTX float2 load2(const half* p) { return __half22float2(*reinterpret_cast<const half2*>(p)); }
PTX float2 load2(const __nv_bfloat16* p) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p)); }
PTX void store2(half* p, float2 v) { *reinterpret_cast<half2*>(p) = __float22half2_rn(v); }
PTX void store2(__nv_bfloat16* p, float2 v) { *reinterpret_cast<__nv_bfloat162*>(p) = __float22bfloat162_rn(v); }

PTX unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
PTX void cp_async16(void* to, const void* from, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
PTX void cp_commit() { asm volatile("cp.async.commit_group;\n"); }
template <int KEEP> PTX void cp_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(KEEP)); }
PTX void ldmatrix_x4(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
PTX void ldmatrix_x4_trans(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
template <class T> PTX void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b);
#define MMA(type, name)                                                                             \
    template <> PTX void mma_16x8x16<type>(float* c, const uint32_t* a, const uint32_t* b) {          \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                  \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"             \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));             \
    }
MMA(half, "f16")
MMA(__nv_bfloat16, "bf16")

#else
#include "emulator.h"

#define PTX __attribute__((noinline, no_sanitize("thread"))) inline

PTX float4 load4(const float* p) {
    emulator::watch(p, 16, false, __builtin_return_address(0));
    return emulator::from_memory<float4>(p);
}
PTX void store4(float* p, float4 v) {
    emulator::watch(p, 16, true, __builtin_return_address(0));
    std::memcpy(p, &v, 16);
}
template <class T> PTX float2 load2(const T* p) {
    emulator::watch(p, 4, false, __builtin_return_address(0));
    return {(float)emulator::from_memory<T>(p), (float)emulator::from_memory<T>(p + 1)};
}
template <class T> PTX void store2(T* p, float2 v) {
    emulator::watch(p, 4, true, __builtin_return_address(0));
    const T both[2] = {(T)v.x, (T)v.y};
    std::memcpy(p, both, 4);
}
PTX void cp_async16(void* to, const void* from, bool inside) {
    emulator::copy_later(to, inside ? from : nullptr, 16, __builtin_return_address(0));
}
PTX void cp_commit() { emulator::commit_copies(); }
template <int KEEP> PTX void cp_wait() { emulator::finish_copies(KEEP); }

// Lane l brings the address of row l % 8 of matrix l / 8; lane l takes two numbers of row l / 4 of each matrix.
PTX void ldmatrix_x4(uint32_t* r, const void* row, HERE) {
    emulator::watch(row, 16, false, __builtin_return_address(0));
    const unsigned char* all = emulator::wait_for_warp(~0u, row, 16, "ldmatrix", at);
    const int lane = emulator::lane();
    for (int m = 0; m < 4; m++) std::memcpy(&r[m], all + (m * 8 + lane / 4) * emulator::WIDEST + lane % 4 * 4, 4);
}
// Transposed: lane l takes numbers l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1.
PTX void ldmatrix_x4_trans(uint32_t* r, const void* row, HERE) {
    emulator::watch(row, 16, false, __builtin_return_address(0));
    const unsigned char* all = emulator::wait_for_warp(~0u, row, 16, "ldmatrix", at);
    const int lane = emulator::lane();
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 2; i++)
            std::memcpy((char*)&r[m] + 2 * i, all + (m * 8 + lane % 4 * 2 + i) * emulator::WIDEST + lane / 4 * 2, 2);
}
// Lane l holds, of A (16 x 16), two numbers each of rows l / 4 and l / 4 + 8, at columns 2 (l % 4) and 8 further; of B
// (16 x 8) those of column l / 4 at such rows; of C (16 x 8) columns 2 (l % 4) and 1 further of the two rows.
template <class T> PTX void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b, HERE) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* all = emulator::wait_for_warp(~0u, mine, sizeof mine, "mma", at);
    auto number = [all](int lane, int word, int which) {
        return (float)emulator::from_memory<T>(all + lane * emulator::WIDEST + word * 4 + which * 2);
    };
    const int group = emulator::lane() / 4, pair = emulator::lane() % 4;
    for (int e = 0; e < 4; e++) {
        const int row = group + e / 2 * 8, column = pair * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const float of_a = number(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
            sum += of_a * number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
        c[e] += sum;
    }
}
#endif
