"""Fast short convolutions by interpolation (Cook 1966, Toom 1963; for networks: Lavin & Gray 2016, "Winograd").

A convolution multiplies two polynomials. Evaluate both at enough points, multiply value by value, interpolate: for m
outputs of an r-tap filter that takes m + r - 1 multiplications instead of m r. As matrices, for inputs d and taps g:

    y = A [(G g) * (B d)]

`cook_toom(m, r)` makes A (m, n), G (n, r) and B (n, n), n = m + r - 1, exactly, in fractions. In two dimensions each
matrix is applied to columns, then to rows. The gradient of the taps is the same formula read backwards: with gy for
the gradient of y, G^T [(A^T gy) * (B d)].
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from .simd import fma

POINTS = (0, 1, -1, 2, -2)  # small numbers, in pairs of signs: small errors and shared sums
Matrix = tuple[tuple[float, ...], ...]


class Matrices(NamedTuple):
    """An algorithm: y = A [(G g) * (B d)]."""

    A: Matrix
    G: Matrix
    B: Matrix


def cook_toom(outputs: int, taps: int) -> Matrices:
    """A (outputs, n), G (n, taps), B (n, n) for the points 0, 1, -1, 2, -2 ... and infinity.

    Raises ValueError where the points do not suffice: beyond them, float32 does not either.
    """
    finite = outputs + taps - 2
    if not 1 <= finite <= len(POINTS):
        raise ValueError(f"F({outputs}, {taps}) needs {finite} points besides infinity; there are {len(POINTS)}")
    points = [Fraction(p) for p in POINTS[:finite]]
    a = [[p**i for p in points] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    g = [[p**k / _others(points, j, p) for k in range(taps)] for j, p in enumerate(points)]
    g.append([Fraction(k == taps - 1) for k in range(taps)])
    # A sign moves freely between rows of G and B. Here B's rows end in 1, which costs no multiplication in `combine`.
    b = [[*_polynomial(points[:j] + points[j + 1 :]), Fraction(0)] for j in range(finite)]
    b.append(_polynomial(points))
    return Matrices(_floats(a), _floats(g), _floats(b))


def _others(points: list[Fraction], j: int, p: Fraction) -> Fraction:
    """The product of p minus every other point."""
    product = Fraction(1)
    for k, q in enumerate(points):
        product *= p - q if k != j else 1
    return product


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _floats(matrix: list[list[Fraction]]) -> Matrix:
    return tuple(tuple(float(v) for v in row) for row in matrix)


def transposed(matrix: Matrix) -> Matrix:
    """Columns as rows."""
    return tuple(zip(*matrix, strict=True))


# ------------------------------------------------------------------ a small fixed matrix times vectors, while compiling


def combine(matrix: Matrix, vectors: list) -> list:
    """`matrix` times the list of `vectors`, for use in @unrolled functions: zeros cost nothing, nor does a factor 1.

    The points come in pairs of signs, so rows come in pairs E + O and E - O, and columns in pairs that meet only as
    sum and difference; both are computed once. That is most of what hand-written transforms are known for.
    """
    rows, vectors = _pair_columns([list(row) for row in matrix], list(vectors))
    results: list = [None] * len(rows)
    for i, row in enumerate(rows):
        if results[i] is not None:
            continue
        j = next((j for j in range(i + 1, len(rows)) if results[j] is None and _are_a_pair(row, rows[j])), None)
        if j is None:
            results[i] = _weighted(row, vectors)
            continue
        even = _weighted([a if a == b else 0 for a, b in zip(row, rows[j], strict=True)], vectors)
        odd = [a if a != b else 0 for a, b in zip(row, rows[j], strict=True)]
        factor = next(abs(a) for a in odd if a)
        if any(abs(a) not in (0, factor) for a in odd):
            factor = 1
        odd = _weighted([a / factor for a in odd], vectors)
        results[i] = even + odd if factor == 1 else fma(odd, factor, even)
        results[j] = even - odd if factor == 1 else fma(odd, -factor, even)
    return results


def _are_a_pair(a: list[float], b: list[float]) -> bool:
    """Equal up to signs, with at least two terms that agree or differ: otherwise nothing is shared."""
    same = [x != 0 and x == y for x, y in zip(a, b, strict=True)]
    opposite = [x != 0 and x == -y for x, y in zip(a, b, strict=True)]
    alike = all(x == y or x == -y for x, y in zip(a, b, strict=True))
    return alike and any(same) and any(opposite) and sum(same) + sum(opposite) > 2


def _pair_columns(rows: list[list[float]], vectors: list) -> tuple[list[list[float]], list]:
    """Replace two vectors that every row weighs alike, up to signs, by their sum and their difference."""
    columns = [list(c) for c in zip(*rows, strict=True)]
    for j in range(len(columns)):
        for k in range(j + 1, len(columns)):
            a, b = columns[j], columns[k]
            pairs = [(x, y) for x, y in zip(a, b, strict=True) if x or y]
            alike = all(x == y or x == -y for x, y in pairs)
            if alike and sum(x == y for x, y in pairs) > 1 and sum(x == -y for x, y in pairs) > 1:
                vectors[j], vectors[k] = vectors[j] + vectors[k], vectors[j] - vectors[k]
                columns[j] = [x if x == y else 0 for x, y in zip(a, b, strict=True)]
                columns[k] = [x if x != y else 0 for x, y in zip(a, b, strict=True)]
    return [list(r) for r in zip(*columns, strict=True)], vectors


def _weighted(row: list[float], vectors: list):
    """The sum of the vectors times their weights."""
    terms = sorted(((w, v) for w, v in zip(row, vectors, strict=True) if w), key=lambda term: abs(term[0]) != 1)
    (weight, result), *rest = terms
    if weight != 1:
        positive = next((i for i, (w, _) in enumerate(rest) if w == 1), None)
        if weight == -1 and positive is not None:  # begin with a term that needs no factor at all
            rest[positive], (_, result) = (weight, result), rest[positive]
        else:
            result = result * weight
    for weight, v in rest:
        result = result + v if weight == 1 else result - v if weight == -1 else fma(v, weight, result)
    return result
