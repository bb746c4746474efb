// The pixels of a map in the order in which they are scanned, and back.
//
// Two orders, called sources: rows first and columns first. Of a whole map ("cross") the first is
// the map's own and the second its transpose, brought over in tiles; inside windows both are looked
// up in a table. Compiled with the macro TOKENS (float, bf16 or half), and OTHERS where a second
// array is of another type.

#include "numbers.cuh"

#define SIDE 32  // of a tile
#define THREADS 256
#define STRIPE (THREADS / SIDE)

#ifndef OTHERS
#define OTHERS TOKENS
#endif

template <typename T>
struct Reorder {
    const T *in;
    T *out;
    const int *table;  // (2, length): for each place in `out` the one in `in`; null: the whole map
    long long in_source_stride, in_batch_stride, in_walk_stride, in_part_stride;
    long long out_source_stride, out_batch_stride, out_walk_stride;
    int height, width;  // of out, where it is a map; a map's transpose has them swapped
    int rows, walks, batch, sources, first_source, tiles, parts;
    int depth;   // rows of a block
    int blocks;  // of the task
};

struct Spot {
    int source, batch, walk, row, tile;  // row: the first of the block's
};

// Blocks of both sources come one after the other: what one has read the other finds in the cache.
template <typename T>
__device__ inline Spot spot_of(const Reorder<T> &task, int block) {
    int rest = block, row_blocks = (task.rows + task.depth - 1) / task.depth;
    Spot spot;
    spot.tile = rest % task.tiles, rest /= task.tiles;
    spot.source = task.first_source + rest % task.sources, rest /= task.sources;
    spot.row = rest % row_blocks * task.depth, rest /= row_blocks;
    spot.walk = rest % task.walks, rest /= task.walks;
    spot.batch = rest;
    return spot;
}

#define SHARE (SIDE * SIDE / THREADS)  // pixels of a thread
#define EACH_SHARE _Pragma("unroll") for (int k = 0; k < SHARE; k++)

// Of a thread: where its pixels of a tile lie in a row, and how many there are.
struct Way {
    int at[SHARE], count;
};

// Pixels of a tile of a map of `height` x `width` whose corner is at (top, left).
__device__ inline Way way_of(int top, int left, int height, int width) {
    int x = left + threadIdx.x % SIDE, y = top + threadIdx.x / SIDE;
    Way way;
    EACH_SHARE way.at[k] = (y + k * STRIPE) * width + x;
    way.count = x < width ? (height - y + STRIPE - 1) / STRIPE : 0;
    return way;
}

#define ASKED 4  // parts of the input that are on their way at a time

// The pixels of a row; with `sums` summed over the parts of the input. `row` is where it begins in
// the first part.
template <bool sums, typename T>
__device__ inline void read_row(const Reorder<T> &task, const T *row, const Way &way,
                                float (&pixel)[SHARE]) {
    EACH_SHARE pixel[k] = k < way.count ? to_float(row[hidden(way.at[k])]) : 0.0f;
#pragma unroll 1
    for (int first = 1; sums && first < task.parts; first += ASKED) {
        float more[ASKED][SHARE];
#pragma unroll
        for (int part = 0; part < ASKED; part++) {
            row += task.in_part_stride;
            EACH_SHARE more[part][k] = k < way.count && first + part < task.parts
                                           ? to_float(row[way.at[k]])
                                           : 0.0f;
        }
#pragma unroll
        for (int part = 0; part < ASKED; part++) EACH_SHARE pixel[k] += more[part][k];
    }
}

template <typename T>
__device__ inline void write_row(T *row, const Way &way, const float (&pixel)[SHARE]) {
    EACH_SHARE if (k < way.count) from_float(pixel[k], row[hidden(way.at[k])]);
}

struct Corner {
    int top, left;
};

// Of a tile of a whole map.
template <typename T>
__device__ inline Corner corner_of(const Reorder<T> &task, const Spot &spot) {
    int across_tiles = (task.width + SIDE - 1) / SIDE;
    return {spot.tile / across_tiles * SIDE, spot.tile % across_tiles * SIDE};
}

typedef float Tile[SIDE][SIDE + 1];

// Rows [0, rows) of `in` turned round: a tile at a time, the next row's on its way meanwhile.
template <bool sums, typename T>
__device__ inline void turn_rows(const Reorder<T> &task, const Spot &spot, const T *in, T *out,
                                 int rows, Tile (&tile)[2]) {
    Corner corner = corner_of(task, spot);
    int length = task.height * task.width;
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
    Way from = way_of(corner.left, corner.top, task.width, task.height);
    Way to = way_of(corner.top, corner.left, task.height, task.width);
    float coming[SHARE], pixel[SHARE];
    read_row<sums>(task, in, from, coming);
    for (int row = 0; row < rows; row++, in += length, out += length) {
        EACH_SHARE tile[row % 2][stripe + k * STRIPE][across] = coming[k];
        __syncthreads();
        if (row + 1 < rows) read_row<sums>(task, in + length, from, coming);
        EACH_SHARE pixel[k] = tile[row % 2][across][stripe + k * STRIPE];
        write_row(out, to, pixel);
    }
}

// Rows [0, rows) of `in` in the order of a table, or as they are.
template <bool sums, typename T>
__device__ inline void look_up_rows(const Reorder<T> &task, const Spot &spot, const T *in, T *out,
                                    int rows) {
    int length = task.height * task.width;
    int first = spot.tile * SIDE * SIDE + threadIdx.x;
    Way from, to;
    to.count = from.count = (length - first + THREADS - 1) / THREADS;
    EACH_SHARE {
        to.at[k] = from.at[k] = first + k * THREADS;
        if (task.table != nullptr && k < to.count)
            from.at[k] = task.table[spot.source * length + to.at[k]];
    }
    float coming[SHARE], pixel[SHARE];
    read_row<sums>(task, in, from, coming);
    for (int row = 0; row < rows; row++, in += length, out += length) {
        EACH_SHARE pixel[k] = coming[k];
        if (row + 1 < rows) read_row<sums>(task, in + length, from, coming);
        write_row(out, to, pixel);
    }
}

// out[source, batch, walk, row] = in[source, batch, walk, row], permuted; summed over its parts.
// A block takes the same tile of several rows.
template <bool sums, typename T>
__device__ inline void permute_rows(const Reorder<T> &task, int block, Tile (&tile)[2]) {
    Spot spot = spot_of(task, block);
    long long start = (long long)spot.row * task.height * task.width;
    const T *in = task.in + spot.source * task.in_source_stride +
                  spot.batch * task.in_batch_stride + spot.walk * task.in_walk_stride + start;
    T *out = task.out + spot.source * task.out_source_stride +
             spot.batch * task.out_batch_stride + spot.walk * task.out_walk_stride + start;
    int rows = min(task.depth, task.rows - spot.row);
    if (task.table == nullptr && spot.source > 0)
        turn_rows<sums>(task, spot, in, out, rows, tile);
    else
        look_up_rows<sums>(task, spot, in, out, rows);
}

struct Reorders {
    Reorder<TOKENS> one;
    Reorder<OTHERS> other;  // without blocks if there is none
};

template <bool sums>
__device__ inline void permute_either(const Reorders &tasks) {
    __shared__ Tile tile[2];
    wait_for_kernel_before();
    int block = blockIdx.x;
    if (block < tasks.one.blocks)
        permute_rows<sums>(tasks.one, block, tile);
    else
        permute_rows<sums>(tasks.other, block - tasks.one.blocks, tile);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8) permute(const Reorders tasks) {
    permute_either<false>(tasks);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) permute_sums(const Reorders tasks) {
    permute_either<true>(tasks);
}

// out[batch, row, pixel] = the sum over both sources and both their walks of what they hold for it;
// with `adds` it is added to what is there.
template <bool adds>
__device__ inline void merge_rows(const Reorder<TOKENS> &task) {
    __shared__ Tile tile;
    wait_for_kernel_before();
    Spot spot = spot_of(task, blockIdx.x);
    int length = task.height * task.width;
    const TOKENS *in = task.in + spot.batch * task.in_batch_stride + (long long)spot.row * length;
    const TOKENS *back = in + task.in_walk_stride;
    const TOKENS *second = in + task.in_source_stride, *second_back = second + task.in_walk_stride;
    TOKENS *out = task.out + spot.batch * task.out_batch_stride + (long long)spot.row * length;
    if (task.table != nullptr) {
        int pixel[SHARE], one[SHARE], other[SHARE];
        EACH_SHARE {
            pixel[k] = spot.tile * SIDE * SIDE + k * THREADS + threadIdx.x;
            int at = min(pixel[k], length - 1);
            one[k] = task.table[at], other[k] = task.table[length + at];
        }
        int end = min(task.depth, task.rows - spot.row);
        for (long long row = 0; row < end; row++) {
            long long start = row * length;
            float sum[SHARE];
            EACH_SHARE {
                sum[k] = to_float(in[start + one[k]]) + to_float(back[start + one[k]]);
                sum[k] += to_float(second[start + other[k]]) +
                          to_float(second_back[start + other[k]]);
                if (adds) sum[k] += to_float(out[start + min(pixel[k], length - 1)]);
            }
            EACH_SHARE if (pixel[k] < length) from_float(sum[k], out[start + pixel[k]]);
        }
        return;
    }
    Corner corner = corner_of(task, spot);
    int across = threadIdx.x % SIDE, stripe = threadIdx.x / SIDE;
    float sum[SHARE];
    EACH_SHARE {  // all loads before the first use
        int row = min(corner.left + stripe + k * STRIPE, task.width - 1);
        int at = row * task.height + min(corner.top + across, task.height - 1);
        tile[stripe + k * STRIPE][across] = to_float(second[at]) + to_float(second_back[at]);
        row = min(corner.top + stripe + k * STRIPE, task.height - 1);
        at = row * task.width + min(corner.left + across, task.width - 1);
        sum[k] = to_float(in[at]) + to_float(back[at]);
        if (adds) sum[k] += to_float(out[at]);
    }
    __syncthreads();
    EACH_SHARE {
        int row = corner.top + stripe + k * STRIPE;
        if (row < task.height && corner.left + across < task.width)
            from_float(sum[k] + tile[across][stripe + k * STRIPE],
                       out[row * task.width + corner.left + across]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) merge(const Reorder<TOKENS> task) {
    merge_rows<false>(task);
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_onto(const Reorder<TOKENS> task) {
    merge_rows<true>(task);
}
