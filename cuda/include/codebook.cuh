// The 4-bit codes on the device. `kind` is 0 for NF4 and 1 for FP4, as in rust/halfbyte/src/four_bit/cuda.rs.
#pragma once
#include "common.cuh"

constexpr u32 NF4 = 0;

// Values in code order.
__constant__ float CODE_VALUES[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0625f / 12, 8.f / 12, 1.0f, 4.f / 12, 6.f / 12, 2.f / 12, 3.f / 12,
     -0.0f, -0.0625f / 12, -8.f / 12, -1.0f, -4.f / 12, -6.f / 12, -2.f / 12, -3.f / 12}};

// The fp32 table lookup: value of code q for this lane at table[q * 32 + lane], one copy a bank, so that 32 lanes with 32
// different codes never collide. 2 KB.
struct ValueTable {
    float* words;
    static constexpr u32 SIZE = 16 * WARP;
    DEVICE void fill(u32 kind) const {
        for (u32 i = threadIdx.x; i < SIZE; i += blockDim.x) words[i] = CODE_VALUES[kind][i / WARP];
    }
    // Weight i (0..7) of the four packed bytes `word`: byte i/2, the even weight in the high nibble.
    template <int I> DEVICE float get(u32 word, u32 lane) const {
        constexpr int SHIFT = (I / 2) * 8 + (I % 2 ? 0 : 4);  // where the nibble begins
        u32 at = SHIFT >= 7 ? word >> (SHIFT - 7) : word << (7 - SHIFT);
        return *reinterpret_cast<const float*>(reinterpret_cast<const u8*>(words) + ((at & 0x780u) | lane * 4));
    }
    DEVICE void decode(u32 word, u32 lane, float (&v)[8]) const {
        v[0] = get<0>(word, lane), v[1] = get<1>(word, lane), v[2] = get<2>(word, lane), v[3] = get<3>(word, lane);
        v[4] = get<4>(word, lane), v[5] = get<5>(word, lane), v[6] = get<6>(word, lane), v[7] = get<7>(word, lane);
    }
};
