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
};

struct Sums {
    Sum sums[3];  // those that are not there have no blocks
};

extern "C" __global__ void __launch_bounds__(THREADS) sum(const Sums task) {
    __shared__ float partial[THREADS];
    wait_for_kernel_before();
    int block = blockIdx.x;
    Sum own = task.sums[0];
#pragma unroll
    for (int k = 1; k < 3; k++)
        if (block >= own.blocks) block -= own.blocks, own = task.sums[k];
    int outputs = THREADS / own.slices, slice = threadIdx.x / outputs;
    long long at = (long long)block * outputs + threadIdx.x % outputs;
    float total = 0.0f;
    for (int first = slice; first < own.terms && at < own.count; first += ASKED * own.slices) {
        float term[ASKED];  // all on their way before the first is added
#pragma unroll
        for (int k = 0; k < ASKED; k++) {
            int row = first + k * own.slices;
            term[k] = row < own.terms ? own.in[row * own.count + at] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < ASKED; k++) total += term[k];
    }
    for (int apart = THREADS / 2; apart >= outputs; apart /= 2) {
        partial[threadIdx.x] = total;
        __syncthreads();
        if (threadIdx.x < apart) total += partial[threadIdx.x + apart];
        __syncthreads();
    }
    if (slice == 0 && at < own.count) own.out[at] = total;
}
