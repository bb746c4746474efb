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
        float value[STEPS];
        load_tokens(matrix + (long long)row * scan.length, place.chunk * CHUNK + part * STEPS,
                    scan.length, place.reversed, value);
        write_tile(tile + (row * spacing + kind) * TILE_ROW + part / SEGMENT * WARP_ROW +
                       part % SEGMENT,
                   value);
    }
}

// Rows of dt_low from `first` on: all that there are, or as many as shared memory holds.
__device__ inline void stage_low(const Scan &scan, const Place &place, int first, float4 *tile) {
    const MATRIX *low[1] = {scan.low + place.matrix + (long long)first * scan.length};
    stage(low, min(scan.rank - first, 2 * STAGE), tile, 1, scan, place);
}

__device__ inline void fetch_inputs(const Scan &scan, const Place &place, const Self &self,
                                    const Rows &rows, Four<TOKENS> *slots,
                                    Four<TOKENS> *delta_slots) {
    EACH_ROW {
        long long start = (long long)rows.row[r] * scan.length;
        fetch_tokens(scan.u + place.shared + start, slots, r, self.at, scan.length,
                     place.reversed);
        if (scan.low == nullptr)
            fetch_tokens(scan.delta + place.own + start, delta_slots, r, self.at, scan.length,
                         place.reversed);
    }
}

__device__ inline void fetch_gradients(const Scan &scan, const Place &place, const Self &self,
                                       const Rows &rows, Four<TOKENS> *slots) {
    EACH_ROW fetch_tokens(scan.grad_y + place.grad + (long long)rows.row[r] * scan.length, slots,
                          r, self.at, scan.length, place.reversed);
}

// dt of a warp's rows, given or made of the rows of dt_low in `tile`; 0 past the end and in rows
// that are not there: these change nothing.
__device__ inline void step_sizes(const Scan &scan, const Place &place, const Self &self,
                                  const Rows &rows, const Scalars &scalars,
                                  const Four<TOKENS> *slots, float4 *tile,
                                  float (&dt)[ROWS][STEPS]) {
    if (scan.low == nullptr) {
        EACH_ROW take_tokens(scan.delta + place.own + (long long)rows.row[r] * scan.length, slots,
                             r, self.at, scan.length, place.reversed, dt[r]);
    } else {
        EACH_ROW EACH_STEP dt[r][i] = 0.0f;
        for (int first = 0; first < scan.rank; first += 2 * STAGE) {
            int count = min(scan.rank - first, 2 * STAGE);
            if (scan.rank > 2 * STAGE) {  // else they are there
                __syncthreads();
                stage_low(scan, place, first, tile);
                __syncthreads();
            }
            const float *weight[ROWS];
            EACH_ROW weight[r] =
                scan.weight + channel_of(scan, place, rows, r) * scan.rank + first;
#pragma unroll 2
            for (int k = 0; k < count; k++) {
                float value[STEPS];
                read_tile(tile + k * TILE_ROW + self.token_warp * WARP_ROW + self.lane, value);
                EACH_ROW {
                    float w = weight[r][k];
                    EACH_STEP dt[r][i] = fmaf(w, value[i], dt[r][i]);
                }
            }
        }
    }
    EACH_ROW EACH_STEP dt[r][i] += scalars.bias[r];
    if (scan.softplus) EACH_ROW EACH_STEP dt[r][i] = softplus(dt[r][i]);
    EACH_ROW {
        int count = rows.is_there[r] ? scan.length - self.at : 0;
        if (count < STEPS) EACH_STEP if (i >= count) dt[r][i] = 0.0f;
    }
}
