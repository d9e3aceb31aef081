"""Where weights start: drawn by NumPy on the CPU, so that every device and every rank starts alike."""

from __future__ import annotations

import math

import numpy as np


def kaiming_uniform(
    rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, gain: float = math.sqrt(2)
) -> np.ndarray:
    """U(-b, b) with b = gain sqrt(3 / fan_in) (He et al. 2015, equation 10, for a uniform distribution). float32."""
    bound = gain * math.sqrt(3 / fan_in)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def torch_default(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """U(-b, b) with b = 1 / sqrt(fan_in): what PyTorch's linear and convolution layers, and their biases, start from."""
    return kaiming_uniform(rng, shape, fan_in, gain=math.sqrt(1 / 3))
