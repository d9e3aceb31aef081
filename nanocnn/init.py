"""Where weights start: drawn by NumPy on the CPU, so that every device and every rank starts alike."""

from __future__ import annotations

import math

import numpy as np


def kaiming_uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """float32 from U(-b, b), b = sqrt(6 / fan_in): with a ReLU behind it a layer keeps the variance of its input.

    He et al., "Delving deep into rectifiers" (2015), equation 10. For convolutions; PyTorch's start from a sixth of
    this variance, with which a plain AlexNet sits on its first plateau (loss 2.303) for epochs.
    """
    bound = math.sqrt(6 / fan_in)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def lecun_uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """float32 from U(-b, b), b = sqrt(3 / fan_in): unit variance in, unit variance out, without a ReLU.

    LeCun et al., "Efficient backprop" (1998), section 4.6. For linear layers.
    """
    bound = math.sqrt(3 / fan_in)
    return rng.uniform(-bound, bound, shape).astype(np.float32)
