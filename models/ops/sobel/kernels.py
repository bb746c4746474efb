"""Triton kernels of the Sobel gradients and of their own gradient: one pass each.

A program has PIXELS pixels of PLANES maps: where their neighbours lie is found once for all.
"""

import triton
import triton.language as tl

from models.ops.plane_kernels import own_share, take

SIZES = ["planes", "height", "width"]


@triton.jit
def _put(y, at, value, inside):
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _sobel_kernel(
    x, gradient_x, gradient_y, planes, height, width, PLANES: tl.constexpr, PIXELS: tl.constexpr
):
    """Both gradients (planes, height, width) of x, whose border is repeated outward."""
    pixel, first = own_share(height * width, PLANES, PIXELS)
    inside = pixel < height * width
    row, column = pixel // width, pixel % width
    above, below = tl.maximum(row - 1, 0) * width, tl.minimum(row + 1, height - 1) * width
    left, right = tl.maximum(column - 1, 0), tl.minimum(column + 1, width - 1)
    row *= width
    for plane in range(first, tl.minimum(first + PLANES, planes)):
        start = tl.cast(plane, tl.int64) * height * width
        source = x + start
        upper_left = take(source, above + left, inside)
        upper_right = take(source, above + right, inside)
        lower_left = take(source, below + left, inside)
        lower_right = take(source, below + right, inside)
        middle = take(source, row + right, inside) - take(source, row + left, inside)
        vertical = take(source, below + column, inside) - take(source, above + column, inside)
        across = (upper_right - upper_left) + 2 * middle + (lower_right - lower_left)
        along = (lower_left - upper_left) + 2 * vertical + (lower_right - upper_right)
        _put(gradient_x, start + pixel, across, inside)
        _put(gradient_y, start + pixel, along, inside)


@triton.jit
def _weights(index, size):
    """How much a pixel along a side counts in the sum (1 2 1) and in the difference (-1 0 1) of the
    one before it, of its own and of the one after it.

    At a border it also stands for its copy outside.
    """
    has_before = (index > 0).to(tl.float32)
    has_after = (index < size - 1).to(tl.float32)
    own_sum = 4 - has_before - has_after
    own_difference = has_before - has_after
    return has_before, has_after, own_sum, own_difference


@triton.jit(do_not_specialize=SIZES)
def _sobel_gradient_kernel(
    grad_gradient_x,
    grad_gradient_y,
    grad_x,
    planes,
    height,
    width,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """grad_x (planes, height, width) from those of both gradients."""
    pixel, first = own_share(height * width, PLANES, PIXELS)
    inside = pixel < height * width
    row, column = pixel // width, pixel % width
    row_before, row_after, row_sum, row_difference = _weights(row, height)
    before, after, column_sum, column_difference = _weights(column, width)
    for plane in range(first, tl.minimum(first + PLANES, planes)):
        start = tl.cast(plane, tl.int64) * height * width
        total = tl.zeros([PIXELS], tl.float32)
        for down in tl.static_range(-1, 2):
            has_row, row_weight, row_slope = inside, row_sum, row_difference
            if down < 0:
                has_row, row_weight, row_slope = inside & (row > 0), row_before, row_before
            if down > 0:
                has_row = inside & (row < height - 1)
                row_weight, row_slope = row_after, -row_after
            for across in tl.static_range(-1, 2):
                has, weight, slope = has_row, column_sum, column_difference
                if across < 0:
                    has, weight, slope = has_row & (column > 0), before, before
                if across > 0:
                    has, weight, slope = has_row & (column < width - 1), after, -after
                at = start + pixel + down * width + across
                total += row_weight * slope * take(grad_gradient_x, at, has)
                total += row_slope * weight * take(grad_gradient_y, at, has)
        _put(grad_x, start + pixel, total, inside)
