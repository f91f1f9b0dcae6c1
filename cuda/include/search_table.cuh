// The nearest code of a rising map of 256 entries, by sign, exponent and MANTISSA mantissa bits of x̂ in [−1, 1].
//
// `order` is an integer that rises with x̂ as its bit pattern does, and its upper bits are a row (bits drawn for MANTISSA = 6):
//
//   order of x̂ · 2^−100    row [15]   place in the row [17]      the scale makes 28 exponents of what is above 2^−26;
//                                                                 everything below 2^−32 is one row on each side of zero
//   entry                   q − row [8]   2^17 − 1 − place of the midpoint [17]   0 [7]
//
// so that entry + (order << 7) carries into q for a value above the row's midpoint, and q is its top byte. The signed dynamic map
// has no more than one midpoint in a row of 6 mantissa bits, the unsigned one in a row of 7. For a map that has more (the
// unsigned one in rows of 6, between 1/2 and 1) a search starts at the row.
#pragma once
#include "common.cuh"

// What a table is made from, and what it needs for maps that are not dynamic.
struct Midpoints {
    float values[256];  // values[i] between entries i and i + 1 of the map; the last one is above everything
    i32 orders[256];    // of them, scaled
    u32 crowded;        // a row has two
};

template <int MANTISSA, bool SIGNED> struct SearchTable {
    static constexpr int PLACE = 23 - MANTISSA, UP = MANTISSA + 1;
    static constexpr i32 ROWS = 27 * (1 << MANTISSA) + 1;  // on each side of zero; x̂ = ±1, or an ulp or two more, is the last
    static constexpr i32 BELOW = SIGNED ? ROWS : 0;
    u32 entries[BELOW + ROWS];

    static DEVICE i32 order(float scaled) {
        const i32 bits = i32(as_bits(scaled));
        return SIGNED ? (bits & 0x7fffffff) ^ (bits >> 31) : bits;
    }
    DEVICE void fill(const float* map, Midpoints& midpoints) {
        if (threadIdx.x == 0) midpoints.crowded = 0;
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x) {
            // A midpoint of −0 counts as +0.
            const float midpoint = i < 255 ? __fadd_rn(__fmul_rn(__fadd_rn(map[i], map[i + 1]), 0.5f), 0.f) : as_float(0x7f800000u);
            midpoints.values[i] = midpoint;
            midpoints.orders[i] = order(midpoint * 0x1p-100f);
        }
        __syncthreads();
        for (i32 row = i32(threadIdx.x) - BELOW; row < ROWS; row += blockDim.x) {
            // Scaling keeps order, so that a midpoint below the row's least order is below whatever is in the row.
            u32 q = 0;
#pragma unroll
            for (u32 step = 128; step > 0; step /= 2)
                if (midpoints.orders[q + step - 1] < row * (1 << PLACE)) q += step;
            constexpr u32 MOST = (1u << PLACE) - 1;
            u32 place = MOST;  // no midpoint: nothing is above this one
            const i32 here = midpoints.orders[q], next = midpoints.orders[min(q + 1, 255u)];
            if (here >> PLACE == row) {
                place = u32(here) & MOST;
                // One so small that its scaled form is inexact will not do either.
                if ((q < 254 && next >> PLACE == row) || fabsf(midpoints.values[q]) < 0x1p-26f) atomicOr(&midpoints.crowded, 1u);
            }
            entries[row + BELOW] = (q - u32(row)) << 24 | (MOST - place) << UP;
        }
        __syncthreads();
    }
    // Codes are top bytes. `scaled` is x̂ · 2^−100, of |x̂| ≤ 1 but for an ulp or two; not negative if the table is not signed.
    DEVICE u32 encode(float scaled) const {
        const i32 at = order(scaled);
        return entries[(at >> PLACE) + BELOW] + (u32(at) << UP);
    }
    // The same with the shared address of `entries`, less BELOW rows, which saves the compiler from 64-bit arithmetic.
    DEVICE u32 place() const { return shared_address(entries + BELOW); }
    static DEVICE u32 encode_at(u32 place, float scaled) {
        const i32 at = order(scaled);
        u32 entry;
        asm("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(place + u32(at >> PLACE) * 4));
        return entry + (u32(at) << UP);
    }
    // For any map and any x̂.
    DEVICE u32 search(float x, const Midpoints& midpoints) const {
        const i32 row = order(x * 0x1p-100f) >> PLACE;
        u32 q = (entries[row + BELOW] >> 24) + u32(row) & 0xff;
        while (x > midpoints.values[q]) ++q;  // ends at the last: nothing is above infinity
        return q << 24;
    }
};

// Four codes in the top bytes of words, as four bytes.
DEVICE u32 top_bytes(u32 a, u32 b, u32 c, u32 d) { return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410); }
