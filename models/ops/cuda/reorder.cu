// The pixels of a map in the order in which they are scanned, and back.
//
// Two orders, called sources: rows first and columns first. Of a whole map ("cross") the first is
// the map's own and the second its transpose, brought over in tiles; inside windows both are looked
// up in a table. Compiled with the macros TOKENS (float, bf16 or half) and SIDE (of a tile).

#include "numbers.cuh"

#define THREADS 256
#define STRIPE (THREADS / SIDE)

struct Reorder {
    const TOKENS *in;
    TOKENS *out;
    const int *table;  // (2, length): for each place in `out` the one in `in`; null: the whole map
    long long in_source_stride, in_batch_stride, in_walk_stride, in_part_stride;
    long long out_source_stride, out_batch_stride, out_walk_stride;
    int height, width;  // of out, where it is a map; a map's transpose has them swapped
    int rows, walks, batch, first_source, tiles, parts;
};

struct Spot {
    int source, batch, walk, row, tile;
};

__device__ inline Spot take_spot(const Reorder &task) {
    int rest = blockIdx.x;
    Spot spot;
    spot.tile = rest % task.tiles, rest /= task.tiles;
    spot.row = rest % task.rows, rest /= task.rows;
    spot.walk = rest % task.walks, rest /= task.walks;
    spot.batch = rest % task.batch, rest /= task.batch;
    spot.source = task.first_source + rest;
    return spot;
}

// out[source, batch, walk, row] = in[source, batch, walk, row], permuted and summed over its parts.
extern "C" __global__ void __launch_bounds__(THREADS) permute(const Reorder task) {
    __shared__ float tile[SIDE][SIDE + 1];
    Spot spot = take_spot(task);
    int length = task.height * task.width;
    const TOKENS *in = task.in + spot.source * task.in_source_stride +
                       spot.batch * task.in_batch_stride + spot.walk * task.in_walk_stride +
                       (long long)spot.row * length;
    TOKENS *out = task.out + spot.source * task.out_source_stride +
                  spot.batch * task.out_batch_stride + spot.walk * task.out_walk_stride +
                  (long long)spot.row * length;
    float sum[SIDE / STRIPE] = {};
    if (task.table != nullptr || spot.source == 0) {
        const int *table = task.table == nullptr ? nullptr : task.table + spot.source * length;
        int start = spot.tile * SIDE * SIDE + threadIdx.x;
        for (int part = 0; part < task.parts; part++)
#pragma unroll
            for (int k = 0; k < SIDE / STRIPE; k++) {
                int at = start + k * THREADS;
                if (at < length)
                    sum[k] += to_float(in[part * task.in_part_stride +
                                          (table == nullptr ? at : table[at])]);
            }
#pragma unroll
        for (int k = 0; k < SIDE / STRIPE; k++) {
            int at = start + k * THREADS;
            if (at < length) from_float(sum[k], out[at]);
        }
        return;
    }
    int across_tiles = (task.width + SIDE - 1) / SIDE;
    int top = spot.tile / across_tiles * SIDE, left = spot.tile % across_tiles * SIDE;
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
    for (int part = 0; part < task.parts; part++)
#pragma unroll
        for (int k = 0; k < SIDE / STRIPE; k++) {
            int row = left + stripe + k * STRIPE;
            if (row < task.width && top + across < task.height)
                sum[k] += to_float(in[part * task.in_part_stride + row * task.height + top +
                                      across]);
        }
#pragma unroll
    for (int k = 0; k < SIDE / STRIPE; k++) tile[stripe + k * STRIPE][across] = sum[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < SIDE / STRIPE; k++) {
        int row = top + stripe + k * STRIPE;
        if (row < task.height && left + across < task.width)
            from_float(tile[across][stripe + k * STRIPE], out[row * task.width + left + across]);
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
#pragma unroll
        for (int i = threadIdx.x; i < SIDE * SIDE; i += THREADS) {
            int pixel = spot.tile * SIDE * SIDE + i, at = min(pixel, length - 1);
            int one = task.table[at], other = task.table[length + at];
            float sum = to_float(in[one]) + to_float(back[one]);
            sum += to_float(second[other]) + to_float(second_back[other]);
            if (pixel < length) from_float(sum, out[pixel]);
        }
        return;
    }
    int across_tiles = (task.width + SIDE - 1) / SIDE;
    int top = spot.tile / across_tiles * SIDE, left = spot.tile % across_tiles * SIDE;
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
    float sum[SIDE / STRIPE];
#pragma unroll
    for (int k = 0; k < SIDE / STRIPE; k++) {  // all loads before the first use
        int row = min(left + stripe + k * STRIPE, task.width - 1);
        int at = row * task.height + min(top + across, task.height - 1);
        tile[stripe + k * STRIPE][across] = to_float(second[at]) + to_float(second_back[at]);
        row = min(top + stripe + k * STRIPE, task.height - 1);
        at = row * task.width + min(left + across, task.width - 1);
        sum[k] = to_float(in[at]) + to_float(back[at]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < SIDE / STRIPE; k++) {
        int row = top + stripe + k * STRIPE;
        if (row < task.height && left + across < task.width)
            from_float(sum[k] + tile[across][stripe + k * STRIPE],
                       out[row * task.width + left + across]);
    }
}
