"""Triton kernels of depthwise convolution.

A program has one channel of one image. Each of its LANES goes down ROWS rows of two columns and
keeps what it loads: a value serves all taps of all its outputs. Lanes are counted along the first
strip of ROWS rows, then along the second: no width leaves many idle, and neighbours load
neighbours. All loads come before the first store, past which the compiler would not move them.
What a lane keeps is a tuple, row by row, which takes Triton 3.3.

Planes are contiguous; images may lie further apart than C planes: a `stride` leads from one to the
next. PAIR is the bytes of a lane's two columns, stored at once, or 0 where the width is odd.
"""

import triton
import triton.language as tl

SIZES = ["height", "width", "strips", "x_stride", "grad_stride", "rounds"]


@triton.jit
def _lanes(block, width, strips, ROWS: tl.constexpr, LANES: tl.constexpr):
    """First row and column of a block's lanes, and which of them are there."""
    lane = block * LANES + tl.arange(0, LANES)
    pairs = (width + 1) // 2
    strip = lane // pairs
    return strip * ROWS, (lane - strip * pairs) * 2, strip < strips


@triton.jit
def _reaches(first, size, inside, AHEAD: tl.constexpr):
    """Whether a lane that is inside has a row, or column, AHEAD of its first one."""
    if AHEAD < 0:
        inside = inside & (first >= -AHEAD)
    if AHEAD > 0:
        inside = inside & (first < size - AHEAD)
    return inside


@triton.jit
def _load(
    x,
    row,
    column,
    height,
    width,
    inside,
    ROWS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
):
    """All that a lane's outputs see: ROWS + KH - 1 rows of KW + 1 values, 0 outside of the map."""
    values = ()
    x += row * width + column
    for i in tl.static_range(ROWS + KH - 1):
        has_row = _reaches(row, height, inside, i - KH // 2)
        for j in tl.static_range(KW + 1):
            mask = _reaches(column, width, has_row, j - KW // 2)
            value = tl.load(x + (i - KH // 2) * width + (j - KW // 2), mask=mask, other=0.0)
            values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _store(y, values, row, column, height, width, inside, ROWS: tl.constexpr, PAIR: tl.constexpr):
    """ROWS rows of two values into a plane."""
    y += row * width + column
    for r in tl.static_range(ROWS):
        mask = _reaches(row, height, inside, r)
        left = values[2 * r].to(y.dtype.element_ty)
        right = values[2 * r + 1].to(y.dtype.element_ty)
        if PAIR > 0:
            both = (y + r * width)[:, None] + tl.arange(0, 2)[None, :]
            both = tl.multiple_of(both, [1, PAIR])
            tl.store(both, tl.join(left, right), mask=mask[:, None])
        else:
            tl.store(y + r * width, left, mask=mask)
            tl.store(y + r * width + 1, right, mask=_reaches(column, width, mask, 1))


@triton.jit
def _load_taps(weight, TAPS: tl.constexpr, FLIP: tl.constexpr):
    """A channel's filter, from its last tap to its first if FLIP."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + (TAPS - 1 - k if FLIP else k)).to(tl.float32),)
    return taps


@triton.jit
def _load_bias(bias, channel, LANES: tl.constexpr):
    start = tl.zeros([LANES], tl.float32)
    if bias is not None:
        start += tl.load(bias + channel).to(tl.float32)
    return start


@triton.jit
def _convolve(values, taps, start, ROWS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """start + Σ taps · values for each of a lane's outputs."""
    outputs = ()
    for r in tl.static_range(ROWS):
        for c in tl.static_range(2):
            total = start
            for i in tl.static_range(KH):
                for j in tl.static_range(KW):
                    total += taps[i * KW + j] * values[(r + i) * (KW + 1) + c + j]
            outputs = outputs + (total,)
    return outputs


@triton.jit
def _add_products(sums, gradients, values, ROWS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """sums + what a lane's gradients add for each tap and, last, for the bias."""
    added = ()
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            total = sums[i * KW + j]
            for r in tl.static_range(ROWS):
                for c in tl.static_range(2):
                    total += gradients[2 * r + c] * values[(r + i) * (KW + 1) + c + j]
            added = added + (total,)
    total = sums[KH * KW]
    for k in tl.static_range(2 * ROWS):
        total += gradients[k]
    return added + (total,)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=SIZES)
def _conv_kernel(
    x,
    weight,
    bias,
    y,
    height,
    width,
    strips,
    x_stride,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SILU: tl.constexpr,
    FLIP: tl.constexpr,
    PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """y = the convolution, or SiLU of it; with the filter turned about if FLIP."""
    channel, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, column, inside = _lanes(tl.program_id(0), width, strips, ROWS, LANES)
    x += image * x_stride + channel * height * width
    values = _load(x, row, column, height, width, inside, ROWS, KH, KW)
    taps = _load_taps(weight + channel * (KH * KW), KH * KW, FLIP)
    outputs = _convolve(values, taps, _load_bias(bias, channel, LANES), ROWS, KH, KW)
    if SILU:
        active = ()
        for k in tl.static_range(2 * ROWS):
            active = active + (outputs[k] * _sigmoid(outputs[k]),)
        outputs = active
    y += (image * tl.num_programs(1) + channel) * height * width
    _store(y, outputs, row, column, height, width, inside, ROWS, PAIR)


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    grad_y,
    x,
    weight,
    bias,
    grad_z,
    parts,
    height,
    width,
    strips,
    grad_stride,
    x_stride,
    rounds,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SILU: tl.constexpr,
    PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of `rounds` blocks of lanes the sums that make the gradients of the filter and the bias.

    parts: (programs, C · taps + C). With SILU the convolution is made anew, and its gradient, that
    of y times SiLU's slope, is stored in grad_z; without, that is grad_y itself.
    """
    channel, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    plane = channel * height * width
    x += image * x_stride + plane
    grad_y += image * grad_stride + plane
    taps = _load_taps(weight + channel * (KH * KW), KH * KW, False)
    start = _load_bias(bias, channel, LANES)
    sums = ()
    for _ in tl.static_range(KH * KW + 1):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    for index in range(rounds):
        block = tl.program_id(0) * rounds + index
        row, column, inside = _lanes(block, width, strips, ROWS, LANES)
        values = _load(x, row, column, height, width, inside, ROWS, KH, KW)
        gradients = _load(grad_y, row, column, height, width, inside, ROWS, 1, 1)
        if SILU:
            outputs = _convolve(values, taps, start, ROWS, KH, KW)
            before = ()
            for k in tl.static_range(2 * ROWS):
                sigmoid = _sigmoid(outputs[k])
                slope = sigmoid * (1 + outputs[k] * (1 - sigmoid))
                before = before + (gradients[k] * slope,)
            gradients = before
            z = grad_z + image * tl.num_programs(1) * height * width + plane
            _store(z, gradients, row, column, height, width, inside, ROWS, PAIR)
        sums = _add_products(sums, gradients, values, ROWS, KH, KW)
    channels = tl.num_programs(1)
    parts += (image * tl.num_programs(0) + tl.program_id(0)) * channels * (KH * KW + 1)
    for k in tl.static_range(KH * KW):
        tl.store(parts + channel * (KH * KW) + k, tl.sum(sums[k], 0))
    tl.store(parts + channels * (KH * KW) + channel, tl.sum(sums[KH * KW], 0))
