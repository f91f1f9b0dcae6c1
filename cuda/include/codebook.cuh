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

// Codes by rising value. Of FP4's two zeros the negative one stands first: on the GPU the sign of zero is the sign of x.
__constant__ u8 CODE_BY_VALUE[2][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                        {11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3}};

// Decision points as bitsandbytes' CUDA code has them, so that its bytes come out. They are the midpoints between neighbours to
// within an ulp or (FP4's sixth) a few; its CPU code takes the fp32 midpoints, and so does ours.
__constant__ float NF4_POINTS[15] = {-0.8480964004993439f,  -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,
                                     -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
                                     0.1202552504837513f,   0.2035212516784668f,  0.2920137718319893f,  0.3893125355243683f,
                                     0.5016634166240692f,   0.6427869200706482f,  0.8614784181118011f};
// On |x|, rising.
__constant__ float FP4_POINTS[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};

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

// The code of x̂ in [−1, 1]. Decision points of both codes are more than 1/16 apart on each side of zero, so that each of 32
// buckets of that width holds at most one: an entry is {point, code at or below it, code above it}. 33 entries (x̂ = 1 is
// the last), 16 copies, so that the half-warps of an 8-byte load have no bank conflict. 4.1 KB.
struct EncodeTable {
    uint2* entries;
    static constexpr u32 BUCKETS = 33, COPIES = 16, SIZE = BUCKETS * COPIES;

    // Bucket of x̂ = x · inverse, for inverse16 = 16 · inverse: rising in x, in range for every |x| ≤ absmax (two ulps more than
    // 16 are added because −absmax · inverse may be an ulp or two below −1), and 0 for NaN. No point is as near to the border of its
    // bucket as the rounding here, so it need not be that of x̂.
    static DEVICE u32 bucket(float x, float inverse16) { return u32(__float2int_rd(fmaf(x, inverse16, 16.f + 0x1p-18f))); }

    // A value goes up when it is above the point. For FP4 the rule is on |x|, strictly: on the negative side a value on the
    // point stays at the smaller magnitude, so the point moves down by one ulp there.
    static DEVICE float point(u32 kind, u32 i) {
        if (kind == NF4) return NF4_POINTS[i];
        return i < 7 ? as_float(as_bits(-FP4_POINTS[6 - i]) + 1) : i == 7 ? 0.f : FP4_POINTS[i - 8];
    }

    DEVICE void fill(u32 kind) const {
        for (u32 i = threadIdx.x; i < SIZE; i += blockDim.x) {
            u32 at = i / COPIES, rank = 0;
            float here = 2.f;  // above everything: no point in this bucket
#pragma unroll 1
            for (u32 p = 0; p < 15; ++p) {
                float t = point(kind, p);
                // FP4's step between its zeros, at 0, is the border between buckets 15 and 16.
                u32 b = t == 0.f ? 15 : bucket(t, 16.f);
                if (t == 0.f ? at > 15 : b < at) ++rank;
                else if (b == at && t != 0.f) here = t;
            }
            // Bucket 0 has no point: what is not below 2 there is NaN, which counts as above everything.
            u32 above = at == 0 ? 15 : min(rank + 1, 15u);
            entries[i] = make_uint2(as_bits(here), CODE_BY_VALUE[kind][rank] | CODE_BY_VALUE[kind][above] << 8);
        }
    }
    DEVICE u32 encode(float x, float inverse, float inverse16, u32 lane) const {
        uint2 e = entries[bucket(x, inverse16) * COPIES + (lane & (COPIES - 1))];
        return __byte_perm(e.y, 0, x * inverse <= as_float(e.x) ? 0x4440 : 0x4441);
    }
};
