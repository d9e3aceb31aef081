// Pooling of NHWC images, both ways by gathering: a thread computes one number, and nobody else writes it.
//
// A block takes neighbours of one row of the result, channels side by side, so a warp loads whole sectors where there
// are 8 channels or more. Windows that overlap read a pixel several times: after the first time it is in a cache.
#include "real.cuh"

#define MINUS_INFINITY ((sum)__uint_as_float(0xff800000u))
#define NOWHERE 255  // the position that no pixel has

// The row of the result is the block's, so what must be divided fits in 32 bits.
#define AT ((int)(blockIdx.y * blockDim.x + threadIdx.x))

// The largest of each window, and where in the window it is. NaN is larger than any number; of equals the first counts.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void max_pool2d(const real* x, real* y, unsigned char* position, int h, int w, int c, int oh,
                                      int ow, int kh, int kw, int sh, int sw, int ph, int pw, int relu) {
    if (AT >= ow * c) return;
    const int image = blockIdx.x / oh, p = blockIdx.x % oh, q = AT / c, channel = AT % c;
    const int top = p * sh - ph, left = q * sw - pw;
    sum best = MINUS_INFINITY;
    int where = 0;
    bool found = false;  // a pixel that is not padding: even -inf is larger than that
    for (int i = max(0, -top); i < min(kh, h - top); i++)
        for (int j = max(0, -left); j < min(kw, w - left); j++) {
            const sum v = (sum)x[(((size_t)image * h + top + i) * w + left + j) * c + channel];
            if (!found || v > best || v != v) best = v, where = i * kw + j;
            found = true;
        }
    if (relu && best <= 0) best = 0, where = NOWHERE;
    const size_t to = (size_t)blockIdx.x * ow * c + AT;
    y[to] = (real)best;
    position[to] = (unsigned char)where;
}

// The windows [first, end) of `count` along an axis that cover padded pixel i.
__device__ __forceinline__ int first_over(int i, int kernel, int stride) {
    return i < kernel ? 0 : (i - kernel) / stride + 1;
}
__device__ __forceinline__ int end_over(int i, int stride, int count) { return min(count, i / stride + 1); }

// A pixel adds up the gradients of those windows over it whose largest it was.
// at most 40 registers, 0 bytes of shared memory
extern "C" __global__ void max_pool2d_grad(const real* gy, const unsigned char* position, real* gx, int h, int w, int c,
                                           int oh, int ow, int kh, int kw, int sh, int sw, int ph, int pw) {
    if (AT >= w * c) return;
    const int image = blockIdx.x / h, i = blockIdx.x % h + ph, j = AT / c + pw, channel = AT % c;
    sum total = 0;
    for (int p = first_over(i, kh, sh); p < end_over(i, sh, oh); p++)
        for (int q = first_over(j, kw, sw); q < end_over(j, sw, ow); q++) {
            const size_t from = (((size_t)image * oh + p) * ow + q) * c + channel;
            const sum g = (sum)gy[from];  // before the position is known: both loads are on their way at a time
            total += position[from] == (i - p * sh) * kw + j - q * sw ? g : 0;
        }
    gx[(size_t)blockIdx.x * w * c + AT] = (real)total;
}

// The mean of each window; padding counts, as zeros.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void avg_pool2d(const real* x, real* y, int h, int w, int c, int oh, int ow, int kh, int kw,
                                      int sh, int sw, int ph, int pw) {
    if (AT >= ow * c) return;
    const int image = blockIdx.x / oh, p = blockIdx.x % oh, q = AT / c, channel = AT % c;
    sum total = 0;
    for (int i = max(0, p * sh - ph); i < min(h, p * sh - ph + kh); i++)
        for (int j = max(0, q * sw - pw); j < min(w, q * sw - pw + kw); j++)
            total += (sum)x[(((size_t)image * h + i) * w + j) * c + channel];
    y[(size_t)blockIdx.x * ow * c + AT] = (real)(total / (sum)(kh * kw));
}

// A pixel adds up its share of each window over it.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void avg_pool2d_grad(const real* gy, real* gx, int h, int w, int c, int oh, int ow, int kh,
                                           int kw, int sh, int sw, int ph, int pw) {
    if (AT >= w * c) return;
    const int image = blockIdx.x / h, i = blockIdx.x % h + ph, j = AT / c + pw, channel = AT % c;
    sum total = 0;
    for (int p = first_over(i, kh, sh); p < end_over(i, sh, oh); p++)
        for (int q = first_over(j, kw, sw); q < end_over(j, sw, ow); q++)
            total += (sum)gy[(((size_t)image * oh + p) * ow + q) * c + channel];
    gx[(size_t)blockIdx.x * w * c + AT] = (real)(total / (sum)(kh * kw));
}
