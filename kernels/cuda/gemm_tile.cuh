// The tile of a matrix product that 8 x 8 sums a thread fill: of gemm.cu, conv2d.cu and winograd.cu. fp32.
#pragma once

#include "ptx.cuh"

#define DEEP 8  // numbers deep that a pair of tiles in shared memory is
#define EACH 8  // rows and columns that a thread keeps: two groups of four each, half of the tile apart

// The product of two tiles, added to the sums that this thread keeps.
template <int TALL, int WIDE>
__device__ __forceinline__ void multiply_wide(float (*tile_a)[TALL + 4], float (*tile_b)[WIDE], int y0, int x0,
                                              float (*sums)[EACH]) {
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
        float of_a[EACH], of_b[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i += 4) {
            *reinterpret_cast<float4*>(of_a + i) = load4(&tile_a[d][y0 + i * (TALL / 8)]);
            *reinterpret_cast<float4*>(of_b + i) = load4(&tile_b[d][x0 + i * (WIDE / 8)]);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++) sums[i][j] += of_a[i] * of_b[j];
    }
}

// The tile of C (m x n) = A (m x k) B (k x n) that begins at (row, column), by a block of TALL / 8 x WIDE / 8 threads.
// k and n are multiples of 4. While one pair of tiles is used, the next is on its way to registers and then to the
// other half of shared memory, which is the kernel's: the emulator does not know any that is a template's.
template <int TALL, int WIDE>
__device__ __forceinline__ void gemm_tile(float (*tile_a)[DEEP][TALL + 4], float (*tile_b)[DEEP][WIDE], const float* a,
                                          const float* b, float* c, int m, int n, int k, int row, int column) {
    constexpr int THREADS_OF_TILE = TALL / EACH * (WIDE / EACH);
    constexpr int LOADS_A = TALL * DEEP / 4 / THREADS_OF_TILE, LOADS_B = WIDE * DEEP / 4 / THREADS_OF_TILE;
    const int t = threadIdx.x, x0 = t % (WIDE / EACH) * 4, y0 = t / (WIDE / EACH) * 4;
    const int row_a = t / 2, deep_a = t % 2 * 4, deep_b = t / (WIDE / 4), column_b = t % (WIDE / 4) * 4;  // its loads
    const float4 none = make_float4(0, 0, 0, 0);
    float sums[EACH][EACH] = {};
    float4 next_a[LOADS_A], next_b[LOADS_B];

    auto fetch = [&](int first) {
#pragma unroll
        for (int i = 0; i < LOADS_A; i++) {
            const int r = row + row_a + i * (TALL / LOADS_A), d = first + deep_a;
            next_a[i] = r < m && d < k ? load4(a + (size_t)r * k + d) : none;
        }
#pragma unroll
        for (int i = 0; i < LOADS_B; i++) {
            const int d = first + deep_b + i * (DEEP / LOADS_B), s = column + column_b;
            next_b[i] = d < k && s < n ? load4(b + (size_t)d * n + s) : none;
        }
    };
    auto put = [&](int half) {
#pragma unroll
        for (int i = 0; i < LOADS_A; i++) {
            tile_a[half][deep_a + 0][row_a + i * (TALL / LOADS_A)] = next_a[i].x;
            tile_a[half][deep_a + 1][row_a + i * (TALL / LOADS_A)] = next_a[i].y;
            tile_a[half][deep_a + 2][row_a + i * (TALL / LOADS_A)] = next_a[i].z;
            tile_a[half][deep_a + 3][row_a + i * (TALL / LOADS_A)] = next_a[i].w;
        }
#pragma unroll
        for (int i = 0; i < LOADS_B; i++) store4(&tile_b[half][deep_b + i * (DEEP / LOADS_B)][column_b], next_b[i]);
    };

    fetch(0);
    put(0);
    __syncthreads();
    for (int first = 0, half = 0; first < k; first += DEEP, half ^= 1) {
        if (first + DEEP < k) fetch(first + DEEP);
        multiply_wide<TALL, WIDE>(tile_a[half], tile_b[half], y0, x0, sums);
        if (first + DEEP < k) put(half ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j += 4) {
            const int r = row + y0 + i % 4 + i / 4 * (TALL / 2), s = column + x0 + j * (WIDE / 8);
            if (r < m && s < n)
                store4(c + (size_t)r * n + s, make_float4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]));
        }
}
