// The recurrence inside a lane, forward and backward, for one state of its rows.
#pragma once

#include "inputs.cuh"
#include "lanes.cuh"

typedef float Tokens[ROWS][STEPS];

// decay: of each token; rates are for base 2. end: what the lane hands on if zero enters it.
__device__ inline void walk(const Tokens &dt, const Tokens &input, const float (&rate)[ROWS],
                            const float (&b)[STEPS], Tokens &decay, float (&end)[ROWS]) {
    EACH_ROW EACH_STEP {
        decay[r][i] = exp2_fast(dt[r][i] * rate[r]);
        float share = input[r][i] * b[i];
        end[r] = i == 0 ? share : fmaf(decay[r][i], end[r], share);
    }
}

// The decay over a lane, or over the lanes up to each, or from each on, of which `spans` are the
// sums of dt. Over lanes it is not the product of theirs: where decays are near 1 its rounding
// would grow from chunk to chunk.
__device__ inline void decay_over(const float (&spans)[ROWS], const float (&rate)[ROWS],
                                  float (&whole)[ROWS]) {
    EACH_ROW whole[r] = exp2_fast(spans[r] * rate[r]);
}

// y += C · state, from the state that enters the lane.
__device__ inline void add_outputs(const Tokens &decay, const Tokens &input,
                                   const float (&b)[STEPS], const float (&c)[STEPS],
                                   float (&state)[ROWS], Tokens &y) {
    EACH_ROW EACH_STEP {
        state[r] = fmaf(decay[r][i], state[r], input[r][i] * b[i]);
        y[r][i] = fmaf(c[i], state[r], y[r][i]);
    }
}

// What goes back from a token is back = decay · (dy · C + back of the token after it), where
// dy · C + back is the gradient of its state. end: what the lane hands back if zero enters it.
__device__ inline void walk_back(const Tokens &decay, const Tokens &dy, const float (&c)[STEPS],
                                 float (&end)[ROWS]) {
    EACH_ROW EACH_STEP_BACK {
        float sum = i == STEPS - 1 ? dy[r][i] * c[i] : fmaf(dy[r][i], c[i], end[r]);
        end[r] = decay[r][i] * sum;
    }
}

// What a lane adds up for its tokens over the states. dt: for base 2, without what comes by input.
struct ForTokens { Tokens input, dt; };

// Gradients of B, C, dt · u, dt and the rate, from what enters the lane from both sides.
__device__ inline void add_gradients(const Tokens &dt, const Tokens &input, const Tokens &dy,
                                     const Tokens &decay, const float (&rate)[ROWS],
                                     const float (&b)[STEPS], const float (&c)[STEPS],
                                     float (&state)[ROWS], float (&back)[ROWS],
                                     float (&for_b)[STEPS], float (&for_c)[STEPS],
                                     ForTokens &sums, float (&for_rate)[ROWS]) {
    Tokens before;  // the state before each token
    EACH_STEP EACH_ROW {
        before[r][i] = state[r];
        state[r] = fmaf(decay[r][i], state[r], input[r][i] * b[i]);
        for_c[i] = fmaf(dy[r][i], state[r], for_c[i]);
    }
    EACH_STEP_BACK EACH_ROW {
        float for_state = fmaf(dy[r][i], c[i], back[r]);
        back[r] = decay[r][i] * for_state;
        float for_exponent = back[r] * before[r][i];
        for_b[i] = fmaf(for_state, input[r][i], for_b[i]);
        sums.input[r][i] = fmaf(for_state, b[i], sums.input[r][i]);
        sums.dt[r][i] = fmaf(for_exponent, rate[r], sums.dt[r][i]);
        for_rate[r] = i == STEPS - 1 ? for_exponent * dt[r][i]
                                     : fmaf(for_exponent, dt[r][i], for_rate[r]);
    }
}

// The sum of a lane's dt.
__device__ inline void spans_of(const Tokens &dt, float (&span)[ROWS]) {
    EACH_ROW {
        span[r] = sum_steps(dt[r]);
        keep(span[r]);
    }
}

// input: of u, becomes dt · u.
__device__ inline void begin_inputs(const Tokens &dt, Tokens &input) {
    EACH_ROW EACH_STEP {
        input[r][i] *= dt[r][i];
        keep(input[r][i]);
    }
}

// Where the sums over the tokens of a row go, of A's gradient first. Of two rows of a lane lanes 0
// to 15 write those of the first and the others those of the second; of one row lanes 0 to 15 do.
struct RowSums {
    float *at;
    bool is_writer;
};

__device__ inline RowSums row_sums_of(const Scan &scan, const Place &place, const Self &self,
                                      const Rows &rows) {
    bool is_upper = self.lane >= LANES / 2;
    int row = rows.first + (is_upper ? ROWS - 1 : 0);
    RowSums sums;
    sums.is_writer = is_upper ? ROWS == 2 && rows.is_there[ROWS - 1] : rows.is_there[0];
    int at = self.token_warp * scan.groups * CHANNELS + row;
    sums.at = scan.grad_rows + place.sums + (long long)at * (STATES + 2);
    return sums;
}

// The gradients of u and delta, and the sums for D and the bias.
__device__ inline void finish_rows(const Scan &scan, const Place &place, const Self &self,
                                   const Rows &rows, const float *scalars,
                                   const Four<TOKENS> *slots, const Tokens &dt, const Tokens &dy,
                                   ForTokens &sums, const RowSums &row_sums) {
    float for_skip[ROWS], for_bias[ROWS];
    EACH_ROW {
        float u[STEPS], skip = scalars[r * ROW_SCALARS + 1];
        long long at = tokens_of(scan, rows, r);
        take_tokens(scan.u + place.shared + at, slots, r, rows.left[r], place.reversed, u);
        for_skip[r] = for_bias[r] = 0.0f;
        EACH_STEP {
            for_skip[r] = fmaf(dy[r][i], u[i], for_skip[r]);
            sums.dt[r][i] = fmaf(sums.input[r][i], u[i], sums.dt[r][i] * LN_2);
            sums.input[r][i] = fmaf(sums.input[r][i], dt[r][i], skip * dy[r][i]);
        }
        if (scan.softplus) EACH_STEP sums.dt[r][i] *= softplus_slope(dt[r][i]);
        EACH_STEP for_bias[r] += sums.dt[r][i];  // past the end it is 0
        store_tokens(scan.grad_u + place.own + at, rows.left[r], place.reversed, sums.input[r]);
        store_tokens(scan.grad_delta + place.own + at, rows.left[r], place.reversed, sums.dt[r]);
    }
    float totals[2] = {halve_lanes(for_skip, self.lane), halve_lanes(for_bias, self.lane)};
    sum_halves(totals);
    int n = self.lane % (LANES / 2);
    if (row_sums.is_writer && n < 2)
        row_sums.at[STATES + n] = n == 0 ? totals[0] : totals[1];
}

// Where the block's sums for B and C go.
__device__ inline float *parts_of(const Scan &scan, const Place &place) {
    return scan.grad_matrices + place.block * scan.part_stride +
           place.source * scan.part_source_stride + place.batch * scan.part_batch_stride +
           (place.reversed ? scan.part_walk_stride : 0);
}
