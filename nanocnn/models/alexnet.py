"""AlexNet (Krizhevsky et al. 2012) in its CIFAR form: 3x3 kernels, for 32x32 images."""

from __future__ import annotations

import numpy as np

from .. import nn, random
from ..tensor import Tensor


class AlexNet(nn.Module):
    """(N, 32, 32, 3) -> (N, num_classes); 23.3 M parameters at width 1.

    `width` scales every layer's channels and features. `batch_norm` puts batch norm between each convolution and its
    ReLU. `stem_stride` 1 keeps the resolution: four times the work, and a first linear layer four times as wide.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: float = 1.0,
        batch_norm: bool = False,
        stem_stride: int = 2,
        dropout: float = 0.5,
        image_size: int = 32,
        in_channels: int = 3,
        rng: np.random.Generator | None = None,
    ):
        rng = rng or random.generator()
        c1, c2, c3, c4, c5, hidden = (max(1, round(width * c)) for c in (64, 192, 384, 256, 256, 4096))
        side = image_size // stem_stride // 8
        if side < 1:
            raise ValueError(f"images of {image_size} pixels are too small: expected at least {8 * stem_stride}")

        def conv(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
            norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
            return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=not batch_norm, rng=rng), *norm, nn.ReLU()]

        # Logits that start near 0 give a first loss of log(num_classes); large ones cost the first epoch to unlearn.
        last = nn.Linear(hidden, num_classes, rng=rng)
        last.weight.data *= 0.1

        self.features = nn.Sequential(
            *conv(in_channels, c1, stem_stride),
            nn.MaxPool2d(2),
            *conv(c1, c2),
            nn.MaxPool2d(2),
            *conv(c2, c3),
            *conv(c3, c4),
            *conv(c4, c5),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(side * side * c5, hidden, rng=rng),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden, rng=rng),
            nn.ReLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def alexnet_cifar(num_classes: int = 10, **options) -> AlexNet:
    """AlexNet for 32x32 images; options as AlexNet's."""
    return AlexNet(num_classes, **options)
