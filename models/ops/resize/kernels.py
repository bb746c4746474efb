"""Triton kernel of a bilinear resize.

A program has PIXELS pixels of PLANES resized maps: where they come from is found once for all.
"""

import triton
import triton.language as tl

from models.ops.plane_kernels import own_share, take

SIZES = ["planes", "height", "width", "new_width", "length"]


@triton.jit
def _source(index, scale, size):
    """The two inputs along a side that an output lies between, and the share of the second."""
    at = tl.maximum((index + 0.5) * scale - 0.5, 0.0)  # in float32, as PyTorch
    low = tl.minimum(at.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), at - low


@triton.jit(do_not_specialize=SIZES)
def _resize_kernel(
    x,
    y,
    planes,
    height,
    width,
    new_width,
    length,
    row_scale,
    column_scale,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y (planes, length) in rows of new_width from x (planes, height, width)."""
    pixel, first = own_share(length, PLANES, PIXELS)
    inside = pixel < length
    top, bottom, down = _source(pixel // new_width, row_scale, height)
    left, right, across = _source(pixel % new_width, column_scale, width)
    for plane in range(first, tl.minimum(first + PLANES, planes)):
        source = x + tl.cast(plane, tl.int64) * height * width
        upper = (1 - across) * take(source, top * width + left, inside)
        upper += across * take(source, top * width + right, inside)
        lower = (1 - across) * take(source, bottom * width + left, inside)
        lower += across * take(source, bottom * width + right, inside)
        value = (1 - down) * upper + down * lower
        at = tl.cast(plane, tl.int64) * length + pixel
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
