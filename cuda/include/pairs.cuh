// Arithmetic with two 16-bit numbers in a register. From sm_90 on. PTX 7.8.
#pragma once
#include "common.cuh"

// a − b, each rounded to nearest.
template <class T> DEVICE u32 difference(u32 a, u32 b);
template <> DEVICE u32 difference<Bf16>(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
template <> DEVICE u32 difference<F16>(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
