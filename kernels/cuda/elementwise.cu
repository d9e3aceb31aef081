// Functions of one element: a thread for each number. All are bound by memory, so neighbours take neighbouring numbers.
#include "reduce.cuh"

#define NUMBER ((long long)blockIdx.x * blockDim.x + threadIdx.x)

// NaN stays NaN: it is not <= 0.
// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void relu(const real* x, real* y, long long count) {
    const long long i = NUMBER;
    if (i < count) y[i] = (sum)x[i] <= 0 ? (real)0 : x[i];
}

// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void relu_grad(const real* gy, const real* y, real* gx, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const real g = gy[i];  // before y is known: both loads are on their way at a time
    gx[i] = (sum)y[i] <= 0 ? (real)0 : g;
}

// relu?(y + bias + residual) into y (count / channels, channels); bias and residual may be null.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void epilogue(real* y, const real* bias, const real* residual, int relu, int channels,
                                    long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    sum v = (sum)y[i];
    if (bias) v += (sum)bias[i % channels];
    if (residual) v += (sum)residual[i];
    y[i] = (real)(relu && v <= 0 ? (sum)0 : v);
}

// ------------------------------------------------------------------ sigmoid, SiLU, GELU

// 1 / (1 + exp(-x)), with exp(-|x|), which cannot overflow.
__device__ __forceinline__ sum sigmoid_of(sum x) {
    const sum e = exp(-fabs(x));
    return (x < 0 ? e : (sum)1) / (1 + e);
}

// P(X <= x) for a standard normal X. erfc keeps its digits where x is far below 0, and 1 + erf does not.
__device__ __forceinline__ sum normal_cdf(sum x) { return erfc(x * (sum)-0.70710678118654752) / 2; }

// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void sigmoid(const real* x, real* y, long long count) {
    const long long i = NUMBER;
    if (i < count) y[i] = (real)sigmoid_of((sum)x[i]);
}

// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void sigmoid_grad(const real* gy, const real* y, real* gx, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const sum s = (sum)y[i];
    gx[i] = (real)((sum)gy[i] * s * (1 - s));
}

// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void silu(const real* x, real* y, long long count) {
    const long long i = NUMBER;
    if (i < count) y[i] = (real)((sum)x[i] * sigmoid_of((sum)x[i]));
}

// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void silu_grad(const real* gy, const real* x, real* gx, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const sum v = (sum)x[i], s = sigmoid_of(v);
    gx[i] = (real)((sum)gy[i] * s * (1 + v * (1 - s)));
}

// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void gelu(const real* x, real* y, long long count) {
    const long long i = NUMBER;
    if (i < count) y[i] = (real)((sum)x[i] * normal_cdf((sum)x[i]));
}

// gy (P(X <= x) + x p(x)), p the normal density
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void gelu_grad(const real* gy, const real* x, real* gx, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const sum v = (sum)x[i], density = (sum)0.39894228040143268 * exp(v * v * (sum)-0.5);
    gx[i] = (real)((sum)gy[i] * (normal_cdf(v) + v * density));
}

// ------------------------------------------------------------------ sums over the rows

// A thread for each column reads it from the first row to the last: whole sectors, but few threads to wait for them.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void bias_grad_naive(const real* gy, real* total, long long rows, int columns) {
    if (COLUMN >= columns) return;
    double mine = 0;
    for (long long r = 0; r < rows; r++) mine += (double)(sum)gy[(size_t)r * columns + COLUMN];
    total[COLUMN] = (real)(sum)mine;
}

// Blocks share the rows: the same bytes, asked for by all of the GPU at a time.
// at most 32 registers, 1,024 bytes of shared memory
extern "C" __global__ void bias_grad(const real* gy, sum* partial, long long rows, int columns, long long each) {
    __shared__ sum space[THREADS];
    sum total = 0;
    for (long long r = ROWS_FROM; COLUMN < columns && r < ROWS_TO; r += blockDim.y)
        total += (sum)gy[(size_t)r * columns + COLUMN];
    total = sum_of_column(total, space);
    if (COLUMN < columns && threadIdx.y == 0) partial[PARTIAL(0)] = total;
}

// The gradient behind a ReLU is stored and added up at once, and so never read again.
// at most 32 registers, 1,024 bytes of shared memory
extern "C" __global__ void relu_bias_grad(const real* gy, const real* y, real* gx, sum* partial, long long rows,
                                          int columns, long long each) {
    __shared__ sum space[THREADS];
    sum total = 0;
    for (long long r = ROWS_FROM; COLUMN < columns && r < ROWS_TO; r += blockDim.y) {
        const size_t i = (size_t)r * columns + COLUMN;
        const sum all = (sum)gy[i], g = (sum)y[i] <= 0 ? (sum)0 : all;
        gx[i] = (real)g;
        total += g;
    }
    total = sum_of_column(total, space);
    if (COLUMN < columns && threadIdx.y == 0) partial[PARTIAL(0)] = total;
}

// What the blocks have found, added up.
// at most 24 registers, 2,048 bytes of shared memory
extern "C" __global__ void add_up(const sum* partial, real* totals, int blocks, int columns) {
    __shared__ double space[THREADS];
    const double total = sum_of_parts(partial, blocks, columns, space);
    if (COLUMN < columns && threadIdx.y == 0) totals[(size_t)blockIdx.y * columns + COLUMN] = (real)(sum)total;
}
