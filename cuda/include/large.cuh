// What the product of many rows needs of the hardware beside the headers that it shares: pairs as floats and back.
#pragma once
#include "shared.cuh"

// The two values of a pair of the table: f16 where they become bf16; for f16, which rounds as finely, 16-bit integers with 32768 for 0.
template <class T> DEVICE float2 values_of(u32 pair);
template <> DEVICE float2 values_of<Bf16>(u32 pair) {
    float2 v;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(pair));
    return v;
}
template <> DEVICE float2 values_of<F16>(u32 pair) {
    constexpr u32 MAGIC = 0x4b000000;  // as a float 2^23, whose last bit is 1
    constexpr float ZERO = 8388608.f + 32768.f;
    return make_float2(as_float(__byte_perm(pair, MAGIC, 0x7410)) - ZERO, as_float(__byte_perm(pair, MAGIC, 0x7432)) - ZERO);
}
template <class T> DEVICE u32 pack(float low, float high);
template <> DEVICE u32 pack<Bf16>(float low, float high) { return Pack<Bf16>::two(low, high); }
template <> DEVICE u32 pack<F16>(float low, float high) {  // one instruction, where Pack has two and more for older GPUs
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
