"""Learning rates as plain functions of the step: nothing to construct, nothing to save, the same after a resume.

Each is called as `lr = schedule(step, total, peak, warmup)`: `step` counts from 0 to `total` - 1, `peak` is the highest
learning rate. During the first `warmup` steps the rate climbs in a straight line and reaches `peak` at step `warmup`
(Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.2). Beyond the end the last rate holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def constant(step: float, total: float, peak: float, warmup: float = 0) -> float:
    """`peak`, after the warm-up."""
    return peak * _climb(step, total, warmup)


def step_decay(
    step: float,
    total: float,
    peak: float,
    warmup: float = 0,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> float:
    """`peak`, times `gamma` from each milestone on, given as fractions of `total` (He et al. 2016, section 4.2)."""
    return peak * _climb(step, total, warmup) * gamma ** sum(step / total >= fraction for fraction in milestones)


def cosine(step: float, total: float, peak: float, warmup: float = 0, floor: float = 0.0) -> float:
    """From `peak` down to `floor` along half a cosine, reached at step `total`.

    Loshchilov and Hutter, "SGDR" (ICLR 2017), equation 5, without restarts.
    """
    climb = _climb(step, total, warmup)
    if climb < 1:
        return peak * climb
    return _anneal(peak, floor, (step - warmup) / (total - warmup))


def one_cycle(
    step: float,
    total: float,
    peak: float,
    warmup: float = 0,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> float:
    """PyTorch's OneCycleLR: up from peak / div_factor, down to that / final_div_factor, both along half a cosine.

    The climb is the warm-up, and the peak its last step (`warmup` - 1); 0 means PyTorch's 30 % of `total`. Smith and
    Topin, "Super-convergence" (2018).
    """
    _check(total, warmup)
    start, top, end = peak / div_factor, (warmup or 0.3 * total) - 1, max(total - 1, 1)
    if step <= top:
        return _anneal(start, peak, step / top if top else 1.0)
    return _anneal(peak, start / final_div_factor, (step - top) / (end - top))


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "step": step_decay,
    "cosine": cosine,
    "one-cycle": one_cycle,
}


def _climb(step: float, total: float, warmup: float) -> float:
    """The warm-up's fraction of the peak; never 0, which would waste the first step."""
    _check(total, warmup)
    return min(1.0, (step + 1) / (warmup + 1))


def _anneal(first: float, last: float, fraction: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


def _check(total: float, warmup: float) -> None:
    if not total > 0:
        raise ValueError(f"a schedule needs a total number of steps > 0, got {total}")
    if not 0 <= warmup < total:
        raise ValueError(f"the warm-up must be shorter than the {total} steps of the schedule, got {warmup}")
