"""kernels/cuda/winograd.py: several blocks of tiles, batches in pieces, and where its matrices come from."""

from __future__ import annotations

import numpy as np
import pytest
from launch import NEEDS_GXX

from nanocnn.kernels.conv2d import conv2d, conv2d_grad_x
from nanocnn.kernels.cuda import winograd
from nanocnn.kernels.cuda.emulated import counting
from nanocnn.kernels.cuda.source import FOLDER
from nanocnn.kernels.dispatch import to_device, using

GEOMETRY = (1, 1), (2, 1), (1, 1), 1


def some(*shape, seed=0):
    return to_device(np.random.default_rng(seed).standard_normal(shape, np.float32), "emulated")


def test_the_matrices_are_those_of_the_cpu():
    assert (FOLDER / "winograd_matrices.cuh").read_text() == winograd.header()


@NEEDS_GXX
@pytest.mark.parametrize("variant", ["cuda_winograd2", "cuda_winograd4"])
def test_several_blocks_and_pieces(variant, monkeypatch):
    """And a batch taken image by image has the same bits."""
    x, w, bias = some(3, 17, 18, 20), some(3, 3, 20, 72, seed=1), some(72, seed=2)
    residual, gy = some(3, 19, 18, 72, seed=3), some(3, 19, 18, 72, seed=4)
    end = dict(bias=bias, residual=residual, relu=True)
    calls = [(conv2d, (x, w, *GEOMETRY), end), (conv2d_grad_x, (gy, w, x.shape, *GEOMETRY), {"residual": x})]
    for primitive, args, kwargs in calls:
        run = primitive.variants[variant].body
        monkeypatch.undo()
        with counting() as report:
            checked = run(*args, **kwargs)
        assert report.launches["winograd_products"] == 1
        want, whole = primitive.__wrapped__(*args, **kwargs), run(*args, **kwargs)
        for got in (checked, whole):  # of two builds, and so with other last bits
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())
        monkeypatch.setattr(winograd, "WORKSPACE", 1)
        np.testing.assert_array_equal(run(*args, **kwargs), whole)


@NEEDS_GXX
def test_fastest_does_not_take_it_unmeasured():
    x, w = some(1, 8, 8, 8), some(3, 3, 8, 8, seed=1)
    conv2d.ran.clear()
    conv2d(x, w, *GEOMETRY)
    assert conv2d.ran == {"cuda_vectorised"}
    with using(conv2d="upto:cuda_winograd4"):
        conv2d(x, w, *GEOMETRY)
    assert conv2d.ran == {"cuda_vectorised", "cuda_winograd4"}
