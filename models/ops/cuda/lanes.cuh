// What the lanes of a warp hand to one another, and what chunks do.
#pragma once

#include "scan.cuh"

#ifndef CMFS_EMULATED
// decay, end = those of this lane after those of the lane `distance` before it, if its segment has
// one (one row a lane).
template <int distance>
__device__ inline void join_up(float (&decay)[ROWS], float (&end)[ROWS]) {
    asm volatile(
        "{ .reg .pred p; .reg .f32 d, e;"
        " shfl.sync.up.b32 e|p, %1, %2, 0, -1; shfl.sync.up.b32 d, %0, %2, 0, -1;"
        " @p fma.rn.f32 %1, %0, e, %1; @p mul.f32 %0, %0, d; }"
        : "+f"(decay[0]), "+f"(end[0])
        : "n"(distance * SEGMENTS));
}

// The same along and against the order of the lanes of a whole warp; besides, a sum over 16 lanes.
// All lanes are asked before the first answer is used.
template <int distance>
__device__ inline void join_both(float (&decay)[ROWS], float (&end)[ROWS],
                                 float (&decay_back)[ROWS], float (&end_back)[ROWS], float &sum) {
#if ROWS == 2
    asm volatile(
        "{ .reg .pred p, q; .reg .f32 a, b, c, d, e, f, g, h, s;"
        " shfl.sync.up.b32 a|p, %1, %9, 0, -1; shfl.sync.up.b32 b, %3, %9, 0, -1;"
        " shfl.sync.down.b32 c|q, %5, %9, 31, -1; shfl.sync.down.b32 d, %7, %9, 31, -1;"
        " shfl.sync.up.b32 e, %0, %9, 0, -1; shfl.sync.up.b32 f, %2, %9, 0, -1;"
        " shfl.sync.down.b32 g, %4, %9, 31, -1; shfl.sync.down.b32 h, %6, %9, 31, -1;"
        " shfl.sync.bfly.b32 s, %8, %9, 31, -1;"
        " @p fma.rn.f32 %1, %0, a, %1; @p fma.rn.f32 %3, %2, b, %3;"
        " @q fma.rn.f32 %5, %4, c, %5; @q fma.rn.f32 %7, %6, d, %7;"
        " @p mul.f32 %0, %0, e; @p mul.f32 %2, %2, f; @q mul.f32 %4, %4, g; @q mul.f32 %6, %6, h;"
        " add.f32 s, s, %8; mov.f32 %8, s; }"
        : "+f"(decay[0]), "+f"(end[0]), "+f"(decay[1]), "+f"(end[1]), "+f"(decay_back[0]),
          "+f"(end_back[0]), "+f"(decay_back[1]), "+f"(end_back[1]), "+f"(sum)
        : "n"(distance));
#else
    asm volatile(
        "{ .reg .pred p, q; .reg .f32 a, b, c, d, s;"
        " shfl.sync.up.b32 a|p, %1, %5, 0, -1; shfl.sync.down.b32 b|q, %3, %5, 31, -1;"
        " shfl.sync.up.b32 c, %0, %5, 0, -1; shfl.sync.down.b32 d, %2, %5, 31, -1;"
        " shfl.sync.bfly.b32 s, %4, %5, 31, -1;"
        " @p fma.rn.f32 %1, %0, a, %1; @q fma.rn.f32 %3, %2, b, %3;"
        " @p mul.f32 %0, %0, c; @q mul.f32 %2, %2, d;"
        " add.f32 s, s, %4; mov.f32 %4, s; }"
        : "+f"(decay[0]), "+f"(end[0]), "+f"(decay_back[0]), "+f"(end_back[0]), "+f"(sum)
        : "n"(distance));
#endif
}
#endif

// From what each lane hands on if zero enters it, and its decay, to what all lanes up to it do. What
// becomes of the decays is of no use.
__device__ inline void join_lanes(float (&decay)[ROWS], float (&end)[ROWS], int lane) {
    join_up<1>(decay, end);
    join_up<2>(decay, end);
    join_up<4>(decay, end);
#if SEGMENT == 32
    join_up<8>(decay, end);
#endif
    EACH_ROW {
        float other = __shfl_up_sync(ALL, end[r], LANES / 2);
        if (lane >= SEGMENT / 2) end[r] = fmaf(decay[r], other, end[r]);
    }
}

// The same for both directions, and sums over 16 lanes each.
__device__ inline void join_lanes(float (&decay)[ROWS], float (&end)[ROWS],
                                  float (&decay_back)[ROWS], float (&end_back)[ROWS], float &sum,
                                  int lane) {
    join_both<1>(decay, end, decay_back, end_back, sum);
    join_both<2>(decay, end, decay_back, end_back, sum);
    join_both<4>(decay, end, decay_back, end_back, sum);
    join_both<8>(decay, end, decay_back, end_back, sum);
    EACH_ROW {
        float other = __shfl_up_sync(ALL, end[r], LANES / 2);
        float other_back = __shfl_down_sync(ALL, end_back[r], LANES / 2);
        if (lane >= LANES / 2)
            end[r] = fmaf(decay[r], other, end[r]);
        else
            end_back[r] = fmaf(decay_back[r], other_back, end_back[r]);
    }
}

// Sums of x over the lanes of a segment up to each, and from each on.
__device__ inline void sum_up(const float (&x)[ROWS], int lane, float (&sum)[ROWS]) {
    EACH_ROW {
        sum[r] = x[r];
#pragma unroll
        for (int distance = 1; distance < SEGMENT; distance *= 2) {
            float other = __shfl_up_sync(ALL, sum[r], distance * SEGMENTS);
            if (lane >= distance) sum[r] += other;
        }
        keep(sum[r]);
    }
}

__device__ inline void sum_down(const float (&x)[ROWS], int lane, float (&sum)[ROWS]) {
    EACH_ROW {
        sum[r] = x[r];
#pragma unroll
        for (int distance = 1; distance < SEGMENT; distance *= 2) {
            float other = __shfl_down_sync(ALL, sum[r], distance * SEGMENTS);
            if (lane + distance < SEGMENT) sum[r] += other;
        }
        keep(sum[r]);
    }
}

// What enters a lane: what the one before hands on, into the first what enters the segment.
__device__ inline float from_lane_before(float handed, float entering, int lane) {
    handed = __shfl_up_sync(ALL, handed, SEGMENTS);
    return lane == 0 ? entering : handed;
}

__device__ inline float from_lane_after(float handed, float entering, int lane) {
    handed = __shfl_down_sync(ALL, handed, SEGMENTS);
    return lane == SEGMENT - 1 ? entering : handed;
}

// The beginning of a sum over the lanes of each row: what follows are sums over 16 lanes. Of two
// rows of a lane the first goes to lanes 0 to 15, the second to the others.
__device__ inline float halve_lanes(const float (&value)[ROWS], int lane) {
#if ROWS == 2
    bool is_upper = lane >= LANES / 2;
    float own = is_upper ? value[1] : value[0], other = is_upper ? value[0] : value[1];
    return own + __shfl_xor_sync(ALL, other, LANES / 2);
#else
    return value[0] + __shfl_xor_sync(ALL, value[0], LANES / 2);
#endif
}

__device__ inline float sum_half(float sum) {
#pragma unroll
    for (int distance = 1; distance < LANES / 2; distance *= 2)
        sum += __shfl_xor_sync(ALL, sum, distance);
    return sum;
}

#ifndef CMFS_EMULATED
// x becomes what is at `at`, if it is to be read. Written so that no copy waits for the load.
__device__ inline void read_handed(const void *at, bool is_read, unsigned &x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.relaxed.gpu.global.u32 %0, [%1]; }"
                 : "+r"(x) : "l"(at), "r"((int)is_read) : "memory");
}
__device__ inline void read_handed(const void *at, bool is_read, unsigned long long &x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.relaxed.gpu.global.u64 %0, [%1]; }"
                 : "+l"(x) : "l"(at), "r"((int)is_read) : "memory");
}
__device__ inline void write_handed(void *at, unsigned x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(x) : "memory");
}
__device__ inline void write_handed(void *at, unsigned long long x) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(x) : "memory");
}
#endif

// Two numbers as one word. Neither is ever NOT_YET: what is not a number comes out of arithmetic as
// 0x7fffffff.
__device__ inline unsigned long long pair_of(float low, float high) {
    return (unsigned long long)__float_as_uint(high) << LANES | __float_as_uint(low);
}

// `zeros` is 0, computed before: the check depends on it, or it would be made as soon as x is asked
// for, and wait.
__device__ inline bool is_missing(unsigned x, unsigned zeros) { return (x | zeros) == NOT_YET; }
__device__ inline bool is_missing(unsigned long long x, unsigned zeros) {
    return is_missing((unsigned)x, zeros) || is_missing((unsigned)(x >> LANES), zeros);
}

template <typename Word>
__device__ inline void wait_for(const Scan &scan, const void *at, float after, Word &x) {
    bool waits = is_missing(x, __float_as_uint(after) & scan.zero);
    while (waits) {
        read_handed(at, true, x);
        waits = is_missing(x, 0);
    }
}
