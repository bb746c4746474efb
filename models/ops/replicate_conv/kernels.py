"""Triton kernels of a 3x3 convolution to few channels, with repeated borders.

Products of matrices whose long side are the pixels of a tile: for each tap (its offsets down and
across) of the nine, weights (channels out, channels in) times the map, read where the tap looks.
x (B, C, H · W); weight (9, O, C); y (B, O, H · W). `first` of a tile are its PIXELS pixels in
raster order.
"""

import triton
import triton.language as tl

SIZES = ["height", "width", "in_channels", "out_channels", "tiles", "rounds", "batch"]


@triton.jit
def _pixels_of(tile, height, width, PIXELS: tl.constexpr):
    """Of a tile, its pixels, their rows and columns, and which of them are there."""
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    row = pixel // width
    return pixel, row, pixel - row * width, pixel < height * width


@triton.jit
def _looked_at(row, column, height, width, down, across):
    """The pixel that a tap reads: the border's own where it looks past it."""
    at_row = tl.minimum(tl.maximum(row + down, 0), height - 1)
    return at_row * width + tl.minimum(tl.maximum(column + across, 0), width - 1)


@triton.jit
def _read(x, channel, channels, at, inside, plane):
    """x[channel, at] as float32 (channels, pixels); 0 where there is none."""
    mask = (channel < channels)[:, None] & inside[None, :]
    rows = channel[:, None].to(tl.int64) * plane
    return tl.load(x + rows + at[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(weight, TAP: tl.constexpr, out, channel, out_channels, in_channels):
    """weight[TAP, out, channel], `out` and `channel` as they lie in the result."""
    mask = (out < out_channels) & (channel < in_channels)
    at = (TAP * out_channels + out) * in_channels + channel
    return tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    x,
    weight,
    bias,
    y,
    height,
    width,
    in_channels,
    out_channels,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of a tile: IN channels of x at a time, all of y."""
    pixel, row, column, inside = _pixels_of(tl.program_id(0), height, width, PIXELS)
    image = tl.program_id(1).to(tl.int64)
    plane = height * width
    out = tl.arange(0, OUT)
    total = tl.zeros([OUT, PIXELS], tl.float32)
    for first in range(0, in_channels, IN):
        channel = first + tl.arange(0, IN)
        for tap in tl.static_range(9):
            at = _looked_at(row, column, height, width, tap // 3 - 1, tap % 3 - 1)
            v = _read(x + image * in_channels * plane, channel, in_channels, at, inside, plane)
            w = _weights(weight, tap, out[:, None], channel[None, :], out_channels, in_channels)
            total = tl.dot(w, v, total, input_precision=PRECISION)
    is_out = out < out_channels
    if bias is not None:
        total += tl.load(bias + out, mask=is_out, other=0.0).to(tl.float32)[:, None]
    at = (image * out_channels + out[:, None]) * plane + pixel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=is_out[:, None] & inside[None, :])


@triton.jit
def _that_looked(
    grad_y, out, channels, row, column, inside, height, width, DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """The gradient of all outputs whose tap read this pixel.

    That is the one output from which the tap leads here and, where it leads past the border, the
    border's own.
    """
    plane = height * width
    from_row, from_column = row - DOWN, column - ACROSS
    has_row = inside & (from_row >= 0) & (from_row < height)
    has_column = (from_column >= 0) & (from_column < width)
    at = from_row * width + from_column
    total = _read(grad_y, out, channels, at, has_row & has_column, plane)
    on_row, on_column = row, column
    if DOWN != 0:
        on_row = tl.where(row == (height - 1 if DOWN > 0 else 0), row, -1)
        at = row * width + from_column
        total += _read(grad_y, out, channels, at, inside & (on_row >= 0) & has_column, plane)
    if ACROSS != 0:
        on_column = tl.where(column == (width - 1 if ACROSS > 0 else 0), column, -1)
        at = from_row * width + column
        total += _read(grad_y, out, channels, at, has_row & (on_column >= 0), plane)
        if DOWN != 0:
            at = row * width + column
            is_corner = inside & (on_row >= 0) & (on_column >= 0)
            total += _read(grad_y, out, channels, at, is_corner, plane)
    return total


@triton.jit(do_not_specialize=SIZES)
def _input_gradient_kernel(
    grad_y,
    weight,
    grad_x,
    height,
    width,
    in_channels,
    out_channels,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_x of a tile and IN channels."""
    pixel, row, column, inside = _pixels_of(tl.program_id(0), height, width, PIXELS)
    channel = tl.program_id(1) * IN + tl.arange(0, IN)
    image = tl.program_id(2).to(tl.int64)
    plane = height * width
    out = tl.arange(0, OUT)
    total = tl.zeros([IN, PIXELS], tl.float32)
    for tap in tl.static_range(9):
        g = _that_looked(
            grad_y + image * out_channels * plane,
            out,
            out_channels,
            row,
            column,
            inside,
            height,
            width,
            tap // 3 - 1,
            tap % 3 - 1,
        )
        w = _weights(weight, tap, out[None, :], channel[:, None], out_channels, in_channels)
        total = tl.dot(w, g, total, input_precision=PRECISION)
    at = (image * in_channels + channel[:, None]) * plane + pixel[None, :]
    mask = (channel < in_channels)[:, None] & inside[None, :]
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _add_product(
    total, g, x, channel, channels, row, column, inside, height, width, down, across,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + g · what a tap reads of x."""
    at = _looked_at(row, column, height, width, down, across)
    v = _read(x, channel, channels, at, inside, height * width)
    return tl.dot(g, tl.trans(v), total, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _weight_gradient_kernel(
    grad_y,
    x,
    parts,
    height,
    width,
    in_channels,
    out_channels,
    batch,
    tiles,
    rounds,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """parts (splits, 9, O, C): of the three taps of a row, over `rounds` tiles."""
    split = tl.program_id(0)
    channel = tl.program_id(1) * IN + tl.arange(0, IN)
    down = tl.program_id(2) - 1
    plane = height * width
    out = tl.arange(0, OUT)
    left = tl.zeros([OUT, IN], tl.float32)
    centre = tl.zeros([OUT, IN], tl.float32)
    right = tl.zeros([OUT, IN], tl.float32)
    for step in range(rounds):
        index = split * rounds + step
        image = (index // tiles).to(tl.int64)
        pixel, row, column, inside = _pixels_of(index % tiles, height, width, PIXELS)
        inside &= image < batch
        of_x = x + image * in_channels * plane
        g = _read(grad_y + image * out_channels * plane, out, out_channels, pixel, inside, plane)
        left = _add_product(
            left, g, of_x, channel, in_channels, row, column, inside, height, width, down, -1,
            PRECISION,
        )  # fmt: skip
        centre = _add_product(
            centre, g, of_x, channel, in_channels, row, column, inside, height, width, down, 0,
            PRECISION,
        )  # fmt: skip
        right = _add_product(
            right, g, of_x, channel, in_channels, row, column, inside, height, width, down, 1,
            PRECISION,
        )  # fmt: skip
    tap = split.to(tl.int64) * 9 + 3 * tl.program_id(2)
    at = (tap * out_channels + out[:, None]) * in_channels + channel[None, :]
    mask = (out < out_channels)[:, None] & (channel < in_channels)[None, :]
    tl.store(parts + at, left, mask=mask)
    tl.store(parts + at + out_channels * in_channels, centre, mask=mask)
    tl.store(parts + at + 2 * out_channels * in_channels, right, mask=mask)
