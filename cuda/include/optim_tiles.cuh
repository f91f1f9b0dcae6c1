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
//
// States and scales may be paged: in memory that the driver moves between device and host. Copies in bulk do not bring its pages back,
// loads and stores do. So all lanes of the copying warp bring them in by 16-byte copies and take them back by loads and stores, while
// parameter and gradient go in bulk as ever. What all lanes touch is not to mix with what goes in bulk: where parameters of one kind
// follow those of the other, the places are emptied first.
#pragma once
#include "async_copy.cuh"
#include "bulk.cuh"
#include "optim.cuh"
#include "shared.cuh"

// A lane's eight codes.
DEVICE void store_codes(u32 at, uint2 v) { asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory"); }

// As many arrivals as a warp has lanes, by one of them.
DEVICE void barrier_arrive_warp(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(WARP) : "memory");
}
// A lane's number, asked for each time: what follows from it is not made ahead and kept in registers while other warps work.
DEVICE u32 ask_lane() {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

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
    bool paged = false;        // what the copying warp has in all places

    // By all threads.
    DEVICE void start() {
        if (threadIdx.x < DEPTH) {
            barrier_init(shared_address(shared.full) + threadIdx.x * 8, 1 + WARP);  // bytes in bulk, and copies of each lane
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

    // --- the warp that copies: its first lane, and all of them where states are paged ---

    // A lane's share of states and scales, by 16 bytes: half a state at a time (halves follow each other here), then the scales.
    static constexpr u32 HALF = TILE * 128, PIECES = HALF / (WARP * 16), SCALES_PIECES = TILE / 4;
    static_assert(PIECES * WARP * 16 == HALF && STATES * SCALES_PIECES <= WARP, "shares are even");
    static DEVICE u8* half(const Source& of, u32 i) { return of.states[i / 2] + i % 2 * HALF; }
    static DEVICE u8* scales(const Source& of, u32 lane) { return of.absmax[lane / SCALES_PIECES] + lane % SCALES_PIECES * 16; }
    DEVICE void pages_in(const Source& from, u32 lane) const {
#pragma unroll 1
        for (u32 i = 0; i < 2 * STATES; ++i) {
            const u32 to = place() + CODES_AT + i * HALF + lane * 16;
            const u8* const at = half(from, i) + lane * 16;
#pragma unroll
            for (u32 j = 0; j < PIECES; ++j) copy16(to + j * (WARP * 16), at + j * (WARP * 16));
        }
        if (lane < STATES * SCALES_PIECES) copy16(place() + SCALES_AT + lane * 16, scales(from, lane));
    }
    DEVICE void pages_out(const Source& to, u32 lane) const {
        auto store = [](u8* at, uint4 v) { store_four(at, v.x, v.y, v.z, v.w); };
#pragma unroll 1
        for (u32 i = 0; i < 2 * STATES; ++i) {
            const u32 from = place() + CODES_AT + i * HALF + lane * 16;
            u8* const at = half(to, i) + lane * 16;
            uint4 v[PIECES];
#pragma unroll
            for (u32 j = 0; j < PIECES; ++j) v[j] = load_uint4(from + j * (WARP * 16));
#pragma unroll
            for (u32 j = 0; j < PIECES; ++j) store(at + j * (WARP * 16), v[j]);
        }
        if (lane < STATES * SCALES_PIECES) store(scales(to, lane), load_uint4(place() + SCALES_AT + lane * 16));
    }

    // Waits for the results in the next place, if it has a tile, and copies them back.
    DEVICE void copy_back(u32 lane) const {
        const Source& to = shared.sources[turn];
        if (to.p == nullptr) return;
        barrier_wait(empty(), parity ^ 1);
        if (lane == 0) {
            bulk_store(to.p, place(), TILE * 512);
            if (!paged) {
#pragma unroll
                for (u32 s = 0; s < STATES; ++s) {
                    bulk_store(to.states[s], place() + CODES_AT + s * (TILE * 256), TILE * 256);
                    bulk_store(to.absmax[s], place() + SCALES_AT + s * (TILE * 4), TILE * 4);
                }
            }
            bulk_commit();
        }
        if (paged) pages_out(to, lane);
    }
    DEVICE void ask(const Source& from, const u8* gradient, u32 lane) {
        copy_back(lane);
        if (paged) {
            __syncwarp();  // all lanes have read what was here, and where it goes
            if (lane == 0) shared.sources[turn] = from;
            __syncwarp();
            pages_in(shared.sources[turn], lane);
            barrier_arrive_copies(full());
        }
        if (lane == 0) {
            bulk_wait_read<0>();
            barrier_expect(full(), paged ? TILE * 1024 : BYTES);
            bulk_load(place(), from.p, TILE * 512, full());
            bulk_load(place() + GRADIENTS_AT, gradient, TILE * 512, full());
            if (!paged) {
#pragma unroll
                for (u32 s = 0; s < STATES; ++s) {
                    bulk_load(place() + CODES_AT + s * (TILE * 256), from.states[s], TILE * 256, full());
                    bulk_load(place() + SCALES_AT + s * (TILE * 4), from.absmax[s], TILE * 4, full());
                }
                barrier_arrive_warp(full());  // in place of lanes' copies, of which there are none
                shared.sources[turn] = from;
            }
        }
        turn_over();
    }
    // Gets ready for tiles whose states are paged or not, by all lanes: if that is another kind than before, all places are emptied.
    DEVICE void change(bool to_paged, u32 lane) {
        if (paged == to_paged) return;
#pragma unroll 1
        for (u32 i = 0; i < DEPTH; ++i) {
            if (paged || lane == 0) copy_back(lane);
            turn_over();
        }
        parity ^= 1;  // as it was: nothing has been asked for meanwhile
        if (lane == 0) bulk_wait();
        // What lanes have read comes before what copies in bulk will write there, and what copies in bulk have read before what lanes write.
        fence_for_async();
        __syncwarp();
        if (lane < DEPTH) shared.sources[lane].p = nullptr;
        __syncwarp();
        turn = __shfl_sync(ALL_LANES, turn, 0), parity = __shfl_sync(ALL_LANES, parity, 0);
        paged = to_paged;
    }
};
