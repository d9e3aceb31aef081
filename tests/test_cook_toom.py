"""Cook-Toom matrices against the convolution they stand for, and the small products that apply them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest

from nanocnn.kernels import cook_toom as module
from nanocnn.kernels.cook_toom import POINTS, combine, cook_toom, transposed
from nanocnn.kernels.winograd import F2, F4, S4, S4X, S4XEven
from nanocnn.kernels.winograd import MATRICES as OF

SIZES = [(m, r) for m in range(1, 7) for r in range(1, 7) if 1 <= m + r - 2 <= len(POINTS)]
MATRICES = {
    f"{algorithm.__name__}.{name}{turn}": transposed(matrix) if turn else matrix
    for algorithm, matrices in OF.items()
    for name, matrix in matrices._asdict().items()
    for turn in ("", " transposed")
}


def exactly(matrix):
    """The fractions that the floats stand for, as an array of objects."""
    return np.array([[Fraction(v).limit_denominator(1000) for v in row] for row in matrix])


def correlate(d, g):
    """y[i] = sum over k of d[i + k] g[k], whatever the numbers are."""
    return [sum(d[i + k] * g[k] for k in range(len(g))) for i in range(len(d) - len(g) + 1)]


@pytest.mark.parametrize(("outputs", "taps"), SIZES)
def test_matrices_are_the_convolution_exactly(outputs, taps):
    n = outputs + taps - 1
    a, g, b = map(exactly, cook_toom(outputs, taps))
    assert (a.shape, g.shape, b.shape) == ((outputs, n), (n, taps), (n, n))
    rng = np.random.default_rng(outputs * 10 + taps)
    d, w, gy = (rng.integers(-9, 10, count).astype(object) for count in (n, taps, outputs))
    assert list(a @ ((g @ w) * (b @ d))) == correlate(d, w)
    assert list(g.T @ ((a.T @ gy) * (b @ d))) == correlate(d, gy)  # backwards: the gradient of the taps


@pytest.mark.parametrize(("outputs", "taps"), [(4, 4), (6, 2), (1, 1), (100, 3)])
def test_sizes_without_points_are_refused(outputs, taps):
    with pytest.raises(ValueError, match=rf"F\({outputs}, {taps}\) needs {outputs + taps - 2} points .* there are 5"):
        cook_toom(outputs, taps)


def test_algorithms_say_their_sizes():
    for algorithm, matrices in OF.items():
        sizes = algorithm()
        a, b = np.array(matrices.A), np.array(matrices.B)
        assert (sizes.outputs, sizes.planes) == a.shape
        assert (sizes.planes, sizes.inputs) == b.shape


@pytest.mark.parametrize("algorithm", [F2, F4, S4], ids=lambda a: a.__name__)
def test_algorithms_in_two_dimensions(algorithm):
    """Each is a 3x3 convolution, of stride 1 or 2, of a square of pixels."""
    a, g, b = (np.array(m) for m in OF[algorithm])
    m, stride = algorithm().outputs, algorithm().advance // algorithm().outputs
    rng = np.random.default_rng(3)
    d, w = rng.standard_normal((algorithm().inputs,) * 2), rng.standard_normal((3, 3))
    expected = [[np.sum(d[i : i + 3, j : j + 3] * w) for j in np.arange(m) * stride] for i in np.arange(m) * stride]
    np.testing.assert_allclose(a @ ((g @ w @ g.T) * (b @ d @ b.T)) @ a.T, expected, atol=1e-12)


@pytest.mark.parametrize(("algorithm", "padding"), [(S4X, 1), (S4XEven, 0), (S4XEven, 2)])
def test_gradient_of_the_image_by_parity(algorithm, padding):
    """Along one axis: gx[2i + k - padding] collects gy[i] w[k]; a tile is 8 pixels from an even one on."""
    a, g, b = (np.array(m) for m in OF[algorithm])
    rng = np.random.default_rng(4)
    gy, w, tile = rng.standard_normal(20), rng.standard_normal(3), 1  # the tile after the first: no border
    gx = np.zeros(50)
    for i, v in enumerate(gy):
        gx[2 * i : 2 * i + 3] += v * w
    first = (padding - 1) // 2 if padding % 2 else padding // 2 - 1
    pixels = gy[4 * tile + first :][: algorithm().inputs]
    expected = gx[padding + 8 * tile :][:8]
    np.testing.assert_allclose(a @ ((g @ w) * (b @ pixels)), expected, atol=1e-12)


# ------------------------------------------------------------------ a small matrix times vectors


class Counting:
    """A vector that counts what is done to it."""

    done: ClassVar[Counter] = Counter()

    def __init__(self, values):
        self.values = values

    def __add__(self, other):
        Counting.done["add"] += 1
        return Counting(self.values + other.values)

    def __sub__(self, other):
        Counting.done["add"] += 1
        return Counting(self.values - other.values)

    def __mul__(self, number):
        Counting.done["multiply"] += 1
        return Counting(self.values * number)


def fused(a, factor, c):
    Counting.done["fma"] += 1
    return Counting(a.values * factor + c.values)


@pytest.fixture
def apply(monkeypatch):
    """combine() on rows of an array."""
    monkeypatch.setattr(module, "fma", fused)

    def apply(matrix, rows):
        Counting.done = Counter()
        return np.array([v.values for v in combine(matrix, [Counting(row) for row in rows])])

    return apply


@pytest.mark.parametrize("name", MATRICES)
def test_combine_with_the_matrices_in_use(apply, name):
    matrix = MATRICES[name]
    x = np.random.default_rng(5).standard_normal((len(matrix[0]), 4))
    np.testing.assert_allclose(apply(matrix, x), np.array(matrix) @ x, atol=1e-12)


def test_combine_with_any_matrix(apply):
    rng = np.random.default_rng(6)
    for _ in range(300):
        shape = rng.integers(1, 7, 2)
        matrix = rng.choice([0, 0, 1, -1, 2, -2, 0.5], shape)
        if rng.random() < 0.5:  # pairs of signs, by rows or by columns
            matrix = np.concatenate([matrix, matrix * rng.choice([1, -1], shape[1])])
        if rng.random() < 0.5:
            matrix = np.concatenate([matrix, matrix * rng.choice([1, -1], (len(matrix), 1))], axis=1)
        matrix[~matrix.any(axis=1), 0] = 1
        x = rng.standard_normal((matrix.shape[1], 3))
        np.testing.assert_allclose(apply(tuple(map(tuple, matrix.tolist())), x), matrix @ x, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "operations"),
    [("F2.B", 4), ("F2.A", 4), ("F4.B", 12), ("F4.A", 10), ("S4.B", 11), ("S4.A", 12)],
)
def test_combine_takes_no_more_than_by_hand(apply, name, operations):
    """F4's 12 and 10 a column are those of transforms written by hand, without a multiplication on its own."""
    matrix = MATRICES[name]
    apply(matrix, np.ones((len(matrix[0]), 1)))
    assert Counting.done.total() == operations
    assert not Counting.done["multiply"]
