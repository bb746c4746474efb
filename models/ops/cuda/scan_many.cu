// The selective scan of many states a channel, forward and backward.
//
// A block brings B and C of its chunk to shared memory and walks through the states; a warp's rows
// take over each state from the chunk before, one word a row. With the numbers of rows, tokens and
// states that occur, a chunk is rarely at a state before the chunk before has passed it.
//
// The forward joins the lanes of a segment state by state, by exchange. The backward, which joins
// them in both directions, does so for a group of states at once: each lane leaves what its tokens
// do to a state in shared memory, joins all lanes for one state, and walks its own tokens again.

#include "steps.cuh"

// Scalars on their way through shared memory, a pass ahead like the tokens: of each row of a warp
// the bias, the skip and A of the first 16 states. A warp has two sets, used in turn.
#define ROW_SCALARS 18
#define SCALARS (WARP_ROWS * ROW_SCALARS)
#define SCALAR_SLOTS (THREADS / LANES * 2 * SCALARS)  // of a block

__device__ inline float *scalar_slots_of(float *slots, int pass) {
    return slots + ((int)threadIdx.x / LANES * 2 + pass % 2) * SCALARS +
           (int)threadIdx.x % SEGMENTS * ROWS * ROW_SCALARS;
}

__device__ inline void fetch_scalars(const Scan &scan, const Place &place, const Rows &rows,
                                     float *slots, int pass) {
#if PREFETCH
    float *slot = scalar_slots_of(slots, pass);
    int n = threadIdx.x % LANES / SEGMENTS;
    EACH_ROW {
        long long channel = channel_of(scan, place, rows, r);
        const float *own = n == 0 ? scan.bias : scan.D;
        if (n < 2)
            copy_later<4>(slot + r * ROW_SCALARS + n, own == nullptr ? scan.A : own + channel,
                          own != nullptr);
        if (n < min(scan.states, 16))
            copy_later<4>(slot + r * ROW_SCALARS + 2 + n, scan.A + channel * scan.states + n, true);
    }
#endif
}

__device__ inline Scalars take_scalars(const Scan &scan, const Place &place, const Rows &rows,
                                       float *slots, int pass) {
#if PREFETCH
    Scalars scalars;
    const float *slot = scalar_slots_of(slots, pass);
    int n = threadIdx.x % LANES / SEGMENTS % 16;
    __syncwarp();  // lanes fetched for one another
    EACH_ROW {
        scalars.bias[r] = slot[r * ROW_SCALARS], scalars.skip[r] = slot[r * ROW_SCALARS + 1];
        scalars.rates[r] = slot[r * ROW_SCALARS + 2 + min(n, scan.states - 1)];
    }
    return scalars;
#else
    return scalars_of(scan, place, rows);
#endif
}

// The rates of states `first` on, for base 2; those of the first came with the other scalars.
__device__ inline void begin_rates(const Scan &scan, const Place &place, const Rows &rows,
                                   int first, Scalars &scalars) {
    if (first > 0) load_rates(scan, place, rows, first, scalars);
    EACH_ROW scalars.rates[r] = rate_of(scan, scalars.rates[r]);
}

// In shared memory: for each state its rows of B and C and, in a backward, of their gradients; rows
// of dt_low; lines of a backward (below); scalars and tokens on their way.
#define FORWARD_ROWS 2  // of a state
#define BACKWARD_ROWS 4

__device__ inline float4 *low_of(const Scan &scan, float4 *shared, int rows) {
    return shared + rows * TILE_ROW * min(scan.states, STAGE);
}

__device__ inline float4 *after_low(const Scan &scan, float4 *low) {
    return low + TILE_ROW * min(scan.rank, 2 * STAGE);
}

// B and C of states [first, first + count).
__device__ inline void stage_matrices(const Scan &scan, const Place &place, int first, int count,
                                      float4 *states, int rows) {
    long long start = place.matrix + (long long)first * scan.length;
    const MATRIX *matrices[2] = {scan.B + start, scan.C + start};
    stage(matrices, count, states, rows, scan, place);
}

// Hidden from the compiler, so that it computes what depends on it anew instead of keeping it.
__device__ inline int hidden(int x) {
    keep(x);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    __shared__ Place place;
    Self self;
    take_place(scan, false, place, self);
    float4 *low = low_of(scan, shared, FORWARD_ROWS);
    float *scalar_slots = (float *)after_low(scan, low);
    Four<TOKENS> *slots = (Four<TOKENS> *)(scalar_slots + SCALAR_SLOTS);
    int length = scan.length;
    Rows rows = rows_of(scan, place, self, 0);
    fetch_inputs(scan, place, self, rows, slots, slots + SLOTS);
    fetch_scalars(scan, place, rows, scalar_slots, 0);
    if (scan.rank <= 2 * STAGE) stage_low(scan, place, 0, low);
    stage_matrices(scan, place, 0, min(scan.states, STAGE), shared, FORWARD_ROWS);
    __syncthreads();

    for (int pass = 0; pass < scan.passes; pass++) {
        Tokens dt, input, y;
        float span[ROWS], span_up[ROWS];
        rows = rows_of(scan, place, self, hidden(pass));
        bool takes_over = place.chunk > 0 && rows.is_there[0];
        bool hands_on = place.chunk + 1 < scan.chunks && rows.is_there[0] &&
                        self.lane == SEGMENT - 1;
        const float *entry = scan.borders + border_of(scan, place, rows.row[0], 0, place.chunk - 1);
        float *way_out = scan.borders + border_of(scan, place, rows.row[0], 0, place.chunk);
        unsigned border = 0;
        if (PREFETCH) wait_for_copies();
        Scalars scalars = take_scalars(scan, place, rows, scalar_slots, pass);
        EACH_ROW take_tokens(scan.u + place.shared + (long long)rows.row[r] * length, slots,
                             r, self.at, length, place.reversed, input[r]);
        step_sizes(scan, place, self, rows, scalars, slots + SLOTS, low, dt);
        EACH_ROW EACH_STEP y[r][i] = scalars.skip[r] * input[r][i];
        begin_rows(dt, input, span);
        sum_up(span, self.lane, span_up);
        if (PREFETCH && pass + 1 < scan.passes) {
            Rows next = rows_of(scan, place, self, hidden(pass + 1));
            fetch_inputs(scan, place, self, next, slots, slots + SLOTS);
            fetch_scalars(scan, place, next, scalar_slots, pass + 1);
        }
        for (int first = 0; first < scan.states; first += STAGE) {
            int count = min(scan.states - first, STAGE);
            begin_rates(scan, place, rows, first, scalars);
            if (first > 0) {
                __syncthreads();
                stage_matrices(scan, place, first, count, shared, FORWARD_ROWS);
                __syncthreads();
            }
            const float4 *tile = shared + self.lane;
            for (int k = 0; k < count; k++) {
                Tokens decay;
                float b[STEPS], c[STEPS], rate[ROWS], whole[ROWS], end[ROWS];
                float state[ROWS];
                read_handed(entry, takes_over, border);
                read_tile(tile, b);
                EACH_ROW rate[r] = of_lane(scalars.rates[r], k);
                walk(dt, input, rate, b, decay, end);
                decay_over(span, rate, whole);
                join_lanes(whole, end, self.lane);
                decay_over(span_up, rate, whole);
                wait_for(scan, entry, end[0], border);
                float carry = __uint_as_float(border);
                float last = fmaf(whole[0], carry, end[0]);
                if (hands_on) write_handed(way_out, __float_as_uint(last));
                state[0] = from_lane_before(last, carry, self.lane);
                read_tile(tile + TILE_ROW, c);
                add_outputs(decay, input, b, c, state, y);
                entry += scan.channels, way_out += scan.channels;
                tile += FORWARD_ROWS * TILE_ROW;
            }
        }
        rows = rows_of(scan, place, self, hidden(pass));
        EACH_ROW if (rows.is_there[r])
            store_tokens(scan.y + place.own + (long long)rows.row[r] * length, self.at, length,
                         place.reversed, y[r]);
    }
}

// The block's sums for B and C, from shared memory to where its part lies.
__device__ inline void store_sums(const Scan &scan, const Place &place, int first, int count,
                                  const float4 *states) {
    const int lanes = CHUNK / STEPS;
    float *parts = parts_of(scan, place);
    for (int task = threadIdx.x; task < 2 * count * lanes; task += THREADS) {
        int row = task / lanes, kind = row % 2, lane = task % lanes;
        float value[STEPS];
        read_tile(states + (row / 2 * BACKWARD_ROWS + 2 + kind) * TILE_ROW + lane, value);
        store_tokens(parts + kind * scan.part_kind_stride +
                         (long long)(first + row / 2) * scan.length,
                     place.chunk * CHUNK + lane * STEPS, scan.length, place.reversed, value);
    }
}

#define GROUP 8           // states that a backward joins at once
#define LINE (LANES + 4)  // a number of each lane, and four that keep banks apart
#define ROW_LINES (2 * GROUP * LINE)  // all lines of a row
#define LINES (ROWS * ROW_LINES)      // and of a warp

// A line is for one row, one state of a group and one direction: what the lanes hand on if zero
// enters them, then what enters them, the last lane first where it goes back. Its last four numbers
// are spans, of lanes 4 * state to 4 * state + 3 in that order.
__device__ inline float *line_of(float *lines, int row, int state, bool is_back) {
    return lines + row * ROW_LINES + (state * 2 + is_back) * LINE;
}

__device__ inline void write_spans(float *lines, const float (&span)[ROWS], int lane) {
    int back = LANES - 1 - lane;
    EACH_ROW {
        line_of(lines, r, lane / 4, false)[LANES + lane % 4] = span[r];
        line_of(lines, r, back / 4, true)[LANES + back % 4] = span[r];
    }
}

typedef float Decays[LANES];  // of the lanes of a line

__device__ inline void decays_of(const float *spans, float rate, Decays &decay) {
#pragma unroll
    for (int i = 0; i < LANES; i += 4) {
        float4 span = *(const float4 *)(spans + i / 4 * 2 * LINE);
        decay[i] = exp2_fast(span.x * rate), decay[i + 1] = exp2_fast(span.y * rate);
        decay[i + 2] = exp2_fast(span.z * rate), decay[i + 3] = exp2_fast(span.w * rate);
    }
}

// What leaves the last lane of a line if `entering` enters the first. With `fill`, what enters each
// lane takes the place of what it hands on if zero does.
template <bool fill>
__device__ inline float follow_line(float *line, const Decays &decay, float entering) {
#pragma unroll
    for (int i = 0; i < LANES; i += 4) {
        float4 *at = (float4 *)(line + i);
        float4 end = *at, in;
        in.x = entering;
        in.y = fmaf(decay[i], in.x, end.x);
        in.z = fmaf(decay[i + 1], in.y, end.y);
        in.w = fmaf(decay[i + 2], in.z, end.z);
        entering = fmaf(decay[i + 3], in.w, end.w);
        if (fill) *at = in;
    }
    return entering;
}

// A sum over a line by two neighbouring lanes, each of one half.
__device__ inline float sum_line(const float *line, int half) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < LANES / 8; k++) {
        float4 four = ((const float4 *)line)[half * (LANES / 8) + k];
        sum += (four.x + four.y) + (four.z + four.w);
    }
    return sum + __shfl_xor_sync(ALL, sum, 1);
}

// Warps add to the block's sums of a state one after the other, in the order in which they come to
// it: each begins at another state, as far as there are any. Who is next stands in turns[state].
__device__ inline int first_warp(int state) { return min(state % GROUP, ROW_WARPS - 1); }

__device__ inline int next_warp(int warp) {
    if (warp + GROUP < ROW_WARPS) return warp + GROUP;
    return (warp % GROUP == 0 ? min(GROUP, ROW_WARPS) : warp % GROUP) - 1;
}

// B and C of states [first, first + count), and nothing yet in their sums.
__device__ inline void begin_states(const Scan &scan, const Place &place, int first, int count,
                                    float4 *states, int *turns) {
    stage_matrices(scan, place, first, count, states, BACKWARD_ROWS);
    for (int i = threadIdx.x; i < 2 * TILE_ROW * count; i += THREADS)
        states[(i / (2 * TILE_ROW) * BACKWARD_ROWS + 2) * TILE_ROW + i % (2 * TILE_ROW)] =
            make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.x < STAGE) turns[threadIdx.x] = first_warp(threadIdx.x);
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    __shared__ Place place;
    __shared__ int turns[STAGE];
    Self self;
    take_place(scan, true, place, self);
    float4 *low = low_of(scan, shared, BACKWARD_ROWS);
    float *lines = (float *)after_low(scan, low);
    // u twice: it is needed once more at the end of a pass
    float *scalar_slots = lines + ROW_WARPS * LINES;
    Four<TOKENS> *u_slots = (Four<TOKENS> *)(scalar_slots + SCALAR_SLOTS);
    Four<TOKENS> *grad_slots = u_slots + 2 * SLOTS, *delta_slots = grad_slots + SLOTS;
    lines += self.row_warp * LINES;
    int length = scan.length;
    Rows rows = rows_of(scan, place, self, 0);
    fetch_inputs(scan, place, self, rows, u_slots, delta_slots);
    fetch_gradients(scan, place, self, rows, grad_slots);
    fetch_scalars(scan, place, rows, scalar_slots, 0);
    if (scan.rank <= 2 * STAGE) stage_low(scan, place, 0, low);
    begin_states(scan, place, 0, min(scan.states, STAGE), shared, turns);

    for (int pass = 0; pass < scan.passes; pass++) {
        Tokens dt, input, dy;
        float span[ROWS];
        ForTokens token_sums = {};
        const Four<TOKENS> *slots = u_slots + pass % 2 * SLOTS;
        rows = rows_of(scan, place, self, hidden(pass));
        if (PREFETCH) wait_for_copies();
        Scalars scalars = take_scalars(scan, place, rows, scalar_slots, pass);
        EACH_ROW {
            long long start = (long long)rows.row[r] * length;
            take_tokens(scan.u + place.shared + start, slots, r, self.at, length,
                        place.reversed, input[r]);
            take_tokens(scan.grad_y + place.grad + start, grad_slots, r, self.at, length,
                        place.reversed, dy[r]);
            if (!rows.is_there[r]) EACH_STEP dy[r][i] = 0.0f;
        }
        step_sizes(scan, place, self, rows, scalars, delta_slots, low, dt);
        begin_rows(dt, input, span);
        write_spans(lines, span, self.lane);
        float chunk_span[1] = {halve_lanes(span, self.lane)};  // of the line's row
        sum_halves(chunk_span);
        keep(chunk_span[0]);
        if (PREFETCH && pass + 1 < scan.passes) {
            Rows next = rows_of(scan, place, self, hidden(pass + 1));
            fetch_inputs(scan, place, self, next, u_slots + (pass + 1) % 2 * SLOTS,
                         delta_slots);
            fetch_gradients(scan, place, self, next, grad_slots);
            fetch_scalars(scan, place, next, scalar_slots, pass + 1);
        }

        for (int first = 0; first < scan.states; first += STAGE) {
            int count = min(scan.states - first, STAGE);
            begin_rates(scan, place, rows, first, scalars);
            if (first > 0) begin_states(scan, place, first, count, shared, turns);
            for (int from = 0; from < count; from += GROUP) {
                int group = min(count - from, GROUP);
                // what enters the chunk, for the line that this lane will join; asked for early
                int second = self.lane / 16, member = self.lane % 16 / 2, is_back = self.lane % 2;
                int own = min(member, group - 1);
                float *line = line_of(lines, second, member, is_back);
                long long border_step = (long long)scan.states * scan.channels;
                Rows at = rows_of(scan, place, self, hidden(pass));
                bool is_there = second ? at.is_there[ROWS - 1] : at.is_there[0];
                bool has_line = member < group && is_there;
                bool takes_over = is_back ? place.chunk + 1 < scan.chunks : place.chunk > 0;
                const float *entry = (is_back ? scan.grad_borders : scan.borders - border_step) +
                                     border_of(scan, place, second ? at.row[ROWS - 1] : at.row[0],
                                               first + from + own, place.chunk);
                float4 *tile = shared + from * BACKWARD_ROWS * TILE_ROW + self.lane;
                unsigned border = look(entry, has_line && takes_over);

                // each lane's tokens, if zero enters them
                for (int k = 0; k < group; k++) {
                    Tokens decay;
                    float b[STEPS], c[STEPS], rate[ROWS], end[ROWS], end_back[ROWS];
                    read_tile(tile + k * BACKWARD_ROWS * TILE_ROW, b);
                    read_tile(tile + (k * BACKWARD_ROWS + 1) * TILE_ROW, c);
                    EACH_ROW rate[r] = of_lane(scalars.rates[r], from + k);
                    walk(dt, input, rate, b, decay, end);
                    walk_back(decay, dy, c, end_back);
                    EACH_ROW {
                        line_of(lines, r, k, false)[self.lane] = end[r];
                        line_of(lines, r, k, true)[LANES - 1 - self.lane] = end_back[r];
                    }
                }
                __syncwarp();

                // all lanes of a line, first alone, so that what goes on is not long in coming
                float line_rates[ROWS];
                EACH_ROW line_rates[r] = of_lane(scalars.rates[r], from + own);
                float line_rate = second ? line_rates[ROWS - 1] : line_rates[0];
                Decays decay;
                decays_of(line_of(lines, second, 0, is_back) + LANES, line_rate, decay);
                float end = follow_line<false>(line, decay, 0.0f);
                wait_for(scan, entry, end, border);
                float entering = __uint_as_float(border);
                float last = fmaf(exp2_fast(line_rate * chunk_span[0]), entering, end);
                if (is_back && has_line && place.chunk > 0)
                    write_handed((void *)(entry - border_step), __float_as_uint(last));
                follow_line<true>(line, decay, entering);
                __syncwarp();

                // each lane's tokens again, each warp beginning at another state
                int k = self.row_warp % GROUP;
                do {
                    if (k < group) {
                        Tokens decay;
                        float b[STEPS], c[STEPS], for_b[STEPS] = {}, for_c[STEPS] = {};
                        float rate[ROWS], state[ROWS], back[ROWS], for_rate[ROWS];
                        float4 *own_tile = tile + k * BACKWARD_ROWS * TILE_ROW;
                        read_tile(own_tile, b);
                        read_tile(own_tile + TILE_ROW, c);
                        EACH_ROW {
                            rate[r] = of_lane(scalars.rates[r], from + k);
                            state[r] = line_of(lines, r, k, false)[self.lane];
                            back[r] = line_of(lines, r, k, true)[LANES - 1 - self.lane];
                            EACH_STEP decay[r][i] = exp2_fast(dt[r][i] * rate[r]);
                        }
                        int *turn = turns + from + k;
                        int seen = read_flag(turn);
                        add_gradients(dt, input, dy, decay, rate, b, c, state, back, for_b, for_c,
                                      token_sums, for_rate);
                        EACH_ROW line_of(lines, r, k, false)[self.lane] = for_rate[r];
                        while (seen != self.row_warp) {
                            WHILE_WAITING;
                            seen = read_flag(turn);
                        }
                        add_to_tile(own_tile + 2 * TILE_ROW, for_b);
                        add_to_tile(own_tile + 3 * TILE_ROW, for_c);
                        __syncwarp();
                        if (self.lane == 0) write_flag(turn, next_warp(self.row_warp));
                    }
                    k = (k + 1) % GROUP;
                } while (k != self.row_warp % GROUP);

                // the gradient of the rate
                float sum = sum_line(line - is_back * LINE, is_back);
                RowSums row_sums =
                    row_sums_of(scan, place, self, rows_of(scan, place, self, hidden(pass)));
                if (has_line && !is_back)
                    row_sums.at[first + from + member] = for_held(scan, sum, line_rate);
                __syncwarp();
            }
            if (pass + 1 == scan.passes) {
                __syncthreads();
                store_sums(scan, place, first, count, shared);
                if (scan.states > STAGE) __syncthreads();
            }
        }
        rows = rows_of(scan, place, self, hidden(pass));
        RowSums row_sums = row_sums_of(scan, place, self, rows);
        finish_rows(scan, place, self, rows, take_scalars(scan, place, rows, scalar_slots, pass),
                    slots, dt, dy, token_sums, row_sums);
    }
}
