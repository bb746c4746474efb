"""Triton kernels of layer and RMS normalisation over channels that stay first in memory.

A program holds all channels of PIXELS pixels; x, y (B, C, length), mean and rstd (B, length).
"""

import triton
import triton.language as tl

SIZES = ["channels", "rounds"]


@triton.jit
def _tile(block, image, channels, length, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Offsets of a tile (CHANNELS, PIXELS) and which of them lie inside; its pixels likewise."""
    channel = tl.arange(0, CHANNELS)[:, None]
    pixel = block * PIXELS + tl.arange(0, PIXELS)
    at = (image * channels + channel).to(tl.int64) * length + pixel[None, :]
    is_pixel = pixel < length
    return at, (channel < channels) & is_pixel[None, :], image * length + pixel, is_pixel


@triton.jit(do_not_specialize=SIZES)
def _norm_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    length,
    channels,
    eps,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """y, and for the gradient the mean and 1 / sqrt(variance + eps) of each pixel."""
    block, image = tl.program_id(0), tl.program_id(1)
    at, inside, pixel, is_pixel = _tile(block, image, channels, length, CHANNELS, PIXELS)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < channels
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    center = tl.zeros([PIXELS], tl.float32)
    if bias is not None:
        center = tl.sum(value, 0) / channels
        value = tl.where(is_channel[:, None], value - center[None, :], 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / channels + eps)
    w = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    out = value * scale[None, :] * w[:, None]
    if bias is not None:
        out += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + pixel, center, mask=is_pixel)
    tl.store(rstd + pixel, scale, mask=is_pixel)


@triton.jit(do_not_specialize=SIZES)
def _norm_gradient_kernel(
    grad_y,
    x,
    weight,
    mean,
    rstd,
    grad_x,
    parts,
    length,
    channels,
    rounds,
    CENTERED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """grad_x of `rounds` tiles, and parts (programs, 2, C) of the gradients of weight and bias."""
    first, image = tl.program_id(0) * rounds, tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < channels
    w = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    for_weight = tl.zeros([CHANNELS], tl.float32)
    for_bias = tl.zeros([CHANNELS], tl.float32)
    for index in range(rounds):
        at, inside, pixel, is_pixel = _tile(
            first + index, image, channels, length, CHANNELS, PIXELS
        )
        dy = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        center = tl.load(mean + pixel, mask=is_pixel, other=0.0)
        scale = tl.load(rstd + pixel, mask=is_pixel, other=0.0)
        value = tl.where(inside, (value - center[None, :]) * scale[None, :], 0.0)
        for_weight += tl.sum(dy * value, 1)
        for_bias += tl.sum(dy, 1)
        dy *= w[:, None]
        along = tl.sum(dy * value, 0) / channels
        for_x = dy - value * along[None, :]
        if CENTERED:
            for_x -= (tl.sum(dy, 0) / channels)[None, :]
        for_x *= scale[None, :]
        tl.store(grad_x + at, for_x.to(grad_x.dtype.element_ty), mask=inside)
    part = (image * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2 * channels
    tl.store(parts + part + channel, for_weight, mask=is_channel)
    tl.store(parts + part + channels + channel, for_bias, mask=is_channel)
