// Convolution, and both of its gradients, as matrix products whose left matrix is never made: implicit GEMM.
//
// With the columns of im2col.cu, a convolution is one GEMM; but a 3 x 3 kernel writes each pixel nine times to memory
// and reads it back. Here the tiles' loader computes which pixel stands at a place of the columns, and takes it from
// the image; the nine times are served by caches. Images are (N, H, W, C), weights (KH, KW, C / groups, O). Tiles and
// sums are fp32 (fp64 for fp64).
#include "gemm_tile.cuh"
#include "real.cuh"

#ifndef BLOCK_M
#define BLOCK_M 64  // rows of the product that a block computes,
#define BLOCK_N 64  // columns,
#define BLOCK_K 16  // and how many numbers deep its tiles in shared memory are
#define THREAD_M 4  // rows that a thread keeps in registers: THREAD_M + THREAD_N loads for their product of sums
#define THREAD_N 4
#endif
#define THREADS (BLOCK_M / THREAD_M * (BLOCK_N / THREAD_N))
#define STEP (THREADS / BLOCK_K)              // from a thread's row of a tile to its next one
#define LOADS (BLOCK_M * BLOCK_K / THREADS)   // numbers of a tile that each thread brings
#define OUTSIDE (-(1 << 30))                  // a row of an image where no kernel reaches back into it

// relu?(v + bias + residual) at place i of an array; bias and residual may be null.
__device__ __forceinline__ real finished(sum v, const real* bias, const real* residual, int relu, int channel,
                                         size_t i) {
    if (bias) v += (sum)bias[channel];
    if (residual) v += (sum)residual[i];
    return (real)(relu && v <= 0 ? (sum)0 : v);  // NaN stays NaN
}

// ------------------------------------------------------------------ one thread, one sum

// Neighbouring threads take neighbouring output channels: they share each pixel, and read neighbouring weights. Two
// loads for each multiplication; but where groups are small (depthwise), there is little that a tile could share.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void conv2d_naive(const real* x, const real* w, const real* bias, const real* residual,
                                        real* y, int height, int width, int c, int kh, int kw, int o, int oh,
                                        int ow, int sh, int sw, int ph, int pw, int dh, int dw, int groups,
                                        int relu, long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int position = i / o, channel = i % o, image = position / ow / oh;
    const int top = position / ow % oh * sh - ph, left = position % ow * sw - pw;
    const int deep = c / groups, first = channel / (o / groups) * deep;
    sum total = 0;
    for (int k = 0; k < kh; k++)
        for (int j = 0; j < kw; j++) {
            const int r = top + k * dh, s = left + j * dw;
            if (r < 0 || r >= height || s < 0 || s >= width) continue;
            const real* const pixel = x + (((size_t)image * height + r) * width + s) * c + first;
            const real* const weights = w + (size_t)(k * kw + j) * deep * o + channel;
            for (int d = 0; d < deep; d++) total += (sum)pixel[d] * (sum)weights[(size_t)d * o];
        }
    y[i] = finished(total, bias, residual, relu, channel, i);
}

// Neighbouring threads take neighbouring input channels, whose weights lie o numbers apart: a sector for each.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void conv2d_grad_x_naive(const real* gy, const real* w, const real* residual, real* gx,
                                               int height, int width, int c, int kh, int kw, int o, int oh, int ow,
                                               int sh, int sw, int ph, int pw, int dh, int dw, int groups,
                                               long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int pixel = i / c, channel = i % c, image = pixel / width / height;
    const int r = pixel / width % height, s = pixel % width;
    const int of_group = c / groups, outs = o / groups, first = channel / of_group * outs;
    sum total = 0;
    for (int k = 0; k < kh; k++) {
        const int below = r + ph - k * dh, p = below / sh;
        if (below < 0 || below % sh || p >= oh) continue;
        for (int j = 0; j < kw; j++) {
            const int right = s + pw - j * dw, q = right / sw;
            if (right < 0 || right % sw || q >= ow) continue;
            const real* const from = gy + (((size_t)image * oh + p) * ow + q) * o + first;
            const real* const weights = w + ((size_t)(k * kw + j) * of_group + channel % of_group) * o + first;
            for (int d = 0; d < outs; d++) total += (sum)from[d] * (sum)weights[d];
        }
    }
    gx[i] = finished(total, nullptr, residual, 0, channel, i);
}

// A thread for each weight goes through `span` of the m positions. Neighbours take neighbouring output channels: gy
// comes in whole sectors, and x too where each channel is a group (depthwise); else they share a number of x. Two loads
// for each multiplication. 9 x 64 x 64 weights are few threads for a GPU, so blockIdx.y is a part of the positions, and
// add_up() adds the parts; one part is the result, but for fp16, whose parts are fp32.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void conv2d_grad_w_naive(const real* gy, const real* x, sum* parts, int m, int span, int height,
                                               int width, int c, int kh, int kw, int o, int oh, int ow, int sh,
                                               int sw, int ph, int pw, int dh, int dw, int groups,
                                               long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int deep = c / groups, channel = i % o, of_x = i / o % deep + channel / (o / groups) * deep;
    const int tap = i / o / deep, down = tap / kw * dh - ph, right = tap % kw * dw - pw;
    const int begin = blockIdx.y * span, end = min(m, begin + span);
    int image = begin / ow / oh, p = begin / ow % oh, q = begin % ow;
    sum total = 0;
    for (int position = begin; position < end; position++) {
        const int r = p * sh + down, s = q * sw + right;
        const size_t pixel = ((size_t)image * height + r) * width + s;
        if (r >= 0 && r < height && s >= 0 && s < width)
            total += (sum)x[pixel * c + of_x] * (sum)gy[(size_t)position * o + channel];
        if (++q == ow) {
            q = 0;
            if (++p == oh) p = 0, image++;
        }
    }
    parts[blockIdx.y * count + i] = total;
}

// ------------------------------------------------------------------ tiles, as in gemm_registers

// The product of two tiles, added to the sums that this thread keeps: rows y0 on, and each (BLOCK_N / THREAD_N)-th
// column.
__device__ __forceinline__ void multiply(sum (*tile_a)[BLOCK_M + 2], sum (*tile_b)[BLOCK_N + 2], int y0, int x0,
                                         sum (*sums)[THREAD_N]) {
    for (int d = 0; d < BLOCK_K; d++) {
        sum of_a[THREAD_M], of_b[THREAD_N];
#pragma unroll
        for (int i = 0; i < THREAD_M; i++) of_a[i] = tile_a[d][y0 + i];
#pragma unroll
        for (int j = 0; j < THREAD_N; j++) of_b[j] = tile_b[d][x0 + j * (BLOCK_N / THREAD_N)];
#pragma unroll
        for (int i = 0; i < THREAD_M; i++)
#pragma unroll
            for (int j = 0; j < THREAD_N; j++) sums[i][j] += of_a[i] * of_b[j];
    }
}

// Columns (m x k) times weights (k x o): m positions of windows, k = kh kw c / groups. A thread always brings the
// same rows of the tile, so where their windows lie is computed once; and always one column, whose tap moves on by
// additions. blockIdx.y is the group. Two more numbers in each row of a tile: what 16 threads then write to one
// column lies in different banks.
// at most 64 registers, 8,448 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_implicit(const real* x, const real* w, const real* bias, const real* residual, real* y, int m, int height,
                int width, int c, int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph, int pw, int dh,
                int dw, int groups, int relu) {
    __shared__ sum tile_a[BLOCK_K][BLOCK_M + 2], tile_b[BLOCK_K][BLOCK_N + 2];
    const int of_group = c / groups, outs = o / groups, depth = kh * kw * of_group, first_out = blockIdx.y * outs;
    const int across_blocks = (outs + BLOCK_N - 1) / BLOCK_N;
    const int row = blockIdx.x / across_blocks * BLOCK_M, column = blockIdx.x % across_blocks * BLOCK_N;
    const int t = threadIdx.x, y0 = t / (BLOCK_N / THREAD_N) * THREAD_M, x0 = t % (BLOCK_N / THREAD_N);
    int image[LOADS], top[LOADS], left[LOADS];  // of the windows whose numbers this thread brings
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int position = row + t / BLOCK_K + i * STEP;
        image[i] = position / ow / oh;
        top[i] = position < m ? position / ow % oh * sh - ph : OUTSIDE;
        left[i] = position % ow * sw - pw;
    }
    int channel = t % BLOCK_K, down = 0, across = 0;  // where this thread's column of the tile is in the window
    sum sums[THREAD_M][THREAD_N] = {};
    for (int first = 0; first < depth; first += BLOCK_K) {
        while (channel >= of_group && down < kh) {
            channel -= of_group;
            if (++across == kw) across = 0, down++;
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int r = top[i] + down * dh, s = left[i] + across * dw;
            const bool inside = down < kh && r >= 0 && r < height && s >= 0 && s < width;
            const size_t pixel = ((size_t)image[i] * height + r) * width + s;
            tile_a[t % BLOCK_K][t / BLOCK_K + i * STEP] =
                inside ? (sum)x[pixel * c + blockIdx.y * of_group + channel] : (sum)0;
        }
        channel += BLOCK_K;
        for (int i = t; i < BLOCK_K * BLOCK_N; i += THREADS) {
            const int d = i / BLOCK_N, s = i % BLOCK_N;
            const bool inside = first + d < depth && column + s < outs;
            tile_b[d][s] = inside ? (sum)w[(size_t)(first + d) * o + first_out + column + s] : (sum)0;
        }
        __syncthreads();
        multiply(tile_a, tile_b, y0, x0, sums);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < THREAD_M; i++)
#pragma unroll
        for (int j = 0; j < THREAD_N; j++) {
            const int r = row + y0 + i, s = column + x0 + j * (BLOCK_N / THREAD_N);
            const size_t at = (size_t)r * o + first_out + s;
            if (r < m && s < outs) y[at] = finished(sums[i][j], bias, residual, relu, first_out + s, at);
        }
}

// Each pixel gathers: gy at the windows that hold it, times the weights there. With a stride, a pixel meets only
// every sh-th row of taps, which ones depends on its row: so a block takes pixels of one phase (row % sh, column %
// sw), and goes through the taps that these meet; nothing is multiplied by zeros. blockIdx.y is the group and the
// phase.
// at most 80 registers, 8,448 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_grad_x_implicit(const real* gy, const real* w, const real* residual, real* gx, int n, int height, int width,
                       int c, int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph, int pw, int dh, int dw,
                       int groups) {
    __shared__ sum tile_a[BLOCK_K][BLOCK_M + 2], tile_b[BLOCK_K][BLOCK_N + 2];
    const int of_group = c / groups, outs = o / groups, group = blockIdx.y / (sh * sw);
    const int phase_r = blockIdx.y / sw % sh, phase_s = blockIdx.y % sw;
    const int rows = (height - phase_r + sh - 1) / sh, columns = (width - phase_s + sw - 1) / sw;
    const int m = n * rows * columns;
    const int across_blocks = (of_group + BLOCK_N - 1) / BLOCK_N;
    const int row = blockIdx.x / across_blocks * BLOCK_M, column = blockIdx.x % across_blocks * BLOCK_N;
    if (row >= m) return;  // the whole block: the first phase has the most pixels, and the grid is made for it
    const int t = threadIdx.x, y0 = t / (BLOCK_N / THREAD_N) * THREAD_M, x0 = t % (BLOCK_N / THREAD_N);
    int image[LOADS], u[LOADS], v[LOADS];  // of the pixels: the u-th row and v-th column of their phase
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int place = row + t / BLOCK_K + i * STEP;
        image[i] = place / columns / rows;
        u[i] = place < m ? place / columns % rows : OUTSIDE;
        v[i] = place % columns;
    }
    sum sums[THREAD_M][THREAD_N] = {};
    for (int tap = 0; tap < kh * kw; tap++) {
        const int down = phase_r + ph - tap / kw * dh, right = phase_s + pw - tap % kw * dw;
        if (down % sh || right % sw) continue;
        for (int first = 0; first < outs; first += BLOCK_K) {
            const int channel = first + t % BLOCK_K;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int p = u[i] + down / sh, q = v[i] + right / sw;
                const bool inside = channel < outs && p >= 0 && p < oh && q >= 0 && q < ow;
                const size_t position = ((size_t)image[i] * oh + p) * ow + q;
                tile_a[t % BLOCK_K][t / BLOCK_K + i * STEP] =
                    inside ? (sum)gy[position * o + group * outs + channel] : (sum)0;
            }
            for (int i = t; i < BLOCK_K * BLOCK_N; i += THREADS) {  // neighbours along o, as the weights lie
                const int s = column + i / BLOCK_K;
                const bool inside = channel < outs && s < of_group;
                tile_b[t % BLOCK_K][i / BLOCK_K] =
                    inside ? (sum)w[((size_t)tap * of_group + s) * o + group * outs + channel] : (sum)0;
            }
            __syncthreads();
            multiply(tile_a, tile_b, y0, x0, sums);
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < THREAD_M; i++) {
        const int place = row + y0 + i, r = phase_r + place / columns % rows * sh, s = phase_s + place % columns * sw;
        const size_t pixel = ((size_t)(place / columns / rows) * height + r) * width + s;
#pragma unroll
        for (int j = 0; j < THREAD_N; j++) {
            const int channel = column + x0 + j * (BLOCK_N / THREAD_N);
            const size_t at = pixel * c + group * of_group + channel;
            if (place < m && channel < of_group) gx[at] = finished(sums[i][j], nullptr, residual, 0, channel, at);
        }
    }
}

// Columns, transposed (k x m), times gy (m x o). k and o are small and m is large: all tiles of the result are too
// few blocks for a GPU. So blockIdx.z takes `span` of the m positions, a multiple of BLOCK_K, and its sums are one
// part of `parts` (parts, kh, kw, c / groups, o), which add_up() adds; one part is the result, but for fp16. A thread
// always brings the same row of the columns, one tap and channel, and moves on through positions. blockIdx.y is the
// group.
// at most 64 registers, 8,448 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_grad_w_implicit(const real* gy, const real* x, sum* parts, int m, int span, int height, int width, int c,
                       int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph, int pw, int dh, int dw,
                       int groups) {
    __shared__ sum tile_a[BLOCK_K][BLOCK_M + 2], tile_b[BLOCK_K][BLOCK_N + 2];
    const int of_group = c / groups, outs = o / groups, depth = kh * kw * of_group, first_out = blockIdx.y * outs;
    const int across_blocks = (outs + BLOCK_N - 1) / BLOCK_N;
    const int row = blockIdx.x / across_blocks * BLOCK_M, column = blockIdx.x % across_blocks * BLOCK_N;
    const int t = threadIdx.x, y0 = t / (BLOCK_N / THREAD_N) * THREAD_M, x0 = t % (BLOCK_N / THREAD_N);
    const int k = row + t % BLOCK_M, channel = blockIdx.y * of_group + k % of_group;
    const int down = k / of_group / kw * dh - ph, right = k / of_group % kw * dw - pw;
    const int begin = blockIdx.z * span, end = min(m, begin + span), mine = t / BLOCK_M * LOADS;
    int image = (begin + mine) / ow / oh, p = (begin + mine) / ow % oh, q = (begin + mine) % ow;
    sum sums[THREAD_M][THREAD_N] = {};
    for (int first = begin; first < end; first += BLOCK_K) {
        int image_of = image, p_of = p, q_of = q;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int r = p_of * sh + down, s = q_of * sw + right;
            const bool inside = k < depth && first + mine + i < end && r >= 0 && r < height && s >= 0 && s < width;
            const size_t pixel = ((size_t)image_of * height + r) * width + s;
            tile_a[mine + i][t % BLOCK_M] = inside ? (sum)x[pixel * c + channel] : (sum)0;
            if (++q_of == ow) {
                q_of = 0;
                if (++p_of == oh) p_of = 0, image_of++;
            }
        }
        for (q += BLOCK_K; q >= ow; q -= ow)
            if (++p == oh) p = 0, image++;
        for (int i = t; i < BLOCK_K * BLOCK_N; i += THREADS) {
            const int d = i / BLOCK_N, s = i % BLOCK_N;
            const bool inside = first + d < end && column + s < outs;
            tile_b[d][s] = inside ? (sum)gy[(size_t)(first + d) * o + first_out + column + s] : (sum)0;
        }
        __syncthreads();
        multiply(tile_a, tile_b, y0, x0, sums);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < THREAD_M; i++)
#pragma unroll
        for (int j = 0; j < THREAD_N; j++) {
            const int r = row + y0 + i, s = column + x0 + j * (BLOCK_N / THREAD_N);
            if (r < depth && s < outs) parts[((size_t)blockIdx.z * depth + r) * o + first_out + s] = sums[i][j];
        }
}

// The sum of the parts, one after the other: the same last bits at each call, which atomicAdd would not give.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void add_up(const sum* parts, real* gw, int count_parts, long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    sum total = 0;
    for (int part = 0; part < count_parts; part++) total += parts[part * count + i];
    gw[i] = (real)total;
}

// ------------------------------------------------------------------ four numbers an instruction, as in gemm_vectorised

#define TALL 128  // positions that a block computes,
#define WIDE 64   // and output channels: networks for small images begin with 64

// fp32; one group; c and o are multiples of 4, so that four numbers of the columns are one load, of one pixel. While
// one pair of tiles is used, the next is on its way to registers and then to the other half of shared memory.
// at most 144 registers, 12,544 bytes of shared memory
extern "C" __global__ void __launch_bounds__(128)
conv2d_vectorised(const float* x, const float* w, const float* bias, const float* residual, float* y, int m,
                  int height, int width, int c, int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph,
                  int pw, int dh, int dw, int relu) {
    __shared__ __align__(16) float tile_a[2][DEEP][TALL + 4], tile_b[2][DEEP][WIDE];
    const int depth = kh * kw * c, across_blocks = (o + WIDE - 1) / WIDE;
    const int row = blockIdx.x / across_blocks * TALL, column = blockIdx.x % across_blocks * WIDE;
    const int t = threadIdx.x, x0 = t % 8 * 4, y0 = t / 8 * 4;
    const int row_a = t / 2, deep_a = t % 2 * 4, deep_b = t / 16, column_b = t % 16 * 4;  // what this thread fetches
    int image[2], top[2], left[2], channel = deep_a, down = 0, across = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int position = row + row_a + i * (TALL / 2);
        image[i] = position / ow / oh;
        top[i] = position < m ? position / ow % oh * sh - ph : OUTSIDE;
        left[i] = position % ow * sw - pw;
    }
    const float4 none = make_float4(0, 0, 0, 0);
    float sums[EACH][EACH] = {};
    float4 next_a[2], next_b;

    auto fetch = [&](int first) {  // of first = 0, DEEP, 2 DEEP, ...
        while (channel >= c && down < kh) {
            channel -= c;
            if (++across == kw) across = 0, down++;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = top[i] + down * dh, s = left[i] + across * dw;
            const bool inside = down < kh && r >= 0 && r < height && s >= 0 && s < width;
            next_a[i] = inside ? load4(x + (((size_t)image[i] * height + r) * width + s) * c + channel) : none;
        }
        channel += DEEP;
        const bool inside = first + deep_b < depth && column + column_b < o;
        next_b = inside ? load4(w + (size_t)(first + deep_b) * o + column + column_b) : none;
    };
    auto put = [&](int half) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tile_a[half][deep_a + 0][row_a + i * (TALL / 2)] = next_a[i].x;
            tile_a[half][deep_a + 1][row_a + i * (TALL / 2)] = next_a[i].y;
            tile_a[half][deep_a + 2][row_a + i * (TALL / 2)] = next_a[i].z;
            tile_a[half][deep_a + 3][row_a + i * (TALL / 2)] = next_a[i].w;
        }
        store4(&tile_b[half][deep_b][column_b], next_b);
    };

    fetch(0);
    put(0);
    __syncthreads();
    for (int first = 0, half = 0; first < depth; first += DEEP, half ^= 1) {
        if (first + DEEP < depth) fetch(first + DEEP);
        multiply_wide<TALL, WIDE>(tile_a[half], tile_b[half], y0, x0, sums);
        if (first + DEEP < depth) put(half ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j += 4) {
            const int r = row + y0 + i % 4 + i / 4 * (TALL / 2), s = column + x0 + j * (WIDE / 8);
            if (r >= m || s >= o) continue;
            const size_t at = (size_t)r * o + s;
            const float4 b = bias ? load4(bias + s) : none, more = residual ? load4(residual + at) : none;
            float v[4] = {sums[i][j] + b.x + more.x, sums[i][j + 1] + b.y + more.y, sums[i][j + 2] + b.z + more.z,
                          sums[i][j + 3] + b.w + more.w};
#pragma unroll
            for (int e = 0; e < 4; e++) v[e] = relu && v[e] <= 0 ? 0 : v[e];
            store4(y + at, make_float4(v[0], v[1], v[2], v[3]));
        }
}

// The parts of conv2d_grad_w_implicit. Both matrices lie with their rows along the positions, as the tiles do: four
// numbers go from one load to one store, and nothing is transposed on the way.
// at most 160 registers, 12,544 bytes of shared memory
extern "C" __global__ void __launch_bounds__(128)
conv2d_grad_w_vectorised(const float* gy, const float* x, float* parts, int m, int span, int height, int width, int c,
                         int kh, int kw, int o, int oh, int ow, int sh, int sw, int ph, int pw, int dh, int dw) {
    __shared__ __align__(16) float tile_a[2][DEEP][TALL + 4], tile_b[2][DEEP][WIDE];
    const int depth = kh * kw * c, across_blocks = (o + WIDE - 1) / WIDE;
    const int row = blockIdx.x / across_blocks * TALL, column = blockIdx.x % across_blocks * WIDE;
    const int t = threadIdx.x, x0 = t % 8 * 4, y0 = t / 8 * 4;
    const int row_a = t % 32 * 4, deep_a = t / 32 * 2, deep_b = t / 16, column_b = t % 16 * 4;  // what it fetches
    const int k = row + row_a, channel = k % c, down = k / c / kw * dh - ph, right = k / c % kw * dw - pw;
    const int begin = blockIdx.z * span, end = min(m, begin + span);
    int image = (begin + deep_a) / ow / oh, p = (begin + deep_a) / ow % oh, q = (begin + deep_a) % ow;
    const float4 none = make_float4(0, 0, 0, 0);
    float sums[EACH][EACH] = {};
    float4 next_a[2], next_b;

    auto fetch = [&](int first) {  // of first = begin, begin + DEEP, ...
        int image_of = image, p_of = p, q_of = q;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = p_of * sh + down, s = q_of * sw + right;
            const bool inside = k < depth && first + deep_a + i < end && r >= 0 && r < height && s >= 0 && s < width;
            const size_t pixel = ((size_t)image_of * height + r) * width + s;
            next_a[i] = inside ? load4(x + pixel * c + channel) : none;
            if (++q_of == ow) {
                q_of = 0;
                if (++p_of == oh) p_of = 0, image_of++;
            }
        }
        for (q += DEEP; q >= ow; q -= ow)
            if (++p == oh) p = 0, image++;
        const bool inside = first + deep_b < end && column + column_b < o;
        next_b = inside ? load4(gy + (size_t)(first + deep_b) * o + column + column_b) : none;
    };
    auto put = [&](int half) {
#pragma unroll
        for (int i = 0; i < 2; i++) store4(&tile_a[half][deep_a + i][row_a], next_a[i]);
        store4(&tile_b[half][deep_b][column_b], next_b);
    };

    fetch(begin);
    put(0);
    __syncthreads();
    for (int first = begin, half = 0; first < end; first += DEEP, half ^= 1) {
        if (first + DEEP < end) fetch(first + DEEP);
        multiply_wide<TALL, WIDE>(tile_a[half], tile_b[half], y0, x0, sums);
        if (first + DEEP < end) put(half ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j += 4) {
            const int r = row + y0 + i % 4 + i / 4 * (TALL / 2), s = column + x0 + j * (WIDE / 8);
            const float4 v = make_float4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
            if (r < depth && s < o) store4(parts + ((size_t)blockIdx.z * depth + r) * o + s, v);
        }
}
