// Blockwise 8-bit quantize and dequantize with any rising map of 256 fp32 entries.
//
//   absmax[b] = max |x − offset| of block b        q = index of the map's entry nearest to (x − offset) / absmax
//   x' = map[q] * absmax[b] + offset               q changes where the value passes the fp32 midpoint of two entries
//
// offset is a device fp32 or absent. Where it is there, x is the scales of another quantization. Blocks of 2^5 … 2^12 elements
// go by tiles (tile.cuh), as those of four_bit.cu; for blocks of any other size a warp takes one at a time and reads it twice.
// Grid: enough blocks of threads to fill the GPU, each strides over the tensor. Bytes moved an element: size + 1 + 4/block.
// From sm_75 and PTX 6.3 on.
#include "common.cuh"
#include "search_table.cuh"
#include "tile.cuh"

using Table = SearchTable<6, true>;

// x̂ = (x − shift) / absmax into [−1, 1]; NaN becomes 1. `inverse` is 1 / absmax, finite for 0.
DEVICE float clamp_unit(float x) { return fmaxf(fminf(x, 1.f), -1.f); }

template <class T>
DEVICE void quantize(const T* a, u64 n, const float* map, const float* offset, u8* codes, float* absmax, u32 log2_block, u32 aligned) {
    constexpr bool SHIFTED = sizeof(T) == 4;  // scales are fp32
    __shared__ Table table;
    __shared__ Midpoints midpoints;
    __shared__ u32 warp_max[2][WARPS<T>];
    extern __shared__ __align__(128) u8 stages[];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, stride = gridDim.x * WARPS<T>;
    const Ring<T> ring(shared_address(stages) + warp * Ring<T>::BYTES, a, n, aligned, lane);
    u32 tile = blockIdx.x * WARPS<T> + warp, turn = 0;
    ring.fetch(turn, tile);
    table.fill(map, midpoints);
    const float shift = SHIFTED && offset != nullptr ? *offset : 0.f;
    const bool crowded = midpoints.crowded;

    // All warps of a block of threads take as many turns: they may share a block of elements.
    for (const u32 end = u32((n + TILE - 1) / TILE); tile - warp < end; tile += stride, turn ^= 1) {
        Eight<T> x[4];
        ring.read(turn, tile, x);
        ring.fetch(turn ^ 1, tile + stride);
        const u64 first = u64(tile) * TILE + lane * 32;

        if constexpr (SHIFTED) {
            // What is past the end counts for nothing.
            const bool whole = ring.is_whole(tile);
#pragma unroll
            for (u32 g = 0; g < 4; ++g) {
                float v[8];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) v[i] = whole || first + g * 8 + i < n ? x[g].get(i) - shift : 0.f;
                x[g].set(v);
            }
        }
        const u32 m = block_max(magnitude(x), log2_block, warp_max, turn);
        const float scale = as_float(m), inverse = inverse_of(scale);
        if ((u32(first) & ((1u << log2_block) - 1)) == 0 && first < n) absmax[first >> log2_block] = scale;
        u32 words[8] = {};
        if (!crowded && scale < 0x1p20f) {  // so that the scaled inverse is exact
            const float scaled = inverse * 0x1p-100f;
#pragma unroll
            for (u32 i = 0; i < 32; i += 4) {
                auto code = [&](u32 j) { return table.encode(x[j / 8].get(j % 8) * scaled); };
                words[i / 4] = top_bytes(code(i), code(i + 1), code(i + 2), code(i + 3));
            }
        } else {
            // Four at a time, the others moving up: indices of registers are constants.
#pragma unroll 1
            for (u32 i = 0; i < 32; i += 4) {
                auto code = [&](u32 j) { return table.search(clamp_unit(x[0].get(j) * inverse), midpoints); };
                const u32 word = top_bytes(code(0), code(1), code(2), code(3));
#pragma unroll
                for (u32 w = 0; w < 7; ++w) words[w] = words[w + 1];
                words[7] = word;
#pragma unroll
                for (u32 g = 0; g < 4; ++g) x[g].shift(x[g < 3 ? g + 1 : 3]);
            }
        }
        ring.write(turn, tile, words, codes, n);
    }
}

// Blocks of any size: a warp takes one at a time.
template <class T>
DEVICE void quantize_any(const T* a, u64 n, const float* map, const float* offset, u8* codes, float* absmax, u32 block) {
    __shared__ Table table;
    __shared__ Midpoints midpoints;
    table.fill(map, midpoints);
    const u32 lane = threadIdx.x % WARP;
    const float shift = offset == nullptr ? 0.f : *offset;
    const u64 blocks = (n + block - 1) / block, warps = u64(gridDim.x) * (blockDim.x / WARP);
    for (u64 b = u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP; b < blocks; b += warps) {
        const u64 base = b * block;
        const u32 length = u32(min(u64(block), n - base));
        u32 m = 0;
        for (u32 i = lane; i < length; i += WARP) m = max(m, magnitude(to_float(a[base + i]) - shift));
#pragma unroll
        for (u32 step = WARP / 2; step > 0; step >>= 1) m = max(m, __shfl_xor_sync(ALL_LANES, m, step));
        const float scale = as_float(m), inverse = inverse_of(scale);
        if (lane == 0) absmax[b] = scale;
        for (u32 i = lane; i < length; i += WARP)
            codes[base + i] = u8(table.search(clamp_unit((to_float(a[base + i]) - shift) * inverse), midpoints) >> 24);
    }
}

template <class T>
DEVICE void dequantize(const u8* codes, const float* map, const float* absmax, const float* offset, T* out, u64 n, u32 block,
                       u32 aligned) {
    __shared__ float values[256];
    constexpr u32 GROUPS = 2, SPAN = 256 * GROUPS;
    const u32 lane = threadIdx.x % WARP;
    const u64 base = (u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP) * SPAN;
    const bool whole = aligned && base + SPAN <= n && block % 8 == 0, power = (block & (block - 1)) == 0;
    const u32 log2_block = 31 - __clz(block);
    auto block_of = [&](u64 i) { return power ? i >> log2_block : i / block; };
    // Everything is asked for before the table is made.
    uint2 word[GROUPS];
    float scale[GROUPS];
    if (whole) {
#pragma unroll
        for (u32 g = 0; g < GROUPS; ++g) {
            const u64 first = base + g * 256 + lane * 8;
            word[g] = __ldg(reinterpret_cast<const uint2*>(codes + first));
            scale[g] = __ldg(absmax + block_of(first));
        }
    }
    for (u32 i = threadIdx.x; i < 256; i += blockDim.x) values[i] = __ldg(map + i);
    const bool shifted = offset != nullptr;
    const float shift = shifted ? *offset : 0.f;
    __syncthreads();
    auto value = [&](u32 q, float scale) {
        const float v = __fmul_rn(values[q], scale);
        return shifted ? __fadd_rn(v, shift) : v;
    };
    if (whole) {
#pragma unroll
        for (u32 g = 0; g < GROUPS; ++g) {
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = value((i < 4 ? word[g].x >> (8 * i) : word[g].y >> (8 * i - 32)) & 0xff, scale[g]);
            Eight<T> y;
            y.set(v);
            y.store(out + base + g * 256 + lane * 8);
        }
    } else {
#pragma unroll 1
        for (u64 at = base + lane; at < base + SPAN && at < n; at += WARP)
            out[at] = from_float<T>(value(codes[at], absmax[block_of(at)]));
    }
}

#define ALL(dtype, T)                                                                                                           \
    KERNEL __launch_bounds__(WARPS<T> * 32, 32 / WARPS<T>) quantize_8bit_##dtype(                                            \
        const T* a,          /* [n] */                                                                                          \
        u64 n,                                                                                                                  \
        const float* map,    /* [256], rising */                                                                                \
        const float* offset, /* [1] or null; null unless fp32 */                                                                \
        u8* codes,           /* [n] */                                                                                          \
        float* absmax,       /* [ceil(n / 2^log2_block)] */                                                                     \
        u32 log2_block,      /* 5 … 12 */                                                                                       \
        u32 aligned) {       /* a and codes to 16 bytes */                                                                      \
        quantize<T>(a, n, map, offset, codes, absmax, log2_block, aligned);                                                     \
    }                                                                                                                           \
    KERNEL __launch_bounds__(256) quantize_8bit_any_##dtype(const T* a,           /* [n] */                                     \
                                                            u64 n,                                                              \
                                                            const float* map,     /* [256], rising */                           \
                                                            const float* offset,  /* [1] or null */                             \
                                                            u8* codes,            /* [n] */                                     \
                                                            float* absmax,        /* [ceil(n / block)] */                       \
                                                            u32 block) {                                                        \
        quantize_any<T>(a, n, map, offset, codes, absmax, block);                                                               \
    }                                                                                                                           \
    KERNEL __launch_bounds__(256) dequantize_8bit_##dtype(const u8* codes,      /* [n] */                                       \
                                                          const float* map,     /* [256] */                                     \
                                                          const float* absmax,  /* [ceil(n / block)] */                         \
                                                          const float* offset,  /* [1] or null */                               \
                                                          T* out,               /* [n] */                                       \
                                                          u64 n, u32 block, u32 aligned) { /* codes and out to 16 bytes */      \
        dequantize<T>(codes, map, absmax, offset, out, n, block, aligned);                                                      \
    }
ALL(bf16, Bf16)
ALL(f16, F16)
ALL(f32, F32)
