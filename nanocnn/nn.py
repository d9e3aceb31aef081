"""Parameters, modules and layers, with PyTorch's names and argument order; images are NHWC.

A module's parameters are found by walking its attributes in the order in which they were assigned, so that names and
order are the same on every rank. No registration, no metaclass, no `__getattr__`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import numpy as np

from . import functional as F
from . import init, random, tensor
from .functional.basic import need_floats
from .functional.fuse import fuse
from .functional.geometry import Pair, pair
from .kernels import dispatch
from .kernels.constant import constant
from .kernels.dispatch import DEVICES, to_device, xp_of
from .kernels.narrow import is_float
from .state import copy_by_name
from .tensor import Tensor


class Parameter(Tensor):
    """A tensor that a module learns."""

    __slots__ = ()

    def __init__(self, data: Any):
        super().__init__(data, requires_grad=True)


class Buffer:
    """An array that belongs to a module's state but is not learnt: running statistics."""

    def __init__(self, data: np.ndarray):
        self.data = data


class Module:
    """A function with parameters. Subclasses assign parameters and modules in `__init__` and define `forward()`.

    `folds` says for `fold_batch_norm` which batch norm follows which convolution: pairs of attribute names. Name a pair
    only if forward() hands the convolution's output to that batch norm and to nothing else.
    """

    training = True
    folds: Sequence[tuple[str, str]] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if dispatch.recorder is None:
            return self.forward(*args, **kwargs)
        with ExitStack() as stack:  # a profile records: say which layer this is, for its forward and its backward
            name = dispatch.recorder.layer(self)
            tensor._layers.append(name)
            stack.callback(tensor._layers.pop)
            stack.enter_context(dispatch.span(name, "layer"))
            return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        return iter(vars(self).items())

    def _replace(self, name: str, module: Module) -> None:
        setattr(self, name, module)

    def _named(self, kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Everything of a kind under this module with its dotted name, each object once."""
        seen: set[int] = set()
        stack: list[tuple[str, Any]] = [(prefix, self)]
        while stack:
            name, item = stack.pop()
            if id(item) in seen:
                continue
            if isinstance(item, kind):
                seen.add(id(item))
                yield name, item
            if isinstance(item, Module):
                inner = list(item._attributes())
            elif isinstance(item, list | tuple):
                inner = [(str(i), x) for i, x in enumerate(item)]
            elif isinstance(item, dict):
                inner = [(str(k), x) for k, x in item.items()]
            else:
                continue
            stack.extend((f"{name}.{key}" if name else key, x) for key, x in reversed(inner))

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of this module, named "", and of all below it."""
        return self._named(Module)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) in the order of assignment; a shared parameter once."""
        return self._named(Parameter)

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """(name, buffer) in the order of assignment."""
        return self._named(Buffer)

    def parameters(self) -> Iterator[Parameter]:
        """The parameters, in the order of assignment."""
        return (p for _, p in self.named_parameters())

    def train(self, mode: bool = True) -> Module:
        """Set training mode (dropout drops, batch norm uses the batch) here and below; returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Set evaluation mode here and below; returns the module."""
        return self.train(False)

    def to(self, where: Any) -> Module:
        """Move to a device ("cpu", "cuda", "emulated") or to a floating-point dtype; returns the module.

        Call it before the optimiser is made: the optimiser lays the parameters out in buckets. Raises ValueError, and
        changes nothing, if `where` is neither.
        """
        if where not in (*DEVICES,):
            where = _floating_dtype(where)
        both: list[tuple[str, Any]] = [*self.named_parameters(), *self.named_buffers()]
        for _, item in both:
            if where in (*DEVICES,):
                item.data = to_device(item.data, where)
            elif is_float(item.data.dtype):
                item.data = item.data.astype(where)
            if isinstance(item, Parameter):
                item.grad = item.grad_buffer = None
        return self

    @property
    def device(self) -> str:
        """Of the parameters; "cpu" where there are none."""
        return next((p.device for p in self.parameters()), "cpu")

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self.parameters():
            p.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """{name: array} of parameters and buffers: the arrays themselves, not copies."""
        both: list[tuple[str, Any]] = [*self.named_parameters(), *self.named_buffers()]
        return {name: item.data for name, item in both}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state` into the parameters and buffers.

        Raises ValueError, and changes nothing, if names or shapes differ.
        """
        copy_by_name(f"the state of {type(self).__name__}", self.state_dict(), state)


class Sequential(Module):
    """Modules one after the other, named "0", "1", ...

    With the switch `fuse`, a ReLU is done by the layer beside it: see `_with_relu`.
    """

    def __init__(self, *modules: Module):
        self.modules_in_order = list(modules)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        return ((str(i), module) for i, module in enumerate(self.modules_in_order))

    def _replace(self, name: str, module: Module) -> None:
        self.modules_in_order[int(name)] = module

    @property
    def folds(self) -> list[tuple[str, str]]:  # type: ignore[override]
        """Each convolution that a batch norm follows at once."""
        pairs = enumerate(itertools.pairwise(self.modules_in_order))
        return [(str(i), str(i + 1)) for i, (a, b) in pairs if isinstance(a, FOLDS) and isinstance(b, BatchNorm2d)]

    def forward(self, x: Tensor) -> Tensor:
        if fuse.value == "off":
            for module in self.modules_in_order:
                x = module(x)
        else:
            for module, relu in _with_relu(self.modules_in_order):
                x = module(x, relu=True) if relu else module(x)
        return x

    def __len__(self) -> int:
        return len(self.modules_in_order)

    def __getitem__(self, i: int | slice) -> Module:
        """The i-th module; for a slice, a Sequential of these same modules."""
        if not isinstance(i, slice):
            return self.modules_in_order[i]
        part = Sequential(*self.modules_in_order[i])
        part.training = self.training
        return part


def _with_relu(modules: list[Module]) -> list[tuple[Module, bool]]:
    """The modules to run, and whether each does a ReLU too: max pooling the one before it, others the one after them.

    A ReLU between a convolution and a max pooling is the pooling's, which has a quarter of the numbers.
    """
    steps: list[tuple[Module, bool]] = []
    for before, module, after in zip([None, *modules], modules, [*modules[1:], None], strict=False):
        if _is(module, ReLU) and _is(after, *RELU_BEFORE):
            continue
        if _is(module, ReLU) and _is(before, *RELU_AFTER):
            steps[-1] = steps[-1][0], True
        else:
            steps.append((module, _is(module, *RELU_BEFORE) and _is(before, ReLU)))
    return steps


def _is(module: Module | None, *kinds: type[Module]) -> bool:
    """Of one of these very classes, with its own forward(): neither a subclass's nor one that somebody wrapped."""
    return type(module) in kinds and "forward" not in vars(module)


def in_dtype_of(x: Tensor, p: Parameter | None) -> Any:
    """A parameter in the dtype of the layer's input, which is the layer's precision; the parameter keeps its own.

    Raises TypeError unless `x` is floating-point.
    """
    need_floats("a layer's input", x)
    return None if p is None else F.cast(p, x.dtype)


def _floating_dtype(where: Any) -> np.dtype:
    try:
        dtype = None if where is None else np.dtype(where)  # np.dtype(None) is float64
    except TypeError:  # "gpu" names no dtype
        dtype = None
    if dtype is None or not is_float(dtype):
        raise ValueError(
            f"to({where!r}): expected a device ({', '.join(DEVICES)}) or a floating-point dtype as np.float32"
        )
    return dtype


def _check_sizes(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{layer}: {name}={size!r}, expected an integer of at least 1")


class Linear(Module):
    """(..., in_features) -> (..., out_features). `weight` is (in_features, out_features)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rng: np.random.Generator | None = None
    ):
        _check_sizes("Linear", in_features=in_features, out_features=out_features)
        rng = rng or random.generator()
        self.weight = Parameter(init.lecun_uniform(rng, (in_features, out_features), in_features))
        self.bias = Parameter(np.zeros(out_features, np.float32)) if bias else None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return F.linear(x, in_dtype_of(x, self.weight), in_dtype_of(x, self.bias), relu=relu)


class Conv2d(Module):
    """(N, H, W, in_channels) -> (N, OH, OW, out_channels). `weight` is (KH, KW, in_channels/groups, out_channels)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: np.random.Generator | None = None,
    ):
        _check_sizes("Conv2d", in_channels=in_channels, out_channels=out_channels)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        rng = rng or random.generator()
        kernel = pair("kernel_size", kernel_size, 1)
        fan_in = math.prod(kernel) * in_channels // groups
        shape = (*kernel, in_channels // groups, out_channels)
        self.weight = Parameter(init.kaiming_uniform(rng, shape, fan_in))
        self.bias = Parameter(np.zeros(out_channels, np.float32)) if bias else None
        self.geometry: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu?(convolution + bias + residual)"""
        weight, bias = in_dtype_of(x, self.weight), in_dtype_of(x, self.bias)
        return F.conv2d(x, weight, bias, **self.geometry, residual=residual, relu=relu)


class BatchNorm2d(Module):
    """Batch norm over the last axis of (N, H, W, C) (Ioffe & Szegedy 2015, algorithm 1)."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        _check_sizes(type(self).__name__, num_features=num_features)
        self.weight = Parameter(np.ones(num_features, np.float32))
        self.bias = Parameter(np.zeros(num_features, np.float32))
        self.running_mean = Buffer(np.zeros(num_features, np.float32))
        self.running_var = Buffer(np.ones(num_features, np.float32))
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu?(batch norm + residual)"""
        arrays = self.running_mean.data, self.running_var.data, self.weight, self.bias
        more: dict[str, Any] = dict(residual=residual, relu=relu)
        return F.batch_norm(x, *arrays, self.training, self.momentum, self.eps, **more)


class BatchNorm1d(BatchNorm2d):
    """Batch norm over the last axis of (N, C)."""


class LayerNorm(Module):
    """Layer norm over the last axis (Ba et al. 2016)."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5):
        _check_sizes("LayerNorm", normalized_shape=normalized_shape)
        self.weight = Parameter(np.ones(normalized_shape, np.float32))
        self.bias = Parameter(np.zeros(normalized_shape, np.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class MaxPool2d(Module):
    """The largest of each window."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0):
        self.window = kernel_size, stride, padding

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """The pooling of x, or of max(x, 0)."""
        return F.max_pool2d(x, *self.window, relu=relu)


class AvgPool2d(Module):
    """The mean of each window, padding counted."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0):
        self.window = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, *self.window)


class AdaptiveAvgPool2d(Module):
    """(N, H, W, C) -> (N, *output_size, C): means over windows chosen to cover the image, as PyTorch chooses them."""

    def __init__(self, output_size: Pair):
        self.output_size = pair("output_size", output_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.output_size)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class GELU(Module):
    """x times the normal distribution function of x (Hendrycks & Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SiLU(Module):
    """x sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class Dropout(Module):
    """In training, zero with probability p and the rest over 1 - p (Srivastava et al. 2014, section 10: "inverted")."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Flatten(Module):
    """(N, ...) -> (N, features)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), math.prod(x.shape[1:]))


class Identity(Module):
    """x itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class MultiheadAttention(Module):
    """(N, L, E) -> (N, L, E): self-attention in `num_heads` heads (Vaswani et al. 2017, section 3.2.2).

    `in_proj_weight` is (E, 3E): queries, keys and values side by side.
    """

    def __init__(self, embed_dim: int, num_heads: int, bias: bool = True, *, rng: np.random.Generator | None = None):
        _check_sizes("MultiheadAttention", embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        rng = rng or random.generator()
        # Xavier uniform, as in PyTorch: U(-b, b) with b = sqrt(6 / (fan_in + fan_out))
        bound = math.sqrt(6 / (embed_dim + 3 * embed_dim))
        self.in_proj_weight = Parameter(rng.uniform(-bound, bound, (embed_dim, 3 * embed_dim)).astype(np.float32))
        self.in_proj_bias = Parameter(np.zeros(3 * embed_dim, np.float32)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, rng=rng)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        projected = F.linear(x, in_dtype_of(x, self.in_proj_weight), in_dtype_of(x, self.in_proj_bias))
        heads = projected.reshape(n, length, 3, self.num_heads, width // self.num_heads).transpose(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])  # (N, heads, L, E/heads)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(n, length, width))


# ------------------------------------------------------------------ who does what besides

RELU_AFTER = (Linear, Conv2d, BatchNorm2d, BatchNorm1d)  # forward(x, relu=True) ends with a ReLU
RELU_BEFORE = (MaxPool2d,)  # forward(x, relu=True) begins with one
FOLDS = (Conv2d, Linear)  # the last axis of `weight` is that of the output


def fold_batch_norm(model: Module) -> Module:
    """A copy of `model`, in evaluation mode as it is, in which batch norms are part of the layers before them.

    In evaluation, batch norm multiplies each channel by one number and adds another. The weights before it can be
    multiplied once and for all, and the sum becomes a bias (Jacob et al. 2018, section 3.2). The convolution moves to
    the place of the batch norm, where forward() adds the residual and asks for a ReLU; an Identity stands in its own.
    The pairs are those of `Module.folds`. Raises ValueError in training mode, where batch norm needs the batch, and if
    there is nothing to fold.
    """
    if any(module.training for _, module in model.named_modules()):
        raise ValueError("fold_batch_norm in training mode, where batch norm uses the batch: call model.eval() first")
    model = copy.deepcopy(model, {id(p): Parameter(p.data.copy()) for p in model.parameters()})
    found = 0
    for name, module in list(model.named_modules()):
        layers = dict(module._attributes())
        for first, second in module.folds:
            layer: Any = layers.get(first)
            norm: Any = layers.get(second)
            if isinstance(layer, Identity) and isinstance(norm, FOLDS):
                continue  # folded before
            if not _fits(layer, norm):
                raise ValueError(
                    f"{name or type(model).__name__}: cannot fold {second!r} ({_described(norm)}) into {first!r} "
                    f"({_described(layer)}): expected a convolution or linear layer, and a batch norm of its channels"
                )
            module._replace(second, _folded(layer, norm))
            module._replace(first, Identity().eval())
            found += 1
    if not found:
        raise ValueError(
            f"fold_batch_norm found nothing to fold in {type(model).__name__}: in a Sequential a batch norm must "
            "follow a convolution at once, and other modules name their pairs in `folds`"
        )
    return model


def _fits(layer: Any, norm: Any) -> bool:
    ours = isinstance(layer, FOLDS) and isinstance(norm, BatchNorm2d)
    return ours and layer.weight.shape[-1:] == norm.weight.shape


def _described(module: Any) -> str:
    weight = getattr(module, "weight", None)
    return type(module).__name__ + (f" with weight {weight.shape}" if weight is not None else "")


def _folded(layer: Any, norm: BatchNorm2d) -> Any:
    """(layer(x) - mean) scale + shift as a layer of its own; computed in float64, in the layer's dtype."""
    xp, dtype = xp_of(layer.weight.data), layer.weight.dtype
    mean, var = norm.running_mean.data.astype(np.float64), norm.running_var.data.astype(np.float64)
    scale = norm.weight.data / xp.sqrt(var + norm.eps)
    bias = 0 if layer.bias is None else layer.bias.data
    folded = copy.copy(layer)
    folded.weight = Parameter((layer.weight.data * scale).astype(dtype))
    folded.bias = Parameter(((bias - mean) * scale + norm.bias.data).astype(dtype))
    return folded


def freeze(model: Module) -> Module:
    """A copy of `model` for inference: batch norms folded (`fold_batch_norm`), no gradients, weights constant.

    Of constant weights the kernels keep what they otherwise make at every call: panels, and Winograd's planes, which
    take four times the memory of 3x3 weights, nine times at stride 2. Nothing can be written to them any more: load and
    train the original. A copy of it, or what `to()` makes of it, is not constant: freeze it again. Raises ValueError in
    training mode, and as `fold_batch_norm` does if there are batch norms that cannot be folded.
    """
    if any(module.training for _, module in model.named_modules()):
        raise ValueError("freeze in training mode: a frozen model cannot learn; call model.eval() first")
    named = ((dict(module._attributes()), module.folds) for _, module in model.named_modules())
    if any(isinstance(layers.get(first), FOLDS) for layers, folds in named for first, _ in folds):
        model = fold_batch_norm(model)
    else:
        model = copy.deepcopy(model, {id(p): Parameter(p.data.copy()) for p in model.parameters()})
    for p in model.parameters():
        p.requires_grad = False
        if isinstance(p.data, np.ndarray):
            p.data = constant(p.data)
    return model
