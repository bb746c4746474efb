"""Triton kernels of what surrounds a Mamba scan: elementwise but for the convolution's few taps.

A program has ROWS channels of one sequence and TOKENS tokens. Tensors are (batch, D, L) with
rows of contiguous tokens and channels; x and z may be halves of a wider tensor: their `stride`
leads from one image to the next.
"""

import triton
import triton.language as tl

SIZES = ["channels", "stride", "z_stride"]


@triton.jit
def _place(channels, length, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """This program's channels and tokens, and which of them are there."""
    channel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (channel < channels)[:, None] & (token < length)[None, :]
    return channel, token, inside


@triton.jit
def _sigmoid(x):
    z = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1 + z)


@triton.jit
def _take(x, rows, token, length, valid, FLIP: tl.constexpr):
    """x[row, token] as float32, counted from the last token if FLIP; 0 outside of the sequence."""
    at = token
    if FLIP:
        at = length - 1 - token
    inside = valid[:, None] & ((token >= 0) & (token < length))[None, :]
    return tl.load(x + rows[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _silu_slope(x, sigmoid):
    """d SiLU(x)."""
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def _convolved(
    x, weight, bias, rows, channel, token, length, valid, WIDTH: tl.constexpr, FLIP: tl.constexpr
):
    """bias + Σ_k weight[k] · x[token - WIDTH + 1 + k] (ROWS, TOKENS)."""
    b = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    total = b[:, None] + tl.zeros([channel.shape[0], token.shape[0]], tl.float32)
    for k in tl.static_range(WIDTH):
        w = tl.load(weight + channel * WIDTH + k, mask=valid, other=0.0).to(tl.float32)
        total += w[:, None] * _take(x, rows, token - (WIDTH - 1 - k), length, valid, FLIP)
    return total


@triton.jit(do_not_specialize=SIZES)
def _conv_kernel(
    x,
    weight,
    bias,
    y,
    length,
    channels,
    stride,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """y = SiLU of the convolution."""
    channel, token, inside = _place(channels, length, ROWS, TOKENS)
    image = tl.program_id(2).to(tl.int64)
    rows = image * stride + channel.to(tl.int64) * length
    valid = channel < channels
    out = _convolved(x, weight, bias, rows, channel, token, length, valid, WIDTH, FLIP)
    out *= _sigmoid(out)
    at = ((image * channels + channel) * length)[:, None] + token[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _conv_gradient_kernel(
    grad_y,
    x,
    weight,
    bias,
    gradient,
    parts,
    length,
    channels,
    stride,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradient of what SiLU was taken of, and of weight and bias.

    gradient (batch, D, L) in the order of y; parts (batch, token blocks, D · WIDTH + D).
    """
    channel, token, inside = _place(channels, length, ROWS, TOKENS)
    image = tl.program_id(2).to(tl.int64)
    rows = image * stride + channel.to(tl.int64) * length
    valid = channel < channels
    own_rows = (image * channels + channel) * length
    before = _convolved(x, weight, bias, rows, channel, token, length, valid, WIDTH, FLIP)
    out = _take(grad_y, own_rows, token, length, valid, False)
    out *= _silu_slope(before, _sigmoid(before))
    at = own_rows[:, None] + token[None, :]
    tl.store(gradient + at, out.to(gradient.dtype.element_ty), mask=inside)
    parts += (image * tl.num_programs(0) + tl.program_id(0)) * channels * (WIDTH + 1)
    tl.store(parts + channels * WIDTH + channel, tl.sum(out, 1), mask=valid)
    for k in tl.static_range(WIDTH):
        tap = _take(x, rows, token - (WIDTH - 1 - k), length, valid, FLIP)
        tl.store(parts + channel * WIDTH + k, tl.sum(out * tap, 1), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _conv_input_gradient_kernel(
    gradient,
    weight,
    grad_x,
    length,
    channels,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """grad_x, in the order of x: a token met the WIDTH outputs from its own on."""
    channel, token, inside = _place(channels, length, ROWS, TOKENS)
    valid = channel < channels
    rows = (tl.program_id(2).to(tl.int64) * channels + channel) * length
    out = tl.zeros([ROWS, TOKENS], tl.float32)
    for ahead in tl.static_range(WIDTH):
        w = tl.load(weight + channel * WIDTH + WIDTH - 1 - ahead, mask=valid, other=0.0)
        after = _take(gradient, rows, token + ahead, length, valid, False)
        out += w.to(tl.float32)[:, None] * after
    at = token
    if FLIP:
        at = length - 1 - token
    tl.store(grad_x + rows[:, None] + at[None, :], out.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _gate_tile(z, z_stride, channels, length, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Of a program: where its rows begin, its tokens, which of both are there, and its z."""
    channel, token, inside = _place(channels, length, ROWS, TOKENS)
    image = tl.program_id(2).to(tl.int64)
    valid = channel < channels
    z_rows = image * z_stride + channel.to(tl.int64) * length
    gate = _take(z, z_rows, token, length, valid, False)
    return (image * channels + channel) * length, token, inside, valid, gate


@triton.jit
def _mean(y, flipped, rows, token, length, valid):
    value = _take(y, rows, token, length, valid, False)
    if flipped is not None:
        value = 0.5 * (value + _take(flipped, rows, token, length, valid, True))
    return value


@triton.jit(do_not_specialize=SIZES)
def _gate_kernel(
    y,
    flipped,
    z,
    out,
    length,
    channels,
    z_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out = y · SiLU(z), or the mean of both passes."""
    rows, token, inside, valid, gate = _gate_tile(z, z_stride, channels, length, ROWS, TOKENS)
    value = _mean(y, flipped, rows, token, length, valid) * gate * _sigmoid(gate)
    tl.store(out + rows[:, None] + token[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _gate_gradient_kernel(
    grad_out,
    y,
    flipped,
    z,
    grad_y,
    grad_flipped,
    grad_z,
    length,
    channels,
    z_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradients of y, flipped (in its own order) and z."""
    rows, token, inside, valid, gate = _gate_tile(z, z_stride, channels, length, ROWS, TOKENS)
    gradient = _take(grad_out, rows, token, length, valid, False)
    sigmoid = _sigmoid(gate)
    value = _mean(y, flipped, rows, token, length, valid)
    for_z = gradient * value * _silu_slope(gate, sigmoid)
    at = rows[:, None] + token[None, :]
    tl.store(grad_z + at, for_z.to(grad_z.dtype.element_ty), mask=inside)
    for_y = gradient * gate * sigmoid
    if flipped is not None:
        for_y *= 0.5
        back = rows[:, None] + (length - 1 - token)[None, :]
        tl.store(grad_flipped + back, for_y.to(grad_flipped.dtype.element_ty), mask=inside)
    tl.store(grad_y + at, for_y.to(grad_y.dtype.element_ty), mask=inside)
