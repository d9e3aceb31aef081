"""Training in half precision: the switch, the loss scaler, and the microscope that finds what overflowed.

float16 ends at 65504 and has no number between 0 and 6e-8. Activations fit, gradients often do not: most of ResNet's
are smaller than that, and round to 0. So (Micikevicius et al., "Mixed precision training", ICLR 2018):

- Weights stay float32, the master copy that the update changes. Images become float16 at the entrance of the model,
  each layer casts its weights to the dtype of its input, and the cast's backward gives float32 gradients.
- Products are of halves, sums of float32: in GEMMs, batch norm, softmax, loss, means and the gradients of biases.
- The loss is multiplied by a scale S before backward, and so is every gradient; then the float32 gradients are divided
  by S. If one is not finite, the step is not taken and S is halved; after many good steps it is doubled.

bfloat16 has 8 significant bits in place of 11, and the range of float32: no gradient rounds to 0 that would not there.
So all of this goes for it, too, but for the loss scale, which it does not need (Kalamkar et al., "A study of BFLOAT16
for deep learning training", 2019). NumPy's bfloat16 is of the package ml_dtypes; GPUs have it from Ampere on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import tensor
from .buckets import Bucket
from .kernels import dispatch, half
from .kernels.cuda import device as gpu
from .kernels.dispatch import Switch, aside, device_of, span, xp_of
from .kernels.multi_tensor import LARGEST, found_nonfinite_
from .kernels.narrow import HALVES, NARROW, is_float
from .kernels.update import scale_, unscale_
from .tensor import Op, Tensor

precision = Switch(
    "precision",
    "the dtype of activations, and of what is multiplied; weights and sums are float32 either way",
    fp32="float32",
    fp16="float16, which on a GPU takes tensor cores and half of the memory traffic; with a loss scaler",
    bf16="bfloat16, likewise; float32's range, so no loss scaler, and fewer digits; on a GPU from Ampere on",
)


def check(device: str) -> None:
    """Raise ChoiceError or DeviceError, with the remedy, if `device` cannot compute in what `precision` names."""
    if precision.value in NARROW:
        half.dtype_of(precision.value)
        if device == "cuda":
            gpu.check_half(f"precision={precision.value}", NARROW[precision.value])


def at_entrance(x: Tensor) -> Tensor:
    """Images in the dtype that `precision` names: what every layer after them computes in."""
    if precision.value == "fp32":
        return x
    check(x.device)
    return Tensor(aside(half.cast, x.data, half.dtype_of(precision.value)))


class NonFiniteGradient(ArithmeticError):
    """A gradient overflows at the smallest loss scale; raised on every rank in the same step, before the update."""


class LossScaler:
    """The factor by which the loss is multiplied, so that small gradients do not round to 0 in float16.

        (loss * scaler.scale).backward()
        averager.finish()
        if scaler.unscale(averager.buckets):
            optimizer.step()

    Dynamic: `scale` is halved (`backoff`) when a gradient overflows, and that step is skipped; after `interval` steps
    in a row without, it is doubled (`growth`). Static (`dynamic=False`): it stays `scale`. Not `enabled`: it is 1, and
    nothing is tested. An overflow at `floor`, which a static scale is always at, is an error. Powers of 2 lose nothing.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        *,
        dynamic: bool = True,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        floor: float = 1.0,
        enabled: bool = True,
    ):
        if not 0 < scale < np.inf:
            raise ValueError(f"a loss scale is a positive number, got {scale!r}")
        if dynamic and not 0 < floor <= scale:
            raise ValueError(f"the floor of a loss scale of {scale:g} is a positive number up to that, got {floor!r}")
        if not growth >= 1 or not 0 < backoff < 1 or interval < 1:
            raise ValueError(
                f"a dynamic loss scale grows by a factor of at least 1 after one step or more, and backs off by one "
                f"between 0 and 1; got growth={growth!r}, interval={interval!r}, backoff={backoff!r}"
            )
        self.enabled, self.dynamic = enabled, dynamic
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.scale = float(scale) if enabled else 1.0
        self.floor = floor if dynamic else self.scale
        self.good = 0  # steps in a row without an overflow, since the scale last changed
        self.skipped = 0  # steps in all

    def unscale(self, buckets: Sequence[Bucket]) -> bool:
        """Divide the gradients by the scale, and say whether to step: False if any is NaN or infinite.

        To be called after the gradients were summed over the ranks: a rank's overflow is then in everybody's sum, and
        all decide alike without another message. What is not finite is not worth dividing: on False the gradients are
        to be forgotten. Raises NonFiniteGradient at the floor, where a smaller scale would not help.
        """
        if not self.enabled:
            return True
        with span("unscale", "update"):
            finite = _unscaled([bucket.grad for bucket in buckets], 1 / self.scale)
        if finite:
            self.good += 1
            if self.dynamic and self.good >= self.interval:
                grown, self.good = self.scale * self.growth, 0
                self.scale = grown if grown <= LARGEST else self.scale
            return True
        if self.scale <= self.floor:
            raise self.refusal(self.scale)
        self.scale, self.good = max(self.scale * self.backoff, self.floor), 0
        self.skipped += 1
        return False

    def refusal(self, scale: float) -> NonFiniteGradient:
        """The error for an overflow that no smaller scale would cure."""
        if not self.enabled or self.looks_only:
            return NonFiniteGradient("a gradient is not finite")
        least = f"{scale:g}, the floor of the dynamic" if self.dynamic else f"{scale:g}, the static"
        return NonFiniteGradient(f"a gradient is not finite at {least} loss scale")

    def figures(self) -> dict[str, float]:
        """What a run records of it; nothing if it scales nothing."""
        return {"loss_scale": self.scale, "skipped_steps": self.skipped} if self.enabled and not self.looks_only else {}

    @property
    def looks_only(self) -> bool:
        """Whether it is static and 1: gradients are tested, and that is all."""
        return not self.dynamic and self.scale == 1

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; a static scale stays what it is. Raises ValueError on what is no state of a scaler."""
        if not isinstance(state, Mapping) or set(state) != {"scale", "good", "skipped"}:
            keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"the state of a loss scaler has the keys 'scale', 'good' and 'skipped', got {keys}")
        if self.enabled and self.dynamic:
            self.scale, self.good = max(float(state["scale"]), self.floor), int(state["good"])
        self.skipped = int(state["skipped"])


def default_scaler(scale: float = 2.0**16) -> LossScaler:
    """For the precision that is chosen now.

    With fp16 it is dynamic and begins at `scale`. With bf16, which ends where float32 does, it is 1, but gradients that
    are not finite are found. With fp32 nothing is done.
    """
    if precision.value == "fp32":
        return LossScaler(enabled=False)
    return LossScaler(scale) if precision.value == "fp16" else LossScaler(1.0, dynamic=False)


def _unscaled(grads: Sequence[Any], factor: float) -> bool:
    """Multiply all of them, and say whether they are finite. Of a device the host asks that once, not of each array: it
    waits for the answer."""
    if not grads or device_of(grads[0]) == "cpu":
        return all(unscale_(grad, factor) for grad in grads)
    found = xp_of(grads[0]).zeros(1, np.int32)
    found_nonfinite_(grads, found)
    if bool(found[0]):
        return False
    for grad in grads:
        scale_(grad, factor)
    return True


# ------------------------------------------------------------------ the microscope


class Overflow(NamedTuple):
    """The first array of a step that is not finite. `str()` says it in words."""

    layer: str  # its name in the model; "" outside of all layers, as in the loss
    kind: str  # the layer's class, or the op's
    what: str  # which of its arrays, such as "output" or "gradient of its input"
    infinities: int
    nans: int
    size: int
    largest: float  # finite magnitude
    dtype: str

    def __str__(self) -> str:
        where = f"layer '{self.layer}' ({self.kind})" if self.layer else f"{self.kind}, outside of all layers"
        bad = [f"{n:,} {word}" for n, word in ((self.infinities, "infinities"), (self.nans, "NaN")) if n]
        ends = {dtype.name: narrow.largest for dtype, narrow in HALVES.items()}
        end = f"; {self.dtype} ends at {ends[self.dtype]:.6g}" if self.dtype in ends else ""
        return (
            f"{where}: {self.what} has {' and '.join(bad)} among {self.size:,} numbers, "
            f"largest finite {self.largest:.3g}{end}"
        )


def first_overflow(model: Any, step: Callable[[Any], Any]) -> Overflow | None:
    """Run `step(copy of model)`, and say which array was the first that is not finite; None if all are.

        print(first_overflow(model, lambda m: F.cross_entropy(m(x), y).backward(np.float32(scale))))

    Arrays are looked at as they are made: outputs in the order of forward, then gradients in the order of backward. The
    model itself, its gradients and running statistics stay as they are. For the step of a training loop there is
    `train.overflow_of_step`.
    """
    fresh: dict[int, Any] = {id(p): type(p)(p.data.copy()) for p in model.parameters()}
    for p in model.parameters():
        fresh[id(p)].requires_grad = p.requires_grad
    twin = copy.deepcopy(model, fresh)
    microscope = _Microscope(twin)
    with dispatch.paused(), np.errstate(all="ignore"):
        dispatch.recorder = microscope
        with contextlib.suppress(_FoundError):
            step(twin)
    return microscope.found


class _FoundError(Exception):
    """Nothing after the first one is worth computing."""


def _casts_parameters(op: Op, layer: str) -> bool:
    """Inside a layer nothing else is cast."""
    return bool(layer) and type(op).__name__ == "Cast"


class _Microscope(dispatch.Recorder):
    """Looks at what each op returns."""

    def __init__(self, model: Any):
        self.names = {id(module): (name, type(module).__name__) for name, module in model.named_modules()}
        self.kinds = dict(self.names.values())
        self.found: Overflow | None = None

    def layer(self, module: Any) -> str:
        return self.names.get(id(module), ("", ""))[0]

    def op(self, op: Op, kind: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        layer = (tensor._layers[-1] if tensor._layers else "") if kind == "forward" else op.layer
        if kind == "forward":
            for i, x in enumerate(args):  # images, and weights as they are
                self.look(layer, op, "parameters" if i or _casts_parameters(op, layer) else "input", x)
        result = function(*args, **kwargs)
        for i, y in enumerate(result if isinstance(result, tuple) else (result,)):
            self.look(layer, op, self._what(op, layer, kind, i), y)
        return result

    def kernel(self, primitive: Any, variant: Any, args: tuple, kwargs: dict) -> Any:
        return variant.body(*args, **kwargs)

    @staticmethod
    def _what(op: Op, layer: str, kind: str, i: int) -> str:
        if kind == "forward":
            return "parameters, cast," if _casts_parameters(op, layer) else "forward output"
        return "gradient of its parameters" if i or _casts_parameters(op, layer) else "gradient of its input"

    def look(self, layer: str, op: Op, what: str, y: Any) -> None:
        if getattr(y, "dtype", None) is None or not is_float(y.dtype):
            return
        xp = xp_of(y)
        finite = xp.isfinite(y)
        if bool(finite.all()):
            return
        nans = int(xp.isnan(y).sum())
        largest = float(xp.where(finite, abs(y), 0).max())
        counts = int(y.size - finite.sum()) - nans, nans, y.size
        kind = self.kinds[layer] if layer else type(op).__name__
        self.found = Overflow(layer, kind, what, *counts, largest, str(y.dtype))
        raise _FoundError
