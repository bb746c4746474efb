// What a warp works on: tokens of its channels, their dt, and the rows of the block's matrices.
#pragma once

#include "tokens.cuh"

// Bring rows [0, count) of a matrix to a tile, `spacing` rows of it apart.
__device__ inline void stage(const MATRIX *rows, int count, float4 *tile, int spacing,
                             const Scan &scan, const Place &place) {
    const int parts = CHUNK / STEPS;
    for (int task = threadIdx.x; task < count * parts; task += THREADS) {
        int row = task / parts, part = task % parts;
        float value[STEPS];
        load_tokens(rows + (long long)row * scan.length, place.chunk * CHUNK + part * STEPS,
                    scan.length, place.reversed, value);
        write_tile(tile + row * spacing * TILE_ROW + part / SEGMENT * WARP_ROW + part % SEGMENT,
                   value);
    }
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

// dt of a warp's rows, 0 past the end and in rows that are not there: these change nothing.
__device__ inline void step_sizes(const Scan &scan, const Place &place, const Self &self,
                                  const Rows &rows, const Scalars &scalars,
                                  const Four<TOKENS> *slots, float4 *tile, bool is_first_pass,
                                  float (&dt)[ROWS][STEPS]) {
    if (scan.low == nullptr) {
        EACH_ROW take_tokens(scan.delta + place.own + (long long)rows.row[r] * scan.length, slots,
                             r, self.at, scan.length, place.reversed, dt[r]);
    } else {
        EACH_ROW EACH_STEP dt[r][i] = 0.0f;
        const MATRIX *low = scan.low + place.matrix;
        for (int first = 0; first < scan.rank; first += 2 * STAGE) {
            int count = min(scan.rank - first, 2 * STAGE);
            const MATRIX *piece = low + (long long)first * scan.length;
            if (is_first_pass || scan.rank > 2 * STAGE) {
                __syncthreads();
                stage(piece, count, tile, 1, scan, place);
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
