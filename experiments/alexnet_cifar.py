#!/usr/bin/env python
"""Train AlexNet on CIFAR-10, alone or on several MPI ranks, each of which takes its part of every batch.

Every rank holds the whole network; the gradients are averaged while the backward pass still runs.
"""

import time

import nanocnn as nc  # before NumPy, whose BLAS reads its settings from the environment that this import sets
from nanocnn import checkpoint, parallel
from nanocnn.early_stopping import EarlyStopping
from nanocnn.ema import EMA
from nanocnn.metrics import Metrics
from nanocnn.models import alexnet_cifar
from nanocnn.record import Progress, Run, peak_memory
from nanocnn.schedules import SCHEDULES
from nanocnn.train import evaluate, train_step

from options import count, fraction, positive, training_parser  # isort: skip  (beside this file)

EXAMPLES = """examples:
  python experiments/alexnet_cifar.py --epochs 3 --width 0.5      alone, a small one
  mpiexec -n 4 python experiments/alexnet_cifar.py                four ranks
  mpiexec -n 4 python experiments/alexnet_cifar.py --resume       ... going on where it stopped
  python experiments/alexnet_cifar.py --use reference --profile   the textbook's kernels, and where their time goes
"""


def arguments():
    parser = training_parser(__doc__, EXAMPLES)
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=positive, default=1.0, help="scales channels and features")
    model.add_argument("--batch-norm", action="store_true", help="batch norm after each convolution")
    model.add_argument(
        "--stem-stride", type=count, choices=(1, 2), default=2, help="1 keeps the resolution: 4x the work"
    )
    model.add_argument("--dropout", type=fraction, default=0.5, help="in the classifier")
    return parser.parse_args()


def main(args, comm):
    data = nc.data.load(args.data, args.data_dir, val=args.val, seed=args.seed, limit=args.train_images)
