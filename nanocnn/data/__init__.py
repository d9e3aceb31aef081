"""Data: `load()` finds and checks a data set, `Loader` makes batches of it. No training script touches the network."""

from . import cifar10, mnist, shapes  # noqa: F401  # each puts itself on the list of data sets
from .augment import Augment
from .datasets import DataError, DataSet, Part, Raw, Split, dataset, load, readers
from .loader import Batch, Loader

__all__ = ["Augment", "Batch", "DataError", "DataSet", "Loader", "Part", "Raw", "Split", "dataset", "load", "readers"]
