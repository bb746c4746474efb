// The selective scan of one state a channel, forward and backward: limited by memory.
//
// The warps of a block lie side by side along the tokens of long sequences, so that borders between
// chunks are few: a chunk waits for the one before it. Sums for B and C stay in registers.

#define RATES 1

#include "product.cuh"
#include "steps.cuh"

// What a block needs beside the tokens: of a lane its steps of B and C, and of each of the block's
// channels, of which a thread has one at most, its scalars. All is asked for before the first of it
// is used, so that the answers do not wait for one another.
struct Asked {
    Pieces<MATRIX> b, c;
    float bias, skip, A;
};

__device__ inline Asked ask(const Scan &scan, const Place &place, const Self &self) {
    static_assert(PASSES * BLOCK_ROWS <= THREADS, "a channel for a thread");
    Asked asked;
    int left = scan.length - self.at;
    load_pieces(scan.B + place.matrix + self.from, left, place.direction, asked.b);
    load_pieces(scan.C + place.matrix + self.from, left, place.direction, asked.c);
    int row = place.block * PASSES * BLOCK_ROWS + (int)threadIdx.x;
    bool is_there = (int)threadIdx.x < PASSES * BLOCK_ROWS && row < CHANNELS;
    long long channel = (long long)place.group * CHANNELS + row;
    asked.bias = is_there && scan.bias != nullptr ? scan.bias[channel] : 0.0f;
    asked.skip = is_there && scan.D != nullptr ? scan.D[channel] : 0.0f;
    asked.A = is_there ? scan.A[channel] : 0.0f;
    return asked;
}

// What was asked for; the scalars go to shared memory.
__device__ inline void take_asked(const Scan &scan, const Place &place, const Asked &asked,
                                  float *scalars, float (&b)[STEPS], float (&c)[STEPS]) {
    unpack(asked.b, place.reversed, b);
    unpack(asked.c, place.reversed, c);
    if (threadIdx.x < PASSES * BLOCK_ROWS) {
        float *own = scalars + threadIdx.x * ROW_SCALARS;
        own[0] = asked.bias, own[1] = asked.skip, own[2] = rate_of(scan, asked.A);
    }
}

// What the warps of a block hand to one another along the tokens; two sets, used in turn.
struct Totals {
    float decay, end, back;
};

// What comes before or after a warp in its block.
struct Others {
    float decay, end;
};

#if TOKEN_WARPS > 1
#define DECLARE_TOTALS __shared__ Totals totals[2][ROW_WARPS][TOKEN_WARPS]
#else
#define DECLARE_TOTALS Totals totals[2][ROW_WARPS][1]  // none are handed on
#endif

__device__ inline Others warps_before(const Totals (&totals)[TOKEN_WARPS], int warp) {
    Others out = {1.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < TOKEN_WARPS - 1; w++)
        if (w < warp) {
            out.end = fmaf(totals[w].decay, out.end, totals[w].end);
            out.decay *= totals[w].decay;
        }
    return out;
}

__device__ inline Others warps_after(const Totals (&totals)[TOKEN_WARPS], int warp) {
    Others out = {1.0f, 0.0f};
#pragma unroll
    for (int w = TOKEN_WARPS - 1; w > 0; w--)
        if (w > warp) {
            out.end = fmaf(totals[w].decay, out.end, totals[w].back);
            out.decay *= totals[w].decay;
        }
    return out;
}

// decay, end of lanes from those of their warp to those of the block.
__device__ inline void add_others(const Others &others, float (&decay)[ROWS], float (&end)[ROWS]) {
    end[0] = fmaf(decay[0], others.end, end[0]);
    decay[0] *= others.decay;
}

// Shared memory: dt if it is made here, a backward's sums for B and C, tokens on their way, and
// scalars.
__device__ inline float4 *sums_of(float4 *shared) { return shared + TILE_ROW * MADE; }

__device__ inline Four<TOKENS> *slots_of(float4 *shared, int sums) {
    return (Four<TOKENS> *)(sums_of(shared) + TILE_ROW * sums);
}

// dt of a pass before bias and softplus.
__device__ inline void begin_steps(const Scan &scan, const Place &place, const Self &self,
                                   const Rows &rows, const Four<TOKENS> *slots,
                                   const float4 *made, int pass, Tokens &dt) {
#if RANK
    read_steps(self, pass, made, dt[0]);
#else
    take_tokens(scan.delta + place.own + rows.tokens, slots, 0, rows.left[0], place.reversed,
                dt[0]);
#endif
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    DECLARE_TOTALS;
    __shared__ Place taken;
    Self self;
    take_place(scan, false, taken, self);
    const Place place = taken;
    Four<TOKENS> *slots = slots_of(shared, 0);
    float *all_scalars = (float *)(slots + PREFETCH * (1 + !RANK) * SLOTS);
    bool hands_on = place.chunk + 1 < scan.chunks && self.lane == LANES - 1 &&
                    self.token_warp == TOKEN_WARPS - 1;
    Rows rows = rows_of(scan, place, self, 0);
    long long way_out = place.border + rows.first;
    fetch_inputs(scan, place, self, rows, slots, slots + SLOTS);
    Asked asked = ask(scan, place, self);
#if RANK
    make_steps(scan, place, shared);
#endif
    float b[STEPS], c[STEPS];
    take_asked(scan, place, asked, all_scalars, b, c);
    __syncthreads();

    const int passes = passes_of(place);
    for (int pass = 0; pass < passes; pass++) {
        Tokens dt, input, y, decay;
        float span[ROWS], span_up[ROWS], whole[ROWS], end[ROWS], state[ROWS];
        bool is_there = rows.is_there[0];
        const float *scalars = all_scalars + (pass * ROW_WARPS + self.row_warp) * ROW_SCALARS;
        keep(way_out);
        const float *entry = scan.borders + way_out - CHANNELS;
        unsigned border = look(entry, place.chunk > 0 && is_there);
        if (PREFETCH) wait_for_copies();
        take_tokens(scan.u + place.shared + rows.tokens, slots, 0, rows.left[0], place.reversed,
                    input[0]);
        begin_steps(scan, place, self, rows, slots + SLOTS, shared, pass, dt);
        if (PREFETCH && pass + 1 < passes)
            fetch_inputs(scan, place, self, rows_after(scan, self, rows), slots, slots + SLOTS);
        finish_steps(scan, rows, scalars, dt);
        float skip = scalars[1], rate[ROWS] = {scalars[2]};
        EACH_STEP y[0][i] = skip * input[0][i];
        spans_of(dt, span);
        begin_inputs(dt, input);

        walk(dt, input, rate, b, decay, end);
        decay_over(span, rate, whole);
        join_lanes(whole, end, self.lane);
        sum_up(span, self.lane, span_up);
        decay_over(span_up, rate, whole);
        Others before = {1.0f, 0.0f};
        if (TOKEN_WARPS > 1) {
            Totals(&total)[TOKEN_WARPS] = totals[pass % 2][self.row_warp];
            if (self.lane == LANES - 1) total[self.token_warp] = {whole[0], end[0], 0.0f};
            __syncthreads();
            before = warps_before(total, self.token_warp);
            add_others(before, whole, end);
        }
        wait_for(scan, entry, end[0], border);
        float carry = __uint_as_float(border);
        float last = fmaf(whole[0], carry, end[0]);
        if (hands_on && is_there) write_handed(scan.borders + way_out, __float_as_uint(last));
        state[0] = from_lane_before(last, fmaf(before.decay, carry, before.end), self.lane);
        add_outputs(decay, input, b, c, state, y);
        store_tokens(scan.y + place.own + rows.tokens, rows.left[0], place.reversed, y[0]);
        rows = rows_after(scan, self, rows);
        way_out += BLOCK_ROWS;
    }
}
#endif

// Sums for B and C of all warps of the block with the same tokens, to where the block's part lies.
__device__ inline void store_sums(const Scan &scan, const Place &place, const Self &self,
                                  float4 *sums, float (&for_b)[STEPS], float (&for_c)[STEPS]) {
    sums += self.token_warp * WARP_ROW + self.lane;
    for (int warp = 0; warp < ROW_WARPS && ROW_WARPS > 1; warp++) {
        if (warp == self.row_warp && warp == 0) {
            write_tile(sums, for_b);
            write_tile(sums + TILE_ROW, for_c);
        } else if (warp == self.row_warp) {
            add_to_tile(sums, for_b);
            add_to_tile(sums + TILE_ROW, for_c);
        }
        __syncthreads();
    }
    if (self.row_warp > 0) return;
    if (ROW_WARPS > 1) {
        read_tile(sums, for_b);
        read_tile(sums + TILE_ROW, for_c);
    }
    float *parts = parts_of(scan, place) + self.from;
    int left = scan.length - self.at;
    store_tokens(parts, left, place.reversed, for_b);
    store_tokens(parts + scan.part_kind_stride, left, place.reversed, for_c);
}

#if BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) backward(const Scan scan) {
    DYNAMIC_SHARED(float4, shared);
    DECLARE_TOTALS;
    __shared__ Place taken;
    Self self;
    take_place(scan, true, taken, self);
    const Place place = taken;
    // u twice: it is needed once more at the end of a pass
    Four<TOKENS> *u_slots = slots_of(shared, ROW_WARPS > 1 ? 2 : 0);
    Four<TOKENS> *grad_slots = u_slots + 2 * SLOTS, *delta_slots = grad_slots + SLOTS;
    float *all_scalars = (float *)(u_slots + PREFETCH * (3 + !RANK) * SLOTS);
    bool has_before = place.chunk > 0;
    bool hands_on = has_before && self.lane == 0 && self.token_warp == 0;
    Rows rows = rows_of(scan, place, self, 0);
    long long own = place.border + rows.first;  // the border after the chunk
    fetch_inputs(scan, place, self, rows, u_slots, delta_slots);
    fetch_gradients(scan, place, self, rows, grad_slots);
    Asked asked = ask(scan, place, self);
#if RANK
    make_steps(scan, place, shared);
#endif
    float b[STEPS], c[STEPS], for_b[STEPS] = {}, for_c[STEPS] = {};
    take_asked(scan, place, asked, all_scalars, b, c);
    __syncthreads();

    const int passes = passes_of(place);
    for (int pass = 0; pass < passes; pass++) {
        Tokens dt, input, dy, decay;
        float span[ROWS], whole[ROWS], end[ROWS], whole_back[ROWS], end_back[ROWS];
        float span_up[ROWS], span_down[ROWS];
        float state[ROWS], back[ROWS], for_rate[ROWS];
        ForTokens token_sums = {};
        bool is_there = rows.is_there[0];
        const float *scalars = all_scalars + (pass * ROW_WARPS + self.row_warp) * ROW_SCALARS;
        const Four<TOKENS> *slots = u_slots + pass % 2 * SLOTS;
        keep(own), keep(rows.tokens);
        const float *late = scan.grad_borders + own;
        unsigned border = look(late, place.chunk + 1 < scan.chunks && is_there);
        unsigned inherited = look(scan.borders + own - CHANNELS, has_before && is_there);
        if (PREFETCH) wait_for_copies();
        take_tokens(scan.u + place.shared + rows.tokens, slots, 0, rows.left[0], place.reversed,
                    input[0]);
        take_tokens(scan.grad_y + place.grad + rows.tokens, grad_slots, 0, rows.left[0],
                    place.reversed, dy[0]);
        begin_steps(scan, place, self, rows, delta_slots, shared, pass, dt);
        finish_steps(scan, rows, scalars, dt);
        float rate[ROWS] = {scalars[2]};
        spans_of(dt, span);
        begin_inputs(dt, input);
        Rows coming = rows_after(scan, self, rows);
        if (PREFETCH && pass + 1 < passes) {
            fetch_inputs(scan, place, self, coming, u_slots + (pass + 1) % 2 * SLOTS, delta_slots);
            fetch_gradients(scan, place, self, coming, grad_slots);
        }

        walk(dt, input, rate, b, decay, end);
        decay_over(span, rate, whole);
        walk_back(decay, dy, c, end_back);
        whole_back[0] = whole[0];
        join_lanes(whole, end, whole_back, end_back, self.lane);
        sum_up(span, self.lane, span_up);
        sum_down(span, self.lane, span_down);
        decay_over(span_up, rate, whole);
        decay_over(span_down, rate, whole_back);
        Others before = {1.0f, 0.0f}, after = {1.0f, 0.0f};
        if (TOKEN_WARPS > 1) {
            Totals(&total)[TOKEN_WARPS] = totals[pass % 2][self.row_warp];
            if (self.lane == LANES - 1) {
                total[self.token_warp].decay = whole[0];
                total[self.token_warp].end = end[0];
            }
            if (self.lane == 0) total[self.token_warp].back = end_back[0];
            __syncthreads();
            before = warps_before(total, self.token_warp);
            after = warps_after(total, self.token_warp);
            add_others(after, whole_back, end_back);
        }
        float carry = __uint_as_float(inherited);
        carry = fmaf(before.decay, carry, before.end);
        wait_for(scan, late, end_back[0], border);
        float from = __uint_as_float(border);
        float last = fmaf(whole_back[0], from, end_back[0]);
        if (hands_on && is_there)
            write_handed((void *)(late - CHANNELS), __float_as_uint(last));
        back[0] = from_lane_after(last, fmaf(after.decay, from, after.end), self.lane);
        state[0] = from_lane_before(fmaf(whole[0], carry, end[0]), carry, self.lane);
        add_gradients(dt, input, dy, decay, rate, b, c, state, back, for_b, for_c,
                      token_sums, for_rate);
        RowSums row_sums = row_sums_of(scan, place, self, rows);
        float sum[1] = {halve_lanes(for_rate, self.lane)};
        sum_halves(sum);
        if (row_sums.is_writer && self.lane == 0) row_sums.at[0] = for_held(scan, sum[0], rate[0]);
        finish_rows(scan, place, self, rows, scalars, slots, dt, dy, token_sums, row_sums);
        rows = coming;
        own += BLOCK_ROWS;
    }
    store_sums(scan, place, self, sums_of(shared), for_b, for_c);
}
#endif
