"""Models: layers in order, and nothing else."""

from .alexnet import AlexNet, alexnet_cifar

__all__ = ["AlexNet", "alexnet_cifar"]
