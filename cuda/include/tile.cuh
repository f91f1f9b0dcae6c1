// How the quantize kernels read and write: a warp takes tiles of 1024 elements, and a lane 32 neighbouring ones of a tile.
//
// Copies are asynchronous and coalesced, into two stages in turn that are the warp's own: nobody but the warp waits for them, and
// the bytes under way cost no registers. A copy's 16-byte pieces go to the lane that owns them, in an order that keeps both the
// copies and the reads off each other's banks (16-bit elements drawn: 4 pieces a lane, piece k of lane l at slot k ^ (l / 2 % 4)):
//
//   tile in memory    lane 0: 0 1 2 3    lane 1: 0 1 2 3    lane 2: 0 1 2 3    …
//   stage             lane 0: 0 1 2 3    lane 1: 0 1 2 3    lane 2: 1 0 3 2    …
//
// A block of 2^b elements is 2^(b−5) neighbouring lanes, or 2^(b−10) neighbouring warps.
#pragma once
#include "common.cuh"

constexpr u32 TILE = 1024;

// Warps of a block of threads: 64 KB of stages (32 where copies are not asynchronous), as rust/halfbyte/src/device/cuda/mod.rs
// has it. A block of 4096 elements is 4 warps.
#if __CUDA_ARCH__ >= 800
template <class T> constexpr u32 WARPS = 32 / sizeof(T);
#else
template <class T> constexpr u32 WARPS = 16 / sizeof(T);
#endif

template <class T> struct Ring {
    static constexpr u32 PIECES = sizeof(T) * 2;  // of 16 bytes a lane
    static constexpr u32 STAGE = TILE * sizeof(T), BYTES = 2 * STAGE;

    // `base` is the warp's part of shared memory, BYTES at a multiple of 128; tiles below `whole` are copied, the others,
    // or those of a tensor that does not lie at a multiple of 16, go by elements.
    DEVICE Ring(u32 base, const T* a, u64 n, bool aligned, u32 lane)
        : a(a), n(n), base(base), lane(lane), whole(aligned ? u32(n / TILE) : 0), to(base + place(lane / PIECES, lane % PIECES)),
          from(base + place(lane, 0)) {}

    DEVICE bool is_whole(u32 tile) const { return tile < whole; }

    // Starts the copy of a tile, if it is one.
    DEVICE void fetch(u32 stage, u32 tile) const {
        if (is_whole(tile)) {
            const u8* source = reinterpret_cast<const u8*>(a) + u64(tile) * STAGE + lane * 16;
#pragma unroll
            for (u32 j = 0; j < PIECES; ++j) {
                // Owner j · 32 / PIECES + lane / PIECES: of 8 pieces a lane, every other one's slots are in the other half.
                const u32 target = (PIECES == 8 && j % 2 ? to ^ 64 : to) + stage * STAGE + j * 512;
#if __CUDA_ARCH__ >= 800
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source + j * 512) : "memory");
#else
                const uint4 v = __ldg(reinterpret_cast<const uint4*>(source + j * 512));
                store(target, v);
#endif
            }
        }
    }
    // The lane's 32 elements of the tile that was fetched last, zeros past the end. The other stage is free from here on.
    DEVICE void read(u32 stage, u32 tile, Eight<T> (&x)[4]) const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
        __syncwarp();
        if (!is_whole(tile)) {
#pragma unroll 1
            for (u32 owner = 0; owner < WARP; ++owner) {
                const u64 at = u64(tile) * TILE + owner * 32 + lane;
                T v = from_float<T>(0.f);
                if (at < n) v = a[at];
                const u32 byte = lane * sizeof(T);
                store(base + stage * STAGE + place(owner, byte / 16) + byte % 16, v);
            }
            __syncwarp();
        }
        uint4 piece[PIECES];
#pragma unroll
        for (u32 k = 0; k < PIECES; ++k) {
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(piece[k].x), "=r"(piece[k].y), "=r"(piece[k].z), "=r"(piece[k].w)
                         : "r"((from ^ k * 16) + stage * STAGE) : "memory");
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) x[i] = eight(piece, i);
    }
    // Writes a tile's results, N words a lane, those below byte `bytes` of `out`; an end that is ragged through `stage`, which is
    // the one that was read last.
    template <u32 N> DEVICE void write(u32 stage, u32 tile, const u32 (&words)[N], u8* out, u64 bytes) const {
        const u64 first = u64(tile) * (WARP * N * 4);
        if (is_whole(tile)) {
#pragma unroll
            for (u32 i = 0; i < N; i += 4)
                *reinterpret_cast<uint4*>(out + first + lane * (N * 4) + i * 4) = four(words, i);
        } else {
            const u32 at = base + stage * STAGE;
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < N; i += 4) store(at + lane * (N * 4) + i * 4, four(words, i));
            __syncwarp();
#pragma unroll 1
            for (u32 i = lane; i < WARP * N * 4 && first + i < bytes; i += WARP) {
                u32 byte;
                asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(at + i) : "memory");
                out[first + i] = u8(byte);
            }
        }
    }

private:
    const T* a;
    u64 n;
    u32 base, lane, whole, to, from;

    DEVICE static u32 place(u32 owner, u32 piece) {
        const u32 turn = PIECES == 4 ? owner / 2 % 4 : owner % 8;
        return (owner * PIECES + (piece ^ turn)) * 16;
    }
    DEVICE static void store(u32 to, uint4 v) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    }
    DEVICE static void store(u32 to, F32 v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v.value) : "memory"); }
    template <class H> DEVICE static void store(u32 to, H v) {
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v.bits) : "memory");
    }
    template <u32 N> DEVICE static uint4 four(const u32 (&words)[N], u32 i) {
        return make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
    DEVICE static Eight<T> eight(const uint4 (&piece)[PIECES], u32 i) {
        if constexpr (PIECES == 4) {
            return Eight<T>{piece[i]};
        } else {
            auto floats = [](uint4 p) { return make_float4(as_float(p.x), as_float(p.y), as_float(p.z), as_float(p.w)); };
            return Eight<T>{floats(piece[2 * i]), floats(piece[2 * i + 1])};
        }
    }
};

// The largest magnitude of the block that a lane's elements belong to, from that of its own. Called by every warp of a block of
// threads alike, `turn` flipping from call to call: with two sets of `shared` one barrier a call is enough.
template <u32 N> DEVICE u32 block_max(u32 m, u32 log2_block, u32 (&shared)[2][N], u32 turn) {
#pragma unroll
    for (u32 step = 0; step < 5; ++step)
        if (log2_block > 5 + step) m = max(m, __shfl_xor_sync(ALL_LANES, m, 1u << step));
    if (log2_block > 10) {
        const u32 warp = threadIdx.x / WARP, warps = 1u << (log2_block - 10), first = warp & ~(warps - 1);
        if (threadIdx.x % WARP == 0) shared[turn][warp] = m;
        asm volatile("bar.sync %0, %1;" ::"r"(first / warps), "r"(warps * WARP) : "memory");
#pragma unroll 1
        for (u32 w = first; w < first + warps; ++w) m = max(m, shared[turn][w]);
    }
    return m;
}
