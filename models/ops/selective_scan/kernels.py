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
def _load(ptr, start, token, length, STEPS: tl.constexpr):
    """Tokens token ... token + STEPS - 1 of each lane as float32, 0 past the end.

    start, token (M,) -> (M, STEPS). Each load is 16 bytes wide; halves are joined so that a thread
    keeps all tokens of its lane.
    """
    if STEPS * ptr.dtype.element_ty.primitive_bitwidth <= 128:
        return _load_at_once(ptr, start, token, length, STEPS)
    else:  # noqa: RET505 (the compiler needs both branches)
        left = _load_at_once(ptr, start, token, length, STEPS // 2)
        right = _load_at_once(ptr, start, token + STEPS // 2, length, STEPS // 2)
        both = tl.permute(tl.join(left, right), (0, 2, 1))
        return tl.reshape(both, [token.shape[0], STEPS])


@triton.jit
def _load_at_once(ptr, start, token, length, STEPS: tl.constexpr):
    at = token[:, None] + tl.arange(0, STEPS)[None, :]
    x = tl.load(ptr + (start[:, None] + at), mask=at < length, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(ptr, x, start, token, length, valid, STEPS: tl.constexpr):
    """Write what _load reads, of valid rows; x (M, STEPS), valid (M,)."""
    if STEPS * ptr.dtype.element_ty.primitive_bitwidth <= 128:
        _store_at_once(ptr, x, start, token, length, valid, STEPS)
    else:
        both = tl.permute(tl.reshape(x, [token.shape[0], 2, STEPS // 2]), (0, 2, 1))
        left, right = tl.split(both)
        _store_at_once(ptr, left, start, token, length, valid, STEPS // 2)
        _store_at_once(ptr, right, start, token + STEPS // 2, length, valid, STEPS // 2)


@triton.jit
def _store_at_once(ptr, x, start, token, length, valid, STEPS: tl.constexpr):
    at = token[:, None] + tl.arange(0, STEPS)[None, :]
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + (start[:, None] + at), x, mask=(at < length) & valid[:, None])


@triton.jit
def _rows(block, count, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Rows of a block among `count`, for each of ROWS x LANES pairs, and whether they are there.

    Where they are not, the last row stands in: it can be read without a mask.
    """
    row = block * ROWS + tl.arange(0, ROWS * LANES) // LANES
    return tl.minimum(row, count - 1), row < count


@triton.jit
def _tokens(
    chunk, REPEATS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr
):
    """The first token of each lane of a chunk, REPEATS times over; REVERSE: last lane first."""
    lane = tl.arange(0, REPEATS * LANES) % LANES
    if REVERSE:
        lane = LANES - 1 - lane
    return (chunk * LANES + lane) * STEPS


@triton.jit
def _following(n, N):
    """The state after n, in a circle.

    Each program begins elsewhere in it: were all to ask memory for the same B and C at the same
    time, all would wait for it.
    """
    return tl.where(n + 1 < N, n + 1, 0)


@triton.jit
def _borders(chunk, chunks, REVERSE: tl.constexpr):
    """By which border a walk enters this chunk and by which it leaves, and whether they are kept.

    Border c lies between the chunks c and c + 1. One that is not kept is named by a neighbour.
    """
    before, has_before = tl.maximum(chunk - 1, 0), chunk > 0
    after, has_after = tl.maximum(tl.minimum(chunk, chunks - 2), 0), chunk < chunks - 1
    if REVERSE:
        return after, has_after, before, has_before
    else:  # noqa: RET505
        return before, has_before, after, has_after


@triton.jit
def _load_for_rows(
    ptr,
    chunk,
    length,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Tokens of one chunk, the same for all rows: (ROWS, LANES, STEPS).

    Each of the WARPS that share the rows reads them itself, without a barrier.
    """
    REST: tl.constexpr = ROWS // WARPS
    token = _tokens(chunk, WARPS, LANES, STEPS, REVERSE)
    x = tl.reshape(_load(ptr, token * 0, token, length, STEPS), [1, WARPS, LANES, STEPS])
    return tl.reshape(tl.broadcast_to(x, [REST, WARPS, LANES, STEPS]), [ROWS, LANES, STEPS])


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
def _join_lanes(decay, end, carry):
    """From each lane's decay and end state (from zero): the states that enter and leave it.

    decay, end (ROWS, LANES); carry (ROWS,) enters the first lane. Between the lanes stand
    identities: there, the inclusive scan shows what enters the next lane.
    """
    ROWS: tl.constexpr = end.shape[0]
    LANES: tl.constexpr = end.shape[1]
    is_first = tl.arange(0, LANES)[None, :] == 0
    end = tl.where(is_first, decay * carry[:, None] + end, end)
    one, zero = tl.full([ROWS, LANES], 1.0, tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    decays = tl.reshape(tl.join(one, decay), [ROWS, 2 * LANES])
    states = tl.reshape(tl.join(zero, end), [ROWS, 2 * LANES])
    decays, states = tl.associative_scan((decays, states), 1, _then)
    entering, leaving = tl.split(tl.reshape(states, [ROWS, LANES, 2]))
    return tl.where(is_first, carry[:, None], entering), leaving


@triton.jit
def _join_later_lanes(decay, end, late):
    """What enters each lane from those after it; as _join_lanes, against the order of the lanes.

    late (ROWS,) enters the last lane. Triton's reversed scan turns the lanes round and back, five
    shuffles a value each time; here pairs of lanes, of pairs, ... swap what they hand on in all.
    """
    ROWS: tl.constexpr = end.shape[0]
    LANES: tl.constexpr = end.shape[1]
    lane = tl.arange(0, LANES)[None, :]
    later_decay = tl.full([ROWS, LANES], 1.0, tl.float32)
    later = tl.zeros([ROWS, LANES], tl.float32)
    for level in tl.static_range(5):
        if 2**level < LANES:
            other_decay, other = _swap(decay, 2**level), _swap(end, 2**level)
            is_before = lane // 2**level % 2 == 0
            later += tl.where(is_before, later_decay * other, 0.0)
            later_decay *= tl.where(is_before, other_decay, 1.0)
            first, second = tl.where(is_before, end, other), tl.where(is_before, other, end)
            end = first + tl.where(is_before, decay, other_decay) * second
            decay *= other_decay
    return later + later_decay * late[:, None]


@triton.jit
def _swap(x, SIZE: tl.constexpr):
    """x (ROWS, LANES) with each two neighbouring groups of SIZE lanes exchanged.

    A sum over both as integers, less the own value, compiles to one shuffle.
    """
    shape: tl.constexpr = [x.shape[0], x.shape[1] // (2 * SIZE), 2, SIZE]
    bits = tl.reshape(x.to(tl.int32, bitcast=True), shape)
    both = tl.broadcast_to(tl.expand_dims(tl.sum(bits, 2), 2), shape)
    return tl.reshape(both - bits, [x.shape[0], x.shape[1]]).to(tl.float32, bitcast=True)


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

    The lanes stand in order from that border; REVERSE: a walk from the last token to the first. A
    token's own dt counts for a gradient only. dt (ROWS, LANES, STEPS) -> the same and (ROWS,).
    """
    ROWS: tl.constexpr = dt.shape[0]
    LANES: tl.constexpr = dt.shape[1]
    span = tl.sum(dt, 2)
    one, nothing = tl.full([ROWS, LANES], 1.0, tl.float32), tl.zeros([ROWS], tl.float32)
    time, _ = _join_lanes(one, span, nothing)
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
def _sum_rows(x, other, WARPS: tl.constexpr):
    """Sums over the rows of two (ROWS, LANES, STEPS): (2 · LANES · STEPS,), one after the other.

    The rows lie in WARPS warps. A scan along an axis brings that axis into registers, which is
    the cheap way across warps.
    """
    REST: tl.constexpr = x.shape[0] // WARPS
    TILE: tl.constexpr = x.shape[1] * x.shape[2]
    x = tl.reshape(tl.sum(tl.reshape(x, [REST, WARPS, x.shape[1], x.shape[2]]), 0), [WARPS, TILE])
    other = tl.sum(tl.reshape(other, [REST, WARPS, other.shape[1], other.shape[2]]), 0)
    x = tl.permute(tl.join(x, tl.reshape(other, [WARPS, TILE])), (0, 2, 1))
    x = tl.reshape(x, [WARPS, 2 * TILE])
    if WARPS == 1:
        return tl.reshape(x, [2 * TILE])
    else:  # noqa: RET505
        x = tl.associative_scan(x, 0, _add)
        last = tl.arange(0, WARPS)[:, None] == WARPS - 1
        bits = tl.sum(tl.where(last, x.to(tl.int32, bitcast=True), 0), 0)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store_row_sums(ptr, x, valid):
    """Write the sums over lanes and steps of x (ROWS, LANES, STEPS) to ptr (ROWS,).

    The last lane of a scan holds its row's sum in the warp of that row; a sum would be moved to
    other warps. The addresses of the other lanes are not used: they tell the compiler to keep it.
    """
    LANES: tl.constexpr = x.shape[1]
    sums = tl.associative_scan(tl.sum(x, 2), 1, _add)
    lane = tl.arange(0, LANES)[None, :]
    at = ptr[:, None] + (lane - (LANES - 1))
    tl.store(at, sums, mask=valid[:, None] & (lane == LANES - 1))


@triton.jit
def _step_sizes(
    delta, bias, start, token, length, row, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr
):
    """dt and delta + bias (M, STEPS); dt = 0 past the end, so that states pass unchanged."""
    raw = _load(delta, start, token, length, STEPS)
    if bias is not None:
        raw += tl.load(bias + row).to(tl.float32)[:, None]
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

    first_row = group * group_size
    pair_row, _ = _rows(block, group_size, ROWS, LANES)
    pair_row += first_row
    pair_start = (batch * channels + pair_row).to(tl.int64) * length
    pair_token = _tokens(chunk, ROWS, LANES, STEPS, not REVERSE)
    dt, _ = _step_sizes(delta, bias, pair_start, pair_token, length, pair_row, SOFTPLUS, STEPS)
    inputs = _load(x, pair_start, pair_token, length, STEPS)
    if not REVERSE:
        inputs *= dt
    dt = tl.reshape(dt, [ROWS, LANES, STEPS])
    inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])

    times, span = _times(dt, REVERSE, REVERSE)
    row, valid = _rows(block, group_size, ROWS, 1)
    row += first_row
    token = _tokens(chunk, 1, LANES, STEPS, not REVERSE)
    out = ((batch * chunks + chunk) * channels + row).to(tl.int64)
    tl.store(spans + out, span, mask=valid)
    weight += (batch * groups + group).to(tl.int64) * N * length
    n = pid % N
    for _ in range(N):
        rate = tl.load(A + row * N + n).to(tl.float32) * LOG2_E
        w = _load(weight + n * length, token * 0, token, length, STEPS)
        share = tl.exp2(times * rate[:, None, None]) * inputs * w[None]
        tl.store(ends + out * N + n, tl.sum(tl.sum(share, 2), 1), mask=valid)
        n = _following(n, N)


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


@triton.jit
def _state_inputs(A, states, B, C, n, token, length, STEPS: tl.constexpr):
    """Of state n: rate and carry (ROWS,), b and c (LANES, STEPS); A and states point, (ROWS,)."""
    rate = tl.load(A + n).to(tl.float32) * LOG2_E
    b = _load(B + n * length, token * 0, token, length, STEPS)
    c = _load(C + n * length, token * 0, token, length, STEPS)
    return rate, tl.load(states + n), b, c


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

    first_row = group * group_size
    pair_row, pair_valid = _rows(block, group_size, ROWS, LANES)
    pair_row += first_row
    pair_start = (batch * channels + pair_row).to(tl.int64) * length
    row, valid = _rows(block, group_size, ROWS, 1)
    row += first_row
    lane = tl.arange(0, LANES)
    B += (batch * groups + group).to(tl.int64) * N * length
    C += (batch * groups + group).to(tl.int64) * N * length
    own_A = A + row * N
    states += (batch * (chunks - 1)).to(tl.int64) * channels * N

    n = tl.program_id(0) % N
    for tile in range(first_tile, last_tile):
        token = _tokens(tile, 1, LANES, STEPS, False)
        pair_token = _tokens(tile, ROWS, LANES, STEPS, False)
        border = tile * (TILE // CHUNK) - 1
        carries = states + (tl.maximum(border, 0) * channels + row).to(tl.int64) * N
        rate, carry, b, c = _state_inputs(own_A, carries, B, C, n, token, length, STEPS)
        dt, raw = _step_sizes(
            delta, bias, pair_start, pair_token, length, pair_row, SOFTPLUS, STEPS
        )
        inputs = _load(u, pair_start, pair_token, length, STEPS)
        out = tl.zeros([ROWS * LANES, STEPS], tl.float32)
        if D is not None:
            out = tl.load(D + pair_row).to(tl.float32)[:, None] * inputs
        inputs = tl.reshape(dt * inputs, [ROWS, LANES, STEPS])
        dt = tl.reshape(dt, [ROWS, LANES, STEPS])
        out = tl.reshape(out, [ROWS, LANES, STEPS])
        span = tl.sum(dt, 2)
        for _ in range(N):
            following = _following(n, N)
            next_rate, next_carry, next_b, next_c = _state_inputs(
                own_A, carries, B, C, following, token, length, STEPS
            )
            decay = tl.exp2(dt * rate[:, None, None])
            x = inputs * b[None]
            end = _lane_ends(decay, x, False, False)
            carry = tl.where(tile > 0, carry, 0.0)
            lane_decay = tl.exp2(span * rate[:, None])
            entering, leaving = _join_lanes(lane_decay, end, carry)
            inherited, state = _states(decay, x, entering, False)
            out += state * c[None]
            if STREAM:
                left = border + (lane + 1) * STEPS // CHUNK
                is_border = ((lane + 1) * STEPS % CHUNK == 0) & (left < chunks - 1)
                at = (left.to(tl.int64)[None, :] * channels + row[:, None]) * N + n
                tl.store(states + at, leaving, mask=valid[:, None] & is_border[None, :])
            n, rate, carry, b, c = following, next_rate, next_carry, next_b, next_c
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
    grad_matrices,
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

    grad_matrices (splits, 2, batch, groups, N, length) of B and C and grad_rows (batch, chunks,
    channels, N + 2) of A, D and the bias are summed afterwards: no atomics.
    """
    TILE: tl.constexpr = LANES * STEPS
    pid = tl.program_id(0)
    split = pid % splits
    chunk = pid // splits % chunks
    group = pid // (splits * chunks) % groups
    batch = pid // (splits * chunks) // groups
    group_size = channels // groups

    first_row = group * group_size
    pair_token = _tokens(chunk, ROWS, LANES, STEPS, False)
    chunk_at = (batch * chunks + chunk).to(tl.int64) * channels
    entry, has_entry, way_out, has_way_out = _borders(chunk, chunks, False)
    late_at = (batch * (chunks - 1) + way_out).to(tl.int64) * channels
    carry_at = (batch * (chunks - 1) + entry).to(tl.int64) * channels
    matrices = (batch * groups + group).to(tl.int64) * N * length
    B += matrices
    C += matrices
    # of B, then of C
    sum_index = tl.max_contiguous(tl.arange(0, 2 * TILE), 1)
    sum_token = chunk * TILE + sum_index % TILE
    of_C = (sum_index // TILE).to(tl.int64) * batches * groups * N * length
    matrices += split.to(tl.int64) * 2 * batches * groups * N * length
    grad_matrices += matrices + of_C + sum_token

    n = pid % N
    first_block = split * blocks // splits
    for block in range(first_block, (split + 1) * blocks // splits):
        pair_row, pair_valid = _rows(block, group_size, ROWS, LANES)
        pair_row += first_row
        pair_start = (batch * channels + pair_row).to(tl.int64) * length
        row, valid = _rows(block, group_size, ROWS, 1)
        row += first_row

        dt, raw = _step_sizes(
            delta, bias, pair_start, pair_token, length, pair_row, SOFTPLUS, STEPS
        )
        inputs = dt * _load(u, pair_start, pair_token, length, STEPS)
        dy = _load(grad_y, pair_start, pair_token, length, STEPS)
        # rows that are not there add nothing to the sums over rows
        inputs = tl.where(pair_valid[:, None], inputs, 0.0)
        dy = tl.where(pair_valid[:, None], dy, 0.0)
        dt = tl.reshape(dt, [ROWS, LANES, STEPS])
        inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])
        dy = tl.reshape(dy, [ROWS, LANES, STEPS])
        span = tl.sum(dt, 2)
        grad_inputs = tl.zeros([ROWS, LANES, STEPS], tl.float32)
        grad_dt = tl.zeros([ROWS, LANES, STEPS], tl.float32)
        row_sums = grad_rows + (chunk_at + row) * (N + 2)
        is_later = (sum_token < length) & _repeat(block > first_block, 2 * TILE)
        for _ in range(N):
            a = tl.load(A + row * N + n).to(tl.float32)
            late = tl.where(has_way_out, tl.load(gradients + (late_at + row) * N + n), 0.0)
            carry = tl.where(has_entry, tl.load(states + (carry_at + row) * N + n), 0.0)
            b = _load_for_rows(B + n * length, chunk, length, ROWS, LANES, STEPS, WARPS, False)
            c = _load_for_rows(C + n * length, chunk, length, ROWS, LANES, STEPS, WARPS, False)
            decay = tl.exp2(dt * (a * LOG2_E)[:, None, None])
            lane_decay = tl.exp2(span * (a * LOG2_E)[:, None])

            x = inputs * b
            end = _lane_ends(decay, x, False, False)
            entering, leaving = _join_lanes(lane_decay, end, carry)
            inherited, state = _states(decay, x, entering, False)

            x = dy * c
            end = _lane_ends(decay, x, True, True)
            entering = _join_later_lanes(lane_decay, end, late)
            grad_state = _state_gradients(decay, x, entering, True)

            sums = _sum_rows(grad_state * inputs, state * dy, WARPS)
            sums += tl.load(grad_matrices + n * length, mask=is_later, other=0.0)
            tl.store(grad_matrices + n * length, sums, mask=sum_token < length)
            grad_inputs += grad_state * b
            grad_exponent = grad_state * inherited
            grad_dt += grad_exponent * a[:, None, None]
            _store_row_sums(row_sums + n, grad_exponent * dt, valid)
            n = _following(n, N)

        dt, raw = _step_sizes(
            delta, bias, pair_start, pair_token, length, pair_row, SOFTPLUS, STEPS
        )
        inputs = _load(u, pair_start, pair_token, length, STEPS)
        dy = _load(grad_y, pair_start, pair_token, length, STEPS)
        grad_inputs = tl.reshape(grad_inputs, [ROWS * LANES, STEPS])
        grad_dt = tl.reshape(grad_dt, [ROWS * LANES, STEPS]) + grad_inputs * inputs
        if SOFTPLUS:
            grad_dt *= _sigmoid(raw)
        _store(grad_delta, grad_dt, pair_start, pair_token, length, pair_valid, STEPS)
        in_row = pair_token[:, None] + tl.arange(0, STEPS)[None, :] < length
        for_bias = tl.where(in_row, grad_dt, 0.0)
        _store_row_sums(row_sums + N + 1, tl.reshape(for_bias, [ROWS, LANES, STEPS]), valid)

        grad_inputs *= dt
        if D is not None:
            skip = tl.load(D + pair_row).to(tl.float32)
            grad_inputs += skip[:, None] * dy
            _store_row_sums(row_sums + N, tl.reshape(dy * inputs, [ROWS, LANES, STEPS]), valid)
        _store(grad_u, grad_inputs, pair_start, pair_token, length, pair_valid, STEPS)
        tl.debug_barrier()  # the next block of channels adds to what this one stored
