"""Triton kernels of replicate padding and its gradient.

A program has PIXELS pixels of PLANES maps: where they come from is found once for all.
"""

import triton
import triton.language as tl

from models.ops.plane_kernels import own_share, take

SIZES = ["planes", "height", "width", "padded_width", "length"]


@triton.jit(do_not_specialize=[*SIZES, "left", "top"])
def _pad_kernel(
    x,
    y,
    planes,
    height,
    width,
    padded_width,
    length,
    left,
    top,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y (planes, length) in rows of padded_width from x (planes, height, width)."""
    pixel, first = own_share(length, PLANES, PIXELS)
    inside = pixel < length
    row = tl.minimum(tl.maximum(pixel // padded_width - top, 0), height - 1)
    column = tl.minimum(tl.maximum(pixel % padded_width - left, 0), width - 1)
    source = row * width + column
    for plane in range(first, tl.minimum(first + PLANES, planes)):
        value = tl.load(x + tl.cast(plane, tl.int64) * height * width + source, mask=inside)
        tl.store(y + tl.cast(plane, tl.int64) * length + pixel, value, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _pad_gradient_kernel(
    grad_y,
    grad_x,
    planes,
    height,
    width,
    padded_width,
    length,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """grad_x (planes, height, width): a pixel's own gradient and its copies' past the border."""
    pixel, first = own_share(height * width, PLANES, PIXELS)
    inside = pixel < height * width
    row, column = pixel // width, pixel % width
    own = (row + TOP) * padded_width + column + LEFT
    for plane in range(first, tl.minimum(first + PLANES, planes)):
        source = grad_y + tl.cast(plane, tl.int64) * length
        total = tl.zeros([PIXELS], tl.float32)
        for down in tl.static_range(-TOP, BOTTOM + 1):
            for across in tl.static_range(-LEFT, RIGHT + 1):
                is_copy = inside
                if down < 0:
                    is_copy = is_copy & (row == 0)
                if down > 0:
                    is_copy = is_copy & (row == height - 1)
                if across < 0:
                    is_copy = is_copy & (column == 0)
                if across > 0:
                    is_copy = is_copy & (column == width - 1)
                at = own + down * padded_width + across
                total += take(source, at, is_copy)
        target = grad_x + tl.cast(plane, tl.int64) * height * width + pixel
        tl.store(target, total.to(grad_x.dtype.element_ty), mask=inside)
