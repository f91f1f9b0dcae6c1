// 4-bit quantize and dequantize (NF4, FP4).
//
// The tensor is n elements in blocks of 2^log2_block (32 … 4096), the last block ragged:
//   absmax[b] = max |x| of block b                 packed byte j = q[2j] << 4 | q[2j+1],  q = code of x / absmax
//   x' = value[q] * absmax[b]
//
// Quantize goes by tiles (tile.cuh): a lane has 32 neighbouring elements, all of one block. Grid: enough blocks of threads to fill
// the GPU, each strides over the tensor, so that the table is made once. Every element is read once.
// Dequantize walks the tensor in groups of 256 elements, one warp a group, 8 elements a lane, two groups a warp and no loop:
//
//   lane        0        1              31
//   packed      4 bytes  4 bytes        4 bytes         128 bytes a warp
//   elements    0 … 7    8 … 15   …     248 … 255       16 bytes of bf16 a lane, 512 a warp: both sides coalesced
//
// Bytes moved an element, both ways: size + 0.5 + 4/2^b.
// From sm_75 and PTX 6.3 on.
#include "codebook.cuh"
#include "encode.cuh"
#include "tile.cuh"

template <class T>
DEVICE void quantize(const T* a, u64 n, u8* packed, float* absmax, u32 log2_block, u32 kind, u32 aligned) {
    __shared__ __align__(256) uint2 entries[EncodeTable::SIZE];
    __shared__ u32 warp_max[2][WARPS<T>];
    extern __shared__ __align__(128) u8 stages[];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, stride = gridDim.x * WARPS<T>;
    const Ring<T> ring(shared_address(stages) + warp * Ring<T>::BYTES, a, n, aligned, lane);
    const EncodeTable table(entries, lane);
    u32 tile = blockIdx.x * WARPS<T> + warp, turn = 0;
    ring.fetch(turn, tile);
    EncodeTable::fill(entries, kind);
    __syncthreads();

    // All warps of a block of threads take as many turns: they may share a block of elements.
    for (const u32 end = u32((n + TILE - 1) / TILE); tile - warp < end; tile += stride, turn ^= 1) {
        Eight<T> x[4];
        ring.read(turn, tile, x);
        ring.fetch(turn ^ 1, tile + stride);

        const u32 m = block_max(magnitude(x), log2_block, warp_max, turn);
        const float scale = as_float(m);
        float inverse = inverse_of(scale);
        if (m - 1 >= 0x7f7fffffu) {
            // With a NaN or an infinity in it a block has no scale to speak of: those become the highest code, the rest zero.
            // A block of zeros has code 0 throughout, as bitsandbytes' 0 · (1 / 0) has.
            const float rest = m == 0 && kind == NF4 ? -1.f : 0.f;
            inverse = 1.f;
#pragma unroll
            for (u32 g = 0; g < 4; ++g) {
                float v[8];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) v[i] = magnitude(x[g].get(i)) >= 0x7f800000u ? 1.f : rest;
                x[g].set(v);
            }
        }
        const u64 first = u64(tile) * TILE + lane * 32;
        if ((u32(first) & ((1u << log2_block) - 1)) == 0 && first < n) absmax[first >> log2_block] = scale;
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 g = 0; g < 4; ++g) {
            // Bytes in memory order: of the last two elements first, the even one in the high nibble.
#pragma unroll
            for (int i = 0; i < 8; ++i) table.append(words[g], x[g].get(i ^ 6), inverse);
        }
        if (kind != NF4) {
#pragma unroll
            for (u32 g = 0; g < 4; ++g) words[g] = EncodeTable::fp4_codes(words[g]);
        }
        // Past the end the elements were zeros: an odd last nibble gets zero's code.
        ring.write(turn, tile, words, packed, n / 2 + n % 2);
    }
}

template <class T>
DEVICE void dequantize(const u8* packed, Scales scales, T* out, u64 n, u32 log2_block, u32 kind, u32 aligned) {
    __shared__ float words[ValueTable::SIZE];
    __shared__ float map[256];
    const ValueTable table{words};
    constexpr u32 GROUPS = 2, SPAN = 256 * GROUPS;
    const u32 lane = threadIdx.x % WARP;
    const u64 base = (u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP) * SPAN;
    const bool whole = aligned && base + SPAN <= n, nested = scales.nested != nullptr;
    // Everything is asked for before the tables are made.
    u32 word[GROUPS], code[GROUPS];
    float scale[GROUPS], offset = 0.f;
    if (whole) {
#pragma unroll
        for (u32 g = 0; g < GROUPS; ++g) {
            const u64 first = base + g * 256 + lane * 8, block = first >> log2_block;
            word[g] = __ldg(reinterpret_cast<const u32*>(packed + first / 2));
            if (nested) {
                code[g] = __ldg(static_cast<const u8*>(scales.absmax) + block);
                scale[g] = __ldg(scales.nested + (block >> scales.nested_shift));
            } else {
                scale[g] = __ldg(static_cast<const float*>(scales.absmax) + block);
            }
        }
    }
    if (nested) {
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x) map[i] = __ldg(scales.map + i);
        offset = __ldg(scales.offset);
    }
    table.fill(kind);
    __syncthreads();
    if (whole) {
#pragma unroll
        for (u32 g = 0; g < GROUPS; ++g) {
            if (nested) scale[g] = __fadd_rn(__fmul_rn(map[code[g]], scale[g]), offset);
            float v[8];
            table.decode(word[g], lane, v);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] *= scale[g];
            Eight<T> y;
            y.set(v);
            y.store(out + base + g * 256 + lane * 8);
        }
    } else {
#pragma unroll 1
        for (u64 at = base + lane; at < base + SPAN && at < n; at += WARP) {
            const u32 byte = packed[at / 2], q = at % 2 ? byte & 15 : byte >> 4;
            out[at] = from_float<T>(words[q * WARP + lane] * scales.get(at >> log2_block));
        }
    }
}

#define QUANTIZE(dtype, T)                                                                                                      \
    KERNEL __launch_bounds__(WARPS<T> * 32, 32 / WARPS<T>) quantize_4bit_##dtype(                                                \
        const T* a,     /* [n] */                                                                                               \
        u64 n,          /* elements */                                                                                          \
        u8* packed,     /* [(n + 1) / 2] */                                                                                     \
        float* absmax,  /* [ceil(n / 2^log2_block)] */                                                                          \
        u32 log2_block, /* 5 … 12 */                                                                                            \
        u32 kind,       /* 0 NF4, 1 FP4 */                                                                                      \
        u32 aligned) {  /* a and packed to 16 bytes */                                                                          \
        quantize<T>(a, n, packed, absmax, log2_block, kind, aligned);                                                           \
    }
QUANTIZE(bf16, Bf16)
QUANTIZE(f16, F16)
QUANTIZE(f32, F32)

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
