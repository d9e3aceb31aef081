"""The vector type: every operation in both precisions against NumPy. test_narrower_machines.py runs this again."""

from __future__ import annotations

import ctypes
import inspect
import math
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numba import njit

from nanocnn.kernels import simd
from nanocnn.kernels.simd import (
    broadcast,
    distance,
    equal,
    fma,
    lanes,
    load,
    maximum,
    minimum,
    prefetch,
    select,
    splat,
    store,
    stream,
    total,
    transpose,
    unrolled,
    zeros,
)

DTYPES = [np.float32, np.float64]
both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


def width(dtype) -> int:
    return simd.WIDTH // np.dtype(dtype).itemsize


def numbers(count, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(dtype)


# ------------------------------------------------------------------ arithmetic

OPERATIONS = {  # on vectors a, b, c and a number s: in compiled code and in NumPy alike
    "a + b": lambda a, b, c, s: a + b,
    "a - b": lambda a, b, c, s: a - b,
    "a * b": lambda a, b, c, s: a * b,
    "a / b": lambda a, b, c, s: a / b,
    "-a": lambda a, b, c, s: -a,
    "a + s": lambda a, b, c, s: a + s,
    "s - a": lambda a, b, c, s: s - a,
    "a * 2": lambda a, b, c, s: a * 2,
    "1 / a": lambda a, b, c, s: 1 / a,
    "0.1 - a": lambda a, b, c, s: np.float64(0.1).astype(a.dtype) - a,
    "in place": lambda a, b, c, s: ((a + b - c) * 2) / s,
    "a > b": lambda a, b, c, s: np.where(a > b, a, c),
    "a >= b": lambda a, b, c, s: np.where(a >= b, a, c),
    "a < b": lambda a, b, c, s: np.where(a < b, a, c),
    "a <= b": lambda a, b, c, s: np.where(a <= b, a, c),
    "a == b": lambda a, b, c, s: np.where(a == b, a, c),
    "a != b": lambda a, b, c, s: np.where(a != b, a, c),
    "equal": lambda a, b, c, s: np.where(a == b, 1, 0),
    "a > s": lambda a, b, c, s: np.where(a > s, a, 0),
    "s <= a": lambda a, b, c, s: np.where(s <= a, 1, c),
    "maximum": lambda a, b, c, s: np.where(a > b, a, b),
    "minimum": lambda a, b, c, s: np.where(a < b, a, b),
    "maximum of a number": lambda a, b, c, s: np.where(a > 0.5, a, 0.5),
    "splat": lambda a, b, c, s: np.full_like(a, s),
    "zeros": lambda a, b, c, s: np.zeros_like(a),
    "broadcast": lambda a, b, c, s: np.full_like(a, a[1]),
    "constant": lambda a, b, c, s: np.full_like(a, 7),
}


@njit
def _operations(x, y, s):
    n = lanes(x)
    prefetch(x, 0)
    a, b, c = load(x, 0), load(x, n), load(x, 2 * n)
    d = a
    d += b
    d -= c
    d *= 2
    d /= s
    results = (
        a + b, a - b, a * b, a / b, -a, a + s, s - a, a * 2, 1 / a, 0.1 - a, d,
        select(a > b, a, c), select(a >= b, a, c), select(a < b, a, c), select(a <= b, a, c),
        select(a == b, a, c), select(a != b, a, c), select(equal(a, b), splat(1, a), 0),
        select(a > s, a, 0), select(s <= a, 1, c),
        maximum(a, b), minimum(a, b), maximum(a, 0.5), splat(s, x), zeros(a), broadcast(x, 1),
    )  # fmt: skip
    i = 0
    for v in results:
        store(y, i, v)
        i += n
    store(y, i, 7)
    return total(a), total(zeros(y) + s)


@njit
def _stream(x, y):
    for i in range(0, x.size, lanes(x)):
        stream(y, i, load(x, i) + 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stream_writes_whole_vectors_to_aligned_memory(dtype):
    raw = np.zeros(64 * np.dtype(dtype).itemsize + 64, np.uint8)
    y = raw[-raw.ctypes.data % 64 :][: 64 * np.dtype(dtype).itemsize].view(dtype)
    x = np.arange(64, dtype=dtype)
    _stream(x, y)
    np.testing.assert_array_equal(y, x + 1)


@both
@pytest.mark.parametrize("kind", ["normal", "special"])
def test_operations(dtype, kind):
    n = width(dtype)
    x = numbers(3 * n, dtype)
    x[n + 1] = x[1]
    if kind == "special":  # NaN against a number, a number against NaN, infinities, zeros of both signs
        x[:4], x[n : n + 4] = [np.nan, 1, np.inf, 0.0], [1, np.nan, -np.inf, -0.0]
        if n > 4:
            x[4:6], x[n + 4 : n + 6] = [-0.0, np.nan], [0.0, np.nan]
    y = np.full(len(OPERATIONS) * n, 99, dtype)
    s = dtype(1.5)
    sums = _operations(x, y, s)
    with np.errstate(all="ignore"):
        for (name, operation), got in zip(OPERATIONS.items(), y.reshape(-1, n), strict=True):
            expected = operation(x[:n], x[n : 2 * n], x[2 * n :], s).astype(dtype)
            np.testing.assert_array_equal(got, expected, err_msg=name)
            if "imum" in name:
                np.testing.assert_array_equal(np.signbit(got), np.signbit(expected), err_msg=name)
        np.testing.assert_allclose(sums, [x[:n].sum(), 1.5 * n], rtol=1e-5)


@njit
def _fma(x, y):
    n = lanes(x)
    store(y, 0, fma(load(x, 0), load(x, n), load(x, 2 * n)))
    store(y, n, fma(2, load(x, 0), 0.5))
    return fma(x[0], x[1], x[2]), fma(2, 3, 4)


@both
def test_fma_rounds_once(dtype):
    n, epsilon = width(dtype), float(np.finfo(dtype).eps)
    x = np.repeat([1 + epsilon, 1 - epsilon, -1], n).astype(dtype)  # the product is 1 - epsilon^2: 1, if it is rounded
    y = np.empty(2 * n, dtype)
    x[0] = x[1] = x[2] = 3
    scalar, whole = _fma(x, y)
    assert (scalar, whole) == (12, 10)
    np.testing.assert_array_equal(y[3:n], -(epsilon**2) if simd.HAS_FMA else 0)
    np.testing.assert_array_equal(y[n : n + 3], 6.5)


@njit
def _transpose(x, y):
    _store_rows(y, transpose(_load_rows(x)))


@unrolled
def _load_rows(x):
    return [load(x, i * lanes(x)) for i in range(lanes(x))]


@unrolled
def _store_rows(y, rows):
    for i, row in enumerate(rows):
        store(y, i * lanes(y), row)


@both
def test_transpose(dtype):
    x = numbers((width(dtype), width(dtype)), dtype)
    y = np.empty_like(x)
    _transpose(x, y)
    np.testing.assert_array_equal(y, x.T)


@njit
def _distance(x, y):
    return distance(x, y), total(load(x, distance(x, y), 1))


@both
def test_distance(dtype):
    whole = numbers(64, dtype)
    assert _distance(whole[:8], whole[40:]) == (40, whole[40])
    assert _distance(whole[40:], whole[:8]) == (-40, whole[0])


# ------------------------------------------------------------------ memory


def _before_a_guard_page(dtype):
    """A page of numbers; whoever touches the byte after it ends the process."""
    room = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0)
    return np.frombuffer(room, dtype, mmap.PAGESIZE // np.dtype(dtype).itemsize)


@njit
def _copy(x, i, y, j, count):
    store(y, j, load(x, i, count))


@njit
def _fill(x, i, count, value):
    store(x, i, value, count)


@both
def test_masked_moves_touch_nothing_else(dtype):
    n = width(dtype)
    page = _before_a_guard_page(dtype)
    page[:] = np.arange(1, page.size + 1)
    for count in [*range(-2, n + 2), 2**31, 2**32 + 1, -(2**40), 2**62]:
        taken = min(max(count, 0), n)
        out = np.full(n, 99, dtype)
        _copy(page, page.size - taken, out, 0, count)
        np.testing.assert_array_equal(out, [*page[page.size - taken :], *[0] * (n - taken)])
        expected = page.copy()
        expected[page.size - taken :] = -count % 1000
        _fill(page, page.size - taken, count, -count % 1000)
        np.testing.assert_array_equal(page, expected)
    _copy(page, page.size, out, 0, 0)  # the first number beyond: not a byte of it is read
    _fill(page, page.size, -1, 5)


@both
def test_arrays_that_begin_anywhere(dtype):
    n, size = width(dtype), np.dtype(dtype).itemsize
    for offset in (1, 2, size):
        unaligned = np.frombuffer(bytearray(offset + 3 * n * size), np.uint8)[offset:].view(dtype)
        unaligned[:] = numbers(3 * n, dtype)
        before = unaligned.copy()
        for count in (n, n - 1):
            _copy(unaligned, 0, unaligned, n + 1, count)
            np.testing.assert_array_equal(unaligned[n + 1 :][:n], [*before[:count], *[0] * (n - count)])


@njit
def _of_many_dimensions(x, table):
    return total(load(x, 3, 1)), _elements(x, table)


@unrolled
def _elements(x, table):
    return x[2], table[0] + 1, table[1]


def test_offsets_count_from_the_first_element():
    x = numbers((2, 3, 2), np.float32)
    for kind in (np.int64, np.int32, np.uint8, np.int16):
        table = np.array([5, 6], kind) if kind is np.uint8 else np.array([5, -6], kind)
        first, (third, *rest) = _of_many_dimensions(x, table)
        assert (first, third, *rest) == (x[0, 1, 1], x[0, 1, 0], 6, table[1])


# ------------------------------------------------------------------ Python that runs while compiling


class Inner(NamedTuple):
    scale: float
    shift: int


class Outer(NamedTuple):
    x: np.ndarray
    inner: Inner
    pair: tuple

    def at(self, i):
        return load(self.x, i) * self.inner.scale + self.inner.shift


Outer.weights = ((1.0, 2.0), (0.0, -1.0))  # type: ignore[attr-defined]


class Pair(NamedTuple):
    low: float
    high: float


class Mixed(NamedTuple):
    vector: object
    number: int


@unrolled
def _everything(outer, depth, word, count=None, factor=3, flag=False):
    assert isinstance(depth, int)
    assert isinstance(flag, bool)
    assert (word, factor) in {("rows", 3), ("rows", 5)}
    (p, (q,)), nothing = outer.pair
    assert nothing is None
    sums = [w * outer.at(depth) for row in outer.weights for w in row]
    v = sums[0] + sums[1] + sums[2] + sums[3]
    extra = [] if count is None else [load(outer.x, 0, count)]
    return [v + p * q, [extra, Pair(0.5, p), Mixed(v, depth)], 2.5 if flag else 1, None, count]


@njit
def _call_everything(outer, y, count):
    n = lanes(y)
    v, (extra, pair, mixed), one, _, _ = _everything(outer, 2, "rows")
    w, (tail, _, _), more, _, again = _everything(outer, 2, "rows", flag=True, count=count, factor=5)
    store(y, 0, v)
    store(y, n, tail[0])
    store(y, 2 * n, mixed.vector - w)
    return len(extra), pair.low, pair.high, mixed.number, one, more, again


@both
def test_unrolled_arguments_and_results(dtype):
    n = width(dtype)
    x, y = numbers(3 * n, dtype), np.empty(3 * n, dtype)
    outer = Outer(x, Inner(0.5, 3), ((2.0, (4,)), None))
    assert _call_everything(outer, y, 1) == (0, 0.5, 2.0, 2, 1, 2.5, 1)
    np.testing.assert_allclose(y[:n], 2 * (x[2:][:n] * 0.5 + 3) + 8, rtol=1e-6)
    np.testing.assert_array_equal(y[n : 2 * n], [x[0], *[0] * (n - 1)])
    np.testing.assert_allclose(y[2 * n :], -8, rtol=1e-6)


@unrolled
def _mix(a, b):
    return a + 0.5, a * b, maximum(a, 4), minimum(a, b), -a, 1 - a, a - b


@njit
def _call_mix(a, b):
    return _mix(a, b)


def test_numbers_meet_in_the_wider_type():
    assert _call_mix(3, 2.5) == (3.5, 7.5, 4, 2.5, -3, -2, 0.5)
    assert _call_mix(np.float32(0.1), 0.1) == (
        pytest.approx(np.float32(0.1) + 0.5, rel=1e-6),
        float(np.float32(0.1)) * 0.1,
        4,
        0.1,
        pytest.approx(-0.1),
        pytest.approx(0.9),
        float(np.float32(0.1)) - 0.1,
    )


@njit
def _optional_count(x, count=None):
    return total(load(x, 0, count))


def test_a_caller_may_have_defaults_of_its_own():
    x = np.ones(64, np.float32)
    assert _optional_count(x) == width(np.float32)
    assert _optional_count(x, 3) == 3


# ------------------------------------------------------------------ errors


@unrolled
def _first_of(x, flag):
    return load(x, 0)


@unrolled
def _branch(x):
    return load(x, 0) if load(x, 0) > 1 else zeros(x)


@unrolled
def _loop(x, count):
    return [load(x, i) for i in range(count)]


@unrolled
def _unpack(x, count):
    first, _ = count
    return first


@unrolled
def _give_back(x):
    return x


@unrolled
def _divide(i):
    return i / 2


@unrolled
def _compare(i):
    return select(i > 2, i, 0)


@unrolled
def _lane(x):
    return load(x, 0)[1]


@unrolled
def _half_element(x):
    return x[0.5]


FLOATS = np.ones(64, np.float32)
READ_ONLY = FLOATS.copy()
READ_ONLY.flags.writeable = False
ERRORS = [
    (lambda x: total(load(x, 0)), (FLOATS[::2],), "C-contiguous array, got array.*ascontiguousarray"),
    (lambda x: total(load(x, 0)), (FLOATS.reshape(8, 8).T,), "C-contiguous array"),
    (lambda x: total(load(x, 0)), (np.arange(64),), "a vector holds float32 or float64, not int64"),
    (lambda x: total(load(x, 0)), (1.5,), "expected an array, got float64"),
    (lambda x: total(x), (FLOATS,), "expected vectors of one type, got array"),
    (lambda x: total(load(x, 0) + load(x.astype(np.float64), 0)), (FLOATS,), r"expected float32x\d+, got float64x\d+"),
    (lambda x, y: store(x, 0, load(y, 0)), (FLOATS, np.ones(64)), r"expected float32x\d+, got float64x\d+"),
    (lambda x, y: distance(x, y), (FLOATS, np.ones(64)), "elements of one dtype"),
    (lambda x: store(x, 0, 1), (READ_ONLY,), "cannot store to a read-only array"),
    (lambda x: total(load(x, 0, 2.5)), (FLOATS,), "expected int64, got float64"),
    (lambda x: total(load(x, 1.0)), (FLOATS,), "expected int64, got float64"),
    (lambda x, flag: total(_first_of(x, flag)), (FLOATS, True), "takes no boolean but a literal one"),
    (lambda x: total(_branch(x)), (FLOATS,), r"maskx\d+ is not known while compiling: use select"),
    (lambda x, n: _loop(x, n), (FLOATS, 3), "int64 is not known while compiling: range"),
    (lambda x, n: _unpack(x, n), (FLOATS, 3), "int64: no tuple"),
    (lambda x: _give_back(x), (FLOATS,), "returns numbers, vectors, masks and tuples of them, not array"),
    (lambda x: total(_lane(x)), (FLOATS,), r"expected an array, got float32x\d+"),
    (lambda x: _half_element(x), (FLOATS,), "expected int64, got 0.5"),
    (lambda i: _divide(i), (3,), "not divided with /"),
    (lambda i: _compare(i), (3,), "compares vectors"),
    (lambda x: total(select(True, load(x, 0), 0)), (FLOATS,), "needs a mask"),
    (lambda x: total(select(load(x, 0) > 0, 1.0, 0.0)), (FLOATS,), "at least one vector"),
    (lambda x: transpose((load(x, 0), load(x, 0), load(x, 0))), (FLOATS,), r"transpose needs \d+ vectors"),
    (lambda s: splat(s, 1), (2.0,), "of known dtype, got 1"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_mistakes_are_named(function, arguments, message):
    with pytest.raises(TypeError, match=message):
        njit(function)(*arguments)


def test_plain_python_is_told_where_vectors_live():
    with pytest.raises(TypeError, match=r"load\(\) works in @njit code"):
        load(FLOATS, 0)
    with pytest.raises(TypeError, match="plain parameters"):
        unrolled(lambda *them: them[0])


# ------------------------------------------------------------------ the examples, the cache, other machines


def test_the_examples_of_the_documentation():
    examples = re.findall(r"(?m)^    @.*\n(?:     ? ?.*\n)+", inspect.getdoc(simd) + "\n")
    names = {"njit": lambda **options: njit, **vars(simd)}  # without its cache, for which a function needs a file
    for example in examples:
        exec(inspect.cleandoc(example), names)
    assert len(examples) == 2
    for dtype in DTYPES:
        for size in (0, 1, 15, 16, 37):
            x, y = numbers(size, dtype), numbers(size, dtype, 1)
            expected = y + dtype(2.5) * x
            names["axpy"](2.5, x, y)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)

    rank_one = names["rank_one"]

    @unrolled
    def tile_of(like, rows, vectors):
        return [[zeros(like)] * vectors] * rows

    @unrolled
    def write(tile, c):
        for r, row in enumerate(tile):
            for k, v in enumerate(row):
                store(c, (r * len(row) + k) * lanes(c), v)

    @njit
    def product(a, b, c):
        tile = tile_of(a, 3, 2)
        for k in range(a.shape[1]):
            tile = rank_one(tile, a, k, a.shape[1], b, k * b.shape[1])
        write(tile, c)

    a, b = numbers((3, 5), np.float32), numbers((5, 2 * width(np.float32)), np.float32)
    c = np.empty((3, b.shape[1]), np.float32)
    product(a, b, c)
    np.testing.assert_allclose(c, a @ b, rtol=1e-5, atol=1e-6)


USER = '''
"""Somebody's module: the vector type without the rest of its folder."""
from typing import NamedTuple
import numpy as np
from numba import njit
from simd import load, select, store, total, unrolled

class Scaled(NamedTuple):
    x: np.ndarray
    factor: float
    def at(self, i):
        return load(self.x, i) * self.factor

@unrolled
def at(scaled, i):
    return scaled.at(i)

@njit(cache=True)
def positive(scaled):
    v = at(scaled, 0)
    v += 1.0
    return total(select(v > 2.0, v, 0.0))

def maker(function):
    @njit(cache=True)
    def made(scaled):
        return total(function(scaled, 1))
    return made

closed = maker(at)
scaled = Scaled(np.arange(64, dtype=np.float32), 0.5)
positive(scaled), closed(scaled)
for f in (positive, closed):
    print(sum(f.stats.cache_hits.values()), sum(f.stats.cache_misses.values()))
'''


def test_a_second_process_finds_the_compiled_code(tmp_path):
    (tmp_path / "simd.py").write_text(Path(simd.__file__).read_text())
    (tmp_path / "user.py").write_text(USER)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": ""}
    for hits_and_misses in ("0 1", "1 0"):
        command = [sys.executable, "-c", "import user"]
        outcome = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        assert outcome.stdout.split("\n")[:2] == [hits_and_misses] * 2


def test_processors_that_llvm_does_not_know(monkeypatch):
    """LLVM lists no features for some ARM processors; each has NEON all the same."""
    monkeypatch.setattr(simd.config, "CPU_FEATURES", None)
    monkeypatch.setattr(simd, "get_host_cpu_features", lambda: "")
    monkeypatch.setattr(simd.platform, "machine", lambda: "arm64")
    assert simd.target_features() == {"neon"}
    monkeypatch.setattr(simd.platform, "machine", lambda: "x86_64")
    assert simd.target_features() == set()


def test_the_target_is_what_numba_compiles_for():
    assert width(np.float32) == 2 * width(np.float64) == simd.WIDTH // 4
    assert math.log2(simd.WIDTH) in (4, 5, 6)
    assert int(os.environ.get("EXPECTED_WIDTH", simd.WIDTH)) == simd.WIDTH
    assert (simd.ISA, simd.WIDTH) in {("AVX-512", 64), ("AVX2", 32), ("NEON", 16), ("SSE2", 16)}
