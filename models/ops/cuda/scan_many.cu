// The selective scan of many states a channel, forward and backward.
//
// A block brings B and C of its chunk to shared memory and walks through the states; a warp's rows
// take over each state from the chunk before, one word a row. With the numbers of rows, tokens and
// states that occur, a chunk is rarely at a state before the chunk before has passed it.

#include "steps.cuh"

// The rates of states `first` on, for base 2; those of the first came with the other scalars.
__device__ inline void begin_rates(const Scan &scan, const Place &place, const Rows &rows,
                                   int first, Scalars &scalars) {
    if (first > 0) load_rates(scan, place, rows, first, scalars);
    EACH_ROW scalars.rates[r] = rate_of(scan, scalars.rates[r]);
}

// Where in shared memory: dt_low, B and C, and their gradients, then tokens on their way.
struct Areas {
    float4 *low, *matrices, *sums;
    Four<TOKENS> *slots;
};

__device__ inline Areas areas_of(const Scan &scan, float4 *shared, bool backward) {
    Areas areas;
    int states = min(scan.states, STAGE);
    areas.low = shared;
    areas.matrices = areas.low + TILE_ROW * min(scan.rank, 2 * STAGE);
    areas.sums = areas.matrices + 2 * TILE_ROW * states;
    areas.slots = (Four<TOKENS> *)(areas.sums + (backward ? 2 * TILE_ROW * states : 0));
    return areas;
}

// B and C of states [first, first + count) in turn.
__device__ inline void stage_matrices(const Scan &scan, const Place &place, int first, int count,
                                      float4 *matrices) {
    long long start = place.matrix + (long long)first * scan.length;
    stage(scan.B + start, count, matrices, 2, scan, place);
    stage(scan.C + start, count, matrices + TILE_ROW, 2, scan, place);
}

// Borders are (batch, groups, chunks - 1, states, channels), the last even: a warp reads and writes
// those of two rows at once.
__device__ inline int border_width(const Scan &scan) { return (scan.channels + 1) / 2 * 2; }

// Where the rows' borders after chunk `chunk` lie.
__device__ inline long long border_of(const Scan &scan, const Place &place, const Rows &rows,
                                      int chunk) {
    long long sequence = (long long)place.batch * scan.groups + place.group;
    int width = border_width(scan);
    return (sequence * (scan.chunks - 1) + chunk) * scan.states * width +
           min(rows.first, width - ROWS);
}

// A state of a lane's rows at a border.
#if ROWS == 2
typedef unsigned long long Border;
#else
typedef unsigned Border;
#endif

__device__ inline float state_of(Border border, int r) {
    return __uint_as_float((unsigned)(r == 0 ? border : border >> (LANES * (ROWS - 1))));
}

// 0 where nothing is handed on.
__device__ inline Border look(const float *at, bool is_there) {
    Border border = 0;
    read_handed(at, is_there, border);
    return border;
}

__device__ inline void hand_on(float *at, const float (&state)[ROWS]) {
#if ROWS == 2
    write_handed(at, pair_of(state[0], state[1]));
#else
    write_handed(at, __float_as_uint(state[0]));
#endif
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
    Areas areas = areas_of(scan, shared, false);
    int length = scan.length, width = border_width(scan);
    const float4 *tile = areas.matrices + self.lane;
    Rows rows = rows_of(scan, place, self, 0);
    fetch_inputs(scan, place, self, rows, areas.slots, areas.slots + SLOTS);
    Scalars scalars = scalars_of(scan, place, rows);

    for (int pass = 0; pass < scan.passes; pass++) {
        Tokens dt, input, y;
        float span[ROWS], span_up[ROWS];
        rows = rows_of(scan, place, self, hidden(pass));
        bool has_border = rows.first < width;
        bool takes_over = place.chunk > 0 && has_border;
        bool hands_on = place.chunk + 1 < scan.chunks && has_border && self.lane == SEGMENT - 1;
        const float *entry = scan.borders + border_of(scan, place, rows, place.chunk - 1);
        float *way_out = scan.borders + border_of(scan, place, rows, place.chunk);
        Border border = 0;
        if (PREFETCH) wait_for_copies();
        EACH_ROW take_tokens(scan.u + place.shared + (long long)rows.row[r] * length, areas.slots,
                             r, self.at, length, place.reversed, input[r]);
        step_sizes(scan, place, self, rows, scalars, areas.slots + SLOTS, areas.low, pass == 0,
                   dt);
        EACH_ROW EACH_STEP y[r][i] = scalars.skip[r] * input[r][i];
        begin_rows(dt, input, span);
        sum_up(span, self.lane, span_up);
        if (PREFETCH && pass + 1 < scan.passes)
            fetch_inputs(scan, place, self, rows_of(scan, place, self, hidden(pass + 1)),
                         areas.slots, areas.slots + SLOTS);
        Scalars coming = scalars_of(scan, place, rows_of(scan, place, self, hidden(pass + 1)));
        for (int first = 0; first < scan.states; first += STAGE) {
            int count = min(scan.states - first, STAGE);
            begin_rates(scan, place, rows, first, scalars);
            if (pass == 0 || scan.states > STAGE) {
                __syncthreads();
                stage_matrices(scan, place, first, count, areas.matrices);
                __syncthreads();
            }
            for (int k = 0; k < count; k++) {
                Tokens decay;
                float b[STEPS], c[STEPS], rate[ROWS], whole[ROWS], end[ROWS];
                float carry[ROWS], last[ROWS], state[ROWS];
                read_handed(entry, takes_over, border);
                read_tile(tile + 2 * k * TILE_ROW, b);
                EACH_ROW rate[r] = of_lane(scalars.rates[r], k);
                walk(dt, input, span, rate, b, decay, whole, end);
                join_lanes(whole, end, self.lane);
                decay_over(span_up, rate, whole);
                wait_for(scan, entry, end[0], border);
                EACH_ROW carry[r] = state_of(border, r);
                EACH_ROW last[r] = fmaf(whole[r], carry[r], end[r]);
                if (hands_on) hand_on(way_out, last);
                EACH_ROW state[r] = from_lane_before(last[r], carry[r], self.lane);
                entry += width, way_out += width;
                read_tile(tile + (2 * k + 1) * TILE_ROW, c);
                add_outputs(decay, input, b, c, state, y);
            }
        }
        rows = rows_of(scan, place, self, hidden(pass));
        EACH_ROW if (rows.is_there[r])
            store_tokens(scan.y + place.own + (long long)rows.row[r] * length, self.at, length,
                         place.reversed, y[r]);
        scalars = coming;
    }
}

// Warps add to the block's sums of one state after the other, each at another state than the rest;
// the next to come to a state is the warp before. Turns count from when the sums were cleared.
struct Turns {
    int *done;  // turns of each warp
    int warp, count;

    __device__ inline int other() const { return warp == ROW_WARPS - 1 ? 0 : warp + 1; }
    __device__ inline int seen() const { return read_flag(done + other()); }
    __device__ inline void wait(int turn, int seen) const {
        int needed = warp == ROW_WARPS - 1 ? turn + ROW_WARPS - count : turn;
        while (seen < needed) {
            WHILE_WAITING;
            seen = read_flag(done + other());
        }
    }
};

// The block's sums for B and C, from shared memory to where its part lies.
__device__ inline void store_sums(const Scan &scan, const Place &place, int first, int count,
                                  const float4 *sums) {
    const int lanes = CHUNK / STEPS;
    float *parts = parts_of(scan, place);
    for (int task = threadIdx.x; task < 2 * count * lanes; task += THREADS) {
        int row = task / lanes, kind = row % 2, lane = task % lanes;
        float value[STEPS];
        read_tile(sums + row * TILE_ROW + lane, value);
        store_tokens(parts + kind * scan.part_kind_stride +
                         (long long)(first + row / 2) * scan.length,
                     place.chunk * CHUNK + lane * STEPS, scan.length, place.reversed, value);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    __shared__ Place place;
    __shared__ int done[ROW_WARPS];
    Self self;
    take_place(scan, true, place, self);
    Areas areas = areas_of(scan, shared, true);
    // u twice: it is needed once more at the end of a pass
    Four<TOKENS> *grad_slots = areas.slots + 2 * SLOTS, *delta_slots = grad_slots + SLOTS;
    int length = scan.length, width = border_width(scan);
    const float4 *tile = areas.matrices + self.lane;
    bool has_before = place.chunk > 0;
    Rows rows = rows_of(scan, place, self, 0);
    fetch_inputs(scan, place, self, rows, areas.slots, delta_slots);
    fetch_gradients(scan, place, self, rows, grad_slots);
    Scalars scalars = scalars_of(scan, place, rows);

    for (int pass = 0; pass < scan.passes; pass++) {
        Tokens dt, input, dy;
        float span[ROWS], span_up[ROWS], span_down[ROWS];
        ForTokens token_sums = {};
        const Four<TOKENS> *slots = areas.slots + pass % 2 * SLOTS;
        rows = rows_of(scan, place, self, hidden(pass));
        if (PREFETCH) wait_for_copies();
        EACH_ROW {
            long long start = (long long)rows.row[r] * length;
            take_tokens(scan.u + place.shared + start, slots, r, self.at, length,
                        place.reversed, input[r]);
            take_tokens(scan.grad_y + place.grad + start, grad_slots, r, self.at, length,
                        place.reversed, dy[r]);
            if (!rows.is_there[r]) EACH_STEP dy[r][i] = 0.0f;
        }
        step_sizes(scan, place, self, rows, scalars, delta_slots, areas.low, pass == 0, dt);
        begin_rows(dt, input, span);
        sum_up(span, self.lane, span_up);
        sum_down(span, self.lane, span_down);
        if (PREFETCH && pass + 1 < scan.passes) {
            Rows next = rows_of(scan, place, self, hidden(pass + 1));
            fetch_inputs(scan, place, self, next, areas.slots + (pass + 1) % 2 * SLOTS,
                         delta_slots);
            fetch_gradients(scan, place, self, next, grad_slots);
        }
        Scalars coming = scalars_of(scan, place, rows_of(scan, place, self, hidden(pass + 1)));
        RowSums row_sums = row_sums_of(scan, place, self, rows);
        bool has_border = rows.first < width;
        bool takes_over = place.chunk + 1 < scan.chunks && has_border;
        bool hands_on = has_before && has_border && self.lane == 0;
        const float *entry = scan.borders + border_of(scan, place, rows, place.chunk - 1);
        const float *late = scan.grad_borders + border_of(scan, place, rows, place.chunk);
        float *way_out = scan.grad_borders + border_of(scan, place, rows, place.chunk - 1);

        for (int first = 0; first < scan.states; first += STAGE) {
            int count = min(scan.states - first, STAGE);
            begin_rates(scan, place, rows, first, scalars);
            if (pass == 0 || scan.states > STAGE) {
                __syncthreads();
                stage_matrices(scan, place, first, count, areas.matrices);
                for (int i = threadIdx.x; i < 2 * TILE_ROW * count; i += THREADS)
                    areas.sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (threadIdx.x < ROW_WARPS) done[threadIdx.x] = 0;
                __syncthreads();
            }
            int turns = max(count, ROW_WARPS);  // no two warps are at the same state
            int earlier = scan.states > STAGE ? 0 : pass * turns;
            Turns order = {done, self.row_warp, turns};
            // of these states what entered the chunk in the forward: one a lane, as the rates
            Border inherited = look(entry + (first + min(self.lane % 16, count - 1)) * width,
                                    has_before);
            int k = self.row_warp;
            int at = (first + min(k, count - 1)) * width;
            Border border = look(late + at, takes_over);
            float sum = 0.0f;    // for the rate of the turn before, of 16 lanes
            int summed = LANES;  // the state that it belongs to
            float for_rates;     // of state n in lane n, of each half of a warp
            for (int turn = earlier; turn < earlier + turns; turn++) {
                if (k < count) {
                    Tokens decay;
                    float b[STEPS], c[STEPS], for_b[STEPS] = {}, for_c[STEPS] = {};
                    float rate[ROWS], whole[ROWS], end[ROWS], whole_back[ROWS], end_back[ROWS];
                    float carry[ROWS], from[ROWS], last[ROWS], state[ROWS], back[ROWS];
                    read_tile(tile + 2 * k * TILE_ROW, b);
                    read_tile(tile + (2 * k + 1) * TILE_ROW, c);
                    EACH_ROW rate[r] = of_lane(scalars.rates[r], k);
                    walk(dt, input, span, rate, b, decay, whole, end);
                    walk_back(decay, dy, c, end_back);
                    EACH_ROW whole_back[r] = whole[r];
                    join_lanes(whole, end, whole_back, end_back, sum, self.lane);
                    decay_over(span_up, rate, whole);
                    decay_over(span_down, rate, whole_back);
                    if (self.lane % 16 == summed) for_rates = sum;
                    wait_for(scan, late + at, end_back[0], border);
                    EACH_ROW carry[r] = of_lane(state_of(inherited, r), k);
                    EACH_ROW from[r] = state_of(border, r);
                    EACH_ROW last[r] = fmaf(whole_back[r], from[r], end_back[r]);
                    if (hands_on) hand_on(way_out + at, last);
                    EACH_ROW {
                        back[r] = from_lane_after(last[r], from[r], self.lane);
                        float handed = fmaf(whole[r], carry[r], end[r]);
                        state[r] = from_lane_before(handed, carry[r], self.lane);
                    }
                    int seen = order.seen();
                    int coming = k + 1 == turns ? 0 : k + 1;  // if it is there, else the last
                    at = (first + min(coming, count - 1)) * width;
                    border = look(late + at, takes_over);
                    float for_rate[ROWS];
                    add_gradients(dt, input, dy, decay, rate, b, c, state, back, for_b, for_c,
                                  token_sums, for_rate);
                    sum = halve_lanes(for_rate, self.lane);
                    summed = k;
                    order.wait(turn, seen);
                    float4 *own_sums = areas.sums + 2 * k * TILE_ROW + self.lane;
                    add_to_tile(own_sums, for_b);
                    add_to_tile(own_sums + TILE_ROW, for_c);
                }
                __syncwarp();
                if (self.lane == 0) write_flag(done + self.row_warp, turn + 1);
                k = k + 1 == turns ? 0 : k + 1;
                if (k == 0 && turns > count) {  // what was read on the way here is the last state's
                    at = first * width;
                    read_handed(late + at, takes_over, border);
                }
            }
            sum = sum_half(sum);
            if (self.lane % 16 == summed) for_rates = sum;
            if (row_sums.is_writer && self.lane % 16 < count)
                row_sums.at[first + self.lane % 16] = for_held(
                    scan, for_rates, scalars.rates[self.lane < LANES / 2 ? 0 : ROWS - 1]);
            if (pass + 1 == scan.passes || scan.states > STAGE) {
                __syncthreads();
                store_sums(scan, place, first, count, areas.sums);
            }
        }
        rows = rows_of(scan, place, self, hidden(pass));
        finish_rows(scan, place, self, rows, scalars, slots, dt, dy, token_sums, row_sums);
        scalars = coming;
    }
}
