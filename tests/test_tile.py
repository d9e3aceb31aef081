"""The register tile: a product of any size, at its edges too, and its epilogue."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from nanocnn.kernels.simd import REGISTERS, splat
from nanocnn.kernels.tile import (
    ROWS,
    VECTORS,
    add_tiles,
    finish_tile,
    load_tile,
    load_tile_edge,
    multiply,
    panel,
    panel_width,
    part,
    row_offsets,
    store_tile,
    store_tile_edge,
    zero_tile,
)

both = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)


def numbers(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@njit
def _product(a, b, c, columns):
    """c += a b for one panel; b is (depth, PANEL), c has `columns` of its columns."""
    rows, depth = a.shape
    offsets = row_offsets(rows, c.shape[1])
    full = columns == panel(c)
    tile = load_tile(c, 0, offsets) if full else load_tile_edge(c, 0, offsets, columns)
    tile = add_tiles(tile, multiply(zero_tile(c), a, 0, row_offsets(rows, depth), 1, b, 0, panel(b), depth))
    if full:
        store_tile(c, 0, offsets, tile)
    else:
        store_tile_edge(c, 0, offsets, columns, tile)


@both
def test_product_with_edges(dtype):
    width = panel_width(np.dtype(dtype))
    for rows in (1, ROWS - 1, ROWS):
        for columns in (1, width // VECTORS, width - 1, width):
            a, b = numbers((rows, 7), dtype, 1), numbers((7, width), dtype, 2)
            room = numbers((rows + 1, columns), dtype, 3)
            expected = room.copy()
            expected[:rows] += (a.astype(np.float64) @ b[:, :columns]).astype(dtype)
            _product(a, b, room[:rows], columns)
            np.testing.assert_allclose(room, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(room[rows], expected[rows])


@njit
def _finish(c, bias, floor):
    offsets = row_offsets(ROWS, panel(c))
    store_tile(c, 0, offsets, finish_tile(load_tile(c, 0, offsets), bias, 0, splat(floor, c)))


@both
@pytest.mark.parametrize("floor", [0, -np.inf])
def test_epilogue(dtype, floor):
    width = panel_width(np.dtype(dtype))
    c, bias = numbers((ROWS, width), dtype, 4), numbers(width, dtype, 5)
    c[1, 2] = np.nan
    expected = np.maximum(c + bias, dtype(floor))
    _finish(c, bias, floor)
    np.testing.assert_array_equal(c, expected)


def test_the_tile_fits_the_registers():
    assert ROWS * VECTORS + VECTORS + 1 <= REGISTERS
    assert panel_width(np.dtype(np.float32)) == 2 * panel_width(np.dtype(np.float64))


@njit
def _parts(count, size):
    return [part(np.uint64(k), count, size) for k in range(count)]


@pytest.mark.parametrize(("count", "size"), [(1, 5), (3, 10), (4, 2), (2, 0)])
def test_parts_cover_everything_once(count, size):
    parts = _parts(count, size)
    assert [i for first, end in parts for i in range(first, end)] == list(range(size))
    lengths = [end - first for first, end in parts]
    assert max(lengths) - min(lengths) <= 1
