// The selective scan of many states a channel, forward and backward.
//
// A block brings B and C of its chunk to shared memory and walks through the states; a warp's rows
// take over each state from the chunk before, one word a row. The more rows there are, the further
// that is ahead: by a whole pass where rows alone fill the GPU, else by a few states.
//
// The forward joins the lanes of a segment state by state, by exchange; each lane asks ahead, for
// one state, for what the chunk before hands on. The backward, which joins lanes both ways, does so
// for a group of states at once: each lane leaves what its tokens do to a state in shared memory,
// joins all lanes for one state, and walks its own tokens again.

#define RATES STAGE

#include "steps.cuh"

// Passes whose scalars are in shared memory at a time: all, or one and that to come.
#define SCALAR_PASSES (SCALARS_AHEAD ? PASSES : 2)

// Scalars of all channels of a warp, in shared memory.
__device__ inline float *scalars_of_warp(float *scalars) {
    return scalars + (int)threadIdx.x / LANES * SCALAR_PASSES * WARP_ROWS * ROW_SCALARS;
}

// Those of a pass, and of a lane's first channel in it.
__device__ inline float *scalars_of_pass(float *scalars, int pass) {
    return scalars + (SCALARS_AHEAD ? pass : pass % 2) * WARP_ROWS * ROW_SCALARS;
}

__device__ inline float *scalars_of(float *scalars, int pass) {
    return scalars_of_pass(scalars, pass) + (int)threadIdx.x % SEGMENTS * ROWS * ROW_SCALARS;
}

// Bring one there; 0 where it is not.
__device__ inline void fetch_scalar(float *to, const float *from, bool is_there) {
#if PREFETCH
    copy_later<4>(to, from, is_there);
#else
    *to = is_there ? *from : 0.0f;
#endif
}

// Bring those of `passes` passes from `pass` on, with A of states [first, first + count): each lane
// one of these, for as many passes at a time as there are lanes for.
__device__ inline void fetch_scalars(const Scan &scan, const Place &place, const Self &self,
                                     int pass, int passes, int first, int count, float *scalars) {
    const int lanes = WARP_ROWS * RATES;  // for a pass
    int lane = threadIdx.x % LANES, row = lane % lanes / RATES, n = lane % RATES;
    int end = pass + passes;
    for (pass += lane / lanes; pass < end; pass += LANES / lanes) {
        int in_group = (place.block * PASSES + pass) * BLOCK_ROWS +
                       self.row_warp * WARP_ROWS + row;
        bool is_there = in_group < CHANNELS;
        long long channel = (long long)place.group * CHANNELS + in_group;
        float *own = scalars_of_pass(scalars, pass) + row * ROW_SCALARS;
        fetch_scalar(own + 2 + n, scan.A + channel * STATES + first + n,
                     is_there && n < count);
        for (int k = n; k < 2; k += RATES) {
            const float *others = k == 0 ? scan.bias : scan.D;
            fetch_scalar(own + k, others + channel, is_there && others != nullptr);
        }
    }
}

// Rows of dt_low in shared memory.
#define LOW_ROWS (RANK < 2 * STAGE ? RANK : 2 * STAGE)
#define LATER ((TOGETHER - 1) * ROWS * PIECES * THREADS)  // float4 of dt that is made ahead
#define EACH_PASS _Pragma("unroll") for (int p = 0; p < TOGETHER; p++)

// Rows of dt_low from `first` on: all that there are, or as many as shared memory holds at a time.
__device__ inline void stage_low(const Scan &scan, const Place &place, int first, float4 *tile) {
    const MATRIX *low[1] = {scan.low + place.matrix + (long long)first * scan.length};
    stage(low, min(RANK - first, 2 * STAGE), tile, 1, scan, place);
}

// Weights of a channel in shared memory, for an odd number of words, which keeps banks apart.
#define WEIGHT_ROW (RANK | 1)

// Bring weights of dt there, for all passes.
__device__ inline void fetch_weights(const Scan &scan, const Place &place, const Self &self,
                                     float *weights) {
    for (int row = 0; row < PASSES * WARP_ROWS; row++) {
        int in_group = (place.block * PASSES + row / WARP_ROWS) * BLOCK_ROWS +
                       self.row_warp * WARP_ROWS + row % WARP_ROWS;
        const float *from = scan.weight +
                            ((long long)place.group * CHANNELS + in_group) * RANK;
        for (int k = threadIdx.x % LANES; k < RANK; k += LANES)
            fetch_scalar(weights + row * WEIGHT_ROW + k, from + k, in_group < CHANNELS);
    }
}

// dt of a warp's rows before bias and softplus: given, or made of the rows of dt_low in `tile`, for
// as many passes together as TOGETHER says. Shared memory delivers 128 bytes a clock: for each pass
// alone 32 rows of dt_low would take it as long as B and C of 16 states. dt of later passes waits
// in `later`. If NEAR, the weights of all passes of the warp are in shared memory, else in global.
// On tensor cores (product.cuh) it was no faster here (benchmarks/results/ops_cuda.md).
__device__ inline void begin_steps(const Scan &scan, const Place &place, const Self &self,
                                   const Rows &rows, const Four<TOKENS> *slots, float4 *tile,
                                   const float *weights, float4 *later, int pass, Tokens &dt) {
    if (!RANK) {
        EACH_ROW take_tokens(scan.delta + place.own + tokens_of(scan, rows, r), slots, r,
                             rows.left[r], place.reversed, dt[r]);
        return;
    }
    later += threadIdx.x;
    if (pass % TOGETHER > 0) {
        later += (pass % TOGETHER - 1) * ROWS * PIECES * THREADS;
        EACH_ROW read_pieces<THREADS>(later + r * PIECES * THREADS, dt[r]);
        return;
    }
    float made[TOGETHER][ROWS][STEPS] = {};
    for (int first = 0; first < RANK; first += 2 * STAGE) {
        int count = min(RANK - first, 2 * STAGE);
        if (RANK > 2 * STAGE) {  // else they are there
            __syncthreads();
            stage_low(scan, place, first, tile);
            __syncthreads();
        }
        int weight[TOGETHER][ROWS];  // where the next lies
        EACH_PASS EACH_ROW {
            int row = min(rows.first + p * BLOCK_ROWS + r, CHANNELS - 1);
            weight[p][r] = (place.group * CHANNELS + row) * RANK + first;
            if (NEAR) {
                row = (pass + p) * WARP_ROWS + (int)threadIdx.x % SEGMENTS * ROWS + r;
                weight[p][r] = row * WEIGHT_ROW + first;
            }
        }
        const float4 *own = tile + self.lane;
#pragma unroll 2
        for (int k = 0; k < count; k++) {
            float value[STEPS];
            read_tile(own, value);
            EACH_PASS EACH_ROW {
                float w = (NEAR ? weights : scan.weight)[weight[p][r]++];
                EACH_STEP made[p][r][i] = fmaf(w, value[i], made[p][r][i]);
            }
            own += TILE_ROW;
        }
    }
    EACH_ROW EACH_STEP dt[r][i] = made[0][r][i];
    EACH_PASS EACH_ROW if (p > 0)
        write_pieces<THREADS>(later + ((p - 1) * ROWS + r) * PIECES * THREADS, made[p][r]);
}

// The rates of a warp's channels in one pass, for base 2, from what A holds. scalars: of the first.
__device__ inline void begin_rates(const Scan &scan, float *scalars) {
    int lane = threadIdx.x % LANES;
    if (lane < WARP_ROWS * RATES) {
        float *own = scalars + lane / RATES * ROW_SCALARS + 2 + lane % RATES;
        *own = rate_of(scan, *own);
    }
    __syncwarp();
}

// In shared memory: for each state its rows of B and C and, in a backward, of their gradients; rows
// of dt_low; lines of a backward (below); tokens on their way; scalars.
#define FORWARD_ROWS 2  // of a state
#define BACKWARD_ROWS 4

__device__ inline float4 *low_of(float4 *shared, int rows) {
    return shared + rows * TILE_ROW * min(STATES, STAGE);
}

__device__ inline float4 *after_low(float4 *low) { return low + TILE_ROW * LOW_ROWS; }

// B and C of states [first, first + count).
__device__ inline void stage_matrices(const Scan &scan, const Place &place, int first, int count,
                                      float4 *states, int rows) {
    long long start = place.matrix + (long long)first * scan.length;
    const MATRIX *matrices[2] = {scan.B + start, scan.C + start};
    stage(matrices, count, states, rows, scan, place);
}

#define ASKED 2  // states that lanes ask for again where one is missing

// Where the chunk before hands on what enters this one, for the state of a lane: of states
// [first, first + count) one each.
__device__ inline const float *entry_of(const Scan &scan, const Place &place, const Self &self,
                                        const Rows &rows, int first, int count) {
    return scan.borders + place.border - BORDER + rows.first +
           (long long)(first + min(self.lane, count - 1)) * CHANNELS;
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    __shared__ Place place;
    Self self;
    take_place(scan, false, place, self);
    float4 *low = low_of(shared, FORWARD_ROWS);
    Four<TOKENS> *slots = (Four<TOKENS> *)after_low(low);
    float4 *later = (float4 *)(slots + PREFETCH * (1 + !RANK) * SLOTS);
    float *scalars_of_block = (float *)(later + LATER);
    float *all_scalars = scalars_of_warp(scalars_of_block);
    float *weights = scalars_of_block + SCALAR_PASSES * BLOCK_ROWS * ROW_SCALARS;
    weights += self.row_warp * PASSES * WARP_ROWS * WEIGHT_ROW;
    Rows rows = rows_of(scan, place, self, 0);
    fetch_inputs(scan, place, self, rows, slots, slots + SLOTS);
    fetch_scalars(scan, place, self, 0, SCALARS_AHEAD ? PASSES : 1, 0,
                  min(STATES, STAGE), all_scalars);
    if (NEAR) fetch_weights(scan, place, self, weights);
    if (RANK > 0 && RANK <= 2 * STAGE) stage_low(scan, place, 0, low);
    stage_matrices(scan, place, 0, min(STATES, STAGE), shared, FORWARD_ROWS);
    __syncthreads();

    const int passes = passes_of(place);
    for (int pass = 0; pass < passes; pass++) {
        Tokens dt, input, y;
        float span[ROWS], span_up[ROWS];
        rows = rows_of(scan, place, self, hidden(pass));
        float *scalars = scalars_of(all_scalars, pass);
        bool takes_over = place.chunk > 0 && rows.is_there[0];
        bool hands_on = place.chunk + 1 < scan.chunks && rows.is_there[0] &&
                        self.lane == SEGMENT - 1;
        float *way_out = scan.borders + place.border + rows.first;
        const float *entry = entry_of(scan, place, self, rows, 0, min(STATES, STAGE));
        unsigned handed = look(entry, takes_over);
        if (PREFETCH) wait_for_copies();
        __syncwarp();  // lanes fetched scalars for one another
        begin_steps(scan, place, self, rows, slots + SLOTS, low, weights, later, pass, dt);
        finish_steps(scan, rows, scalars, dt);
        spans_of(dt, span);
        sum_up(span, self.lane, span_up);
        EACH_ROW {
            take_tokens(scan.u + place.shared + tokens_of(scan, rows, r), slots, r,
                        rows.left[r], place.reversed, input[r]);
            EACH_STEP y[r][i] = scalars[r * ROW_SCALARS + 1] * input[r][i];
        }
        begin_inputs(dt, input);
        if (PREFETCH && pass + 1 < passes)
            fetch_inputs(scan, place, self, rows_of(scan, place, self, hidden(pass + 1)), slots,
                         slots + SLOTS);
        for (int first = 0; first < STATES; first += STAGE) {
            int count = min(STATES - first, STAGE);
            if (first > 0) {
                __syncthreads();
                fetch_scalars(scan, place, self, pass, 1, first, count, all_scalars);
                stage_matrices(scan, place, first, count, shared, FORWARD_ROWS);
                if (PREFETCH) wait_for_copies();
                __syncthreads();
                entry = entry_of(scan, place, self, rows, first, count);
                handed = look(entry, takes_over);
            }
            begin_rates(scan, scalars_of_pass(all_scalars, pass));
            const float4 *tile = shared + self.lane;
            for (int k = 0; k < count; k++) {
                Tokens decay;
                float b[STEPS], c[STEPS], rate[ROWS], whole[ROWS], end[ROWS];
                float state[ROWS];
                unsigned border = of_lane(handed, k);
                bool is_missing = __any_sync(ALL, border == NOT_YET);
                bool asks = handed == NOT_YET && (unsigned)(self.lane - k) < ASKED;
                if (is_missing) read_handed(entry, asks, handed);
                read_tile(tile, b);
                EACH_ROW rate[r] = scalars[r * ROW_SCALARS + 2 + k];
                walk(dt, input, rate, b, decay, end);
                decay_over(span, rate, whole);
                join_lanes(whole, end, self.lane);
                decay_over(span_up, rate, whole);
                while (is_missing) {
                    border = of_lane(handed, k);
                    is_missing = __any_sync(ALL, border == NOT_YET);
                    if (is_missing) read_handed(entry, handed == NOT_YET && asks, handed);
                }
                float carry = __uint_as_float(border);
                float last = fmaf(whole[0], carry, end[0]);
                if (hands_on) write_handed(way_out, __float_as_uint(last));
                state[0] = from_lane_before(last, carry, self.lane);
                read_tile(tile + TILE_ROW, c);
                add_outputs(decay, input, b, c, state, y);
                way_out += CHANNELS;
                tile += FORWARD_ROWS * TILE_ROW;
            }
        }
        rows = rows_of(scan, place, self, hidden(pass));
        EACH_ROW store_tokens(scan.y + place.own + tokens_of(scan, rows, r), rows.left[r],
                              place.reversed, y[r]);
    }
}
#endif

// The block's sums for B and C, from shared memory to where its part lies.
__device__ inline void store_sums(const Scan &scan, const Place &place, int first, int count,
                                  const float4 *states) {
    const int lanes = CHUNK / STEPS;
    float *parts = parts_of(scan, place);
    for (int task = threadIdx.x; task < 2 * count * lanes; task += THREADS) {
        int row = task / lanes, kind = row % 2, lane = task % lanes;
        float value[STEPS];
        read_tile(states + (row / 2 * BACKWARD_ROWS + 2 + kind) * TILE_ROW + lane, value);
        int at = place.chunk * CHUNK + lane * STEPS;
        store_tokens(parts + kind * scan.part_kind_stride +
                         (long long)(first + row / 2) * scan.length +
                         place_of(at, place),
                     scan.length - at, place.reversed, value);
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

#if BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    __shared__ Place place;
    __shared__ int turns[STAGE];
    Self self;
    take_place(scan, true, place, self);
    float4 *low = low_of(shared, BACKWARD_ROWS);
    float *lines = (float *)after_low(low);
    // u twice: it is needed once more at the end of a pass
    Four<TOKENS> *u_slots = (Four<TOKENS> *)(lines + ROW_WARPS * LINES);
    Four<TOKENS> *grad_slots = u_slots + 2 * SLOTS, *delta_slots = grad_slots + SLOTS;
    float *all_scalars = scalars_of_warp((float *)(u_slots + PREFETCH * (3 + !RANK) * SLOTS));
    lines += self.row_warp * LINES;
    Rows rows = rows_of(scan, place, self, 0);
    fetch_inputs(scan, place, self, rows, u_slots, delta_slots);
    fetch_gradients(scan, place, self, rows, grad_slots);
    fetch_scalars(scan, place, self, 0, SCALARS_AHEAD ? PASSES : 1, 0,
                  min(STATES, STAGE), all_scalars);
    if (RANK > 0 && RANK <= 2 * STAGE) stage_low(scan, place, 0, low);
    begin_states(scan, place, 0, min(STATES, STAGE), shared, turns);

    const int passes = passes_of(place);
    for (int pass = 0; pass < passes; pass++) {
        Tokens dt, input, dy;
        float span[ROWS];
        ForTokens token_sums = {};
        const Four<TOKENS> *slots = u_slots + pass % 2 * SLOTS;
        rows = rows_of(scan, place, self, hidden(pass));
        if (PREFETCH) wait_for_copies();
        __syncwarp();  // lanes fetched scalars for one another
        float *scalars = scalars_of(all_scalars, pass);
        Pieces<TOKENS> u_pieces[ROWS], dy_pieces[ROWS];  // on their way while dt is made
        EACH_ROW {
            long long at = tokens_of(scan, rows, r);
            take_pieces(scan.u + place.shared + at, slots, r, rows.left[r], place.reversed,
                        u_pieces[r]);
            take_pieces(scan.grad_y + place.grad + at, grad_slots, r, rows.left[r],
                        place.reversed, dy_pieces[r]);
        }
        begin_steps(scan, place, self, rows, delta_slots, low, nullptr, nullptr, pass, dt);
        EACH_ROW unpack(u_pieces[r], place.reversed, input[r]);
        EACH_ROW unpack(dy_pieces[r], place.reversed, dy[r]);
        finish_steps(scan, rows, scalars, dt);
        spans_of(dt, span);
        begin_inputs(dt, input);
        write_spans(lines, span, self.lane);
        float chunk_span[1] = {halve_lanes(span, self.lane)};  // of the line's row
        sum_halves(chunk_span);
        keep(chunk_span[0]);
        if ((PREFETCH || !SCALARS_AHEAD) && pass + 1 < passes) {
            Rows next = rows_of(scan, place, self, hidden(pass + 1));
            fetch_inputs(scan, place, self, next, u_slots + (pass + 1) % 2 * SLOTS,
                         delta_slots);
            fetch_gradients(scan, place, self, next, grad_slots);
            if (!SCALARS_AHEAD)
                fetch_scalars(scan, place, self, pass + 1, 1, 0, STATES, all_scalars);
        }

        for (int first = 0; first < STATES; first += STAGE) {
            int count = min(STATES - first, STAGE);
            if (first > 0) {
                fetch_scalars(scan, place, self, pass, 1, first, count, all_scalars);
                if (PREFETCH) wait_for_copies();
                begin_states(scan, place, first, count, shared, turns);
            }
            begin_rates(scan, scalars_of_pass(all_scalars, pass));
            for (int from = 0; from < count; from += GROUP) {
                int group = min(count - from, GROUP);
                // what enters the chunk, for the line that this lane will join; asked for early
                int second = self.lane / 16, member = self.lane % 16 / 2, is_back = self.lane % 2;
                int own = min(member, group - 1);
                float *line = line_of(lines, second, member, is_back);
                Rows at = rows_of(scan, place, self, hidden(pass));
                bool is_there = second ? at.is_there[ROWS - 1] : at.is_there[0];
                const float *rates = scalars_of(all_scalars, pass) + 2 + from;
                bool has_line = member < group && is_there;
                bool takes_over = is_back ? place.chunk + 1 < scan.chunks : place.chunk > 0;
                const float *entry = (is_back ? scan.grad_borders
                                              : scan.borders - BORDER) +
                                     place.border + at.first + second % ROWS +
                                     (long long)(first + from + own) * CHANNELS;
                float4 *tile = shared + from * BACKWARD_ROWS * TILE_ROW + self.lane;
                unsigned border = look(entry, has_line && takes_over);

                // each lane's tokens, if zero enters them
                for (int k = 0; k < group; k++) {
                    Tokens decay;
                    float b[STEPS], c[STEPS], rate[ROWS], end[ROWS], end_back[ROWS];
                    read_tile(tile + k * BACKWARD_ROWS * TILE_ROW, b);
                    read_tile(tile + (k * BACKWARD_ROWS + 1) * TILE_ROW, c);
                    EACH_ROW rate[r] = rates[r * ROW_SCALARS + k];
                    walk(dt, input, rate, b, decay, end);
                    walk_back(decay, dy, c, end_back);
                    EACH_ROW {
                        line_of(lines, r, k, false)[self.lane] = end[r];
                        line_of(lines, r, k, true)[LANES - 1 - self.lane] = end_back[r];
                    }
                }
                __syncwarp();

                // all lanes of a line, first alone, so that what goes on is not long in coming
                float line_rate = rates[second % ROWS * ROW_SCALARS + own];
                Decays decay;
                decays_of(line_of(lines, second, 0, is_back) + LANES, line_rate, decay);
                float end = follow_line<false>(line, decay, 0.0f);
                wait_for(scan, entry, end, border);
                float entering = __uint_as_float(border);
                float last = fmaf(exp2_fast(line_rate * chunk_span[0]), entering, end);
                if (is_back && has_line && place.chunk > 0)
                    write_handed((void *)(entry - BORDER), __float_as_uint(last));
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
                            rate[r] = rates[r * ROW_SCALARS + k];
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
            if (pass + 1 == passes) {
                __syncthreads();
                store_sums(scan, place, first, count, shared);
                if (STATES > STAGE) __syncthreads();
            }
        }
        rows = rows_of(scan, place, self, hidden(pass));
        RowSums row_sums = row_sums_of(scan, place, self, rows);
        finish_rows(scan, place, self, rows, scalars_of(all_scalars, pass), slots, dt, dy,
                    token_sums, row_sums);
    }
}
#endif
