"""The frameworks that vs_peers.py compares, one file each. A file whose name begins with `_` is no peer.

What such a file defines:

    TITLE = "PyTorch"                      its name in tables
    NEEDS = "torch",                       packages that must be installed; their versions are recorded
    TRAIN, INFER = {"setting": "what"}     ways to run it, each of which is timed in a process of its own
    environment(setting, threads)          variables of that process, set before it starts
    OPTIONAL = "compiled",                 optional: settings that may fail; a line says so and the others go on
    unavailable(setting)                   optional: why a setting cannot be tried on this machine, or None
    training(task) -> step, gradients      step() trains on the batch and returns the loss, a float, when all is done;
                                           gradients() returns the loss and {name: gradient}, and changes no weight
    inference(task) -> infer               infer() returns the logits, an array (N, classes)
    LAYERS, convolution(layer)             optional: settings, and {"forward": f, "grad_x": f, "grad_w": f}, or some
                                           of them; f() computes one, waits for it, and returns what
                                           numpy.asarray() takes

Images, weights and gradients cross this border in nanocnn's layouts: (N, H, W, C), (KH, KW, C, O), (in, out). The
framework is imported inside these functions, because the parent reads the files too and runs none of the frameworks.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parent imports nanocnn first, and NumPy after it
    import numpy as np


@dataclass
class Task:
    """What all of them do: one batch, over and over. `setting` is one of the peer's own."""

    model: str  # "alexnet" or "resnet18"
    width: float  # scales its channels and features
    images: np.ndarray
    labels: np.ndarray
    weights: dict[str, np.ndarray]
    dropout: float
    threads: int
    setting: str = ""
    use: list[str] = field(default_factory=list)  # choices of nanocnn's switchboard
    lr: float = 1e-3  # small, so that thousands of steps on one batch stay ordinary steps
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass
class Layer:
    """One convolution: `x` (N, H, W, C), `w` (KH, KW, C, O), `gy` (N, OH, OW, O)."""

    x: np.ndarray
    w: np.ndarray
    gy: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int]
    threads: int
    setting: str = ""
    use: list[str] = field(default_factory=list)


def names() -> list[str]:
    """Every peer: ours, PyTorch, then the others by name."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(found, key=lambda name: (name != "ours", name != "pytorch", name))


def load(name: str) -> ModuleType:
    """The peer's file as a module."""
    return importlib.import_module(f"{__name__}.{name}")


def missing(name: str) -> list[str]:
    """Packages that this peer needs and that are not installed."""
    return [package for package in load(name).NEEDS if importlib.util.find_spec(package) is None]


def versions(name: str) -> dict[str, str]:
    """The versions of the packages that this peer needs."""
    owners = importlib.metadata.packages_distributions()
    return {package: importlib.metadata.version(owners.get(package, [package])[0]) for package in load(name).NEEDS}
