// Tiles of a parameter: TILE whole blocks of 256 elements that follow each other, with what belongs to them, in shared memory.
//
//   a place    parameter    [TILE][256] 16-bit     TILE × 512 bytes
//              gradient     [TILE][256] 16-bit     TILE × 512
//              codes        [STATES][TILE][256]    STATES × TILE × 256
//              scales       [STATES][TILE] fp32    STATES × TILE × 4      then up to the next multiple of 128
//
// There are DEPTH places, and two barriers for each. One lane of a warp of its own copies tiles in and out, in bulk; TILE other warps
// work on a block each, where it lies:
//
//   copying lane                                        a warp of the others
//   waits for `empty`: all TILE warps are done          waits for `full`: all bytes are there
//   copies parameter, codes and scales back             works on its block: results lie where it was
//   waits until they have been read                     makes them visible to copies
//   asks for another tile, which completes `full`       arrives at `empty`
//
// Parameters follow each other in the same places without a pause, so a place knows where its tile is to go back to.
#pragma once
#include "bulk.cuh"
#include "optim.cuh"
#include "shared.cuh"

// A lane's eight codes.
DEVICE void store_codes(u32 at, uint2 v) { asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory"); }

template <u32 STATES, u32 TILE, u32 DEPTH> struct Tiles {
    static constexpr u32 GRADIENTS_AT = TILE * 512, CODES_AT = TILE * 1024, SCALES_AT = CODES_AT + STATES * TILE * 256;
    static constexpr u32 BYTES = SCALES_AT + STATES * TILE * 4, PLACE_BYTES = (BYTES + 127) / 128 * 128;
    static_assert(TILE % 4 == 0, "scales of a tile are copied by 16 bytes");

    // Where a lane's part of its warp's block lies.
    struct Spots {
        u32 wide, narrow, scales;  // shared addresses
        DEVICE Spots(u32 place, u32 warp, u32 lane)
            : wide(place + warp * 512 + lane * 16), narrow(place + CODES_AT + warp * 256 + lane * 8), scales(place + SCALES_AT + warp * 4) {}
        DEVICE u32 codes(u32 s) const { return narrow + s * (TILE * 256); }
        DEVICE u32 scale(u32 s) const { return scales + s * (TILE * 4); }
        // The first four words: types are of 16 bits.
        DEVICE void load(Raw& parameter, Raw& gradient) const {
            const uint4 a = load_uint4(wide), b = load_uint4(wide + GRADIENTS_AT);
            parameter.words[0] = a.x, parameter.words[1] = a.y, parameter.words[2] = a.z, parameter.words[3] = a.w;
            gradient.words[0] = b.x, gradient.words[1] = b.y, gradient.words[2] = b.z, gradient.words[3] = b.w;
        }
        DEVICE void store(const Raw& parameter) const {
            store_words(wide, parameter.words[0], parameter.words[1], parameter.words[2], parameter.words[3]);
        }
    };
    // What is in a tile, in global memory. Null for no tile.
    struct Source {
        u8 *p, *states[STATES], *absmax[STATES];
    };
    struct Shared {
        u64 full[DEPTH], empty[DEPTH];
        Source sources[DEPTH];
    };

    const u32 places;  // shared address
    Shared& shared;
    u32 turn = 0, parity = 0;  // the place of the next tile

    // By all threads.
    DEVICE void start() {
        if (threadIdx.x < DEPTH) {
            barrier_init(shared_address(shared.full) + threadIdx.x * 8, 1);
            barrier_init(shared_address(shared.empty) + threadIdx.x * 8, TILE);
            shared.sources[threadIdx.x].p = nullptr;
        }
        barrier_init_fence();
        __syncthreads();
    }
    DEVICE u32 place() const { return places + turn * PLACE_BYTES; }
    DEVICE u32 full() const { return shared_address(shared.full) + turn * 8; }
    DEVICE u32 empty() const { return shared_address(shared.empty) + turn * 8; }
    DEVICE void turn_over() {
        turn = turn == DEPTH - 1 ? 0 : turn + 1;
        parity ^= turn == 0;
    }

    // --- a warp of those that work ---

    DEVICE void wait() const { barrier_wait(full(), parity); }
    // What the warp has written to its block is for the copies back.
    DEVICE void hand_over(u32 lane) {
        fence_for_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(empty());
        turn_over();
    }

    // --- the lane that copies ---

    // Waits for the results in the next place, if it has a tile, and copies them back.
    DEVICE void copy_back() const {
        const Source& to = shared.sources[turn];
        if (to.p == nullptr) return;
        barrier_wait(empty(), parity ^ 1);
        bulk_store(to.p, place(), TILE * 512);
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            bulk_store(to.states[s], place() + CODES_AT + s * (TILE * 256), TILE * 256);
            bulk_store(to.absmax[s], place() + SCALES_AT + s * (TILE * 4), TILE * 4);
        }
        bulk_commit();
    }
    DEVICE void ask(const Source& from, const u8* gradient) {
        copy_back();
        bulk_wait_read<0>();
        shared.sources[turn] = from;
        barrier_expect(full(), BYTES);
        bulk_load(place(), from.p, TILE * 512, full());
        bulk_load(place() + GRADIENTS_AT, gradient, TILE * 512, full());
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            bulk_load(place() + CODES_AT + s * (TILE * 256), from.states[s], TILE * 256, full());
            bulk_load(place() + SCALES_AT + s * (TILE * 4), from.absmax[s], TILE * 4, full());
        }
        turn_over();
    }
    DEVICE void finish() {
        for (u32 i = 0; i < DEPTH; ++i) {
            copy_back();
            turn_over();
        }
        bulk_wait();
    }
};
