"""Models: layers in order, and nothing else."""

from .alexnet import AlexNet, alexnet_cifar
from .lenet import LeNet, lenet5
from .resnet import ResNet, resnet18

__all__ = ["AlexNet", "LeNet", "ResNet", "alexnet_cifar", "lenet5", "resnet18"]
