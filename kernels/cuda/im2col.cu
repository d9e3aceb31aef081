// im2col and its transpose on a GPU. Both move numbers and hardly compute: what counts is how many sectors a warp
// touches.
//
// A row of windows (or of pixels) of one image is blockIdx.x, of which there may be many; blockIdx.y and the threads
// go along it, channels first. So neighbours read neighbours, and only the place along the row takes divisions by a
// thread.
#include "real.cuh"

#define ALONG (blockIdx.y * blockDim.x + threadIdx.x)
#define VECTOR (16 / (int)sizeof(real))  // numbers in 16 bytes

// ------------------------------------------------------------------ im2col: a window becomes a row of the columns

// A thread for each number of the columns. Each pixel is read as often as there are windows that hold it, mostly from
// caches.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void im2col(const real* x, real* cols, int h, int w, int c, int kh, int kw, int oh, int ow,
                                  int sh, int sw, int ph, int pw, int dh, int dw) {
    const unsigned i = ALONG, along = (unsigned)ow * kh * kw * c;
    if (i >= along) return;
    const int channel = i % c, tap = i / c % (kh * kw), q = i / c / (kh * kw);
    const int image = blockIdx.x / oh, p = blockIdx.x % oh;
    const int r = p * sh - ph + tap / kw * dh, s = q * sw - pw + tap % kw * dw;
    const bool inside = r >= 0 && r < h && s >= 0 && s < w;
    cols[(size_t)blockIdx.x * along + i] = inside ? x[(((size_t)image * h + r) * w + s) * c + channel] : (real)0;
}

// c is a multiple of VECTOR. A thread for each 16 bytes: as many sectors, but a quarter of the requests (fp16: an
// eighth), and of the divisions.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void im2col_vectorised(const real* x, real* cols, int h, int w, int c, int kh, int kw, int oh,
                                             int ow, int sh, int sw, int ph, int pw, int dh, int dw) {
    const unsigned i = ALONG, pieces = c / VECTOR, along = (unsigned)ow * kh * kw * pieces;
    if (i >= along) return;
    const int piece = i % pieces, tap = i / pieces % (kh * kw), q = i / pieces / (kh * kw);
    const int image = blockIdx.x / oh, p = blockIdx.x % oh;
    const int r = p * sh - ph + tap / kw * dh, s = q * sw - pw + tap % kw * dw;
    float4 found = make_float4(0, 0, 0, 0);  // 16 bytes, of whatever type
    if (r >= 0 && r < h && s >= 0 && s < w)
        found = load4(reinterpret_cast<const float*>(x + (((size_t)image * h + r) * w + s) * c + piece * VECTOR));
    store4(reinterpret_cast<float*>(cols + ((size_t)blockIdx.x * along + i) * VECTOR), found);
}

// ------------------------------------------------------------------ col2im: each row is added back to its window

// A thread for each number of the columns, which it adds to its pixel; x is zero before. Windows overlap, so the
// additions must be atomic: each reads and writes the pixel again, and their order, and with it the last bits, is
// chance.
// at most 24 registers, 0 bytes of shared memory
extern "C" __global__ void col2im_atomic(const real* cols, real* x, int h, int w, int c, int kh, int kw, int oh,
                                         int ow, int sh, int sw, int ph, int pw, int dh, int dw) {
    const unsigned i = ALONG, along = (unsigned)ow * kh * kw * c;
    if (i >= along) return;
    const int channel = i % c, tap = i / c % (kh * kw), q = i / c / (kh * kw);
    const int image = blockIdx.x / oh, p = blockIdx.x % oh;
    const int r = p * sh - ph + tap / kw * dh, s = q * sw - pw + tap % kw * dw;
    if (r >= 0 && r < h && s >= 0 && s < w)
        atomicAdd(&x[(((size_t)image * h + r) * w + s) * c + channel], cols[(size_t)blockIdx.x * along + i]);
}

// A thread for each number of x, which gathers what lands on it: one store, no atomics, always the same order. A tap
// meets this pixel from a window only if the stride divides the way to it.
// at most 32 registers, 0 bytes of shared memory
extern "C" __global__ void col2im(const real* cols, real* x, int h, int w, int c, int kh, int kw, int oh, int ow,
                                  int sh, int sw, int ph, int pw, int dh, int dw) {
    const unsigned i = ALONG;
    if (i >= (unsigned)w * c) return;
    const int channel = i % c, s = i / c, image = blockIdx.x / h, r = blockIdx.x % h;
    sum total = 0;
    for (int k = 0; k < kh; k++) {
        const int below = r + ph - k * dh, p = below / sh;
        if (below < 0 || below % sh || p >= oh) continue;
        for (int j = 0; j < kw; j++) {
            const int right = s + pw - j * dw, q = right / sw;
            if (right < 0 || right % sw || q >= ow) continue;
            const size_t window = ((size_t)image * oh + p) * ow + q;
            total += (sum)cols[((window * kh + k) * kw + j) * c + channel];
        }
    }
    x[(size_t)blockIdx.x * w * c + i] = (real)total;
}
