// The warps that bring scales to a ring whose stages are 256 of K of some rows: four a row, next to each other as floats.
#pragma once
#include "async_copy.cuh"
#include "hopper.cuh"
#include "shared.cuh"

// A ring's place and the parity of its turn.
template <u32 STAGES> struct Turn {
    u32 stage = 0, parity = 0;
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The way that a weight's scales allow: as they are, 16 bytes at a time; from four codes in a word; one by one.
enum class Way { WHOLE, NESTED, ANY };
template <class Problem> DEVICE Way way_of(const Problem& p) {
    const bool fours = p.log2_block == 6 && (p.K / 64) % 4 == 0;
    const u64 at = reinterpret_cast<u64>(p.absmax);
    if (p.nested == nullptr && fours && at % 16 == 0) return Way::WHOLE;
    return p.nested != nullptr && fours && at % 4 == 0 && p.nested_shift >= 2 ? Way::NESTED : Way::ANY;
}

// Scales of stages [first, last) of ROWS rows from row0 on, by THREADS threads. `Problem` has N, K, log2_block and the scales of a
// weight; `place(stage of the ring, row)` is where the four scales of a row go. Barriers of the ring: each thread arrives at `full`.
template <class Problem, class Place, u32 ROWS, u32 THREADS, u32 STAGES> struct ScaleServer {
    static constexpr u32 EACH = ROWS / THREADS;
    const Problem& p;
    Place place;
    u32 full, empty, thread;
    u32 row0, first, last, blocks;  // blocks: K / 64

    DEVICE u32 row(u32 i) const { return i * THREADS + thread; }
    DEVICE u64 block(u32 i, u32 stage) const { return u64(row0 + row(i)) * blocks + stage * 4; }

    // Plain scales of blocks of 64 where each row's begin at a multiple of 16 bytes.
    DEVICE void whole(Turn<STAGES>& turn) const {
        for (u32 stage = first; stage < last; ++stage, turn.next()) {
            barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
#pragma unroll
            for (u32 i = 0; i < EACH; ++i) {
                const bool valid = row0 + row(i) < p.N;
                copy16(place(turn.stage, row(i)), static_cast<const float*>(p.absmax) + (valid ? block(i, stage) : 0), valid);
            }
            barrier_arrive_copies(full + turn.stage * 8);
        }
    }

    // Nested scales of blocks of 64 where each row's codes begin at a multiple of 4 bytes; loads run AHEAD stages ahead. map(code)
    // is the nested map.
    template <class Map> DEVICE void nested(Turn<STAGES>& turn, Map map) const {
        constexpr u32 AHEAD = 2;
        const float offset = __ldg(p.offset);
        u32 codes[AHEAD][EACH];
        float scale[AHEAD][EACH];
        auto fetch = [&](u32 (&to)[EACH], float (&s)[EACH], u32 stage) {
#pragma unroll
            for (u32 i = 0; i < EACH; ++i) {
                const bool valid = row0 + row(i) < p.N && stage < last;
                to[i] = valid ? __ldg(reinterpret_cast<const u32*>(static_cast<const u8*>(p.absmax) + block(i, stage))) : 0;
                s[i] = valid ? __ldg(p.nested + (block(i, stage) >> p.nested_shift)) : 0.f;
            }
        };
#pragma unroll
        for (u32 a = 0; a < AHEAD; ++a) fetch(codes[a], scale[a], first + a);
        for (u32 base = first; base < last; base += AHEAD) {
#pragma unroll
            for (u32 a = 0; a < AHEAD; ++a) {
                const u32 stage = base + a;
                if (stage >= last) break;
                barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
#pragma unroll
                for (u32 i = 0; i < EACH; ++i) {
                    const bool valid = row0 + row(i) < p.N;
                    auto get = [&](u32 j) { return valid ? fmaf(map(codes[a][i] >> 8 * j & 0xff), scale[a][i], offset) : 0.f; };
                    store_float4(place(turn.stage, row(i)), make_float4(get(0), get(1), get(2), get(3)));
                }
                barrier_arrive(full + turn.stage * 8);
                fetch(codes[a], scale[a], stage + AHEAD);
                turn.next();
            }
        }
    }

    // Any scales. Blocks beyond the row get 0.
    DEVICE void any(Turn<STAGES>& turn) const {
        const u32 fold = p.log2_block - 6;
        const Scales scales{p.absmax, p.nested, p.map, p.offset, p.nested_shift};
        for (u32 stage = first; stage < last; ++stage, turn.next()) {
            barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
#pragma unroll 1
            for (u32 i = 0; i < EACH; ++i) {
                float s[4];
#pragma unroll
                for (u32 j = 0; j < 4; ++j)
                    s[j] = row0 + row(i) < p.N && stage * 4 + j < blocks ? scales.get(block(i, stage) + j >> fold) : 0.f;
                store_float4(place(turn.stage, row(i)), make_float4(s[0], s[1], s[2], s[3]));
            }
            barrier_arrive(full + turn.stage * 8);
        }
    }
};
