// What the selective scan's kernels for NVIDIA GPUs share: their arguments, and who does what.
//
// One pair of kernels for many states (scan_many.cu) and one for a single state a channel
// (scan_single.cu) serve selective_scan and the four directions of ss2d_scan: groups of channels
// share B and C; a group of the second walk goes from the last token to the first; dt is given, or
// made here of dt_low and its weight.
//
// SEGMENT lanes of a warp share ROWS channels of 256 tokens: each lane holds STEPS tokens one after
// the other in registers and walks through the states. The warps of a block lie side by side along
// the tokens or take different channels, which share B and C. A block does so in several passes,
// with new channels in each, whose tokens are on their way while it is at those before.
//
// A chunk is what a block covers of the sequence. It takes over the state of the chunk before it
// while the kernel runs: what is handed on is NOT_YET until its writer puts a number there, so that
// no other flag is needed. Blocks draw tickets in the order of their chunks, which means that
// whoever waits, waits for a block that is running or done. Each number is computed from the same
// values in the same order in every run: deterministic. What the forward leaves is what the
// backward starts from.
//
// Compiled for one of the kernels (BACKWARD: 0 or 1) with macros. Constants of a layer, whatever
// the size of the image: TOKENS and MATRIX (float, bf16 or half: type of u, delta, y; of B, C,
// dt_low), CHANNELS (of a group), STATES, RANK (of dt_low, of which dt is made; 0: it is given)
// and REVERSIBLE (1: there are two walks). How the work is cut: SEGMENT, STEPS, ROWS, TOKEN_WARPS
// and ROW_WARPS (of a block), PASSES, BLOCKS (on a multiprocessor at least, which divide its
// registers), STAGE (states of B and C, or half the rows of dt_low, in shared memory at a time),
// TOGETHER (passes for which dt is made at once; of one state all), NEAR (1: with weights from
// shared memory), SCALARS_AHEAD (1: those of all passes are brought at the beginning), ALIGNED (1:
// the length is a multiple of four and so is each row's address) and PREFETCH (1: aligned, and the
// GPU copies to shared memory by itself). Each source defines RATES, the states whose rates are in
// shared memory at a time.
#pragma once

#include "device.cuh"

#define SEGMENTS (LANES / SEGMENT)  // of a warp; their lanes alternate
#define WARP_ROWS (ROWS * SEGMENTS)
#define BLOCK_ROWS (ROW_WARPS * WARP_ROWS)  // in one pass
#define CHANNEL_BLOCKS ((CHANNELS + PASSES * BLOCK_ROWS - 1) / (PASSES * BLOCK_ROWS))
#define THREADS (TOKEN_WARPS * ROW_WARPS * LANES)
#define CHUNK (TOKEN_WARPS * SEGMENT * STEPS)
#define PIECES (STEPS / 4)  // of four tokens, that a lane reads and writes at once
#define EACH_ROW _Pragma("unroll") for (int r = 0; r < ROWS; r++)
#define EACH_STEP _Pragma("unroll") for (int i = 0; i < STEPS; i++)
#define EACH_STEP_BACK _Pragma("unroll") for (int i = STEPS - 1; i >= 0; i--)

// What both kernels are given. group = walk * sources + source; "own" strides are those of tensors
// that each group has for itself, the plain ones of those that the walks of a source share.
struct Scan {
    const TOKENS *u, *delta;
    const MATRIX *low, *B, *C;  // low: dt_low
    const float *A, *D, *bias, *weight;  // (groups, channels[, states or RANK]); A or log(-A)
    TOKENS *y;
    float *borders;  // what chunks hand on
    int *ticket;
    const TOKENS *grad_y;
    float *grad_borders;  // the same of the gradients, from the last chunk to the first
    TOKENS *grad_u, *grad_delta;
    float *grad_matrices;  // of B and C, a part for each block of channels
    float *grad_rows;  // (batch, chunks * TOKEN_WARPS, groups, channels, states + 2): A, D, bias
    long long source_stride, grad_source_stride, batch_stride;  // u, dy
    long long own_source_stride, own_batch_stride, own_walk_stride;
    long long matrix_source_stride, matrix_batch_stride, matrix_walk_stride;
    long long part_stride, part_kind_stride;
    long long part_source_stride, part_batch_stride, part_walk_stride;
    int batch, groups, sources, length, chunks;
    int softplus, has_logs;  // has_logs: of A
    int zero;                // what the compiler does not know
};

// Of a block, in shared memory: registers are scarce.
struct Place {
    int group, source, batch, chunk, block;
    int reversed;           // the group is walked from the last token to the first
    int origin, direction;  // of steps in a row: place_of
    long long shared, grad, own, matrix;  // offsets of a group's first channel, and of its B
    long long border;  // of what the first state of the first channel hands on
    long long sums;    // of the first channel's sums over tokens
};

// Of a thread.
struct Self {
    int lane, token_warp, row_warp;  // lane: of its segment
    int at;                          // its first step
    int from;                        // where that lies in a row
};

// Where a step of a row lies; of a reversed one, if it is aligned, where the four from it on begin.
// Not asked by a branch: a load behind one would wait for those before it.
__device__ inline int place_of(int step, const Place &place) {
    return REVERSIBLE ? place.origin + place.direction * step : step;
}

// From the border after a chunk to that after the next.
#define BORDER ((long long)STATES * CHANNELS)

// Which warp of its block this is; the compiler sees that all lanes agree, and computes what
// depends on it once a warp.
__device__ inline int warp_of_block() { return __shfl_sync(ALL, (int)threadIdx.x / LANES, 0); }

// Where this block works; blocks that start later never have an earlier chunk.
__device__ inline void take_place(const Scan &scan, bool backward, Place &place, Self &self) {
    wait_for_kernel_before();
    if (threadIdx.x == 0) {
        unsigned rest = atomicAdd(scan.ticket, 1) + 1;  // it begins as NOT_YET, -1
        place.block = rest % CHANNEL_BLOCKS, rest /= CHANNEL_BLOCKS;
        place.group = rest % (unsigned)scan.groups, rest /= (unsigned)scan.groups;
        place.batch = rest % (unsigned)scan.batch, rest /= (unsigned)scan.batch;
        place.chunk = backward ? scan.chunks - 1 - rest : rest;
        int walk = place.group / scan.sources;
        long long source = place.group % scan.sources, batch = place.batch;
        place.source = source;
        place.reversed = walk > 0;
        place.origin = walk > 0 ? scan.length - (ALIGNED ? 4 : 1) : 0;
        place.direction = walk > 0 ? -1 : 1;
        place.shared = source * scan.source_stride + batch * scan.batch_stride;
        place.grad = source * scan.grad_source_stride + batch * scan.batch_stride;
        place.own = source * scan.own_source_stride + batch * scan.own_batch_stride +
                    walk * scan.own_walk_stride;
        place.matrix = source * scan.matrix_source_stride + batch * scan.matrix_batch_stride +
                       walk * scan.matrix_walk_stride;
        // borders are (batch, groups, chunks - 1, states, channels)
        place.border = ((batch * scan.groups + place.group) * (scan.chunks - 1) + place.chunk) *
                       BORDER;
        place.sums = ((batch * scan.chunks + place.chunk) * TOKEN_WARPS * scan.groups +
                      place.group) *
                     CHANNELS * (STATES + 2);
    }
    __syncthreads();
    int warp = warp_of_block();
    self.lane = threadIdx.x % LANES / SEGMENTS;
    self.token_warp = warp % TOKEN_WARPS, self.row_warp = ROW_WARPS == 1 ? 0 : warp / TOKEN_WARPS;
    self.at = place.chunk * CHUNK + (self.token_warp * SEGMENT + self.lane) * STEPS;
    self.from = place_of(self.at, place);
}

// The channels of a lane in one pass.
struct Rows {
    int first;  // within the group; may not be there
    bool is_there[ROWS];
    int left[ROWS];    // steps from the lane's first on; none in a channel that is not there
    long long tokens;  // where the first channel's lie, from the group's first channel on
};

// How many passes have channels at all; the last block's may be fewer.
__device__ inline int passes_of(const Place &place) {
    int left = CHANNELS - place.block * PASSES * BLOCK_ROWS;
    return CHANNELS % (PASSES * BLOCK_ROWS) == 0
               ? PASSES
               : min(PASSES, (left + BLOCK_ROWS - 1) / BLOCK_ROWS);
}

__device__ inline void find_there(const Scan &scan, const Self &self, Rows &rows) {
    EACH_ROW {
        rows.is_there[r] = rows.first + r < CHANNELS;
        rows.left[r] = rows.is_there[r] ? scan.length - self.at : 0;
    }
}

__device__ inline Rows rows_of(const Scan &scan, const Place &place, const Self &self, int pass) {
    Rows rows;
    rows.first = (place.block * PASSES + pass) * BLOCK_ROWS + self.row_warp * WARP_ROWS +
                 threadIdx.x % SEGMENTS * ROWS;
    rows.tokens = (long long)rows.first * scan.length + self.from;
    find_there(scan, self, rows);
    return rows;
}

// Those of the next pass.
__device__ inline Rows rows_after(const Scan &scan, const Self &self, Rows rows) {
    rows.first += BLOCK_ROWS;
    rows.tokens += (long long)BLOCK_ROWS * scan.length;
    find_there(scan, self, rows);
    return rows;
}

// Where a channel's tokens lie.
__device__ inline long long tokens_of(const Scan &scan, const Rows &rows, int r) {
    return rows.tokens + (long long)r * scan.length;
}

// The rate of decay for base 2, from what A holds.
__device__ inline float rate_of(const Scan &scan, float A) {
    return scan.has_logs ? -LOG2_E * exp2_fast(A * LOG2_E) : A * LOG2_E;
}

// The gradient of what A holds, from that of the rate for base e.
__device__ inline float for_held(const Scan &scan, float for_rate, float rate) {
    return scan.has_logs ? for_rate * rate * (1.0f / LOG2_E) : for_rate;
}
