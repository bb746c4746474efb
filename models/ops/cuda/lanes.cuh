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

// The same along and against the order of the lanes of a whole warp. All lanes are asked before the
// first answer is used.
template <int distance>
__device__ inline void join_both(float (&decay)[ROWS], float (&end)[ROWS],
                                 float (&decay_back)[ROWS], float (&end_back)[ROWS]) {
    asm volatile(
        "{ .reg .pred p, q; .reg .f32 a, b, c, d;"
        " shfl.sync.up.b32 a|p, %1, %4, 0, -1; shfl.sync.down.b32 b|q, %3, %4, 31, -1;"
        " shfl.sync.up.b32 c, %0, %4, 0, -1; shfl.sync.down.b32 d, %2, %4, 31, -1;"
        " @p fma.rn.f32 %1, %0, a, %1; @q fma.rn.f32 %3, %2, b, %3;"
        " @p mul.f32 %0, %0, c; @q mul.f32 %2, %2, d; }"
        : "+f"(decay[0]), "+f"(end[0]), "+f"(decay_back[0]), "+f"(end_back[0])
        : "n"(distance));
}
#endif

// From what each lane hands on if zero enters it, and its decay, to what all lanes up to it do.
// What becomes of the decays is of no use.
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

// The same for both directions.
__device__ inline void join_lanes(float (&decay)[ROWS], float (&end)[ROWS],
                                  float (&decay_back)[ROWS], float (&end_back)[ROWS], int lane) {
    join_both<1>(decay, end, decay_back, end_back);
    join_both<2>(decay, end, decay_back, end_back);
    join_both<4>(decay, end, decay_back, end_back);
    join_both<8>(decay, end, decay_back, end_back);
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

// What lane k of this lane's segment has.
__device__ inline unsigned of_lane(unsigned x, int k) {
    return __shfl_sync(ALL, x, k * SEGMENTS + threadIdx.x % SEGMENTS);
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

// The beginning of sums over the lanes of a warp; what follows are sums over 16 lanes. Of two
// numbers the sum of the first goes to lanes 0 to 15, that of the second to the others.
__device__ inline float halve_lanes(const float (&value)[2], int lane) {
    bool is_upper = lane >= LANES / 2;
    float own = is_upper ? value[1] : value[0], other = is_upper ? value[0] : value[1];
    return own + __shfl_xor_sync(ALL, other, LANES / 2);
}

__device__ inline float halve_lanes(const float (&value)[1], int lane) {
    return value[0] + __shfl_xor_sync(ALL, value[0], LANES / 2);
}

template <int count>
__device__ inline void sum_halves(float (&sum)[count]) {
#pragma unroll
    for (int distance = 1; distance < LANES / 2; distance *= 2)
#pragma unroll
        for (int k = 0; k < count; k++) sum[k] += __shfl_xor_sync(ALL, sum[k], distance);
}

#ifndef CMFS_EMULATED
// x becomes what is at `at`, if it is to be read. Written so that no copy waits for the load.
__device__ inline void read_handed(const void *at, bool is_read, unsigned &x) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.relaxed.gpu.global.u32 %0, [%1]; }"
                 : "+r"(x) : "l"(at), "r"((int)is_read) : "memory");
}
__device__ inline void write_handed(void *at, unsigned x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(x) : "memory");
}
#endif

// A state at a border; 0 where nothing is handed on.
__device__ inline unsigned look(const float *at, bool is_there) {
    unsigned border = 0;
    read_handed(at, is_there, border);
    return border;
}

// Wait until what is at `at`, of which x was read, has been handed on. `after` is computed before
// the first look at x: without it that look would be made as soon as x is asked for, and wait.
__device__ inline void wait_for(const Scan &scan, const void *at, float after, unsigned &x) {
    bool waits = (x | (__float_as_uint(after) & scan.zero)) == NOT_YET;
    while (waits) {
        read_handed(at, true, x);
        waits = x == NOT_YET;
    }
}
