// How the sums of a warpgroup's MMAs become rows of a product.
#pragma once
#include "large.cuh"
#include "shared.cuh"
#include "warpgroup.cuh"

// Tokens at a time, and the shared memory that a warpgroup needs for them.
template <u32 COUNT> constexpr u32 WRITTEN = COUNT <= 64 ? 16 : COUNT / 4;
template <u32 COUNT> constexpr u32 RESULT_BYTES = WRITTEN<COUNT> * 128;

// out[m, n] for 64 weights from n0 on and COUNT tokens from m0 on, of which a lane has those that a warpgroup's D has (wgmma.cuh); `Problem`
// has bias, out, M and N. They go by way of shared memory at `results`, so that a token's 64 weights are written together; `thread` is one of
// the warpgroup's 128, which share a named barrier.
template <class T, u32 COUNT, class Problem>
DEVICE void write_tile(const Problem& p, const float (&sums)[COUNT / 2], u32 n0, u32 m0, u32 results, u32 thread, u32 barrier) {
    constexpr u32 PART = WRITTEN<COUNT>;
    const u32 lane = thread % WARP, warp = thread / WARP, g = lane / 4, n = n0 + thread % 8 * 8;
    float bias[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 at = n0 + warp * 16 + g + h * 8;
        bias[h] = p.bias != nullptr && at < p.N ? to_float(p.bias[at]) : 0.f;
    }
    const bool wide = p.N % 8 == 0 && reinterpret_cast<u64>(p.out) % 16 == 0;
    // What this lane stores: a piece of a tile's row, its tokens 8 apart; what this thread reads back: tokens 16 apart.
    const u32 to = results + (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
    const u32 from = results + thread / 8 * 128 + (thread % 8 ^ thread / 8 % 8) * 16;
#pragma unroll
    for (u32 part = 0; part < COUNT / PART; ++part) {
        named_barrier(barrier, 128);  // what was here has been read
#pragma unroll
        for (u32 j = 0; j < PART / 8; j += 2) {
            const float* const v = sums + part * (PART / 2) + j * 4;
            auto two = [&](u32 i) { return pack<T>(v[i] + bias[i / 2 % 2], v[i + 1] + bias[i / 2 % 2]); };
            store_transposed(to + j * (8 * 128), two(0), two(2), two(4), two(6));
        }
        named_barrier(barrier, 128);
        u32 m = m0 + part * PART + thread / 8;
        T* out = p.out + u64(m) * p.N + n;
        if (wide) {
#pragma unroll
            for (u32 i = 0; i < PART / 16; ++i, m += 16, out += u64(16) * p.N)
                if (m < p.M && n < p.N) *reinterpret_cast<uint4*>(out) = load_uint4(from + i * (16 * 128));
        } else {
#pragma unroll 1
            for (u32 i = 0; i < PART / 16; ++i, m += 16, out += u64(16) * p.N) {
                if (m >= p.M) continue;
#pragma unroll 1
                for (u32 e = 0; e < 8 && n + e < p.N; ++e) {
                    const u32 pair = load_word(from + i * (16 * 128) + e / 2 * 4);
                    out[e] = T{u16(pair >> e % 2 * 16)};
                }
            }
        }
    }
}
