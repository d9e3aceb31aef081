// 3x3 convolution of stride 1 by Winograd's algorithms F(2x2, 3x3) and F(4x4, 3x3), in fp32; as in kernels/winograd.py.
//
// Four launches: the weights become planes (G), tiles of the image become planes (B), planes are multiplied, one matrix
// product each, and transformed back (A). The planes go through memory: 4 numbers for a pixel of F2, 2.25 of F4, once
// written and once read, for the image and for the output. That is the price of 16 (36) products in place of 36 (144).
//
// An algorithm is a type here, and so is a matrix: known while a kernel is compiled, its zeros and ones cost nothing.
#include "gemm_tile.cuh"
#include "winograd_matrices.cuh"

#define NUMBER ((long long)blockIdx.x * blockDim.x + threadIdx.x)

#define MATRIX(name, rows, columns, numbers)                             \
    struct name {                                                        \
        static constexpr int COLUMNS = columns;                          \
        static __device__ __forceinline__ float at(int row, int column) { \
            constexpr float matrix[rows][columns] = numbers;             \
            return matrix[row][column];                                  \
        }                                                                \
    }

struct F2 {
    static constexpr int OUTPUTS = 2, SIDE = 4;
    MATRIX(A, 2, 4, F2_A);
    MATRIX(G, 4, 3, F2_G);
    MATRIX(B, 4, 4, F2_B);
};

struct F4 {
    static constexpr int OUTPUTS = 4, SIDE = 6;
    MATRIX(A, 4, 6, F4_A);
    MATRIX(G, 6, 3, F4_G);
    MATRIX(B, 6, 6, F4_B);
};

// A row of a matrix times numbers that lie `apart`. Unrolled, what is multiplied by 0 is not there.
template <class M> __device__ __forceinline__ float times(int row, const float* numbers, int apart) {
    float total = 0;
    bool any = false;
#pragma unroll
    for (int k = 0; k < M::COLUMNS; k++) {
        const float factor = M::at(row, k);
        if (factor == 0) continue;
        total = any ? total + factor * numbers[k * apart] : factor * numbers[k * apart];
        any = true;
    }
    return total;
}

// (3, 3, C, O) -> (planes, C, O): a thread for each pair of channels. `count` is C O.
template <class F> __device__ __forceinline__ void weights_to_planes(const float* w, float* u, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    float taps[3][3], half[F::SIDE][3];
#pragma unroll
    for (int k = 0; k < 9; k++) taps[k / 3][k % 3] = w[k * count + i];
#pragma unroll
    for (int row = 0; row < F::SIDE; row++)
#pragma unroll
        for (int column = 0; column < 3; column++) half[row][column] = times<typename F::G>(row, &taps[0][column], 3);
#pragma unroll
    for (int row = 0; row < F::SIDE; row++)
#pragma unroll
        for (int column = 0; column < F::SIDE; column++)
            u[(row * F::SIDE + column) * count + i] = times<typename F::G>(column, half[row], 1);
}

// x (N, H, W, C) -> (planes, tiles, C): a thread for each channel of a tile, neighbours for neighbouring channels.
// Tiles are numbered through columns, rows, images; the first begins at pixel (top, left), which may lie outside.
template <class F>
__device__ __forceinline__ void image_to_planes(const float* x, float* v, int height, int width, int c, int down,
                                                int across, int top, int left, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const int channel = i % c, tile = i / c;
    const int first_row = tile / across % down * F::OUTPUTS + top, first_column = tile % across * F::OUTPUTS + left;
    const float* const image = x + (size_t)(tile / across / down) * height * width * c + channel;
    float half[F::SIDE][F::SIDE];
#pragma unroll
    for (int column = 0; column < F::SIDE; column++) {
        const int s = first_column + column;
        float pixels[F::SIDE];
#pragma unroll
        for (int row = 0; row < F::SIDE; row++) {
            const int r = first_row + row;
            const bool inside = r >= 0 && r < height && s >= 0 && s < width;
            pixels[row] = inside ? image[((size_t)r * width + s) * c] : 0;
        }
#pragma unroll
        for (int row = 0; row < F::SIDE; row++) half[row][column] = times<typename F::B>(row, pixels, 1);
    }
#pragma unroll
    for (int row = 0; row < F::SIDE; row++)
#pragma unroll
        for (int column = 0; column < F::SIDE; column++)
            v[(row * F::SIDE + column) * count + i] = times<typename F::B>(column, half[row], 1);
}

// (planes, tiles, O) -> y (N, OH, OW, O) = relu?(. + bias + residual): a thread for each channel of a tile. bias and
// residual may be null. `count` is tiles O.
template <class F>
__device__ __forceinline__ void planes_to_image(const float* m, const float* bias, const float* residual, float* y,
                                                int oh, int ow, int o, int down, int across, int relu,
                                                long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const int channel = i % o, tile = i / o;
    const int first_row = tile / across % down * F::OUTPUTS, first_column = tile % across * F::OUTPUTS;
    const size_t image = (size_t)(tile / across / down) * oh * ow * o + channel;
    float half[F::OUTPUTS][F::SIDE];
#pragma unroll
    for (int column = 0; column < F::SIDE; column++) {
        float numbers[F::SIDE];
#pragma unroll
        for (int row = 0; row < F::SIDE; row++) numbers[row] = m[(row * F::SIDE + column) * count + i];
#pragma unroll
        for (int row = 0; row < F::OUTPUTS; row++) half[row][column] = times<typename F::A>(row, numbers, 1);
    }
    const float plus = bias ? bias[channel] : 0;
#pragma unroll
    for (int row = 0; row < F::OUTPUTS; row++)
#pragma unroll
        for (int column = 0; column < F::OUTPUTS; column++) {
            const int r = first_row + row, s = first_column + column;
            if (r >= oh || s >= ow) continue;
            const size_t at = image + ((size_t)r * ow + s) * o;
            float v = times<typename F::A>(column, half[row], 1) + plus;
            if (residual) v += residual[at];
            y[at] = relu && v <= 0 ? 0 : v;  // NaN stays NaN
        }
}

// ------------------------------------------------------------------ the kernels

#define TALL 128  // tiles of the image that a block multiplies,
#define WIDE 64   // by output channels: networks for small images begin with 64

// Plane blockIdx.z: (rows x k) times (k x n).
// at most 160 registers, 12,544 bytes of shared memory
extern "C" __global__ void __launch_bounds__(128)
winograd_products(const float* v, const float* u, float* m, int rows, int n, int k) {
    __shared__ __align__(16) float tile_a[2][DEEP][TALL + 4], tile_b[2][DEEP][WIDE];
    const size_t plane = blockIdx.z;
    v += plane * rows * k, u += plane * k * n, m += plane * rows * n;
    gemm_tile<TALL, WIDE>(tile_a, tile_b, v, u, m, rows, n, k, blockIdx.y * TALL, blockIdx.x * WIDE);
}

// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void winograd2_weights(const float* w, float* u, long long count) {
    weights_to_planes<F2>(w, u, count);
}

// at most 64 registers, 0 bytes of shared memory
extern "C" __global__ void winograd4_weights(const float* w, float* u, long long count) {
    weights_to_planes<F4>(w, u, count);
}

// at most 48 registers, 0 bytes of shared memory
extern "C" __global__ void winograd2_image(const float* x, float* v, int height, int width, int c, int down,
                                           int across, int top, int left, long long count) {
    image_to_planes<F2>(x, v, height, width, c, down, across, top, left, count);
}

// at most 96 registers, 0 bytes of shared memory
extern "C" __global__ void winograd4_image(const float* x, float* v, int height, int width, int c, int down,
                                           int across, int top, int left, long long count) {
    image_to_planes<F4>(x, v, height, width, c, down, across, top, left, count);
}

// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void winograd2_output(const float* m, const float* bias, const float* residual, float* y, int oh,
                                            int ow, int o, int down, int across, int relu, long long count) {
    planes_to_image<F2>(m, bias, residual, y, oh, ow, o, down, across, relu, count);
}

// at most 64 registers, 0 bytes of shared memory
extern "C" __global__ void winograd4_output(const float* m, const float* bias, const float* residual, float* y, int oh,
                                            int ow, int o, int down, int across, int relu, long long count) {
    planes_to_image<F4>(m, bias, residual, y, oh, ow, o, down, across, relu, count);
}
