// 4-bit quantization with scales by least squared error. What is computed, and why, is in rust/halfbyte/src/four_bit/search.rs:
//
//   m = max |x|,  u = x / m                            of a block of 2^log2_block (32 … 4096) elements
//   S[±r] = Σ min(63, rint(2048 · min_v (±u − r v)²))  for 16 ratios r: integers, the same in any order
//   s = ±r m of the least S                            and m itself unless Σ (x/s − v)² r² is less than Σ (u − v)²
//   packed, absmax                                     as in four_bit.cu, with s as the scale
//
// One warp takes 512 elements, 16 a lane, so that 2^log2_block / 16 lanes share a block of up to 512, and 2 … 8 warps, which meet in
// shared memory, one of 1024 … 4096:
//
//   lane        0         1                31
//   elements    0 … 15    16 … 31   …      496 … 511       32 bytes of bf16 a lane
//   packed      8 bytes   8 bytes          8 bytes         256 bytes a warp
//
// The error table is 257 rows (u = −1 … 1) of 16 bytes, one for each ratio; row 256 − i is that of −u, so that the other sign is a
// second look-up and no second table. Eight copies, one for each 16-byte column of the banks: a 128-bit load of 32 lanes with 32
// different rows takes the four cycles that its 512 bytes take. Four rows are summed as bytes (4 · 63 < 256), then as 16-bit pairs.
// Then one lane of each two has the sums of one sign.
// An element costs about 50 issue slots and 13 cycles of shared memory for a warp, and 2 + 0.5 + 4/2^b bytes: bound by the former.
// Grid: as many blocks of 8 warps as fit (45 KB of tables each), which stride over the tensor. From sm_75 on.
#include "encode.cuh"

constexpr u32 WARPS = 8, RATIOS = 16, STEPS = 128, ROWS = 2 * STEPS + 1, ROW_COPIES = 8;
constexpr u32 SPAN = 512, ROUND = SPAN * WARPS;
// Low bits of a float that has 2^23 added are an integer; times 128 bytes, the rest of its bits becomes this.
constexpr u32 MAGIC_OFFSET = 0x4b000000u << 7;
DEVICE uint4 load_row(u32 address) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address));
    return r;
}
DEVICE float2 load_pair(u32 address) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(address));
    return r;
}

// Ratio k of 16, in hundredths; `hundredths` of search.rs.
__constant__ u8 FIRST_RATIO[8] = {84, 82, 82, 78, 74, 68, 62, 56};
DEVICE float ratio_of(u32 kind, u32 log2_block, u32 k) {
    const u32 r = (kind == NF4 && log2_block <= 6 ? 76 : FIRST_RATIO[log2_block - 5]) + 2 * k;
    return __fdiv_rn(float(r), 100.f);
}

// The two values that x̂ = x / s may be nearest to, for each of 64 buckets of width 1/16 from −2 on, each of which has at most one
// decision point (FP4's step between its zeros is a border). The code of a value is in the low 4 bits of its mantissa. 16 copies.
struct PairTable {
    uint2* entries;
    static constexpr u32 BUCKETS = 64, COPIES = 16, SIZE = BUCKETS * COPIES;
    static constexpr float MAGIC = 8388608.f + 32.f;
    DEVICE void fill(u32 kind) const {
#pragma unroll 1
        for (u32 i = threadIdx.x; i < SIZE; i += blockDim.x) {
            const float left = (float(i / COPIES) - 32.f) / 16.f, right = left + 1.f / 16.f;
            u32 low = 0, high = 0;
#pragma unroll 1
            for (u32 p = 0; p < 15; ++p) {
                const float t = EncodeRows::decision(kind, p);
                low += t <= left, high += t < right;
            }
            auto entry = [&](u32 rank) {
                const u32 code = EncodeTable::codes(kind, rank) & 15;
                return (as_bits(CODE_VALUES[kind][code]) & ~15u) | code;
            };
            entries[i] = make_uint2(entry(low), entry(high));
        }
    }
    // What `nearest` takes as its base.
    DEVICE u32 base(u32 lane) const { return shared_address(entries) + (lane % COPIES) * 8 - MAGIC_OFFSET; }
    // The distance of x · inverse, which is in [−2, 2), from the nearest value, and that value.
    static DEVICE float nearest(u32 base, float x, float inverse, float inverse16, float& value) {
        const float2 e = load_pair((as_bits(__fmaf_rd(x, inverse16, MAGIC)) << 7) + base);
        const float low = fmaf(x, inverse, -e.x), high = fmaf(x, inverse, -e.y);
        const bool up = fabsf(high) < fabsf(low);
        value = up ? e.y : e.x;
        return up ? high : low;
    }
};

DEVICE void fill_rows(u8* rows, float* ratios, u32 kind, u32 log2_block) {
    if (threadIdx.x < 2 * RATIOS) {
        const float r = ratio_of(kind, log2_block, threadIdx.x % RATIOS);
        ratios[threadIdx.x] = threadIdx.x < RATIOS ? r : -r;
    }
    // Four ratios of a row are one word.
#pragma unroll 1
    for (u32 i = threadIdx.x; i < ROWS * 4; i += blockDim.x) {
        const u32 row = i / 4;
        const float u = (float(row) - float(STEPS)) / float(STEPS);
        u32 word = 0;
#pragma unroll 1
        for (u32 k = 0; k < 4; ++k) {
            const float r = ratio_of(kind, log2_block, i % 4 * 4 + k);
            float d = 8.f;
            for (u32 q = 0; q < 16; ++q) d = fminf(d, fabsf(__fadd_rn(u, -__fmul_rn(CODE_VALUES[kind][q], r))));
            word |= u32(min(__float2int_rn(__fmul_rn(d, d) * 2048.f), 63)) << (8 * k);
        }
        for (u32 c = 0; c < ROW_COPIES; ++c) *reinterpret_cast<u32*>(rows + (row * ROW_COPIES + c) * 16 + i % 4 * 4) = word;
    }
}

// Adds four rows: ratios with an even number to `even`, a 16-bit half each, the others to `odd`.
DEVICE void add_rows(const uint4 (&r)[4], u32* acc) {
    auto add = [](u32 a, u32 b, u32 c, u32 d, u32* acc) {
        const u32 all = a + b + c + d;
        acc[0] += all & 0x00ff00ffu;
        acc[1] += __byte_perm(all, 0, 0x4341);
    };
    add(r[0].x, r[1].x, r[2].x, r[3].x, acc);
    add(r[0].y, r[1].y, r[2].y, r[3].y, acc + 2);
    add(r[0].z, r[1].z, r[2].z, r[3].z, acc + 4);
    add(r[0].w, r[1].w, r[2].w, r[3].w, acc + 6);
}

// The rank that EncodeTable finds, without its table: for the few blocks that keep their plain codes.
DEVICE u32 plain_rank(u32 kind, float x, float inverse) {
    u32 rank = 0;
#pragma unroll 1
    for (u32 p = 0; p < 15; ++p) rank += kind != NF4 && p == 7 ? x >= 0.f : __fmul_rn(x, inverse) > EncodeRows::decision(kind, p);
    return rank;
}

template <class T>
DEVICE void search(const T* a, u64 n, u8* packed, float* absmax, u32 log2_block, u32 kind, u32 aligned) {
    __shared__ __align__(16) u8 rows[ROWS * ROW_COPIES * 16];
    __shared__ uint2 pair_entries[PairTable::SIZE];
    __shared__ float ratios[2 * RATIOS];
    // Two of each, in turn, so that one barrier a step is enough.
    __shared__ u32 warp_max[2][WARPS];
    __shared__ u16 warp_sums[2][WARPS][2 * RATIOS];
    __shared__ float2 warp_errors[2][WARPS];
    fill_rows(rows, ratios, kind, log2_block);
    PairTable pairs{pair_entries};
    pairs.fill(kind);
    __syncthreads();

    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool wide = log2_block > 9;                                                       // blocks of several warps
    const u32 lanes = wide ? WARP : 1u << (log2_block - 4);                                 // that share a block
    const u32 warps = wide ? 1u << (log2_block - 9) : 1, first_warp = warp & ~(warps - 1);  // likewise
    const bool signs = kind == NF4;
    const u32 rows_base = shared_address(rows) + lane % ROW_COPIES * 16 - MAGIC_OFFSET;
    const u32 mirror = 2 * (rows_base + MAGIC_OFFSET) + 2 * STEPS * ROW_COPIES * 16;
    const u32 pairs_base = pairs.base(lane);
    u32 turn = 0;
    for (u64 round = u64(blockIdx.x) * ROUND; round < n; round += u64(gridDim.x) * ROUND, turn ^= 1) {
        const u64 base = round + warp * SPAN, first = base + lane * 16;
        const bool whole = aligned && base + SPAN <= n;
        Eight<T> x[2];
#pragma unroll
        for (u32 g = 0; g < 2; ++g) {
            if (whole) {
                x[g].load(a + first + 8 * g);
            } else {
                float v[8];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) v[i] = first + 8 * g + i < n ? to_float(a[first + 8 * g + i]) : 0.f;
                x[g].set(v);
            }
        }

        u32 most = magnitude(x);
        for (u32 step = 1; step < lanes; step <<= 1) most = max(most, __shfl_xor_sync(ALL_LANES, most, step));
        if (wide) {
            if (lane == 0) warp_max[turn][warp] = most;
            __syncthreads();
            for (u32 w = first_warp; w < first_warp + warps; ++w) most = max(most, warp_max[turn][w]);
        }
        const float m = as_float(most);
        const bool searchable = most >= (27u << 23) && most <= (142u << 23);  // 2^−100 … 2^15
        const float inverse = searchable ? __frcp_rn(m) : 0.f;
        // Where there is nothing to search, numbers that would lead out of the tables become zeros.
        float v[16];
#pragma unroll
        for (u32 i = 0; i < 16; ++i) v[i] = searchable ? x[i / 8].get(i % 8) : 0.f;

        u32 acc[16] = {};
        const float inverse128 = inverse * float(STEPS);
#pragma unroll
        for (u32 i = 0; i < 16; i += 4) {
            u32 at[4];
            uint4 r[4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                at[j] = (as_bits(fmaf(v[i + j], inverse128, 8388608.f + STEPS)) << 7) + rows_base;
                r[j] = load_row(at[j]);
            }
            add_rows(r, acc);
            if (signs) {
#pragma unroll
                for (u32 j = 0; j < 4; ++j) r[j] = load_row(mirror - at[j]);
                add_rows(r, acc + 8);
            }
        }

        // Even lanes get the sums of positive ratios, odd ones those of negative ratios.
        const u32 odd = lane & 1;
        u32 sums[8];
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
            sums[j] = (odd ? acc[8 + j] : acc[j]) + __shfl_xor_sync(ALL_LANES, odd ? acc[j] : acc[8 + j], 1);
        for (u32 step = 2; step < lanes; step <<= 1) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) sums[j] += __shfl_xor_sync(ALL_LANES, sums[j], step);
        }
        // The least sum, and of equal ones the first: number of the ratio in the low five bits.
        u32 key = ~0u;
        if (wide) {
            if (lane < 2) {
#pragma unroll
                for (u32 j = 0; j < 8; ++j) {
                    u16* to = &warp_sums[turn][warp][odd * RATIOS + j / 2 * 4 + j % 2];
                    to[0] = u16(sums[j]), to[2] = u16(sums[j] >> 16);
                }
            }
            __syncthreads();
            u32 sum = 0;
            for (u32 w = first_warp; w < first_warp + warps; ++w) sum += warp_sums[turn][w][lane];
            if (signs || lane < RATIOS) key = sum << 5 | lane;
            for (u32 step = 1; step < WARP; step <<= 1) key = min(key, __shfl_xor_sync(ALL_LANES, key, step));
        } else {
            const u32 sign = odd * RATIOS;
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                const u32 k = sign + j / 2 * 4 + j % 2;
                key = min(key, min((sums[j] & 0xffffu) << 5 | k, (sums[j] >> 16) << 5 | (k + 2)));
            }
            if (odd && !signs) key = ~0u;
            key = min(key, __shfl_xor_sync(ALL_LANES, key, 1));
        }
        const float ratio = ratios[key & 31], scale = m * ratio;
        const float to_scale = searchable ? __frcp_rn(scale) : 0.f;

        const float inverse16 = inverse * 16.f, to_scale16 = to_scale * 16.f;
        float error = 0.f, error_plain = 0.f;
        u32 words[2] = {0, 0};
#pragma unroll
        for (u32 i = 0; i < 16; ++i) {
            float value;
            const float d_plain = PairTable::nearest(pairs_base, v[i], inverse, inverse16, value);
            error_plain = fmaf(d_plain, d_plain, error_plain);
            const float d = PairTable::nearest(pairs_base, v[i], to_scale, to_scale16, value);
            error = fmaf(d, d, error);
            words[i / 8] = words[i / 8] << 4 | (as_bits(value) & 15);
        }
        for (u32 step = 1; step < lanes; step <<= 1) {
            error += __shfl_xor_sync(ALL_LANES, error, step);
            error_plain += __shfl_xor_sync(ALL_LANES, error_plain, step);
        }
        if (wide) {
            if (lane == 0) warp_errors[turn][warp] = make_float2(error, error_plain);
            __syncthreads();
            error = error_plain = 0.f;
            for (u32 w = first_warp; w < first_warp + warps; ++w) {
                const float2 e = warp_errors[turn][w];
                error += e.x, error_plain += e.y;
            }
        }
        // A step of 2^−20 an element, so that no rounding here lets in what is worse.
        const bool better = searchable && fmaf(error, ratio * ratio, float(1u << log2_block) * 0x1p-20f) <= error_plain;
        if (!better) {  // as in four_bit.cu; rare, so one element at a time
            const bool special = most - 1 >= 0x7f7fffffu;
            const float to_plain = special ? 1.f : inverse_of(m), rest = most == 0 && kind == NF4 ? -1.f : 0.f;
            u64 ranks = 0;
#pragma unroll 1
            for (u32 i = 0; i < 16; ++i) {
                float e = first + i < n ? to_float(a[first + i]) : 0.f;
                if (special) e = magnitude(e) >= 0x7f800000u ? 1.f : rest;
                ranks = ranks << 4 | plain_rank(kind, e, to_plain);
            }
            words[0] = EncodeTable::codes(kind, u32(ranks >> 32)), words[1] = EncodeTable::codes(kind, u32(ranks));
        }
        if ((first & ((1u << log2_block) - 1)) == 0 && first < n) absmax[first >> log2_block] = better ? scale : m;
#pragma unroll
        for (u32 g = 0; g < 2; ++g) words[g] = __byte_perm(words[g], 0, 0x0123);  // the first element to the first byte
        if (whole) {
            *reinterpret_cast<uint2*>(packed + first / 2) = make_uint2(words[0], words[1]);
        } else {
            const u64 bytes = u64(words[1]) << 32 | words[0];
#pragma unroll 1
            for (u32 i = 0; i < 8; ++i)
                if (first + 2 * i < n) packed[first / 2 + i] = u8(bytes >> (8 * i));
        }
    }
}

// Codes for given scales, into `packed`, which keeps those of blocks whose scale is 0, not finite or beyond 10^±30.
// 8 elements a lane, as in four_bit.cu.
template <class T>
DEVICE void encode(const T* a, u64 n, u8* packed, Scales scales, u32 log2_block, u32 kind, u32 aligned) {
    __shared__ uint2 entries[PairTable::SIZE];
    PairTable pairs{entries};
    pairs.fill(kind);
    __syncthreads();
    const u32 lane = threadIdx.x % WARP, pairs_base = pairs.base(lane);
    const u64 stride = u64(gridDim.x) * blockDim.x * 8;
    for (u64 first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; first < n; first += stride) {
        const float scale = scales.get(first >> log2_block);
        if (!(fabsf(scale) >= 1e-30f && fabsf(scale) <= 1e30f)) continue;
        const float inverse = __frcp_rn(scale);
        const bool whole = aligned && first + 8 <= n;
        Eight<T> x;
        if (whole) {
            x.load(a + first);
        } else {
            float v[8];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) v[i] = first + i < n ? to_float(a[first + i]) : 0.f;
            x.set(v);
        }
        u32 word = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            float value;
            PairTable::nearest(pairs_base, fmaxf(fminf(x.get(i) * inverse, 1.5f), -1.5f), 1.f, 16.f, value);
            word = word << 4 | (as_bits(value) & 15);
        }
        word = __byte_perm(word, 0, 0x0123);
        if (whole) {
            *reinterpret_cast<u32*>(packed + first / 2) = word;
        } else {
            for (u32 i = 0; i < 4; ++i)
                if (first + 2 * i < n) packed[first / 2 + i] = u8(word >> (8 * i));
        }
    }
}

#define SEARCH(dtype, T)                                                                                                        \
    KERNEL __launch_bounds__(256, 3) search_4bit_##dtype(const T* a,        /* [n] */                                           \
                                                         u64 n,             /* elements */                                      \
                                                         u8* packed,        /* [(n + 1) / 2] */                                 \
                                                         float* absmax,     /* [ceil(n / 2^log2_block)] */                      \
                                                         u32 log2_block,    /* 5 … 12 */                                        \
                                                         u32 kind,          /* 0 NF4, 1 FP4 */                                  \
                                                         u32 aligned) {     /* a to 16 bytes and packed to 8 */                 \
        search<T>(a, n, packed, absmax, log2_block, kind, aligned);                                                             \
    }
SEARCH(bf16, Bf16)
SEARCH(f16, F16)
SEARCH(f32, F32)

#define ENCODE(dtype, T)                                                                                                        \
    KERNEL __launch_bounds__(256) encode_4bit_##dtype(const T* a,           /* [n] */                                           \
                                                      u64 n, u8* packed,    /* [(n + 1) / 2] */                                 \
                                                      const void* absmax,   /* fp32, or u8 codes if nested */                   \
                                                      const float* nested,  /* fp32; null when plain */                         \
                                                      const float* map,     /* fp32 [256] */                                    \
                                                      const float* offset,  /* fp32 [1] */                                      \
                                                      u32 nested_shift,     /* log2 of codes to a nested scale */               \
                                                      u32 log2_block, u32 kind,                                                 \
                                                      u32 aligned) {        /* a to 16 bytes and packed to 4 */                 \
        encode<T>(a, n, packed, Scales{absmax, nested, map, offset, nested_shift}, log2_block, kind, aligned);                  \
    }
ENCODE(bf16, Bf16)
ENCODE(f16, F16)
ENCODE(f32, F32)
