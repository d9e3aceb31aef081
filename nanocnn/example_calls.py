"""Arguments for a call of any primitive, from a few sizes: what a benchmark and a notebook measure with.

args = arguments("conv2d", shape_of("resnet18.layer2", batch=16))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import numpy as np

from .kernels import dispatch
from .kernels.im2col import output_shape


class BenchError(ValueError):
    """Something that cannot be measured as it was asked for; the message says what can."""


@dataclass(frozen=True)
class Shape:
    """Images (batch, size, size, channels) and a window over them; and a matrix product M K N."""

    batch: int = 128
    size: int = 32
    channels: int = 64
    out_channels: int = 64
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    m: int = 1024
    k: int = 1024
    n: int = 1024

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (0 if name == "padding" else 1):
                raise BenchError(f"{name.replace('_', '-')} {value}: expected {0 if name == 'padding' else 1} or more")
        if self.channels % self.groups or self.out_channels % self.groups:
            raise BenchError(
                f"{self.groups} groups of {self.channels} channels and {self.out_channels} out-channels: "
                "expected a number that divides both"
            )
        if self.size + 2 * self.padding < self.dilation * (self.kernel - 1) + 1:
            raise BenchError(
                f"a kernel of {self.kernel} with dilation {self.dilation} does not fit into {self.size} pixels with "
                f"padding {self.padding}: expected a larger --size or --padding"
            )

    @property
    def image(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return self.batch, self.size, self.size, self.channels

    @property
    def flat(self) -> int:
        """Numbers in one image."""
        return self.size**2 * self.channels

    @property
    def weights(self) -> tuple[int, int, int, int]:
        """(KH, KW, C/groups, O)."""
        return self.kernel, self.kernel, self.channels // self.groups, self.out_channels

    @property
    def windows(self) -> tuple[int, int, int]:
        """(N, OH, OW)."""
        return output_shape(self.image, *(self.pair(name) for name in ("kernel", "stride", "padding", "dilation")))

    def pair(self, name: str) -> tuple[int, int]:
        """A size of the window, for rows and columns."""
        return (getattr(self, name),) * 2


def _resnet18() -> dict[str, dict[str, int]]:
    """Its convolutions, with the stem for 32x32 images."""
    layers: dict[str, dict[str, int]] = {"resnet18.stem": dict(channels=3), "resnet18.layer1": {}}
    for stage, channels, size in ((2, 64, 32), (3, 128, 16), (4, 256, 8)):
        down = dict(channels=channels, out_channels=2 * channels, size=size, stride=2)
        layers[f"resnet18.layer{stage}.down"] = down
        layers[f"resnet18.layer{stage}.shortcut"] = dict(down, kernel=1, padding=0)
        layers[f"resnet18.layer{stage}"] = dict(channels=2 * channels, out_channels=2 * channels, size=size // 2)
    return layers


LAYERS: dict[str, dict[str, int]] = {  # what a layer does not say is Shape's default
    **_resnet18(),
    "alexnet.conv1": dict(channels=3, stride=2),
    "alexnet.conv2": dict(channels=64, out_channels=192, size=8),
    "alexnet.conv3": dict(channels=192, out_channels=384, size=4),
    "alexnet.conv4": dict(channels=384, out_channels=256, size=4),
    "alexnet.conv5": dict(channels=256, out_channels=256, size=4),
    "alexnet.pool1": dict(size=16, kernel=2, stride=2, padding=0),
    "alexnet.fc1": dict(m=128, k=1024, n=4096),
    "alexnet.fc2": dict(m=128, k=4096, n=4096),
    "mobilenet.depthwise": dict(groups=64),
}


def shape_of(layer: str | None = None, **sizes: int | None) -> Shape:
    """The Shape of a layer of LAYERS, with the sizes that are given (not None) in place of its own."""
    if layer is not None and layer not in LAYERS:
        raise BenchError(f"there is no layer {layer!r}; there are: {', '.join(LAYERS)}")
    own = LAYERS[layer] if layer else {}
    return Shape(**{**own, **{name: value for name, value in sizes.items() if value is not None}})


# ------------------------------------------------------------------ arguments, made by their names


class _Numbers:
    """Random arrays of one dtype, the same in each process."""

    def __init__(self, dtype: Any):
        self.dtype, self.rng = np.dtype(dtype), np.random.default_rng(7)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32).astype(self.dtype)

    def positive(self, *shape: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, shape).astype(self.dtype)

    def integers(self, below: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, below, shape)


Maker = Callable[[Shape, _Numbers], Any]


def _always(value: float) -> Maker:
    return lambda s, r: value


def _position(s: Shape, r: _Numbers) -> np.ndarray:
    """Where the largest number of each window is, as the forward pass remembers it."""
    window = s.pair("kernel"), s.pair("stride"), s.pair("padding")
    return dispatch.primitives["max_pool2d"].variants["reference"].body(r.normal(*s.image), *window)[1]


def _buckets(s: Shape, r: _Numbers) -> list[np.ndarray]:
    return [r.positive(s.batch * s.flat // 4) for _ in range(4)]


# Kernels use names alike, so that a new one needs a line here only for a new name. "matmul.a" is the name in one
# primitive, and comes before the general one. Arguments with a default are left at it.
IMAGES = "x y gy"
CHANNELS = "a b bias gb mean products running_mean scale shift weight"
FLAT = "average data exp_avg grad momentum_buffer"
CONSTANTS = dict(eps=1e-5, lr=0.01, momentum=0.9, weight_decay=5e-4, step=10, decay=0.99, factor=0.5, smoothing=0.1)
CONSTANTS |= dict(p=0.5, seed=7, epoch=0, stream=0, pad=4, flip=True, cutout=0)
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(IMAGES.split(), lambda s, r: r.normal(*s.image)),
    **dict.fromkeys(CHANNELS.split(), lambda s, r: r.normal(s.channels)),
    **dict.fromkeys(FLAT.split(), lambda s, r: r.normal(s.batch * s.flat)),
    **{name: _always(value) for name, value in CONSTANTS.items()},
    "x_shape": lambda s, r: s.image,
    # convolution and its columns
    "w": lambda s, r: r.normal(*s.weights),
    "w_shape": lambda s, r: s.weights,
    "kernel": lambda s, r: s.pair("kernel"),
    "stride": lambda s, r: s.pair("stride"),
    "padding": lambda s, r: s.pair("padding"),
    "dilation": lambda s, r: s.pair("dilation"),
    "groups": lambda s, r: s.groups,
    "conv2d_grad_x.gy": lambda s, r: r.normal(*s.windows, s.out_channels),
    "conv2d_grad_w.gy": lambda s, r: r.normal(*s.windows, s.out_channels),
    "cols": lambda s, r: r.normal(math.prod(s.windows), s.kernel**2 * s.channels),
    # pooling
    "max_pool2d_grad.gy": lambda s, r: r.normal(*s.windows, s.channels),
    "avg_pool2d_grad.gy": lambda s, r: r.normal(*s.windows, s.channels),
    "position": _position,
    # matrices and rows
    "matmul.a": lambda s, r: r.normal(s.m, s.k),
    "matmul.b": lambda s, r: r.normal(s.k, s.n),
    "layer_norm_grad.mean": lambda s, r: r.normal(s.batch * s.size**2),
    "var": lambda s, r: r.positive(s.channels),
    "running_var": lambda s, r: r.positive(s.channels),
    "batch_norm_shares.rstd": lambda s, r: r.positive(s.channels),
    "rows": lambda s, r: s.batch * s.size**2,
    "rstd": lambda s, r: r.positive(s.batch * s.size**2),
    "logits": lambda s, r: r.normal(s.batch, s.out_channels),
    "labels": lambda s, r: r.integers(s.out_channels, s.batch),
    "lse": lambda s, r: r.positive(2, s.batch),
    "cross_entropy_grad.gy": lambda s, r: r.normal(s.batch),
    "cross_entropy_and_grad.scale": lambda s, r: r.positive(1),
    # dropout
    "samples": lambda s, r: np.arange(s.batch),
    "place": lambda s, r: np.array([7, 0, 0]),
    "random_bits.n": lambda s, r: s.flat,
    "dropout.x": lambda s, r: r.normal(s.batch, s.flat),
    "dropout_grad.gy": lambda s, r: r.normal(s.batch, s.flat),
    "mask": lambda s, r: r.integers(2, s.batch, s.flat).astype(np.uint8),
    # images as bytes
    "images": lambda s, r: r.integers(256, *s.image).astype(np.uint8),
    # updates
    "exp_avg_sq": lambda s, r: r.positive(s.batch * s.flat),
    "total": lambda s, r: r.positive(s.batch * s.flat),
    # updates of all buckets at once
    **dict.fromkeys(["grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs"], _buckets),
    **dict.fromkeys(("multi_sgd_update.data", "multi_adam_update.data"), _buckets),
    "control": lambda s, r: np.array([0.01, 9, 1024, 0, 0]),
    "multi_sgd_update.hyper": lambda s, r: np.array([[1, 0.9, 0, 5e-4, 0]] * 4),
    "multi_adam_update.hyper": lambda s, r: np.array([[1, 0.9, 0.999, 1e-5, 5e-4, 0]] * 4),
    "found": lambda s, r: np.zeros(1, np.int32),
}


def _needed(primitive: dispatch.Primitive) -> list[str]:
    return [p.name for p in primitive.signature.parameters.values() if p.default is Parameter.empty]


def _maker(primitive: str, argument: str) -> Maker | None:
    return MAKERS.get(f"{primitive}.{argument}") or MAKERS.get(argument)


def can_make() -> list[str]:
    """The primitives for which arguments can be made."""
    return sorted(p.name for p in dispatch.primitives.values() if all(_maker(p.name, a) for a in _needed(p)))


def arguments(primitive: str, shape: Shape = Shape(), dtype: Any = np.float32) -> tuple:
    """Arguments for a call of `primitive`, the same each time. Raises BenchError if it or an argument is unknown."""
    if primitive not in dispatch.primitives:
        names = ", ".join(can_make())
        raise BenchError(f"there is no primitive {primitive!r}; there are: {names}")
    needed = _needed(dispatch.primitives[primitive])
    unknown = [name for name in needed if _maker(primitive, name) is None]
    if unknown:
        raise BenchError(
            f"no arguments can be made for {primitive}: what is {', '.join(unknown)}? Say so in MAKERS of "
            f"nanocnn/example_calls.py, or call nanocnn.bench.ladder with your own; those that can: "
            f"{', '.join(can_make())}"
        )
    numbers = _Numbers(dtype)
    makers = [_maker(primitive, name) for name in needed]
    return tuple(make(shape, numbers) for make in makers if make is not None)
