// What the products with tensor cores share: the values of a code, the pair table, the MMA, and where its operands lie.
//
// Weights are the A operand of mma.m16n8k16, so that any M up to 8 costs the same. The order of K inside an MMA is free as long
// as both operands agree: lane (g = lane / 4, t = lane % 4) takes bytes 8t … 8t+7 of each 32-byte block of 64 weights of rows
// g and g + 8, and MMA j of the block's four takes of them
//
//   A: bytes 2j, 2j+1 (weights 16t+4j … +3)             B: activations k = 16t+4j … +3 of token g: 32 contiguous bytes a lane
//
// All four lanes of a row are then in one block of 64, so the fp32 scale multiplies the finished fp32 accumulator. The 16 values
// come as 16-bit numbers, scaled by a constant with which they round well; `ungain` divides it out at the end. (NF4 × 1.43677
// in bf16 has a relative rounding error of 7.8e-4, half of what rounding each dequantized weight to bf16 costs; FP4 × 12 is
// exact.) Any other 16 values would do as well: nothing else here knows the code.
//
// Decoding: one lookup a byte, byte → two 16-bit values in the order of the MMA (the high nibble, which is the earlier weight, in the low
// half), in a table with a copy for each bank (32 KB): no conflicts.
#pragma once
#include "mma_sync.cuh"
#include "shared.cuh"

constexpr u32 TABLE_WORDS = 256 * WARP;
constexpr u32 TILE_FLOATS = 16 * 8;  // one accumulator tile

// Element i of four; i is a constant after unrolling.
DEVICE float element(float4 v, u32 i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE u32 element(uint4 v, u32 i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The 16 values of a code as 16-bit numbers, four a word; they come as kernel arguments, which need no load.
struct Values {
    u64 words[4];
    DEVICE u32 get(u32 code) const {
        const u64 low = code & 4 ? words[1] : words[0], high = code & 4 ? words[3] : words[2];
        return u32((code & 8 ? high : low) >> (code % 4 * 16)) & 0xffff;
    }
};

// The pair table, a copy a bank: the pair of byte b for this lane is word 32 · b + lane. Threads [0, threads) fill it together.
template <class Store> DEVICE void fill_pairs(const Values& values, u32 threads, Store store) {
    for (u32 i = threadIdx.x; i < TABLE_WORDS / 4; i += threads) {
        const u32 byte = i / 8, pair = values.get(byte / 16) | values.get(byte % 16) << 16;
        store(i * 16, pair);
    }
}
// As static shared memory: its address is a constant in each look-up.
struct StaticPairs {
    u32* words;
    u32 lane4;
    DEVICE void fill(const Values& values, u32 threads) const {
        u32* to = words;
        fill_pairs(values, threads, [&](u32 at, u32 pair) { *reinterpret_cast<uint4*>(to + at / 4) = make_uint4(pair, pair, pair, pair); });
    }
    template <int J> DEVICE u32 of(u32 word) const {
        const u32 at = (J == 0 ? word << 7 : word >> (8 * J - 7)) & 0x7f80u;
        return *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(words) + (at | lane4));
    }
};
DEVICE u32 shared_begin(const void* anything_shared) { return shared_address(anything_shared) & 0xff000000u; }

// One block of 64 weights of TILES tiles of 16 rows times COLUMNS tiles of 8 tokens: w are the lane's 8 bytes of rows g and g + 8 of
// each tile, b its activations of the block, d the sums (of unscaled values). Tiles and columns alternate, so that no MMA waits for
// the one just before it.
template <class T, int TILES, int COLUMNS, class Pairs>
DEVICE void block_product(float (&d)[TILES][COLUMNS][4], const uint2 (&w)[TILES][2], const uint4 (&b)[COLUMNS][2], const Pairs& pairs) {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) d[i][c][0] = d[i][c][1] = d[i][c][2] = d[i][c][3] = 0.f;
#define BYTES(p, q, word, j, r0, r1)                                                                          \
    _Pragma("unroll") for (int i = 0; i < TILES; ++i) {                                                       \
        const u32 a0 = pairs.template of<p>(w[i][0].word), a1 = pairs.template of<p>(w[i][1].word);           \
        const u32 a2 = pairs.template of<q>(w[i][0].word), a3 = pairs.template of<q>(w[i][1].word);           \
        _Pragma("unroll") for (int c = 0; c < COLUMNS; ++c)                                                   \
            mma<T>(d[i][c], a0, a1, a2, a3, b[c][j].r0, b[c][j].r1);                                          \
    }
    BYTES(0, 1, x, 0, x, y)
    BYTES(2, 3, x, 0, z, w)
    BYTES(0, 1, y, 1, x, y)
    BYTES(2, 3, y, 1, z, w)
#undef BYTES
}
