// Batch norm on a GPU. Channels are the last axis: neighbouring threads take neighbouring channels, blocks share the
// rows, and what each block has found is put together by a second small kernel, in an order that the shape determines.
//
// Numbers of a channel (mean, scale, ...) are `sum`: float for half. A thread keeps them in registers for all its rows.
#include "reduce.cuh"

#define INDEX ((size_t)r * columns + COLUMN)  // of row r

// ------------------------------------------------------------------ statistics in two passes

// Sums of x, or with `mean` of (x - mean)^2: a pass for each, and x comes from memory twice.
// at most 32 registers, 1,024 bytes of shared memory
extern "C" __global__ void batch_norm_sums(const real* x, const sum* mean, sum* partial, long long rows, int columns,
                                           long long each) {
    __shared__ sum space[THREADS];
    const bool inside = COLUMN < columns;
    const sum center = mean && inside ? mean[COLUMN] : 0;
    sum total = 0;
    for (long long r = ROWS_FROM; inside && r < ROWS_TO; r += blockDim.y) {
        const sum d = (sum)x[INDEX] - center;
        total += mean ? d * d : d;
    }
    total = sum_of_column(total, space);
    if (inside && threadIdx.y == 0) partial[PARTIAL(0)] = total;
}

// Parts of sums, added up, times `share`.
// at most 24 registers, 2,048 bytes of shared memory
extern "C" __global__ void add_up(const sum* partial, sum* totals, int blocks, int columns, double share) {
    __shared__ double space[THREADS];
    const double total = sum_of_parts(partial, blocks, columns, space);
    if (COLUMN < columns && threadIdx.y == 0) totals[(size_t)blockIdx.y * columns + COLUMN] = (sum)(total * share);
}

// ------------------------------------------------------------------ statistics in one pass

// Mean and sum of squared distances from it, of `count` numbers.
struct Moments { sum count, mean, squares; };

// Of one number more (Welford 1962). No large sums are subtracted from each other, as in sum(x^2) - sum(x)^2 / n.
__device__ __forceinline__ void take(Moments& m, sum x) {
    m.count += 1;
    const sum d = x - m.mean;
    m.mean += d / m.count;
    m.squares += d * (x - m.mean);
}

// Of both together (Chan, Golub and LeVeque 1979).
__device__ __forceinline__ void take(Moments& a, sum count, sum mean, sum squares) {
    if (count == 0) return;
    const sum together = a.count + count, d = mean - a.mean, share = count / together;
    a.mean += d * share;
    a.squares += squares + d * d * a.count * share;
    a.count = together;
}

// Those of a block's threads of one column, for the thread whose y is 0: halves take in the other halves.
__device__ __forceinline__ void take_column(Moments& m, Moments* space) {
    const int t = threadIdx.y * blockDim.x + threadIdx.x;
    space[t] = m;
    for (int half = blockDim.y / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) {
            const Moments other = space[t + half * blockDim.x];
            take(m, other.count, other.mean, other.squares);
            space[t] = m;
        }
    }
}

// x comes from memory once. `partial` is (2, blocks, columns): means, and squares; how many rows a block had, all know.
// What is taken in are distances from the first row: a large mean would round away what its numbers differ by.
// at most 40 registers, 3,072 bytes of shared memory
extern "C" __global__ void batch_norm_moments(const real* x, sum* partial, long long rows, int columns,
                                              long long each) {
    __shared__ Moments space[THREADS];
    Moments m = {0, 0, 0};
    const sum first = COLUMN < columns ? (sum)x[COLUMN] : 0;
    for (long long r = ROWS_FROM; COLUMN < columns && r < ROWS_TO; r += blockDim.y) take(m, (sum)x[INDEX] - first);
    take_column(m, space);
    if (COLUMN >= columns || threadIdx.y) return;
    partial[PARTIAL(0)] = m.mean;
    partial[PARTIAL(1)] = m.squares;
}

// One block for its columns puts the parts together.
// at most 32 registers, 3,072 bytes of shared memory
extern "C" __global__ void batch_norm_together(const real* x, const sum* partial, sum* mean, sum* var, int blocks,
                                               long long rows, int columns, long long each) {
    __shared__ Moments space[THREADS];
    Moments m = {0, 0, 0};
    for (long long b = threadIdx.y; COLUMN < columns && b < blocks; b += blockDim.y) {
        const size_t of_mean = (size_t)b * columns + COLUMN, of_squares = (size_t)(blocks + b) * columns + COLUMN;
        take(m, (sum)(min(rows, (b + 1) * each) - b * each), partial[of_mean], partial[of_squares]);
    }
    take_column(m, space);
    if (COLUMN >= columns || threadIdx.y) return;
    mean[COLUMN] = (sum)x[COLUMN] + m.mean;
    var[COLUMN] = m.squares / m.count;
}

// ------------------------------------------------------------------ forward

// relu?((x - mean) scale + shift + residual), in one pass; `residual` may be null. NaN is not <= 0, and stays.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void batch_norm_apply(const real* x, const sum* mean, const sum* scale, const sum* shift,
                                            const real* residual, real* y, int relu, long long rows, int columns,
                                            long long each) {
    if (COLUMN >= columns) return;
    const sum of_mean = mean[COLUMN], of_scale = scale[COLUMN], of_shift = shift[COLUMN];
    for (long long r = ROWS_FROM; r < ROWS_TO; r += blockDim.y) {
        sum v = ((sum)x[INDEX] - of_mean) * of_scale + of_shift;
        if (residual) v += (sum)residual[INDEX];
        y[INDEX] = (real)(relu && v <= 0 ? (sum)0 : v);
    }
}

// running += momentum (batch - running), the variance times `unbiased`: a thread for each channel, as below.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void batch_norm_running(real* running_mean, real* running_var, const sum* mean, const sum* var,
                                              double momentum, double unbiased, int columns) {
    if (COLUMN >= columns) return;
    const sum m = (sum)running_mean[COLUMN], v = (sum)running_var[COLUMN];
    running_mean[COLUMN] = (real)(m + (sum)momentum * (mean[COLUMN] - m));
    running_var[COLUMN] = (real)(v + (sum)momentum * ((sum)unbiased * var[COLUMN] - v));
}

// rstd = 1 / sqrt(var + eps), and weight rstd
// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void batch_norm_scale(const sum* var, const sum* weight, double eps, sum* rstd, sum* scale,
                                            int columns) {
    if (COLUMN >= columns) return;
    const sum r = 1 / (sum)sqrt(var[COLUMN] + (sum)eps);
    rstd[COLUMN] = r;
    scale[COLUMN] = weight[COLUMN] * r;
}

// ------------------------------------------------------------------ backward

// A gradient is loaded before its mask is known (`all`): the loads of a row are on their way together.
//
// Sums of gy and of gy (x - mean): `partial` is (2, blocks, columns). Behind a ReLU `shift` is given: gy counts where
// (x - mean) scale + shift is not <= 0: to compute that again costs nothing, to read y would be a third more.
// at most 32 registers, 2,048 bytes of shared memory
extern "C" __global__ void batch_norm_grad_stats(const real* gy, const real* x, const sum* mean, const sum* scale,
                                                 const sum* shift, sum* partial, long long rows, int columns,
                                                 long long each) {
    __shared__ sum space[2][THREADS];
    const bool inside = COLUMN < columns;
    const sum of_mean = inside ? mean[COLUMN] : 0;
    const sum of_scale = shift && inside ? scale[COLUMN] : 0;
    const sum of_shift = shift && inside ? shift[COLUMN] : 1;  // without a ReLU 1, which is not <= 0
    sum total = 0, products = 0;
    for (long long r = ROWS_FROM; inside && r < ROWS_TO; r += blockDim.y) {
        const sum d = (sum)x[INDEX] - of_mean;
        const sum all = (sum)gy[INDEX], g = d * of_scale + of_shift <= 0 ? (sum)0 : all;
        total += g;
        products += g * d;
    }
    total = sum_of_column(total, space[0]);
    products = sum_of_column(products, space[1]);
    if (!inside || threadIdx.y) return;
    partial[PARTIAL(0)] = total;
    partial[PARTIAL(1)] = products;
}

// The same where the mask is that of y, because of a residual; the masked gradient, which is the residual's, is stored.
// at most 32 registers, 2,048 bytes of shared memory
extern "C" __global__ void batch_norm_residual_grad_stats(const real* gy, const real* y, const real* x, const sum* mean,
                                                          real* masked, sum* partial, long long rows, int columns,
                                                          long long each) {
    __shared__ sum space[2][THREADS];
    const bool inside = COLUMN < columns;
    const sum of_mean = inside ? mean[COLUMN] : 0;
    sum total = 0, products = 0;
    for (long long r = ROWS_FROM; inside && r < ROWS_TO; r += blockDim.y) {
        const sum all = (sum)gy[INDEX], g = (sum)y[INDEX] <= 0 ? (sum)0 : all;
        masked[INDEX] = (real)g;
        total += g;
        products += g * ((sum)x[INDEX] - of_mean);
    }
    total = sum_of_column(total, space[0]);
    products = sum_of_column(products, space[1]);
    if (!inside || threadIdx.y) return;
    partial[PARTIAL(0)] = total;
    partial[PARTIAL(1)] = products;
}

// gw = products rstd, a = gb share, b = gw rstd share
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void batch_norm_shares(const sum* gb, const sum* products, const sum* rstd, double share, sum* gw,
                                             sum* a, sum* b, int columns) {
    if (COLUMN >= columns) return;
    const sum w = products[COLUMN] * rstd[COLUMN];
    gw[COLUMN] = w;
    a[COLUMN] = gb[COLUMN] * (sum)share;
    b[COLUMN] = w * rstd[COLUMN] * (sum)share;
}

// (gy - a - (x - mean) b) scale, gy behind a ReLU as above.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void batch_norm_grad(const real* gy, const real* x, const sum* mean, const sum* scale,
                                           const sum* a, const sum* b, const sum* shift, real* gx, long long rows,
                                           int columns, long long each) {
    if (COLUMN >= columns) return;
    const sum of_mean = mean[COLUMN], of_scale = scale[COLUMN], of_a = a[COLUMN], of_b = b[COLUMN];
    const sum of_shift = shift ? shift[COLUMN] : 0;
    for (long long r = ROWS_FROM; r < ROWS_TO; r += blockDim.y) {
        const sum d = (sum)x[INDEX] - of_mean;
        const sum all = (sum)gy[INDEX], g = shift && d * of_scale + of_shift <= 0 ? (sum)0 : all;
        gx[INDEX] = (real)((g - of_a - d * of_b) * of_scale);
    }
}
