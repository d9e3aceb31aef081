// The optimisers' updates of all buckets in one launch, as NVIDIA's Apex does it (multi_tensor_apply).
//
// Arrays are cut into chunks, and a block takes one: `chunks` says for each block which array, and which chunk of it.
// Where the arrays lie is a table in memory, too. So a step's launches do not depend on how many arrays there are, and
// no block is left alone with a large one. Learning rate, step and loss scale are read from `control`, so that a
// recorded launch can be made again with others; the columns are those of kernels/multi_tensor.py.
#include "real.cuh"

#ifndef THREADS
#define THREADS 256  // of a block
#endif
#ifndef CHUNK
#define CHUNK 16384  // numbers that a block takes
#endif
enum { LR, STEP, SCALE, GOOD, SKIPPED };

#define WHICH (chunks[2 * blockIdx.x])
#define FIRST ((long long)chunks[2 * blockIdx.x + 1] * CHUNK + threadIdx.x)
#define END min(((long long)chunks[2 * blockIdx.x + 1] + 1) * CHUNK, sizes[WHICH])

// One atomic operation for a block that finds any; none in a good step.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
found_nonfinite(const int* chunks, const long long* sizes, const real* const* grads, int* found) {
    const real* const grad = grads[WHICH];
    const long long end = END;
    bool bad = false;
#pragma unroll 4
    for (long long i = FIRST; i < end; i += THREADS) {
        const sum g = (sum)grad[i];
        bad |= !(g - g == 0);  // inf - inf is NaN
    }
    if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(found, 1);
}

// PyTorch's formula, as in update.cu. `buffers` may be null, or hold null. What is skipped is not read.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
multi_sgd(const int* chunks, const long long* sizes, real* const* data, const real* const* grads, real* const* buffers,
          const double* hyper, const double* control, const int* found) {
    enum { RATE, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, COLUMNS };
    if (found && *found) return;
    const double* const mine = hyper + WHICH * COLUMNS;
    const sum lr = (sum)(control[LR] * mine[RATE]), unscale = (sum)(1 / control[SCALE]);
    const sum momentum = (sum)mine[MOMENTUM], decay = (sum)mine[WEIGHT_DECAY];
    const sum gain = (sum)(control[STEP] == 0 ? 1 : 1 - mine[DAMPENING]);
    const bool nesterov = mine[NESTEROV] != 0;
    real* const weights = data[WHICH];
    real* const buffer = buffers && momentum != 0 ? buffers[WHICH] : nullptr;
    const real* const grad = grads[WHICH];
    const long long end = END;
    for (long long i = FIRST; i < end; i += THREADS) {
        const sum w = (sum)weights[i], g = (sum)grad[i] * unscale + decay * w;
        sum step = g;
        if (buffer) {
            const sum v = momentum * (sum)buffer[i] + gain * g;
            buffer[i] = (real)v;
            step = nesterov ? g + momentum * v : v;
        }
        weights[i] = (real)(w - lr * step);
    }
}

// As in update.cu. One thread of a block computes what depends on the step: powers are slow, and in double more so.
// at most 48 registers, 16 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
multi_adam(const int* chunks, const long long* sizes, real* const* data, const real* const* grads,
           real* const* exp_avgs, real* const* exp_avg_sqs, const double* hyper, const double* control,
           const int* found) {
    enum { RATE, BETA1, BETA2, EPS, DECAY, DECOUPLED, COLUMNS };
    __shared__ sum shared[2];
    if (found && *found) return;
    const double* const mine = hyper + WHICH * COLUMNS;
    const double lr = control[LR] * mine[RATE];
    if (threadIdx.x == 0) {
        const double step = control[STEP] + 1;
        shared[0] = (sum)(lr / (1 - pow(mine[BETA1], step)));
        shared[1] = (sum)sqrt(1 - pow(mine[BETA2], step));
    }
    __syncthreads();
    const sum rate = shared[0], correction = shared[1], unscale = (sum)(1 / control[SCALE]);
    const sum gain1 = (sum)(1 - mine[BETA1]), beta2 = (sum)mine[BETA2], gain2 = (sum)(1 - mine[BETA2]);
    const sum keep = (sum)(mine[DECOUPLED] != 0 ? 1 - lr * mine[DECAY] : 1), eps = (sum)mine[EPS];
    const sum decay = (sum)(mine[DECOUPLED] != 0 ? 0 : mine[DECAY]);
    real* const weights = data[WHICH];
    real* const exp_avg = exp_avgs[WHICH];
    real* const exp_avg_sq = exp_avg_sqs[WHICH];
    const real* const grad = grads[WHICH];
    const long long end = END;
    for (long long i = FIRST; i < end; i += THREADS) {
        const sum w = (sum)weights[i], g = (sum)grad[i] * unscale + decay * w, before = (sum)exp_avg[i];
        const sum m = before + gain1 * (g - before);
        const sum v = beta2 * (sum)exp_avg_sq[i] + gain2 * (g * g);
        exp_avg[i] = (real)m;
        exp_avg_sq[i] = (real)v;
        weights[i] = (real)(keep * w - rate * m / ((sum)sqrt(v) / correction + eps));
    }
}

// One thread: how the loss scale changes after a step. It stays where it would no longer be a float.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void update_scale(double* control, int* found, double growth, double backoff, int interval,
                                        double floor) {
    const double scale = control[SCALE], grown = scale * growth;
    if (*found) {
        control[SCALE] = max(scale * backoff, floor);
        control[GOOD] = 0;
        control[SKIPPED] += 1;
    } else {
        const double good = control[GOOD] + 1;
        control[STEP] += 1;
        control[GOOD] = good >= interval ? 0 : good;
        if (good >= interval && grown <= 3.4028234663852886e38) control[SCALE] = grown;
    }
    *found = 0;
}
