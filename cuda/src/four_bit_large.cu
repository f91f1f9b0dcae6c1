// out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] for many rows, straight from packed 4-bit weights, on Hopper's tensor cores.
//
//   x [M, K] 16-bit, w packed [N·K / 2] in bitsandbytes' layout, scales one a block of 2^log2_block ≥ 64, out [M, N]; K % 64 = 0
//
// For sm_90a alone. Tiles are 128 weights × TOKENS (128 or 256) tokens, 64 weights × TOKENS a warpgroup, weights the A operand. Two
// rings: x in steps of 64 of K, packed weights and their scales in stages of 256. A weight is a 16-bit number as dequantizing makes
// it, code · absmax rounded once, so that sums stay in the tensor cores from the first step to the last.
//
// Weights go from packed bytes into A operands in registers: a warpgroup decodes its next step while the tensor cores have the last
// one, or the other warpgroup's. What binds is shared memory, which moves 128 bytes a cycle, while a step of 256 tokens has 1024 cycles
// of MMAs:
//
//   bytes / 128 of a step     MMAs read   x comes   packed come, are read   look-ups   in all
//                                   512       256              32 +   100        128     1028
//
// Decoding is one look-up a byte: the pair of 16-bit values (times a gain with which they round well) of byte b for a lane is at
// 64 K + 256 · b + 4 · lane, so that one byte permutation makes the address and every lane has a bank of its own. Two values become
// floats, are multiplied with the block's scale, and are rounded together. Packed weights lie in the table's gaps, a row's 128 bytes of
// a stage in each, 16-byte pieces swizzled.
//
// Warps: 0 copies x by the tensor memory accelerator, 1 and 2 packed weights, 3 scales; then two warpgroups multiply.
//
// Where tiles are no whole number for each block, blocks share some along K (split.cuh): 112 tiles would leave 20 of 132 multiprocessors
// idle. A tile that two share costs its sums, 128 KB of 256 tokens, written to the L2 and read again.
//
// Shared memory from the begin of its window: barriers at 2 K, map at 3 K; at 4 K the last stage of x; scales at 36 K; results at
// 40 K; table at 64 K; x at 128 K.
// Bytes: N·K / 2 + scales + 2·M·K (from the L2 for each tile beside) + 2·M·N.
#include "large.cuh"
#include "mma.cuh"
#include "scale_server.cuh"
#include "split.cuh"
#include "wgmma.cuh"
#include "write_tile.cuh"

#if !defined(ELEMENT) || !defined(TOKENS)
#error "compile with -DELEMENT=Bf16 or F16 and -DTOKENS=128 or 256"
#endif

constexpr u32 ROWS = 128;     // of a tile, 64 a warpgroup
constexpr u32 STAGE_K = 256;  // of packed weights
constexpr u32 STEPS = 4;      // of x in a stage
constexpr u32 SERVING = 128, MULTIPLYING = 256, THREADS = SERVING + MULTIPLYING;

constexpr u32 BARRIERS_AT = 2 * 1024, MAP_AT = 3 * 1024, LOW_AT = 4 * 1024, SCALES_AT = 36 * 1024, RESULTS_AT = 40 * 1024;
constexpr u32 TABLE_AT = 64 * 1024, HIGH_AT = 128 * 1024, HIGH_BYTES = 96 * 1024;
constexpr u32 STAGES = 2;                        // 128 gaps of the table each
constexpr u32 X_BYTES = TOKENS * 128;            // 64 of K
constexpr u32 X_HIGH = HIGH_BYTES / X_BYTES, X_STAGES = X_HIGH + (SCALES_AT - LOW_AT) / X_BYTES;
static_assert(RESULTS_AT + 2 * RESULT_BYTES<TOKENS> <= TABLE_AT, "shared memory");

// Registers of a thread, together no more than the block has from the start: 384 × 168.
constexpr u32 SERVING_REGISTERS = 56, MULTIPLYING_REGISTERS = 224;

struct Problem {
    const u8* packed;
    const void* absmax;   // fp32 [N·K >> log2_block], or u8 codes if `nested`
    const float* nested;  // fp32, one for 2^nested_shift codes; null when plain
    const float* map;     // fp32 [256]
    const float* offset;  // fp32 [1]
    const ELEMENT* bias;  // [N] or null
    ELEMENT* out;         // [M, N]
    u32 M, N, K;          // K % 64 = 0
    u32 log2_block;       // 6 … 12
    u32 nested_shift;
    float ungain;         // 1 / the gain of the values
    u32 group;            // tiles of tokens that are gone through for each tile of weights
    u32 unused;
    Split split;
};

struct Tile { u32 weights, tokens; };  // where it begins

using TileSums = Sums<MULTIPLYING, TOKENS / 2>;

// What all warps of a block agree on.
struct Share {
    const Problem& p;
    u32 window;  // shared address of address 0

    DEVICE u32 across() const { return (p.N + ROWS - 1) / ROWS; }
    DEVICE u32 down() const { return (p.M + TOKENS - 1) / TOKENS; }
    DEVICE u32 stages() const { return (p.K + STAGE_K - 1) / STAGE_K; }
    DEVICE bool take(Pieces& pieces, Piece& piece) const { return pieces.take(p.split.shared, stages(), across() * down(), piece); }
    // `group` tiles of tokens for a tile of weights, then for the next: tiles of a time read the same x and few weights.
    DEVICE Tile get(u32 i) const {
        const u32 row = p.group * across(), top = i / row * p.group, inner = i % row, width = min(p.group, down() - top);
        return {inner / width * ROWS, (top + inner % width) * TOKENS};
    }
    DEVICE u32 barrier(u32 i) const { return window + BARRIERS_AT + i * 8; }
    DEVICE u32 full() const { return barrier(0); }
    DEVICE u32 empty() const { return barrier(STAGES); }
    DEVICE u32 x_full() const { return barrier(2 * STAGES); }
    DEVICE u32 x_empty() const { return barrier(2 * STAGES + X_STAGES); }
    DEVICE u32 x(u32 stage) const {
        return window + (stage < X_HIGH ? HIGH_AT + stage * X_BYTES : LOW_AT + (stage - X_HIGH) * X_BYTES);
    }
    DEVICE u32 scales(u32 stage, u32 row) const { return window + SCALES_AT + (stage * ROWS + row) * 16; }
    // Of a row's 128 bytes of a stage.
    DEVICE u32 packed(u32 stage, u32 row) const { return window + TABLE_AT + 128 + (stage * ROWS + row) * 256; }
};

// --- warps that copy -------------------------------------------------------------------------------------------------------

DEVICE void serve_x(const Share& share, const TensorMap& map, u32 lane) {
    Turn<X_STAGES> turn;
    Pieces pieces;
    for (Piece piece; share.take(pieces, piece);) {
        const Tile tile = share.get(piece.tile);
#pragma unroll 1
        for (u32 step = piece.begin * STEPS; step < piece.end * STEPS; ++step, turn.next()) {
            barrier_wait(share.x_empty() + turn.stage * 8, turn.parity ^ 1);
            if (lane == 0) {
                barrier_expect(share.x_full() + turn.stage * 8, X_BYTES);
                copy_box(share.x(turn.stage), map, share.x_full() + turn.stage * 8, step * 64, tile.tokens);
            }
            __syncwarp();
        }
    }
}

// Eight rows at a time by 64 threads, eight pieces of 16 bytes each; zeros beyond N and beyond the row.
DEVICE void serve_packed(const Share& share, u32 thread) {
    const Problem& p = share.p;
    const u32 row = thread / 8, piece = thread % 8, row_bytes = p.K / 2;
    Turn<STAGES> turn;
    Pieces pieces;
    for (Piece part; share.take(pieces, part);) {
        const u32 n = share.get(part.tile).weights + row;
#pragma unroll 1
        for (u32 stage = part.begin; stage < part.end; ++stage, turn.next()) {
            const u32 column = stage * (STAGE_K / 2) + piece * 16;
            const u8* from = p.packed + u64(n) * row_bytes + column;
            const u32 to = share.packed(turn.stage, row) + (piece ^ row) * 16;
            barrier_wait(share.empty() + turn.stage * 8, turn.parity ^ 1);
#pragma unroll
            for (u32 j = 0; j < ROWS / 8; ++j) {
                const bool valid = column < row_bytes && n + j * 8 < p.N;
                copy16(to + j * 8 * 256, valid ? from : p.packed, valid);
                from += 8 * u64(row_bytes);
            }
            barrier_arrive_copies(share.full() + turn.stage * 8);
        }
    }
}

DEVICE void serve_scales(const Share& share, u32 lane) {
    const Problem& p = share.p;
    auto place = [&](u32 stage, u32 row) { return share.scales(stage, row); };
    using Server = ScaleServer<Problem, decltype(place), ROWS, WARP, STAGES>;
    const Way way = way_of(p);
    if (way == Way::NESTED) {
        for (u32 i = lane; i < 256; i += WARP) store_float(share.window + MAP_AT + i * 4, __ldg(p.map + i));
        __syncwarp();
    }
    Turn<STAGES> turn;
    Pieces pieces;
    for (Piece piece; share.take(pieces, piece);) {
        const u32 row0 = share.get(piece.tile).weights;
        const Server server{p, place, share.full(), share.empty(), lane, row0, piece.begin, piece.end, p.K / 64};
        if (way == Way::WHOLE) server.whole(turn);
        else if (way == Way::NESTED) server.nested(turn, [&](u32 code) { return load_float(share.window + MAP_AT + code * 4); });
        else server.any(turn);
    }
}

// --- decoding --------------------------------------------------------------------------------------------------------------

// Two weights. `selector` takes a byte of `four` into bits 8 … 15 of `table`, which is where the table is for this lane.
DEVICE u32 weights_of(u32 four, u32 selector, u32 table, float scale) {
    const float2 values = values_of<ELEMENT>(look_up(__byte_perm(four, table, selector)));
    return pack<ELEMENT>(values.x * scale, values.y * scale);
}
constexpr u32 SELECTOR = 0x7604;  // with the byte's number in bits 4 … 7

DEVICE float4 load_scales(const Share& share, u32 stage, u32 row) {
    const float4 s = load_float4(share.scales(stage, row));
    return make_float4(s.x * share.p.ungain, s.y * share.p.ungain, s.z * share.p.ungain, s.w * share.p.ungain);
}


// --- multiplying -----------------------------------------------------------------------------------------------------------

// One of two warpgroups, whose weights are 64 · group … + 63 of a tile.
struct Multiplier {
    const Share& share;
    u32 group, thread;
    u32 lane, warp, g, t;

    DEVICE Multiplier(const Share& share, u32 group, u32 thread)
        : share(share), group(group), thread(thread), lane(thread % WARP), warp(thread / WARP), g(lane / 4), t(lane % 4) {}

    // Sums of a tile over some stages; after the first of these the flag is raised that is `owed`.
    DEVICE void multiply(float (&sums)[TOKENS / 2], u32 begin, u32 end, Turn<STAGES>& turn, Turn<X_STAGES>& x_turn, bool& owed) const {
#pragma unroll
        for (u32 j = 0; j < TOKENS / 2; ++j) sums[j] = 0.f;
        u32 before = 0;  // the stage of x of the MMAs under way
        auto release = [&] {
            if (lane == 0) barrier_arrive(share.x_empty() + before * 8);
        };
        const u32 row = group * 64 + warp * 16 + g, table = share.window + TABLE_AT + lane * 4, selector = SELECTOR | t << 4;
        u32 a[2][4][4];
#pragma unroll 1
        for (u32 stage = begin; stage < end; ++stage, turn.next()) {
            barrier_wait(share.full() + turn.stage * 8, turn.parity);
            const float4 scales[2] = {load_scales(share, turn.stage, row), load_scales(share, turn.stage, row + 8)};
            const u32 at = share.packed(turn.stage, row);
#pragma unroll
            for (u32 step = 0; step < STEPS; ++step) {
                // Slots 2t, 2t + 1 of eight elements along K are byte t of their word; the MMAs that had this operand are done.
                const u32 chunk = 2 * step ^ g;
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
#pragma unroll
                    for (u32 odd = 0; odd < 2; ++odd) {
                        const uint4 bytes = load_uint4(at + odd * 8 * 256 + (chunk ^ h) * 16);
                        const float scale = element(scales[odd], step);
#pragma unroll
                        for (u32 i = 0; i < 4; ++i)
                            a[step % 2][2 * h + i / 2][odd + i % 2 * 2] = weights_of(element(bytes, i), selector, table, scale);
                    }
                }
                if (step == STEPS - 1) {
                    __syncwarp();
                    if (lane == 0) barrier_arrive(share.empty() + turn.stage * 8);
                }
                barrier_wait(share.x_full() + x_turn.stage * 8, x_turn.parity);
                const u64 right = swizzled_operand(share.x(x_turn.stage));
                mma_fence();
#pragma unroll
                for (u32 j = 0; j < 4; ++j) Wgmma<ELEMENT, TOKENS>::add(sums, a[step % 2][j], right + 2 * j, false);
                mma_commit();
                mma_wait<1>();
#pragma unroll
                for (u32 j = 0; j < 4; ++j)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) keep(a[(step + 1) % 2][j][i]);
                if (step > 0 || stage > begin) release();
                before = x_turn.stage;
                x_turn.next();
            }
            if (owed) raise(owed);
        }
        mma_wait<0>();
        pin(sums);
        release();
    }

    DEVICE void raise(bool& owed) const {
        TileSums::raise(share.p.split, group * 128 + thread, 3);
        owed = false;
    }

    DEVICE void run() const {
        Turn<STAGES> turn;
        Turn<X_STAGES> x_turn;
        const Problem& p = share.p;
        const u32 mine = group * 128 + thread;
        bool owed = false;
        Pieces pieces;
        for (Piece piece; share.take(pieces, piece);) {
            float sums[TOKENS / 2];
            multiply(sums, piece.begin, piece.end, turn, x_turn, owed);
            if (piece.end < share.stages()) {
                TileSums::leave(p.split, sums, mine, 3);
                owed = true;
                continue;
            }
            if (piece.begin > 0) TileSums::add(p.split, piece, sums, mine, 4);
            const Tile tile = share.get(piece.tile);
            const u32 results = share.window + RESULTS_AT + group * RESULT_BYTES<TOKENS>;
            write_tile<ELEMENT, TOKENS>(p, sums, tile.weights + group * 64, tile.tokens, results, thread, 1 + group);
        }
        if (owed) raise(owed);
    }
};

KERNEL __launch_bounds__(THREADS, 1)
    matmul_4bit_large(const __grid_constant__ TensorMap x, u64 values0, u64 values1, u64 values2, u64 values3,
                      const __grid_constant__ Problem problem) {  // boxes of TOKENS × 64; values as values_of has them
    extern __shared__ __align__(1024) u8 dynamic[];
    const Problem& p = problem;
    const Values values{{values0, values1, values2, values3}};
    const u32 lane = threadIdx.x % WARP, warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0);
    const Share share = {p, shared_begin(dynamic)};
    let_dependents_start();
    if (warp == 0) {
        constexpr u32 WARPS = MULTIPLYING / WARP;
        if (lane < STAGES) barrier_init(share.full() + lane * 8, 3 * WARP), barrier_init(share.empty() + lane * 8, WARPS);
        if (lane < X_STAGES) barrier_init(share.x_full() + lane * 8, 1), barrier_init(share.x_empty() + lane * 8, WARPS);
        barrier_init_fence();
        if (lane == 0) prefetch_map(x);
    }
    // The table: four lanes' copies of a pair at a time.
    for (u32 i = threadIdx.x; i < 256 * 8; i += THREADS) {
        const u32 byte = i / 8, pair = values.get(byte / 16) | values.get(byte % 16) << 16;
        store_words(share.window + TABLE_AT + byte * 256 + i % 8 * 16, pair, pair, pair, pair);
    }
    wait_for_predecessors();
    __syncthreads();

    if (warp < SERVING / WARP) {
        fewer_registers<SERVING_REGISTERS>();
        if (warp == 0) serve_x(share, x, lane);
        else if (warp < 3) serve_packed(share, threadIdx.x - WARP);
        else serve_scales(share, lane);
    } else {
        more_registers<MULTIPLYING_REGISTERS>();
        Multiplier(share, warp / 4 - 1, threadIdx.x % 128).run();
    }
}
