"""Every CUDA variant on random shapes, in the emulator with all checks on.

The example calls of test_kernels.py are chosen for the edges that somebody thought of; these are for the others.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from launch import NEEDS_GXX
from test_kernels import CUDA_VARIANTS, OURS, assert_equals_reference

from nanocnn.example_calls import BenchError, Shape, arguments
from nanocnn.kernels.cuda.emulated import counting
from nanocnn.kernels.narrow import HALVES
from nanocnn.traffic import on_emulator

pytestmark = NEEDS_GXX


@st.composite
def shapes(draw):
    """Small images and a window over them, and a matrix product; channels of all kinds, some in fours and eights."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 4, 8])), groups * draw(st.sampled_from([1, 3, 4, 8, 16]))
    kernel = draw(st.integers(1, 3))
    sizes = dict(kernel=kernel, stride=draw(st.integers(1, 3)), padding=draw(st.integers(0, kernel // 2)))
    product = {name: draw(st.one_of(st.integers(1, 40), st.just(16))) for name in "mkn"}
    try:
        return Shape(
            batch=draw(st.integers(1, 3)),
            size=draw(st.integers(1, 7)),
            channels=channels[0],
            out_channels=channels[1],
            dilation=draw(st.sampled_from([1, 1, 2])),
            groups=groups,
            **sizes,
            **product,
        )
    except BenchError:  # the kernel does not fit into the image
        assume(False)


@pytest.mark.parametrize("primitive", sorted({primitive for primitive, _ in CUDA_VARIANTS}))
@settings(max_examples=6, deadline=None)
@given(shape=shapes(), half=st.sampled_from([*HALVES]))
def test_random_shapes(primitive, shape, half):
    assume(primitive != "augment" or shape.size > 4)  # which mirrors four pixels at the edges
    for dtype in (np.float32, half):
        args = on_emulator(arguments(primitive, shape, dtype))
        for name in (name for p, name in CUDA_VARIANTS if p == primitive):
            if OURS[primitive].variants[name] in OURS[primitive].candidates(*args):
                with counting():
                    assert_equals_reference(primitive, name, args, {})
