// The matrix product by warpgroups (Hopper): C (m x n) = A (m x k) B (k x n), fp16 or bf16, sums in fp32.
// for sm_90a
//
// `wgmma` takes both matrices from shared memory and is asynchronous: no thread loads what it multiplies, and while the
// tensor cores work on one pair of tiles, the same threads ask for the pair after next. Two warpgroups share a tile of
// B. 128 x 256 sums are what their registers hold; A is then read half as often as for 128 x 128.
//
// Tiles come by cp.async, and not by Hopper's copy engine (TMA). That would spare each thread a dozen copies for 64
// numbers of depth, which the tensor cores' work is meant to hide; but it takes a tensor map, which only the driver can
// make. Here the swizzle and the zeros past the edges are in sight, and all of it runs in the emulator.
#include "narrow.cuh"
#include "wgmma.cuh"

#ifndef STAGES
#define STAGES 4    // pairs of tiles: one is read, one may still be, the others are on their way
#endif
#ifndef BLOCK_N
#define BLOCK_N 256  // columns of C that a block computes
#endif
#define BLOCK_M 128  // and rows: 64 for each of two warpgroups
#define BLOCK_K 64   // numbers in 128 bytes, a row of the swizzle
#define TILE_A (BLOCK_M * BLOCK_K)
#define TILE_B (BLOCK_K * BLOCK_N)
#define PITCH_C (BLOCK_N + 8)  // numbers from row to row: 8 rows of 16 bytes then lie in different banks
#define THREADS 256
#define ALIGNED 1024  // bytes: where the swizzle begins anew

// k and n are multiples of 8: 16 bytes are copied at once.
// at most 168 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
gemm_wgmma(const narrow* a, const narrow* b, narrow* c, int m, int n, int k) {
    DYNAMIC_SHARED(unsigned char, raw);
    narrow* const tiles_a = reinterpret_cast<narrow*>(raw + (-shared_address(raw) & (ALIGNED - 1)));
    narrow* const tiles_b = tiles_a + STAGES * TILE_A;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, group = t / 128;
    const int row = blockIdx.y * BLOCK_M, column = blockIdx.x * BLOCK_N;
    float sum[BLOCK_N / 2] = {};

    // Each thread brings one piece of 16 bytes after the other, of rows that lie a multiple of 8 apart: its place in
    // the swizzle stays the same, and a step further on all is BLOCK_K numbers deeper.
    const int r = t / 8, s = t % (BLOCK_N / 8) * 8, d = t / (BLOCK_N / 8);
    const narrow* from_a = a + (size_t)(row + r) * k + t % 8 * 8;
    const narrow* from_b = b + (size_t)d * n + column + s;
    int deep = 0;
    auto fetch = [&](int stage) {
        narrow* const to_a = tiles_a + stage * TILE_A + swizzled(r, t % 8);
        narrow* const to_b = tiles_b + stage * TILE_B + s / 64 * BLOCK_K * 64 + swizzled(d, s / 8 % 8);
#pragma unroll
        for (int i = 0; i < BLOCK_M; i += THREADS / 8) {
            const bool inside = row + r + i < m && deep + t % 8 * 8 < k;
            cp_async16(to_a + i * 64, inside ? from_a + (size_t)i * k : a, inside);
        }
#pragma unroll
        for (int i = 0; i < BLOCK_K; i += THREADS / (BLOCK_N / 8)) {
            const bool inside = deep + d + i < k && column + s < n;
            cp_async16(to_b + i * 64, inside ? from_b + (size_t)i * n : b, inside);
        }
        deep += BLOCK_K, from_a += BLOCK_K, from_b += (size_t)BLOCK_K * n;
    };

    const int steps = (k + BLOCK_K - 1) / BLOCK_K;
    for (int stage = 0; stage < STAGES - 2; stage++) {
        if (stage < steps) fetch(stage);
        cp_commit();  // a group for each step, empty ones too: so that counting groups counts steps
    }

    int step = 0;
    do {  // k is not 0: of a loop that might do nothing, ptxas may make products that wait for each other (C7515)
        cp_wait<STAGES - 3>();
        fence_proxy_async();
        __syncthreads();  // all have their part of this step's tiles; and all products are done but the last step's
        const narrow* const tile_a = tiles_a + step % STAGES * TILE_A + group * 64 * BLOCK_K;
        const narrow* const tile_b = tiles_b + step % STAGES * TILE_B;
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < BLOCK_K; d += 16)  // 32 bytes along each row of A, 16 rows of B
            wgmma<BLOCK_N, narrow>(sum, swizzled_128b(tile_a + d, 0, 8 * 128),
                           swizzled_128b(tile_b + d * 64, BLOCK_K * 128, 8 * 128));
        wgmma_commit();
        if (step + STAGES - 2 < steps) fetch((step + STAGES - 2) % STAGES);
        cp_commit();
        wgmma_wait<1>();  // this step's products go on
    } while (++step < steps);
    wgmma_wait<0>();
    wgmma_done(sum);
    __syncthreads();  // nobody reads the tiles any more: through their place, C leaves in whole sectors
    narrow* const mine = tiles_a + warp * 16 * PITCH_C;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; i += 2)  // each warp has 16 rows, as mma_16x8x16 hands them to its lanes
        store2(mine + (lane / 4 + i / 2 % 2 * 8) * PITCH_C + i / 4 * 8 + lane % 4 * 2,
               make_float2(sum[i], sum[i + 1]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * BLOCK_N / 8; i += 32) {
        const int y = (i + lane) / (BLOCK_N / 8), x = (i + lane) % (BLOCK_N / 8) * 8;
        if (row + warp * 16 + y < m && column + x < n)
            copy16(c + (size_t)(row + warp * 16 + y) * n + column + x, mine + y * PITCH_C + x);
    }
}
