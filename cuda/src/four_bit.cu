// 4-bit quantize and dequantize (NF4, FP4).
//
// The tensor is n elements in blocks of 2^log2_block (32 … 4096), the last block ragged:
//   absmax[b] = max |x| of block b                 packed byte j = q[2j] << 4 | q[2j+1],  q = code of x / absmax
//   x' = value[q] * absmax[b]
//
// Both walk the tensor in groups of 256 elements, one warp a group, 8 elements a lane:
//
//   lane        0        1              31
//   elements    0 … 7    8 … 15   …     248 … 255       16 bytes of bf16 a lane, 512 a warp
//   packed      4 bytes  4 bytes        4 bytes         128 bytes a warp: both sides coalesced
//
// A block of 2^b ≤ 256 elements belongs to 2^(b−3) neighbouring lanes, so that its absmax is b−3 shuffles. A larger one belongs to
// 2^(b−9) neighbouring warps of 512 elements each, which meet in shared memory. Every element is read once.
// Grid: enough blocks of 8 warps to fill the GPU, each strides over the tensor. Bytes moved an element: size + 0.5 + 4/2^b.
// From sm_75 and PTX 6.3 on.
#include "codebook.cuh"

// Largest magnitude over the lanes that share a block.
DEVICE u32 block_max(u32 m, u32 log2_block) {
    u32 lanes = log2_block >= 8 ? WARP : 1u << (log2_block - 3);
    for (u32 step = 1; step < lanes; step <<= 1) m = max(m, __shfl_xor_sync(ALL_LANES, m, step));
    return m;
}

constexpr u32 QUANTIZE_WARPS = 8, QUANTIZE_GROUPS = 2;  // groups of 256 a warp at a time: loads in flight

// WIDE: blocks of 512 and more.
template <class T, bool WIDE>
DEVICE void quantize(const T* a, u64 n, u8* packed, float* absmax, u32 log2_block, u32 kind, u32 aligned) {
    __shared__ uint2 entries[EncodeTable::SIZE];
    __shared__ u32 warp_max[2][QUANTIZE_WARPS];  // two, so that one barrier a round is enough
    EncodeTable table{entries};
    table.fill(kind);
    __syncthreads();

    constexpr u32 SPAN = 256 * QUANTIZE_GROUPS, ROUND = SPAN * QUANTIZE_WARPS;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 turn = 0;
    for (u64 round = u64(blockIdx.x) * ROUND; round < n; round += u64(gridDim.x) * ROUND, turn ^= 1) {
        const u64 base = round + warp * SPAN;
        const bool whole = aligned && base + SPAN <= n;
        Eight<T> x[QUANTIZE_GROUPS];
#pragma unroll
        for (u32 g = 0; g < QUANTIZE_GROUPS; ++g) {
            const u64 first = base + g * 256 + lane * 8;
            if (whole) {
                x[g].load(a + first);
            } else {
                float v[8];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) v[i] = first + i < n ? to_float(a[first + i]) : 0.f;
                x[g].set(v);
            }
        }

        u32 m[QUANTIZE_GROUPS];
#pragma unroll
        for (u32 g = 0; g < QUANTIZE_GROUPS; ++g) m[g] = magnitude(x[g]);
        if (WIDE) {
            const u32 mine = block_max(max(m[0], m[1]), 8);
            if (lane == 0) warp_max[turn][warp] = mine;
            __syncthreads();
            const u32 warps = 1u << (log2_block - 9);  // that share a block
            u32 all = 0;
            for (u32 w = warp & ~(warps - 1), end = w + warps; w < end; ++w) all = max(all, warp_max[turn][w]);
            m[0] = m[1] = all;
        } else {
#pragma unroll
            for (u32 g = 0; g < QUANTIZE_GROUPS; ++g) m[g] = block_max(m[g], log2_block);
        }

#pragma unroll
        for (u32 g = 0; g < QUANTIZE_GROUPS; ++g) {
            const u64 first = base + g * 256 + lane * 8;
            const float scale = as_float(m[g]);
            // With a NaN or an infinity in it a block has no scale to speak of: x̂ is 0, or NaN for those themselves.
            const float inverse = m[g] < 0x7f800000u ? inverse_of(scale) : 0.f, inverse16 = inverse * 16.f;
            if ((first & ((1u << log2_block) - 1)) == 0 && first < n) absmax[first >> log2_block] = scale;
            // The first element ends up in the highest nibble, that is, in the first byte after turning the bytes round.
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) word = word * 16 + table.encode(x[g].get(i), inverse, inverse16, lane);
            word = __byte_perm(word, 0, 0x0123);
            if (whole) {
                *reinterpret_cast<u32*>(packed + first / 2) = word;
            } else {
                // Past the end the elements were zeros: an odd last nibble gets zero's code, bytes past it are not written.
                for (int i = 0; i < 4; ++i)
                    if (first + 2 * i < n) packed[first / 2 + i] = u8(word >> (8 * i));
            }
        }
    }
}

template <class T>
DEVICE void dequantize(const u8* packed, Scales scales, T* out, u64 n, u32 log2_block, u32 kind, u32 aligned) {
    __shared__ float words[ValueTable::SIZE];
    ValueTable table{words};
    table.fill(kind);
    __syncthreads();

    constexpr int GROUPS = 4;  // loads in flight: 4 × (4 + 4) bytes a lane
    constexpr u64 SPAN = 256 * GROUPS;
    u32 lane = threadIdx.x % WARP;
    u64 warps = u64(gridDim.x) * (blockDim.x / WARP);
    for (u64 base = (u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP) * SPAN; base < n; base += warps * SPAN) {
        if (aligned && base + SPAN <= n) {
            u32 word[GROUPS];
            float scale[GROUPS];
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                u64 first = base + g * 256 + lane * 8;
                word[g] = __ldg(reinterpret_cast<const u32*>(packed + first / 2));
                scale[g] = scales.get(first >> log2_block);
            }
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                float v[8];
                table.decode(word[g], lane, v);
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] *= scale[g];
                Eight<T> y;
                y.set(v);
                y.store(out + base + g * 256 + lane * 8);
            }
        } else {
            for (u64 at = base + lane; at < base + SPAN && at < n; at += WARP) {
                u32 byte = packed[at / 2];
                u32 q = at % 2 ? byte & 15 : byte >> 4;
                out[at] = from_float<T>(words[q * WARP + lane] * scales.get(at >> log2_block));
            }
        }
    }
}

#define QUANTIZE(name, T, wide)                                                                                                 \
    KERNEL __launch_bounds__(256) quantize_4bit_##name(const T* a,        /* [n] */                                             \
                                                       u64 n,             /* elements */                                        \
                                                       u8* packed,        /* [(n + 1) / 2] */                                   \
                                                       float* absmax,     /* [ceil(n / 2^log2_block)] */                        \
                                                       u32 log2_block,    /* 5 … 8; wide 9 … 12 */                              \
                                                       u32 kind,          /* 0 NF4, 1 FP4 */                                    \
                                                       u32 aligned) {     /* a to 16 bytes and packed to 4 */                   \
        quantize<T, wide>(a, n, packed, absmax, log2_block, kind, aligned);                                                     \
    }
QUANTIZE(bf16, Bf16, false)
QUANTIZE(f16, F16, false)
QUANTIZE(f32, F32, false)
QUANTIZE(wide_bf16, Bf16, true)
QUANTIZE(wide_f16, F16, true)
QUANTIZE(wide_f32, F32, true)

#define DEQUANTIZE(dtype, T)                                                                                                    \
    KERNEL __launch_bounds__(256) dequantize_4bit_##dtype(const u8* packed,     /* [(n + 1) / 2] */                             \
                                                          const void* absmax,   /* fp32, or u8 codes if nested */               \
                                                          const float* nested,  /* fp32; null when plain */                     \
                                                          const float* map,     /* fp32 [256] */                                \
                                                          const float* offset,  /* fp32 [1] */                                  \
                                                          u32 nested_shift,     /* log2 of codes to a nested scale */           \
                                                          T* out,               /* [n] */                                       \
                                                          u64 n, u32 log2_block, u32 kind,                                      \
                                                          u32 aligned) {        /* packed to 4 bytes and out to 16 */           \
        dequantize<T>(packed, Scales{absmax, nested, map, offset, nested_shift}, out, n, log2_block, kind, aligned);            \
    }
DEQUANTIZE(bf16, Bf16)
DEQUANTIZE(f16, F16)
DEQUANTIZE(f32, F32)
