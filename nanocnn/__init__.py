"""nanocnn."""
from . import kernels
from . import functional, models, nn, optim, schedules, testing
from .kernels.dispatch import board, use, using
from .profile import profile
from .random import manual_seed
from .tensor import Tensor, no_grad
