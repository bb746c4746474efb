"""Triton kernels of the selective scan: linear recurrences cut into chunks, lanes and steps.

A program holds ROWS channels x LANES x STEPS tokens in registers; token = lane · STEPS + step. A
lane (one GPU thread) walks its own tokens one after the other; the lanes are joined by a short
parallel scan over their end states, and chunks by a carry that _chunk_ends and _carry find first.
So a state costs about two multiply-adds and one exponential, and none is ever stored.

All factors are products of decays exp(dt·A), never quotients: nothing overflows, whatever dt.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Sizes that only scale addresses: one compiled kernel serves all their values.
SIZES = ["channels", "groups", "R", "chunks", "blocks", "splits", "batches", "reversed_sets"]


@triton.jit
def _softplus(x):
    """log(1 + e^x) to full relative precision; log1p(z) / z on [0, 1] by a polynomial (2e-7)."""
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    p = 0.005126102361828089 * z - 0.029074065387248993
    p = p * z + 0.0775160863995552
    p = p * z - 0.13602247834205627
    p = p * z + 0.19076880812644958
    p = p * z - 0.2483539879322052
    p = p * z + 0.3331812024116516
    p = p * z - 0.4999944567680359
    p = p * z + 0.9999999403953552
    return tl.maximum(x, 0.0) + p * z


@triton.jit
def _sigmoid(x):
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, z) / (1 + z)


@triton.jit
def _load(ptr, start, token, length, valid, STEPS: tl.constexpr):
    """Tokens token ... token + STEPS - 1 of each lane as float32; start, token, valid (M,).

    Each load is 16 bytes wide; halves are joined so that a thread keeps all tokens of its lane.
    """
    if STEPS * ptr.dtype.element_ty.primitive_bitwidth <= 128:
        at = token[:, None] + tl.arange(0, STEPS)[None, :]
        x = tl.load(ptr + start[:, None] + at, mask=(at < length) & valid[:, None], other=0.0)
        return x.to(tl.float32)
    else:  # noqa: RET505 (the compiler needs both branches)
        half: tl.constexpr = STEPS // 2
        left = _load(ptr, start, token, length, valid, half)
        right = _load(ptr, start, token + half, length, valid, half)
        both = tl.permute(tl.join(left, right), (0, 2, 1))
        return tl.reshape(both, [token.shape[0], STEPS])


@triton.jit
def _store(ptr, x, start, token, length, valid, STEPS: tl.constexpr):
    """Write what _load reads; x (M, STEPS)."""
    if STEPS * ptr.dtype.element_ty.primitive_bitwidth <= 128:
        at = token[:, None] + tl.arange(0, STEPS)[None, :]
        x = x.to(ptr.dtype.element_ty)
        tl.store(ptr + start[:, None] + at, x, mask=(at < length) & valid[:, None])
    else:
        half: tl.constexpr = STEPS // 2
        both = tl.permute(tl.reshape(x, [token.shape[0], 2, half]), (0, 2, 1))
        left, right = tl.split(both)
        _store(ptr, left, start, token, length, valid, half)
        _store(ptr, right, start, token + half, length, valid, half)


@triton.jit
def _repeat(condition, SIZE: tl.constexpr):
    """(SIZE,) masks of one condition; Triton's interpreter takes no mask made with a scalar."""
    return tl.where(condition, 1, 0) + tl.zeros([SIZE], tl.int32) > 0


@triton.jit
def _take(x, index: tl.constexpr, REVERSE: tl.constexpr):
    """x[:, :, index], counted from the last if REVERSE.

    As a sum of integers with zeros it compiles to the name of a register.
    """
    step: tl.constexpr = x.shape[2] - 1 - index if REVERSE else index
    steps = tl.arange(0, x.shape[2])[None, None, :]
    bits = tl.where(steps == step, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 2).to(tl.float32, bitcast=True)


@triton.jit
def _put(x, index: tl.constexpr, value, REVERSE: tl.constexpr):
    """x with x[:, :, index] = value, counted as in _take."""
    step: tl.constexpr = x.shape[2] - 1 - index if REVERSE else index
    steps = tl.arange(0, x.shape[2])[None, None, :]
    return tl.where(steps == step, value[:, :, None], x)


@triton.jit
def _then(decay_1, state_1, decay_2, state_2):
    """One stretch of a linear recurrence after another."""
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _join_lanes(decay, end, carry, REVERSE: tl.constexpr):
    """From each lane's decay and end state (from zero): the states that enter and leave it.

    decay, end (ROWS, LANES); carry (ROWS,) enters the first lane, the last one if REVERSE. Between
    the lanes stand identities: there, the inclusive scan shows what enters the next lane.
    """
    ROWS: tl.constexpr = end.shape[0]
    LANES: tl.constexpr = end.shape[1]
    lane = tl.arange(0, LANES)[None, :]
    is_first = lane == (LANES - 1 if REVERSE else 0)
    end = tl.where(is_first, decay * carry[:, None] + end, end)
    one, zero = tl.full([ROWS, LANES], 1.0, tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    if REVERSE:
        decays, states = tl.join(decay, one), tl.join(end, zero)
    else:
        decays, states = tl.join(one, decay), tl.join(zero, end)
    decays = tl.reshape(decays, [ROWS, 2 * LANES])
    states = tl.reshape(states, [ROWS, 2 * LANES])
    decays, states = tl.associative_scan((decays, states), 1, _then, reverse=REVERSE)
    states = tl.reshape(states, [ROWS, LANES, 2])
    if REVERSE:
        leaving, entering = tl.split(states)
    else:
        entering, leaving = tl.split(states)
    return tl.where(is_first, carry[:, None], entering), leaving


@triton.jit
def _lane_ends(decay, x, GRADIENT: tl.constexpr, REVERSE: tl.constexpr):
    """What leaves each lane if zero enters: s = decay · s + x, a gradient's s = decay · (s + x).

    REVERSE walks from the last token to the first, as in _states and _state_gradients.
    """
    state = _take(x, 0, REVERSE)
    if GRADIENT:
        state *= _take(decay, 0, REVERSE)
    for step in tl.static_range(1, x.shape[2]):
        if GRADIENT:
            state = _take(decay, step, REVERSE) * (_take(x, step, REVERSE) + state)
        else:
            state = _take(decay, step, REVERSE) * state + _take(x, step, REVERSE)
    return state


@triton.jit
def _states(decay, x, state, REVERSE: tl.constexpr):
    """state = decay · state + x along each lane: the inherited parts and the states."""
    inherited, states = x, x
    for step in tl.static_range(x.shape[2]):
        state = _take(decay, step, REVERSE) * state
        inherited = _put(inherited, step, state, REVERSE)
        state += _take(x, step, REVERSE)
        states = _put(states, step, state, REVERSE)
    return inherited, states


@triton.jit
def _state_gradients(decay, x, gradient, REVERSE: tl.constexpr):
    """dL/dh_l = x_l + exp(dt_{l+1}·A) dL/dh_{l+1}, given what enters each lane from later ones.

    It walks against the states: REVERSE where they do not.
    """
    gradients = x
    for step in tl.static_range(x.shape[2]):
        gradient += _take(x, step, REVERSE)
        gradients = _put(gradients, step, gradient, REVERSE)
        gradient *= _take(decay, step, REVERSE)
    return gradients


@triton.jit
def _times(dt, GRADIENT: tl.constexpr, REVERSE: tl.constexpr):
    """The time between each token and the border at which the chunk's walk ends, and all of it.

    A token's own dt counts for a gradient only. dt (ROWS, LANES, STEPS) -> the same and (ROWS,).
    """
    ROWS: tl.constexpr = dt.shape[0]
    LANES: tl.constexpr = dt.shape[1]
    span = tl.sum(dt, 2)
    one, nothing = tl.full([ROWS, LANES], 1.0, tl.float32), tl.zeros([ROWS], tl.float32)
    time, leaving = _join_lanes(one, span, nothing, not REVERSE)
    times = dt
    for step in tl.static_range(dt.shape[2]):
        if GRADIENT:
            time += _take(dt, step, not REVERSE)
            times = _put(times, step, time, not REVERSE)
        else:
            times = _put(times, step, time, not REVERSE)
            time += _take(dt, step, not REVERSE)
    return times, tl.sum(span, 1)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _sum_rows(x, WARPS: tl.constexpr):
    """Sum over the first axis (ROWS, LANES, STEPS), whose rows lie in WARPS warps.

    A scan along an axis brings that axis into registers, which is the cheap way across warps.
    """
    LANES: tl.constexpr = x.shape[1]
    STEPS: tl.constexpr = x.shape[2]
    x = tl.sum(tl.reshape(x, [x.shape[0] // WARPS, WARPS, LANES, STEPS]), 0)
    if WARPS == 1:
        return tl.reshape(x, [LANES, STEPS])
    else:  # noqa: RET505
        x = tl.associative_scan(tl.reshape(x, [WARPS, LANES * STEPS]), 0, _add)
        last = tl.arange(0, WARPS)[:, None] == WARPS - 1
        bits = tl.sum(tl.where(last, x.to(tl.int32, bitcast=True), 0), 0)
        return tl.reshape(bits.to(tl.float32, bitcast=True), [LANES, STEPS])


@triton.jit
def _step_sizes(
    delta, bias, start, token, length, row, valid, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr
):
    """dt and delta + bias (M, STEPS); dt = 0 past the end, so that states pass unchanged."""
    raw = _load(delta, start, token, length, valid, STEPS)
    if bias is not None:
        raw += tl.load(bias + row, mask=valid, other=0.0).to(tl.float32)[:, None]
    dt = raw
    if SOFTPLUS:
        dt = _softplus(raw)
    at = token[:, None] + tl.arange(0, STEPS)[None, :]
    return tl.where(at < length, dt, 0.0), raw


@triton.jit(do_not_specialize=SIZES)
def _chunk_ends_kernel(
    delta,
    bias,
    x,
    weight,
    A,
    ends,
    spans,
    length,
    channels,
    groups,
    N,
    chunks,
    blocks,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """What each chunk hands on if zero enters it, and the sum of its dt.

    Forward x, weight are u, B; REVERSE they are dL/dy, C. As no state inside is needed, each
    token's share is found on its own, from the time between it and the border.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    chunk = pid // blocks % chunks
    group = pid // (blocks * chunks) % groups
    batch = pid // (blocks * chunks) // groups
    group_size = channels // groups

    pair = tl.arange(0, ROWS * LANES)
    pair_valid = block * ROWS + pair // LANES < group_size
    pair_row = group * group_size + block * ROWS + pair // LANES
    pair_start = (batch * channels + pair_row).to(tl.int64) * length
    pair_token = (chunk * LANES + pair % LANES) * STEPS
    dt, raw = _step_sizes(
        delta, bias, pair_start, pair_token, length, pair_row, pair_valid, SOFTPLUS, STEPS
    )
    inputs = _load(x, pair_start, pair_token, length, pair_valid, STEPS)
    if not REVERSE:
        inputs *= dt
    dt = tl.reshape(dt, [ROWS, LANES, STEPS])
    inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])

    times, span = _times(dt, REVERSE, REVERSE)
    row = group * group_size + block * ROWS + tl.arange(0, ROWS)
    valid = block * ROWS + tl.arange(0, ROWS) < group_size
    token = (chunk * LANES + tl.arange(0, LANES)) * STEPS
    out = ((batch * chunks + chunk) * channels + row).to(tl.int64)
    tl.store(spans + out, span, mask=valid)
    weight += (batch * groups + group).to(tl.int64) * N * length
    for n in range(N):
        rate = tl.load(A + row * N + n, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        w = _load(weight + n * length, token * 0, token, length, token < length, STEPS)
        share = tl.exp2(times * rate[:, None, None]) * inputs * w[None]
        tl.store(ends + out * N + n, tl.sum(tl.sum(share, 2), 1), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _carry_kernel(
    ends,
    spans,
    A,
    states,
    channels,
    N,
    chunks,
    batches,
    reversed_sets,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The state that enters each chunk but the first in the walk's order.

    ends (sets, batches, chunks, channels, N) -> states (sets, batches, chunks - 1, channels, N);
    A (sets, channels, N). A set walks from the last chunk if its bit is set in reversed_sets.
    """
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)  # channel · N + n
    valid = index < channels * N
    sequence = tl.program_id(1)
    is_reversed = (reversed_sets >> (sequence // batches)) & 1
    A += sequence // batches * channels * N
    sequence = sequence.to(tl.int64)
    rate = tl.load(A + index, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    carry = tl.zeros([WIDTH], tl.float32)
    depth = tl.arange(0, DEPTH)[:, None]
    for first in range(0, chunks, DEPTH):
        position = first + depth
        inside = (position < chunks) & valid[None, :]
        chunk = position + is_reversed * (chunks - 1 - 2 * position)
        border = chunk - is_reversed
        span_at = (sequence * chunks + chunk) * channels + (index // N)[None, :]
        end_at = (sequence * chunks + chunk) * channels * N + index[None, :]
        decay = tl.exp2(tl.load(spans + span_at, mask=inside, other=0.0) * rate[None, :])
        end = tl.load(ends + end_at, mask=inside, other=0.0)
        decay, end = tl.associative_scan((decay, end), 0, _then)
        state = decay * carry[None, :] + end
        state_at = (sequence * (chunks - 1) + border) * channels * N + index[None, :]
        tl.store(states + state_at, state, mask=inside & (position < chunks - 1))
        carry = tl.sum(tl.where(depth == DEPTH - 1, state, 0.0), 0)


@triton.jit(do_not_specialize=SIZES)
def _output_kernel(
    u,
    delta,
    bias,
    A,
    B,
    C,
    D,
    y,
    states,
    length,
    channels,
    groups,
    N,
    chunks,
    blocks,
    STREAM: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y of one chunk from the state that enters it; STREAM: of all chunks, and those states.

    STREAM walks the row in tiles of one or more chunks and needs no other kernel before it, but
    fills the chip only if there are many rows.
    """
    TILE: tl.constexpr = LANES * STEPS
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    if STREAM:
        first_tile = 0
        last_tile = (length + TILE - 1) // TILE
    else:
        first_tile = pid % chunks
        last_tile = first_tile + 1
        pid = pid // chunks
    group = pid % groups
    batch = pid // groups
    group_size = channels // groups

    pair = tl.arange(0, ROWS * LANES)
    pair_valid = block * ROWS + pair // LANES < group_size
    pair_row = group * group_size + block * ROWS + pair // LANES
    pair_start = (batch * channels + pair_row).to(tl.int64) * length
    row = group * group_size + block * ROWS + tl.arange(0, ROWS)
    valid = block * ROWS + tl.arange(0, ROWS) < group_size
    lane = tl.arange(0, LANES)
    B += (batch * groups + group).to(tl.int64) * N * length
    C += (batch * groups + group).to(tl.int64) * N * length
    states += (batch * (chunks - 1)).to(tl.int64) * channels * N

    for tile in range(first_tile, last_tile):
        token = tile * TILE + lane * STEPS
        pair_token = tile * TILE + (pair % LANES) * STEPS
        dt, raw = _step_sizes(
            delta, bias, pair_start, pair_token, length, pair_row, pair_valid, SOFTPLUS, STEPS
        )
        inputs = _load(u, pair_start, pair_token, length, pair_valid, STEPS)
        out = tl.zeros([ROWS * LANES, STEPS], tl.float32)
        if D is not None:
            skip = tl.load(D + pair_row, mask=pair_valid, other=0.0).to(tl.float32)
            out = skip[:, None] * inputs
        inputs = tl.reshape(dt * inputs, [ROWS, LANES, STEPS])
        dt = tl.reshape(dt, [ROWS, LANES, STEPS])
        out = tl.reshape(out, [ROWS, LANES, STEPS])
        span = tl.sum(dt, 2)
        border = tile * (TILE // CHUNK) - 1
        for n in range(N):
            rate = tl.load(A + row * N + n, mask=valid, other=0.0).to(tl.float32) * LOG2_E
            at = (border * channels + row).to(tl.int64) * N + n
            carry = tl.load(states + at, mask=valid & _repeat(tile > 0, ROWS), other=0.0)
            matrix_at = n * length
            b = _load(B + matrix_at, token * 0, token, length, token < length, STEPS)
            c = _load(C + matrix_at, token * 0, token, length, token < length, STEPS)
            decay = tl.exp2(dt * rate[:, None, None])
            x = inputs * b[None]
            end = _lane_ends(decay, x, False, False)
            entering, leaving = _join_lanes(tl.exp2(span * rate[:, None]), end, carry, False)
            inherited, state = _states(decay, x, entering, False)
            out += state * c[None]
            if STREAM:
                left = border + (lane + 1) * STEPS // CHUNK
                is_border = ((lane + 1) * STEPS % CHUNK == 0) & (left < chunks - 1)
                at = (left.to(tl.int64)[None, :] * channels + row[:, None]) * N + n
                tl.store(states + at, leaving, mask=valid[:, None] & is_border[None, :])
        out = tl.reshape(out, [ROWS * LANES, STEPS])
        _store(y, out, pair_start, pair_token, length, pair_valid, STEPS)
        if STREAM:
            tl.debug_barrier()  # the next tile reads the states that this one stored


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(
    grad_y,
    u,
    delta,
    bias,
    A,
    B,
    C,
    D,
    states,
    gradients,
    grad_u,
    grad_delta,
    grad_B,
    grad_C,
    grad_rows,
    length,
    channels,
    groups,
    N,
    chunks,
    blocks,
    splits,
    batches,
    SOFTPLUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """All gradients of one chunk, for one of `splits` parts of a group's channels.

    grad_B and grad_C (splits, batch, groups, N, length) and grad_rows (batch, chunks, channels,
    N + 2), which holds those of A, D and the bias, are summed afterwards: no atomics.
    """
    pid = tl.program_id(0)
    split = pid % splits
    chunk = pid // splits % chunks
    group = pid // (splits * chunks) % groups
    batch = pid // (splits * chunks) // groups
    group_size = channels // groups

    lane = tl.arange(0, LANES)
    pair = tl.arange(0, ROWS * LANES)
    token = (chunk * LANES + lane) * STEPS
    pair_token = (chunk * LANES + pair % LANES) * STEPS
    chunk_at = (batch * chunks + chunk).to(tl.int64) * channels
    border_at = (batch * (chunks - 1) + chunk).to(tl.int64) * channels
    matrices = (batch * groups + group).to(tl.int64) * N * length
    B += matrices
    C += matrices
    matrices += split.to(tl.int64) * batches * groups * N * length
    grad_B += matrices
    grad_C += matrices

    first_block = split * blocks // splits
    for block in range(first_block, (split + 1) * blocks // splits):
        pair_valid = block * ROWS + pair // LANES < group_size
        pair_row = group * group_size + block * ROWS + pair // LANES
        pair_start = (batch * channels + pair_row).to(tl.int64) * length
        row = group * group_size + block * ROWS + tl.arange(0, ROWS)
        valid = block * ROWS + tl.arange(0, ROWS) < group_size

        dt, raw = _step_sizes(
            delta, bias, pair_start, pair_token, length, pair_row, pair_valid, SOFTPLUS, STEPS
        )
        inputs = dt * _load(u, pair_start, pair_token, length, pair_valid, STEPS)
        dy = _load(grad_y, pair_start, pair_token, length, pair_valid, STEPS)
        dt = tl.reshape(dt, [ROWS, LANES, STEPS])
        inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])
        dy = tl.reshape(dy, [ROWS, LANES, STEPS])
        span = tl.sum(dt, 2)
        grad_inputs = tl.zeros([ROWS, LANES, STEPS], tl.float32)
        grad_dt = tl.zeros([ROWS, LANES, STEPS], tl.float32)
        is_later = (token < length) & _repeat(block > first_block, LANES)
        for n in range(N):
            a = tl.load(A + row * N + n, mask=valid, other=0.0).to(tl.float32)
            late_at = (border_at + row) * N + n
            has_late = valid & _repeat(chunk < chunks - 1, ROWS)
            late = tl.load(gradients + late_at, mask=has_late, other=0.0)
            carry_at = late_at - channels * N
            has_carry = valid & _repeat(chunk > 0, ROWS)
            carry = tl.load(states + carry_at, mask=has_carry, other=0.0)
            matrix_at = n * length
            b = _load(B + matrix_at, token * 0, token, length, token < length, STEPS)
            c = _load(C + matrix_at, token * 0, token, length, token < length, STEPS)
            decay = tl.exp2(dt * (a * LOG2_E)[:, None, None])
            lane_decay = tl.exp2(span * (a * LOG2_E)[:, None])

            x = inputs * b[None]
            entering, leaving = _join_lanes(
                lane_decay, _lane_ends(decay, x, False, False), carry, False
            )
            inherited, state = _states(decay, x, entering, False)
            for_c = _sum_rows(state * dy, WARPS)

            x = dy * c[None]
            entering, leaving = _join_lanes(
                lane_decay, _lane_ends(decay, x, True, True), late, True
            )
            grad_state = _state_gradients(decay, x, entering, True)
            for_b = _sum_rows(grad_state * inputs, WARPS)

            grad_inputs += grad_state * b[None]
            grad_exponent = grad_state * inherited
            grad_dt += grad_exponent * a[:, None, None]
            for_a = tl.sum(tl.sum(grad_exponent * dt, 2), 1)
            tl.store(grad_rows + (chunk_at + row) * (N + 2) + n, for_a, mask=valid)
            for_b += _load(grad_B + matrix_at, token * 0, token, length, is_later, STEPS)
            for_c += _load(grad_C + matrix_at, token * 0, token, length, is_later, STEPS)
            _store(grad_B + matrix_at, for_b, token * 0, token, length, token < length, STEPS)
            _store(grad_C + matrix_at, for_c, token * 0, token, length, token < length, STEPS)

        dt, raw = _step_sizes(
            delta, bias, pair_start, pair_token, length, pair_row, pair_valid, SOFTPLUS, STEPS
        )
        inputs = _load(u, pair_start, pair_token, length, pair_valid, STEPS)
        dy = _load(grad_y, pair_start, pair_token, length, pair_valid, STEPS)
        grad_inputs = tl.reshape(grad_inputs, [ROWS * LANES, STEPS])
        grad_dt = tl.reshape(grad_dt, [ROWS * LANES, STEPS]) + grad_inputs * inputs
        if SOFTPLUS:
            grad_dt *= _sigmoid(raw)
        _store(grad_delta, grad_dt, pair_start, pair_token, length, pair_valid, STEPS)
        in_row = pair_token[:, None] + tl.arange(0, STEPS)[None, :] < length
        for_bias = tl.where(in_row, grad_dt, 0.0)
        for_bias = tl.sum(tl.sum(tl.reshape(for_bias, [ROWS, LANES, STEPS]), 2), 1)
        tl.store(grad_rows + (chunk_at + row) * (N + 2) + N + 1, for_bias, mask=valid)

        grad_inputs *= dt
        if D is not None:
            skip = tl.load(D + pair_row, mask=pair_valid, other=0.0).to(tl.float32)
            grad_inputs += skip[:, None] * dy
            for_skip = tl.reshape(dy * inputs, [ROWS, LANES, STEPS])
            for_skip = tl.sum(tl.sum(for_skip, 2), 1)
            tl.store(grad_rows + (chunk_at + row) * (N + 2) + N, for_skip, mask=valid)
        _store(grad_u, grad_inputs, pair_start, pair_token, length, pair_valid, STEPS)
        tl.debug_barrier()  # the next block of channels adds to what this one stored
