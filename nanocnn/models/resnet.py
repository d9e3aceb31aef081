"""ResNet (He et al. 2016) of basic blocks, for 32x32 images or with ImageNet's stem. Names are torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import functional as F
from .. import nn, random
from ..tensor import Tensor


class BasicBlock(nn.Module):
    """(N, H, W, c_in) -> (N, H/stride, W/stride, c_out): relu(two 3x3 convolutions of x + x), figure 2 of the paper.

    The sum needs equal shapes. Where they differ the shortcut is a 1x1 convolution with batch norm, option B of
    section 4.1. Batch norm has a bias of its own, so no convolution needs one.
    """

    folds = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, c_in: int, c_out: int, stride: int, rng: np.random.Generator):
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False, rng=rng)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False, rng=rng)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False, rng=rng)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.downsample else x
        y = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(y), residual=shortcut, relu=True)


class ResNet(nn.Module):
    """(N, H, W, 3) -> (N, num_classes), with `depths` basic blocks in each of the four stages.

    `stem` "cifar" keeps the resolution, a 3x3 convolution; "imagenet" divides it by 4, a 7x7 convolution of stride 2
    and a max pooling. Each later stage halves it again and doubles the channels: 64, 128, 256, 512, times `width`.
    """

    folds = (("conv1", "bn1"),)

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 10,
        *,
        stem: str = "cifar",
        width: float = 1.0,
        in_channels: int = 3,
        rng: np.random.Generator | None = None,
    ):
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem={stem!r}: expected 'cifar' (3x3, stride 1) or 'imagenet' (7x7, stride 2, max pool)")
        rng = rng or random.generator()
        c1, c2, c3, c4 = (max(1, round(width * c)) for c in (64, 128, 256, 512))

        def stage(c_in: int, c_out: int, depth: int, stride: int) -> nn.Sequential:
            first = BasicBlock(c_in, c_out, stride, rng)
            return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1, rng) for _ in range(depth - 1)))

        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, c1, kernel, stride, padding=kernel // 2, bias=False, rng=rng)
        self.bn1 = nn.BatchNorm2d(c1)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = stage(c1, c1, depths[0], stride=1)
        self.layer2 = stage(c1, c2, depths[1], stride=2)
        self.layer3 = stage(c2, c3, depths[2], stride=2)
        self.layer4 = stage(c3, c4, depths[3], stride=2)
        self.fc = nn.Linear(c4, num_classes, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.global_avg_pool2d(x))


def resnet18(num_classes: int = 10, **options) -> ResNet:
    """ResNet-18, 11.2 M parameters at width 1; options as ResNet's."""
    return ResNet((2, 2, 2, 2), num_classes, **options)
