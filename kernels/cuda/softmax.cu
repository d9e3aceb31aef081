// Rows of numbers that become probabilities, and the cross-entropy over them: a warp for each row.
//
// Lanes take neighbouring numbers of a row, and meet in shuffles: nothing goes through shared memory. The largest of a
// row and the sum of its exponentials come of one pass: where a larger number turns up, the sum so far is scaled down
// (Milakov and Gimelshein 2018). NaN is never the largest, but its exponential is NaN, and so are all sums over it.
#include "reduce.cuh"

#define ROW ((long long)blockIdx.x * blockDim.y + threadIdx.y)
#define LANE ((int)threadIdx.x)
// Below each number: -inf - LOWEST is -inf, where -inf - -inf were NaN.
#define LOWEST ((sum)(sizeof(sum) == 8 ? -1.7976931348623157e308 : -3.40282347e38))
#define NOT_A_NUMBER ((sum)__uint_as_float(0x7fffffffu))

// One more number: `largest`, and `total`, the sum of exp(x - largest).
__device__ __forceinline__ void take(sum x, sum& largest, sum& total) {
    const sum d = x - largest, e = exp(-fabs(d));
    total = d > 0 ? total * e + 1 : total + e;
    largest = d > 0 ? x : largest;
}

// Those of a lane become those of its warp.
__device__ __forceinline__ void take_lanes(sum& largest, sum& total) {
    const sum mine = largest;
    largest = warp_max(mine);
    total = warp_sum(total * exp(mine - largest));
}

// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void softmax(const real* x, real* y, long long rows, int columns) {
    if (ROW >= rows) return;
    x += ROW * columns, y += ROW * columns;
    sum largest = LOWEST, total = 0;
    for (int c = LANE; c < columns; c += 32) take((sum)x[c], largest, total);
    take_lanes(largest, total);
    for (int c = LANE; c < columns; c += 32) y[c] = (real)(exp((sum)x[c] - largest) / total);
}

// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void log_softmax(const real* x, real* y, long long rows, int columns) {
    if (ROW >= rows) return;
    x += ROW * columns, y += ROW * columns;
    sum largest = LOWEST, total = 0;
    for (int c = LANE; c < columns; c += 32) take((sum)x[c], largest, total);
    take_lanes(largest, total);
    const sum log_sum = log(total);
    for (int c = LANE; c < columns; c += 32) y[c] = (real)((sum)x[c] - largest - log_sum);
}

// y (gy - <gy, y>)
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void softmax_grad(const real* gy, const real* y, real* gx, long long rows, int columns) {
    if (ROW >= rows) return;
    gy += ROW * columns, y += ROW * columns, gx += ROW * columns;
    sum dot = 0;
    for (int c = LANE; c < columns; c += 32) dot += (sum)gy[c] * (sum)y[c];
    dot = warp_sum(dot);
    for (int c = LANE; c < columns; c += 32) gx[c] = (real)((sum)y[c] * ((sum)gy[c] - dot));
}

// gy - exp(y) sum(gy)
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void log_softmax_grad(const real* gy, const real* y, real* gx, long long rows, int columns) {
    if (ROW >= rows) return;
    gy += ROW * columns, y += ROW * columns, gx += ROW * columns;
    sum total = 0;
    for (int c = LANE; c < columns; c += 32) total += (sum)gy[c];
    total = warp_sum(total);
    for (int c = LANE; c < columns; c += 32) gx[c] = (real)((sum)gy[c] - exp((sum)y[c]) * total);
}

// ------------------------------------------------------------------ cross-entropy

// log(total). The largest is no number where all are -inf, or one is inf; then, as with NaN in the row, nothing is.
__device__ __forceinline__ sum log_of(sum total, sum largest) {
    return total > 0 && largest <= -LOWEST ? (sum)log(total) : NOT_A_NUMBER;
}

// The target is 1 - smoothing at the label plus smoothing / columns everywhere, and `apart` the sum of x - x[label]:
// loss = log(total) - (x[label] - largest) - smoothing / columns * apart.
__device__ __forceinline__ sum loss_of(sum log_sum, sum largest, sum apart, sum of_label, double smoothing,
                                       int columns) {
    const sum value = log_sum - (of_label - largest);
    // Without smoothing an infinite logit of another class is no concern of the loss; that of the label always is.
    return smoothing > 0 && of_label >= LOWEST ? value - (sum)(smoothing / columns) * apart : value;
}

// What one row has come to; only the thread that owns it writes. `lse` is (2, rows): the largest, and log(total).
__device__ __forceinline__ void finish(sum largest, sum total, sum apart, sum of_label, double smoothing, real* loss,
                                       sum* lse, long long rows, int columns, long long row) {
    const sum log_sum = log_of(total, largest);
    loss[row] = (real)loss_of(log_sum, largest, apart, of_label, smoothing, columns);
    lse[row] = log_sum == log_sum ? largest : log_sum;
    lse[rows + row] = log_sum;
}

__device__ __forceinline__ bool is_class(long long label, int columns) { return label >= 0 && label < columns; }

__device__ __forceinline__ void no_class(real* loss, sum* lse, long long rows, long long row) {
    loss[row] = (real)NOT_A_NUMBER;
    lse[row] = lse[rows + row] = NOT_A_NUMBER;
}

// A thread for each row: what neighbours read lies `columns` numbers apart, a sector for each.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void cross_entropy_naive(const real* logits, const long long* labels, double smoothing,
                                               real* loss, sum* lse, long long rows, int columns) {
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const real* x = logits + row * columns;
    const long long label = labels[row];
    if (!is_class(label, columns)) return no_class(loss, lse, rows, row);
    const sum of_label = (sum)x[label];
    sum largest = LOWEST, total = 0, apart = 0;
    for (int c = 0; c < columns; c++) {
        take((sum)x[c], largest, total);
        apart += (sum)x[c] - of_label;
    }
    finish(largest, total, apart, of_label, smoothing, loss, lse, rows, columns, row);
}

// A warp for each row: its lanes read neighbouring numbers, each sector once.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void cross_entropy(const real* logits, const long long* labels, double smoothing, real* loss,
                                         sum* lse, long long rows, int columns) {
    if (ROW >= rows) return;
    const real* x = logits + ROW * columns;
    const long long label = labels[ROW];
    if (!is_class(label, columns)) {
        if (LANE == 0) no_class(loss, lse, rows, ROW);
        return;
    }
    const sum of_label = (sum)x[label];
    sum largest = LOWEST, total = 0, apart = 0;
    for (int c = LANE; c < columns; c += 32) {
        const sum v = (sum)x[c];
        take(v, largest, total);
        apart += v - of_label;
    }
    take_lanes(largest, total);
    apart = warp_sum(apart);
    if (LANE == 0) finish(largest, total, apart, of_label, smoothing, loss, lse, rows, columns, ROW);
}

// gy (softmax(x) - target), from the largest and the logarithm that forward has kept: nothing to be added up.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void cross_entropy_grad(const real* gy, const real* logits, const long long* labels,
                                              const sum* lse, double smoothing, real* gx, long long rows,
                                              int columns) {
    if (ROW >= rows) return;
    const sum g = (sum)gy[ROW], largest = lse[ROW], log_sum = lse[rows + ROW];
    const sum share = (sum)(smoothing / columns), one_hot = (sum)(1 - smoothing);
    const long long label = labels[ROW];
    logits += ROW * columns, gx += ROW * columns;
    for (int c = LANE; c < columns; c += 32) {
        const sum target = c == label ? one_hot + share : share;
        gx[c] = (real)((exp((sum)logits[c] - largest - log_sum) - target) * g);
    }
}

// Loss, scale times its gradient, and one more `right` where no number of the row beats that of the label: the row is
// read twice, the second time from a cache, and nothing is kept for backward. `right` must begin with 0; whole numbers
// add up to the same in any order.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void cross_entropy_and_grad(const real* logits, const long long* labels, const sum* scale,
                                                  double smoothing, sum* loss, real* gx, int* right, long long rows,
                                                  int columns) {
    if (ROW >= rows) return;
    logits += ROW * columns, gx += ROW * columns;
    const long long label = labels[ROW];
    const bool is = is_class(label, columns);
    const sum of_label = is ? (sum)logits[label] : NOT_A_NUMBER;
    sum largest = LOWEST, total = 0, apart = 0;
    bool beaten = false;
    for (int c = LANE; c < columns; c += 32) {
        const sum v = (sum)logits[c];
        take(v, largest, total);
        apart += v - of_label;
        beaten |= v > of_label || (v == of_label && c < label);
    }
    take_lanes(largest, total);
    apart = warp_sum(apart);
    beaten = __any_sync(~0u, beaten);
    const sum log_sum = is ? log_of(total, largest) : NOT_A_NUMBER;
    const sum value = loss_of(log_sum, largest, apart, of_label, smoothing, columns);
    if (LANE == 0) {
        loss[ROW] = value;
        if (!beaten && value == value) atomicAdd(right, 1);
    }
    const sum g = *scale, share = (sum)(smoothing / columns), one_hot = (sum)(1 - smoothing);
    for (int c = LANE; c < columns; c += 32) {
        const sum target = c == label ? one_hot + share : share;
        gx[c] = (real)((exp((sum)logits[c] - largest - log_sum) - target) * g);
    }
}
