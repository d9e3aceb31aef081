// The matrix product on tensor cores: C (m x n) = A (m x k) B (k x n), fp16 or bf16, sums in fp32.
//
// A warp multiplies 16 x 16 by 16 x 8 numbers in one instruction. What remains is to feed it: tiles come by
// asynchronous copies (cp.async) past the registers into shared memory, STAGES of them on their way at a time, and from
// there by `ldmatrix`, which hands each lane what the instruction wants of it.
#include "mma_tile.cuh"

#ifndef STAGES
#define STAGES 3    // pairs of tiles in shared memory
#endif
#define BLOCK_M 128  // rows of C that a block computes, by 2 rows of
#define BLOCK_N 128  // and columns, by 4 columns of warps
#ifndef BLOCK_K
#define BLOCK_K 32
#endif
#define WARP_M 64
#define WARP_N 32
#define PITCH_A (BLOCK_K + 8)  // numbers from row to row: 8 rows of 16 bytes then lie in different banks
#define PITCH_B (BLOCK_N + 8)

// k and n are multiples of 8: 16 bytes are copied at once.
// at most 168 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(256)
gemm_tensor(const narrow* a, const narrow* b, narrow* c, int m, int n, int k) {
    DYNAMIC_SHARED(narrow, tiles);
    narrow* const tiles_b = tiles + STAGES * BLOCK_M * PITCH_A;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int row = blockIdx.y * BLOCK_M, column = blockIdx.x * BLOCK_N;
    const int warp_row = warp / 4 * WARP_M, warp_column = warp % 4 * WARP_N;
    float sum[WARP_M / 16][WARP_N / 8][4] = {};

    auto fetch = [&](int step, int stage) {
        const int first = step * BLOCK_K;
        narrow* const to_a = tiles + stage * BLOCK_M * PITCH_A;
        narrow* const to_b = tiles_b + stage * BLOCK_K * PITCH_B;
#pragma unroll
        for (int i = 0; i < BLOCK_M * BLOCK_K / 8 / 256; i++) {
            const int piece = t + i * 256, r = piece / (BLOCK_K / 8), d = piece % (BLOCK_K / 8) * 8;
            const bool inside = row + r < m && first + d < k;
            cp_async16(to_a + r * PITCH_A + d, inside ? a + (size_t)(row + r) * k + first + d : a, inside);
        }
#pragma unroll
        for (int i = 0; i < BLOCK_K * BLOCK_N / 8 / 256; i++) {
            const int piece = t + i * 256, d = piece / (BLOCK_N / 8), s = piece % (BLOCK_N / 8) * 8;
            const bool inside = first + d < k && column + s < n;
            cp_async16(to_b + d * PITCH_B + s, inside ? b + (size_t)(first + d) * n + column + s : b, inside);
        }
    };

    pipelined<STAGES>((k + BLOCK_K - 1) / BLOCK_K, fetch, [&](int stage) {
        const narrow* const tile_a = tiles + stage * BLOCK_M * PITCH_A;
        const narrow* const tile_b = tiles_b + stage * BLOCK_K * PITCH_B;
        multiply_warp<WARP_M / 16, WARP_N / 8, BLOCK_K, PITCH_A, PITCH_B, false>(
            tile_a + warp_row * PITCH_A, tile_b + warp_column, lane, sum);
    });
#pragma unroll
    for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row + warp_row + i * 16 + lane / 4 + h * 8;
                const int s = column + warp_column + j * 8 + lane % 4 * 2;
                if (r < m && s < n)
                    store2(c + (size_t)r * n + s, make_float2(sum[i][j][h * 2], sum[i][j][h * 2 + 1]));
            }
}
