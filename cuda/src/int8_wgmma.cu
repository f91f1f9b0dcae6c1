// out[m, n] = Σ_k q[m, k] · w[n, k], exact, times the scales of row m and of weight n, plus what outliers add and the bias: int8
// on Hopper's tensor cores.
//
//   q int8 [M, K], w int8 [N, K], both at multiples of 16 bytes and K % 16 = 0; out [M, N]; for I32 the sums themselves
//
// Weights are the A operand (64 rows a warpgroup), tokens the B operand (TOKENS columns), so that few tokens cost little and the
// sums of out's row m are spread over a warp's lanes. A block has tiles of `rows` ≤ 128 weights × TOKENS tokens, one after another:
//
//   a warp        fills a ring of stages by the tensor memory accelerator: rows × 128 bytes of w, TOKENS × 128 bytes of q
//   three warps   gather outliers, if there are any (int8_tiles.cuh)
//   1 or 2 groups multiply: 64 weights × TOKENS tokens each, sums in registers
//
// Where more than `most` columns have outliers, x itself is multiplied instead of its codes: to gather so many would take longer than a
// product of 16 bits does, and no activation is rounded then. Stages of the same ring are rows × 128 bytes of w and twice TOKENS × 64
// elements of x; bytes of w become 16-bit numbers, exactly, in the registers that are the A operand.
//
// Where tiles are fewer than multiprocessors, the blocks of a cluster share one along K: sums of a tile's other blocks are added by the
// first, in order, over distributed shared memory (pairs, or fours, of blocks; a cluster has one tile).
//
// Programmatic dependent launch: barriers and tensor maps are ready when the kernel ahead ends. (To fetch weights into the L2 by then
// makes everything slower: they come at the cost of what that kernel still reads.)
//
// Bytes: N·K + M·K (a tile's from the L2 for each tile beside it) + out.
#include "int8_tiles.cuh"
#include "pairs.cuh"
#include "wgmma.cuh"

constexpr u32 PART = TOKENS < 64 ? TOKENS : 64;  // tokens whose results go through shared memory at a time

// Shared memory behind the ring: entries, results of a group, then scales of the tokens for each group and the window. In a cluster,
// sums of a group's threads: [TOKENS / 2][128].
constexpr u32 RESULTS = PART * 128;
constexpr bool SPLIT = TOKENS <= 64;  // whether there are clusters: of more tokens there are more sums than time is won

// What this block has of the work along K, and of the outliers' chunks.
struct Share { u32 rank, ranks, begin, steps; };

struct Problem {
    const float* row_stats;     // [M]
    const float* column_stats;  // [N]
    const Float* bias;          // [N] or null
    ELEMENT* out;               // [M, N]
    const Float* x;             // [M, K]
    const u8* q;                // [M, K]
    const u8* w;                // [N, K]
    const u32* outliers;        // [K / 32] or null
    const u32* marked;          // how many there are, or null
    u32 M, N, K;
    u32 rows;                   // weights of a tile, a multiple of 8
    u32 stages;
    u32 group;                  // tiles of tokens that are gone through for each tile of weights
    u32 most;                   // outlier columns that are gathered
};

struct Tile { u32 weights, tokens; };  // where it begins

struct Tiles {
    u32 across, down, group, rows;
    DEVICE explicit Tiles(const Problem& p) : group(p.group), rows(p.rows) {
        across = (p.N + rows - 1) / rows;
        down = (p.M + TOKENS - 1) / TOKENS;
    }
    DEVICE u32 count() const { return across * down; }
    DEVICE Tile get(u32 i) const {
        const u32 first = i / (group * across) * group, inner = i % (group * across), width = min(group, down - first);
        return {inner / width * rows, (first + inner % width) * TOKENS};
    }
};

// Writes a warpgroup's tile of 16-bit results: through shared memory at `at`, so that a token's 64 weights are written together.
template <class T>
DEVICE void write(const Problem& p, T* out, const float (&f)[TOKENS / 2], Tile tile, u32 end, u32 group, u32 thread, u8* at) {
    const u32 lane = thread % WARP, warp = thread / WARP, base = shared_address(at);
    const bool wide = p.N % 8 == 0 && reinterpret_cast<u64>(out) % 16 == 0;
#pragma unroll
    for (u32 part = 0; part < TOKENS; part += PART) {
        if (part > 0) named_barrier(1 + group, 128);
#pragma unroll
        for (u32 j = 0; j < PART / 8; j += 2) {
            const u32 token = (j + lane / 16) * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
            const float* v = f + (part / 8 + j) * 4;
            store_transposed(base + token * 128 + (chunk ^ token % 8) * 16, Pack<T>::two(v[0], v[1]), Pack<T>::two(v[2], v[3]),
                             Pack<T>::two(v[4], v[5]), Pack<T>::two(v[6], v[7]));
        }
        named_barrier(1 + group, 128);
#pragma unroll
        for (u32 i = 0; i < PART * 8; i += 128) {
            const u32 token = (i + thread) / 8, chunk = (i + thread) % 8, m = tile.tokens + part + token;
            const u32 n = tile.weights + group * 64 + chunk * 8;
            if ((PART * 8 >= 128 || thread < PART * 8) && m < p.M && n < end) {
                const uint4 eight = *reinterpret_cast<const uint4*>(at + token * 128 + (chunk ^ token % 8) * 16);
                T* to = out + u64(m) * p.N + n;
                if (wide && n + 8 <= end) {
                    *reinterpret_cast<uint4*>(to) = eight;
                } else {
                    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                    for (u32 e = 0; e < 8; ++e)
                        if (n + e < end) to[e] = T{u16(words[e / 2] >> e % 2 * 16)};
                }
            }
        }
    }
}

// 32-bit results: eight lanes have neighbouring weights of a token, which fill a sector.
template <class T, class V>
DEVICE void write_wide(const Problem& p, T* out, const V (&v)[TOKENS / 2], Tile tile, u32 end, u32 row, u32 t) {
#pragma unroll
    for (u32 j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            const u32 m = tile.tokens + j * 8 + 2 * t + e % 2, n = tile.weights + row + e / 2 * 8;
            if (m < p.M && n < end) out[u64(m) * p.N + n] = T{v[4 * j + e]};
        }
    }
}

// The entries of all tiles of a block, by HELPERS threads; o_full and the barriers behind it: o_empty, listed.
DEVICE void serve_outliers(const Problem& p, const Tiles& tiles, const Share& share, u32 first, u32 stride, u32* list,
                           u32& outlier_count, u8* to_w, u8* to_x, u32 o_full, u32 thread) {
    u32 window = 0;
    auto relist = [&] {
        named_barrier(5, HELPERS);
        if (thread < WARP) {
            const u32 count = list_columns(p.outliers, p.K, window, list, thread);
            if (thread == 0) outlier_count = count;
        }
        named_barrier(5, HELPERS);
    };
    relist();
    if (thread == 0) barrier_arrive(o_full + 16);
    const u32 count = outlier_count;
    u32 parity = 0;
    for (u32 i = first; i < tiles.count(); i += stride) {
        const Tile tile = tiles.get(i);
        const u32 tokens = min(TOKENS, p.M - tile.tokens), weights = min(p.rows, p.N - tile.weights);
        auto left = [&](u32 token, u32 k) {
            const u64 at = u64(tile.tokens + token) * p.K + k;
            return residual(to_float(p.x[at]), byte_value(p.q[at], 0), p.row_stats[tile.tokens + token]);
        };
        for (u32 c = share.rank * ENTRIES; c < count; c += share.ranks * ENTRIES) {
            if (c < window || min(c + ENTRIES, count) > window + WINDOW) window = c, relist();
            barrier_wait(o_full + 8, parity ^ 1);
            parity ^= 1;
            gather(list + (c - window), min(ENTRIES, count - c), p.w + u64(tile.weights) * p.K, p.K, weights, tokens, left, to_w, to_x, thread);
            fence_for_async();
            barrier_arrive(o_full);
        }
    }
}

// --- clusters --------------------------------------------------------------------------------------------------------------

DEVICE u32 sum_bits(float x) { return as_bits(x); }
DEVICE u32 sum_bits(i32 x) { return u32(x); }
DEVICE void add_bits(float& x, float other) { x += other; }
DEVICE void add_bits(i32& x, float other) { x += i32(as_bits(other)); }

// Adds the sums of a cluster's blocks. False for those that are not the first: their sums are the first's now. All threads of the
// cluster meet here once, and at the kernel's end, until which these sums are read.
template <class V> DEVICE bool add_shares(V (&sums)[TOKENS / 2], const Share& share, float* their_sums, u32 group, u32 thread) {
    float* const mine = their_sums + group * (TOKENS / 2 * 128) + thread;
    if (share.rank > 0) {
#pragma unroll
        for (u32 j = 0; j < TOKENS / 2; ++j) mine[j * 128] = as_float(sum_bits(sums[j]));
    }
    cluster_arrive(), cluster_wait();
    if (share.rank > 0) return false;
#pragma unroll 1
    for (u32 from = 1; from < share.ranks; ++from) {
        const u32 at = map_to_block(shared_address(mine), from);
#pragma unroll
        for (u32 j = 0; j < TOKENS / 2; ++j) add_bits(sums[j], load_cluster_float(at + j * 512));
    }
    return true;
}

// --- x itself --------------------------------------------------------------------------------------------------------------

// Bytes of a stage, and how many the ring has.
DEVICE u32 dense_stage(const Problem& p) { return p.rows * ROW + 2 * TOKENS * 128; }
DEVICE u32 dense_stages(const Problem& p) { return p.stages * (p.rows + TOKENS) * ROW / dense_stage(p); }

// Fills the ring, for all tiles of a block, by one thread: w beside q, or (DENSE) beside x. A step has few cycles where tiles are
// small, so that each has a loop of its own.
template <bool DENSE>
DEVICE void serve_tiles(const Problem& p, const Tiles& tiles, const Share& share, u32 first, u32 stride, const TensorMap& w_map,
                        const TensorMap& left_map, u32 ring, u32 full, u32 empty) {
    const u32 bytes = DENSE ? dense_stage(p) : (p.rows + TOKENS) * ROW, stages = DENSE ? dense_stages(p) : p.stages;
    Turn turn;
    for (u32 i = first; i < tiles.count(); i += stride) {
        const Tile tile = tiles.get(i);
#pragma unroll 1
        for (u32 k = share.begin; k < share.begin + share.steps; ++k) {
            barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
            const u32 barrier = full + turn.stage * 8, at = ring + turn.stage * bytes;
            barrier_expect(barrier, bytes);
            copy_box(at, w_map, barrier, k * ROW, tile.weights);
            copy_box(at + p.rows * ROW, left_map, barrier, k * ROW, tile.tokens);
            if (DENSE) copy_box(at + p.rows * ROW + TOKENS * 128, left_map, barrier, k * ROW + 64, tile.tokens);
            turn.next(stages);
        }
    }
}

// Two signed bytes as the 16-bit numbers of an MMA, the lower first. Numbers of 2^10 (fp16) or 2^7 (bf16) on hold integers exactly: with
// the sign turned a byte is 128 more than its value, which fp16 has room for; bf16 for seven bits, so that the eighth is in what is
// subtracted.
template <class T> DEVICE u32 two_weights(u32 bytes);
template <> DEVICE u32 two_weights<F16>(u32 bytes) {
    return difference<F16>((__byte_perm(bytes, 0, 0x4140) ^ 0x00800080) | 0x64006400, 0x64806480);
}
template <> DEVICE u32 two_weights<Bf16>(u32 bytes) {
    const u32 apart = __byte_perm(bytes, 0, 0x4140);
    return difference<Bf16>((apart & 0x007f007f) | 0x43004300, (apart & 0x00800080) | 0x43004300);
}

// Sums of a tile; `row` is this lane's first, whose number and g are the same modulo 8. A half of a stage is decoded while the MMAs of
// the one before are under way.
DEVICE void multiply_dense(float (&sums)[TOKENS / 2], const Problem& p, u32 ring, u32 full, u32 empty, Turn& turn, u32 steps, u32 row, u32 lane) {
    const u32 g = lane / 4, t = lane % 4, bytes = dense_stage(p), stages = dense_stages(p);
#pragma unroll
    for (u32 j = 0; j < TOKENS / 2; ++j) sums[j] = 0.f;
    u32 a[2][4][4], before = 0;
#pragma unroll 1
    for (u32 k = 0; k < steps; ++k) {
        barrier_wait(full + turn.stage * 8, turn.parity);
        const u32 at = ring + turn.stage * bytes;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 from = at + row * ROW + (half * 4 + j ^ g) * 16 + 2 * t;
#pragma unroll
                for (u32 i = 0; i < 4; ++i) a[half][j][i] = two_weights<Half>(load_two_bytes(from + i % 2 * (8 * ROW) + i / 2 * 8));
            }
            const u64 right = swizzled_operand(at + p.rows * ROW + half * (TOKENS * 128));
            mma_fence();
#pragma unroll
            for (u32 j = 0; j < 4; ++j) Wgmma<Half, TOKENS>::add(sums, a[half][j], right + 2 * j, false);
            mma_commit();
            mma_wait<1>();
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) keep(a[half ^ 1][j][i]);
            if (half == 0 && k > 0 && lane == 0) barrier_arrive(empty + before * 8);
        }
        before = turn.stage;
        turn.next(stages);
    }
    mma_wait<0>();
    pin(sums);
    if (lane == 0) barrier_arrive(empty + before * 8);
}

// -----------------------------------------------------------------------------------------------------------------------------

KERNEL __launch_bounds__(384, 1)
    matmul_int8(const __grid_constant__ TensorMap w_map,  // boxes of `rows` × 128
                const __grid_constant__ TensorMap q_map,  // boxes of TOKENS × 128
                const __grid_constant__ TensorMap x_map,  // boxes of TOKENS × 64 elements, where there can be outliers
                const float* row_stats, const float* column_stats, const Float* bias, ELEMENT* out, const Float* x, const u8* q,
                const u8* w, const u32* outliers, const u32* marked, u32 M, u32 N, u32 K, u32 rows, u32 ring_stages, u32 group_tiles,
                u32 most) {  // outlier columns that are gathered; with more, x itself is multiplied, if it is known how many there are
    const Problem p = {row_stats, column_stats, bias, out, x, q, w, outliers, marked, M, N, K, rows, ring_stages, group_tiles, most};
    extern __shared__ u8 dynamic[];
    __shared__ __align__(8) u64 barriers[2 * MOST_STAGES + 3];
    __shared__ u32 outlier_count;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, groups = blockDim.x / 128 - 1;
    const u32 full = shared_address(barriers), empty = full + MOST_STAGES * 8, o_full = empty + MOST_STAGES * 8;
    const u32 o_empty = o_full + 8, listed = o_full + 16;
    u8* const ring = dynamic + (0u - shared_address(dynamic) & 1023);
    const u32 stage_bytes = (p.rows + TOKENS) * ROW, all_steps = (p.K + ROW - 1) / ROW;
    u8* const outliers_w = ring + p.stages * stage_bytes;
    u8* const outliers_x = outliers_w + OUTLIERS_W;
    u8* const results = outliers_x + OUTLIERS_X;
    float* const scales = reinterpret_cast<float*>(results + 2 * RESULTS);
    u32* const list = reinterpret_cast<u32*>(scales + 2 * TOKENS);
    float* const their_sums = reinterpret_cast<float*>(list + WINDOW);
    const Tiles tiles(p);
    Share share = {0, 1, 0, all_steps};
    if constexpr (SPLIT) {
        share.rank = cluster_rank(), share.ranks = cluster_size();
        share.begin = all_steps * share.rank / share.ranks, share.steps = all_steps * (share.rank + 1) / share.ranks - share.begin;
    }
    const u32 first = blockIdx.x / share.ranks, stride = gridDim.x / share.ranks, steps = share.steps;

    let_dependents_start();
    if (warp == 0) {
        if (lane < p.stages) barrier_init(full + lane * 8, 1), barrier_init(empty + lane * 8, groups * 4);
        if (lane == 0) barrier_init(o_full, HELPERS), barrier_init(o_empty, groups * 4), barrier_init(listed, 1);
        barrier_init_fence();
    }
    if (threadIdx.x == groups * 128) prefetch_map(w_map), prefetch_map(q_map);
    wait_for_predecessors();
    bool dense = false, gathers = Types<ELEMENT>::OUTLIERS && p.outliers != nullptr;
    if (gathers && p.marked != nullptr) {
        const u32 columns = *static_cast<const volatile u32*>(p.marked);
        dense = columns > p.most, gathers = !dense && columns > 0;
    }
    __syncthreads();

    if (warp >= groups * 4) {
        if constexpr (TOKENS == 256) fewer_registers<72>();
        if (warp == groups * 4) {
            if (lane == 0) {
                if (dense) serve_tiles<true>(p, tiles, share, first, stride, w_map, x_map, shared_address(ring), full, empty);
                else serve_tiles<false>(p, tiles, share, first, stride, w_map, q_map, shared_address(ring), full, empty);
            }
        } else if (gathers) {
            serve_outliers(p, tiles, share, first, stride, list, outlier_count, outliers_w, outliers_x, o_full,
                           threadIdx.x - groups * 128 - WARP);
        }
        if (share.ranks > 1) cluster_arrive(), cluster_wait();
    } else {
        if constexpr (TOKENS == 256) more_registers<216>();
        const u32 group = warp / 4, thread = threadIdx.x % 128, g = lane / 4, t = lane % 4;
        const u32 a_at = shared_address(ring) + group * 64 * ROW, b_at = shared_address(ring) + p.rows * ROW;
        const u32 row = group * 64 + warp % 4 * 16 + g;
        float* const my_scales = scales + group * TOKENS;
        u32 count = 0, o_turn = 0;
        bool asked = !gathers;
        Turn turn;
        for (u32 i = first; i < tiles.count(); i += stride) {
            const Tile tile = tiles.get(i);
            if constexpr (SCALED) {
                named_barrier(1 + group, 128);  // the tile before this one has been written
                for (u32 j = thread; j < TOKENS; j += 128)
                    my_scales[j] = tile.tokens + j < p.M ? p.row_stats[tile.tokens + j] * (1.f / 127.f) : 0.f;
            }
            const u32 end = min(p.N, tile.weights + p.rows);
            float f[TOKENS / 2];
            if (dense) {
                multiply_dense(f, p, shared_address(ring), full, empty, turn, steps, row, lane);
            } else {
                i32 sums[TOKENS / 2];
#pragma unroll
                for (u32 j = 0; j < TOKENS / 2; ++j) sums[j] = 0;
                u32 before = 0;
#pragma unroll 1
                for (u32 k = 0; k < steps; ++k) {
                    barrier_wait(full + turn.stage * 8, turn.parity);
                    const u64 a = swizzled_operand(a_at + turn.stage * stage_bytes), b = swizzled_operand(b_at + turn.stage * stage_bytes);
                    mma_fence();
#pragma unroll
                    for (u32 j = 0; j < ROW / 32; ++j) mma_s8<TOKENS>(sums, a + 2 * j, b + 2 * j);
                    mma_commit();
                    mma_wait<1>();
                    if (k > 0 && lane == 0) barrier_arrive(empty + before * 8);
                    before = turn.stage;
                    turn.next(p.stages);
                }
                mma_wait<0>();
                pin(sums);
                if (lane == 0) barrier_arrive(empty + before * 8);
                if constexpr (!SCALED) {
                    if constexpr (SPLIT)
                        if (share.ranks > 1 && !add_shares(sums, share, their_sums, group, thread)) continue;
                    write_wide(p, p.out, sums, tile, end, row, t);
                    continue;
                }
                named_barrier(1 + group, 128);
#pragma unroll
                for (u32 j = 0; j < TOKENS / 8; ++j) {
                    const float2 s = *reinterpret_cast<const float2*>(my_scales + j * 8 + 2 * t);
                    f[4 * j] = float(sums[4 * j]) * s.x, f[4 * j + 1] = float(sums[4 * j + 1]) * s.y;
                    f[4 * j + 2] = float(sums[4 * j + 2]) * s.x, f[4 * j + 3] = float(sums[4 * j + 3]) * s.y;
                }
            }
            if constexpr (SCALED) {
                if (!asked) {
                    barrier_wait(listed, 0);
                    count = *static_cast<volatile u32*>(&outlier_count);
                    asked = true;
                }
                for (u32 c = share.rank * ENTRIES; c < count; c += share.ranks * ENTRIES) {
                    barrier_wait(o_full, o_turn);
                    o_turn ^= 1;
                    add_outliers(f, shared_address(outliers_w), shared_address(outliers_x), group);
                    if (lane == 0) barrier_arrive(o_empty);
                }
                if constexpr (SPLIT)
                    if (share.ranks > 1 && !add_shares(f, share, their_sums, group, thread)) continue;
                const u32 n = tile.weights + row;
                float s[2], b[2];
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    const bool valid = n + h * 8 < end;
                    s[h] = valid ? p.column_stats[n + h * 8] * (1.f / 127.f) : 0.f;
                    b[h] = valid && p.bias != nullptr ? to_float(p.bias[n + h * 8]) : 0.f;
                }
#pragma unroll
                for (u32 j = 0; j < TOKENS / 2; ++j) f[j] = fmaf(f[j], s[j / 2 % 2], b[j / 2 % 2]);
                if constexpr (sizeof(ELEMENT) == 2) write(p, p.out, f, tile, end, group, thread, results + group * RESULTS);
                else write_wide(p, p.out, f, tile, end, row, t);
            }
        }
    }
    if (share.ranks > 1) cluster_arrive(), cluster_wait();
}
