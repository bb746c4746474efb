// What all kernels share: types of their tensors (arithmetic is in float32), how they begin.
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

#ifndef CMFS_EMULATED
// For the compiler x changes here: it neither looks at it before nor computes it again after.
__device__ inline void keep(float &x) { asm volatile("" : "+f"(x)); }
__device__ inline void keep(int &x) { asm volatile("" : "+r"(x)); }
__device__ inline void keep(long long &x) { asm volatile("" : "+l"(x)); }
#endif

// Hidden from the compiler, so that it computes what depends on it anew instead of keeping it.
__device__ inline int hidden(int x) {
    keep(x);
    return x;
}

// Each kernel begins so. It is launched while the one before it may still run, and lets the next be
// launched: what that takes is over by the time that there is room on the GPU.
__device__ inline void wait_for_kernel_before() {
#if !defined(CMFS_EMULATED) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
}
