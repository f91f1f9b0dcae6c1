// Tiles of a product that blocks share along K ("stream-K", Osama et al., 2023), so that each block has as much to do as any other
// whatever the number of tiles.
//
// The first `shared` tiles, of S stages each, are one line of stages that is cut into as many equal parts as there are blocks; the
// other tiles are dealt whole. Three tiles and four blocks, S = 4:
//
//     tile 0           tile 1           tile 2
//     [ 0  0  0  1 ]   [ 1  1  2  2 ]   [ 2  3  3  3 ]
//
// Who has the end of a tile finishes it; who has another part of it leaves its sums in scratch memory and raises a flag. A block goes
// through its part of the line from the end, so that what others wait for comes first, and through its whole tiles after it. It waits for
// blocks of lower number only, which have been started before it, so somebody can always go on. Sums are added in order of the blocks:
// results are equal from run to run.
//
// Scratch memory may hold anything at the start: a raised flag is a number that no other launch of the process has, and who has waited
// for it takes it down, so that a launch that is replayed does not find it raised.
#pragma once
#include "hopper.cuh"

// The part of a kernel's arguments that says so.
struct Split {
    float* sums;    // [blocks] [numbers of a tile]
    u64* flags;     // [blocks]
    u64 raised;     // this launch's number
    u32 shared;     // tiles
    u32 unused;
};

struct Piece { u32 tile, begin, end; };  // stages of a tile

// How the line is cut.
struct Cut {
    u32 blocks, each, longer;  // stages of a part; so many parts have one more
    DEVICE Cut(u32 shared, u32 stages) : blocks(grid_size()) {
        const u32 line = shared * stages;
        each = line / blocks, longer = line % blocks;
    }
    DEVICE u32 begin_of(u32 part) const { return part * each + min(part, longer); }
    DEVICE u32 owner(u32 stage) const {
        const u32 in_longer = longer * (each + 1);
        return stage < in_longer ? stage / (each + 1) : longer + (stage - in_longer) / each;
    }
};

// The pieces that a block has; all of its warps go through them alike. Little is kept in registers from one to the next.
struct Pieces {
    u32 taken = 0;  // stages of the line
    u32 next = 0;   // whole tiles

    DEVICE bool take(u32 shared, u32 stages, u32 tiles, Piece& piece) {
        const Cut cut(shared, stages);
        const u32 from = cut.begin_of(blockIdx.x), to = cut.begin_of(blockIdx.x + 1) - taken;
        if (from < to) {
            const u32 tile = (to - 1) / stages, start = tile * stages;
            piece = {tile, max(from, start) - start, to - start};
            taken += piece.end - piece.begin;
            return true;
        }
        piece = {shared + blockIdx.x + next++ * cut.blocks, 0, stages};
        return piece.tile < tiles;
    }
};

// Sums of a tile, N each of THREADS threads, lie as [number / 4] [thread] [number % 4]. `barrier` is a named one of these threads.
template <u32 THREADS, u32 N> struct Sums {
    static_assert(N % 4 == 0, "16 bytes at a time");

    // The flag is raised by `raise`, which all call later, once: a block leaves one tile's sums at the most.
    static DEVICE void leave(const Split& split, const float (&sums)[N], u32 thread, u32 barrier) {
        float* const to = split.sums + u64(blockIdx.x) * (THREADS * N) + thread * 4;
#pragma unroll
        for (u32 j = 0; j < N; j += 4)
            __stcg(reinterpret_cast<float4*>(to + j * THREADS), make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]));
        if (thread >= WARP) named_barrier_arrive(barrier, THREADS);
    }
    // When what was written is likely to have got there, so that nobody waits for it.
    static DEVICE void raise(const Split& split, u32 thread, u32 barrier) {
        if (thread >= WARP) return;
        named_barrier(barrier, THREADS);
        if (thread == 0) raise_flag(split.flags + blockIdx.x, split.raised);
    }
    // Adds what the blocks before this one have left of the tile that a piece ends.
    static DEVICE void add(const Split& split, const Piece& piece, float (&sums)[N], u32 thread, u32 barrier) {
        const u32 first = Cut(split.shared, piece.end).owner(piece.tile * piece.end);
        for (u32 i = first + thread; i < blockIdx.x; i += THREADS) {
            wait_for_flag(split.flags + i, split.raised);
            split.flags[i] = 0;
        }
        named_barrier(barrier, THREADS);
        constexpr u32 AT_ONCE = N <= 32 ? 2 : 1;  // of a part's N / 4 loads, for the sake of registers
#pragma unroll AT_ONCE
        for (u32 i = first; i < blockIdx.x; ++i) {
            const float* const from = split.sums + u64(i) * (THREADS * N) + thread * 4;
#pragma unroll
            for (u32 j = 0; j < N; j += 4) {
                const float4 s = __ldcg(reinterpret_cast<const float4*>(from + j * THREADS));
                sums[j] += s.x, sums[j + 1] += s.y, sums[j + 2] += s.z, sums[j + 3] += s.w;
            }
        }
    }
};
