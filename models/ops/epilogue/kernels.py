"""Triton kernels of what follows a convolution: each reads its maps once and writes one.

A program has ROWS channels and PIXELS pixels of an image at a time. Maps are (batch, C, length)
with rows of contiguous pixels and channels; x, residual and grad_y may be slices of wider maps:
their stride leads from one image to the next. The length and the strides count VECTORs of values:
so the compiler knows that it may load whole ones, and still one kernel serves all sizes.
"""

import triton
import triton.language as tl

SIZES = ["channels", "length", "x_stride"]


@triton.jit
def _place(block, channels, pixels, ROWS: tl.constexpr, PIXELS: tl.constexpr):
    """The channels and pixels of a tile, and which of both are there."""
    channel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    return channel, pixel, (channel < channels)[:, None] & (pixel < pixels)[None, :]


@triton.jit
def _take(x, first, channel, pixel, pixels, inside):
    """Of the image that begins at `first`, a tile as float32; 0 where nothing is."""
    at = (first + channel.to(tl.int64) * pixels)[:, None] + pixel[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(y, value, image, channel, pixel, channels, pixels, inside):
    """Store a tile of a dense map."""
    at = ((image * channels + channel) * pixels)[:, None] + pixel[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _biased(x, bias, first, channel, pixel, channels, pixels, inside):
    """x + bias."""
    value = _take(x, first, channel, pixel, pixels, inside)
    if bias is not None:
        b = tl.load(bias + channel, mask=channel < channels, other=0.0)
        value += b.to(tl.float32)[:, None]
    return value


@triton.jit
def _normal_share(x):
    """The share of a normal distribution that lies below x."""
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x *= _normal_share(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # not a maximum, which would hide NaN
    elif ACTIVATION == "silu":
        x /= 1 + tl.exp(-x)
    return x


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """d activation(x)."""
    if ACTIVATION == "gelu":
        slope = _normal_share(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "relu":
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        sigmoid = 1 / (1 + tl.exp(-x))
        slope = sigmoid * (1 + x * (1 - sigmoid))
    return slope


@triton.jit(do_not_specialize=[*SIZES, "residual_stride"])
def _epilogue_kernel(
    x,
    bias,
    factor,
    residual,
    y,
    channels,
    length,
    x_stride,
    residual_stride,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y = residual + factor · activation(x + bias)."""
    pixels = length * VECTOR
    channel, pixel, inside = _place(tl.program_id(0), channels, pixels, ROWS, PIXELS)
    image = tl.program_id(2).to(tl.int64)
    first = image * x_stride * VECTOR
    value = _biased(x, bias, first, channel, pixel, channels, pixels, inside)
    value = _activated(value, ACTIVATION)
    if factor is not None:
        value *= tl.load(factor + image).to(tl.float32)
    if residual is not None:
        first = image * residual_stride * VECTOR
        value += _take(residual, first, channel, pixel, pixels, inside)
    _put(y, value, image, channel, pixel, channels, pixels, inside)


@triton.jit(do_not_specialize=[*SIZES, "grad_stride", "tiles", "rounds"])
def _epilogue_gradient_kernel(
    grad_y,
    x,
    bias,
    factor,
    grad_x,
    parts,
    channels,
    length,
    grad_stride,
    x_stride,
    tiles,
    rounds,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """grad_x of `rounds` tiles of the batch, and their parts (programs, C) of the bias's gradient.

    Either may be absent; x and bias are not read without an activation.
    """
    pixels = length * VECTOR
    blocks = tl.cdiv(pixels, PIXELS)
    begin = tl.program_id(0) * rounds
    total = tl.zeros([ROWS, PIXELS], tl.float32)
    for tile in range(begin, tl.minimum(begin + rounds, tiles)):
        channel, pixel, inside = _place(tile % blocks, channels, pixels, ROWS, PIXELS)
        image = (tile // blocks).to(tl.int64)
        first = image * grad_stride * VECTOR
        gradient = _take(grad_y, first, channel, pixel, pixels, inside)
        if factor is not None:
            gradient *= tl.load(factor + image).to(tl.float32)
        if ACTIVATION is not None:
            first = image * x_stride * VECTOR
            value = _biased(x, bias, first, channel, pixel, channels, pixels, inside)
            gradient *= _slope(value, ACTIVATION)
        if grad_x is not None:
            _put(grad_x, gradient, image, channel, pixel, channels, pixels, inside)
        if parts is not None:
            total += gradient
    if parts is not None:
        channel, _, _ = _place(0, channels, pixels, ROWS, PIXELS)
        at = tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(parts + at, tl.sum(total, 1), mask=channel < channels)
