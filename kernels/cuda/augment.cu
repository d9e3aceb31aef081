// Batches from bytes that stay on the device: crop, flip, cutout and normalisation, drawn and done in one pass.
#include "philox.cuh"

#ifndef THREADS
#define THREADS 256  // of a block, a value each: blocks along x are images, along y the parts of one
#endif

// Rounded before shift is taken off, as NumPy does it: a fused multiply-add would have other last bits.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// A place up to size - 1 beyond either end -> one within: the image mirrored at its edge pixels.
__device__ __forceinline__ int mirror(int place, int size) {
    place = place < 0 ? -place : place;
    return min(place, 2 * (size - 1) - place);
}

// Of the words of a sample: 0 and 2 are where the crop begins, 1 is the flip, 3 and 4 the centre of what is cut out. A
// word times n, the upper half of it, is a whole number below n. Two threads draw for all of the block.
// at most 32 registers, 32 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS)
augment(const unsigned char* images, const long long* samples, const sum* scale, const sum* shift, real* x, int height,
        int width, int channels, int pad, int flip, int cutout, unsigned epoch, unsigned stream, unsigned seed0,
        unsigned seed1) {
    __shared__ unsigned words[2][4];
    const long long sample = samples[blockIdx.x];
    if (threadIdx.x < 2) {
        const uint4 four = philox(threadIdx.x, stream, (unsigned)sample, epoch, seed0, seed1);
        unsigned* const mine = words[threadIdx.x];
        mine[0] = four.x, mine[1] = four.y, mine[2] = four.z, mine[3] = four.w;
    }
    __syncthreads();
    const int i = blockIdx.y * THREADS + threadIdx.x, count = height * width * channels;
    if (i >= count) return;
    const int channel = i % channels, column = i / channels % width, row = i / channels / width;
    const int turned = flip && words[0][1] >> 31 ? width - 1 - column : column;
    const int from_row = mirror(row + (int)__umulhi(words[0][0], 2 * pad + 1) - pad, height);
    const int from_column = mirror(turned + (int)__umulhi(words[0][2], 2 * pad + 1) - pad, width);
    const int down = row - (int)__umulhi(words[0][3], height) + cutout / 2;
    const int right = column - (int)__umulhi(words[1][0], width) + cutout / 2;
    const bool cut = down >= 0 && down < cutout && right >= 0 && right < cutout;
    const unsigned char v = images[((sample * height + from_row) * width + from_column) * channels + channel];
    x[(long long)blockIdx.x * count + i] = (real)(cut ? (sum)0 : product((sum)v, scale[channel]) - shift[channel]);
}
