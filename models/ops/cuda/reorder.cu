// The pixels of a map in the order in which they are scanned, and back.
//
// Two orders, called sources: rows first and columns first. Of a whole map ("cross") the first is
// the map's own and the second its transpose, brought over in tiles; inside windows both are looked
// up in a table. Compiled with the macro TOKENS (float, bf16 or half).

#include "numbers.cuh"

#define SIDE 32  // of a tile
#define THREADS 256
#define STRIPE (THREADS / SIDE)

struct Reorder {
    const TOKENS *in;
    TOKENS *out;
    const int *table;  // (2, length): for each place in `out` the one in `in`; null: the whole map
    long long in_source_stride, in_batch_stride, in_walk_stride, in_part_stride;
    long long out_source_stride, out_batch_stride, out_walk_stride;
    int height, width;  // of out, where it is a map; a map's transpose has them swapped
    int rows, walks, batch, sources, first_source, tiles, parts;
    int depth;  // rows of a block
};

struct Spot {
    int source, batch, walk, row, tile;  // row: the first of the block's
};

// Blocks of both sources come one after the other: what one has read the other finds in the cache.
__device__ inline Spot take_spot(const Reorder &task) {
    wait_for_kernel_before();
    int rest = blockIdx.x, row_blocks = (task.rows + task.depth - 1) / task.depth;
    Spot spot;
    spot.tile = rest % task.tiles, rest /= task.tiles;
    spot.source = task.first_source + rest % task.sources, rest /= task.sources;
    spot.row = rest % row_blocks * task.depth, rest /= row_blocks;
    spot.walk = rest % task.walks, rest /= task.walks;
    spot.batch = rest;
    return spot;
}

#define SHARE (SIDE * SIDE / THREADS)  // pixels of a thread

// Where a thread's pixels of a tile come from and go to in a row; -1: nowhere.
struct Way {
    int from[SHARE], to[SHARE];
};

__device__ inline Way way_of(const Reorder &task, const Spot &spot, bool turns) {
    Way way;
    int length = task.height * task.width, across_tiles = (task.width + SIDE - 1) / SIDE;
    int top = spot.tile / across_tiles * SIDE, left = spot.tile % across_tiles * SIDE;
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        if (turns) {
            int in_row = left + stripe + k * STRIPE, out_row = top + stripe + k * STRIPE;
            bool has_in = in_row < task.width && top + across < task.height;
            bool has_out = out_row < task.height && left + across < task.width;
            way.from[k] = has_in ? in_row * task.height + top + across : -1;
            way.to[k] = has_out ? out_row * task.width + left + across : -1;
        } else {
            int at = spot.tile * SIDE * SIDE + k * THREADS + threadIdx.x;
            way.to[k] = at < length ? at : -1;
            way.from[k] = way.to[k];
            if (task.table != nullptr && at < length)
                way.from[k] = task.table[spot.source * length + at];
        }
    }
    return way;
}

// out[source, batch, walk, row] = in[source, batch, walk, row], permuted and summed over its parts.
// A block takes the same tile of several rows, the next of which is on its way meanwhile.
extern "C" __global__ void __launch_bounds__(THREADS) permute(const Reorder task) {
    __shared__ float tile[2][SIDE][SIDE + 1];
    Spot spot = take_spot(task);
    int length = task.height * task.width;
    const TOKENS *in = task.in + spot.source * task.in_source_stride +
                       spot.batch * task.in_batch_stride + spot.walk * task.in_walk_stride;
    TOKENS *out = task.out + spot.source * task.out_source_stride +
                  spot.batch * task.out_batch_stride + spot.walk * task.out_walk_stride;
    bool turns = task.table == nullptr && spot.source > 0;
    Way way = way_of(task, spot, turns);
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
    int end = min(spot.row + task.depth, task.rows);
    float coming[SHARE], value[SHARE];
    for (int row = spot.row - 1; row < end; row++) {
        if (row >= spot.row && turns) {
#pragma unroll
            for (int k = 0; k < SHARE; k++)
                tile[row % 2][stripe + k * STRIPE][across] = coming[k];
        }
#pragma unroll
        for (int k = 0; k < SHARE; k++) value[k] = coming[k], coming[k] = 0.0f;
        for (int part = 0; part < task.parts && row + 1 < end; part++) {
            const TOKENS *next = in + part * task.in_part_stride + (long long)(row + 1) * length;
#pragma unroll
            for (int k = 0; k < SHARE; k++)
                if (way.from[k] >= 0) coming[k] += to_float(next[way.from[k]]);
        }
        if (row < spot.row) continue;
        if (turns) {
            __syncthreads();
#pragma unroll
            for (int k = 0; k < SHARE; k++)
                value[k] = tile[row % 2][across][stripe + k * STRIPE];
        }
#pragma unroll
        for (int k = 0; k < SHARE; k++)
            if (way.to[k] >= 0) from_float(value[k], out[(long long)row * length + way.to[k]]);
    }
}

// out[batch, row, pixel] = the sum over both sources and both their walks of what they hold for it.
extern "C" __global__ void __launch_bounds__(THREADS) merge(const Reorder task) {
    __shared__ float tile[SIDE][SIDE + 1];
    Spot spot = take_spot(task);
    int length = task.height * task.width;
    const TOKENS *in = task.in + spot.batch * task.in_batch_stride + (long long)spot.row * length;
    const TOKENS *back = in + task.in_walk_stride;
    const TOKENS *second = in + task.in_source_stride, *second_back = second + task.in_walk_stride;
    TOKENS *out = task.out + spot.batch * task.out_batch_stride + (long long)spot.row * length;
    if (task.table != nullptr) {
        int pixel[SHARE], one[SHARE], other[SHARE];
#pragma unroll
        for (int k = 0; k < SHARE; k++) {
            pixel[k] = spot.tile * SIDE * SIDE + k * THREADS + threadIdx.x;
            int at = min(pixel[k], length - 1);
            one[k] = task.table[at], other[k] = task.table[length + at];
        }
        int end = min(task.depth, task.rows - spot.row);
        for (long long row = 0; row < end; row++) {
            long long start = row * length;
            float sum[SHARE];
#pragma unroll
            for (int k = 0; k < SHARE; k++) {
                sum[k] = to_float(in[start + one[k]]) + to_float(back[start + one[k]]);
                sum[k] += to_float(second[start + other[k]]) +
                          to_float(second_back[start + other[k]]);
            }
#pragma unroll
            for (int k = 0; k < SHARE; k++)
                if (pixel[k] < length) from_float(sum[k], out[start + pixel[k]]);
        }
        return;
    }
    int across_tiles = (task.width + SIDE - 1) / SIDE;
    int top = spot.tile / across_tiles * SIDE, left = spot.tile % across_tiles * SIDE;
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
    float sum[SHARE];
#pragma unroll
    for (int k = 0; k < SHARE; k++) {  // all loads before the first use
        int row = min(left + stripe + k * STRIPE, task.width - 1);
        int at = row * task.height + min(top + across, task.height - 1);
        tile[stripe + k * STRIPE][across] = to_float(second[at]) + to_float(second_back[at]);
        row = min(top + stripe + k * STRIPE, task.height - 1);
        at = row * task.width + min(left + across, task.width - 1);
        sum[k] = to_float(in[at]) + to_float(back[at]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        int row = top + stripe + k * STRIPE;
        if (row < task.height && left + across < task.width)
            from_float(sum[k] + tile[across][stripe + k * STRIPE],
                       out[row * task.width + left + across]);
    }
}
