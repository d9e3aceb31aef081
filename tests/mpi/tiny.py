"""A small network of hand-made ops, and data that are the same on any number of ranks."""

from __future__ import annotations

import numpy as np

from nanocnn.tensor import Op, Tensor

SAMPLES, STEPS, LR = 24, 20, 0.3


class Linear(Op):
    def forward(self, x, w, b):
        self.save(x, w)
        return x @ w + b

    def backward(self, gy):
        x, w = self.saved
        return gy @ w.T, x.T @ gy, gy.sum(axis=0)


class Tanh(Op):
    def forward(self, x):
        y = np.tanh(x)
        self.save(y)
        return y

    def backward(self, gy):
        (y,) = self.saved
        return gy * (1 - y * y)


class MeanSquare(Op):
    """mean(x^2) * weight"""

    def forward(self, x, *, weight):
        self.save(x)
        self.factor = np.asarray(weight / x.size, x.dtype)
        return np.asarray((x * x).sum() * self.factor, x.dtype)

    def backward(self, gy):
        (x,) = self.saved
        return gy * 2 * x * self.factor


class Sub(Op):
    def forward(self, x, t):
        return x - t

    def backward(self, gy):
        return gy, -gy


def parameters(seed: int = 0, dtype=np.float32) -> list[tuple[str, Tensor]]:
    """Three layers, 6 -> 40 -> 30 -> 2, and one parameter that nothing uses."""
    rng = np.random.default_rng(seed)
    named = []
    for i, (n, m) in enumerate([(6, 40), (40, 30), (30, 2)]):
        named.append((f"{i}.weight", Tensor((rng.standard_normal((n, m)) / n**0.5).astype(dtype), requires_grad=True)))
        named.append((f"{i}.bias", Tensor(np.zeros(m, dtype), requires_grad=True)))
    named.insert(3, ("unused", Tensor(np.ones((7, 5), dtype), requires_grad=True)))
    return named


def batch(step: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of a step: (SAMPLES, 6) and (SAMPLES, 2)."""
    rng = np.random.default_rng(1000 + step)
    x = rng.standard_normal((SAMPLES, 6)).astype(dtype)
    return x, np.stack([x[:, 0] * x[:, 1], np.sin(x[:, 2])], axis=1).astype(dtype)


def loss(named: list[tuple[str, Tensor]], x: np.ndarray, t: np.ndarray, weight: float) -> Tensor:
    """Mean squared error over (x, t), times `weight`."""
    p = dict(named)
    h = Tensor(x)
    for i in range(3):
        h = Linear.apply(h, p[f"{i}.weight"], p[f"{i}.bias"])
        h = Tanh.apply(h) if i < 2 else h
    return MeanSquare.apply(Sub.apply(h, Tensor(t)), weight=weight)
