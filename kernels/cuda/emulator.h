// CUDA C++ on a CPU: what g++ reads in place of CUDA's own headers, so that a .cu file runs without a GPU.
//
// A thread is a fiber: a stack of its own, left wherever it must wait for others and entered again once they have come.
// One block runs at a time, its threads in turn. `__shared__` is a static variable; a barrier, a shuffle or a vote is a
// rendezvous (emulator.cpp). Compiled with checks, g++ calls a function at each load and store: these are the profiler
// and the sanitizer (watch.cpp).
//
// What it cannot show: the order in which a GPU's memory becomes visible to other blocks, and time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the emulator's fibers are written for x86-64 and AArch64"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("shared_memory")))
#define __constant__ static

// The emulator's own loads and stores are not the kernel's.
#define EMULATOR inline __attribute__((no_sanitize("thread", "bounds")))

// ------------------------------------------------------------------ types

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };

using half = _Float16;
using __half = _Float16;
struct alignas(4) __half2 { __half x, y; };
using half2 = __half2;

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float v) : bits(bfloat16_bits(v)) {}
    __attribute__((noinline, no_sanitize("thread"))) operator float() const;  // a load, of the line that asks for it
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline __half __float2half(float v) { return (__half)v; }
inline __half __float2half_rn(float v) { return (__half)v; }
inline float __half2float(__half v) { return (float)v; }
inline __half2 __floats2half2_rn(float x, float y) { return {(__half)x, (__half)y}; }
inline float2 __half22float2(__half2 v) { return {(float)v.x, (float)v.y}; }

// ------------------------------------------------------------------ arithmetic

using std::max;
using std::min;

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __fdividef(float a, float b) { return a / b; }
// Rounded for itself: a call, which no compiler makes one operation of with the addition that follows.
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }
__attribute__((noinline)) inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float v) { unsigned u; std::memcpy(&u, &v, 4); return u; }
template <class T> inline T __ldg(const T* p) { return *p; }

// ------------------------------------------------------------------ threads

namespace emulator {

struct Place { const char* file; int line; };
#define HERE emulator::Place at = {__builtin_FILE(), __builtin_LINE()}

struct Thread { uint3 index; unsigned number; };  // number: within the block; lane = number % 32
extern Thread thread;                             // the one that runs
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char* dynamic_shared;
extern size_t shared_bytes;  // of it

constexpr int WIDEST = 64;  // bytes that a lane may bring to a rendezvous of its warp

void wait_for_block(Place at);                       // __syncthreads
int count_in_block(bool vote, Place at);             // __syncthreads_count
// Each lane of `mask` brings `bytes`; returns what they brought, WIDEST bytes for each of 32 lanes.
const unsigned char* wait_for_warp(unsigned mask, const void* mine, size_t bytes, const char* what, Place at);
// Asynchronous copies to shared memory, of this thread: asked for, closed as a group, waited for but for `keep` groups.
void copy_later(void* to, const void* from, size_t bytes, void* pc);
void commit_copies();
void finish_copies(unsigned keep);
// The products of a warpgroup (emulated_wgmma.cpp), asked for and waited for alike, and the two fences that they need.
unsigned shared_address(const void* p);
void fence_proxy();
void fence_sums();
void multiply_later(float* sum, unsigned columns, uint64_t a, uint64_t b, float (*number_at)(const void*), Place at,
                    void* pc);
void commit_products();
void finish_products(unsigned keep, Place at);
#ifdef WATCHED  // what g++ does not see as a load or a store of the kernel, at the instruction `pc`
void watch(const void* p, size_t bytes, bool write, void* pc);
void watch_atomic(const void* p, size_t bytes, void* pc);
#else
inline void watch(const void*, size_t, bool, void*) {}
inline void watch_atomic(const void*, size_t, void*) {}
#endif
void fail(Place at, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <class T> EMULATOR T from_memory(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}
template <class T> EMULATOR T from_lane(const unsigned char* all, int lane) {
    return from_memory<T>(all + lane * WIDEST);
}

EMULATOR int lane() { return thread.number % 32; }

}  // namespace emulator

inline __nv_bfloat16::operator float() const {
    emulator::watch(this, 2, false, __builtin_return_address(0));
    return float_of_bfloat16(bits);
}

#define threadIdx (emulator::thread.index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
constexpr int warpSize = 32;
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared)

EMULATOR void __syncthreads(HERE) { emulator::wait_for_block(at); }
EMULATOR int __syncthreads_count(int vote, HERE) { return emulator::count_in_block(vote, at); }
EMULATOR int __syncthreads_or(int vote, HERE) { return emulator::count_in_block(vote, at) > 0; }
EMULATOR void __syncwarp(unsigned mask = ~0u, HERE) { emulator::wait_for_warp(mask, nullptr, 0, "__syncwarp", at); }
EMULATOR void __threadfence() {}
EMULATOR void __threadfence_block() {}

// ------------------------------------------------------------------ shuffles and votes

template <class T> EMULATOR T __shfl_sync(unsigned mask, T mine, int lane, int width = 32, HERE) {
    const unsigned char* all = emulator::wait_for_warp(mask, &mine, sizeof(T), "__shfl_sync", at);
    int from = (emulator::lane() & ~(width - 1)) + (lane & (width - 1));
    if (!(mask >> from & 1)) emulator::fail(at, "__shfl_sync asks lane %d, which the mask %#x leaves out", from, mask);
    return emulator::from_lane<T>(all, from);
}
template <class T> EMULATOR T __shfl_xor_sync(unsigned mask, T mine, int bits, int width = 32, HERE) {
    int from = emulator::lane() ^ bits;
    bool inside = (from & ~(width - 1)) == (emulator::lane() & ~(width - 1));
    return __shfl_sync(mask, mine, inside ? from : emulator::lane(), 32, at);
}
template <class T> EMULATOR T __shfl_down_sync(unsigned mask, T mine, unsigned by, int width = 32, HERE) {
    int place = emulator::lane() & (width - 1);
    return __shfl_sync(mask, mine, emulator::lane() + (place + (int)by < width ? (int)by : 0), 32, at);
}
template <class T> EMULATOR T __shfl_up_sync(unsigned mask, T mine, unsigned by, int width = 32, HERE) {
    int place = emulator::lane() & (width - 1);
    return __shfl_sync(mask, mine, emulator::lane() - (place >= (int)by ? (int)by : 0), 32, at);
}
EMULATOR unsigned __ballot_sync(unsigned mask, int vote, HERE) {
    const unsigned char* all = emulator::wait_for_warp(mask, &vote, sizeof(vote), "__ballot_sync", at);
    unsigned found = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && emulator::from_lane<int>(all, i)) found |= 1u << i;
    return found;
}
EMULATOR int __any_sync(unsigned mask, int vote, HERE) { return __ballot_sync(mask, vote, at) != 0; }
EMULATOR int __all_sync(unsigned mask, int vote, HERE) { return __ballot_sync(mask, vote, at) == mask; }

// ------------------------------------------------------------------ atomics: one thread runs at a time

template <class T, class F> EMULATOR T atomically(T* p, F change, void* pc) {
    emulator::watch_atomic(p, sizeof(T), pc);
    T old = *p;
    *p = change(old);
    return old;
}
#define ATOMIC(name, result)                                                                    \
    template <class T> __attribute__((noinline, no_sanitize("thread"))) T name(T* p, T v) {      \
        return atomically(p, [v](T old) { return (T)(result); }, __builtin_return_address(0));   \
    }
ATOMIC(atomicAdd, old + v)
ATOMIC(atomicMax, old > v ? old : v)
ATOMIC(atomicMin, old < v ? old : v)
ATOMIC(atomicOr, old | v)
ATOMIC(atomicExch, ((void)old, v))
template <class T> __attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* p, T expected, T v) {
    return atomically(p, [=](T old) { return old == expected ? v : old; }, __builtin_return_address(0));
}
