"""Every differentiable function, one file a family: tensors to tensors, calculus once for all devices and kernels."""

from .activation import gelu, relu, sigmoid, silu
from .attention import scaled_dot_product_attention
from .basic import cast, concat, exp, linear, log, max, mean, pad, reshape, sum, transpose
from .conv import conv2d
from .dropout import dropout
from .loss import cross_entropy, log_softmax, mse_loss, softmax
from .norm import batch_norm, layer_norm
from .pool import adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "cast",
    "concat",
    "conv2d",
    "cross_entropy",
    "dropout",
    "exp",
    "gelu",
    "global_avg_pool2d",
    "layer_norm",
    "linear",
    "log",
    "log_softmax",
    "max",
    "max_pool2d",
    "mean",
    "mse_loss",
    "pad",
    "relu",
    "reshape",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "sum",
    "transpose",
]
