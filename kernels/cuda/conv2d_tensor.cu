// Convolution, and the gradient of its weights, on tensor cores: fp16 or bf16, sums in fp32; as in gemm_tensor.cu,
// where the left matrix is the columns of conv2d.cu, which are never made.
//
// An asynchronous copy brings 8 channels of one pixel at a time (c is a multiple of 8), past the registers; for a
// pixel outside of its image it writes zeros and reads nothing. One group.
//
// The gradient of the images is conv2d_tensor, too: for stride 1 it is the convolution of gy with the weights turned by
// 180 degrees, and with a stride one such convolution for each phase of it (conv2d.py).
#include "mma_tile.cuh"

#ifndef STAGES
#define STAGES 3    // pairs of tiles in shared memory
#endif
#define BLOCK_M 128  // rows of the product that a block computes, by 2 rows of
#define BLOCK_N 64   // and columns, by 2 columns of warps: networks for small images begin with 64 channels
#define BLOCK_K 32
#define WARP_M 64
#define WARP_N 32
#define THREADS 128
#define PITCH_A (BLOCK_K + 8)  // numbers from row to row: 8 rows of 16 bytes then lie in different banks
#define PITCH_T (BLOCK_M + 8)  // of the left tile where it lies transposed
#define PITCH_B (BLOCK_N + 8)
#define OUTSIDE (-(1 << 30))   // a row of an image where no kernel reaches back into it

__device__ __forceinline__ float2 plus(float2 v, const narrow* more) {
    const float2 m = load2(more);
    return make_float2(v.x + m.x, v.y + m.y);
}

// y (m x o) = relu?(columns (m x kh kw c) times w + bias + residual); m positions of windows. A thread always copies
// the same four rows of the left tile, and one column, whose tap moves on by additions.
// at most 128 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_tensor(const narrow* x, const narrow* w, const narrow* bias, const narrow* residual, narrow* y, int m,
              int height, int width, int c, int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph, int pw,
              int dh, int dw, int relu) {
    DYNAMIC_SHARED(narrow, tiles);
    narrow* const tiles_b = tiles + STAGES * BLOCK_M * PITCH_A;
    const int across_blocks = (o + BLOCK_N - 1) / BLOCK_N, depth = kh * kw * c;
    const int row = blockIdx.x / across_blocks * BLOCK_M, column = blockIdx.x % across_blocks * BLOCK_N;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int warp_row = warp / 2 * WARP_M, warp_column = warp % 2 * WARP_N;
    int image[4], top[4], left[4], channel = t % 4 * 8, down = 0, across = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int position = row + t / 4 + i * 32;
        image[i] = position / ow / oh;
        top[i] = position < m ? position / ow % oh * sh - ph : OUTSIDE;
        left[i] = position % ow * sw - pw;
    }
    float sum[WARP_M / 16][WARP_N / 8][4] = {};

    auto fetch = [&](int step, int stage) {  // of step 0, 1, 2, ...
        const int first = step * BLOCK_K;
        narrow* const to_a = tiles + stage * BLOCK_M * PITCH_A;
        narrow* const to_b = tiles_b + stage * BLOCK_K * PITCH_B;
        while (channel >= c && down < kh) {
            channel -= c;
            if (++across == kw) across = 0, down++;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = top[i] + down * dh, s = left[i] + across * dw;
            const bool inside = down < kh && r >= 0 && r < height && s >= 0 && s < width;
            const narrow* const from = inside ? x + (((size_t)image[i] * height + r) * width + s) * c + channel : x;
            cp_async16(to_a + (t / 4 + i * 32) * PITCH_A + t % 4 * 8, from, inside);
        }
        channel += BLOCK_K;
#pragma unroll
        for (int i = 0; i < BLOCK_K * BLOCK_N / 8 / THREADS; i++) {
            const int piece = t + i * THREADS, d = piece / (BLOCK_N / 8), s = piece % (BLOCK_N / 8) * 8;
            const bool inside = first + d < depth && column + s < o;
            cp_async16(to_b + d * PITCH_B + s, inside ? w + (size_t)(first + d) * o + column + s : w, inside);
        }
    };

    pipelined<STAGES>((depth + BLOCK_K - 1) / BLOCK_K, fetch, [&](int stage) {
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
                if (r >= m || s >= o) continue;
                const size_t at = (size_t)r * o + s;
                float2 v = make_float2(sum[i][j][h * 2], sum[i][j][h * 2 + 1]);
                if (bias) v = plus(v, bias + s);
                if (residual) v = plus(v, residual + at);
                if (relu) v = make_float2(v.x <= 0 ? 0 : v.x, v.y <= 0 ? 0 : v.y);  // NaN stays NaN
                store2(y + at, v);
            }
}

// parts (blocks along z, kh kw c, o) = columns, transposed, times gy: each block along z for `span` of the m
// positions. The left tile comes as it lies, a position to a row, and is transposed on its way to the registers. A
// thread always copies the same column of it, one tap and 8 channels, and moves on through positions.
// at most 128 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_grad_w_tensor(const narrow* gy, const narrow* x, float* parts, int m, int span, int height, int width, int c,
                     int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph, int pw, int dh, int dw) {
    DYNAMIC_SHARED(narrow, tiles);
    narrow* const tiles_b = tiles + STAGES * BLOCK_K * PITCH_T;
    const int across_blocks = (o + BLOCK_N - 1) / BLOCK_N, depth = kh * kw * c;
    const int row = blockIdx.x / across_blocks * BLOCK_M, column = blockIdx.x % across_blocks * BLOCK_N;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int warp_row = warp / 2 * WARP_M, warp_column = warp % 2 * WARP_N;
    const int k = row + t % 16 * 8, channel = k % c, down = k / c / kw * dh - ph, right = k / c % kw * dw - pw;
    const int begin = blockIdx.z * span, end = min(m, begin + span), mine = t / 16 * 4;
    int image = (begin + mine) / ow / oh, p = (begin + mine) / ow % oh, q = (begin + mine) % ow;
    float sum[WARP_M / 16][WARP_N / 8][4] = {};

    auto fetch = [&](int step, int stage) {  // of step 0, 1, 2, ...
        const int first = begin + step * BLOCK_K;
        narrow* const to_a = tiles + stage * BLOCK_K * PITCH_T;
        narrow* const to_b = tiles_b + stage * BLOCK_K * PITCH_B;
        int image_of = image, p_of = p, q_of = q;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = p_of * sh + down, s = q_of * sw + right;
            const bool inside = k < depth && first + mine + i < end && r >= 0 && r < height && s >= 0 && s < width;
            const narrow* const from = inside ? x + (((size_t)image_of * height + r) * width + s) * c + channel : x;
            cp_async16(to_a + (mine + i) * PITCH_T + t % 16 * 8, from, inside);
            if (++q_of == ow) {
                q_of = 0;
                if (++p_of == oh) p_of = 0, image_of++;
            }
        }
        for (q += BLOCK_K; q >= ow; q -= ow)
            if (++p == oh) p = 0, image++;
#pragma unroll
        for (int i = 0; i < BLOCK_K * BLOCK_N / 8 / THREADS; i++) {
            const int piece = t + i * THREADS, d = piece / (BLOCK_N / 8), s = piece % (BLOCK_N / 8) * 8;
            const bool inside = first + d < end && column + s < o;
            cp_async16(to_b + d * PITCH_B + s, inside ? gy + (size_t)(first + d) * o + column + s : gy, inside);
        }
    };

    pipelined<STAGES>((end - begin + BLOCK_K - 1) / BLOCK_K, fetch, [&](int stage) {
        const narrow* const tile_a = tiles + stage * BLOCK_K * PITCH_T;
        const narrow* const tile_b = tiles_b + stage * BLOCK_K * PITCH_B;
        multiply_warp<WARP_M / 16, WARP_N / 8, BLOCK_K, PITCH_T, PITCH_B, true>(tile_a + warp_row, tile_b + warp_column,
                                                                               lane, sum);
    });
#pragma unroll
    for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row + warp_row + i * 16 + lane / 4 + h * 8;
                const int s = column + warp_column + j * 8 + lane % 4 * 2;
                if (r >= depth || s >= o) continue;
                const float2 v = make_float2(sum[i][j][h * 2], sum[i][j][h * 2 + 1]);
                *reinterpret_cast<float2*>(parts + ((size_t)blockIdx.z * depth + r) * o + s) = v;
            }
}
