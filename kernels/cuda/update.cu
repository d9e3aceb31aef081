// The optimisers' updates of flat arrays, in place: a thread for each number, every array read once and written once.
//
// Neighbouring threads take neighbouring numbers. Nothing is shared, so there is no ladder: the bytes are the time.
#include "reduce.cuh"

#define NUMBER ((long long)blockIdx.x * blockDim.x + threadIdx.x)

// PyTorch's formula; `buffer` is null without momentum. With a gain of lr and a rate of 1 it is LARS.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void sgd(real* data, const real* grad, real* buffer, double lr, double momentum, double gain,
                               double weight_decay, int nesterov, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const sum w = (sum)data[i], g = (sum)grad[i] + (sum)weight_decay * w;
    sum step = g;
    if (buffer) {
        const sum v = (sum)momentum * (sum)buffer[i] + (sum)gain * g;
        buffer[i] = (real)v;
        step = nesterov ? g + (sum)momentum * v : v;
    }
    data[i] = (real)(w - (sum)lr * step);
}

// w keeps `keep` of itself (AdamW), or its gradient has `decay` of it added (Adam).
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void adam(real* data, const real* grad, real* exp_avg, real* exp_avg_sq, double keep,
                                double decay, double rate, double correction, double gain1, double beta2, double gain2,
                                double eps, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const sum w = (sum)data[i], g = (sum)grad[i] + (sum)decay * w, before = (sum)exp_avg[i];
    const sum m = before + (sum)gain1 * (g - before);
    const sum v = (sum)beta2 * (sum)exp_avg_sq[i] + (sum)gain2 * (g * g);
    exp_avg[i] = (real)m;
    exp_avg_sq[i] = (real)v;
    data[i] = (real)((sum)keep * w - (sum)rate * m / ((sum)sqrt(v) / (sum)correction + (sum)eps));
}

// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void adagrad(real* data, const real* grad, real* total, double lr, double eps,
                                   double weight_decay, long long count) {
    const long long i = NUMBER;
    if (i >= count) return;
    const sum w = (sum)data[i], g = (sum)grad[i] + (sum)weight_decay * w, t = (sum)total[i] + g * g;
    total[i] = (real)t;
    data[i] = (real)(w - (sum)lr * g / ((sum)sqrt(t) + (sum)eps));
}

// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void ema(real* average, const real* data, double gain, long long count) {
    const long long i = NUMBER;
    if (i < count) average[i] = (real)((sum)average[i] + (sum)gain * ((sum)data[i] - (sum)average[i]));
}

// at most 8 registers, 0 bytes of shared memory
extern "C" __global__ void scale(real* data, double factor, long long count) {
    const long long i = NUMBER;
    if (i < count) data[i] = (real)((sum)data[i] * (sum)factor);
}

// ------------------------------------------------------------------ the sum of squares, in double

// Blocks of (1, THREADS): sum_of_column() adds up over y. Which thread squares what depends on `count` alone.
// at most 32 registers, 2,048 bytes of shared memory
extern "C" __global__ void sum_of_squares(const real* data, double* partial, long long count) {
    __shared__ double space[THREADS];
    double total = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.y; i < count; i += (long long)gridDim.x * THREADS) {
        const double v = (double)(sum)data[i];
        total += v * v;
    }
    total = sum_of_column(total, space);
    if (threadIdx.y == 0) partial[blockIdx.x] = total;
}

// at most 32 registers, 2,048 bytes of shared memory
extern "C" __global__ void add_up(const double* partial, double* total, int count) {
    __shared__ double space[THREADS];
    double mine = 0;
    for (int i = threadIdx.y; i < count; i += THREADS) mine += partial[i];
    mine = sum_of_column(mine, space);
    if (threadIdx.y == 0) total[0] = mine;
}
