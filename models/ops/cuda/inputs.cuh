// What a warp works on: tokens of its channels, their dt, and the rows of the block's matrices.
#pragma once

#include "tokens.cuh"

#define STAGED (32 / STEPS)  // rows of a lane that are on their way at a time

// Bring rows [0, count) of each of the matrices to a tile: row 0 of all, then row 1, `spacing` rows
// of the tile apart.
template <int matrices>
__device__ inline void stage(const MATRIX *const (&from)[matrices], int count, float4 *tile,
                             int spacing, const Scan &scan, const Place &place) {
    const int parts = CHUNK / STEPS;
    int tasks = matrices * count * parts, direction = place.direction;
    for (int first = threadIdx.x; first < tasks; first += STAGED * THREADS) {
        Pieces<MATRIX> pieces[STAGED];
#pragma unroll
        for (int i = 0; i < STAGED; i++) {
            int task = first + i * THREADS, row = task / parts / matrices;
            int kind = task / parts % matrices, at = place.chunk * CHUNK + task % parts * STEPS;
            const MATRIX *matrix = from[0];
#pragma unroll
            for (int k = 1; k < matrices; k++)
                if (k == kind) matrix = from[k];
            matrix += (long long)row * scan.length + place_of(at, place);
            load_pieces(matrix, task < tasks ? scan.length - at : 0, direction, pieces[i]);
        }
#pragma unroll
        for (int i = 0; i < STAGED; i++) {
            int task = first + i * THREADS, row = task / parts / matrices;
            int kind = task / parts % matrices, part = task % parts;
            float value[STEPS];
            unpack(pieces[i], place.reversed, value);
            if (task < tasks)
                write_tile(tile + (row * spacing + kind) * TILE_ROW + part / SEGMENT * WARP_ROW +
                               part % SEGMENT,
                           value);
        }
    }
}

__device__ inline void fetch_inputs(const Scan &scan, const Place &place, const Self &self,
                                    const Rows &rows, Four<TOKENS> *slots,
                                    Four<TOKENS> *delta_slots) {
    EACH_ROW {
        long long at = tokens_of(scan, rows, r);
        fetch_tokens(scan.u + place.shared + at, slots, r, rows.left[r], place.reversed);
        if (!RANK)
            fetch_tokens(scan.delta + place.own + at, delta_slots, r, rows.left[r],
                         place.reversed);
    }
}

__device__ inline void fetch_gradients(const Scan &scan, const Place &place, const Self &self,
                                       const Rows &rows, Four<TOKENS> *slots) {
    EACH_ROW fetch_tokens(scan.grad_y + place.grad + tokens_of(scan, rows, r), slots, r,
                          rows.left[r], place.reversed);
}

// What belongs to a channel, in shared memory: bias, skip, and A (later the rate) of its states.
#define ROW_SCALARS (2 + RATES)

// dt from what it is before bias and softplus; 0 past the end and in rows that are not there: these
// change nothing.
__device__ inline void finish_steps(const Scan &scan, const Rows &rows, const float *scalars,
                                    float (&dt)[ROWS][STEPS]) {
    EACH_ROW EACH_STEP dt[r][i] += scalars[r * ROW_SCALARS];
    if (scan.softplus) EACH_ROW EACH_STEP dt[r][i] = softplus(dt[r][i]);
    EACH_ROW if (rows.left[r] < STEPS) EACH_STEP if (i >= rows.left[r]) dt[r][i] = 0.0f;
}
