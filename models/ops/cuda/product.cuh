// dt of dt_low on tensor cores, before bias and softplus, for all channels of a block at once: for
// channels of one state it is as much work as the scan.
//
// For each 64 tokens it is the product of dt_low and the weights of eight channels, a tile. A lane
// has g = lane / 4 and t = lane % 4. It reads rows t and t + 4 of eight of dt_low, of each two
// pieces of four tokens: those of the first are row g of four products, those of the second row
// g + 8. So it gets both pieces of dt of channels 2 t and 2 t + 1 of each tile.
#pragma once

#include "tokens.cuh"

#define MADE (RANK > 0 ? TOGETHER * BLOCK_ROWS : 0)  // channels

#if RANK

#define HAS_TENSOR_CORES (__CUDA_ARCH__ >= 800)  // for TF32

// A number as a sum of two of TF32, which has 11 bits. What is left out of a product of two such
// numbers is 2^-21 of it, if one of them was rounded.
struct Factor { float high, low; };

template <bool is_rounded>
__device__ inline Factor split(float x) {
#if HAS_TENSOR_CORES
    unsigned bits = __float_as_uint(x);
    float high = __uint_as_float((is_rounded ? bits + 0x1000 : bits) & 0xffffe000);
    return {high, x - high};
#else
    return {x, 0.0f};
#endif
}

// The factors of a product, and the sums that it adds to. A lane has
//     of the left one (16, 8)   elements (g, t), (g + 8, t), (g, t + 4) and (g + 8, t + 4),
//     of the right one (8, 8)   elements (t, g) and (t + 4, g),
//     of the sums (16, 8)       elements (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
typedef Factor Left[4];
typedef Factor Right[2];
typedef float Sum[4];

#if HAS_TENSOR_CORES
__device__ inline void multiply(Sum &sum, const Left &a, const Right &b) {
    if (sizeof(MATRIX) == 4)  // dt_low of half precision has no low part
        multiply_tf32(sum, a[0].low, a[1].low, a[2].low, a[3].low, b[0].high, b[1].high);
    multiply_tf32(sum, a[0].high, a[1].high, a[2].high, a[3].high, b[0].low, b[1].low);
    multiply_tf32(sum, a[0].high, a[1].high, a[2].high, a[3].high, b[0].high, b[1].high);
}
#else
__device__ inline void multiply(Sum &sum, const Left &a, const Right &b) {
    int lane = threadIdx.x % LANES, row = lane / 4 * 4, column = lane % 4 * 2 * 4;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float upper = __shfl_sync(ALL, a[k / 4 * 2].high, row + k % 4);
        float lower = __shfl_sync(ALL, a[k / 4 * 2 + 1].high, row + k % 4);
        float left = __shfl_sync(ALL, b[k / 4].high, column + k % 4);
        float right = __shfl_sync(ALL, b[k / 4].high, column + 4 + k % 4);
        sum[0] = fmaf(upper, left, sum[0]), sum[1] = fmaf(upper, right, sum[1]);
        sum[2] = fmaf(lower, left, sum[2]), sum[3] = fmaf(lower, right, sum[3]);
    }
}
#endif

#define TILES ((MADE + 7) / 8)
#define RANK_TILES ((RANK + 7) / 8)
#define GROUPS (CHUNK / 64 / (THREADS / LANES))  // of 64 tokens, of a warp one after the other
typedef Sum Sums[TILES][4];

// What a lane takes with it from group to group.
struct Product {
    int g, t;
    const MATRIX *low;                 // the sequence's first row
    int row[2 * RANK_TILES];           // where rows lie; for those past the last, the last
    Right weights[TILES][RANK_TILES];  // 0 for rows and channels that are not there
};

__device__ inline Product begin_product(const Scan &scan, const Place &place) {
    Product own;
    own.g = threadIdx.x % LANES / 4, own.t = threadIdx.x % 4;
    own.low = scan.low + place.matrix;
#pragma unroll
    for (int i = 0; i < 2 * RANK_TILES; i++)
        own.row[i] = min(4 * i + own.t, RANK - 1) * scan.length;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        int of_block = 8 * m + own.g, channel = place.block * MADE + of_block;
        const float *weights = scan.weight +
                               ((long long)place.group * CHANNELS + channel) * RANK;
#pragma unroll
        for (int i = 0; i < 2 * RANK_TILES; i++) {
            int row = 4 * i + own.t;
            bool is_there = row < RANK && of_block < MADE && channel < CHANNELS;
            own.weights[m][i / 2][i % 2] = split<true>(is_there ? weights[row] : 0.0f);
        }
    }
    return own;
}

typedef float Low[4][4];

// Of eight rows of dt_low the lane's tokens of a group, as they lie in memory. Past the end any
// token will do: dt becomes 0 there.
__device__ inline void load_low(const Scan &scan, const Place &place, const Product &own, int group,
                                int eight, Low &low) {
    const int together = ALIGNED ? 4 : 1;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j += together) {
            int step = place.chunk * CHUNK + group * 64 + own.g * STEPS + i % 2 * 4 + j;
            int at = place_of(min(step, scan.length - together), place);
            const MATRIX *from = own.low + own.row[2 * eight + i / 2] + at;
#if ALIGNED
            Four<MATRIX> piece = *(const Four<MATRIX> *)from;
            to_floats(piece, low[i]);
#else
            low[i][j] = to_float(*from);
#endif
        }
}

__device__ inline void multiply_low(const Product &own, int eight, const Low &low, Sums &sums) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Left left = {split<false>(low[0][j]), split<false>(low[1][j]), split<false>(low[2][j]),
                     split<false>(low[3][j])};
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply(sums[m][j], left, own.weights[m][eight]);
    }
}

// A channel is a row of a tile in shared memory. Its lanes are permuted, so that neither those who
// write nor those who read meet at a bank.
__device__ inline int permuted(int lane, int channel) { return lane ^ (channel & 6); }

__device__ inline void store_group(const Place &place, const Product &own, int group,
                                   const Sums &sums, float4 *tile) {
    int lane = group * 8 + own.g;
    tile += lane / SEGMENT * WARP_ROW;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int channel = 8 * m + 2 * own.t + i % 2;
            float4 piece = {sums[m][0][i], sums[m][1][i], sums[m][2][i], sums[m][3][i]};
            if (ALIGNED && REVERSIBLE && place.reversed)
                piece = {piece.w, piece.z, piece.y, piece.x};
            if (channel < MADE)
                tile[channel * TILE_ROW + i / 2 * SEGMENT + permuted(lane % SEGMENT, channel)] =
                    piece;
        }
}

#define AHEAD (BLOCKS <= 4)  // there are registers for rows of the group to come

// dt of all passes, to shared memory; the next eight rows are on their way meanwhile.
__device__ inline void make_steps(const Scan &scan, const Place &place, float4 *tile) {
    static_assert(STEPS == 8, "a lane reads two pieces, which are those of a lane of the scan");
    Product own = begin_product(scan, place);
    int first = warp_of_block() * GROUPS;
    Low low[2];
#pragma unroll (AHEAD ? GROUPS : 1)
    for (int i = 0; i < GROUPS; i++) {
        Sums sums = {};
        int begin = AHEAD ? i * RANK_TILES : 0;
        if (!AHEAD || i == 0) load_low(scan, place, own, first + i, 0, low[0]);
#pragma unroll
        for (int k = 0; k < RANK_TILES; k++) {
            Low &next = low[(begin + k + 1) % 2];
            if (k + 1 < RANK_TILES) load_low(scan, place, own, first + i, k + 1, next);
            else if (AHEAD && i + 1 < GROUPS) load_low(scan, place, own, first + i + 1, 0, next);
            multiply_low(own, k, low[(begin + k) % 2], sums);
        }
        store_group(place, own, first + i, sums, tile);
    }
}

// That of a warp's channel in a pass.
__device__ inline void read_steps(const Self &self, int pass, const float4 *tile,
                                  float (&dt)[STEPS]) {
    int channel = pass * BLOCK_ROWS + self.row_warp;
    read_tile(tile + channel * TILE_ROW + self.token_warp * WARP_ROW +
                  permuted(self.lane, channel),
              dt);
}

#endif
