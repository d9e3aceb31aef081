"""nanocnn: a CNN training engine in which every HPC optimisation is a switch, a short file and a measured number."""

from . import kernels  # first: it sets what NumPy, BLAS and Numba read when they are imported

# isort: split
from . import checkpoint, data, functional, models, nn, optim, parallel, precision, schedules, testing, train
from .capture import capture
from .kernels.dispatch import board, use, using
from .profile import profile
from .random import manual_seed
from .tensor import Tensor, no_grad

__version__ = "0.1.0"

__all__ = [
    "Tensor",
    "board",
    "capture",
    "checkpoint",
    "data",
    "functional",
    "kernels",
    "manual_seed",
    "models",
    "nn",
    "no_grad",
    "optim",
    "parallel",
    "precision",
    "profile",
    "schedules",
    "testing",
    "train",
    "use",
    "using",
]
