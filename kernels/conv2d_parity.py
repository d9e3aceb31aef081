"""3x3 kernels at stride 2, by parity: even and odd pixels each by their own taps, and those by Winograd's engine.

Along one axis the even pixels meet two taps, a convolution of stride 1, and the odd ones one; winograd.py says what
that makes of the matrices. In memory traffic it is Winograd's; arithmetic falls from 9 to 5.06 multiplications an
output. The gradient of the image reads the same matrices from the other side: pixels x[2 i + padding - k] meet tap k of
gy[i], so that an even pixel has one tap and an odd one two, or, for an even padding, the other way round.
"""

from __future__ import annotations

from .conv2d import conv2d, conv2d_grad_w, conv2d_grad_x
from .conv2d_winograd import forward, is_3x3, pays, run
from .conv2d_winograd_grad_w import run_grad_w
from .dispatch import plain_floats
from .im2col import output_shape
from .memory import contiguous, empty
from .pack import swap_channels
from .winograd import S4, S4X, S4XEven

TWO = (2, 2)  # stride
ENOUGH = 32  # tiles; measured with one image


def _able(x, w, *geometry, **epilogue):
    return is_3x3(TWO, w.shape[:2], *geometry) and plain_floats(x, w, **epilogue)


def _forward_pays(x, w, stride, padding, dilation, groups, **epilogue):
    images, *size = output_shape(x.shape, w.shape[:2], stride, padding, dilation)
    return pays(ENOUGH, images, size, w.shape[2])


@conv2d.variant("parity", supports=_able, auto=_forward_pays)
def conv2d_parity(x, w, stride, padding, dilation, groups, **epilogue):
    """stride 2: 5.06 multiplications an output instead of 9"""
    return forward(S4(), x, w, stride, padding, epilogue)


def _able_grad_x(gy, w, x_shape, stride, padding, *geometry, **residual):
    alike = padding[0] % 2 == padding[1] % 2  # one algorithm for both axes
    return alike and is_3x3(TWO, w.shape[:2], stride, padding, *geometry) and plain_floats(gy, w, **residual)


def _grad_x_pays(gy, *rest, **residual):
    return pays(ENOUGH, gy.shape[0], gy.shape[1:3], gy.shape[3])


@conv2d_grad_x.variant("parity", supports=_able_grad_x, auto=_grad_x_pays)
def conv2d_grad_x_parity(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """stride 2: the image's even and odd pixels are convolutions of gy with one and with two taps"""
    odd = padding[0] % 2 == 1
    first = tuple((p - 1) // 2 if odd else p // 2 - 1 for p in padding)
    algorithm = S4X() if odd else S4XEven()
    return run(algorithm, contiguous(gy), swap_channels(w), empty(x_shape, gy.dtype), first, residual=residual)


def _able_grad_w(gy, x, w_shape, *geometry, **out):
    return is_3x3(TWO, w_shape[:2], *geometry) and plain_floats(gy, x, **out)


def _grad_w_pays(gy, x, *rest, **out):
    return pays(ENOUGH, gy.shape[0], gy.shape[1:3], x.shape[3])


@conv2d_grad_w.variant("parity", supports=_able_grad_w, auto=_grad_w_pays)
def conv2d_grad_w_parity(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """stride 2, read backwards"""
    return run_grad_w(S4(), gy, x, w_shape, padding, out)
