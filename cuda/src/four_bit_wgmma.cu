// out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] for 17 to 64 rows straight from packed 4-bit weights, on the warpgroup's matrix multiply.
//
//   x [M, K] 16-bit, w packed [N·K / 2] in bitsandbytes' layout, scales one a block of 2^log2_block ≥ 64, out [M, N]; K % 64 = 0
//
// For sm_90a alone. A tile is ROWS (128 or 192) rows of weights × TOKENS (32 or 64) rows of x; where they are no whole number for each
// block, blocks share some along K (split.cuh). Weights are the operand in registers, so that they go from packed bytes to the tensor cores
// without being stored again; x is the one in shared memory:
//
//             K →   stage of 256           stage of 256
//   rows            [ 64 | 64 | 64 | 64 ]  [ …                one box of the tensor copy: ROWS × 128 bytes, swizzled
//   tokens          [ 64 | 64 | 64 | 64 ]  [ …                boxes of TOKENS × 64 elements, in a ring of their own
//
// A unit of work is 64 rows × 64 of K of one warpgroup: four MMAs into fresh sums, which are then multiplied with the rows' scales and
// added to the fp32 sums that stay: a lane's rows are in one block of scales throughout. While the tensor cores have a unit, the
// warpgroup decodes the next one and adds the sums of the one before (where registers do not hold two, of this one).
//
// Decoding is one look-up a byte. Slots 2t, 2t + 1 of an MMA's K are elements 2t, 2t + 1 of eight, so lane t takes byte t of each word of a
// row. The pair of byte b for a lane is at 64 K + 256 · b + 4 · lane: one byte permutation makes the address, every lane has a bank of its own,
// and the other 128 bytes of each 256 are free: they hold the scales of the ring's stages, four a row.
//
// Warps: 0 copies weights, 1 copies x, 2 and 3 see to the scales; then GROUPS × 4 that compute.
//
// Programmatic dependent launch: the table is made before the kernel waits for the one ahead of it.
//
// Shared memory, by address: barriers, map; results at 4 K; ring at 16 K; table at 64 K; ring at 128 K.
// Bytes: N·K / 2 + scales + 2·M·K (from the L2) a row of tiles + 2·M·N, and 8·ROWS·TOKENS (in the L2) a tile that is shared.
#include "async_copy.cuh"
#include "mma.cuh"
#include "scale_server.cuh"
#include "shared.cuh"
#include "split.cuh"
#include "wgmma.cuh"
#include "write_tile.cuh"

#if !defined(ELEMENT) || !defined(TOKENS)
#error "compile with -DELEMENT=Bf16 or F16 and -DTOKENS=32 or 64"
#endif

constexpr u32 STAGE_K = 256;  // of weights
constexpr u32 RESULTS_AT = 4 * 1024, LOW_AT = 16 * 1024, TABLE_AT = 64 * 1024, HIGH_AT = 128 * 1024;
constexpr u32 LOW_BYTES = TABLE_AT - LOW_AT, HIGH_BYTES = 96 * 1024;
constexpr u32 SERVING = 128;  // threads
constexpr u32 MOST_STAGES = 12;

// What a block of threads is made of: GROUPS warpgroups, each with 64 rows.
template <u32 GROUPS> struct Shape {
    static constexpr u32 ROWS = 64 * GROUPS, COMPUTING = GROUPS * 128, THREADS = SERVING + COMPUTING;
    // Weights and activations have rings on either side of the table.
    static constexpr bool WEIGHTS_HIGH = TOKENS == 32 || GROUPS == 3;
    static constexpr u32 WEIGHTS_AT = WEIGHTS_HIGH ? HIGH_AT : LOW_AT, X_AT = WEIGHTS_HIGH ? LOW_AT : HIGH_AT;
    static constexpr u32 STAGE_BYTES = ROWS * STAGE_K / 2;
    static constexpr u32 STAGES = (WEIGHTS_HIGH ? HIGH_BYTES : LOW_BYTES) / STAGE_BYTES;
    static constexpr u32 BOX_BYTES = TOKENS * 128;             // 64 of K
    static constexpr u32 X_BOXES = TOKENS == 32 || GROUPS == 2 ? 2 : 1;  // that come together
    static constexpr u32 X_BYTES = BOX_BYTES * X_BOXES;
    static constexpr u32 X_STAGES = (WEIGHTS_HIGH ? LOW_BYTES : HIGH_BYTES) / X_BYTES;
    static constexpr bool TWO_SUMS = TOKENS == 32 || GROUPS == 2;        // of units under way
    // Together no more than the block has from the start: 512 × 128 or 384 × 168.
    static constexpr u32 GIVEN = 56, TAKEN = GROUPS == 3 ? 144 : 224;
    using TileSums = Sums<COMPUTING, TOKENS / 2>;
    static_assert(STAGES >= 3 && STAGES <= MOST_STAGES && X_STAGES >= 3 && X_STAGES <= MOST_STAGES && STAGES * (ROWS / 8) <= 256, "rings");
    static_assert(RESULTS_AT + GROUPS * RESULT_BYTES<TOKENS> <= LOW_AT, "results");
};

struct Problem {
    const void* absmax;   // fp32 [N·K >> log2_block], or u8 codes if `nested`
    const float* nested;  // fp32, one for 2^nested_shift codes; null when plain
    const float* map;     // fp32 [256]
    const float* offset;  // fp32 [1]
    const ELEMENT* bias;  // [N] or null
    ELEMENT* out;         // [M, N]
    u32 M, N, K;          // K % 64 = 0
    u32 log2_block;       // 6 … 12
    u32 nested_shift;
    float ungain;         // what the sums are multiplied with: 1 / the gain of the values
    Split split;
};

// Where the four scales of a row of a stage lie: in the gaps of the table.
template <u32 ROWS> DEVICE u32 scales_at(u32 table, u32 stage, u32 row) {
    return table + (stage * (ROWS / 8) + row / 8) * 256 + 128 + row % 8 * 16;
}

template <u32 GROUPS>
DEVICE void product(const TensorMap& weights_map, const TensorMap& x_map, const Values& values, const Problem& p) {
    using S = Shape<GROUPS>;
    __shared__ __align__(8) u64 barriers[4 * MOST_STAGES];
    __shared__ float map[256];
    extern __shared__ __align__(1024) u8 dynamic[];
    let_dependents_start();

    const u32 lane = threadIdx.x % WARP, warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0);
    // Tiles of the same weights follow each other.
    const u32 stages = (p.K + STAGE_K - 1) / STAGE_K, down = (p.M + TOKENS - 1) / TOKENS;
    Pieces pieces;
    Piece piece;
    auto take = [&] { return pieces.take(p.split.shared, stages, (p.N + S::ROWS - 1) / S::ROWS * down, piece); };
    const u32 begin = shared_begin(dynamic), table = begin + TABLE_AT;
    const u32 full = shared_address(barriers), empty = full + MOST_STAGES * 8;
    const u32 x_full = empty + MOST_STAGES * 8, x_empty = x_full + MOST_STAGES * 8;

    if (warp == 0) {
        if (lane < S::STAGES) barrier_init(full + lane * 8, 1 + 2 * WARP), barrier_init(empty + lane * 8, S::COMPUTING / WARP);
        if (lane < S::X_STAGES) barrier_init(x_full + lane * 8, 1), barrier_init(x_empty + lane * 8, S::COMPUTING / WARP);
        barrier_init_fence();
        if (lane == 0) prefetch_map(weights_map), prefetch_map(x_map);
    }
    // The table: four lanes' copies of a pair at a time.
    for (u32 i = threadIdx.x; i < 256 * 8; i += S::THREADS) {
        const u32 byte = i / 8, pair = values.get(byte / 16) | values.get(byte % 16) << 16;
        store_words(table + byte * 256 + i % 8 * 16, pair, pair, pair, pair);
    }
    __syncthreads();

    if (warp < SERVING / WARP) {
        fewer_registers<S::GIVEN>();
        wait_for_predecessors();
        if (warp == 0) {
            Turn<S::STAGES> turn;
            while (take()) {
                const u32 row0 = piece.tile / down * S::ROWS;
#pragma unroll 1
                for (u32 stage = piece.begin; stage < piece.end; ++stage, turn.next()) {
                    barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
                    if (lane == 0) {
                        const u32 to = begin + S::WEIGHTS_AT + turn.stage * S::STAGE_BYTES, landed = full + turn.stage * 8;
                        barrier_expect(landed, S::STAGE_BYTES);
                        copy_box(to, weights_map, landed, stage * (STAGE_K / 2), row0);
                    }
                    __syncwarp();
                }
            }
        } else if (warp == 1) {
            Turn<S::X_STAGES> turn;
            while (take()) {
                const u32 token0 = piece.tile % down * TOKENS;
#pragma unroll 1
                for (u32 k = piece.begin * STAGE_K; k < piece.end * STAGE_K; k += S::X_BOXES * 64, turn.next()) {
                    barrier_wait(x_empty + turn.stage * 8, turn.parity ^ 1);
                    if (lane == 0) {
                        const u32 to = begin + S::X_AT + turn.stage * S::X_BYTES, landed = x_full + turn.stage * 8;
                        barrier_expect(landed, S::X_BYTES);
#pragma unroll
                        for (u32 i = 0; i < S::X_BOXES; ++i) copy_box(to + i * S::BOX_BYTES, x_map, landed, k + i * 64, token0);
                    }
                    __syncwarp();
                }
            }
        } else {
            auto place = [&](u32 stage, u32 row) { return scales_at<S::ROWS>(table, stage, row); };
            using Server = ScaleServer<Problem, decltype(place), S::ROWS, 2 * WARP, S::STAGES>;
            const u32 thread = threadIdx.x - 2 * WARP;
            const Way way = way_of(p);
            if (way == Way::NESTED) {
                for (u32 i = thread; i < 256; i += 2 * WARP) map[i] = __ldg(p.map + i);
                named_barrier(3, 2 * WARP);
            }
            Turn<S::STAGES> turn;
            while (take()) {
                const Server server{p, place, full, empty, thread, piece.tile / down * S::ROWS, piece.begin, piece.end, p.K / 64};
                if (way == Way::WHOLE) server.whole(turn);
                else if (way == Way::NESTED) server.nested(turn, [&](u32 code) { return map[code]; });
                else server.any(turn);
            }
        }
    } else {
        more_registers<S::TAKEN>();
        const u32 g = lane / 4, t = lane % 4, group = warp / 4 - 1;
        const u32 my_row = group * 64 + warp % 4 * 16 + g;
        const u32 table_lane = table + lane * 4, selector = 0x7604 | t << 4;
        auto pair_of = [&](u32 word) { return look_up(__byte_perm(word, table_lane, selector)); };
        constexpr u32 UNITS = STAGE_K / 64;
        constexpr u32 HELD = S::TWO_SUMS ? 2 : 1;
        constexpr u32 EACH = TOKENS / 2;
        Turn<S::STAGES> turn;
        Turn<S::X_STAGES> x_turn;
        auto decode = [&](u32 (&to)[4][4], u32 u) {
            const u32 at = begin + S::WEIGHTS_AT + turn.stage * S::STAGE_BYTES + my_row * 128 + g * 16;
            const u32 chunk = u * 32;
            const uint4 low0 = load_uint4(at ^ chunk), low1 = load_uint4((at ^ chunk) + 8 * 128);
            const uint4 high0 = load_uint4(at ^ chunk + 16), high1 = load_uint4((at ^ chunk + 16) + 8 * 128);
#pragma unroll
            for (u32 s = 0; s < 4; ++s) {
                const uint4 even = s < 2 ? low0 : high0, odd = s < 2 ? low1 : high1;
                to[s][0] = pair_of(element(even, s % 2 * 2)), to[s][1] = pair_of(element(odd, s % 2 * 2));
                to[s][2] = pair_of(element(even, s % 2 * 2 + 1)), to[s][3] = pair_of(element(odd, s % 2 * 2 + 1));
            }
        };
        auto load_scales = [&](float4 (&to)[2]) {
            const u32 at = scales_at<S::ROWS>(table, turn.stage, my_row);
            to[0] = load_float4(at), to[1] = load_float4(at + 256);
        };
        const u32 mine = threadIdx.x - SERVING;
        bool owed = false;  // a flag
        auto raise = [&] {
            S::TileSums::raise(p.split, mine, 1);
            owed = false;
        };
        while (take()) {
            float sums[EACH], fresh[HELD][EACH];
            u32 a[2][4][4];
            float4 scales[2][2];  // of this stage and of the next one
#pragma unroll
            for (u32 j = 0; j < EACH; ++j) sums[j] = 0.f;
            barrier_wait(full + turn.stage * 8, turn.parity);
            load_scales(scales[0]);
            decode(a[0], 0);
#pragma unroll 1
            for (u32 stage = piece.begin; stage < piece.end; ++stage) {
#pragma unroll
                for (u32 u = 0; u < UNITS; ++u) {
                    constexpr u32 PER_X = S::X_BOXES;  // units with one turn of x
                    if (u % PER_X == 0) barrier_wait(x_full + x_turn.stage * 8, x_turn.parity);
                    const u32 b = begin + S::X_AT + x_turn.stage * S::X_BYTES + u % S::X_BOXES * S::BOX_BYTES;
                    const u64 operand = swizzled_operand(b);
                    auto& d = fresh[S::TWO_SUMS ? u % 2 : 0];
                    mma_fence();
#pragma unroll
                    for (u32 s = 0; s < 4; ++s)
                        Wgmma<ELEMENT, TOKENS>::add(d, a[u % 2][s], operand + 2 * s, s == 0);
                    mma_commit();

                    auto advance = [&] {  // decodes the unit after this one
                        if (u + 1 < UNITS) {
                            decode(a[(u + 1) % 2], u + 1);
                            if (u + 2 == UNITS) {
                                // All of the stage is in registers.
                                __syncwarp();
                                if (lane == 0) barrier_arrive(empty + turn.stage * 8);
                                turn.next();
                            }
                        } else if (stage + 1 < piece.end) {
                            barrier_wait(full + turn.stage * 8, turn.parity);
                            load_scales(scales[1]);
                            decode(a[(u + 1) % 2], 0);
                        }
                    };
                    auto complete = [&](u32 v) {  // unit v, which is done
                        auto& done = fresh[S::TWO_SUMS ? v % 2 : 0];
                        pin(done);
#pragma unroll
                        for (u32 s = 0; s < 4; ++s)
#pragma unroll
                            for (u32 i = 0; i < 4; ++i) keep(a[v % 2][s][i]);
                        if ((v + 1) % PER_X == 0 && lane == 0) {
                            const u32 x_stage = v == u ? x_turn.stage : x_turn.stage == 0 ? S::X_STAGES - 1 : x_turn.stage - 1;
                            barrier_arrive(x_empty + x_stage * 8);
                        }
                        const float low = element(scales[0][0], v), high = element(scales[0][1], v);
#pragma unroll
                        for (u32 j = 0; j < EACH; j += 4) {
                            sums[j] = fmaf(done[j], low, sums[j]), sums[j + 1] = fmaf(done[j + 1], low, sums[j + 1]);
                            sums[j + 2] = fmaf(done[j + 2], high, sums[j + 2]), sums[j + 3] = fmaf(done[j + 3], high, sums[j + 3]);
                        }
                    };
                    // At the end of a stage nothing is under way: ptxas follows sums of the tensor cores through straight code only.
                    if (S::TWO_SUMS && u > 0) mma_wait<1>(), complete(u - 1);
                    advance();
                    if (!S::TWO_SUMS || u + 1 == UNITS) mma_wait<0>(), complete(u);
                    if ((u + 1) % PER_X == 0) x_turn.next();
                }
                if (owed) raise();
                scales[0][0] = scales[1][0], scales[0][1] = scales[1][1];
            }

            if (piece.end < stages) {
                S::TileSums::leave(p.split, sums, mine, 1);
                owed = true;
                continue;
            }
            if (piece.begin > 0) S::TileSums::add(p.split, piece, sums, mine, 2);
#pragma unroll
            for (u32 j = 0; j < EACH; ++j) sums[j] *= p.ungain;
            const u32 n0 = piece.tile / down * S::ROWS + group * 64, m0 = piece.tile % down * TOKENS;
            const u32 results = begin + RESULTS_AT + group * RESULT_BYTES<TOKENS>;
            write_tile<ELEMENT, TOKENS>(p, sums, n0, m0, results, mine % 128, 4 + group);
        }
        if (owed) raise();
    }
}

#define ENTRY(rows, GROUPS)                                                                                                    \
    KERNEL __launch_bounds__(Shape<GROUPS>::THREADS, 1)                                                                        \
        matmul_4bit_wgmma_r##rows(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, u64 values0, \
                                  u64 values1, u64 values2, u64 values3, const __grid_constant__ Problem problem) {            \
        product<GROUPS>(weights, x, Values{{values0, values1, values2, values3}}, problem);                                    \
    }
ENTRY(128, 2)
ENTRY(192, 3)
