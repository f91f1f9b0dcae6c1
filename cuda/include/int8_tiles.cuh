// What the two products of int8 codes on Hopper share: the entries of outlier columns, and the ring's turns.
//
// Outliers. Columns of x that have one come as a bitmap. For these the product of codes is only part of the truth: each adds
// (x − q · s / 127)[m, k] · w[n, k], where q = 0 for the outliers themselves. Sums become floats, times s_m / 127, and go on as the
// sums of a 16-bit MMA whose K are columns of the bitmap, 16 entries at a time: w's bytes as they are (exact in 16 bits) and what x
// has left. Any number of columns: the list is cut into windows.
#pragma once
#include "int8.cuh"
#include "shared.cuh"
#include "warpgroup.cuh"

#if !defined(ELEMENT) || !defined(TOKENS)
#error "compile with -DELEMENT=Bf16, F16, F32 or I32 and -DTOKENS=16, 32, 64, 128 or 256"
#endif

using Float = Types<ELEMENT>::Float;
using Half = Types<ELEMENT>::Half;
constexpr bool SCALED = Types<ELEMENT>::SCALED;
constexpr u32 ROW = 128;          // bytes of K in a stage
constexpr u32 MOST_STAGES = 16;
constexpr u32 ENTRIES = 16;       // of an outlier MMA
constexpr u32 HELPERS = 96;       // threads that gather
constexpr u32 OUTLIERS_W = 128 * ENTRIES * 2, OUTLIERS_X = TOKENS * ENTRIES * 2;

struct Turn {
    u32 stage = 0, parity = 0;
    DEVICE void next(u32 stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// The entries of columns list[0 … count), as the outlier MMA takes them: interleaved, of `weights` rows of w from `w` on at `to_w`, of
// `tokens` tokens at `to_x`. `left(token, k)` is what x has left.
template <class Left>
DEVICE void gather(const u32* list, u32 count, const u8* w, u32 K, u32 weights, u32 tokens, Left left, u8* to_w, u8* to_x, u32 thread) {
    auto place = [](u32 rows, u32 row, u32 entry) { return entry / 8 * (rows * 16) + row * 16 + entry % 8 * 2; };
    if (count < ENTRIES) {
        for (u32 i = thread; i < OUTLIERS_W / 16; i += HELPERS) reinterpret_cast<uint4*>(to_w)[i] = make_uint4(0, 0, 0, 0);
        for (u32 i = thread; i < OUTLIERS_X / 16; i += HELPERS) reinterpret_cast<uint4*>(to_x)[i] = make_uint4(0, 0, 0, 0);
        named_barrier(5, HELPERS);
    }
    // All threads have as many entries, and many are under way: each is a sector of its own.
#pragma unroll 8
    for (u32 i = thread; i < weights * count; i += HELPERS) {
        const u32 row = i / count, c = i - row * count;
        *reinterpret_cast<Half*>(to_w + place(128, row, c)) = from_float<Half>(byte_value(w[u64(row) * K + list[c]], 0));
    }
#pragma unroll 4
    for (u32 i = thread; i < tokens * count; i += HELPERS) {
        const u32 token = i / count, c = i - token * count;
        *reinterpret_cast<Half*>(to_x + place(TOKENS, token, c)) = from_float<Half>(left(token, list[c]));
    }
}

// Adds a chunk of entries, of the 64 weights of `group`, to sums.
DEVICE void add_outliers(float (&sums)[TOKENS / 2], u32 w, u32 x, u32 group) {
    pin(sums);
    mma_fence();
    mma_16<Half, TOKENS>(sums, interleaved_operand(w + group * 64 * 16, 128 * 16), interleaved_operand(x, TOKENS * 16));
    mma_commit();
    mma_wait<0>();
    pin(sums);
}
