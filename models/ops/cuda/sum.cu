// Sums over the first dimension of arrays (terms, count): what the blocks of a scan, or of a long
// product, leave to be added up. In the same order in every run.

#include "numbers.cuh"

#define THREADS 256
#define ASKED 8  // terms that a thread asks for at a time

struct Sum {
    const float *in;
    float *out;
    long long count;
    int terms, slices, blocks;  // slices: threads that share an output, a power of two
    int width;                  // outputs of a thread, side by side: 1 or 4
};

struct Sums {
    Sum sums[3];  // those that are not there have no blocks
};

template <int width> struct alignas(4 * width) Side { float value[width]; };

template <int width>
__device__ inline void add_up(const Sum &own, int block, Side<4> *partials) {
    Side<width> *partial = (Side<width> *)partials;
    const Side<width> *in = (const Side<width> *)own.in;
    long long count = own.count / width;
    int outputs = THREADS / own.slices, slice = threadIdx.x / outputs;
    long long at = (long long)block * outputs + threadIdx.x % outputs;
    Side<width> total = {};
    for (int first = slice; first < own.terms && at < count; first += ASKED * own.slices) {
        Side<width> term[ASKED];  // all on their way before the first is added
#pragma unroll
        for (int k = 0; k < ASKED; k++) {
            int row = first + k * own.slices;
            term[k] = row < own.terms ? in[row * count + at] : Side<width>();
        }
#pragma unroll
        for (int k = 0; k < ASKED; k++)
#pragma unroll
            for (int i = 0; i < width; i++) total.value[i] += term[k].value[i];
    }
    for (int apart = THREADS / 2; apart >= outputs; apart /= 2) {
        partial[threadIdx.x] = total;
        __syncthreads();
        if (threadIdx.x < apart)
#pragma unroll
            for (int i = 0; i < width; i++)
                total.value[i] += partial[threadIdx.x + apart].value[i];
        __syncthreads();
    }
    if (slice == 0 && at < count) ((Side<width> *)own.out)[at] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS) sum(const Sums task) {
    __shared__ Side<4> partials[THREADS];
    wait_for_kernel_before();
    int block = blockIdx.x;
    Sum own = task.sums[0];
#pragma unroll
    for (int k = 1; k < 3; k++)
        if (block >= own.blocks) block -= own.blocks, own = task.sums[k];
    if (own.width == 4)
        add_up<4>(own, block, partials);
    else
        add_up<1>(own, block, partials);
}
