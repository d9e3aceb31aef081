#!/usr/bin/env python
"""Train ResNet-18 on CIFAR-10, alone or on several MPI ranks: the loop of alexnet_cifar.py with another network."""

import sys

from nanocnn.models import resnet18

import alexnet_cifar  # isort: skip  (beside this file)
import common  # isort: skip

EXAMPLES = """examples:
  python experiments/resnet_cifar.py --epochs 3 --width 0.25         alone, a small one
  mpiexec -n 2 python experiments/resnet_cifar.py --lr 0.1           two ranks
  python experiments/resnet_cifar.py --stem imagenet --epochs 5      the stem for large images: a sixteenth of the work
"""


def arguments():
    parser = common.training_parser(__doc__, EXAMPLES)
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=common.positive, default=1.0, help="scales the channels of every layer")
    stems = "cifar keeps the resolution, imagenet divides it by 4 before the first block"
    model.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help=stems)
    return common.parse(parser)


def make_resnet(args, data, width):
    """ResNet-18 as the options describe it, for the images of `data`."""
    channels = data.train.images.shape[3]
    return resnet18(len(data.classes), stem=args.stem, width=width, in_channels=channels)


if __name__ == "__main__":
    args = arguments()
    comm = common.connect(args.device)
    with common.plain_errors(comm):
        status = alexnet_cifar.train(args, comm, "ResNet-18", make_resnet)
    sys.exit(status)
