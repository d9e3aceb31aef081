"""Gradient checks, for tests and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .tensor import Tensor


def check_gradients(
    fn: Callable[..., Tensor],
    *arrays: np.ndarray,
    parameters: Iterable[Tensor] = (),
    rtol: float = 1e-6,
    eps: float = 1e-6,
    seed: int = 0,
) -> None:
    """Assert that the backward pass of `fn` is the derivative of its forward pass.

    `fn` takes one Tensor for each of the float64 `arrays` and returns a Tensor; `parameters` are leaves that it uses
    besides (`check_gradients(layer, x, parameters=layer.parameters())`). Both sides of one number are compared:
    <gy, J v>, for a random output gradient gy and a random direction v through all inputs at once, by a central
    difference, and <J^T gy, v>, by `backward()`. Two evaluations whatever the size (as in HIPS/autograd's check_vjp).
    Raises AssertionError with both numbers.
    """
    parameters = list(parameters)
    for a in (*arrays, *(p.data for p in parameters)):
        if a.dtype != np.float64:
            raise TypeError(f"check_gradients needs float64, got {a.dtype}: float32 differences are mostly rounding")
    rng = np.random.default_rng(seed)
    leaves = [*(Tensor(a.copy(), requires_grad=True) for a in arrays), *parameters]
    directions = [rng.standard_normal(x.shape) for x in leaves]
    inputs = leaves[: len(arrays)]
    for x in leaves:
        x.zero_grad()
    y = fn(*inputs)
    gy = rng.standard_normal(y.shape)
    y.backward(gy)
    exact = sum(float(np.vdot(x.grad, v)) for x, v in zip(leaves, directions, strict=True) if x.grad is not None)

    starts = [x.data.copy() for x in leaves]

    def shifted(step: float) -> np.ndarray:
        for x, start, v in zip(leaves, starts, directions, strict=True):
            x.data[...] = start + step * v
        return fn(*inputs).data.copy()

    numeric = float(np.vdot(gy, (shifted(eps) - shifted(-eps)) / (2 * eps)))
    shifted(0)
    # The difference of two rounded outputs is known to about |gy||y| 1e-16 / eps, however small the derivative is; and
    # that of two rounded inputs to |x| 1e-16 / eps, however small the direction is.
    noise = 4e-16 / eps * float(np.linalg.norm(gy) * np.linalg.norm(y.data))
    noise += (
        4e-16 / eps * sum(float(np.linalg.norm(x.data) * np.linalg.norm(x.grad)) for x in leaves if x.grad is not None)
    )
    assert abs(exact - numeric) <= rtol * max(abs(exact), abs(numeric)) + noise, (
        f"backward gives {exact!r}, the central difference {numeric!r}: relative error "
        f"{abs(exact - numeric) / max(abs(exact), abs(numeric)):.1e}, allowed {rtol:.0e}"
    )
