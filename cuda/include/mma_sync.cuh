// The MMA of a warp, for sm_80 and later: D [16, 8] += A [16, 16] · B [8, 16]ᵀ, fp32 sums. Lane (g = lane / 4, t = lane % 4) has
//
//   A  a0: row g, k = 2t, 2t+1    a1: row g + 8, the same    a2: row g, k = 2t+8, 2t+9    a3: row g + 8, those
//   B  b0: column g, k = 2t, 2t+1    b1: k = 2t+8, 2t+9
//   D  d[0], d[1]: row g, columns 2t, 2t+1    d[2], d[3]: row g + 8
#pragma once
#include "common.cuh"

template <class T> DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
#define MMA(T, type)                                                                                                          \
    template <> DEVICE void mma<T>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {                           \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                  \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                          \
    }
MMA(Bf16, "bf16")
MMA(F16, "f16")
