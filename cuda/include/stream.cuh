// The serving side of four_bit_stream.cu: which stages a block goes through, and the warps that bring weights and scales.
#pragma once
#include "async_copy.cuh"
#include "bulk.cuh"
#include "mma.cuh"
#include "shared.cuh"
#include "warpgroup.cuh"

constexpr u32 COLUMNS = TOKENS / 8;                         // tiles of 8 tokens
constexpr u32 MOST_WARPS = COLUMNS == 1 ? 16 : 12;          // that compute
constexpr u32 SERVING = COLUMNS == 2 || NESTED ? 4 : 2;      // warps that serve,
constexpr u32 COPYING = SERVING / 2;                        // of which so many do nothing but copy weights
// Registers of a thread, of the 128 that each has at first, where two columns of sums want more: what warps that serve keep, and what
// warps that compute have then (whole warpgroups of both).
constexpr u32 GIVEN = 56, TAKEN = 152;
static_assert(SERVING * GIVEN + MOST_WARPS * TAKEN <= (SERVING + MOST_WARPS) * 128 || COLUMNS == 1);
constexpr u32 STAGES = COLUMNS == 1 ? 3 : 4;
constexpr u32 SLICE = 2;                           // blocks of 64 that a warp has of a stage
constexpr u32 ROWS = 32, HALF = ROWS / 2;          // of a stage: two tiles, and one
// Parts of a stage that are waited for one after the other: its tiles, or (two columns) both together, so that more goes on at a time.
constexpr u32 PARTS = COLUMNS == 1 ? 2 : 1;
constexpr u32 GROUP = 8;                           // tiles whose sums are in registers at a time
constexpr u32 ROUND = 2 / COLUMNS;                 // tiles whose sums are added at a time while the ring is in use
constexpr u32 SUM_FLOATS = COLUMNS * TILE_FLOATS;  // of a tile

// The pair table (mma.cuh) at 64 K from where the block's shared memory begins (which in a cluster is not at 0), in rows of 256 bytes:
// then one byte permutation makes a look-up's address. Between the rows are 128 bytes for something else, and dynamic shared memory
// lies on both sides.
struct SpacedPairs {
    static constexpr u32 AT = 65536, ROW = 256, BYTES = 256 * ROW, GAP_AT = WARP * 4;
    u32 lane_copy;  // address + 4 · lane
    DEVICE SpacedPairs(u32 begin, u32 lane) : lane_copy(begin + AT + lane * 4) {}
    DEVICE void fill(const Values& values, u32 threads) const {
        const u32 table = lane_copy & ~(BYTES - 1);
        fill_pairs(values, threads, [&](u32 at, u32 pair) { store_words(table + at / GAP_AT * ROW + at % GAP_AT, pair, pair, pair, pair); });
    }
    template <int J> DEVICE u32 of(u32 word) const { return look_up(__byte_perm(word, lane_copy, 0x7604 | J << 4)); }
};

// A stage: rows of weights, then rows of scales, each padded so that 8 of them lie in different banks.
constexpr u32 ROW_BYTES = MOST_WARPS * SLICE * 32 + 32, SCALE_FLOATS = MOST_WARPS * SLICE + 4;
constexpr u32 STAGE_BYTES = ROWS * (ROW_BYTES + SCALE_FLOATS * 4);
// Where things are in shared memory, from where it begins.
constexpr u32 FIRST_AT = SpacedPairs::AT - STAGE_BYTES;
constexpr u32 SUMS_AT = SpacedPairs::AT + SpacedPairs::BYTES, SUMS_BYTES = MOST_WARPS * ROUND * SUM_FLOATS * 4;
constexpr u32 RING_AT = SUMS_AT + SUMS_BYTES, END_AT = RING_AT + (STAGES - 1) * STAGE_BYTES;
// Activations of a step, a place a warp: [token][block][64]. Those of the first 8 tokens lie in the table's gaps, others before the ring.
constexpr u32 X_ROW = SLICE * SpacedPairs::ROW, MORE_X_ROW = SLICE * 128;
constexpr u32 MORE_X_AT = FIRST_AT - (COLUMNS - 1) * (MOST_WARPS * 8 * MORE_X_ROW);
static_assert(MOST_WARPS * 8 * X_ROW <= SpacedPairs::BYTES);

// Nested scales on their way: codes of a stage's rows, then two nested scales a row.
constexpr u32 CODE_WORDS = MOST_WARPS * SLICE / 4, CODE_ROW = CODE_WORDS * 4 + 4;
constexpr u32 CODE_STAGES = 4, CODE_STAGE_BYTES = ROWS * (CODE_ROW + 8);

struct Weight {
    const u8* packed;     // 16-byte aligned
    const void* absmax;   // fp32 [N·K >> log2_block], or u8 codes if `nested`
    const float* nested;  // fp32, one for 2^nested_shift codes; null when plain
    const float* map;     // fp32 [256]
    const float* offset;  // fp32 [1]
};

// What the launch that is expected next reads first: the first `bytes` of each of `rows` rows, which are `stride` bytes apart. A row is for
// 2^log2_lanes lanes.
struct NextRows {
    const u8* base;
    u32 rows, stride, bytes, log2_lanes;
};
struct Next {
    NextRows list[2];  // of packed weights and of scales
};

// Asks the L2 for this block's share of it, by its warp `part` of those that serve: the rows that the block of this number will have if the next
// grid is as large, because each half of the L2 is near to one half of the multiprocessors.
DEVICE void fetch_for_next(const Next& next, u32 part, u32 lane) {
    constexpr u32 LINE = 128;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const NextRows& some = next.list[i];
        const u32 lanes = 1u << some.log2_lanes, at_a_time = WARP >> some.log2_lanes, column = lane & (lanes - 1);
        const u32 each = (some.rows + gridDim.x - 1) / gridDim.x, first = blockIdx.x * each, end = min(first + each, some.rows);
#pragma unroll 1
        for (u32 row = first + part * at_a_time + (lane >> some.log2_lanes); row < end; row += SERVING * at_a_time)
#pragma unroll 1
            for (u32 at = column * LINE; at < some.bytes; at += lanes * LINE) fetch_into_l2(some.base + u64(row) * some.stride + at);
    }
}

// A ring's place and the parity of its turn.
struct Turn {
    u32 stage = 0, parity = 0;
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// What all warps of a block know of its share of the work.
struct Share {
    u32 warps;                 // that compute
    u32 blocks;                // of 64 in a row
    u32 first, last, steps;    // blocks of 64 of this block's part of K; steps that it takes
    u32 first_tile, tiles;     // of 16 rows
    // Where the two tiles of a stage have their rows. As rows follow each other: a tile is 16 rows on, `end` is where this block's share ends. Of a
    // gated weight, which is two of N rows one behind the other, each pair of tiles has the same 16 rows of both: a tile is 8 rows on, and the
    // second tile N - 16 rows further than it would be.
    u32 tile_rows, skipped, end;
    u32 full, empty, codes, begin;  // shared addresses
    // The first stage ends where the pair table begins, the others lie behind it.
    DEVICE u32 stage(u32 i) const { return begin + (i == 0 ? FIRST_AT : RING_AT + (i - 1) * STAGE_BYTES); }
    // The barrier that says that tile 0 or 1 of a stage has landed.
    DEVICE u32 landed(u32 stage, u32 tile) const { return full + (stage * PARTS + tile % PARTS) * 8; }
    DEVICE u32 scales(u32 i) const { return stage(i) + ROWS * ROW_BYTES; }
    // Rows of a stage's tile 0 or 1 that there are.
    DEVICE u32 rows(u32 row0, u32 tile) const {
        const u32 from = row0 + tile * (2 * tile_rows - HALF);
        return from < end ? min(end - from, HALF) : 0;
    }
    // Whether there is a stage's row 0 … 31 (in fewer registers than by `rows`), and where that is in the weight.
    DEVICE bool has(u32 row0, u32 i) const { return row0 + i - (i < HALF ? 0 : 2 * (HALF - tile_rows)) < end; }
    DEVICE u32 row(u32 row0, u32 i) const { return row0 + i + (i < HALF ? 0 : skipped); }
    // What a tile's first row is, of N.
    DEVICE u32 row0(u32 tile) const { return (first_tile + tile) * tile_rows; }
};

// The stages in order: groups of tiles, of each the steps along K, of each the pairs of tiles.
struct Walk {
    const Share& share;
    u32 group = 0, step = 0, tile = 0;
    DEVICE explicit Walk(const Share& share) : share(share) {}
    DEVICE bool valid() const { return group < share.tiles && share.steps > 0; }
    DEVICE u32 row0() const { return share.row0(tile); }
    DEVICE u32 block() const { return share.first + step * share.warps * SLICE; }
    // Blocks of 64 that the stage has of a row.
    DEVICE u32 width() const { return min(share.warps * SLICE, share.last - block()); }
    DEVICE void next() {
        tile += 2;
        if (tile < min(group + GROUP, share.tiles)) return;
        if (++step == share.steps) step = 0, group += GROUP;
        tile = group;
    }
};

// Copies the weights of a stage's tile 0 or 1 in bulk, a lane a row, up to 1 KB. A warp issues such copies one by one, about 60 cycles each:
// all 32 rows would take it as long as the others take for the stage, so those that serve share them. (16 copies without a loop, by one lane
// with addresses in uniform registers, are 4 to 8 instructions each, and no faster on the whole: NOTES.)
template <u32 TILE> DEVICE void copy_weights(const Share& share, const Weight& weight, u32 stage, const Walk& at, u32 lane) {
    const u32 rows = share.rows(at.row0(), TILE), i = TILE * HALF + lane, bytes = at.width() * 32;
    const u32 full = share.landed(stage, TILE);
    if (lane == 0) barrier_expect(full, rows * bytes);
    __syncwarp();
    if (lane < rows)
        bulk_load(share.stage(stage) + i * ROW_BYTES, weight.packed + u64(share.row(at.row0(), i)) * share.blocks * 32 + at.block() * 32, bytes, full);
}

template <u32 TILE> DEVICE void serve_weights(const Share& share, const Weight& weight, u32 lane) {
    Turn turn;
    for (Walk at(share); at.valid(); at.next()) {
        barrier_wait(share.empty + turn.stage * 8, turn.parity ^ 1);
        copy_weights<TILE>(share, weight, turn.stage, at, lane);
        turn.next();
    }
}

// The second half of the rows (unless a warp of its own has it), and plain scales of blocks of 64 where each row's begin at a multiple of
// 16 bytes.
DEVICE void serve_whole_scales(const Share& share, const Weight& weight, u32 lane) {
    Turn turn;
    for (Walk at(share); at.valid(); at.next()) {
        barrier_wait(share.empty + turn.stage * 8, turn.parity ^ 1);
        // Four rows at a time, eight chunks of 16 bytes each.
        const u32 first_row = lane / 8, chunk = lane % 8;
        const bool valid = chunk < at.width() / 4;
        u32 to = share.scales(turn.stage) + first_row * SCALE_FLOATS * 4 + chunk * 16;
#pragma unroll
        for (u32 tile = 0; tile < 2; ++tile) {
            const u32 rows = valid ? share.rows(at.row0(), tile) : 0;
            const float* from = static_cast<const float*>(weight.absmax) +
                                u64(share.row(at.row0(), tile * HALF + first_row)) * share.blocks + at.block() + chunk * 4;
#pragma unroll
            for (u32 i = 0; i < HALF; i += 4) {
                if (first_row + i < rows) copy16(to, from);
                from += 4 * u64(share.blocks), to += 4 * SCALE_FLOATS * 4;
            }
            if (tile == 1 || PARTS == 2) barrier_arrive_copies(share.landed(turn.stage, tile));
        }
        if (COPYING == 1) copy_weights<1>(share, weight, turn.stage, at, lane);
        turn.next();
    }
}

// Nested scales of blocks of 64 where each row's codes begin at a multiple of 4 bytes. Warp `part` of two has scales of half of a stage's
// rows; codes and nested scales come by asynchronous copies CODE_STAGES - 1 stages ahead, and a lane decodes half of a row's. `map` is filled
// by both while the first codes are on their way.
DEVICE void serve_nested_scales(const Share& share, const Weight& weight, u32 nested_shift, float* map, u32 part, u32 lane) {
    constexpr u32 MINE = ROWS / 2, WORDS = CODE_WORDS / 2;  // rows of a warp, words of a lane
    static_assert(MINE * 2 == WARP && CODE_WORDS <= 8 && CODE_WORDS % 2 == 0, "two lanes a row");
    const u8* codes = static_cast<const u8*>(weight.absmax);
    static_assert(MINE == HALF, "a tile a warp");
    const u32 first_row = part * MINE, row = first_row + lane % MINE, half = lane / MINE;
    u32 fetched = 0, landed = 0;
    auto fetch = [&](const Walk& walk) {
        const u32 to = share.codes + fetched++ % CODE_STAGES * CODE_STAGE_BYTES, rows = share.rows(walk.row0(), part);
#pragma unroll
        for (u32 i = 0; i < MINE; i += WARP / 8) {
            const u32 r = first_row + i + lane / 8, word = lane % 8;
            const bool valid = r - first_row < rows && word < walk.width() / 4;
            const u64 at = u64(share.row(walk.row0(), r)) * share.blocks + walk.block() + word * 4;
            if (word < CODE_WORDS) copy4(to + r * CODE_ROW + word * 4, codes + (valid ? at : 0), valid ? 4 : 0);
        }
        // A row's codes of a stage can belong to two nested scales.
        const u64 at = u64(share.row(walk.row0(), row)) * share.blocks + walk.block() + (half ? walk.width() - 1 : 0);
        const bool valid = row - first_row < rows;
        copy4(to + ROWS * CODE_ROW + row * 8 + half * 4, weight.nested + (valid ? at >> nested_shift : 0), valid ? 4 : 0);
        commit();
    };
    Walk ahead(share), now(share);
    auto fetch_next = [&] {
        if (ahead.valid()) fetch(ahead), ahead.next();
        else commit();
    };
    for (u32 i = 0; i < CODE_STAGES - 1; ++i) fetch_next();
    const float offset = __ldg(weight.offset);
    for (u32 i = part * WARP + lane; i < 256; i += 2 * WARP) map[i] = __ldg(weight.map + i);
    named_barrier(4, 2 * WARP);
    Turn turn;
    for (; now.valid(); now.next(), fetch_next()) {
        wait_for_copies<CODE_STAGES - 2>();
        __syncwarp();
        const u32 from = share.codes + landed++ % CODE_STAGES * CODE_STAGE_BYTES;
        const float2 nested = load_float2(from + ROWS * CODE_ROW + row * 8);
        const u64 at = u64(share.row(now.row0(), row)) * share.blocks + now.block();
        // Codes from here on have the second nested scale.
        const u32 turns = u32(min(u64(CODE_WORDS * 4), ((at >> nested_shift) + 1 << nested_shift) - at));
        u32 words[WORDS];
#pragma unroll
        for (u32 w = 0; w < WORDS; ++w) words[w] = load_word(from + row * CODE_ROW + (half * WORDS + w) * 4);
        barrier_wait(share.empty + turn.stage * 8, turn.parity ^ 1);
        const u32 to = share.scales(turn.stage) + (row * SCALE_FLOATS + half * WORDS * 4) * 4;
#pragma unroll
        for (u32 w = 0; w < WORDS; ++w) {
            auto scale = [&](u32 byte) {
                return fmaf(map[words[w] >> 8 * byte & 0xff], (half * WORDS + w) * 4 + byte < turns ? nested.x : nested.y, offset);
            };
            store_float4(to + w * 16, make_float4(scale(0), scale(1), scale(2), scale(3)));
        }
        barrier_arrive(share.landed(turn.stage, part));
        turn.next();
    }
}

// The second half of the rows (unless a warp of its own has it), and any scales, eight of a row at a time. Blocks beyond the row get 0, so
// that what lies there in the ring does not matter.
DEVICE void serve_scales(const Share& share, const Weight& weight, u32 log2_block, u32 nested_shift, const float* map, u32 lane) {
    constexpr u32 BATCH = 8;
    Turn turn;
    const u32 fold = log2_block - 6;
    const bool plain = weight.nested == nullptr;
    const float offset = plain ? 0.f : __ldg(weight.offset);
    for (Walk at(share); at.valid(); at.next()) {
        barrier_wait(share.empty + turn.stage * 8, turn.parity ^ 1);
        if (COPYING == 1) copy_weights<1>(share, weight, turn.stage, at, lane);
        const u32 to = share.scales(turn.stage) + lane * SCALE_FLOATS * 4;
        const u32 width = share.has(at.row0(), lane) ? at.width() : 0;
        const u64 row = u64(share.row(at.row0(), lane)) * share.blocks + at.block();
        for (u32 i = 0; i < share.warps * SLICE; i += BATCH) {
            float scale[BATCH];
            u8 code[BATCH];
#pragma unroll
            for (u32 j = 0; j < BATCH; ++j) {
                scale[j] = 0.f, code[j] = 0;
                if (i + j >= width) continue;
                const u64 from = row + i + j >> fold;
                if (plain) scale[j] = __ldg(static_cast<const float*>(weight.absmax) + from);
                else scale[j] = __ldg(weight.nested + (from >> nested_shift)), code[j] = __ldg(static_cast<const u8*>(weight.absmax) + from);
            }
#pragma unroll
            for (u32 j = 0; j < BATCH; ++j)
                if (i + j < share.warps * SLICE)
                    store_float(to + (i + j) * 4, plain || i + j >= width ? scale[j] : fmaf(map[code[j]], scale[j], offset));
        }
        __syncwarp();
        if (lane < PARTS) barrier_arrive(share.landed(turn.stage, lane));
        turn.next();
    }
}
