// The matrix product on a GPU, from a loop for each number on. C (m x n) = A (m x k) B (k x n), row by row.
//
// Each rung changes where the numbers come from; the multiplications are the same. A number of A is needed by n sums
// and a number of B by m: the rungs differ in how often it is fetched for them, and from where.
#include "gemm_tile.cuh"

// ------------------------------------------------------------------ one thread, one sum

// Neighbouring threads take neighbouring rows: what they load from A lies k numbers apart, a sector for each.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void gemm_naive(const float* a, const float* b, float* c, int m, int n, int k) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x, column = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= m || column >= n) return;
    float sum = 0;
    for (int i = 0; i < k; i++) sum += a[(size_t)row * k + i] * b[(size_t)i * n + column];
    c[(size_t)row * n + column] = sum;
}

// Neighbouring threads take neighbouring columns: 32 numbers of B are 4 sectors, and one number of A serves the warp.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void gemm_coalesced(const float* a, const float* b, float* c, int m, int n, int k) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= m || column >= n) return;
    float sum = 0;
    for (int i = 0; i < k; i++) sum += a[(size_t)row * k + i] * b[(size_t)i * n + column];
    c[(size_t)row * n + column] = sum;
}

// ------------------------------------------------------------------ a tile in shared memory

#ifndef TILE
#define TILE 32  // threads along each side of a block: each number that is loaded serves as many sums
#endif

// at most 40 registers, 8,192 bytes of shared memory
extern "C" __global__ void __launch_bounds__(TILE * TILE)
gemm_tiled(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ float tile_a[TILE][TILE], tile_b[TILE][TILE];
    const int x = threadIdx.x, y = threadIdx.y, column = blockIdx.x * TILE + x, row = blockIdx.y * TILE + y;
    float sum = 0;
    for (int first = 0; first < k; first += TILE) {
        tile_a[y][x] = row < m && first + x < k ? a[(size_t)row * k + first + x] : 0;
        tile_b[y][x] = first + y < k && column < n ? b[(size_t)(first + y) * n + column] : 0;
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += tile_a[y][i] * tile_b[i][x];
        __syncthreads();  // before anybody overwrites what others still read
    }
    if (row < m && column < n) c[(size_t)row * n + column] = sum;
}

// ------------------------------------------------------------------ a tile of sums in registers

#ifndef BLOCK_M
#define BLOCK_M 64  // rows of C that a block computes,
#define BLOCK_N 64  // columns,
#define BLOCK_K 16  // and how many numbers deep its tiles in shared memory are
#define THREAD_M 4  // rows of C that a thread keeps in registers: THREAD_M + THREAD_N loads for their product of sums
#define THREAD_N 4
#endif
#define THREADS (BLOCK_M / THREAD_M * (BLOCK_N / THREAD_N))

// at most 80 registers, 8,448 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
gemm_registers(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ float tile_a[BLOCK_K][BLOCK_M + 2], tile_b[BLOCK_K][BLOCK_N];  // + 2: a column lies in many banks
    const int t = threadIdx.x, row = blockIdx.y * BLOCK_M, column = blockIdx.x * BLOCK_N;
    const int y = t / (BLOCK_N / THREAD_N) * THREAD_M, x = t % (BLOCK_N / THREAD_N);
    float sum[THREAD_M][THREAD_N] = {};
    for (int first = 0; first < k; first += BLOCK_K) {
        for (int i = t; i < BLOCK_M * BLOCK_K; i += THREADS) {
            const int r = i / BLOCK_K, d = i % BLOCK_K;
            tile_a[d][r] = row + r < m && first + d < k ? a[(size_t)(row + r) * k + first + d] : 0;
        }
        for (int i = t; i < BLOCK_K * BLOCK_N; i += THREADS) {
            const int d = i / BLOCK_N, s = i % BLOCK_N;
            tile_b[d][s] = first + d < k && column + s < n ? b[(size_t)(first + d) * n + column + s] : 0;
        }
        __syncthreads();
        for (int d = 0; d < BLOCK_K; d++) {
            float of_a[THREAD_M], of_b[THREAD_N];
#pragma unroll
            for (int i = 0; i < THREAD_M; i++) of_a[i] = tile_a[d][y + i];
#pragma unroll
            for (int j = 0; j < THREAD_N; j++) of_b[j] = tile_b[d][x + j * (BLOCK_N / THREAD_N)];
#pragma unroll
            for (int i = 0; i < THREAD_M; i++)
#pragma unroll
                for (int j = 0; j < THREAD_N; j++) sum[i][j] += of_a[i] * of_b[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < THREAD_M; i++)
#pragma unroll
        for (int j = 0; j < THREAD_N; j++) {
            const int r = row + y + i, s = column + x + j * (BLOCK_N / THREAD_N);
            if (r < m && s < n) c[(size_t)r * n + s] = sum[i][j];
        }
}

// ------------------------------------------------------------------ four numbers an instruction

#define WIDE 128  // rows and columns of C that a block computes

// k and n are multiples of 4. The tile is in gemm_tile.cuh, where conv2d.cu and winograd.cu have it from, too.
// at most 144 registers, 16,896 bytes of shared memory
extern "C" __global__ void __launch_bounds__(256)
gemm_vectorised(const float* a, const float* b, float* c, int m, int n, int k) {
    __shared__ __align__(16) float tile_a[2][DEEP][WIDE + 4], tile_b[2][DEEP][WIDE];
    gemm_tile<WIDE, WIDE>(tile_a, tile_b, a, b, c, m, n, k, blockIdx.y * WIDE, blockIdx.x * WIDE);
}
