"""The two networks, written once, in operations that a framework supplies: the same work for all of them.

`ops` has conv(x, name, stride), norm(x, name), linear(x, name), which look their weights up by name, and relu,
max_pool (2x2), mean (over the image), flatten (in the order H, W, C), dropout. The names are those of nanocnn.models.
"""

import numpy as np


def alexnet(ops, x):
    for i, pool in ((0, True), (3, True), (6, False), (8, False), (10, True)):
        x = ops.relu(ops.conv(x, f"features.{i}", 2 if i == 0 else 1))
        x = ops.max_pool(x) if pool else x
    x = ops.flatten(x)
    for i in (1, 4):
        x = ops.relu(ops.linear(ops.dropout(x), f"classifier.{i}"))
    return ops.linear(x, "classifier.6")


def resnet18(ops, x):
    def conv_norm(x, conv, norm, stride=1):
        return ops.norm(ops.conv(x, conv, stride), norm)

    x = ops.relu(conv_norm(x, "conv1", "bn1"))
    for stage in range(1, 5):
        for i in range(2):
            block, down = f"layer{stage}.{i}", stage > 1 and i == 0
            y = ops.relu(conv_norm(x, f"{block}.conv1", f"{block}.bn1", 2 if down else 1))
            y = conv_norm(y, f"{block}.conv2", f"{block}.bn2")
            shortcut = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", 2) if down else x
            x = ops.relu(y + shortcut)
    return ops.linear(ops.mean(x), "fc")


NETWORKS = {"alexnet": alexnet, "resnet18": resnet18}


class Shapes:
    """Operations that compute nothing: they note the shape of each convolution on the way."""

    def __init__(self, weights):
        self.weights, self.convolutions = weights, []

    def conv(self, x, name, stride=1):
        """Notes (side of the image, C, O, side of the kernel, stride)."""
        k, _, c, o = self.weights[f"{name}.weight"].shape
        side = x.shape[1]
        self.convolutions.append((side, c, o, k, stride))
        return np.zeros((1, -(-side // stride), -(-side // stride), o))

    def norm(self, x, name):
        return x

    def linear(self, x, name):
        return np.zeros((1, self.weights[f"{name}.weight"].shape[1]))

    def relu(self, x):
        return x

    def max_pool(self, x):
        return x[:, ::2, ::2]

    def mean(self, x):
        return x[:, 0, 0]

    def flatten(self, x):
        return x.reshape(1, -1)

    def dropout(self, x):
        return x
