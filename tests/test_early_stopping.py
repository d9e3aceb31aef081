"""Early stopping: when it stops, what counts as better, its state."""

from __future__ import annotations

import math

import pytest

from nanocnn.early_stopping import EarlyStopping


def answers(stopping, values):
    return [stopping.step(value) for value in values]


def test_stops_after_patience_values_without_improvement():
    stopping = EarlyStopping(patience=2)
    assert answers(stopping, [0.5, 0.6, 0.6, 0.7, 0.65, 0.6]) == [False, False, False, False, False, True]
    assert stopping.best == 0.7
    assert stopping.step(0.5)  # asked again, it still says stop
    assert not stopping.step(0.8)  # unless the figure recovers
    assert stopping.waited == 0


def test_patience_of_one():
    assert answers(EarlyStopping(1), [1, 1]) == [False, True]


def test_mode_min():
    assert answers(EarlyStopping(2, mode="min"), [3, 2, 1, 1.5, 1]) == [False, False, False, False, True]


def test_min_delta_is_measured_from_the_best():
    stopping = EarlyStopping(3, min_delta=0.5)
    assert answers(stopping, [1.0, 1.25, 1.5, 1.75]) == [False] * 4
    assert (stopping.best, stopping.waited) == (1.75, 0)
    stopping = EarlyStopping(2, mode="min", min_delta=0.5)
    assert answers(stopping, [2.0, 1.75, 1.5]) == [False, False, True]


def test_nan_is_no_improvement():
    assert answers(EarlyStopping(2, mode="min"), [math.nan, 1.0, math.nan, math.nan]) == [False, False, False, True]
    assert answers(EarlyStopping(2), [math.nan, math.nan]) == [False, True]


def test_state_round_trip():
    values = [0.5, 0.7, 0.6, 0.65, 0.6]
    whole = answers(EarlyStopping(3), values)
    for cut in range(len(values)):
        first, second = EarlyStopping(3), EarlyStopping(3)
        head = answers(first, values[:cut])
        second.load_state_dict(first.state_dict())
        assert head + answers(second, values[cut:]) == whole


def test_bad_input():
    with pytest.raises(ValueError, match="patience"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="mode"):
        EarlyStopping(1, mode="up")
    with pytest.raises(ValueError, match="min_delta"):
        EarlyStopping(1, min_delta=-1)
    with pytest.raises(ValueError, match="keys 'best' and 'waited'"):
        EarlyStopping(1).load_state_dict({"best": 1})
