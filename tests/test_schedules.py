"""Schedules: closed-form points, warm-up, ends, and PyTorch's values where the formulas agree."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanocnn.schedules import SCHEDULES, constant, cosine, one_cycle, step_decay

TOTAL, PEAK = 100, 0.4


def curve(schedule, **options):
    return np.array([schedule(step, TOTAL, PEAK, **options) for step in range(TOTAL)])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 49])
def test_every_schedule_climbs_to_the_peak_and_never_rises_again(name, warmup):
    lr = np.array([SCHEDULES[name](step, TOTAL, PEAK, warmup) for step in range(TOTAL)])
    assert (lr > 0).all()
    top = int(lr.argmax())
    np.testing.assert_allclose(lr[top], PEAK)
    assert (np.diff(lr[: top + 1]) > 0).all()
    assert (np.diff(lr[top:]) <= 1e-15).all()


def test_warmup_is_a_line_that_reaches_the_peak():
    lr = curve(constant, warmup=9)
    np.testing.assert_allclose(lr[:10], PEAK * np.arange(1, 11) / 10)
    assert (lr[9:] == PEAK).all()
    np.testing.assert_array_equal(curve(cosine, warmup=9)[:10], lr[:10])
    np.testing.assert_array_equal(curve(step_decay, warmup=9)[:10], lr[:10])


def test_constant():
    assert (curve(constant) == PEAK).all()


def test_step_decay_falls_at_its_milestones():
    lr = curve(step_decay)
    np.testing.assert_allclose(lr[[0, 49, 50, 74, 75, 99]], PEAK * np.array([1, 1, 0.1, 0.1, 0.01, 0.01]))
    lr = curve(step_decay, milestones=(0.1, 0.29), gamma=0.5)  # 0.29 * 100 is 28.999...
    np.testing.assert_allclose(lr[[9, 10, 28, 29]], PEAK * np.array([1, 0.5, 0.5, 0.25]))


def test_cosine_points():
    np.testing.assert_allclose(cosine(0, TOTAL, PEAK), PEAK)
    np.testing.assert_allclose(cosine(50, TOTAL, PEAK, floor=0.1), 0.25)
    np.testing.assert_allclose(cosine(TOTAL, TOTAL, PEAK, floor=0.1), 0.1)
    np.testing.assert_allclose(cosine(25, TOTAL, PEAK), PEAK * (1 + math.sqrt(0.5)) / 2)
    np.testing.assert_allclose(cosine(60, TOTAL, PEAK, warmup=20), PEAK / 2)  # half way from 20 to 100


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_continuous(name):
    """A hundred times finer steps move the rate a hundred times less."""
    lr = np.array([SCHEDULES[name](step / 100, TOTAL, PEAK, 10) for step in range(100 * TOTAL)])
    assert np.abs(np.diff(lr)).max() < 1.1 * PEAK / 10 / 100


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_rate_holds(name):
    end = SCHEDULES[name](TOTAL, TOTAL, PEAK)
    assert SCHEDULES[name](TOTAL + 50, TOTAL, PEAK) == end
    assert end >= 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_learns(name):
    assert SCHEDULES[name](0, 1, PEAK) > PEAK / 25


@pytest.mark.parametrize("name", SCHEDULES)
def test_impossible_lengths_are_refused(name):
    for total, warmup, words in [(0, 0, "number of steps > 0"), (10, 10, "shorter than"), (10, -1, "shorter than")]:
        with pytest.raises(ValueError, match=words):
            SCHEDULES[name](0, total, PEAK, warmup)


def _pytorch(make):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(rates) < TOTAL else None
    return np.array(rates)


def test_equals_pytorch():
    theirs = _pytorch(lambda s, o: s.CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.01))
    np.testing.assert_allclose(curve(cosine, floor=0.01), theirs, rtol=1e-10)
    theirs = _pytorch(lambda s, o: s.MultiStepLR(o, milestones=[50, 75]))
    np.testing.assert_allclose(curve(step_decay), theirs, rtol=1e-10)
    theirs = _pytorch(lambda s, o: s.StepLR(o, step_size=25, gamma=0.3))
    np.testing.assert_allclose(curve(step_decay, milestones=(0.25, 0.5, 0.75), gamma=0.3), theirs, rtol=1e-10)
    theirs = _pytorch(lambda s, o: s.OneCycleLR(o, max_lr=PEAK, total_steps=TOTAL))
    np.testing.assert_allclose(curve(one_cycle), theirs, rtol=1e-10)
    theirs = _pytorch(
        lambda s, o: s.OneCycleLR(
            o, max_lr=PEAK, total_steps=TOTAL, pct_start=0.12, div_factor=10.0, final_div_factor=100.0
        )
    )
    np.testing.assert_allclose(curve(one_cycle, warmup=12, div_factor=10, final_div_factor=100), theirs, rtol=1e-10)
