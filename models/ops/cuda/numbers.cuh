// Types of the kernels' tensors; arithmetic is in float32. How a kernel begins.
#pragma once

#define LANES 32
#define NOT_YET 0xffffffffu
#ifndef CMFS_EMULATED
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

struct bf16 { unsigned short bits; };
struct half { unsigned short bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline void from_float(float x, float &out) { out = x; }

#ifdef CMFS_EMULATED
float to_float(half x);
void from_float(float x, half &out);
void from_float(float x, bf16 &out);
#else
__device__ inline float to_float(half x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
    return out;
}
__device__ inline void from_float(float x, half &out) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
__device__ inline void from_float(float x, bf16 &out) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    unsigned bits = __float_as_uint(x);
    bits += 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    out.bits = x != x ? 0x7fff : bits >> 16;
#endif
}
#endif

// Each kernel begins so. It is launched while the one before it may still run, and lets the next be
// launched: what that takes is over by the time that there is room on the GPU.
__device__ inline void wait_for_kernel_before() {
#if !defined(CMFS_EMULATED) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
}
