// out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] for M ≤ 16 straight from packed 4-bit weights: the weights as one stream.
//
//   x [M, K] 16-bit, w packed [N·K / 2] in bitsandbytes' layout, scales one a block of 2^log2_block ≥ 64, out [M, N]; K % 64 = 0
//
// Built with ELEMENT = Bf16 and F16 and NESTED = 0 and 1, each with TOKENS = 8 (from sm_90 on) and 16 (sm_90a). Up to eight weights
// ("pieces") that share x go through one launch. How operands lie and codes are decoded: mma.cuh.
//
// One block of threads an SM. It owns up to tiles_per_block tiles of 16 rows, and takes them in groups of 8; a group goes along K in
// steps of `warps` × 128 weights, of which each of the computing warps has 128:
//
//              K →   step 0                          step 1
//                    warp 0  warp 1  …  warp 15    | warp 0 …                       (… warp 11, if there are 16 tokens)
//   tiles 0, 1       [ 128 ][ 128 ]  …  [ 128 ]    |              a stage: 32 rows × `warps` × 64 bytes, and the scales of them
//   tiles 2, 3       [     ][     ]                |              order: step outer, tiles inner, so that a warp has its
//                                                                 activations of a step in registers for all tiles
//
// so that memory is read 1 KB (or 768 bytes) of a row at a time. Two more warps serve, four where scales are nested (stream.cuh): they
// fill a ring of 3 such stages, weights by a copy in bulk for each row, with an empty barrier a stage and a full one for each of its tiles (so that
// the first tile of all is begun, and the last one ended, half a stage sooner), and see to the scales.
// Activations of the next step come by way of shared memory while this one is worked on.
//
// For 9 to 16 tokens the same, with two columns of 8: 64 sums a thread and 32 registers of activations. Twelve warps compute, with 152
// registers, which they have from four that serve, and the ring has 4 stages of 24 KB with one full barrier each.
//
// Sums stay in registers along K; then the warps' are added through shared memory in fixed order. Where activations would weigh as
// much as weights (few tiles a block, long K), two blocks of a cluster split K between them and add their sums over distributed
// shared memory, in fixed order again: results are equal from run to run.
//
// Gated weights (Shazeer 2020, arXiv:2002.05202): w is two of N rows, gate and up one behind the other, and out[m, n] is
// act(gate[m, n]) · up[m, n] with act SiLU or GELU, from fp32 sums. A pair of tiles is 16 rows of gate and the same of up then, so that both
// sums of an output come together where sums are added: no second kernel, and 4·M·N bytes written and read less. For up to 8 tokens.
//
// Programmatic dependent launch: the table is made before the kernel waits for the one ahead of it. Where the caller says that weights are
// settled (nothing on the GPU writes them any more), they are read before it, too.
//
// While the last stages are worked on, and from then to the next launch of this kind, nothing would be read from memory: the warps that serve ask
// the L2 for what that launch reads first, where the caller has said what it will be (`next`).
//
// Shared memory, by address: static; activations of tokens 8 to 15; the first stage of the ring; from 64 K on the pair table, in whose gaps
// those of tokens 0 to 7 lie (a gap has a token's 64 of a block); sums of a round; the other stages.
// Bytes: N·K / 2 + scales + 2·M·K (from the L2) a block and group + 2·M·N.
#if !defined(ELEMENT) || !defined(NESTED) || !defined(TOKENS)
#error "compile with -DELEMENT=Bf16 or F16, -DNESTED=0 or 1, whether all scales are nested, and -DTOKENS=8 or 16"
#endif

#include "gate.cuh"
#include "stream.cuh"

constexpr u32 MOST_PIECES = 8;

struct Piece {
    Weight weight;
    const ELEMENT* bias;  // [N], of a gated weight [2·N], or null
    ELEMENT* out;         // [M, N]
    u32 N;
    u32 first;            // cluster that has its first tiles
};
struct Pieces {
    Piece list[MOST_PIECES];
};

// With two columns of tokens, where pairs of tiles do not fit into a round of sums, weights are never gated.
constexpr bool MAY_GATE = COLUMNS == 1;
static_assert(!MAY_GATE || ROUND == 2);

template <u32 V> struct Constant { static constexpr u32 value = V; };

// Adds the products of a warp's slice of one or two tiles to their sums. Loads of weights and scales come first, and tiles and columns
// alternate, so that there is always something to do while one waits.
template <int TILES>
DEVICE void multiply(float (&sums0)[COLUMNS][4], float (&sums1)[COLUMNS][4], u32 at, u32 scales, const uint4 (&b)[SLICE][COLUMNS][2],
                     const SpacedPairs& pairs) {
    uint2 w[SLICE][TILES][2];
    float2 s[TILES][2];
#pragma unroll
    for (u32 i = 0; i < TILES; ++i) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {  // rows g and g + 8
#pragma unroll
            for (u32 k = 0; k < SLICE; ++k) w[k][i][h] = load_uint2(at + (2 * i + h) * 8 * ROW_BYTES + k * 32);
            s[i][h] = load_float2(scales + (2 * i + h) * 8 * SCALE_FLOATS * 4);
        }
    }
#pragma unroll
    for (u32 k = 0; k < SLICE; ++k) {
        float d[TILES][COLUMNS][4];
        block_product<ELEMENT, TILES, COLUMNS>(d, w[k], b[k], pairs);
#pragma unroll
        for (u32 i = 0; i < TILES; ++i) {
            const float low = k ? s[i][0].y : s[i][0].x, high = k ? s[i][1].y : s[i][1].x;
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c) {
                auto& sum = i ? sums1[c] : sums0[c];
                sum[0] = fmaf(d[i][c][0], low, sum[0]), sum[1] = fmaf(d[i][c][1], low, sum[1]);
                sum[2] = fmaf(d[i][c][2], high, sum[2]), sum[3] = fmaf(d[i][c][3], high, sum[3]);
            }
        }
    }
}

KERNEL __launch_bounds__((MOST_WARPS + SERVING) * WARP, 1)
    matmul_4bit_stream(const ELEMENT* x,     // [M, K], 16-byte aligned
                       u32 M, u32 K,         // M ≤ TOKENS, K % 64 = 0
                       u32 log2_block,       // 6 … 12
                       u32 nested_shift,
                       u64 values0, u64 values1, u64 values2, u64 values3,  // the code's 16 values, 16 bits each
                       float ungain,         // what the sums are multiplied with: 1 / the gain of the values
                       u32 tiles_per_block,  // tiles of 16 rows that a block (a cluster, if K is split) owns; ≤ 8 in a cluster
                       u32 pieces,           // ≤ MOST_PIECES; all their scales are nested or none are
                       u32 gate_of_all,      // a Gate
                       u32 settled,          // whether weights and scales may be read before the launch ahead is done
                       const __grid_constant__ Pieces all,
                       const __grid_constant__ Next next) {
    __shared__ float map[256];
    __shared__ __align__(16) u8 codes[NESTED ? CODE_STAGES * CODE_STAGE_BYTES : 16];
    __shared__ float own_sums[COLUMNS == 1 ? GROUP * SUM_FLOATS : 1];
    __shared__ __align__(8) u64 barriers[(PARTS + 1) * STAGES];
    extern __shared__ __align__(128) u8 dynamic[];
    let_dependents_start();
    const u32 gate = MAY_GATE ? gate_of_all : NOT_GATED;

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 ranks = cluster_size(), rank = cluster_rank(), cluster = blockIdx.x / ranks;
    u32 p = 0;
    while (p + 1 < pieces && all.list[p + 1].first <= cluster) ++p;
    const Piece& piece = all.list[p];
    const Weight& weight = piece.weight;

    Share share;
    share.warps = blockDim.x / WARP - SERVING;
    const u32 N = piece.N;
    share.blocks = K / 64;
    // Parts of K end at every second slice, so that their scales are as aligned as those of whole rows. (As the number of warps is
    // even, that takes no step more.)
    auto part = [&](u32 i) { return min(((share.blocks + SLICE - 1) / SLICE * i / ranks + 1) / 2 * (2 * SLICE), share.blocks); };
    share.first = part(rank);
    share.last = part(rank + 1);
    share.steps = (share.last - share.first + share.warps * SLICE - 1) / (share.warps * SLICE);
    share.first_tile = (cluster - piece.first) * tiles_per_block;
    share.tiles = min(tiles_per_block, (N + 15) / 16 * (gate ? 2 : 1) - share.first_tile);
    share.tile_rows = gate ? HALF / 2 : HALF;
    share.skipped = gate ? N - HALF : 0;
    share.end = min(N, share.row0(share.tiles));
    share.full = shared_address(barriers);
    share.empty = share.full + PARTS * STAGES * 8;
    share.codes = shared_address(codes);
    share.begin = shared_begin(dynamic);
    // Or registers spill that they are made from, again at each use.
    if (COLUMNS == 1 || NESTED) keep(share.begin);
    if (COLUMNS == 2 && NESTED) keep(share.empty);
    const u32 threads = share.warps * WARP;  // that compute
    auto place = [&](u32 at) { return reinterpret_cast<float*>(dynamic + (share.begin + at - shared_address(dynamic))); };
    // A block's part of sums. Of 16 tokens they lie where activations were.
    float* const partial = COLUMNS == 1 ? own_sums : place(MORE_X_AT);

    // Sum i of the block's tiles, [tile][column][lane][4], or of their pairs: [pair][column][lane][4], with what the second tile has there.
    auto put = [&](u32 i, float value, float up) {
        const u32 e = i % TILE_FLOATS, c = i / TILE_FLOATS % COLUMNS;
        const u32 n = share.row0(0) + i / SUM_FLOATS * 16 + e / 16 + e % 4 / 2 * 8, m = c * 8 + e / 4 % 4 * 2 + e % 2;
        if (n >= N || m >= M) return;
        auto whole = [&](float sum, u32 row) { return piece.bias == nullptr ? sum * ungain : sum * ungain + to_float(piece.bias[row]); };
        value = whole(value, n);
        if (gate) value = gated(gate, value, whole(up, N + n));
        piece.out[u64(m) * N + n] = from_float<ELEMENT>(value);
    };
    // Where sum i of pairs has its gate, among sums of tiles; its up is SUM_FLOATS further.
    auto of_pair = [](u32 i) { return i + i / SUM_FLOATS * SUM_FLOATS; };

    if (warp >= share.warps) {
        // What serves is under way before the table is made.
        if (COLUMNS == 2) fewer_registers<GIVEN>();
        const bool rows_of_four = share.blocks % 4 == 0 && share.first % 4 == 0 && log2_block == 6;
        const bool nested = NESTED && rows_of_four && nested_shift >= 5 && reinterpret_cast<u64>(weight.absmax) % 4 == 0;
        const bool whole = !NESTED && rows_of_four && reinterpret_cast<u64>(weight.absmax) % 16 == 0;
        if (warp == share.warps) {
            // Of each warp that expects bytes, and of those who bring scales.
            const u32 arrivals = 2 / PARTS + (nested ? 2 * WARP / PARTS : whole ? WARP : 1);
            if (lane < PARTS * STAGES) barrier_init(share.full + lane * 8, arrivals);
            if (lane < STAGES) barrier_init(share.empty + lane * 8, share.warps);
            barrier_init_fence();
        }
        if (!settled) wait_for_predecessors();
        named_barrier(2, SERVING * WARP);
        named_barrier_arrive(3, blockDim.x);
        const u32 part = warp - share.warps;
        if (part == 0) serve_weights<0>(share, weight, lane);
        else if (part < COPYING) serve_weights<1>(share, weight, lane);
        else if (nested) serve_nested_scales(share, weight, nested_shift, map, part - COPYING, lane);
        else if (part > COPYING) {  // has nothing to do
        } else if (whole) serve_whole_scales(share, weight, lane);
        else {
            if (NESTED)
                for (u32 i = lane; i < 256; i += WARP) map[i] = __ldg(weight.map + i);
            __syncwarp();
            serve_scales(share, weight, log2_block, nested_shift, map, lane);
        }
        // All that this launch reads has been asked for.
        fetch_for_next(next, part, lane);
    } else {
        if (COLUMNS == 2) more_registers<TAKEN>();
        const u32 g = lane / 4, t = lane % 4;
        const SpacedPairs pairs(share.begin, lane);
        const u32 weights_at = g * ROW_BYTES + warp * (SLICE * 32) + t * 8;
        const u32 scales_at = (g * SCALE_FLOATS + warp * SLICE) * 4;
        // Activations: chunks of 16 bytes are swapped in pairs for odd tokens, so that what lanes of two tokens read at a time is in
        // different banks. Rows beyond M are a column's first row again: their sums are not used. Beyond K they are 0.
        const u32 x_ring = share.begin + SpacedPairs::AT + SpacedPairs::GAP_AT + warp * 8 * X_ROW;
        const u32 more_x_ring = share.begin + MORE_X_AT + warp * 8 * MORE_X_ROW;
        const u32 token = g < M ? g : 0, x_at = x_ring + token * X_ROW + t * 32, swap = token % 2 * 16;
        const u32 more_token = 8 + g < M ? g : 0, more_swap = more_token % 2 * 16;
        const u32 more_x_at = more_x_ring + more_token * MORE_X_ROW + t * 32;
        auto copy_activations = [&](u32 step) {
            const u32 block = share.first + (step * share.warps + warp) * SLICE;
            const u32 half = lane / 16, k = lane / 8 % 2, chunk = lane % 8;  // of tokens half, half + 2, …
            const bool valid = block + k < share.last;
            const u32 swapped = (chunk ^ half) * 16;
            if (COLUMNS == 1) {  // few copies: pointers that walk would cost registers here, and time
                for (u32 m = half; m < M; m += 2)
                    copy16(x_ring + m * X_ROW + k * SpacedPairs::ROW + swapped,
                           x + (valid ? u64(m) * K + (block + k) * 64 + chunk * 8 : 0), valid);
            } else {
                const ELEMENT* from = x + (valid ? u64(half) * K + (block + k) * 64 + chunk * 8 : 0);
                const u64 two_rows = valid ? 2 * u64(K) : 0;
                u32 to = x_ring + half * X_ROW + k * SpacedPairs::ROW + swapped;
                u32 more_to = more_x_ring + half * MORE_X_ROW + k * 128 + swapped;
                keep(to), keep(more_to);  // or they are computed again for every copy
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    if (2 * i + half < M) copy16(i < 4 ? to + i * (2 * X_ROW) : more_to + (i - 4) * (2 * MORE_X_ROW), from, valid);
                    from += two_rows;
                }
            }
            commit();
        };
        pairs.fill(Values{{values0, values1, values2, values3}}, threads);
        wait_for_predecessors();
        copy_activations(0);
        named_barrier(3, blockDim.x);
        Turn turn;
        for (u32 group = 0; group < share.tiles; group += GROUP) {
            const u32 tiles = min(GROUP, share.tiles - group);
            float sums[GROUP][COLUMNS][4];
#pragma unroll
            for (int a = 0; a < GROUP; ++a)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) sums[a][c][0] = sums[a][c][1] = sums[a][c][2] = sums[a][c][3] = 0.f;
            for (u32 step = 0; step < share.steps; ++step) {
                const u32 block = share.first + (step * share.warps + warp) * SLICE;
                uint4 b[SLICE][COLUMNS][2];
                wait_for_copies<0>();
                __syncwarp();
#pragma unroll
                for (u32 k = 0; k < SLICE; ++k) {
                    const u32 from = x_at + k * SpacedPairs::ROW, more = more_x_at + k * 128;
                    b[k][0][0] = load_uint4(from + swap), b[k][0][1] = load_uint4(from + (16 ^ swap));
                    constexpr u32 LAST = COLUMNS - 1;
                    if (LAST) b[k][LAST][0] = load_uint4(more + more_swap), b[k][LAST][1] = load_uint4(more + (16 ^ more_swap));
                }
                __syncwarp();
                const bool last = step + 1 == share.steps;
                if (!last || group + GROUP < share.tiles) copy_activations(last ? 0 : step + 1);
                auto landed = [&](u32 tile) { barrier_wait(share.landed(turn.stage, tile), turn.parity); };
                auto stage = [&](auto work) {
                    landed(0);
                    const bool mine = block < share.last;  // or this warp only waits
                    if (PARTS == 2 || mine) {
                        const u32 at = share.stage(turn.stage);
                        work(mine, at + weights_at, at + ROWS * ROW_BYTES + scales_at);
                    }
                    __syncwarp();
                    if (lane == 0) barrier_arrive(share.empty + turn.stage * 8);
                    turn.next();
                };
#pragma unroll
                for (int a = 0; a < GROUP; a += 2)
                    if (a + 1 < tiles)
                        stage([&](bool mine, u32 at, u32 scales) {
                            if (PARTS == 1) return multiply<2>(sums[a], sums[a + 1], at, scales, b, pairs);
                            if (mine) multiply<1>(sums[a], sums[a], at, scales, b, pairs);
                            landed(1);
                            if (mine) multiply<1>(sums[a + 1], sums[a + 1], at + 16 * ROW_BYTES, scales + 16 * SCALE_FLOATS * 4, b, pairs);
                        });
                // An odd last tile has its sums at GROUP - 1. (Nothing lands for the second then, but its barrier takes its turn.)
                if (tiles % 2)
                    stage([&](bool mine, u32 at, u32 scales) {
                        if (PARTS == 1 || mine) multiply<1>(sums[GROUP - 1], sums[GROUP - 1], at, scales, b, pairs);
                        if (PARTS == 2) landed(1);
                    });
            }

            // Sums of the warps, in order: COUNT tiles from tile `from` of the group on, by way of shared memory at `at`.
            auto add_up = [&](auto constant, u32 from, float* at) {
                constexpr u32 COUNT = decltype(constant)::value;
                named_barrier(1, threads);  // nobody reads what was there
#pragma unroll
                for (u32 a = 0; a < GROUP; ++a) {
                    const u32 tile = a == GROUP - 1 && tiles % 2 ? tiles - 1 : a < (tiles & ~1u) ? a : GROUP;
                    if (tile - from < COUNT && tile < tiles)
#pragma unroll
                        for (u32 c = 0; c < COLUMNS; ++c)
                            *reinterpret_cast<float4*>(at + (warp * COUNT + tile - from) * SUM_FLOATS + c * TILE_FLOATS + lane * 4) =
                                make_float4(sums[a][c][0], sums[a][c][1], sums[a][c][2], sums[a][c][3]);
                }
                named_barrier(1, threads);
                auto total = [&](u32 i) {
                    float sum = 0.f;
#pragma unroll 4
                    for (u32 w = 0; w < share.warps; ++w) sum += at[w * (COUNT * SUM_FLOATS) + i];
                    return sum;
                };
                const u32 count = min(COUNT, tiles - from) * SUM_FLOATS;
                if (ranks > 1 || !gate)
                    for (u32 i = threadIdx.x; i < count; i += threads) {
                        const float sum = total(i);
                        if (ranks == 1) put((group + from) * SUM_FLOATS + i, sum, 0.f);
                        else partial[from * SUM_FLOATS + i] = sum;
                    }
                else
                    for (u32 i = threadIdx.x; i < count / 2; i += threads)
                        put((group + from) / 2 * SUM_FLOATS + i, total(of_pair(i)), total(of_pair(i) + SUM_FLOATS));
            };
            // The last group has the ring to itself.
            static_assert(END_AT - SUMS_AT >= MOST_WARPS * GROUP * SUM_FLOATS * 4);
            if (group + GROUP >= share.tiles) add_up(Constant<GROUP>(), 0, place(SUMS_AT));
            else
                for (u32 from = 0; from < tiles; from += ROUND) add_up(Constant<ROUND>(), from, place(SUMS_AT));
        }
    }
    if (ranks > 1) {
        // One group only. Everybody meets, so that all sums are there and nobody leaves while others read its own.
        __syncthreads();
        cluster_arrive(), cluster_wait();
        auto total = [&](u32 i) {
            float sum = 0.f;
            for (u32 from = 0; from < ranks; ++from) sum += load_cluster_float(map_to_block(shared_address(partial + i), from));
            return sum;
        };
        for (u32 i = rank * blockDim.x + threadIdx.x; i < share.tiles * SUM_FLOATS / (gate ? 2 : 1); i += ranks * blockDim.x) {
            const u32 at = gate ? of_pair(i) : i;
            put(i, total(at), gate ? total(at + SUM_FLOATS) : 0.f);
        }
        __syncthreads();
        cluster_arrive(), cluster_wait();
    }
}
