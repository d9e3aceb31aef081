"""Activation functions: the calculus; speed is a matter of kernels/elementwise.py."""

from __future__ import annotations

from ..kernels import elementwise as kernels
from ..tensor import Op, Tensor


class ReLU(Op):
    def forward(self, x):
        y = kernels.relu(x)
        self.save(y)  # which the next layer keeps anyway, so that x need not be
        return y

    def backward(self, gy):
        return kernels.relu_grad(gy, *self.saved)


class Sigmoid(Op):
    def forward(self, x):
        y = kernels.sigmoid(x)
        self.save(y)
        return y

    def backward(self, gy):
        return kernels.sigmoid_grad(gy, *self.saved)


class SiLU(Op):
    def forward(self, x):
        self.save(x)
        return kernels.silu(x)

    def backward(self, gy):
        return kernels.silu_grad(gy, *self.saved)


class GELU(Op):
    def forward(self, x):
        self.save(x)
        return kernels.gelu(x)

    def backward(self, gy):
        return kernels.gelu_grad(gy, *self.saved)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise; NaN stays NaN."""
    return ReLU.apply(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise."""
    return Sigmoid.apply(x)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), elementwise (Elfwing et al. 2018; also "swish")."""
    return SiLU.apply(x)


def gelu(x: Tensor) -> Tensor:
    """x P(X <= x) for a standard normal X, elementwise: the exact form (Hendrycks & Gimpel 2016)."""
    return GELU.apply(x)
