// Words that cannot be read yet, for what chunks of a scan hand on.

#include "numbers.cuh"

#define THREADS 256

struct Clear {
    unsigned *words;  // 16 bytes aligned
    long long count;
};

struct alignas(16) FourWords {
    unsigned word[4];
};

extern "C" __global__ void __launch_bounds__(THREADS) clear(const Clear task) {
    wait_for_kernel_before();
    long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (4 * at + 4 <= task.count)
        ((FourWords *)task.words)[at] = {NOT_YET, NOT_YET, NOT_YET, NOT_YET};
    else
        for (long long i = 4 * at; i < task.count; i++) task.words[i] = NOT_YET;
}
