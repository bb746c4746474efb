// Words that cannot be read yet, for what chunks of a scan hand on.

#include "numbers.cuh"

#define THREADS 256

struct Clear {
    unsigned *words;
    long long count;
};

extern "C" __global__ void __launch_bounds__(THREADS) clear(const Clear task) {
    wait_for_kernel_before();
    long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (at < task.count) task.words[at] = NOT_YET;
}
