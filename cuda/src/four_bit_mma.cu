// out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] for small M straight from packed 4-bit weights, on the tensor cores.
//
//   x [M, K] 16-bit, w packed [N·K / 2] in bitsandbytes' layout, scales one a block of 2^log2_block ≥ 64, out [M, N]; K % 64 = 0
//
// Built with ELEMENT = Bf16 and F16, each with TOKENS = 8 and 16. One block of up to 8 warps per SM; it owns tiles_per_block tiles of 16 weight
// rows, and its warps split K between them, so that each activation is read once a block and stays in registers for all tiles:
//
//              K →   warp 0     warp 1     …    warp 7
//   rows  0 … 15   [ 256 | 256 ][ 256 | 256 ] …             tile 0       a stage: 16 rows × 256 weights = 2 KB + 64 scales
//   rows 16 … 31   [           ][           ] …             tile 1       order of a warp: K step outer, tile inner
//
// Weights are the A operand of mma.m16n8k16, so that any M up to 8 costs the same. The order of K inside an MMA is free as long
// as both operands agree: lane (g = lane / 4, t = lane % 4) takes bytes 8t … 8t+7 of each 32-byte block of 64 weights of rows
// g and g + 8, and MMA j of the block's four takes of them
//
//   A: bytes 2j, 2j+1 (weights 16t+4j … +3)             B: activations k = 16t+4j … +3 of token g: 32 contiguous bytes a lane
//
// All four lanes of a row are then in one block of 64, so the fp32 scale multiplies the finished fp32 accumulator. The 16 values
// come as 16-bit numbers, scaled by a constant with which they round well; `ungain` divides it out at the end. (NF4 × 1.43677
// in bf16 has a relative rounding error of 7.8e-4, half of what rounding each dequantized weight to bf16 costs; FP4 × 12 is
// exact.) Any other 16 values would do as well: nothing else here knows the code.
//
// Decoding: one lookup a byte, byte → two 16-bit values, in a table with a copy for each bank (32 KB): no conflicts.
// Weights come by cp.async, 16 bytes a lane, into a ring of 4 or 6 stages private to the warp, chunks of a row swizzled by its
// number so that neither the copies nor the 8-byte reads collide. Scales come through registers a tile ahead (nested ones are
// decoded on the way) into the same stage. No barrier of the block until the end: then the partial sums of the warps, which lie
// in shared memory, are added in fixed order, so that results are equal from run to run.
//
// More than 16 tokens: another row of blocks for each 16 of them (grid.y), on the same weights at about the same time, so that
// all rows but the first find them in the L2.
//
// Bytes: N·K / 2 + scales + 2·M·K (from L2) a block + 2·M·N. From sm_80 and PTX 7.4 on.
#include "codebook.cuh"

#if !defined(ELEMENT) || !defined(TOKENS)
#error "compile with -DELEMENT=Bf16 or F16 and -DTOKENS=8 or 16"
#endif

constexpr u32 STEP = 256;                             // weights of a row a stage: 128 bytes, a line
constexpr u32 STAGE_WEIGHTS = 16 * STEP / 2;          // bytes
constexpr u32 STAGE = STAGE_WEIGHTS + 16 * 4 * 4;     // and 16 rows × 4 scales
constexpr u32 TABLE_WORDS = 256 * WARP;
constexpr u32 TILE_FLOATS = 16 * 8;                   // one accumulator tile

// The 16 values of a code as 16-bit numbers, four a word; they come as kernel arguments, which need no load.
struct Values {
    u64 words[4];
    DEVICE u32 get(u32 code) const {
        const u64 low = code & 4 ? words[1] : words[0], high = code & 4 ? words[3] : words[2];
        return u32((code & 8 ? high : low) >> (code % 4 * 16)) & 0xffff;
    }
};

template <class T> DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
#define MMA(T, type)                                                                                                          \
    template <> DEVICE void mma<T>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {                           \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                  \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                          \
    }
MMA(Bf16, "bf16")
MMA(F16, "f16")

// 16 bytes from global to shared memory, zeros if not `valid`. Weights are read once: past the L1, with the whole line asked of
// the L2 at once.
DEVICE void copy16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
}
DEVICE void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Byte J of `word` as two values in the order of the MMA: the high nibble, which is the earlier weight, in the low half.
template <int J> DEVICE u32 decode(u32 word, const u32* table, u32 lane4) {
    u32 at = J == 0 ? word << 7 : word >> (8 * J - 7);
    return *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + ((at & 0x7f80u) | lane4));
}

// The scales of a stage on their way: row lane % 16, blocks lane / 16 and 2 + lane / 16 of the stage's four.
template <bool NESTED> struct InFlight {
    float scale[2];  // or the nested scale
    u8 code[2];
};

template <class T, bool NESTED, int COLUMNS, int STAGES>  // COLUMNS tiles of 8 tokens, STAGES stages a ring
DEVICE void matmul(const T* x, const u8* packed, Scales scales, const T* bias, T* out, u32 M, u32 N, u32 K, u32 log2_block,
                   Values values, float ungain, u32 tiles_per_block, u32 tiles_per_pass) {
    __shared__ __align__(128) u32 table[TABLE_WORDS];
    __shared__ float map[NESTED ? 256 : 1];
    extern __shared__ __align__(128) u8 dynamic[];

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const u32 g = lane / 4, t = lane % 4, lane4 = lane * 4;
    u8* ring = dynamic + warp * (STAGES * STAGE);
    float* sums = reinterpret_cast<float*>(dynamic + warps * (STAGES * STAGE));  // [warp][tile][column][lane][4]
    float* my_sums = sums + warp * tiles_per_pass * (COLUMNS * TILE_FLOATS) + lane * 4;

    // This row of blocks has tokens of its own.
    const u32 first_m = blockIdx.y * (8 * COLUMNS);
    M = min(M - first_m, 8u * COLUMNS);
    x += u64(first_m) * K;
    out += u64(first_m) * N;

    // This warp's share of K, in blocks of 64.
    const u32 blocks = K / 64, share = (blocks + warps - 1) / warps;
    const u32 first = min(warp * share, blocks), last = min(first + share, blocks);
    const u32 steps = (last - first + 3) / 4;

    const u32 first_row = blockIdx.x * tiles_per_block * 16;
    const u32 my_tiles = min(tiles_per_block, (N - first_row + 15) / 16);
    const u32 fold = log2_block - 6;  // blocks of 64 to a scale, as a shift
    const float offset = NESTED ? __ldg(scales.offset) : 0.f;

    // Copies of a stage: an instruction takes 4 rows × 128 bytes.
    const u32 copy_row = lane / 8, copy_chunk = lane % 8;
    const u32 copy_to = shared_address(ring) + copy_row * 128 + ((copy_chunk ^ (copy_row % 4 * 2)) * 16);

    auto copy_weights = [&](u32 stage, u32 row0, u32 block) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = row0 + i * 4 + copy_row;
            const bool valid = row < N && block + copy_chunk / 2 < last;
            const u8* from = packed + (valid ? u64(row) * (K / 2) + block * 32 + copy_chunk * 16 : 0);
            copy16(copy_to + stage * STAGE + i * 512, from, valid);
        }
    };
    auto load_scales = [&](u32 row0, u32 block) {
        InFlight<NESTED> flight;
        const u32 row = row0 + lane % 16;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 b = block + lane / 16 + 2 * i;
            const bool valid = row < N && b < last;
            const u64 at = (u64(row) * blocks + b) >> fold;
            flight.scale[i] = 0.f;
            if (NESTED) {
                flight.code[i] = 0;
                if (valid) {
                    flight.code[i] = __ldg(static_cast<const u8*>(scales.absmax) + at);
                    flight.scale[i] = __ldg(scales.nested + (at >> scales.nested_shift));
                }
            } else if (valid) {
                flight.scale[i] = __ldg(static_cast<const float*>(scales.absmax) + at);
            }
        }
        return flight;
    };
    auto land_scales = [&](u32 stage, const InFlight<NESTED>& flight) {
        float* to = reinterpret_cast<float*>(ring + stage * STAGE + STAGE_WEIGHTS) + (lane % 16) * 4 + lane / 16;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            to[2 * i] = NESTED ? __fadd_rn(__fmul_rn(map[flight.code[i]], flight.scale[i]), offset) : flight.scale[i];
    };
    // Activations of a step: 4 blocks × 16 values a lane. Rows beyond M are row 0 again: their sums are not used.
    uint4 b[COLUMNS][4][2], next_b[COLUMNS][4][2];
    auto load_activations = [&](u32 step, uint4 (&b)[COLUMNS][4][2]) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const u32 m = c * 8 + g;
            const T* from = x + u64(m < M ? m : 0) * K + (first + step * 4) * 64 + 16 * t;
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                const bool valid = first + step * 4 + k < last;
                b[c][k][0] = valid ? __ldg(reinterpret_cast<const uint4*>(from + k * 64)) : make_uint4(0, 0, 0, 0);
                b[c][k][1] = valid ? __ldg(reinterpret_cast<const uint4*>(from + k * 64 + 8)) : make_uint4(0, 0, 0, 0);
            }
        }
    };

    for (u32 pass = 0; pass < my_tiles; pass += tiles_per_pass) {
        const u32 tiles = min(tiles_per_pass, my_tiles - pass);
        const u32 row0 = first_row + pass * 16;

        // Fill the ring; scales and activations set out with the first weights, and the table is made while all are under way.
        u32 next_tile = 0, next_step = 0;  // to copy
        auto advance = [&] {
            if (++next_tile == tiles) next_tile = 0, ++next_step;
        };
        InFlight<NESTED> flight[STAGES - 1];
        if (pass > 0) __syncthreads();  // everybody has read the sums of the pass before
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s) {
            if (next_step < steps) {
                copy_weights(s, row0 + next_tile * 16, first + next_step * 4);
                flight[s] = load_scales(row0 + next_tile * 16, first + next_step * 4);
                advance();
            }
            commit();
        }
        load_activations(0, next_b);
        if (pass == 0) {
            if (NESTED)
                for (u32 i = threadIdx.x; i < 256; i += blockDim.x) map[i] = __ldg(scales.map + i);
            for (u32 i = threadIdx.x; i < TABLE_WORDS / 4; i += blockDim.x) {
                const u32 byte = i / 8, pair = values.get(byte / 16) | values.get(byte % 16) << 16;
                reinterpret_cast<uint4*>(table)[i] = make_uint4(pair, pair, pair, pair);
            }
            __syncthreads();
        }
        const u32 filled = min(u32(STAGES - 1), steps * tiles);
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s)
            if (s < filled) land_scales(s, flight[s]);

        if (steps == 0)
            for (u32 i = 0; i < tiles * COLUMNS; ++i)
                *reinterpret_cast<float4*>(my_sums + i * TILE_FLOATS) = make_float4(0.f, 0.f, 0.f, 0.f);

        u32 stage = 0, landing_stage = 0;
        bool landing = false;
        for (u32 step = 0; step < steps; ++step) {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int k = 0; k < 4; ++k) b[c][k][0] = next_b[c][k][0], b[c][k][1] = next_b[c][k][1];
            if (step + 1 < steps) load_activations(step + 1, next_b);  // under way during this step
            for (u32 tile = 0; tile < tiles; ++tile) {
                wait<STAGES - 2>();
                __syncwarp();  // copies and scales of all lanes are there, and the stage before is read
                // The next copy goes where the tile before was.
                const u32 next_stage = stage == 0 ? STAGES - 1 : stage - 1;
                if (landing) land_scales(landing_stage, flight[0]);
                landing = next_step < steps;
                if (landing) {
                    copy_weights(next_stage, row0 + next_tile * 16, first + next_step * 4);
                    flight[0] = load_scales(row0 + next_tile * 16, first + next_step * 4);
                    landing_stage = next_stage;
                    advance();
                }
                commit();

                const u8* at = ring + stage * STAGE;
                const float4 s0 = *reinterpret_cast<const float4*>(at + STAGE_WEIGHTS + g * 16);
                const float4 s1 = *reinterpret_cast<const float4*>(at + STAGE_WEIGHTS + (g + 8) * 16);
                const float low[4] = {s0.x, s0.y, s0.z, s0.w}, high[4] = {s1.x, s1.y, s1.z, s1.w};
                float acc[COLUMNS][4];
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) acc[c][0] = acc[c][1] = acc[c][2] = acc[c][3] = 0.f;
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    const u32 chunk = (k * 32) ^ (g % 4 * 32);
                    const uint2 u = *reinterpret_cast<const uint2*>(at + g * 128 + chunk + t * 8);
                    const uint2 v = *reinterpret_cast<const uint2*>(at + (g + 8) * 128 + chunk + t * 8);
                    float d[COLUMNS][4];
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) d[c][0] = d[c][1] = d[c][2] = d[c][3] = 0.f;
#define BYTES(p, q, word, j, r0, r1)                                                                        \
    {                                                                                                       \
        const u32 a0 = decode<p>(u.word, table, lane4), a1 = decode<p>(v.word, table, lane4);               \
        const u32 a2 = decode<q>(u.word, table, lane4), a3 = decode<q>(v.word, table, lane4);               \
        _Pragma("unroll") for (int c = 0; c < COLUMNS; ++c)                                                 \
            mma<T>(d[c], a0, a1, a2, a3, b[c][k][j].r0, b[c][k][j].r1);                                     \
    }
                    BYTES(0, 1, x, 0, x, y)
                    BYTES(2, 3, x, 0, z, w)
                    BYTES(0, 1, y, 1, x, y)
                    BYTES(2, 3, y, 1, z, w)
#undef BYTES
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) {
                        acc[c][0] = fmaf(d[c][0], low[k], acc[c][0]);
                        acc[c][1] = fmaf(d[c][1], low[k], acc[c][1]);
                        acc[c][2] = fmaf(d[c][2], high[k], acc[c][2]);
                        acc[c][3] = fmaf(d[c][3], high[k], acc[c][3]);
                    }
                }
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    float4* sum = reinterpret_cast<float4*>(my_sums + (tile * COLUMNS + c) * TILE_FLOATS);
                    float4 s = step == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : *sum;
                    *sum = make_float4(s.x + acc[c][0], s.y + acc[c][1], s.z + acc[c][2], s.w + acc[c][3]);
                }
                stage = stage + 1 < STAGES ? stage + 1 : 0;
            }
        }
        wait<0>();
        __syncthreads();

        // Sums of the warps, in order: a thread takes the four sums of one lane, so that no two collide in a bank.
        for (u32 i = threadIdx.x; i < tiles * COLUMNS * WARP; i += blockDim.x) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
            for (u32 w = 0; w < warps; ++w) {
                const float4 part = *reinterpret_cast<const float4*>(sums + w * tiles_per_pass * (COLUMNS * TILE_FLOATS) + i * 4);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            const u32 tile = i / (COLUMNS * WARP), column = i / WARP % COLUMNS;
            auto put = [&](u32 n, u32 m, float value) {
                if (n >= N || m >= M) return;
                value *= ungain;
                out[u64(m) * N + n] = from_float<T>(bias == nullptr ? value : value + to_float(bias[n]));
            };
            const u32 n = row0 + tile * 16 + i % WARP / 4, m = column * 8 + i % 4 * 2;
            put(n, m, sum.x), put(n, m + 1, sum.y), put(n + 8, m, sum.z), put(n + 8, m + 1, sum.w);
        }
    }
}

// What keeps 75 to 110 KB a block under way beside the sums. Eight warps, because activations of two steps take so many registers.
constexpr int RING_STAGES = TOKENS == 8 ? 6 : 4;

#define MATMUL(name, nested_form)                                                                                               \
    KERNEL __launch_bounds__(256, 1)                                                                                            \
        matmul_4bit_mma_##name(const ELEMENT* x,        /* [M, K], 16-byte aligned */                                           \
                               const u8* packed,        /* [N·K / 2], 16-byte aligned */                                        \
                               const void* absmax,      /* fp32 [N·K >> log2_block], or u8 codes if nested */                   \
                               const float* nested,     /* fp32, one for 2^nested_shift codes; null when plain */               \
                               const float* map,        /* fp32 [256] */                                                        \
                               const float* offset,     /* fp32 [1] */                                                          \
                               u32 nested_shift,                                                                                \
                               const ELEMENT* bias,     /* [N] or null */                                                       \
                               ELEMENT* out,            /* [M, N] */                                                            \
                               u32 M, u32 N, u32 K,     /* M ≤ TOKENS·grid.y, K % 64 = 0 */                                     \
                               u32 log2_block,          /* 6 … 12 */                                                            \
                               u64 values0, u64 values1, u64 values2, u64 values3, /* the code's 16 values, 16 bits each */     \
                               float ungain,            /* what the sums are multiplied with: 1 / the gain of the values */     \
                               u32 tiles_per_block,     /* tiles of 16 rows that a block owns */                                \
                               u32 tiles_per_pass) {    /* of them, as many as shared memory has sums for */                    \
        matmul<ELEMENT, nested_form, TOKENS / 8, RING_STAGES>(                                                                  \
            x, packed, Scales{absmax, nested, map, offset, nested_shift}, bias, out, M, N, K, log2_block,                       \
            Values{{values0, values1, values2, values3}}, ungain, tiles_per_block, tiles_per_pass);                             \
    }

#if TOKENS == 8
MATMUL(plain_m8, false)
MATMUL(nested_m8, true)
#else
MATMUL(plain_m16, false)
MATMUL(nested_m16, true)
#endif
