// Sums over the lanes of a warp, and over the rows of a matrix: each in an order that its shape alone determines.
#pragma once

#include "real.cuh"

// The sum, or the largest, of a warp's 32 lanes: a + b is b + a, so every lane has the same bits.
template <class T> __device__ __forceinline__ T warp_sum(T v) {
    for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
    return v;
}
template <class T> __device__ __forceinline__ T warp_max(T v) {
    for (int apart = 16; apart; apart /= 2) {
        const T other = __shfl_xor_sync(~0u, v, apart);
        v = other > v ? other : v;
    }
    return v;
}

// ------------------------------------------------------------------ over rows: reduce.py has the launch

// Neighbouring threads (x) take neighbouring columns; the rows of a block are shared by its threads' y.
#ifndef THREADS
#define THREADS 256  // of a block
#endif
#define COLUMN ((int)(blockIdx.x * blockDim.x + threadIdx.x))
#define ROWS_FROM ((long long)blockIdx.y * each + threadIdx.y)
#define ROWS_TO min(rows, (long long)(blockIdx.y + 1) * each)
// A block's part of a sum, in an array (sums, blocks, columns).
#define PARTIAL(which) (((size_t)(which) * gridDim.y + blockIdx.y) * columns + COLUMN)

// The sum of v over a block's threads of one column, for the thread whose y is 0. blockDim.y is a power of 2.
template <class T> __device__ __forceinline__ T sum_of_column(T v, T* space) {
    const int t = threadIdx.y * blockDim.x + threadIdx.x;
    space[t] = v;
    for (int half = blockDim.y / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) space[t] = v = v + space[t + half * blockDim.x];
    }
    return v;
}

// Sum blockIdx.y of `partial` (sums, blocks, columns), for the thread whose y is 0. In double: there may
// be a thousand parts, which are few beside what they were made of.
__device__ __forceinline__ double sum_of_parts(const sum* partial, int blocks, int columns, double* space) {
    double total = 0;
    if (COLUMN < columns)
        for (int b = threadIdx.y; b < blocks; b += blockDim.y)
            total += (double)partial[((size_t)blockIdx.y * blocks + b) * columns + COLUMN];
    return sum_of_column(total, space);
}
