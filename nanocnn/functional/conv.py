"""Convolution: the calculus; how fast it goes is a matter of kernels/conv2d.py."""

from __future__ import annotations

from typing import Any

from ..kernels import conv2d as kernels
from ..kernels.elementwise import add_bias, bias_grad
from ..kernels.im2col import output_shape
from ..tensor import Op, Tensor
from .basic import need_floats
from .fuse import back_through_epilogue, check_residual, fuse, one_by_one
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
        gw = kernels.conv2d_grad_w(gy, x, w.shape, *self.geometry, out=self.out_for(1)) if self.needs[1] else None
        gb = bias_grad(gy) if len(self.needs) == 3 and self.needs[2] else None
        return (gx, gw, gb)[: len(self.needs)]


class FusedConv2d(Op):
    """relu?(convolution + bias + residual), finished before it is stored.

    Backward, the gradient behind the ReLU is that of the convolution and of the residual, its sum that of the bias.
    """

    def forward(self, x, w, *more, names, relu, stride, padding, dilation, groups):
        self.geometry, self.names = (stride, padding, dilation, groups), names
        y = kernels.conv2d(x, w, *self.geometry, **dict(zip(names, more, strict=True)), relu=relu)
        self.save(x, w, y if relu else None)
        return y

    def backward(self, gy):
        x, w, y = self.saved
        gy, gb = back_through_epilogue(gy, y, "bias" in self.names)
        gx = None
        if self.needs[0]:
            gx = kernels.conv2d_grad_x(gy, w, x.shape, *self.geometry, residual=self.take_arrived(0))
        gw = kernels.conv2d_grad_w(gy, x, w.shape, *self.geometry, out=self.out_for(1)) if self.needs[1] else None
        return gx, gw, *(gb if name == "bias" else gy for name in self.names)


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """(N, H, W, C), (KH, KW, C/groups, O), (O,) -> (N, OH, OW, O): convolution, plus bias, plus `residual`; then ReLU.

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
    geometry: dict[str, Any] = dict(
        stride=pair("stride", stride, 1), padding=pair("padding", padding, 0), dilation=pair("dilation", dilation, 1)
    )
    check_residual("conv2d", (*output_shape(x.shape, w.shape[:2], **geometry), w.shape[3]), x.dtype, residual)
    if fuse.value == "on":
        more = {name: t for name, t in (("bias", b), ("residual", residual)) if t is not None}
        return FusedConv2d.apply(x, w, *more.values(), names=tuple(more), relu=relu, **geometry, groups=groups)
    y = Conv2d.apply(*((x, w) if b is None else (x, w, b)), **geometry, groups=groups)
    return one_by_one(y, residual, relu)
