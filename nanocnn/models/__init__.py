"""Models: layers in order, and nothing else."""

from .alexnet import AlexNet, alexnet_cifar
from .resnet import ResNet, resnet18

__all__ = ["AlexNet", "ResNet", "alexnet_cifar", "resnet18"]
