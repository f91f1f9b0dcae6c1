// Blockwise 8-bit quantize and dequantize with any rising map of 256 fp32 entries.
//
//   absmax[b] = max |x − offset| of block b        q = index of the map's entry nearest to (x − offset) / absmax
//   x' = map[q] * absmax[b] + offset               q changes where the value passes the fp32 midpoint of two entries
//
// Blocks of any size; offset is a device fp32 or absent. Where it is there, x is the scales of another quantization.
// Bytes moved an element: size + 1 + 4/block (quantize reads a block of up to 8 KB a second time, from the L1 cache).
// From sm_75 and PTX 6.3 on.
#include "common.cuh"

// Where to begin the search for a code: by sign, exponent and 6 mantissa bits of x̂. For the dynamic maps no such bucket holds
// more than one midpoint, so the search is one or two compares; for any other map it is right and takes more.
struct SearchTable {
    static constexpr u32 EXPONENTS = 26, PER_SIGN = EXPONENTS * 64 + 1;
    static constexpr u32 LEAST = (127 - EXPONENTS) << 6;  // everything below 2^-26 is one bucket
    float midpoints[256];  // midpoints[i] between entries i and i + 1; the last one is above everything
    u8 first[2][PER_SIGN];

    static DEVICE u32 bucket(float x) {
        u32 key = magnitude(x) >> 17;  // x̂ = ±1 is the last bucket
        return min(max(key, LEAST - 1) - (LEAST - 1), PER_SIGN - 1);
    }
    // The least magnitude of a bucket; 0 for the first.
    static DEVICE float least(u32 bucket) { return bucket == 0 ? 0.f : as_float((bucket + LEAST - 1) << 17); }

    DEVICE void fill(const float* map) {
        for (u32 i = threadIdx.x; i < 256; i += blockDim.x)
            midpoints[i] = i < 255 ? __fmul_rn(__fadd_rn(map[i], map[i + 1]), 0.5f) : as_float(0x7f800000u);
        __syncthreads();
        for (u32 i = threadIdx.x; i < 2 * PER_SIGN; i += blockDim.x) {
            u32 negative = i / PER_SIGN, b = i % PER_SIGN;
            // The lowest value of the bucket: for negative ones the largest magnitude, which is the next bucket's least.
            float low = negative ? (b + 1 < PER_SIGN ? -least(b + 1) : -1.f) : least(b);
            u32 lo = 0, hi = 255;  // the number of midpoints below `low`
            while (lo < hi) {
                u32 mid = (lo + hi) / 2;
                if (midpoints[mid] < low) lo = mid + 1; else hi = mid;
            }
            first[negative][b] = u8(lo);
        }
        __syncthreads();
    }
    DEVICE u32 encode(float x) const {
        u32 q = first[as_bits(x) >> 31][bucket(x)];
        while (x > midpoints[q]) ++q;  // ends at the last: nothing is above infinity
        return q;
    }
};

template <class T>
DEVICE void quantize(const T* a, u64 n, const float* map, const float* offset, u8* codes, float* absmax, u32 block, u32 aligned) {
    __shared__ SearchTable table;
    table.fill(map);
    u32 lane = threadIdx.x % WARP;
    float shift = offset == nullptr ? 0.f : *offset;
    u64 blocks = (n + block - 1) / block, warps = u64(gridDim.x) * (blockDim.x / WARP);
    bool vectors = aligned && block % 256 == 0;
    for (u64 b = u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP; b < blocks; b += warps) {
        u64 base = b * block;
        u32 length = u32(min(u64(block), n - base));
        bool whole = vectors && length == block;
        u32 m = 0;
        if (whole) {
#pragma unroll 4
            for (u32 i = lane * 8; i < length; i += 256) {
                Eight<T> x;
                x.load(a + base + i);
#pragma unroll
                for (int j = 0; j < 8; ++j) m = max(m, magnitude(x.get(j) - shift));
            }
        } else {
            for (u32 i = lane; i < length; i += WARP) m = max(m, magnitude(to_float(a[base + i]) - shift));
        }
#pragma unroll
        for (u32 step = WARP / 2; step > 0; step >>= 1) m = max(m, __shfl_xor_sync(ALL_LANES, m, step));
        float scale = as_float(m), inverse = inverse_of(scale);
        if (lane == 0) absmax[b] = scale;
        if (whole) {
#pragma unroll 2
            for (u32 i = lane * 8; i < length; i += 256) {
                Eight<T> x;
                x.load(a + base + i);
                u32 word[2] = {0, 0};
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    word[j / 4] |= table.encode(clamp_unit((x.get(j) - shift) * inverse)) << (8 * (j % 4));
                *reinterpret_cast<uint2*>(codes + base + i) = make_uint2(word[0], word[1]);
            }
        } else {
            for (u32 i = lane; i < length; i += WARP)
                codes[base + i] = u8(table.encode(clamp_unit((to_float(a[base + i]) - shift) * inverse)));
        }
    }
}

template <class T>
DEVICE void dequantize(const u8* codes, const float* map, const float* absmax, const float* offset, T* out, u64 n, u32 block,
                       u32 aligned) {
    __shared__ float values[256];
    for (u32 i = threadIdx.x; i < 256; i += blockDim.x) values[i] = map[i];
    __syncthreads();
    float shift = offset == nullptr ? 0.f : *offset;
    bool shifted = offset != nullptr;
    bool power = (block & (block - 1)) == 0;
    u32 log2_block = 31 - __clz(block);
    auto block_of = [&](u64 i) { return power ? i >> log2_block : i / block; };
    auto value = [&](u32 q, float scale) {
        float v = __fmul_rn(values[q], scale);
        return shifted ? __fadd_rn(v, shift) : v;
    };
    constexpr int GROUPS = 4;
    constexpr u64 SPAN = 256 * GROUPS;
    u32 lane = threadIdx.x % WARP;
    u64 warps = u64(gridDim.x) * (blockDim.x / WARP);
    for (u64 base = (u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP) * SPAN; base < n; base += warps * SPAN) {
        if (aligned && base + SPAN <= n && block % 8 == 0) {
            uint2 word[GROUPS];
            float scale[GROUPS];
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                u64 first = base + g * 256 + lane * 8;
                word[g] = __ldg(reinterpret_cast<const uint2*>(codes + first));
                scale[g] = __ldg(absmax + block_of(first));
            }
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                float v[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] = value((i < 4 ? word[g].x >> (8 * i) : word[g].y >> (8 * i - 32)) & 0xff, scale[g]);
                Eight<T> y;
                y.set(v);
                y.store(out + base + g * 256 + lane * 8);
            }
        } else {
            for (u64 at = base + lane; at < base + SPAN && at < n; at += WARP)
                out[at] = from_float<T>(value(codes[at], absmax[block_of(at)]));
        }
    }
}

#define BOTH(dtype, T)                                                                                                          \
    KERNEL __launch_bounds__(256) quantize_8bit_##dtype(const T* a,           /* [n] */                                         \
                                                        u64 n,                                                                  \
                                                        const float* map,     /* [256], rising */                               \
                                                        const float* offset,  /* [1] or null */                                 \
                                                        u8* codes,            /* [n] */                                         \
                                                        float* absmax,        /* [ceil(n / block)] */                           \
                                                        u32 block, u32 aligned) { /* a and codes to 16 bytes */                 \
        quantize<T>(a, n, map, offset, codes, absmax, block, aligned);                                                          \
    }                                                                                                                           \
    KERNEL __launch_bounds__(256) dequantize_8bit_##dtype(const u8* codes,      /* [n] */                                       \
                                                          const float* map,     /* [256] */                                     \
                                                          const float* absmax,  /* [ceil(n / block)] */                         \
                                                          const float* offset,  /* [1] or null */                               \
                                                          T* out,               /* [n] */                                       \
                                                          u64 n, u32 block, u32 aligned) { /* codes and out to 16 bytes */      \
        dequantize<T>(codes, map, absmax, offset, out, n, block, aligned);                                                      \
    }
BOTH(bf16, Bf16)
BOTH(f16, F16)
BOTH(f32, F32)
