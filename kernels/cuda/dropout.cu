// Dropout and its random bits, which are those of the CPU.
#include "philox.cuh"

#ifndef THREADS
#define THREADS 128  // of a block, at most: each draws four words
#endif

// `place` holds seed, epoch and stream.
__device__ __forceinline__ uint4 philox_at(long long block, long long sample, const long long* place) {
    const unsigned long long seed = (unsigned long long)place[0];
    const unsigned stream = (unsigned)place[2], epoch = (unsigned)place[1];
    return philox((unsigned)block, stream, (unsigned)sample, epoch, (unsigned)seed, (unsigned)(seed >> 32));
}

// Word i of a block's `drawn` is drawn[i % 4][i / 4]. With rows 8 words longer than they need be, neighbours meet
// in no bank: neither where each writes one word of four, nor where they read four of one thread.
#define DRAWN __shared__ unsigned drawn[4][THREADS + 8]
#define WORD(i) drawn[(i) % 4][(i) / 4]

__device__ __forceinline__ void put(unsigned (*drawn)[THREADS + 8], uint4 words) {
    drawn[0][threadIdx.x] = words.x;
    drawn[1][threadIdx.x] = words.y;
    drawn[2][threadIdx.x] = words.z;
    drawn[3][threadIdx.x] = words.w;
    __syncthreads();
}

// A block draws four words a thread, for neighbours of one row, and stores them side by side.
// at most 24 registers, 2,176 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
random_bits(const long long* samples, unsigned* out, long long n, unsigned epoch, unsigned stream, unsigned seed0,
            unsigned seed1) {
    DRAWN;
    const long long first = (long long)blockIdx.y * blockDim.x;  // of its groups of four
    put(drawn, philox((unsigned)(first + threadIdx.x), stream, (unsigned)samples[blockIdx.x], epoch, seed0, seed1));
    for (int i = threadIdx.x; i < 4 * blockDim.x && 4 * first + i < n; i += blockDim.x)
        out[(long long)blockIdx.x * n + 4 * first + i] = WORD(i);
}

// A thread for each number, which uses one word of the four that it draws.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
dropout_naive(const real* x, const long long* samples, const long long* place, real* y, unsigned char* mask,
              long long n, unsigned threshold, double scale) {
    const long long column = (long long)blockIdx.y * blockDim.x + threadIdx.x, i = (long long)blockIdx.x * n + column;
    if (column >= n) return;
    const uint4 words = philox_at(column / 4, samples[blockIdx.x], place);
    const int which = column % 4;
    const bool keep = (which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w) >= threshold;
    const sum v = (sum)x[i] * (sum)scale;
    mask[i] = keep;
    y[i] = (real)(keep ? v : (sum)0);
}

// A quarter of the draws: what a thread has drawn, its neighbours use, and so all load and store neighbouring numbers.
// at most 24 registers, 2,176 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
dropout(const real* x, const long long* samples, const long long* place, real* y, unsigned char* mask, long long n,
        unsigned threshold, double scale) {
    DRAWN;
    const long long first = (long long)blockIdx.y * blockDim.x;  // of its groups of four
    put(drawn, philox_at(first + threadIdx.x, samples[blockIdx.x], place));
    for (int i = threadIdx.x; i < 4 * blockDim.x && 4 * first + i < n; i += blockDim.x) {
        const long long at = (long long)blockIdx.x * n + 4 * first + i;
        const bool keep = WORD(i) >= threshold;
        const sum v = (sum)x[at] * (sum)scale;
        mask[at] = keep;
        y[at] = (real)(keep ? v : (sum)0);
    }
}

// at most 16 registers, 0 bytes of shared memory
extern "C" __global__ void dropout_grad(const real* gy, const unsigned char* mask, real* gx, double scale,
                                        long long count) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const sum v = (sum)gy[i] * (sum)scale;
    gx[i] = (real)(mask[i] ? v : (sum)0);
}
