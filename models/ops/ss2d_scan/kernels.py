"""Triton kernels of the four-direction scan: two orders of the pixels, each walked both ways.

A program has ROWS channels of one order and image and does both walks of that order, so that a
map is read and written twice, not four times. dt is made from dt_low inside, token by token; cut,
joined and carried on as in the selective scan.

Layouts: x (2 orders, batch, D, L); projected (2, batch, 2 walks, R + 2N, L); parameters (4
directions, D, ...), where direction = order + 2 · walk; states (4, batch, chunks - 1, D, N).
"""

import triton
import triton.language as tl

from models.ops.selective_scan.kernels import (
    LOG2_E,
    SIZES,
    _join_lanes,
    _lane_ends,
    _load,
    _repeat,
    _softplus,
    _state_gradients,
    _states,
    _store,
    _sum_rows,
    _times,
)


@triton.jit
def _step_sizes(low, weight, bias, token, length, row, valid, R, STEPS: tl.constexpr):
    """dt = softplus(weight · low + bias) (M, STEPS), 0 past the end; token, row, valid (M,).

    The first product stands before the loop: from it the sum takes its place in registers, each
    lane's tokens in one thread.
    """
    at = token[:, None] + tl.arange(0, STEPS)[None, :]
    raw = _weighted(low, weight, 0, token, length, row, valid, R, STEPS)
    for r in range(1, R):
        raw += _weighted(low, weight, r, token, length, row, valid, R, STEPS)
    raw += tl.load(bias + row, mask=valid, other=0.0)[:, None]
    return tl.where(at < length, _softplus(raw), 0.0)


@triton.jit
def _weighted(low, weight, r, token, length, row, valid, R, STEPS: tl.constexpr):
    """weight[row, r] · low[r, token] (M, STEPS)."""
    w = tl.load(weight + row * R + r, mask=valid, other=0.0)
    x = _load(low + r * length, token * 0, token, length, valid, STEPS)
    return w[:, None] * x


@triton.jit
def _softplus_slope(dt):
    """d softplus = sigmoid = 1 - exp(-dt), to full relative precision for small dt too."""
    series = 1 - dt * (1 / 4 - dt * (1 / 20 - dt * (1 / 120)))
    series = dt * (1 - dt * (1 / 2) * (1 - dt * (1 / 3) * series))
    return tl.where(dt < 0.125, series, 1 - tl.exp2(-dt * LOG2_E))


@triton.jit
def _borders(chunk, chunks, REVERSE: tl.constexpr):
    """By which border a walk enters this chunk and by which it leaves, and whether they are kept.

    Border c lies between the chunks c and c + 1.
    """
    before, has_before, after, has_after = chunk - 1, chunk > 0, chunk, chunk < chunks - 1
    if REVERSE:
        return after, has_after, before, has_before
    else:  # noqa: RET505
        return before, has_before, after, has_after


@triton.jit(do_not_specialize=SIZES)
def _map_ends_kernel(
    x,
    projected,
    weight,
    bias,
    A,
    ends,
    spans,
    length,
    channels,
    R,
    N,
    chunks,
    blocks,
    batches,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """What each chunk hands on if zero enters it, and the sum of its dt, for both walks.

    x is the map itself; GRADIENT: dL/dy, handed on against the walk. ends (4, batch, chunks, D, N);
    spans without N.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    chunk = pid // blocks % chunks
    sequence = pid // (blocks * chunks)  # order · batches + image
    image = sequence % batches
    order = sequence // batches

    pair = tl.arange(0, ROWS * LANES)
    pair_row = block * ROWS + pair // LANES
    pair_valid = pair_row < channels
    pair_start = (sequence * channels + pair_row).to(tl.int64) * length
    pair_token = (chunk * LANES + pair % LANES) * STEPS
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < channels
    token = (chunk * LANES + tl.arange(0, LANES)) * STEPS
    projected += sequence.to(tl.int64) * 2 * (R + 2 * N) * length
    for walk in tl.static_range(2):
        direction = order + 2 * walk
        low = projected + walk * (R + 2 * N) * length
        matrix = low + R * length
        if GRADIENT:
            matrix += N * length
        dt = _step_sizes(
            low,
            weight + direction * channels * R,
            bias + direction * channels,
            pair_token,
            length,
            pair_row,
            pair_valid,
            R,
            STEPS,
        )
        dt = tl.reshape(dt, [ROWS, LANES, STEPS])
        inputs = _load(x, pair_start, pair_token, length, pair_valid, STEPS)
        inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])
        if not GRADIENT:
            inputs *= dt
        times, span = _times(dt, GRADIENT, (walk == 1) != GRADIENT)
        out = ((direction * batches + image) * chunks + chunk).to(tl.int64) * channels + row
        tl.store(spans + out, span, mask=valid)
        for n in range(N):
            rate = tl.load(A + (direction * channels + row) * N + n, mask=valid, other=0.0)
            w = _load(matrix + n * length, token * 0, token, length, token < length, STEPS)
            share = tl.exp2(times * (rate * LOG2_E)[:, None, None]) * inputs * w[None]
            tl.store(ends + out * N + n, tl.sum(tl.sum(share, 2), 1), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _map_output_kernel(
    x,
    projected,
    weight,
    bias,
    A,
    D,
    y,
    states,
    length,
    channels,
    R,
    N,
    chunks,
    blocks,
    batches,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """y of one chunk, the sum of both walks, from the states that enter it.

    STREAM: of all chunks, and those states. It needs no other kernel before it, but fills the chip
    only if there are many rows.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    if STREAM:
        first = 0
        count = chunks
    else:
        first = pid % chunks
        count = 1
        pid = pid // chunks
    sequence = pid  # order · batches + image
    image = sequence % batches
    order = sequence // batches

    pair = tl.arange(0, ROWS * LANES)
    pair_row = block * ROWS + pair // LANES
    pair_valid = pair_row < channels
    pair_start = (sequence * channels + pair_row).to(tl.int64) * length
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < channels
    lane = tl.arange(0, LANES)
    projected += sequence.to(tl.int64) * 2 * (R + 2 * N) * length
    for walk in tl.static_range(2):
        direction = order + 2 * walk
        low = projected + walk * (R + 2 * N) * length
        own_states = states + (direction * batches + image).to(tl.int64) * (
            (chunks - 1) * channels * N
        )
        for index in range(count):
            chunk = first + index
            if STREAM and walk == 1:
                chunk = chunks - 1 - index
            token = (chunk * LANES + lane) * STEPS
            pair_token = (chunk * LANES + pair % LANES) * STEPS
            dt = _step_sizes(
                low,
                weight + direction * channels * R,
                bias + direction * channels,
                pair_token,
                length,
                pair_row,
                pair_valid,
                R,
                STEPS,
            )
            dt = tl.reshape(dt, [ROWS, LANES, STEPS])
            inputs = _load(x, pair_start, pair_token, length, pair_valid, STEPS)
            skip = tl.load(D + direction * channels + pair_row, mask=pair_valid, other=0.0)
            out = skip[:, None] * inputs
            if walk == 1:
                out += _load(y, pair_start, pair_token, length, pair_valid, STEPS)
            inputs = tl.reshape(inputs, [ROWS, LANES, STEPS]) * dt
            out = tl.reshape(out, [ROWS, LANES, STEPS])
            span = tl.sum(dt, 2)
            entry, has_entry, way_out, has_way_out = _borders(chunk, chunks, walk == 1)
            is_last_lane = lane == (0 if walk == 1 else LANES - 1)
            for n in range(N):
                rate = tl.load(A + (direction * channels + row) * N + n, mask=valid, other=0.0)
                rate *= LOG2_E
                at = (entry * channels + row) * N + n
                carry = tl.load(own_states + at, mask=valid & _repeat(has_entry, ROWS), other=0.0)
                matrix = low + (R + n) * length
                b = _load(matrix, token * 0, token, length, token < length, STEPS)
                c = _load(matrix + N * length, token * 0, token, length, token < length, STEPS)
                decay = tl.exp2(dt * rate[:, None, None])
                share = inputs * b[None]
                end = _lane_ends(decay, share, False, walk == 1)
                lane_decay = tl.exp2(span * rate[:, None])
                entering, leaving = _join_lanes(lane_decay, end, carry, walk == 1)
                inherited, state = _states(decay, share, entering, walk == 1)
                out += state * c[None]
                if STREAM:
                    at = (way_out * channels + row) * N + n
                    is_kept = valid & _repeat(has_way_out, ROWS)
                    is_kept = is_kept[:, None] & is_last_lane[None, :]
                    tl.store(own_states + at[:, None] + lane[None, :] * 0, leaving, mask=is_kept)
            out = tl.reshape(out, [ROWS * LANES, STEPS])
            _store(y, out, pair_start, pair_token, length, pair_valid, STEPS)
            tl.debug_barrier()  # what comes next reads the states and outputs that this one stored


@triton.jit(do_not_specialize=SIZES)
def _map_gradient_kernel(
    grad_y,
    x,
    projected,
    weight,
    bias,
    A,
    D,
    states,
    gradients,
    grad_x,
    grad_dt,
    grad_matrices,
    grad_rows,
    length,
    channels,
    R,
    N,
    chunks,
    blocks,
    splits,
    batches,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """All gradients of one chunk, for one of `splits` parts of the channels.

    grad_x as x; grad_dt (2 orders, batch, 2 walks, D, L), before softplus; grad_matrices (splits,
    2, batch, 2, 2N, L) of B and C and grad_rows (4, batch, chunks, D, N + R + 2) of A, weight, D
    and bias are summed afterwards: no atomics.
    """
    pid = tl.program_id(0)
    split = pid % splits
    chunk = pid // splits % chunks
    sequence = pid // (splits * chunks)  # order · batches + image
    image = sequence % batches
    order = sequence // batches

    lane = tl.arange(0, LANES)
    pair = tl.arange(0, ROWS * LANES)
    token = (chunk * LANES + lane) * STEPS
    pair_token = (chunk * LANES + pair % LANES) * STEPS
    projected += sequence.to(tl.int64) * 2 * (R + 2 * N) * length
    grad_matrices += (split * 2 * batches + sequence).to(tl.int64) * 4 * N * length
    grad_dt += sequence.to(tl.int64) * 2 * channels * length

    first_block = split * blocks // splits
    for block in range(first_block, (split + 1) * blocks // splits):
        pair_row = block * ROWS + pair // LANES
        pair_valid = pair_row < channels
        pair_start = (sequence * channels + pair_row).to(tl.int64) * length
        row = block * ROWS + tl.arange(0, ROWS)
        valid = row < channels
        is_later = (token < length) & _repeat(block > first_block, LANES)
        for walk in tl.static_range(2):
            direction = order + 2 * walk
            low = projected + walk * (R + 2 * N) * length
            own = (direction * batches + image).to(tl.int64)
            entry, has_entry, way_out, has_way_out = _borders(chunk, chunks, walk == 1)
            entry_at = (own * (chunks - 1) + entry) * channels + row
            way_out_at = (own * (chunks - 1) + way_out) * channels + row
            sums = grad_rows + ((own * chunks + chunk) * channels + row) * (N + R + 2)
            for_b_at = grad_matrices + walk * 2 * N * length
            for_c_at = for_b_at + N * length

            dt = _step_sizes(
                low,
                weight + direction * channels * R,
                bias + direction * channels,
                pair_token,
                length,
                pair_row,
                pair_valid,
                R,
                STEPS,
            )
            dt = tl.reshape(dt, [ROWS, LANES, STEPS])
            inputs = _load(x, pair_start, pair_token, length, pair_valid, STEPS)
            inputs = tl.reshape(inputs, [ROWS, LANES, STEPS]) * dt
            dy = _load(grad_y, pair_start, pair_token, length, pair_valid, STEPS)
            dy = tl.reshape(dy, [ROWS, LANES, STEPS])
            span = tl.sum(dt, 2)
            for_inputs = tl.zeros([ROWS, LANES, STEPS], tl.float32)
            for_dt = tl.zeros([ROWS, LANES, STEPS], tl.float32)
            for n in range(N):
                a = tl.load(A + (direction * channels + row) * N + n, mask=valid, other=0.0)
                has_late = valid & _repeat(has_way_out, ROWS)
                late = tl.load(gradients + way_out_at * N + n, mask=has_late, other=0.0)
                has_carry = valid & _repeat(has_entry, ROWS)
                carry = tl.load(states + entry_at * N + n, mask=has_carry, other=0.0)
                matrix = low + (R + n) * length
                b = _load(matrix, token * 0, token, length, token < length, STEPS)
                c = _load(matrix + N * length, token * 0, token, length, token < length, STEPS)
                decay = tl.exp2(dt * (a * LOG2_E)[:, None, None])
                lane_decay = tl.exp2(span * (a * LOG2_E)[:, None])

                share = inputs * b[None]
                end = _lane_ends(decay, share, False, walk == 1)
                entering, leaving = _join_lanes(lane_decay, end, carry, walk == 1)
                inherited, state = _states(decay, share, entering, walk == 1)
                for_c = _sum_rows(state * dy, WARPS)

                share = dy * c[None]
                end = _lane_ends(decay, share, True, walk == 0)
                entering, leaving = _join_lanes(lane_decay, end, late, walk == 0)
                grad_state = _state_gradients(decay, share, entering, walk == 0)
                for_b = _sum_rows(grad_state * inputs, WARPS)

                for_inputs += grad_state * b[None]
                for_exponent = grad_state * inherited
                for_dt += for_exponent * a[:, None, None]
                for_a = tl.sum(tl.sum(for_exponent * dt, 2), 1)
                tl.store(sums + n, for_a, mask=valid)
                at = n * length
                for_b += _load(for_b_at + at, token * 0, token, length, is_later, STEPS)
                for_c += _load(for_c_at + at, token * 0, token, length, is_later, STEPS)
                _store(for_b_at + at, for_b, token * 0, token, length, token < length, STEPS)
                _store(for_c_at + at, for_c, token * 0, token, length, token < length, STEPS)

            inputs = _load(x, pair_start, pair_token, length, pair_valid, STEPS)
            inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])
            for_dt = (for_dt + for_inputs * inputs) * _softplus_slope(dt)
            for r in range(R):
                w = _load(low + r * length, token * 0, token, length, token < length, STEPS)
                for_weight = tl.sum(tl.sum(for_dt * w[None], 2), 1)
                tl.store(sums + N + r, for_weight, mask=valid)
            tl.store(sums + N + R, tl.sum(tl.sum(dy * inputs, 2), 1), mask=valid)
            tl.store(sums + N + R + 1, tl.sum(tl.sum(for_dt, 2), 1), mask=valid)
            skip = tl.load(D + direction * channels + row, mask=valid, other=0.0)
            for_inputs = for_inputs * dt + skip[:, None, None] * dy
            for_inputs = tl.reshape(for_inputs, [ROWS * LANES, STEPS])
            if walk == 1:
                for_inputs += _load(grad_x, pair_start, pair_token, length, pair_valid, STEPS)
            _store(grad_x, for_inputs, pair_start, pair_token, length, pair_valid, STEPS)
            for_dt = tl.reshape(for_dt, [ROWS * LANES, STEPS])
            dt_start = (walk * channels + pair_row).to(tl.int64) * length
            _store(grad_dt, for_dt, dt_start, pair_token, length, pair_valid, STEPS)
        tl.debug_barrier()  # the next block of channels adds to what this one stored


@triton.jit
def _to_orders_kernel(x, pixels, out, length, rows, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """out[o, row, l] = x[row, pixels[o, l]]; x (rows, L), pixels (2, L) int32."""
    order = tl.program_id(2)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pixel = tl.load(pixels + order * length + token, mask=token < length, other=0)[None, :]
    valid = (row < rows) & (token < length)[None, :]
    value = tl.load(x + row.to(tl.int64) * length + pixel, mask=valid)
    start = (order * rows + row).to(tl.int64) * length
    tl.store(out + start + token[None, :], value, mask=valid)


@triton.jit
def _from_orders_kernel(x, steps, out, length, rows, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """out[row, p] = x[0, row, steps[0, p]] + x[1, row, steps[1, p]]; the adjoint of the above."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    pixel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = (row < rows) & (pixel < length)[None, :]
    start = row.to(tl.int64) * length
    step = tl.load(steps + pixel, mask=pixel < length, other=0)[None, :]
    total = tl.load(x + start + step, mask=valid).to(tl.float32)
    step = tl.load(steps + length + pixel, mask=pixel < length, other=0)[None, :]
    second = (row + rows).to(tl.int64) * length
    total += tl.load(x + second + step, mask=valid).to(tl.float32)
    tl.store(out + start + pixel[None, :], total.to(out.dtype.element_ty), mask=valid)
