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
    _borders,
    _following,
    _join_lanes,
    _join_later_lanes,
    _lane_ends,
    _load,
    _load_for_rows,
    _repeat,
    _rows,
    _softplus,
    _state_gradients,
    _state_inputs,
    _states,
    _store,
    _store_row_sums,
    _sum_rows,
    _times,
    _tokens,
)


@triton.jit
def _step_sizes(
    low,
    weight,
    bias,
    row,
    chunk,
    length,
    R,
    first,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """dt = softplus(weight · low + bias) (ROWS, LANES, STEPS), 0 past the end; row (ROWS,).

    Two ranks at a time, in a circle from rank 2 · `first`. The first product stands before the
    loop: from it the sum takes its place in registers, each lane's tokens in one thread.
    """
    weight += row * R
    r = 2 * first
    raw = _rank_product(low, weight, r, R, chunk, length, ROWS, LANES, STEPS, WARPS, REVERSE)
    raw += _rank_product(low, weight, r + 1, R, chunk, length, ROWS, LANES, STEPS, WARPS, REVERSE)
    for _ in range(2, R, 2):
        r = tl.where(r + 2 < R, r + 2, 0)
        for rank in tl.static_range(2):
            raw += _rank_product(
                low, weight, r + rank, R, chunk, length, ROWS, LANES, STEPS, WARPS, REVERSE
            )
    raw += tl.load(bias + row)[:, None, None]
    token = _tokens(chunk, 1, LANES, STEPS, REVERSE)[None, :, None]
    at = token + tl.arange(0, STEPS)[None, None, :]
    return tl.where(at < length, _softplus(raw), 0.0)


@triton.jit
def _rank_product(
    low,
    weight,
    r,
    R,
    chunk,
    length,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """weight[r] · low[r] (ROWS, LANES, STEPS), 0 past the last rank; weight (ROWS,) pointers."""
    at = tl.minimum(r, R - 1)
    w = tl.where(r < R, tl.load(weight + at), 0.0)
    x = _load_for_rows(low + at * length, chunk, length, ROWS, LANES, STEPS, WARPS, REVERSE)
    return w[:, None, None] * x


@triton.jit
def _softplus_slope(dt):
    """d softplus = sigmoid = 1 - exp(-dt), to full relative precision for small dt too."""
    series = 1 - dt * (1 / 4 - dt * (1 / 20 - dt * (1 / 120)))
    series = dt * (1 - dt * (1 / 2) * (1 - dt * (1 / 3) * series))
    return tl.where(dt < 0.125, series, 1 - tl.exp2(-dt * LOG2_E))


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

    pair_row, _ = _rows(block, channels, ROWS, LANES)
    pair_start = (sequence * channels + pair_row).to(tl.int64) * length
    row, valid = _rows(block, channels, ROWS, 1)
    projected += sequence.to(tl.int64) * 2 * (R + 2 * N) * length
    n = pid % N
    for walk in tl.static_range(2):
        token = _tokens(chunk, 1, LANES, STEPS, (walk == 0) != GRADIENT)
        pair_token = _tokens(chunk, ROWS, LANES, STEPS, (walk == 0) != GRADIENT)
        direction = order + 2 * walk
        low = projected + walk * (R + 2 * N) * length
        matrix = low + R * length
        if GRADIENT:
            matrix += N * length
        dt = _step_sizes(
            low,
            weight + direction * channels * R,
            bias + direction * channels,
            row,
            chunk,
            length,
            R,
            pid % ((R + 1) // 2),
            ROWS,
            LANES,
            STEPS,
            1,
            (walk == 0) != GRADIENT,
        )
        inputs = _load(x, pair_start, pair_token, length, STEPS)
        inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])
        if not GRADIENT:
            inputs *= dt
        times, span = _times(dt, GRADIENT, (walk == 1) != GRADIENT)
        out = ((direction * batches + image) * chunks + chunk).to(tl.int64) * channels + row
        tl.store(spans + out, span, mask=valid)
        for _ in range(N):
            rate = tl.load(A + (direction * channels + row) * N + n) * LOG2_E
            w = _load(matrix + n * length, token * 0, token, length, STEPS)
            share = tl.exp2(times * rate[:, None, None]) * inputs * w[None]
            tl.store(ends + out * N + n, tl.sum(tl.sum(share, 2), 1), mask=valid)
            n = _following(n, N)


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

    pair_row, pair_valid = _rows(block, channels, ROWS, LANES)
    pair_start = (sequence * channels + pair_row).to(tl.int64) * length
    row, valid = _rows(block, channels, ROWS, 1)
    lane = tl.arange(0, LANES)
    projected += sequence.to(tl.int64) * 2 * (R + 2 * N) * length
    n = tl.program_id(0) % N
    for walk in tl.static_range(2):
        direction = order + 2 * walk
        low = projected + walk * (R + 2 * N) * length
        B = low + R * length
        C = B + N * length
        own_A = A + (direction * channels + row) * N
        own_states = states + (direction * batches + image).to(tl.int64) * (
            (chunks - 1) * channels * N
        )
        for index in range(count):
            chunk = first + index
            if STREAM and walk == 1:
                chunk = chunks - 1 - index
            token = _tokens(chunk, 1, LANES, STEPS, walk == 1)
            pair_token = _tokens(chunk, ROWS, LANES, STEPS, walk == 1)
            entry, has_entry, way_out, has_way_out = _borders(chunk, chunks, walk == 1)
            carries = own_states + (entry * channels + row) * N
            rate, carry, b, c = _state_inputs(own_A, carries, B, C, n, token, length, STEPS)
            dt = _step_sizes(
                low,
                weight + direction * channels * R,
                bias + direction * channels,
                row,
                chunk,
                length,
                R,
                tl.program_id(0) % ((R + 1) // 2),
                ROWS,
                LANES,
                STEPS,
                1,
                walk == 1,
            )
            inputs = _load(x, pair_start, pair_token, length, STEPS)
            out = tl.load(D + direction * channels + pair_row)[:, None] * inputs
            if walk == 1:
                out += _load(y, pair_start, pair_token, length, STEPS)
            inputs = tl.reshape(inputs, [ROWS, LANES, STEPS]) * dt
            out = tl.reshape(out, [ROWS, LANES, STEPS])
            span = tl.sum(dt, 2)
            is_kept = _repeat(has_way_out, LANES) & (lane == LANES - 1)
            for _ in range(N):
                following = _following(n, N)
                next_rate, next_carry, next_b, next_c = _state_inputs(
                    own_A, carries, B, C, following, token, length, STEPS
                )
                decay = tl.exp2(dt * rate[:, None, None])
                share = inputs * b[None]
                end = _lane_ends(decay, share, False, walk == 1)
                lane_decay = tl.exp2(span * rate[:, None])
                carry = tl.where(has_entry, carry, 0.0)
                entering, leaving = _join_lanes(lane_decay, end, carry)
                inherited, state = _states(decay, share, entering, walk == 1)
                out += state * c[None]
                if STREAM:
                    at = own_states + (way_out * channels + row) * N + n
                    is_stored = valid[:, None] & is_kept[None, :]
                    tl.store(at[:, None] + lane[None, :] * 0, leaving, mask=is_stored)
                n, rate, carry, b, c = following, next_rate, next_carry, next_b, next_c
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
    2, batch, 2, 2N, L) of B and C and grad_rows (4, batch, chunks, D, N + 2) of A, D and bias are
    summed afterwards: no atomics.
    """
    pid = tl.program_id(0)
    split = pid % splits
    chunk = pid // splits % chunks
    sequence = pid // (splits * chunks)  # order · batches + image
    image = sequence % batches
    order = sequence // batches

    TILE: tl.constexpr = LANES * STEPS
    projected += sequence.to(tl.int64) * 2 * (R + 2 * N) * length
    grad_dt += sequence.to(tl.int64) * 2 * channels * length
    # of B, then of C
    sum_index = tl.max_contiguous(tl.arange(0, 2 * TILE), 1)
    sum_lane = sum_index % TILE // STEPS
    grad_matrices += (split * 2 * batches + sequence).to(tl.int64) * 4 * N * length
    grad_matrices += sum_index // TILE * N * length

    n = pid % N
    first_block = split * blocks // splits
    for block in range(first_block, (split + 1) * blocks // splits):
        pair_row, pair_valid = _rows(block, channels, ROWS, LANES)
        pair_start = (sequence * channels + pair_row).to(tl.int64) * length
        row, valid = _rows(block, channels, ROWS, 1)
        for walk in tl.static_range(2):
            direction = order + 2 * walk
            pair_token = _tokens(chunk, ROWS, LANES, STEPS, walk == 1)
            if walk == 1:
                sum_token = (chunk * LANES + LANES - 1 - sum_lane) * STEPS + sum_index % STEPS
            else:
                sum_token = chunk * TILE + sum_index % TILE
            is_later = (sum_token < length) & _repeat(block > first_block, 2 * TILE)
            low = projected + walk * (R + 2 * N) * length
            B = low + R * length
            C = B + N * length
            own = (direction * batches + image).to(tl.int64)
            entry, has_entry, way_out, has_way_out = _borders(chunk, chunks, walk == 1)
            carries = states + ((own * (chunks - 1) + entry) * channels + row) * N
            lates = gradients + ((own * (chunks - 1) + way_out) * channels + row) * N
            row_sums = grad_rows + ((own * chunks + chunk) * channels + row) * (N + 2)
            sums_at = grad_matrices + walk * 2 * N * length + sum_token

            dt = _step_sizes(
                low,
                weight + direction * channels * R,
                bias + direction * channels,
                row,
                chunk,
                length,
                R,
                pid % ((R + 1) // 2),
                ROWS,
                LANES,
                STEPS,
                WARPS,
                walk == 1,
            )
            # rows that are not there add nothing to the sums over rows
            inputs = _load(x, pair_start, pair_token, length, STEPS)
            inputs = tl.where(pair_valid[:, None], inputs, 0.0)
            inputs = tl.reshape(inputs, [ROWS, LANES, STEPS]) * dt
            dy = _load(grad_y, pair_start, pair_token, length, STEPS)
            dy = tl.where(pair_valid[:, None], dy, 0.0)
            dy = tl.reshape(dy, [ROWS, LANES, STEPS])
            span = tl.sum(dt, 2)
            for_inputs = tl.zeros([ROWS, LANES, STEPS], tl.float32)
            for_dt = tl.zeros([ROWS, LANES, STEPS], tl.float32)
            for _ in range(N):
                a = tl.load(A + (direction * channels + row) * N + n)
                late = tl.where(has_way_out, tl.load(lates + n), 0.0)
                carry = tl.where(has_entry, tl.load(carries + n), 0.0)
                b = _load_for_rows(
                    B + n * length, chunk, length, ROWS, LANES, STEPS, WARPS, walk == 1
                )
                c = _load_for_rows(
                    C + n * length, chunk, length, ROWS, LANES, STEPS, WARPS, walk == 1
                )
                decay = tl.exp2(dt * (a * LOG2_E)[:, None, None])
                lane_decay = tl.exp2(span * (a * LOG2_E)[:, None])

                share = inputs * b
                end = _lane_ends(decay, share, False, walk == 1)
                entering, leaving = _join_lanes(lane_decay, end, carry)
                inherited, state = _states(decay, share, entering, walk == 1)

                share = dy * c
                end = _lane_ends(decay, share, True, walk == 0)
                entering = _join_later_lanes(lane_decay, end, late)
                grad_state = _state_gradients(decay, share, entering, walk == 0)

                sums = _sum_rows(grad_state * inputs, state * dy, WARPS)
                sums += tl.load(sums_at + n * length, mask=is_later, other=0.0)
                tl.store(sums_at + n * length, sums, mask=sum_token < length)
                for_inputs += grad_state * b
                for_exponent = grad_state * inherited
                for_dt += for_exponent * a[:, None, None]
                _store_row_sums(row_sums + n, for_exponent * dt, valid)
                n = _following(n, N)

            inputs = _load(x, pair_start, pair_token, length, STEPS)
            inputs = tl.reshape(inputs, [ROWS, LANES, STEPS])
            for_dt = (for_dt + for_inputs * inputs) * _softplus_slope(dt)
            _store_row_sums(row_sums + N, dy * inputs, valid)
            _store_row_sums(row_sums + N + 1, for_dt, valid)
            skip = tl.load(D + direction * channels + row)
            for_inputs = for_inputs * dt + skip[:, None, None] * dy
            for_inputs = tl.reshape(for_inputs, [ROWS * LANES, STEPS])
            if walk == 1:
                for_inputs += _load(grad_x, pair_start, pair_token, length, STEPS)
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
