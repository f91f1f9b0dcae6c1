// Experts: out[s, n] = Σ_k x[s, k] · w[e, n, k] + bias[e, n] for the rows s of expert e, straight from packed 4-bit weights, on the
// tensor cores.
//
//   x [S, K] 16-bit, sorted by expert; rows offsets[e] … offsets[e + 1] − 1 are those of expert e, offsets int32 [E + 1] in
//   device memory; w packed [E·N·K / 2], scales one a block of 2^log2_block ≥ 64 across the whole stack; out [S, N]; K % 64 = 0
//
// Built with ELEMENT = Bf16 and F16, each with NESTED = 0 and 1 and with CHUNK = 8 (a few rows an expert, as in decoding) and 32.
// The host does not know who has rows, so blocks find their work themselves. Each reads all offsets, lists the experts in use, and
// cuts the list of *items*
//
//   expert in use → tile of 16 weight rows → chunk of up to CHUNK rows of x
//
// into equal shares, one a group of warps. The experts not in use cost 4 bytes each. Chunks of a tile follow each other, so that
// the second and further ones find its weights in the L2. The warps of a group split K, up to 8 ways, in steps of 256; a warp's
// copies run on from item to item, whatever expert it is of, so that the ring is never empty.
//
//   CHUNK                               8                              32
//   warps a block, registers each      16, 128                         8, 255
//   ring of a warp, in stages           3                              4        of 16 rows × 256 weights = 2 KB, + 64 scales
//                                                                               (+ 64 words with codes if nested)
//   sums of a warp: 2 buffers of        2                              4        tiles of 16 × 8 results
//
// A barrier of the group for each buffer full of sums; the buffers take turns.
//
// Weights are the A operand of mma.m16n8k16: the order of K, the pair table and the values are those of mma.cuh. x comes
// through the L1 for each item again: the sums stay in registers instead. A chunk of up to 8, 16 or 32 rows costs 1, 2 or 4 MMAs
// for each A operand. Which block it is, and how long chunks are, changes nothing in how a row is summed, so results are equal from
// run to run and do not depend on what other rows there are.
//
// Rows of x before the first expert's or after the last one's belong to nobody: their results are zeros.
//
// Grid: a block per SM. Bytes: the packed weights and scales of the experts in use, S·K·2 (from L2) a tile of weight rows, 2·S·N.
// From sm_80 and PTX 7.4 on.
#include "codebook.cuh"
#include "async_copy.cuh"
#include "mma.cuh"

#if !defined(ELEMENT) || !defined(NESTED) || !defined(CHUNK)
#error "compile with -DELEMENT=Bf16 or F16, -DNESTED=0 or 1 and -DCHUNK=8 or 32"
#endif

constexpr u32 STEP = 256;                             // weights of a row a stage
constexpr u32 STAGES = CHUNK == 8 ? 3 : 4;
constexpr u32 STAGE_WEIGHTS = 16 * STEP / 2;          // bytes
constexpr u32 STAGE_SCALES = 16 * 4 * 4;              // bytes: 16 rows × 4 scales
constexpr u32 STAGE = STAGE_WEIGHTS + (NESTED ? 2 : 1) * STAGE_SCALES;
constexpr u32 SLOTS = CHUNK == 8 ? 2 : 4;             // tiles of sums a buffer
constexpr u32 SUMS = 2 * SLOTS * TILE_FLOATS;         // floats a warp
constexpr u32 MOST_WARPS = CHUNK == 8 ? 16 : 8;

// The experts in use: their numbers, their rows of x, and the chunks that those before have; and one more entry with the sum of
// chunks. In shared memory, E + 1 of each.
struct Experts {
    u32 *index, *begin, *count, *chunks_before;
    DEVICE void set(u32 i, u32 e, u32 its_begin, u32 its_count, u32 before) const {
        index[i] = e, begin[i] = its_begin, count[i] = its_count, chunks_before[i] = before;
    }
    DEVICE u32 chunks(u32 i) const { return (count[i] + CHUNK - 1) / CHUNK; }
};

// Rows of expert e, within bounds whatever the offsets say.
DEVICE void rows_of(const int* offsets, u32 e, u32 S, u32& begin, u32& count) {
    begin = u32(min(max(__ldg(offsets + e), 0), int(S)));
    count = u32(min(max(__ldg(offsets + e + 1), int(begin)), int(S))) - begin;
}

// Lists the experts in use; returns how many there are. For all threads of the block.
DEVICE u32 list_experts(const int* offsets, u32 S, u32 E, Experts list) {
    __shared__ uint2 totals[MOST_WARPS];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 each = (E + blockDim.x - 1) / blockDim.x;
    const u32 first = min(threadIdx.x * each, E), last = min(first + each, E);
    u32 used = 0, chunks = 0, begin, count;
    for (u32 e = first; e < last; ++e) {
        rows_of(offsets, e, S, begin, count);
        used += count > 0, chunks += (count + CHUNK - 1) / CHUNK;
    }
    u32 used_to_here = used, chunks_to_here = chunks;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 u = __shfl_up_sync(ALL_LANES, used_to_here, step), c = __shfl_up_sync(ALL_LANES, chunks_to_here, step);
        if (lane >= step) used_to_here += u, chunks_to_here += c;
    }
    if (lane == WARP - 1) totals[warp] = make_uint2(used_to_here, chunks_to_here);
    __syncthreads();
    u32 all_used = 0, all_chunks = 0;
    for (u32 w = 0; w < blockDim.x / WARP; ++w) {
        if (w < warp) used_to_here += totals[w].x, chunks_to_here += totals[w].y;
        all_used += totals[w].x, all_chunks += totals[w].y;
    }
    u32 at = used_to_here - used, before = chunks_to_here - chunks;
    for (u32 e = first; e < last; ++e) {
        rows_of(offsets, e, S, begin, count);
        if (count > 0) {
            list.set(at++, e, begin, count, before);
            before += (count + CHUNK - 1) / CHUNK;
        }
    }
    if (threadIdx.x == 0) list.set(all_used, 0, 0, 0, all_chunks);
    __syncthreads();
    return all_used;
}

// A place in the list of items.
struct Cursor {
    u32 at, tile, chunk;  // which of the experts in use; its tile; the tile's chunk
    DEVICE void seek(const Experts& list, u32 used, u32 tiles, u64 item) {
        u32 low = 0, high = used;  // chunks_before[low] · tiles ≤ item < chunks_before[high] · tiles
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            if (u64(list.chunks_before[middle]) * tiles <= item) low = middle;
            else high = middle;
        }
        const u32 chunks = list.chunks(low);
        const u64 within = item - u64(list.chunks_before[low]) * tiles;
        at = low, tile = u32(within / chunks), chunk = u32(within % chunks);
    }
    DEVICE void next(const Experts& list, u32 tiles) {
        if (++chunk < list.chunks(at)) return;
        chunk = 0;
        if (++tile < tiles) return;
        tile = 0;
        ++at;
    }
};

template <int C> struct Width { static constexpr int columns = C; };

DEVICE void group_barrier(u32 group, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory"); }

template <class T>
DEVICE void experts(const T* x, const int* offsets, const u8* packed, Scales scales, const T* bias, T* out, u32 S, u32 E, u32 N,
                    u32 K, u32 log2_block, Values values, float ungain, u32 split) {
    __shared__ __align__(128) u32 table[TABLE_WORDS];
    __shared__ float map[NESTED ? 256 : 1];
    __shared__ uint4 slots[MOST_WARPS][2][SLOTS];  // of a group: what its tiles of sums are
    extern __shared__ __align__(128) u8 dynamic[];

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const u32 g = lane / 4, t = lane % 4;
    const StaticPairs pairs{table, lane * 4};
    const u32 group = warp / split, part = warp % split, groups = warps / split, group_threads = split * WARP;

    const u32 most = (E + 8) / 8 * 8;
    u32* numbers = reinterpret_cast<u32*>(dynamic);
    const Experts list{numbers, numbers + most, numbers + 2 * most, numbers + 3 * most};
    u8* rings = dynamic + most * 16;
    u8* ring = rings + warp * (STAGES * STAGE);
    float* sums = reinterpret_cast<float*>(rings + warps * (STAGES * STAGE));
    float* group_sums = sums + group * split * SUMS;
    float* my_sums = sums + warp * SUMS + lane * 4;

    const u32 used = list_experts(offsets, S, E, list);

    // This group's share of the items, and this warp's of K, in blocks of 64.
    const u32 tiles = (N + 15) / 16;
    const u64 items = u64(list.chunks_before[used]) * tiles;
    const u32 worker = group * gridDim.x + blockIdx.x, workers = groups * gridDim.x;
    const u64 first_item = items * worker / workers, last_item = items * (worker + 1) / workers;
    const u32 blocks = K / 64, share = ((blocks + 3) / 4 + split - 1) / split * 4;
    const u32 first = min(part * share, blocks), last = min(first + share, blocks);
    const u32 steps = (last - first + 3) / 4;
    const u32 fold = log2_block - 6;  // blocks of 64 to a scale, as a shift
#if NESTED
    const u32 all_scales = u32((u64(E) * N * blocks + (1u << fold) - 1) >> fold);
    const float offset = __ldg(scales.offset);
    u32 places = 0;  // for each stage, which byte of their words this lane's two codes are
#endif

    // Copies: an instruction takes 4 rows × 128 bytes; a lane has the scales of row lane % 16, blocks lane / 16 and 2 + lane / 16,
    // or lanes 0 … 15 have the four of a row where those lie together.
    const bool together = fold == 0 && blocks % 4 == 0 && (NESTED || reinterpret_cast<u64>(scales.absmax) % 16 == 0);
    const u32 copy_row = lane / 8, copy_chunk = lane % 8, scale_row = lane % 16, scale_block = lane / 16;
    const u32 copy_to = shared_address(ring) + copy_row * 128 + ((copy_chunk ^ (copy_row % 4 * 2)) * 16);
    const u32 scale_to = shared_address(ring) + STAGE_WEIGHTS + scale_row * 16 + scale_block * 4;

    Cursor copying{};
    u32 to_copy = steps > 0 ? u32(last_item - first_item) : 0;  // items
    u32 copy_blocks = 0;     // blocks of 64 of the item that are under way
    const u8* from = packed; // this lane's first 16 bytes of the item
    u32 scale_at = 0;        // and its first block of 64, of all in the stack
    u32 rows_left = 0;       // from its tile's first row on
    auto aim = [&] {
        const u32 row = list.index[copying.at] * N + copying.tile * 16;
        from = packed + u64(row + copy_row) * (K / 2) + first * 32 + copy_chunk * 16;
        scale_at = (row + scale_row) * blocks + first + scale_block;
        rows_left = N - copying.tile * 16;
    };
    if (to_copy > 0) copying.seek(list, used, tiles, first_item), aim();

    auto copy = [&](u32 stage) {
        const u32 left = last - first - copy_blocks;
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            copy16(copy_to + stage * STAGE + i * 512, from + copy_blocks * 32 + u64(i * 2) * K,
                   i * 4 + copy_row < rows_left && copy_chunk / 2 < left);
        const u32 to = scale_to + stage * STAGE;
        if (together) {
            if (lane < 16) {
                const u32 at = scale_at + copy_blocks;
                const bool valid = scale_row < rows_left;
#if NESTED
                copy4(to, scales.nested + (at >> scales.nested_shift), valid ? 4 : 0);
                copy4(to + STAGE_SCALES, static_cast<const u8*>(scales.absmax) + at, valid ? 4 : 0);
#else
                copy16_near(to, static_cast<const float*>(scales.absmax) + at, valid);
#endif
            }
        } else {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const bool valid = scale_row < rows_left && scale_block + 2 * i < left;
                const u32 at = valid ? (scale_at + copy_blocks + 2 * i) >> fold : 0;
#if NESTED
                // The word that holds the code; the last one may not be whole.
                const u32 word = at & ~3u, bytes = valid ? min(all_scales - word, 4u) : 0;
                copy4(to + i * 8, scales.nested + (at >> scales.nested_shift), valid ? 4 : 0);
                copy4(to + i * 8 + STAGE_SCALES, static_cast<const u8*>(scales.absmax) + word, bytes);
                const u32 shift = stage * 4 + i * 2;
                places = (places & ~(3u << shift)) | (at & 3) << shift;
#else
                copy4(to + i * 8, static_cast<const float*>(scales.absmax) + at, valid ? 4 : 0);
#endif
            }
        }
        copy_blocks += 4;
        if (copy_blocks >= last - first) {
            copy_blocks = 0;
            if (--to_copy > 0) copying.next(list, tiles), aim();
        }
    };

#pragma unroll
    for (u32 s = 0; s < STAGES - 1; ++s) {
        if (to_copy > 0) copy(s);
        commit();
    }
    if (NESTED)
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x) map[i] = __ldg(scales.map + i);
    pairs.fill(values, blockDim.x);
    __syncthreads();

    u32 stage = 0;
    // Activations of the step, as many blocks of 64 ahead as there are registers for. Where a warp has one step only, those of a
    // chunk of 8 stay for the next tile.
    const T* held = nullptr;
#if CHUNK == 8
    uint4 b[4][1][2];
#endif
    // One item with COLUMNS tiles of 8 rows of x: `rows` of them, at x; the sums go to `to`.
    auto item = [&](auto width, const T* x, u32 rows, float* to) {
        constexpr int COLUMNS = decltype(width)::columns;
        float acc[COLUMNS][4];
        const T* mine[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            acc[c][0] = acc[c][1] = acc[c][2] = acc[c][3] = 0.f;
            // Rows that are not there are row 0 again: their sums are not used.
            const u32 m = c * 8 + g;
            mine[c] = x + u64(m < rows ? m : 0) * K + first * 64 + 16 * t;
        }
        for (u32 step = 0; step < steps; ++step) {
            const u32 here = last - first - step * 4;  // blocks from this step on
            constexpr u32 AHEAD = COLUMNS == 4 ? 2 : 4;
#if CHUNK == 32
            uint4 b[AHEAD][COLUMNS][2];
#endif
            auto load = [&](u32 k) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const uint4* from = reinterpret_cast<const uint4*>(mine[c] + (step * 4 + k) * 64);
                    if (k < here) {
                        b[k % AHEAD][c][0] = __ldg(from), b[k % AHEAD][c][1] = __ldg(from + 1);
                    } else {
                        b[k % AHEAD][c][0] = b[k % AHEAD][c][1] = make_uint4(0, 0, 0, 0);
                    }
                }
            };
            if (CHUNK == 32 || held != x) {
#pragma unroll
                for (u32 k = 0; k < AHEAD; ++k) load(k);
            }
            wait_for_copies<STAGES - 2>();
            u8* at = ring + stage * STAGE;
#if NESTED  // each lane decodes the scales that it has copied itself
            u8* word = at + STAGE_WEIGHTS + scale_row * 16 + scale_block * 4;
            auto scale_of = [&](u32 code, float nested) { return __fadd_rn(__fmul_rn(map[code], nested), offset); };
            if (!together) {
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    float* scale = reinterpret_cast<float*>(word + i * 8);
                    *scale = scale_of(word[i * 8 + STAGE_SCALES + (places >> (stage * 4 + i * 2) & 3)], *scale);
                }
            } else if (lane < 16) {
                const float nested = *reinterpret_cast<const float*>(word);
                const u32 codes = *reinterpret_cast<const u32*>(word + STAGE_SCALES);
                *reinterpret_cast<float4*>(word) =
                    make_float4(scale_of(codes & 255, nested), scale_of(codes >> 8 & 255, nested),
                                scale_of(codes >> 16 & 255, nested), scale_of(codes >> 24, nested));
            }
#endif
            __syncwarp();  // copies and scales of all lanes are there, and the stage before is read
            if (to_copy > 0) copy(stage == 0 ? STAGES - 1 : stage - 1);
            commit();

            const float* scale = reinterpret_cast<const float*>(at + STAGE_WEIGHTS) + g * 4;
            constexpr u32 UNROLLED = AHEAD;
#pragma unroll UNROLLED
            for (u32 k = 0; k < 4; ++k) {
                const float low = scale[k], high = scale[8 * 4 + k];
                const u32 chunk = (k * 32) ^ (g % 4 * 32);
                const uint2 u = *reinterpret_cast<const uint2*>(at + g * 128 + chunk + t * 8);
                const uint2 v = *reinterpret_cast<const uint2*>(at + (g + 8) * 128 + chunk + t * 8);
                const uint2 w[1][2] = {{u, v}};
                float d[1][COLUMNS][4];
                block_product<T, 1, COLUMNS>(d, w, b[k % AHEAD], pairs);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    acc[c][0] = fmaf(d[0][c][0], low, acc[c][0]);
                    acc[c][1] = fmaf(d[0][c][1], low, acc[c][1]);
                    acc[c][2] = fmaf(d[0][c][2], high, acc[c][2]);
                    acc[c][3] = fmaf(d[0][c][3], high, acc[c][3]);
                }
                if (k + AHEAD < 4) load(k + AHEAD);
            }
            stage = stage + 1 < STAGES ? stage + 1 : 0;
        }
        if (CHUNK == 8 && steps == 1) held = x;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            *reinterpret_cast<float4*>(to + c * TILE_FLOATS) = make_float4(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
    };

    Cursor here{};
    u32 left = u32(last_item - first_item);
    if (left > 0) here.seek(list, used, tiles, first_item);
    u32 buffer = 0;
    while (left > 0) {
        u32 filled = 0;  // slots of this buffer
        do {
            const u32 before = here.chunk * CHUNK, rows = min(list.count[here.at] - before, CHUNK);
            const u32 columns = CHUNK == 8 || rows <= 8 ? 1 : rows <= 16 ? 2 : 4;
            if (filled + columns > SLOTS) break;
            const u32 token = list.begin[here.at] + before;
            if (part == 0 && lane < columns) {
                const u32 done = lane * 8;
                slots[group][buffer][filled + lane] =
                    make_uint4(list.index[here.at], here.tile * 16, token + done, done < rows ? min(rows - done, 8u) : 0);
            }
            const T* from = x + u64(token) * K;
            float* to = my_sums + (buffer * SLOTS + filled) * TILE_FLOATS;
#if CHUNK == 8
            item(Width<1>{}, from, rows, to);
#else
            if (columns == 1) item(Width<1>{}, from, rows, to);
            else if (columns == 2) item(Width<2>{}, from, rows, to);
            else item(Width<4>{}, from, rows, to);
#endif
            filled += columns;
            if (--left > 0) here.next(list, tiles);
        } while (left > 0);
        group_barrier(group, group_threads);  // sums are there; and nobody reads the other buffer any more

        // Sums of the warps, in order: a thread takes the four sums of one lane.
        for (u32 i = part * WARP + lane; i < filled * WARP; i += group_threads) {
            const float* from = group_sums + buffer * (SLOTS * TILE_FLOATS) + i * 4;
            float4 sum = *reinterpret_cast<const float4*>(from);
            for (u32 w = 1; w < split; ++w) {
                const float4 more = *reinterpret_cast<const float4*>(from + w * SUMS);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            const uint4 slot = slots[group][buffer][i / WARP];
            auto put = [&](u32 n, u32 m, float value) {
                if (n >= N || m >= slot.w) return;
                value *= ungain;
                if (bias != nullptr) value += to_float(bias[u64(slot.x) * N + n]);
                out[u64(slot.z + m) * N + n] = from_float<T>(value);
            };
            const u32 n = slot.y + g, m = t * 2;
            put(n, m, sum.x), put(n, m + 1, sum.y), put(n + 8, m, sum.z), put(n + 8, m + 1, sum.w);
        }
        buffer ^= 1;
    }

    // Rows of nobody.
    const u32 begin = u32(min(max(__ldg(offsets), 0), int(S))), end = u32(min(max(__ldg(offsets + E), int(begin)), int(S)));
    const u64 nobody = u64(begin) * N;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < nobody + u64(S - end) * N; i += u64(gridDim.x) * blockDim.x)
        out[i < nobody ? i : i - nobody + u64(end) * N] = from_float<T>(0.f);
}

#define EXPERTS(name)                                                                                                         \
    KERNEL __launch_bounds__(MOST_WARPS * WARP, 1)                                                                                          \
        matmul_4bit_experts_##name(const ELEMENT* x,        /* [S, K], 16-byte aligned, sorted by expert */                   \
                                   const int* offsets,      /* [E + 1], rising */                                             \
                                   const u8* packed,        /* [E·N·K / 2], 16-byte aligned */                                \
                                   const void* absmax,      /* fp32 [E·N·K >> log2_block, up], or u8 codes if nested,         \
                                                               4-byte aligned */                                              \
                                   const float* nested,     /* fp32, one for 2^nested_shift codes; null when plain */         \
                                   const float* map,        /* fp32 [256] */                                                  \
                                   const float* offset,     /* fp32 [1] */                                                    \
                                   u32 nested_shift,                                                                          \
                                   const ELEMENT* bias,     /* [E, N] or null */                                              \
                                   ELEMENT* out,            /* [S, N] */                                                      \
                                   u32 S, u32 E, u32 N, u32 K, /* K % 64 = 0, K > 0; all < 2^31, E·N·K < 2^38 */                    \
                                   u32 log2_block,          /* 6 … 12 */                                                      \
                                   u64 values0, u64 values1, u64 values2, u64 values3, /* the code's 16 values */             \
                                   float ungain,            /* what the sums are multiplied with */                           \
                                   u32 split) {             /* warps that share K; divides the warps of the block */          \
        experts<ELEMENT>(x, offsets, packed, Scales{absmax, nested, map, offset, nested_shift}, bias, out, S, E, \
                                      N, K, log2_block, Values{{values0, values1, values2, values3}}, ungain, split);         \
    }
#if NESTED
EXPERTS(nested)
#else
EXPERTS(plain)
#endif
