// From x to 4-bit codes.
#pragma once
#include "codebook.cuh"

// How x̂ in [−1, 1] becomes a code. Decision points of both codes are more than 1/16 apart on each side of zero, so that each
// row of that width, row r from (r − 17) / 16 on, holds at most one: an entry is {point, rank below it}, and the rank is one
// more above the point. Row 16 ends at zero, which is where FP4's two zeros meet: on the GPU, the negative one is x < 0.
// NF4's ranks are its codes; `fp4_codes` makes FP4's.
constexpr u32 ENCODE_ROWS = 34;  // x̂ = −1 may be an ulp or two below −1, and 1 has a row of its own
struct EncodeRows {
    float point[2][ENCODE_ROWS];
    u32 rank[2][ENCODE_ROWS];
    constexpr EncodeRows() : point(), rank() {
        for (u32 kind = 0; kind < 2; ++kind) {
            for (u32 row = 0; row < ENCODE_ROWS; ++row) {
                const double low = (int(row) - 17) / 16., high = low + 1 / 16.;
                point[kind][row] = 2.f;  // above everything: no point in this row
                for (u32 i = 0; i < 15; ++i) {
                    const float t = decision(kind, i);
                    if (t < low || (t == 0 && row > 16)) ++rank[kind][row];
                    else if (t < high && t != 0) point[kind][row] = t;
                }
            }
        }
    }

    // Decision point i of 15, rising.
    static constexpr float decision(u32 kind, u32 i) {
        // As bitsandbytes' CUDA code has them, so that its bytes come out. They are the midpoints between
        // neighbours to within an ulp or (FP4's sixth) a few; its CPU code takes the fp32 midpoints, and so does ours.
        constexpr float nf4[15] = {-0.8480964004993439f,  -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,
                                   -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
                                   0.1202552504837513f,   0.2035212516784668f,  0.2920137718319893f,  0.3893125355243683f,
                                   0.5016634166240692f,   0.6427869200706482f,  0.8614784181118011f};
        constexpr float fp4[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
        if (kind == NF4) return nf4[i];
        if (i == 7) return 0.f;
        // For FP4 the rule is on |x|, strictly: on the negative side a value on the point stays at the smaller magnitude, so
        // that the point moves down by one ulp there.
        return i > 7 ? fp4[i - 8] : -(fp4[6 - i] + ulp(fp4[6 - i]));
    }
private:
    static constexpr float ulp(float x) {
        float u = 0x1p-24f;
        while (u * 0x1p24f > x) u /= 2;
        return u * 2;
    }
};
__constant__ EncodeRows ENCODE;

// The rows in shared memory, 32 copies, so that the half-warps of an 8-byte load have no bank conflict. 8.7 KB.
struct EncodeTable {
    static constexpr u32 SIZE = ENCODE_ROWS * WARP;
    u32 mine;    // address of this lane's copy of row 0, whose second byte the row replaces
    float bias;  // 8 + (row of x̂ = 0, plus that byte) / 16

    // `entries` lie at a multiple of 256.
    DEVICE EncodeTable(uint2* entries, u32 lane) {
        const u32 base = shared_address(entries);
        mine = base + lane * 8;
        bias = 8.f + (17.f + float((base >> 8) & 0xff)) * 0.0625f;
        asm volatile("" : "+f"(bias));  // or it is computed again for every use
    }
    DEVICE static void fill(uint2* entries, u32 kind) {
        for (u32 i = threadIdx.x; i < SIZE; i += blockDim.x)
            entries[i] = make_uint2(as_bits(ENCODE.point[kind][i / WARP]), ENCODE.rank[kind][i / WARP]);
    }
    // Appends the rank of x̂ = x · inverse to the nibbles of `word`. The row is ⌊16 x̂⌋ exactly: the sum is rounded down, and its
    // third byte counts sixteenths. Whatever has a row beyond a point's is on the same side of the point after rounding to x̂.
    DEVICE void append(u32& word, float x, float inverse) const {
        const u32 at = __byte_perm(as_bits(__fmaf_rd(x, inverse, bias)), mine, 0x7624);
        u32 point, rank;
        asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(point), "=r"(rank) : "r"(at));
        const float below = __fsub_rn(as_float(point), __fmul_rn(x, inverse));  // negative when x̂ is above the point
        word = word * 16 + rank + (as_bits(below) >> 31);
    }
    // FP4's codes of eight ranks: from rank 7 (−0) down and from rank 8 (+0) up the magnitudes 0 1 2 3 4 5 6 7, whose codes are
    // 0 1 6 7 4 5 2 3.
    DEVICE static u32 codes(u32 kind, u32 ranks) { return kind == NF4 ? ranks : fp4_codes(ranks); }
    DEVICE static u32 fp4_codes(u32 ranks) {
        const u32 negative = ~ranks & 0x88888888u, size = ranks ^ (negative - (negative >> 3));
        return size ^ ((size << 1) & 0x44444444u) ^ 0x88888888u;
    }
};
