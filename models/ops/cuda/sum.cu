// Sums over the first dimension of arrays (terms, count): what the blocks of a scan, or of a long
// product, leave to be added up. In the same order in every run.

#include "numbers.cuh"

#define THREADS 256

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
    if (at < own.count)
#pragma unroll 8
        for (int term = slice; term < own.terms; term += own.slices)
            total += own.in[term * own.count + at];
    for (int apart = THREADS / 2; apart >= outputs; apart /= 2) {
        partial[threadIdx.x] = total;
        __syncthreads();
        if (threadIdx.x < apart) total += partial[threadIdx.x + apart];
        __syncthreads();
    }
    if (slice == 0 && at < own.count) own.out[at] = total;
}
