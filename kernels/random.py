"""Counter-based random bits: a number is a function of its place, not of how many were drawn before it.

Keyed by (seed, epoch, sample), an augmentation or a dropout mask is the same on 1 rank and on 4, in this run and in the
one that resumed. Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, xp_of

M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl constants of the paper's section 3.3
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


@Primitive(unkeyed=("seed", "epoch", "stream"))
def random_bits(samples, n, seed, epoch=0, stream=0):
    """(N,) sample numbers -> (N, n) uint32: `n` random words for each sample.

    The counter's four words are (block, stream, sample, epoch) and the key is the seed, so equal arguments give equal
    bits anywhere. `seed` is taken modulo 2^64; `samples`, `epoch` and `stream` modulo 2^32.
    """
    xp = xp_of(samples)
    mask, shift = xp.uint64(0xFFFFFFFF), xp.uint64(32)
    blocks = -(-n // 4)
    c0 = xp.broadcast_to(xp.arange(blocks, dtype=xp.uint64), (len(samples), blocks))
    c1 = xp.full_like(c0, stream & 0xFFFFFFFF)
    c2 = xp.broadcast_to(samples.astype(xp.uint64)[:, None] & mask, c0.shape)
    c3 = xp.full_like(c0, epoch & 0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(ROUNDS):
        p0, p1 = c0 * xp.uint64(M0), c2 * xp.uint64(M1)  # 32 x 32 -> 64 bits
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ xp.uint64(k0), p1 & mask, (p0 >> shift) ^ c3 ^ xp.uint64(k1), p0 & mask
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    words = xp.stack([c0, c1, c2, c3], axis=-1).astype(xp.uint32)
    return words.reshape(len(samples), 4 * blocks)[:, :n]


@random_bits.variant("numba", supports=lambda *args, **kwargs: True)
def random_bits_numba(samples, n, seed, epoch=0, stream=0):
    """one loop over samples, the ten rounds in registers"""
    out = np.empty((len(samples), -(-n // 4) * 4), np.uint32)
    key = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    words = np.uint32(stream & 0xFFFFFFFF), np.uint32(epoch & 0xFFFFFFFF)
    _philox(samples.astype(np.uint32), *words, *key, out)
    return out[:, :n]


@njit(parallel=True, cache=True)
def _philox(samples, stream, epoch, seed0, seed1, out):
    for i in prange(out.shape[0]):
        philox_blocks(0, stream, samples[i], epoch, seed0, seed1, out[i].reshape(-1, 4))


@njit(inline="always")  # where the caller knows the length of `words` it is a constant, and the loop vector code
def philox_blocks(first, stream, sample, epoch, seed0, seed1, words):
    """Fill `words` (blocks, 4) with the blocks from `first` on; a loop without a branch."""
    for block in range(words.shape[0]):
        c0, c1, c2, c3 = np.uint32(first + block), stream, sample, epoch
        k0, k1 = seed0, seed1
        for _ in range(ROUNDS):
            p0, p1 = np.uint64(c0) * np.uint64(M0), np.uint64(c2) * np.uint64(M1)
            c0, c1 = np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0, np.uint32(p1)
            c2, c3 = np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1, np.uint32(p0)
            k0, k1 = np.uint32(k0 + np.uint32(W0)), np.uint32(k1 + np.uint32(W1))
        words[block, 0], words[block, 1], words[block, 2], words[block, 3] = c0, c1, c2, c3


@random_bits.work
def _(samples, n, seed, epoch=0, stream=0):
    return 0, len(samples) * n * 4


def uniform(bits, dtype=np.float32):
    """uint32 bits -> numbers in [0, 1), from the upper 24 bits: exact in float32."""
    return (bits >> 8).astype(dtype) * dtype(2.0**-24)
