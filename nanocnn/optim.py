"""Optimisers with PyTorch's names, hyper-parameters and update rules, and the clipping of gradients.

The parameters are laid out in flat buckets, and one call of a primitive updates a bucket. State is kept flat too, and
leaves as arrays by parameter name, so that a checkpoint knows nothing of buckets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .buckets import DEFAULT_BYTES, Bucket, make_buckets
from .kernels.dispatch import Primitive, Switch, aside, device_of, span, xp_of
from .kernels.multi_tensor import multi_adam_update, multi_sgd_update
from .kernels.update import adagrad_update, adam_update, lars_update, scale_, sgd_update, sum_of_squares
from .state import copy_by_name
from .tensor import Tensor

multi_tensor = Switch(
    "multi_tensor",
    "how SGD, Adam and AdamW update their buckets on a GPU",
    on="all of them in one launch",
    off="a launch for each",
)


@dataclass
class Part:
    """One bucket with what its update needs: hyper-parameters by name, flat state arrays by name."""

    bucket: Bucket
    hyper: dict[str, Any]
    state: dict[str, Any]


class Optimizer:
    """Base of the optimisers: a subclass names its hyper-parameters and state, and updates one bucket.

    `params` holds tensors or (name, tensor) pairs, or dicts {"params": ..., "weight_decay": ...} whose other entries
    replace the hyper-parameters for that group. A tensor without a name is named by its position: "0", "1", ... A
    tensor that requires no gradient is left alone.

    A parameter that received no gradient is updated with the gradient zero: its momentum runs on and its weights decay.
    PyTorch skips it instead; but here an average over ranks must not depend on which rank used a layer, and one rank
    behaves as four do.
    """

    together: Primitive | None = None  # what updates all buckets in one launch, on devices that have such a kernel,
    states: tuple[str, ...] = ()  # and the state arrays that it takes

    def __init_subclass__(cls) -> None:
        if "update" in vars(cls) and "together" not in vars(cls):
            cls.together = None  # it is for another rule

    def __init__(self, params: Iterable[Any], bucket_bytes: int = DEFAULT_BYTES, **defaults: Any):
        self._numbers: tuple[list, Any, Any] | None = None  # what `together` reads on the device
        self.lr = defaults["lr"]
        self.steps = 0
        self.parts: list[Part] = []
        self.check(**defaults)
        for named, own in reversed(_groups(params)):  # the last parameter's gradient is the first to arrive
            unknown = sorted(set(own) - set(defaults))
            if unknown:
                raise ValueError(
                    f"{type(self).__name__} has no hyper-parameter {', '.join(unknown)}; it has: {', '.join(defaults)}"
                )
            hyper = {**defaults, **own}
            self.check(**hyper)
            if hyper["lr"] != self.lr and self.lr == 0:
                raise ValueError(f"a group's lr={hyper['lr']:g} is kept in proportion to the optimiser's, which is 0")
            for bucket in make_buckets(named, bucket_bytes):
                full_like = xp_of(bucket.data).full_like
                state = {name: full_like(bucket.data, start) for name, start in self.initial_state(hyper).items()}
                self.parts.append(Part(bucket, hyper, state))
        self.buckets = [part.bucket for part in self.parts]

    # ---------------------------------------------------------------- what a subclass defines

    def check(self, **hyper: Any) -> None:
        """Raise ValueError on a hyper-parameter out of range."""
        for name, value in hyper.items():
            if name == "betas":
                if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
                    raise ValueError(f"betas must be two numbers in [0, 1), got {value!r}")
            elif not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")

    def initial_state(self, hyper: Mapping[str, Any]) -> dict[str, float]:
        """The state arrays of a bucket by name, each with the number that fills it at the start."""
        return {}

    def update(self, bucket: Bucket, state: dict[str, Any], **hyper: Any) -> None:
        """Update `bucket.data` and `state` in place from `bucket.grad`; `self.steps` counts from 1."""
        raise TypeError(f"{type(self).__name__} defines no update()")

    def columns(self, rate: float, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """For `together`, a bucket's row of `hyper`; `rate` times the learning rate of a step is the bucket's."""
        raise TypeError(f"{type(self).__name__} defines no columns()")

    def goes_together(self) -> bool:
        """Whether one call updates all buckets, where they lie and as the switches are."""
        device = device_of(self.buckets[0].data)
        return self.together is not None and len(self.together.rungs(device)) > 1 and multi_tensor.value == "on"

    def control(self) -> Any:
        """The array on the device from which `apply` reads learning rate, step and loss scale; see multi_tensor.py."""
        rows = [self.columns(p.hyper["lr"] / self.lr if self.lr else 1.0, p.hyper) for p in self.parts]
        xp = xp_of(self.buckets[0].data)
        if self._numbers is None:
            self._numbers = rows, xp.array(rows, dtype=float), xp.zeros(5)
        elif self._numbers[0] != rows:  # in place: a recorded step reads them there
            self._numbers[1][...] = xp.array(rows, dtype=float)
            self._numbers = rows, *self._numbers[1:]
        return self._numbers[2]

    def apply(self, found: Any = None) -> None:
        """Update all buckets by what stands in `control()`, unless `found`, (1,) on the device, is not 0."""
        assert self.together is not None
        assert self._numbers is not None, "control() comes first"
        _, hyper, control = self._numbers
        states = [[p.state.get(kind) for p in self.parts] for kind in self.states]
        data, grads = [b.data for b in self.buckets], [b.grad for b in self.buckets]
        self.together(control, hyper, data, grads, *states, found=found)

    # ---------------------------------------------------------------- what a script calls

    def step(self, lr: float | None = None) -> None:
        """Update all parameters. `lr` is the learning rate of this step, by default the constructor's.

        A group that was given a learning rate of its own keeps its proportion to the constructor's.
        """
        if lr is not None and not 0 <= lr < math.inf:
            raise ValueError(f"lr must be a number >= 0, got {lr!r}")
        with span("update", "update"):
            for part in self.parts:
                _check_home(part.bucket)
                part.bucket.fill_missing()
            self.steps += 1
            if self.goes_together():
                control = self.control()
                control[:3] = xp_of(control).array([self.lr if lr is None else float(lr), self.steps - 1, 1.0])
                self.apply()
                return
            for part in self.parts:
                own = part.hyper["lr"]
                rate = own if lr is None else lr if own == self.lr else lr * own / self.lr
                self.update(part.bucket, part.state, **{**part.hyper, "lr": float(rate)})

    def zero_grad(self) -> None:
        """Forget the gradients: the next to arrive overwrite the old ones."""
        for bucket in self.buckets:
            bucket.zero()

    def state_dict(self) -> dict[str, Any]:
        """{"step": int, "state": {"momentum_buffer": {name: array}, ...}}: the arrays are views, not copies."""
        state: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            for kind, flat in part.state.items():
                state.setdefault(kind, {}).update(named_views(part.bucket, flat))
        return {"step": self.steps, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state in, whatever its buckets were. Raises ValueError, and changes nothing, if it does not fit."""
        if not isinstance(state, Mapping) or set(state) != {"step", "state"}:
            keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"an optimiser's state has the keys 'step' and 'state', got {keys}")

        def arrays(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
            return {f"{kind} of {name}": array for kind, named in kinds.items() for name, array in named.items()}

        copy_by_name(f"{type(self).__name__}'s state", arrays(self.state_dict()["state"]), arrays(state["state"]))
        self.steps = int(state["step"])


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, PyTorch's rule: the learning rate multiplies the buffer."""

    together, states = multi_sgd_update, ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        bucket_bytes: int = DEFAULT_BYTES,
    ):
        own = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        super().__init__(params, bucket_bytes, lr=lr, weight_decay=weight_decay, **own)

    def check(self, **hyper):
        super().check(**hyper)
        if hyper["nesterov"] and (not hyper["momentum"] or hyper["dampening"]):
            raise ValueError("nesterov needs a momentum and no dampening")

    def initial_state(self, hyper):
        return {"momentum_buffer": 0.0} if hyper["momentum"] else {}

    def update(self, bucket, state, lr, momentum, dampening, weight_decay, nesterov):
        first = self.steps == 1  # PyTorch starts the buffer with the whole gradient
        buffer = state.get("momentum_buffer")
        sgd_update(bucket.data, bucket.grad, buffer, lr, momentum, 0.0 if first else dampening, weight_decay, nesterov)

    def columns(self, rate, hyper):
        return rate, hyper["momentum"], hyper["dampening"], hyper["weight_decay"], float(hyper["nesterov"])


class Adam(Optimizer):
    """Adam; its `weight_decay` is an L2 term of the loss, added to the gradient."""

    decoupled = False
    together, states = multi_adam_update, ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bucket_bytes: int = DEFAULT_BYTES,
    ):
        super().__init__(params, bucket_bytes, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def initial_state(self, hyper):
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def update(self, bucket, state, lr, betas, eps, weight_decay):
        moments = state["exp_avg"], state["exp_avg_sq"]
        adam_update(bucket.data, bucket.grad, *moments, self.steps, lr, *betas, eps, weight_decay, self.decoupled)

    def columns(self, rate, hyper):
        return rate, *hyper["betas"], hyper["eps"], hyper["weight_decay"], float(self.decoupled)


class AdamW(Adam):
    """Adam whose weight decay shrinks the weights themselves and never passes through the moments."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bucket_bytes: int = DEFAULT_BYTES,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, bucket_bytes=bucket_bytes)


class Adagrad(Optimizer):
    """Adagrad: each weight's rate falls with the sum of its squared gradients."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        bucket_bytes: int = DEFAULT_BYTES,
    ):
        own = {"lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
        super().__init__(params, bucket_bytes, lr=lr, weight_decay=weight_decay, **own)

    def initial_state(self, hyper):
        return {"sum": hyper["initial_accumulator_value"]}

    def update(self, bucket, state, lr, lr_decay, weight_decay, eps, initial_accumulator_value):
        rate = lr / (1 + (self.steps - 1) * lr_decay)
        adagrad_update(bucket.data, bucket.grad, state["sum"], rate, eps, weight_decay)


class LARS(Optimizer):
    """Layer-wise adaptive rates: a layer's step is a fixed fraction of the norm of its weights, for very large batches.

    You, Gitman and Ginsburg, "Large batch training of convolutional networks" (2017), algorithm 1: the rate of a layer
    is lr * trust_coefficient * |w| / (|gw| + weight_decay * |w| + eps). Parameters with fewer than two dimensions
    (biases, norms) take plain steps of `lr` and do not decay; so does, for its rate, a layer whose |w| or |gw| is 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        *,
        bucket_bytes: int = DEFAULT_BYTES,
    ):
        own = {"momentum": momentum, "trust_coefficient": trust_coefficient, "eps": eps}
        super().__init__(params, bucket_bytes, lr=lr, weight_decay=weight_decay, **own)

    def initial_state(self, hyper):
        return {"momentum_buffer": 0.0}

    def update(self, bucket, state, lr, momentum, weight_decay, trust_coefficient, eps):
        for p, where in zip(bucket.params, bucket.slices, strict=True):
            w, gw, buffer = bucket.data[where], bucket.grad[where], state["momentum_buffer"][where]
            rate, decay = lr, 0.0
            if p.ndim > 1:
                w_norm, gw_norm, decay = math.sqrt(sum_of_squares(w)), math.sqrt(sum_of_squares(gw)), weight_decay
                if w_norm != 0 and gw_norm != 0:
                    rate = lr * trust_coefficient * w_norm / (gw_norm + decay * w_norm + eps)
            lars_update(w, gw, buffer, rate, momentum, decay)


OPTIMIZERS = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "adagrad": Adagrad, "lars": LARS}


# ------------------------------------------------------------------ gradients and groups


def clip_grad_norm_(buckets: Sequence[Bucket], max_norm: float) -> float:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before.

    PyTorch's formula: the factor is max_norm / (norm + 1e-6), where that is below 1. Call it after the average over
    ranks: the norm is then the same bits on every rank. A NaN in one gradient makes all of them NaN, so it is seen.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm!r}")
    for bucket in buckets:
        bucket.fill_missing()  # what an earlier step left there must not count
    norm = math.sqrt(sum(sum_of_squares(bucket.grad) for bucket in buckets))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # below 1, or NaN
        for bucket in buckets:
            scale_(bucket.grad, factor)
    return norm


def clip_grad_value_(buckets: Sequence[Bucket], clip_value: float) -> None:
    """Clamp each element of each gradient to [-clip_value, clip_value]; a NaN stays."""
    if not clip_value >= 0:
        raise ValueError(f"clip_value must be a number >= 0, got {clip_value!r}")
    for bucket in buckets:
        bucket.fill_missing()
        aside(xp_of(bucket.grad).clip, bucket.grad, -clip_value, clip_value, bucket.grad)


def decay_groups(named_params: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: biases and norms (ndim <= 1), which do not decay, and the weights, which do.

    The weights come last, and so their buckets first: the others' bucket is full only when backward has reached the
    first layer, and must hold up no bucket that could already be on its way.
    """
    named = list(named_params)
    others = [(name, p) for name, p in named if p.ndim <= 1]
    weights = [(name, p) for name, p in named if p.ndim > 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": weights, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


def _groups(params: Iterable[Any]) -> list[tuple[list[tuple[str, Tensor]], dict[str, Any]]]:
    """`params` in any of its forms as (named tensors, own hyper-parameters) for each group."""
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(f"expected an iterable of parameters, such as model.parameters(), got {type(params).__name__}")
    entries = list(params)
    if not any(isinstance(entry, dict) for entry in entries):
        entries = [{"params": entries}]
    groups, count = [], 0
    name_of: dict[int, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "params" not in entry:
            raise TypeError(f"a list of groups holds only dicts with the key 'params', got {entry!r}")
        held = [entry["params"]] if isinstance(entry["params"], Tensor) else list(entry["params"])
        if not held:
            raise ValueError("an optimiser was given an empty list of parameters")
        named = []
        for item in held:
            name, p = item if isinstance(item, tuple) and len(item) == 2 else (str(count), item)
            if not isinstance(p, Tensor) or not isinstance(name, str):
                raise TypeError(f"expected a Tensor or a pair (name, Tensor), got {item!r}")
            if p.node is not None:
                raise ValueError(
                    f"parameter {name!r} is the result of an operation, not a leaf: it cannot be optimised"
                )
            if id(p) in name_of:
                raise ValueError(f"parameter {name!r} was given already, as {name_of[id(p)]!r}")
            if name in name_of.values():
                raise ValueError(f"two parameters have the name {name!r}")
            name_of[id(p)] = name
            count += 1
            if p.requires_grad:
                named.append((name, p))
        groups.append((named, {key: value for key, value in entry.items() if key != "params"}))
    if not any(named for named, _ in groups):
        raise ValueError(f"none of the {count} parameters requires a gradient: there is nothing to optimise")
    return groups


def _check_home(bucket: Bucket) -> None:
    """Raise ValueError if a parameter's array or gradient is no longer the bucket's: its update would go nowhere."""
    for name, p in zip(bucket.names, bucket.params, strict=True):
        for array, flat, what in ((p.data, bucket.data, "data"), (p.grad_buffer, bucket.grad, "grad")):
            base = getattr(array, "base", None)
            if base is None or (base is not flat and base is not flat.base):
                raise ValueError(
                    f"parameter {name!r} has left its bucket: its `{what}` was replaced since the optimiser was made. "
                    f"Write into it (p.{what}[...] = array), clear gradients by zero_grad(), and move or cast a model "
                    "before making its optimiser"
                )


# ------------------------------------------------------------------ flat arrays by parameter name


def named_views(bucket: Bucket, flat: Any) -> dict[str, Any]:
    """A flat array that is laid out as the bucket, as views {name: array of the parameter's shape}."""
    return {
        name: flat[where].reshape(p.shape)
        for name, p, where in zip(bucket.names, bucket.params, bucket.slices, strict=True)
    }
