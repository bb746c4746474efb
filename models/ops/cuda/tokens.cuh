// Tokens of a lane: from and to global memory, on their way through shared memory, and rows of a
// chunk that lie there.
#pragma once

#include "scan.cuh"

template <typename T>
struct alignas(sizeof(T) == 4 ? 16 : 8) Four { T value[4]; };

template <typename T>
__device__ inline void to_floats(const Four<T> &four, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = to_float(four.value[i]);
}
// Two at a time: of a word the upper half is a float already, once the lower is gone.
__device__ inline void to_floats(const Four<bf16> &four, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        unsigned word;
        memcpy(&word, four.value + i, 4);
        out[i] = __uint_as_float(word << 16), out[i + 1] = __uint_as_float(word & 0xffff0000u);
    }
}

// A lane's steps of a row as they were read: fours of an aligned row that is walked in reverse lie
// as in memory.
template <typename T>
using Pieces = Four<T>[PIECES];

template <typename T>
__device__ inline void unpack(const Pieces<T> &pieces, bool reversed, float (&out)[STEPS]) {
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        float four[4];
        to_floats(pieces[k], four);
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[4 * k + i] = ALIGNED && REVERSIBLE && reversed ? four[3 - i] : four[i];
    }
}

// A lane's steps of a row, of which `left` are there; past them 0. direction: that of the steps, 1
// or -1. No branch between the loads.
template <typename T>
__device__ inline void load_pieces(const T *first, int left, int direction, Pieces<T> &pieces) {
    if (!REVERSIBLE) direction = 1;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        pieces[k] = {};
#if ALIGNED
        if (4 * k < left) pieces[k] = *(const Four<T> *)(first + 4 * k * direction);
#else
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (4 * k + i < left) pieces[k].value[i] = first[(4 * k + i) * direction];
#endif
    }
}

// The next four, or the next one, of steps whose first lies at `first`.
template <typename T>
__device__ inline T *after(T *first, int steps, bool reversed) {
    return REVERSIBLE && reversed ? first - steps : first + steps;
}

template <typename T>
__device__ inline void store_tokens(T *first, int left, bool reversed, const float (&in)[STEPS]) {
#if ALIGNED
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        Four<T> piece;
#pragma unroll
        for (int i = 0; i < 4; i++)
            from_float(REVERSIBLE && reversed ? in[4 * k + 3 - i] : in[4 * k + i], piece.value[i]);
        if (4 * k < left) *(Four<T> *)after(first, 4 * k, reversed) = piece;
    }
#else
    EACH_STEP if (i < left) from_float(in[i], *after(first, i, reversed));
#endif
}

// A thread's own tokens on their way through shared memory: fetched in one pass, taken in the next.
#define SLOTS (ROWS * PIECES * THREADS)  // of an array

__device__ inline void fetch_tokens(const TOKENS *first, Four<TOKENS> *slots, int r, int left,
                                    bool reversed) {
#if PREFETCH
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        copy_later<sizeof(Four<TOKENS>)>(slots + (PIECES * r + k) * THREADS + threadIdx.x,
                                         after(first, 4 * k, reversed), 4 * k < left);
#endif
}

__device__ inline void take_pieces(const TOKENS *first, const Four<TOKENS> *slots, int r, int left,
                                   bool reversed, Pieces<TOKENS> &pieces) {
#if PREFETCH
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        pieces[k] = slots[(PIECES * r + k) * THREADS + threadIdx.x];
#else
    load_pieces(first, left, reversed ? -1 : 1, pieces);
#endif
}

__device__ inline void take_tokens(const TOKENS *first, const Four<TOKENS> *slots, int r, int left,
                                   bool reversed, float (&out)[STEPS]) {
    Pieces<TOKENS> pieces;
    take_pieces(first, slots, r, left, reversed, pieces);
    unpack(pieces, reversed, out);
}

// Rows of a chunk in shared memory: for each warp the first pieces of all lanes, then the second
// ones, and so on, so that the lanes of a warp read and write without conflicts.
#define WARP_ROW (PIECES * SEGMENT)  // in float4
#define TILE_ROW (TOKEN_WARPS * WARP_ROW)

template <int apart>  // in float4
__device__ inline void read_pieces(const float4 *first, float (&out)[STEPS]) {
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        float4 piece = first[k * apart];
        out[4 * k] = piece.x, out[4 * k + 1] = piece.y;
        out[4 * k + 2] = piece.z, out[4 * k + 3] = piece.w;
    }
}

template <int apart>
__device__ inline void write_pieces(float4 *first, const float (&in)[STEPS]) {
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        first[k * apart] = make_float4(in[4 * k], in[4 * k + 1], in[4 * k + 2], in[4 * k + 3]);
}

__device__ inline void read_tile(const float4 *row, float (&out)[STEPS]) {
    read_pieces<SEGMENT>(row, out);
}

__device__ inline void write_tile(float4 *row, const float (&in)[STEPS]) {
    write_pieces<SEGMENT>(row, in);
}

__device__ inline void add_to_tile(float4 *row, const float (&x)[STEPS]) {
    float value[STEPS];
    read_tile(row, value);
    EACH_STEP value[i] += x[i];
    write_tile(row, value);
}

__device__ inline float sum_steps(const float (&x)[STEPS]) {
    float sum = (x[0] + x[1]) + (x[2] + x[3]);
#pragma unroll
    for (int i = 4; i < STEPS; i += 4) sum += (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
    return sum;
}
