"""Convolution: the calculus; how fast it goes is a matter of kernels/conv2d.py."""

from __future__ import annotations

from ..kernels import conv2d as kernels
from ..kernels.elementwise import add_bias, bias_grad
from ..tensor import Op, Tensor
from .basic import need_floats
from .geometry import Pair, pair


class Conv2d(Op):
    def forward(self, x, w, b=None, *, stride, padding, dilation, groups):
        self.save(x, w)
        self.geometry = stride, padding, dilation, groups
        y = kernels.conv2d(x, w, *self.geometry)
        if b is not None:
            add_bias(y, b)
        return y

    def backward(self, gy):
        x, w = self.saved
        gx = kernels.conv2d_grad_x(gy, w, x.shape, *self.geometry) if self.needs[0] else None
        gw = kernels.conv2d_grad_w(gy, x, w.shape, *self.geometry) if self.needs[1] else None
        gb = bias_grad(gy) if len(self.needs) == 3 and self.needs[2] else None
        return (gx, gw, gb)[: len(self.needs)]


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """(N, H, W, C), (KH, KW, C/groups, O), (O,) -> (N, OH, OW, O).

    OH = (H + 2 padding - dilation (KH - 1) - 1) // stride + 1, and OW likewise. Raises ValueError on shapes that do not
    fit, TypeError on dtypes that differ or are no floats.
    """
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(
            f"conv2d of shapes {x.shape} and {w.shape}: expected x (N, H, W, C) and w (KH, KW, C/groups, O)"
        )
    if groups < 1 or x.shape[3] != w.shape[2] * groups or w.shape[3] % groups:
        raise ValueError(
            f"conv2d of {x.shape} with weights {w.shape} in {groups} groups: expected {w.shape[2]} x {groups} input "
            f"channels, and output channels that {groups} divides (images are NHWC, weights KH, KW, C/groups, O)"
        )
    if b is not None and b.shape != w.shape[3:]:
        raise ValueError(
            f"conv2d with {w.shape[3]} output channels: expected a bias of shape {w.shape[3:]}, got {b.shape}"
        )
    need_floats("conv2d", x)
    if x.dtype != w.dtype:
        raise TypeError(f"conv2d of {x.dtype} images with {w.dtype} weights: give both one dtype (functional.cast)")
    geometry = dict(
        stride=pair("stride", stride, 1), padding=pair("padding", padding, 0), dilation=pair("dilation", dilation, 1)
    )
    return Conv2d.apply(*((x, w) if b is None else (x, w, b)), **geometry, groups=groups)
