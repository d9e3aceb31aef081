"""Weights laid out for the micro-kernel: panels of columns, and input and output channels exchanged."""

from __future__ import annotations

from numba import njit

from .memory import contiguous, empty
from .parallel_for import parallel_for
from .simd import lanes, load, store, transpose, unrolled
from .tile import panel_width


def panels_of(w):
    """(G, K, O) -> (G, ceil(O / PANEL), K, PANEL): the rows of a panel lie one after the other, padded with zeros."""
    width = panel_width(w.dtype)
    out = empty((w.shape[0], -(-w.shape[2] // width), w.shape[1], width), w.dtype)
    _pack(contiguous(w), out)
    return out


@njit(cache=True)
def _pack(w, out):
    parallel_for(out.shape[0] * out.shape[1], _pack_panel, (w, out))


@njit(cache=True)
def _pack_panel(number, w, out):
    _, panels, depth, width = out.shape
    group, p = number // panels, number % panels
    for k in range(depth):
        _pack_row(w[group, k], out[group, p, k], p * width)


@njit(cache=True)
def _pack_row(row, out, first):
    n = lanes(row)
    for i in range(0, out.size, n):
        if first + i + n <= row.size:
            store(out, i, load(row, first + i))
        else:
            store(out, i, load(row, min(first + i, row.size), max(0, row.size - first - i)))


def swap_channels(w, turn=False):
    """(KH, KW, C, O) -> (KH, KW, O, C); with `turn`, the kernel also turned by 180 degrees."""
    kh, kw, c, o = w.shape
    out = empty((kh, kw, o, c), w.dtype)
    _swap_channels(contiguous(w).reshape(kh * kw, c, o), out.reshape(kh * kw, o, c), turn)
    return out


@njit(cache=True)
def _swap_channels(w, out, turn):
    parallel_for(w.shape[0] * ((w.shape[1] + lanes(w) - 1) // lanes(w)), _swap_some, (w, out, turn))


@njit(cache=True)
def _swap_some(number, w, out, turn):
    """A vector of input channels, of one tap."""
    taps, c, o = w.shape
    n = lanes(w)
    across = (c + n - 1) // n
    tap, first = number // across, number % across * n
    to = taps - 1 - tap if turn else tap
    for second in range(0, o, n):
        if first + n <= c and second + n <= o:
            swap_square(w, (tap * c + first) * o + second, o, out, (to * o + second) * c + first, c)
        else:
            for i in range(first, min(c, first + n)):
                for j in range(second, min(o, second + n)):
                    out[to, j, i] = w[tap, i, j]


@unrolled
def swap_square(x, i, stride, y, j, to):
    """A square of x, transposed, into y."""
    for k, row in enumerate(transpose([load(x, i + k * stride) for k in range(lanes(x))])):
        store(y, j + k * to, row)
