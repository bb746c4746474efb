// Tokens of a lane: from and to global memory, on their way through shared memory, and rows of a
// chunk that lie there.
#pragma once

#include "scan.cuh"

template <typename T>
struct alignas(sizeof(T) == 4 ? 16 : 8) Four { T value[4]; };

template <typename T>
__device__ inline void unpack(const Four<T> (&pieces)[PIECES], bool reversed, float (&out)[STEPS]) {
    EACH_STEP {
        const Four<T> &piece = pieces[i / 4];
        out[i] = to_float(REVERSIBLE && reversed ? piece.value[3 - i % 4] : piece.value[i % 4]);
    }
}

// Where four steps of a row lie, the last first if it is reversed.
__device__ inline int place_of(int step, int length, bool reversed) {
    return REVERSIBLE && reversed ? length - 4 - step : step;
}

// Steps at, at + 1, ... of a row of `length` tokens; past the end 0. No branch between the loads.
template <typename T>
__device__ inline void load_tokens(const T *row, int at, int length, bool reversed,
                                   float (&out)[STEPS]) {
#if ALIGNED
    Four<T> pieces[PIECES] = {};
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        int step = at + 4 * k;
        if (step < length) pieces[k] = *(const Four<T> *)(row + place_of(step, length, reversed));
    }
    unpack(pieces, reversed, out);
#else
    EACH_STEP {
        int step = at + i;
        out[i] = step < length ? to_float(row[reversed ? length - 1 - step : step]) : 0.0f;
    }
#endif
}

template <typename T>
__device__ inline void store_tokens(T *row, int at, int length, bool reversed,
                                    const float (&in)[STEPS]) {
#if ALIGNED
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        Four<T> piece;
#pragma unroll
        for (int i = 0; i < 4; i++)
            from_float(REVERSIBLE && reversed ? in[4 * k + 3 - i] : in[4 * k + i], piece.value[i]);
        int step = at + 4 * k;
        if (step < length) *(Four<T> *)(row + place_of(step, length, reversed)) = piece;
    }
#else
    EACH_STEP {
        int step = at + i;
        if (step < length) from_float(in[i], row[reversed ? length - 1 - step : step]);
    }
#endif
}

// A thread's own tokens on their way through shared memory: fetched in one pass, taken in the next.
#define SLOTS (ROWS * PIECES * THREADS)  // of an array

__device__ inline void fetch_tokens(const TOKENS *row, Four<TOKENS> *slots, int r, int at,
                                    int length, bool reversed) {
#if PREFETCH
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        int step = at + 4 * k;
        copy_later<sizeof(Four<TOKENS>)>(slots + (PIECES * r + k) * THREADS + threadIdx.x,
                                         row + place_of(step, length, reversed), step < length);
    }
#endif
}

__device__ inline void take_tokens(const TOKENS *row, const Four<TOKENS> *slots, int r, int at,
                                   int length, bool reversed, float (&out)[STEPS]) {
#if PREFETCH
    Four<TOKENS> pieces[PIECES];
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        pieces[k] = slots[(PIECES * r + k) * THREADS + threadIdx.x];
    unpack(pieces, reversed, out);
#else
    load_tokens(row, at, length, reversed, out);
#endif
}

// Rows of a chunk in shared memory: for each warp the first pieces of all lanes, then the second
// ones, and so on, so that the lanes of a warp read and write without conflicts.
#define WARP_ROW (PIECES * SEGMENT)  // in float4
#define TILE_ROW (TOKEN_WARPS * WARP_ROW)

__device__ inline void read_tile(const float4 *row, float (&out)[STEPS]) {
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        float4 piece = row[k * SEGMENT];
        out[4 * k] = piece.x, out[4 * k + 1] = piece.y;
        out[4 * k + 2] = piece.z, out[4 * k + 3] = piece.w;
    }
}

__device__ inline void write_tile(float4 *row, const float (&in)[STEPS]) {
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        row[k * SEGMENT] = make_float4(in[4 * k], in[4 * k + 1], in[4 * k + 2], in[4 * k + 3]);
}

__device__ inline void add_to_tile(float4 *row, const float (&x)[STEPS]) {
    float value[STEPS];
    read_tile(row, value);
    EACH_STEP value[i] += x[i];
    write_tile(row, value);
}

__device__ inline float sum_steps(const float (&x)[STEPS]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < STEPS; i += 4) sum += (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
    return sum;
}
