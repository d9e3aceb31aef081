// A product of one warpgroup, with one mistake or none, for test_wgmma.py.
#include "wgmma.cuh"

enum { NONE, NO_PROXY_FENCE, NO_FENCE, TOO_EARLY, TOUCHED, NO_WAIT, NO_COMMIT, OVERWRITTEN, COPIED_OVER, WITHOUT_A_WARP,
       OUT_OF_BOUNDS, UNINITIALISED, NO_BARRIER };

// C (64 x 128) = A (64 x 16) B (16 x 128), which lie in the image of shared memory as the descriptors say, relative to
// its beginning. `count` pieces of 16 bytes.
extern "C" __global__ void one_product(const half* image, float* c, int count, long long a, long long b, int mistake) {
    DYNAMIC_SHARED(unsigned char, raw);
    half* const tiles = reinterpret_cast<half*>(raw + (-shared_address(raw) & 1023));
    const int t = threadIdx.x;
    float sum[64] = {};
    for (int i = t; i < count - (mistake == UNINITIALISED); i += blockDim.x) copy16(tiles + i * 8, image + i * 8);
    if (mistake != NO_PROXY_FENCE) fence_proxy_async();
    if (mistake != NO_BARRIER) __syncthreads();
    const uint64_t begin = shared_address(tiles) >> 4;
    if (mistake != NO_FENCE) wgmma_fence();
    if (mistake == OUT_OF_BOUNDS) b += 1024;
    if (mistake != WITHOUT_A_WARP || t / 32 != 2)
        wgmma<128>(sum, begin + a, begin + b);  // HERE
    if (mistake != NO_COMMIT) wgmma_commit();
    if (mistake == TOUCHED) sum[5] += 1;
    if (mistake == OVERWRITTEN) store2(tiles + t * 2, make_float2(0, 0));
    if (mistake == COPIED_OVER) cp_async16(tiles + t * 8, image, true);
    if (mistake != TOO_EARLY && mistake != NO_WAIT) wgmma_wait<0>();  // TOUCHED
    wgmma_done(sum);
    for (int i = 0; i < 64; i++) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        c[row * 128 + column] = sum[i];
    }
    if (mistake == TOO_EARLY) wgmma_wait<0>();
}
