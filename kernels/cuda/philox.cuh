// Random bits: Philox4x32-10 (Salmon et al. 2011), bit for bit that of kernels/random.py.
//
// Ten rounds of two multiplications make four words of a counter. Drawn on the spot, they cost no memory traffic.
#pragma once

#include "real.cuh"

// Four words for the counter (block, stream, sample, epoch) and the key (seed0, seed1).
__device__ __forceinline__ uint4 philox(unsigned block, unsigned stream, unsigned sample, unsigned epoch,
                                        unsigned seed0, unsigned seed1) {
    unsigned c0 = block, c1 = stream, c2 = sample, c3 = epoch;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const unsigned high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ seed0, c1 = low1;
        c2 = high0 ^ c3 ^ seed1, c3 = low0;
        seed0 += 0x9E3779B9u, seed1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}
