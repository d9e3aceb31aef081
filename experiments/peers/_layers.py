"""The convolutions of the networks one by one: which there are, and arrays to run them on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import Layer
from ._networks import NETWORKS, Shapes


class Shape(NamedTuple):
    """A convolution of square images and kernels, its padding half the kernel."""

    side: int
    c: int
    o: int
    kernel: int
    stride: int

    @property
    def name(self) -> str:
        """`64 -> 128, 32x32, 3x3 stride 2`."""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.c} -> {self.o}, {self.side}x{self.side}, {self.kernel}x{self.kernel}{stride}"

    def flops(self, batch: int) -> int:
        """Multiplications and additions of one direction, border included: of each the same."""
        return 2 * batch * (-(-self.side // self.stride)) ** 2 * self.kernel**2 * self.c * self.o


def distinct(weights: dict[str, dict[str, np.ndarray]]) -> list[Shape]:
    """The convolutions of these networks ({model: weights}) in their order, each once."""
    found: dict[Shape, None] = {}
    for model, arrays in weights.items():
        shapes = Shapes(arrays)
        NETWORKS[model](shapes, np.zeros((1, 32, 32, 3)))
        found.update(dict.fromkeys(Shape(*shape) for shape in shapes.convolutions))
    return list(found)


def directions(shape: Shape) -> list[str]:
    """All three, but for the first layer: nobody asks for the gradient of the images."""
    return ["forward", *(["grad_x"] if shape.c > 3 else []), "grad_w"]


def make(shape: Shape, batch: int, threads: int, use: list[str]) -> Layer:
    """The layer with random arrays."""
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32)

    out, pad = -(-shape.side // shape.stride), shape.kernel // 2
    return Layer(
        x=draw(batch, shape.side, shape.side, shape.c),
        w=draw(shape.kernel, shape.kernel, shape.c, shape.o),
        gy=draw(batch, out, out, shape.o),
        stride=(shape.stride, shape.stride),
        padding=(pad, pad),
        threads=threads,
        use=use,
    )
