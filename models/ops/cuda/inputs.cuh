// What a warp works on: tokens of its channels, their dt, and the rows of the block's matrices.
#pragma once

#include "tokens.cuh"

// Bring rows [0, count) of each of the matrices to a tile: row 0 of all, then row 1, `spacing` rows
// of the tile apart. Two of a thread's rows are on their way at a time.
template <int matrices>
__device__ inline void stage(const MATRIX *const (&from)[matrices], int count, float4 *tile,
                             int spacing, const Scan &scan, const Place &place) {
    const int parts = CHUNK / STEPS;
#pragma unroll 2
    for (int task = threadIdx.x; task < matrices * count * parts; task += THREADS) {
        int row = task / parts / matrices, kind = task / parts % matrices, part = task % parts;
        const MATRIX *matrix = from[0];
#pragma unroll
        for (int k = 1; k < matrices; k++)
            if (k == kind) matrix = from[k];
        int at = place.chunk * CHUNK + part * STEPS;
        float value[STEPS];
        matrix += (long long)row * scan.length + place_of(at, scan.length, place.reversed);
        load_tokens(matrix, scan.length - at, place.reversed, value);
        write_tile(tile + (row * spacing + kind) * TILE_ROW + part / SEGMENT * WARP_ROW +
                       part % SEGMENT,
                   value);
    }
}

// Rows of dt_low from `first` on: all that there are, or as many as shared memory holds at a time.
__device__ inline void stage_low(const Scan &scan, const Place &place, int first, float4 *tile) {
    const MATRIX *low[1] = {scan.low + place.matrix + (long long)first * scan.length};
    stage(low, min(scan.rank - first, 2 * STAGE), tile, 1, scan, place);
}

// Rows of dt_low in shared memory.
__device__ inline int low_rows(const Scan &scan) { return LOW ? min(scan.rank, 2 * STAGE) : 0; }

__device__ inline void fetch_inputs(const Scan &scan, const Place &place, const Self &self,
                                    const Rows &rows, Four<TOKENS> *slots,
                                    Four<TOKENS> *delta_slots) {
    EACH_ROW {
        long long at = tokens_of(scan, rows, r);
        fetch_tokens(scan.u + place.shared + at, slots, r, rows.left[r], place.reversed);
        if (!LOW)
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

#define LATER ((TOGETHER - 1) * ROWS * PIECES * THREADS)  // float4 of dt that is made ahead
#define EACH_PASS _Pragma("unroll") for (int p = 0; p < TOGETHER; p++)

// Weights of a channel in shared memory, for an odd number of words, which keeps banks apart.
__device__ inline int weight_row(const Scan &scan) { return scan.rank | 1; }

// dt of a warp's rows before bias and softplus: given, or made of the rows of dt_low in `tile`, for
// as many passes together as TOGETHER says. Shared memory delivers 128 bytes a clock: for each pass
// alone 32 rows of dt_low would take it as long as B and C of 16 states. dt of later passes waits
// in `later`. If NEAR, the weights of all passes of the warp are in shared memory, else in global.
__device__ inline void begin_steps(const Scan &scan, const Place &place, const Self &self,
                                   const Rows &rows, const Four<TOKENS> *slots, float4 *tile,
                                   const float *weights, float4 *later, int pass,
                                   float (&dt)[ROWS][STEPS]) {
    if (!LOW) {
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
    for (int first = 0; first < scan.rank; first += 2 * STAGE) {
        int count = min(scan.rank - first, 2 * STAGE);
        if (scan.rank > 2 * STAGE) {  // else they are there
            __syncthreads();
            stage_low(scan, place, first, tile);
            __syncthreads();
        }
        int weight[TOGETHER][ROWS];  // where the next lies
        EACH_PASS EACH_ROW {
            int row = min(rows.first + p * BLOCK_ROWS + r, scan.channels - 1);
            weight[p][r] = (place.group * scan.channels + row) * scan.rank + first;
            if (NEAR) {
                row = (pass + p) * WARP_ROWS + (int)threadIdx.x % SEGMENTS * ROWS + r;
                weight[p][r] = row * weight_row(scan) + first;
            }
        }
        const float4 *own = tile + self.token_warp * WARP_ROW + self.lane;
#pragma unroll (TOGETHER > 2 ? 1 : 2)
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

// dt from that; 0 past the end and in rows that are not there: these change nothing.
__device__ inline void finish_steps(const Scan &scan, const Rows &rows, const float *scalars,
                                    float (&dt)[ROWS][STEPS]) {
    EACH_ROW EACH_STEP dt[r][i] += scalars[r * ROW_SCALARS];
    if (scan.softplus) EACH_ROW EACH_STEP dt[r][i] = softplus(dt[r][i]);
    EACH_ROW if (rows.left[r] < STEPS) EACH_STEP if (i >= rows.left[r]) dt[r][i] = 0.0f;
}
