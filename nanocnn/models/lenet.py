"""LeNet-5 (LeCun et al. 1998, figure 2), with ReLU and max pooling in place of sigmoids and averages."""

from __future__ import annotations

import numpy as np

from .. import nn, random
from ..tensor import Tensor


class LeNet(nn.Module):
    """(N, image_size, image_size, in_channels) -> (N, num_classes); 61,706 parameters for digits of 28x28.

    Small images are padded, as the paper does with MNIST's: the features of the second convolution are 5x5 for 28x28.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        image_size: int = 28,
        in_channels: int = 1,
        rng: np.random.Generator | None = None,
    ):
        rng = rng or random.generator()
        side = (image_size // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"images of {image_size} pixels are too small: expected at least 12")
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2, rng=rng),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, rng=rng),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * side * side, 120, rng=rng),
            nn.ReLU(),
            nn.Linear(120, 84, rng=rng),
            nn.ReLU(),
            nn.Linear(84, num_classes, rng=rng),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def lenet5(num_classes: int = 10, **options) -> LeNet:
    """LeNet-5 for 28x28 digits; options as LeNet's."""
    return LeNet(num_classes, **options)
