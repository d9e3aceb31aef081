// Kernels with a mistake each, and some without, for test_emulated.py.
#include "ptx.cuh"

extern "C" __global__ void adds(const float* x, const float* y, float* z, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) z[i] = x[i] + y[i];
}

extern "C" __global__ void beyond(float* x, int n) { x[threadIdx.x + 1] = 2; }  // HERE beyond

extern "C" __global__ void before(const float* x, float* y) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }  // HERE before

extern "C" __global__ void misaligned(const float* x, float* y) { store4(y, load4(x + 1)); }  // HERE misaligned

extern "C" __global__ void index_of_an_array(float* x, int first) {
    __shared__ float s[32];
    s[threadIdx.x + first] = 1;  // HERE index_of_an_array
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void beyond_dynamic(float* x) {
    DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = 1;  // HERE beyond_dynamic
    x[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void uninitialised(float* x) {
    __shared__ float s[64];
    if (threadIdx.x) s[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];  // HERE uninitialised
}

// What another block has left there is nobody's.
extern "C" __global__ void uninitialised_in_the_next_block(float* x) {
    __shared__ float s[32];
    if (blockIdx.x == 0) s[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];  // HERE uninitialised_in_the_next_block
}

extern "C" __global__ void race(float* x) {
    __shared__ float s[64];
    s[threadIdx.x] = 0;
    __syncthreads();
    s[threadIdx.x] = x[threadIdx.x];  // HERE race
    x[threadIdx.x] = s[63 - threadIdx.x];  // HERE race
}

extern "C" __global__ void race_after_reading(float* x) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[63 - threadIdx.x];  // HERE race_after_reading
    s[threadIdx.x] = 0;  // HERE race_after_reading
}

// All read one number, and then one thread overwrites it.
extern "C" __global__ void race_with_many_readers(float* x) {
    __shared__ float s[1];
    if (threadIdx.x == 0) s[0] = 1;
    __syncthreads();
    x[threadIdx.x] = s[0];
    if (threadIdx.x == 63) s[0] = 2;  // HERE race_with_many_readers
}

// A warp's lanes do not run in step: without __syncwarp() this is a race, too.
extern "C" __global__ void race_within_a_warp(float* x, int synchronise) {
    __shared__ float s[32];
    s[threadIdx.x] = 0;
    __syncwarp();
    s[threadIdx.x] = x[threadIdx.x];  // HERE race_within_a_warp
    if (synchronise) __syncwarp();
    x[threadIdx.x] = s[31 - threadIdx.x];  // HERE race_within_a_warp
}

extern "C" __global__ void race_of_blocks(float* x) { x[threadIdx.x] = blockIdx.x; }  // HERE race_of_blocks

// The copy is on its way, and nobody has waited for it.
extern "C" __global__ void too_early(const float* x, float* y, int wait) {
    __shared__ __align__(16) float s[128];
    cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4, true);
    cp_commit();
    if (wait) cp_wait<0>();
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];  // HERE too_early
}

extern "C" __global__ void divergent(float* x) {
    if (threadIdx.x < 16) __syncthreads();  // HERE divergent
    x[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(float* x) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();  // HERE two_barriers
    x[threadIdx.x] = 1;
}

extern "C" __global__ void halves_of_a_warp(float* x) {
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0);
    if (threadIdx.x >= 16) x[threadIdx.x] = __shfl_sync(~0u, 2.0f, 0);  // HERE halves_of_a_warp
}

extern "C" __global__ void missing_lane(float* x) {
    if (threadIdx.x == 5) return;
    x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);  // HERE missing_lane
}

extern "C" __global__ void not_in_its_mask(float* x) {
    x[threadIdx.x] = __shfl_sync(0xffff, x[threadIdx.x], 0);  // HERE not_in_its_mask
}

// ------------------------------------------------------------------ without a mistake

// Each warp by shuffles, the warps by an atomic.
extern "C" __global__ void sum(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = i < n ? x[i] : 0;
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    if (threadIdx.x % 32 == 0) atomicAdd(y, v);
}

extern "C" __global__ void warp_functions(const int* x, int* y) {
    const int lane = threadIdx.x % 32, v = x[threadIdx.x];
    y[threadIdx.x * 10 + 0] = __shfl_up_sync(~0u, v, 3);
    y[threadIdx.x * 10 + 1] = __shfl_down_sync(~0u, v, 5);
    y[threadIdx.x * 10 + 2] = __shfl_xor_sync(~0u, v, 6, 8);
    y[threadIdx.x * 10 + 3] = __shfl_sync(~0u, v, 9, 16);
    y[threadIdx.x * 10 + 4] = (int)__ballot_sync(~0u, v % 3 == 0);
    y[threadIdx.x * 10 + 5] = __any_sync(~0u, v == 7) + 2 * __all_sync(~0u, v >= 0);
    y[threadIdx.x * 10 + 6] = __syncthreads_count(v % 2);
    y[threadIdx.x * 10 + 7] = lane < 16 ? __shfl_sync(0xffff, v, 3) : __shfl_sync(0xffff0000, v, 20);
    y[threadIdx.x * 10 + 8] = __popc(v) + 100 * __clz(v) + 10000 * __ffs(v);
    y[threadIdx.x * 10 + 9] = __syncthreads_or(v == 40);
}

extern "C" __global__ void strided(const float* x, float* y, int step) {
    __shared__ float s[32 * 33];
    s[threadIdx.x * step] = x[threadIdx.x * step];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x * step];
}

extern "C" __global__ void every_type(double* a, half* b, long long* c, unsigned* d, unsigned char* e, float f, int g) {
    a[0] = f;
    b[0] = __float2half(f);
    c[0] = 1ll << 40;
    d[0] = ~0u;
    e[0] = g;
}
