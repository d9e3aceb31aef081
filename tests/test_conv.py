"""Convolution: derivatives of every variant over random geometries, values against PyTorch, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanocnn as nc
import nanocnn.functional as F
from nanocnn.kernels import conv2d as conv
from nanocnn.kernels import dispatch, memory, tuned
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients

CONVOLUTIONS = ("conv2d", "conv2d_grad_x", "conv2d_grad_w")
VARIANTS = list(dict.fromkeys(name for p in CONVOLUTIONS for name in dispatch.primitives[p].rungs("cpu")))
ONLY_FLOAT32 = "winograd4", "parity"  # as in test_kernels.py, which says why
IN_FLOAT64 = [name for name in VARIANTS if name not in (*ONLY_FLOAT32, "fp32")]  # the last is for float16 alone


SIZES, GROUPS, FEW = st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)
PADDINGS, DILATIONS = st.integers(0, 2), st.integers(1, 2)


@st.composite
def geometries(
    draw,
    kernels=SIZES,
    strides=FEW,
    paddings=PADDINGS,
    dilations=DILATIONS,
    groups=GROUPS,
    channels=FEW,
    square=False,
):
    """(x, w, b) in float64 and the keywords of conv2d, for a geometry in which at least one window fits.

    `channels` are those of a group; with `square`, rows and columns have the same kernel, stride and padding.
    """

    def pairs(numbers):
        first = draw(numbers)
        return first, first if square else draw(numbers)

    kernel, stride, padding, dilation = pairs(kernels), pairs(strides), pairs(paddings), pairs(dilations)
    g = draw(groups)
    reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    h, w = (draw(st.integers(max(1, r), max(1, r) + 5)) for r in reach)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, c, o = draw(st.integers(1, 3)), g * draw(channels), g * draw(st.integers(1, 3))
    arrays = (rng.standard_normal(s) for s in ((n, h, w, c), (*kernel, c // g, o), (o,)))
    return tuple(arrays), dict(stride=stride, padding=padding, dilation=dilation, groups=g)


ONE, ZERO, THREE, MANY = st.just(1), st.just(0), st.just(3), st.sampled_from([1, 2, 5, 9, 17])
CAN = {  # what a rung is for, where that is not everything
    "blocked": dict(groups=ONE),
    "pointwise": dict(kernels=ONE, strides=ONE, paddings=ZERO, groups=ONE),
    "depthwise": dict(channels=ONE),
    "direct": dict(channels=MANY),
    "subsampled": dict(kernels=ONE, paddings=ZERO, groups=ONE, channels=MANY),
    "few_channels": dict(dilations=ONE, groups=ONE, channels=st.integers(1, 8)),
    "winograd2": dict(kernels=THREE, strides=ONE, dilations=ONE, groups=ONE, channels=MANY),
    "winograd4": dict(kernels=THREE, strides=ONE, dilations=ONE, groups=ONE, channels=MANY),
    "parity": dict(kernels=THREE, strides=st.just(2), dilations=ONE, groups=ONE, channels=MANY, square=True),
}


def using_everywhere(variant):
    """The variant, in whatever of the three convolutions has it."""
    return nc.using(**{p: variant for p in CONVOLUTIONS if variant in dispatch.primitives[p].variants})


@pytest.mark.parametrize("variant", IN_FLOAT64)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_gradients(variant, data):
    arrays, geometry = data.draw(geometries(**CAN.get(variant, {})))
    with using_everywhere(variant):
        check_gradients(lambda *t: F.conv2d(*t, **geometry), *arrays)
        check_gradients(lambda x, w: F.conv2d(x, w, **geometry), *arrays[:2])


@pytest.mark.parametrize("variant", ONLY_FLOAT32)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_and_gradients_in_float32(variant, data):
    """Those of the reference in float64, whose derivatives the test above checks."""
    arrays, geometry = data.draw(geometries(**CAN[variant]))

    def results(choice, dtype):
        tensors = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
        with using_everywhere(choice):
            y = F.conv2d(*tensors, **geometry)
            y.backward(np.cos(np.arange(y.size)).reshape(y.shape).astype(dtype))
        return [y.data, *(t.grad for t in tensors)]

    for found, expected in zip(results(variant, np.float32), results("reference", np.float64), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, abs(expected).max()))


def test_a_gradient_that_came_another_way_is_added():
    """x reaches the loss through two convolutions and by itself: each gradient of x takes up what has arrived."""
    rng = np.random.default_rng(0)
    x, v, w = rng.standard_normal((2, 6, 6, 3)), rng.standard_normal((3, 3, 3, 3)), rng.standard_normal((3, 3, 3, 3))

    def block(x, v, w):
        x = x * 2.0  # an op, so that gradients meet inside the graph
        return F.conv2d(F.conv2d(x, v, padding=1), w, padding=1) + F.conv2d(x, w, padding=1) + x

    for fuse in ("on", "off"):
        with nc.using(fuse=fuse):
            check_gradients(block, x, v, w)


@settings(max_examples=25, deadline=None)
@given(geometries())
def test_equals_pytorch(case):
    torch = pytest.importorskip("torch")
    (x, w, b), geometry = case
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(w.transpose(3, 2, 0, 1)),
        torch.from_numpy(b),
        **geometry,
    )
    ours = F.conv2d(Tensor(x), Tensor(w), Tensor(b), **geometry)
    np.testing.assert_allclose(ours.data, theirs.permute(0, 2, 3, 1), rtol=1e-9, atol=1e-10)


def test_blocks_of_images_join_seamlessly(monkeypatch):
    from nanocnn.kernels import conv2d as kernel

    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((7, 6, 6, 3)), rng.standard_normal((3, 3, 3, 4))
    monkeypatch.setattr(kernel, "COLUMN_BYTES", 2 * 36 * 27 * 8)  # two images a block, one in the last
    with nc.using(**dict.fromkeys(CONVOLUTIONS, "blocked")):
        check_gradients(lambda *t: F.conv2d(*t, padding=1), x, w)


def test_an_image_that_needs_no_gradient_costs_none():
    primitive = dispatch.primitives["conv2d_grad_x"]
    w = Tensor(np.ones((3, 3, 1, 1), np.float32), requires_grad=True)
    for needed in (False, True):
        primitive.ran.clear()
        F.conv2d(Tensor(np.ones((1, 4, 4, 1), np.float32), requires_grad=needed), w).sum().backward()
        assert bool(primitive.ran) == needed


def ones(*shape, dtype=np.float32):
    return Tensor(np.ones(shape, dtype))


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (ones(1, 2, 2, 3), ones(3, 3, 3, 4), {}, "larger than the padded image"),
        (ones(1, 4, 4, 3), ones(3, 3, 3, 4), dict(dilation=2), "larger than the padded image"),
        (ones(1, 8, 8, 3), ones(3, 3, 4, 4), {}, "input channels"),
        (ones(1, 8, 8, 4), ones(3, 3, 2, 3), dict(groups=2), "groups"),
        (ones(8, 8, 3), ones(3, 3, 3, 4), {}, "NHWC|N, H, W, C"),
        (ones(1, 8, 8, 3), ones(3, 3, 3, 4), dict(stride=0), "stride=0"),
        (ones(1, 8, 8, 3), ones(3, 3, 3, 4), dict(padding=-1), "padding=-1"),
        (ones(1, 8, 8, 3), ones(3, 3, 3, 4), dict(stride=(1, 2, 3)), "pair"),
        (ones(1, 8, 8, 3), ones(3, 3, 3, 4), dict(b=ones(3)), "bias"),
    ],
)
def test_what_cannot_be_is_refused(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        F.conv2d(x, w, **options)


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64 images with float32 weights"):
        F.conv2d(ones(1, 4, 4, 1, dtype=np.float64), ones(3, 3, 1, 1))


def test_a_variant_asked_for_what_it_cannot_do_lists_those_that_can():
    with (
        nc.using(conv2d="pointwise"),
        pytest.raises(dispatch.ChoiceError, match=r"variants that can: reference, .*direct"),
    ):
        F.conv2d(ones(1, 4, 4, 1), ones(3, 3, 1, 1))


@pytest.mark.parametrize("policy", ["fastest", "reference"])
@pytest.mark.parametrize(("c", "o"), [(0, 3), (3, 0)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_no_channels(policy, c, o, kernel):
    x, w = (Tensor(np.ones(s), requires_grad=True) for s in ((2, 4, 5, c), (kernel, kernel, c, o)))
    with nc.using(policy):
        y = F.conv2d(x, w)
        y.sum().backward()
    np.testing.assert_array_equal(y.data, np.zeros((2, 5 - kernel, 6 - kernel, o)))
    np.testing.assert_array_equal(x.grad, np.zeros(x.shape))
    np.testing.assert_array_equal(w.grad, np.zeros(w.shape))


def test_gradients_in_another_order_of_memory():
    """gy is Fortran-ordered where the output was transposed, and has no whole panels."""
    rng = np.random.default_rng(0)
    x, w = Tensor(rng.standard_normal((3, 8, 8, 3)), True), Tensor(rng.standard_normal((3, 3, 3, 40)), True)
    t = rng.standard_normal((40, 8, 8, 3))
    (F.conv2d(x, w, padding=1).transpose(3, 2, 1, 0) * Tensor(t)).sum().backward()
    with nc.using("reference"):
        expected = conv.conv2d_grad_w(t.transpose(3, 2, 1, 0), x.data, w.shape, (1, 1), (1, 1), (1, 1), 1)
    np.testing.assert_allclose(w.grad, expected, rtol=1e-9)


def test_an_image_smaller_than_the_kernel_is_refused_without_channels_too():
    x, w = Tensor(np.zeros((1, 0, 5, 30), np.float32)), Tensor(np.zeros((1, 1, 30, 4), np.float32))
    with pytest.raises(ValueError, match="larger than the padded image"):
        F.conv2d(x, w)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("o", [32, 48, 33])
def test_results_larger_than_the_caches(monkeypatch, stride, o):
    """They are written past the caches, where whole vectors allow it."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((16, 17, 18, o), (3, 3, o, o)))
    geometry = (stride, stride), (1, 1), (1, 1), 1
    gy = rng.standard_normal(conv.conv2d(x, w, *geometry).shape).astype(np.float32)
    epilogue = dict(bias=w[0, 0, 0], residual=gy, relu=True)
    forward = conv.conv2d.variants["reference"].body(x, w, *geometry, **epilogue)
    backward = conv.conv2d_grad_x.variants["reference"].body(gy, w, x.shape, *geometry, residual=x)
    monkeypatch.setattr(memory, "SMALL", 0)  # all arrays on pages of the pool
    monkeypatch.setattr(memory, "L3", 0)
    assert memory.past_caches(memory.empty((16,), np.float32))
    with nc.using(streaming="off"):
        assert not memory.past_caches(memory.empty((16,), np.float32))
    rung = {1: "winograd4", 2: "parity"}[stride]
    y = conv.conv2d.variants[rung].body(x, w, *geometry, **epilogue)
    np.testing.assert_allclose(y, forward, rtol=1e-3, atol=1e-3)
    y = conv.conv2d.variants[rung].body(x, w, *geometry)
    np.testing.assert_allclose(y, conv.conv2d(x, w, *geometry), rtol=1e-3, atol=1e-3)
    gx = conv.conv2d_grad_x.variants[rung].body(gy, w, x.shape, *geometry, residual=x)
    np.testing.assert_allclose(gx, backward, rtol=1e-3, atol=1e-3)


def test_pixels_that_no_tap_meets_have_no_gradient():
    """Three of four, where a 1x1 kernel takes every other pixel; with few positions, panels are read once."""
    rng = np.random.default_rng(0)
    for images in (1, 3, 4, 9):
        gy = rng.standard_normal((images, 4, 4, 128)).astype(np.float32)
        w = rng.standard_normal((1, 1, 128, 128)).astype(np.float32)
        residual = rng.standard_normal((images, 8, 8, 128)).astype(np.float32)
        args = gy, w, residual.shape, (2, 2), (0, 0), (1, 1), 1
        for more in ({}, {"residual": residual}):
            expected = conv.conv2d_grad_x.variants["reference"].body(*args, **more)
            dirt = [memory.empty(residual.shape, np.float32) for _ in range(4)]
            for x in dirt:
                x[...] = 7
            del dirt, x
            found = conv.conv2d_grad_x.variants["direct"].body(*args, **more)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ memory that the caller brings


def _gradient_calls():
    """A call for each variant of conv2d_grad_w: (x, w_shape, geometry)."""
    rng = np.random.default_rng(0)
    for kernel, stride, padding, groups in [(3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 4)]:
        x = rng.standard_normal((2, 9, 9, 4)).astype(np.float32)
        yield x, (kernel, kernel, 4 // groups, 8), ((stride,) * 2, (padding,) * 2, (1, 1), groups)


def test_the_gradient_of_weights_is_written_where_the_caller_wants_it():
    ran = set()
    for x, shape, geometry in _gradient_calls():
        gy = conv.conv2d(x, np.ones(shape, np.float32), *geometry)
        expected = conv.conv2d_grad_w.variants["reference"].body(gy, x, shape, *geometry)
        for name, variant in conv.conv2d_grad_w.rungs("cpu").items():
            memory_of_mine = np.full(shape, np.nan, np.float32)
            if not variant.supports(gy, x, shape, *geometry, out=memory_of_mine):
                continue
            assert variant.body(gy, x, shape, *geometry, out=memory_of_mine) is memory_of_mine
            np.testing.assert_allclose(memory_of_mine, expected, rtol=1e-3, atol=1e-3, err_msg=name)
            ran.add(name)
    assert ran == set(conv.conv2d_grad_w.rungs("cpu")) - {"fp32"}  # for float16 alone


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((3, 3, 4, 16), np.float32)[..., ::2], "not C-contiguous: expected C-contiguous float32"),
        (np.zeros((3, 3, 8, 4), np.float32), r"out is float32\[3, 3, 8, 4\]: expected .*\[3, 3, 4, 8\]"),
    ],
)
def test_memory_that_does_not_fit_is_refused(out, message):
    x, shape, geometry = next(_gradient_calls())
    gy = conv.conv2d(x, np.ones(shape, np.float32), *geometry)
    variants = conv.conv2d_grad_w.rungs("cpu")
    del variants["reference"]  # it writes to any memory of that shape
    able = [v for v in variants.values() if v.supports(gy, x, shape, *geometry, out=out)]
    assert {v.name for v in able} >= {"loops", "blocked", "direct", "few_channels", "winograd2", "winograd4"}
    for variant in able:
        with pytest.raises(ValueError, match=message):
            variant.body(gy, x, shape, *geometry, out=out)


def test_memory_of_another_type_is_left_to_the_reference():
    x, shape, geometry = next(_gradient_calls())
    gy, out = conv.conv2d(x, np.ones(shape, np.float32), *geometry), np.full(shape, np.nan)
    assert conv.conv2d_grad_w(gy, x, shape, *geometry, out=out) is out
    np.testing.assert_allclose(out, conv.conv2d_grad_w(gy, x, shape, *geometry), rtol=1e-3, atol=1e-3)


def test_tuned_measures_a_gradient_once_wherever_it_is_written():
    x, shape, geometry = next(_gradient_calls())
    gy = conv.conv2d(x, np.ones(shape, np.float32), *geometry)
    keys = {
        tuned._key(conv.conv2d_grad_w, (gy, x, shape, *geometry), more)
        for more in ({}, {"out": None}, {"out": np.zeros(shape, np.float32)})
    }
    assert len(keys) == 1


# ------------------------------------------------------------------ memory that begins anywhere


def _unaligned(x):
    """A copy that begins at an odd address."""
    memory_of_it = np.empty(x.nbytes + 1, np.uint8)[1:]
    y = memory_of_it.view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def test_unaligned_arrays():
    ran = set()
    for x, shape, geometry in _gradient_calls():
        w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        gy = conv.conv2d(x, w, *geometry)
        calls = {"conv2d": (x, w), "conv2d_grad_x": (gy, w, x.shape), "conv2d_grad_w": (gy, x, shape)}
        for name, args in calls.items():
            odd = [_unaligned(a) if isinstance(a, np.ndarray) else a for a in args]
            assert not odd[0].flags.aligned
            variants = dispatch.primitives[name].rungs("cpu")
            expected = variants["reference"].body(*args, *geometry)
            for variant in variants.values():
                if variant.supports(*odd, *geometry):
                    y = variant.body(*odd, *geometry)
                    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3, err_msg=f"{name}:{variant.name}")
                    ran.add((name, variant.name))
    assert ran == {(name, v) for name in CONVOLUTIONS for v in dispatch.primitives[name].rungs("cpu") if v != "fp32"}
