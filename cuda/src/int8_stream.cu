// A whole 8-bit layer for a few rows in one launch, the weights as one stream: rows of x are quantized by every block for itself.
//
//   x [M, K], M ≤ 8, w int8 [N, K], column_stats [N], out [M, N]; K % 16 = 0, x and w at multiples of 16 bytes. From sm_90 on.
//
// A block owns `tiles` tiles of 16 weights, and goes through each along K in stages of 16 × 1024 bytes, so that memory is read row by
// row. A warp fills the ring of stages by the tensor memory accelerator; 8 warps multiply, each its 128 bytes of K of a stage by
// mma.m16n8k32 with the weights as the A operand. Sums of the warps are integers, so that they can be added in shared memory in any
// order. Where tiles are few, the two blocks of a cluster have the same tiles and a half of K each.
//
// Before that, while the ring fills, the 8 warps find the largest magnitudes of x's rows and put its codes into shared memory
// (every block all of them; M · K elements from the L2 weigh little beside its weights). Outliers (int8.cuh): columns that have one are
// marked in a bitmap; three more warps list them and gather w's bytes and what x has left, WINDOW at a time, which the last step adds
// in fp32.
//
// Programmatic dependent launch, as in int8_wgmma.cu. Where the weights of a block are few, two blocks fit on a multiprocessor: the
// next launch's are there when this one ends.
//
// Bytes: N·K + 2·M·K (from the L2) a block + out.
#include "int8.cuh"
#include "warpgroup.cuh"

#if !defined(ELEMENT)
#error "compile with -DELEMENT=Bf16, F16 or F32"
#endif

constexpr u32 WARPS = 8, THREADS = WARPS * WARP;  // that multiply
constexpr u32 HELPERS = 96, ALL_THREADS = THREADS + WARP + HELPERS;
constexpr u32 TILE = 16, BLOCK_BYTES = TILE * 128, BLOCKS = 8, STAGE = BLOCKS * BLOCK_BYTES;
constexpr u32 MOST_STAGES = 16, MOST_TOKENS = 8, OUTLIERS = 64;

constexpr u32 BATCH = sizeof(ELEMENT) == 2 ? 8 : 4;  // rows whose loads are under way together

struct Turn {
    u32 stage = 0, parity = 0;
    DEVICE void next(u32 stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

DEVICE void load_matrices(u32 (&a)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(at)
                 : "memory");
}

struct Layer {
    const ELEMENT* x;
    const u8* w;
    const float* column_stats;
    const ELEMENT* bias;  // or null
    ELEMENT* out;
    u32 M, N, K;
    float threshold;      // NaN for none
};

// Shared memory of a block beside its ring.
struct Room {
    u32* maxima;      // [MOST_TOKENS], bits of fp32
    u32* bitmap;      // [K / 32]
    u32* list;        // [WINDOW], of which OUTLIERS are used at a time
    float* left;      // [OUTLIERS][MOST_TOKENS]: what x has left
    u8* weights;      // [OUTLIERS][rows]
    i32* sums;        // [M][rows]
    u8* codes;        // [M][pitch]: of this block's part of K
    u32 rows, pitch, part;  // part: where its K begins
};

// The largest magnitudes, and the bitmap.
DEVICE void find_maxima(const Layer& p, const Room& room, u32 thread) {
    const bool marks = p.threshold == p.threshold;
    for (u32 m0 = 0; m0 < p.M; m0 += BATCH) {
        u32 largest[BATCH] = {};
        for (u32 k = thread * 8; k < p.K; k += THREADS * 8) {
            Eight<ELEMENT> v[BATCH];
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i)
                if (m0 + i < p.M) load_written(v[i], p.x + u64(m0 + i) * p.K + k);
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
                if (m0 + i >= p.M) break;
                if (!marks) {
                    const Eight<ELEMENT> one[1] = {v[i]};
                    largest[i] = max(largest[i], magnitude<ELEMENT, 1>(one));
                    continue;
                }
                u32 marked = 0;
#pragma unroll
                for (u32 j = 0; j < 8; ++j) {
                    const float e = v[i].get(j);
                    const bool out = is_outlier(e, p.threshold);
                    marked |= out ? 1u << j : 0u;
                    largest[i] = max(largest[i], out ? 0u : magnitude(e));
                }
                if (marked != 0) atomicOr(room.bitmap + k / 32, marked << k % 32);
            }
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            u32 most;
            asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(largest[i]));
            if (thread % WARP == 0 && m0 + i < p.M) atomicMax(room.maxima + m0 + i, most);
        }
    }
}

// Codes of columns [part, end). Loads of several rows come first, so that they do not wait for each other.
DEVICE void quantize(const Layer& p, const Room& room, u32 end, u32 thread) {
    const u32 vectors = (end - room.part) / 8;
    for (u32 m0 = 0; m0 < p.M; m0 += BATCH)
        for (u32 i = thread; i < vectors; i += THREADS) {
            Eight<ELEMENT> v[BATCH];
#pragma unroll
            for (u32 j = 0; j < BATCH; ++j)
                if (m0 + j < p.M) load_written(v[j], p.x + u64(m0 + j) * p.K + room.part + i * 8);
#pragma unroll
            for (u32 j = 0; j < BATCH; ++j) {
                if (m0 + j >= p.M) break;
                const RowScale scale(as_float(room.maxima[m0 + j]));
                auto code = [&](int e) { return scale.quantize(is_outlier(v[j].get(e), p.threshold) ? 0.f : v[j].get(e)); };
                uint2 packed =
                    make_uint2(pack_bytes(code(0), code(1), code(2), code(3)), pack_bytes(code(4), code(5), code(6), code(7)));
                if (scale.empty()) packed = make_uint2(0, 0);
                *reinterpret_cast<uint2*>(room.codes + (m0 + j) * room.pitch + i * 8) = packed;
            }
        }
}

// Outlier columns [skip, skip + OUTLIERS) of `count`, by `threads` threads.
DEVICE void gather(const Layer& p, const Room& room, u32 n0, u32 skip, u32 count, u32 thread, u32 threads) {
    const u32 columns = min(OUTLIERS, count - skip), rows = min(room.rows, p.N - n0);
    // All threads have as many bytes, and many are under way: each is a sector of its own.
#pragma unroll 8
    for (u32 i = thread; i < rows * columns; i += threads) {
        const u32 row = i / columns, c = i - row * columns;
        room.weights[c * room.rows + row] = p.w[u64(n0 + row) * p.K + room.list[skip % WINDOW + c]];
    }
    for (u32 i = thread; i < columns * p.M; i += threads) {
        const u32 c = i / p.M, m = i % p.M;
        const float x = to_float(p.x[u64(m) * p.K + room.list[skip % WINDOW + c]]), s = as_float(room.maxima[m]);
        const RowScale scale(s);
        const float q = scale.empty() || is_outlier(x, p.threshold) ? 0.f : byte_value(scale.quantize(x), 0);
        room.left[c * MOST_TOKENS + m] = residual(x, q, s);
    }
}

DEVICE void stream(const TensorMap& w_map, const Layer& p, u32 tiles, u32 stages) {
    extern __shared__ u8 dynamic[];
    __shared__ __align__(8) u64 barriers[2 * MOST_STAGES];
    __shared__ u32 maxima[MOST_TOKENS];
    __shared__ u32 list[WINDOW];
    __shared__ __align__(16) float left[OUTLIERS * MOST_TOKENS];
    __shared__ u32 outlier_count;
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u32 ranks = cluster_size(), rank = cluster_rank(), n0 = blockIdx.x / ranks * tiles * TILE;
    const u32 full = shared_address(barriers), empty = full + MOST_STAGES * 8;
    const u32 blocks = (p.K + 127) / 128, first = blocks * rank / ranks, last = blocks * (rank + 1) / ranks;
    const u32 steps = (last - first + BLOCKS - 1) / BLOCKS;
    const bool marks = p.threshold == p.threshold;
    u8* const ring = dynamic + (0u - shared_address(dynamic) & 1023);
    Room room;
    room.rows = tiles * TILE;
    // That of the longer part: both blocks of a cluster lay out their memory alike.
    room.pitch = ((blocks + ranks - 1) / ranks + BLOCKS - 1) / BLOCKS * (BLOCKS * 128) + 16;
    room.part = first * 128;
    room.maxima = maxima;
    room.list = list;
    room.left = left;
    room.codes = ring + stages * STAGE;
    room.sums = reinterpret_cast<i32*>(room.codes + p.M * room.pitch);
    room.bitmap = reinterpret_cast<u32*>(room.sums + p.M * room.rows);
    room.weights = reinterpret_cast<u8*>(room.bitmap + (p.K + 31) / 32);

    let_dependents_start();
    if (warp == WARPS) {
        if (lane < stages) barrier_init(full + lane * 8, 1), barrier_init(empty + lane * 8, WARPS);
        barrier_init_fence();
        if (lane == 0) prefetch_map(w_map);
    } else {
        const u32 others = warp < WARPS ? thread : thread - WARP;
        if (others < MOST_TOKENS) maxima[others] = 0;
        for (u32 i = others; i < p.M * room.rows; i += ALL_THREADS - WARP) room.sums[i] = 0;
        if (marks)
            for (u32 i = others; i < (p.K + 31) / 32; i += ALL_THREADS - WARP) room.bitmap[i] = 0;
    }
    wait_for_predecessors();
    __syncthreads();

    if (warp == WARPS) {
        if (lane == 0) {
            const u32 to = shared_address(ring);
            Turn turn;
#pragma unroll 1
            for (u32 tile = 0; tile < tiles; ++tile)
#pragma unroll 1
                for (u32 block = first; block < last; block += BLOCKS) {
                    const u32 count = min(BLOCKS, last - block), barrier = full + turn.stage * 8;
                    barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
                    barrier_expect(barrier, count * BLOCK_BYTES);
                    for (u32 i = 0; i < count; ++i)
                        copy_box(to + turn.stage * STAGE + i * BLOCK_BYTES, w_map, barrier, (block + i) * 128, n0 + tile * TILE);
                    turn.next(stages);
                }
        }
    } else if (warp > WARPS) {
        if (marks) {
            const u32 helper = thread - THREADS - WARP;
            named_barrier(2, THREADS + HELPERS);  // the bitmap is there
            if (helper < WARP) {
                const u32 count = list_columns(room.bitmap, p.K, 0, list, lane);
                if (lane == 0) outlier_count = count;
            }
            named_barrier(3, HELPERS);
            if (outlier_count > 0) gather(p, room, n0, 0, outlier_count, helper, HELPERS);
        }
    } else {
        find_maxima(p, room, thread);
        if (marks) named_barrier(2, THREADS + HELPERS);
        else named_barrier(1, THREADS);
        quantize(p, room, min(last * 128, p.K), thread);
        named_barrier(1, THREADS);
        const u32 g = lane / 4, t = lane % 4;
        // Of a matrix of 8 × 16 bytes each lane names a row: rows 0, 8 on, then 16 bytes further.
        const u32 row = lane % 16, a_at = shared_address(ring) + warp * BLOCK_BYTES + row * 128;
        const u8* const codes = room.codes + (g < p.M ? g : 0) * room.pitch + warp * 128 + t * 4;
        Turn turn;
#pragma unroll 1
        for (u32 tile = 0; tile < tiles; ++tile) {
            i32 sums[4] = {};
#pragma unroll 1
            for (u32 step = 0; step < steps; ++step) {
                barrier_wait(full + turn.stage * 8, turn.parity);
                if (first + step * BLOCKS + warp < last) {
#pragma unroll
                    for (u32 h = 0; h < 4; ++h) {
                        u32 a[4];
                        load_matrices(a, a_at + turn.stage * STAGE + (2 * h + lane / 16 ^ row % 8) * 16);
                        const u8* from = codes + step * (BLOCKS * 128) + h * 32;
                        const u32 b[2] = {*reinterpret_cast<const u32*>(from), *reinterpret_cast<const u32*>(from + 16)};
                        mma_s8(sums, a, b);
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + turn.stage * 8);
                turn.next(stages);
            }
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                const u32 m = 2 * t + e % 2;
                if (m < p.M) atomicAdd(room.sums + m * room.rows + tile * TILE + g + e / 2 * 8, sums[e]);
            }
        }
    }
    __syncthreads();
    if (ranks > 1) cluster_arrive(), cluster_wait();

    // What is left is done by all threads of the cluster, each its own results.
    const u32 count = marks ? outlier_count : 0;
    const u32 results = p.M * room.rows;
    for (u32 skip = 0;; skip += OUTLIERS) {
        const bool is_first = skip == 0, is_last = skip + OUTLIERS >= count;
        for (u32 i = rank * ALL_THREADS + thread; i < results; i += ranks * ALL_THREADS) {
            const u32 m = i / room.rows, row = i - m * room.rows, n = n0 + row;
            if (n >= p.N) continue;
            float value;
            if (is_first) {
                i32 sum = room.sums[i];
                if (ranks > 1) sum += i32(as_bits(load_cluster_float(map_to_block(shared_address(room.sums + i), rank ^ 1))));
                value = float(sum) * (as_float(maxima[m]) * (1.f / 127.f));
            } else {
                value = as_float(u32(room.sums[i]));
            }
            for (u32 c = 0; c < min(OUTLIERS, count - min(skip, count)); ++c)
                value = fmaf(left[c * MOST_TOKENS + m], byte_value(room.weights[c * room.rows + row], 0), value);
            if (is_last) {
                const float added = p.bias == nullptr ? 0.f : to_float(p.bias[n]);
                p.out[u64(m) * p.N + n] = from_float<ELEMENT>(fmaf(value, p.column_stats[n] * (1.f / 127.f), added));
            } else {
                room.sums[i] = i32(as_bits(value));
            }
        }
        if (is_last) break;
        __syncthreads();
        if ((skip + OUTLIERS) % WINDOW == 0) {
            if (warp == 0) list_columns(room.bitmap, p.K, skip + OUTLIERS, list, lane);
            __syncthreads();
        }
        gather(p, room, n0, skip + OUTLIERS, count, thread, ALL_THREADS);
        __syncthreads();
    }
    if (ranks > 1) cluster_arrive(), cluster_wait();
}

KERNEL __launch_bounds__(ALL_THREADS, 2)
    linear_int8(const __grid_constant__ TensorMap w_map,  // boxes of 16 × 128
                const ELEMENT* x, const u8* w, const float* column_stats, const ELEMENT* bias, ELEMENT* out, u32 M, u32 N, u32 K,
                float threshold,  // NaN for none
                u32 tiles, u32 stages) {
    const Layer layer = {x, w, column_stats, bias, out, M, N, K, threshold};
    stream(w_map, layer, tiles, stages);
}
