// What the language lacks: instructions of the GPU, and functions of the scan's step sizes.
#pragma once

#include "numbers.cuh"

#define ALL 0xffffffffu  // lanes
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

#ifndef CMFS_EMULATED
__device__ inline float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
__device__ inline float log2_fast(float x) {
    float out;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
// The same as exp2_fast, not to be left to a branch.
__device__ inline float exp2_always(float x) {
    float out;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
// `bytes` (8 or 16) to shared memory; zeros where `is_there` is false.
template <int bytes>
__device__ inline void copy_later(void *to, const void *from, bool is_there) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    int count = is_there ? bytes : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(at), "l"(from), "n"(bytes), "r"(count) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline int read_flag(const int *flag) {
    int value;
    asm volatile("ld.acquire.cta.shared.s32 %0, [%1];"
                 : "=r"(value) : "r"((unsigned)__cvta_generic_to_shared(flag)) : "memory");
    return value;
}
__device__ inline void write_flag(int *flag, int value) {
    asm volatile("st.release.cta.shared.s32 [%0], %1;"
                 ::"r"((unsigned)__cvta_generic_to_shared(flag)), "r"(value) : "memory");
}
#if __CUDA_ARCH__ >= 800
// sum += left · right by a warp: elements a to d of the left factor, e and f of the right one, spread
// over the lanes as product.cuh says. Of both TF32's bits count.
__device__ inline void multiply_tf32(float (&sum)[4], float a, float b, float c, float d, float e,
                                     float f) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(__float_as_uint(c)),
          "r"(__float_as_uint(d)), "r"(__float_as_uint(e)), "r"(__float_as_uint(f)));
}
#endif
#define WHILE_WAITING
#endif

// log(1 + e^x). To full relative precision with log1p(z) / z on [0, 1] by a polynomial (2e-7); for
// tokens of half precision by the GPU's logarithm, to 2e-7 absolutely.
__device__ inline float softplus(float x) {
    float z = exp2_fast(-fabsf(x) * LOG2_E);
    if (sizeof(TOKENS) < 4) return fmaf(log2_fast(1.0f + z), LN_2, fmaxf(x, 0.0f));
    float p = 0.005126102361828089f * z - 0.029074065387248993f;
    p = p * z + 0.0775160863995552f;
    p = p * z - 0.13602247834205627f;
    p = p * z + 0.19076880812644958f;
    p = p * z - 0.2483539879322052f;
    p = p * z + 0.3331812024116516f;
    p = p * z - 0.4999944567680359f;
    p = p * z + 0.9999999403953552f;
    return fmaxf(x, 0.0f) + p * z;
}

// The slope of softplus where its value is dt: 1 - e^-dt, by its series where dt is small
// (but for half precision).
__device__ inline float softplus_slope(float dt) {
    float large = 1.0f - exp2_always(-dt * LOG2_E);
    if (sizeof(TOKENS) < 4) return large;
    float p = dt * (1.0f / 120) - (1.0f / 24);
    p = p * dt + 1.0f / 6;
    p = p * dt - 0.5f;
    p = p * dt + 1.0f;
    return dt < 0.125f ? dt * p : large;
}
