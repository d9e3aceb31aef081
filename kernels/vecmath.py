"""Mathematical functions that Numba can put on vectors: libm's, which it calls by itself, take one number at a time.

`exp` and `normal_cdf` are for use inside kernels. In float32 they are polynomials without a branch, so that a loop over
them becomes vector code (a sigmoid of 2 million elements: 0.5 ms instead of 4); in float64, which serves for checking,
they are libm's. A kernel that calls them is cached with them inside: after a change here, change its file too.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

FMA = {"contract"}  # let a * b + c be one instruction; NaN and infinities keep their meaning
SUMS = {"reassoc", "contract"}  # a sum in vector lanes; NaN and infinities keep their meaning
F = np.float32


def exp(x):
    """e to the x for x <= 88, within 2 units in the last place; 0 where a float32 would be subnormal. NaN stays NaN."""
    return math.exp(x)


def normal_cdf(x, e):
    """P(X <= x) for a standard normal X, given e = exp(-x^2 / 2), which its derivative needs as well."""
    return math.erfc(-x * math.sqrt(0.5)) / 2


@overload(exp, jit_options={"fastmath": FMA})
def _(x):
    if x != types.float32:
        return lambda x: math.exp(x)
    return _exp32


def _exp32(x):
    # x = n log 2 + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds to an integer n, and leaves it in the low bits.
    shifted = x * F(1.4426950408889634) + F(12582912.0)
    n = shifted - F(12582912.0)
    r = (x - n * F(0.693359375)) + n * F(2.1219444e-4)  # log 2 in two parts, the first exact times n
    # (e^r - 1 - r) / r^2, minimax in relative error
    p = (((F(0.00138144667) * r + F(0.00836878043)) * r + F(0.0416683942)) * r + F(0.166665201)) * r + F(0.499999934)
    bits = np.int32((np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000))
    y = (p * r * r + (r + F(1))) * bits.view(np.float32)  # times 2^n, made of its exponent bits
    return F(0) if x < F(-87.3) else y


@overload(normal_cdf, jit_options={"fastmath": FMA})
def _(x, e):
    if x != types.float32:
        return lambda x, e: math.erfc(-x * math.sqrt(0.5)) / 2
    return _normal_cdf32


def _normal_cdf32(x, e):
    # P(X > |x|) = e R(t) with t = 1 / (1 + 0.23 |x|): the form of Abramowitz & Stegun 26.2.17, fitted to float32
    # (relative error 2.5e-8 near 0, growing as x^2).
    t = F(1) / (F(1) + F(0.23) * abs(x))
    p = ((F(-0.0752600172) * t + F(0.274488166)) * t + F(-0.244471579)) * t + F(0.262042948)
    p = (((p * t + F(-0.00499019263)) * t + F(0.107303134)) * t + F(0.0889705204)) * t + F(0.0919170079)
    tail = e * p * t
    return tail if x < F(0) else F(1) - tail
