// Runs CUDA kernels on a CPU for tests: the threads of a block are fibers that take turns, block
// after block in the order of their tickets. With a seed, warps are held up at random, so that they
// come in another order. Only what the kernels need.
// It is compiled once a variant: headers that take long to read are left out.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>

#define CMFS_EMULATED
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type *name = (type *)shared_memory

struct float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x; };
static Index threadIdx, blockIdx;
alignas(16) static char shared_memory[1 << 18];

struct Fiber {
    ucontext_t start;
    jmp_buf place;  // where it goes on: unlike swapcontext, a jump is no system call
    bool has_begun, is_done;
    alignas(16) char stack[1 << 17];
};
static Fiber fibers[1024];
static int thread_count;
static jmp_buf scheduler;
static unsigned chance;  // 0: without
static const void *handed_on[1 << 16];  // where, in this launch; each at its hash or behind it
static bool was_missing;  // something that a block waits for
static bool has_strayed;  // a write past the shared memory that was asked for
enum { MISSING = 1, STRAYED = 2 };

static void yield() {
    int own = threadIdx.x;
    if (!_setjmp(fibers[own].place)) _longjmp(scheduler, 1);
    threadIdx.x = own;
}

struct Barrier {  // all of `count` threads arrive, then all go on
    int arrived = 0, generation = 0;
    void wait(int count) {
        int own = generation;
        if (++arrived == count) { arrived = 0; generation++; return; }
        while (generation == own) yield();
    }
};
static Barrier block_barrier, warp_barriers[32];
static uint32_t lanes[32][2][32];
static int turns[1024];

static void __syncthreads() { block_barrier.wait(thread_count); }

template <typename T> static T exchange(T value, int source) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = turns[threadIdx.x]++ % 2;
    memcpy(&lanes[warp][turn][lane], &value, 4);
    warp_barriers[warp].wait(32);
    T out;
    memcpy(&out, &lanes[warp][turn][source >= 0 && source < 32 ? source : lane], 4);
    return out;
}
template <typename T> static T __shfl_up_sync(unsigned, T value, int by) {
    return exchange(value, threadIdx.x % 32 - by);
}
template <typename T> static T __shfl_down_sync(unsigned, T value, int by) {
    return exchange(value, threadIdx.x % 32 + by);
}
template <typename T> static T __shfl_sync(unsigned, T value, int source) {
    return exchange(value, source);
}
template <typename T> static T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchange(value, (threadIdx.x % 32) ^ mask);
}

static float factors[32][2][32][6];  // what the lanes of a warp hold of both
static void multiply_tf32(float (&sum)[4], float a, float b, float c, float d, float e, float f) {
    const float own[6] = {a, b, c, d, e, f};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = turns[threadIdx.x]++ % 2;
    auto &held = factors[warp][turn];
    for (int i = 0; i < 6; i++) {
        uint32_t bits;
        memcpy(&bits, own + i, 4);
        bits &= 0xffffe000;
        memcpy(&held[lane][i], &bits, 4);
    }
    warp_barriers[warp].wait(32);
    for (int k = 0; k < 8; k++)
        for (int i = 0; i < 4; i++) {
            int column = lane % 4 * 2 + i % 2;
            float left = held[lane / 4 * 4 + k % 4][i / 2 + k / 4 * 2];
            sum[i] += left * held[column * 4 + k % 4][4 + k / 4];
        }
}

static int __any_sync(unsigned, bool value) {
    int any = value;
    for (int mask = 1; mask < 32; mask *= 2) any |= __shfl_xor_sync(0u, any, mask);
    return any;
}

static float __uint_as_float(unsigned x) { float out; memcpy(&out, &x, 4); return out; }
static unsigned __float_as_uint(float x) { unsigned out; memcpy(&out, &x, 4); return out; }
static int atomicAdd(int *at, int by) { int old = *at; *at += by; return old; }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
template <typename T> static void keep(T &) {}
static float exp2_fast(float x) { return exp2f(x); }
static float log2_fast(float x) { return log2f(x); }
#ifdef SEGMENT
static float exp2_always(float x) { return exp2f(x); }
template <int distance, int rows> static void join_up(float (&decay)[rows], float (&end)[rows]) {
    const int apart = distance * (32 / SEGMENT);  // the lanes of segments alternate
    bool has = threadIdx.x % 32 >= apart;
    for (int r = 0; r < rows; r++) {
        float d = __shfl_up_sync(0u, decay[r], apart);
        float e = __shfl_up_sync(0u, end[r], apart);
        if (has) end[r] = decay[r] * e + end[r], decay[r] *= d;
    }
}
template <int distance, int rows>
static void join_both(float (&decay)[rows], float (&end)[rows], float (&decay_back)[rows],
                      float (&end_back)[rows]) {
    join_up<distance>(decay, end);
    bool has = threadIdx.x % 32 + distance < 32;
    for (int r = 0; r < rows; r++) {
        float d = __shfl_down_sync(0u, decay_back[r], distance);
        float e = __shfl_down_sync(0u, end_back[r], distance);
        if (has) end_back[r] = decay_back[r] * e + end_back[r], decay_back[r] *= d;
    }
}
template <int bytes> static void copy_later(void *to, const void *from, bool is_there) {
    if (is_there) memcpy(to, from, bytes);
    else memset(to, 0, bytes);
}
static void wait_for_copies() {}
static void __syncwarp() { warp_barriers[threadIdx.x / 32].wait(32); }
static int read_flag(const int *flag) { return *(volatile const int *)flag; }
static void write_flag(int *flag, int value) { *flag = value; }
#define WHILE_WAITING yield()
static const void *&find_handed(const void *at) {
    const size_t size = sizeof handed_on / sizeof *handed_on;
    size_t place = (uintptr_t)at / 4 * 2654435761u % size, steps = 0;
    while (handed_on[place] && handed_on[place] != at) {
        if (++steps == size) fprintf(stderr, "handed_on is full\n"), abort();
        place = (place + 1) % size;
    }
    return handed_on[place];
}
static void read_handed(const void *at, bool is_read, unsigned &x) {
    if (!is_read) return;
    memcpy(&x, at, sizeof x);
    if (chance && find_handed(at)) {
        chance = chance * 1664525u + 1013904223u;
        if (chance >> 30 == 0) x = 0xffffffffu;
        return;
    }
    if (x == 0xffffffffu) {
        was_missing = true;  // blocks run one after the other: it must be there
        x = 0;
    }
}
static void write_handed(void *at, unsigned x) {
    memcpy(at, &x, sizeof x);
    if (chance) find_handed(at) = at;
}
#endif

static void (*kernel)(const void *);
static const void *arguments;
static void run_thread() {
    kernel(arguments);
    fibers[threadIdx.x].is_done = true;
    _longjmp(scheduler, 1);
}
static void resume(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.has_begun) _longjmp(fiber.place, 1);
    fiber.has_begun = true;
    setcontext(&fiber.start);
}

static int launch(int blocks, int threads, size_t shared_bytes, unsigned seed,
                  void (*given_kernel)(const void *), const void *given) {
    kernel = given_kernel;
    arguments = given;
    thread_count = threads;
    chance = seed;
    if (seed) memset(handed_on, 0, sizeof handed_on);
    was_missing = false;
    has_strayed = shared_bytes > sizeof shared_memory;
    for (int block = 0; block < blocks; block++) {
        blockIdx.x = block;
        memset(shared_memory, 0xff, sizeof shared_memory);  // NaN, also past what was asked for
        for (int i = 0; i < threads; i++) {
            Fiber &fiber = fibers[i];
            fiber.has_begun = fiber.is_done = false;
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack;
            fiber.start.uc_stack.ss_size = sizeof fiber.stack;
            fiber.start.uc_link = nullptr;
            makecontext(&fiber.start, run_thread, 0);
        }
        for (bool is_running = true; is_running;) {
            is_running = false;
            bool is_held_up = false;
            for (int i = 0; i < threads; i++) {
                if (seed && i % 32 == 0) {
                    seed = seed * 1664525u + 1013904223u;
                    is_held_up = seed >> 30 > 0;
                }
                if (fibers[i].is_done) continue;
                is_running = true;
                if (is_held_up) continue;
                threadIdx.x = i;
                resume(fibers[i]);
            }
        }
        for (size_t i = shared_bytes; i < sizeof shared_memory; i++)
            has_strayed |= shared_memory[i] != (char)0xff;
    }
    return was_missing ? MISSING : has_strayed ? STRAYED : 0;
}

#include SOURCE

float to_float(half x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
void from_float(float x, half &out) { _Float16 y = (_Float16)x; memcpy(&out, &y, 2); }
void from_float(float x, bf16 &out) {
    unsigned bits = __float_as_uint(x);
    bits += 0x7fff + ((bits >> 16) & 1);
    out.bits = x != x ? 0x7fff : bits >> 16;
}

#define LAUNCHER(name, Arguments)                                                             \
    extern "C" int launch_##name(int blocks, int threads, int bytes, unsigned seed,           \
                                 const Arguments *given) {                                    \
        auto run = [](const void *own) { name(*(const Arguments *)own); };                    \
        return launch(blocks, threads, bytes, seed, run, given);                              \
    }
#ifdef SEGMENT
#if BACKWARD
LAUNCHER(backward, Scan)
#else
LAUNCHER(forward, Scan)
#endif
#elif defined(TOKENS)
LAUNCHER(permute, Reorders)
LAUNCHER(permute_sums, Reorders)
LAUNCHER(merge, Reorder<TOKENS>)
LAUNCHER(merge_onto, Reorder<TOKENS>)
#elif defined(SUM)
LAUNCHER(sum, Sums)
#else
LAUNCHER(clear, Clear)
#endif
