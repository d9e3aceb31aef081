"""The parallel loop of compiled code: every call is made, on the threads that are allowed; nothing is left behind."""

from __future__ import annotations

import sys
import threading
from typing import NamedTuple

import numba
import numpy as np
import pytest
from launch import alone
from numba import njit

from nanocnn.kernels.parallel_for import parallel_for

MOST = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


class Pair(NamedTuple):
    x: np.ndarray
    factor: float


@njit
def _row(i, pair, y, more, sign):
    y[i] += sign * pair.factor * pair.x[i].sum() + more[0] + more[1][i]


@njit
def _rows(pair, y, offsets):
    parallel_for(len(y), _row, (pair, y, (3, offsets), -1))
    parallel_for(len(y), _row, (pair, y, (len(y) - 10, offsets), len(y)))


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_is_called_once_with_all_arguments(rows, threads):
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))
    try:
        x, y, offsets = np.arange(rows * 3.0).reshape(rows, 3), np.ones(rows), np.arange(rows) * 0.5
        held = [sys.getrefcount(a) for a in (x, y, offsets)]
        _rows(Pair(x, 2.0), y, offsets)
        assert held == [sys.getrefcount(a) for a in (x, y, offsets)]
    finally:
        numba.set_num_threads(before)
    np.testing.assert_allclose(y, 1 + (rows - 1) * 2 * x.sum(1) + 3 + rows - 10 + 2 * offsets)
    assert len(_row.signatures) == 1  # for literal numbers and for others


@njit
def _count(i, calls):
    calls[i] += 1


@njit
def _so_often(n, calls):
    parallel_for(n, _count, (calls,))


def test_less_than_none_is_none():
    calls = np.zeros(3)
    for n in (-7, 0, 2):
        _so_often(n, calls)
    assert list(calls) == [1, 1, 0]


@njit
def _who(i, ran):
    ran[i] = numba.get_thread_id()


@njit
def _everybody(ran):
    parallel_for(len(ran), _who, (ran,))


@pytest.mark.skipif(MOST < 2, reason="one thread")
def test_as_many_threads_as_are_allowed():
    before = numba.get_num_threads()
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            ran = np.full(100, -1)
            _everybody(ran)
            assert set(ran) == set(range(threads))
    finally:
        numba.set_num_threads(before)


@njit
def _fail(i, x):
    if x[i] == 3:
        raise ValueError("three")
    x[i] = 0


@njit
def _fail_somewhere(x):
    parallel_for(len(x), _fail, (x,))


def test_an_exception_is_told_after_the_loop():
    x = np.arange(10)
    with pytest.raises(RuntimeError, match="a call by parallel_for has failed"):
        _fail_somewhere(x)
    assert x[3] == 3
    x[:] = 1
    _fail_somewhere(x)
    assert not x.any()


@njit
def _wait(i, flag, count):
    while not flag[0] and count[0] < 5_000_000_000:
        count[0] += 1


@njit
def _wait_for(flag, count):
    parallel_for(1, _wait, (flag, count))


def test_meanwhile_other_threads_run_python():
    flag, count = np.array([1]), np.array([0])
    _wait_for(flag, count)  # compiled
    flag[0] = 0
    other = threading.Timer(0.05, lambda: flag.fill(1))
    other.start()
    _wait_for(flag, count)
    assert count[0] < 5_000_000_000
    other.join()


@njit
def _returns(i, x):
    return x[i]


@njit
def _wrong_function(x):
    parallel_for(len(x), _returns, (x,))


@njit
def _no_tuple(x):
    parallel_for(len(x), _fail, x)


@njit
def _with_a_default(i, x, y=0):
    x[i] = y


@njit
def _too_few(x):
    parallel_for(len(x), _with_a_default, (x,))


@njit
def _no_integer(x):
    parallel_for(2.5, _fail, (x,))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (_wrong_function, "returns nothing"),
        (_no_tuple, "an @njit function"),
        (_too_few, "takes 3 arguments, parallel_for gives 2"),
        (_no_integer, "an integer, an @njit function"),
    ],
)
def test_what_cannot_be_is_refused(kernel, message):
    with pytest.raises(numba.TypingError, match=message):
        kernel(np.arange(3))


PROGRAM = """
import numpy as np
from numba import njit
from nanocnn.kernels.parallel_for import parallel_for
@njit
def one(i, x):
    x[i] = i
@njit(cache=True)
def fill(x):
    parallel_for(len(x), one, (x,))
x = np.zeros(3, np.int64)
fill(x)
print(*x, "hits", sum(fill.stats.cache_hits.values()))
"""


def test_a_kernel_from_the_disk_may_be_the_first_that_runs(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    outputs = [alone(program, NUMBA_CACHE_DIR=str(tmp_path)).output.split("\n")[0] for _ in range(2)]
    assert outputs == ["0 1 2 hits 0", "0 1 2 hits 1"]
