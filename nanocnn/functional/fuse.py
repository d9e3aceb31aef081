"""The switch `fuse`: has what follows a convolution, linear layer or batch norm a pass over memory to itself?

Bias, residual and ReLU do next to no arithmetic; alone, each reads and writes its whole array. Fused, they happen while
the value is still in a register. Every function here that takes `relu` or `residual` computes the same either way; with
the switch off it is a composition of the textbook's ops.
"""

from __future__ import annotations

from typing import Any

from ..kernels import elementwise as kernels
from ..kernels.dispatch import Switch
from ..tensor import Tensor
from .activation import relu as relu_of

fuse = Switch(
    "fuse",
    "bias, residual and ReLU after a convolution, linear layer or batch norm; ReLU before max pooling",
    on="in the pass of the layer beside them, forward and backward",
    off="each in a pass of its own, as in the textbook",
)


def one_by_one(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(y + residual), an op each: what the fused ops do at once."""
    y = y if residual is None else y + residual
    return relu_of(y) if relu else y


def back_through_epilogue(gy: Any, y: Any, has_bias: bool) -> tuple[Any, Any]:
    """Back through y = relu(. + bias): gy where y > 0, and for a bias the sum of that over the rows, in one pass.

    `y` is None where there was no ReLU.
    """
    if y is None:
        return gy, kernels.bias_grad(gy) if has_bias else None
    if has_bias:
        return kernels.relu_bias_grad(gy, y)
    return kernels.relu_grad(gy, y), None


def check_residual(name: str, y_shape: tuple[int, ...], y_dtype: Any, residual: Tensor | None) -> None:
    """Raise ValueError unless `residual` has the output's shape and dtype: it is added without broadcasting."""
    if residual is not None and (residual.shape != y_shape or residual.dtype != y_dtype):
        raise ValueError(
            f"{name} with a residual of {residual.dtype} {residual.shape}: expected {y_dtype} {y_shape}, the output's"
        )
