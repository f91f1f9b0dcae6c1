// What LLM.int8 kernels share: the scale of a row, the quantized value, and what is left of an element beside it.
//
//   s = max |x| of a row, outliers (|x| ≥ threshold > 0) left out;  q = round-half-even(x · (127 / s));  x ≈ q · s / 127
//
// Rows whose s is NaN or infinite have q = 0, so that products with them are NaN. Columns that have an outlier travel as a bitmap.
#pragma once
#include "common.cuh"

struct I32 { i32 value; };  // an output that is not scaled

// What x and the bias are, what outliers are multiplied as by an MMA, and whether they are: fp32's would lose precision.
template <class T> struct Types { using Float = T; using Half = T; enum { SCALED = true, OUTLIERS = true }; };
template <> struct Types<F32> { using Float = F32; using Half = Bf16; enum { SCALED = true, OUTLIERS = false }; };
template <> struct Types<I32> { using Float = Bf16; using Half = Bf16; enum { SCALED = false, OUTLIERS = false }; };

// How x becomes q. Both factors have one rounding each, as bitsandbytes has; `lift` is 1 but for rows so small that 127 / s is
// infinite, which are 2^100 times larger first.
struct RowScale {
    float lift, factor;
    DEVICE explicit RowScale(float s) {
        lift = s < 0x1p-110f ? 0x1p100f : 1.f;
        const float lifted = s * lift;
        // The approximate division is bitsandbytes'; it gives 0 beyond 2^126.
        factor = s > 0x1p120f ? __fdiv_rn(127.f, lifted) : __fdividef(127.f, lifted);
        if (!(s > 0.f) || !(s < as_float(0x7f800000u))) factor = 0.f;
    }
    // In the low byte. The sum rounds to an integer, half to even, as |x · factor| < 2^22; of NaN the byte must not be used.
    DEVICE u32 quantize(float x) const { return as_bits(__fadd_rn(__fmul_rn(x * lift, factor), 12582912.f)); }
    DEVICE bool empty() const { return factor == 0.f; }
};

// Eight elements that a kernel before this one may have written while this one was already there: not by way of the read-only path.
template <class T> DEVICE void load_written(Eight<T>& to, const T* from) { to.raw = *reinterpret_cast<const uint4*>(from); }
template <> DEVICE void load_written<F32>(Eight<F32>& to, const F32* from) {
    to.low = reinterpret_cast<const float4*>(from)[0];
    to.high = reinterpret_cast<const float4*>(from)[1];
}

DEVICE u32 pack_bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
DEVICE float byte_value(u32 word, int i) { return float(i32(word << (24 - 8 * i)) >> 24); }

// Whether an element is left out of its row. A threshold of 0 comes as NaN: nothing is.
DEVICE bool is_outlier(float x, float threshold) { return fabsf(x) >= threshold; }

// What x has beside q · s / 127: x itself where it is an outlier, as its q is 0.
DEVICE float residual(float x, float q, float s) { return fmaf(-q, s * (1.f / 127.f), x); }

// Any float type by number: 0 bf16, 1 fp16, 2 fp32.
DEVICE float load_any(const void* x, u64 i, u32 type) {
    if (type == 0) return to_float(static_cast<const Bf16*>(x)[i]);
    if (type == 1) return to_float(static_cast<const F16*>(x)[i]);
    return static_cast<const float*>(x)[i];
}

// Columns of the bitmap are listed so many at a time.
constexpr u32 WINDOW = 512;

// Columns of the bitmap, [skip, skip + WINDOW) of them, into `list`; how many there are in all. One warp.
DEVICE u32 list_columns(const u32* outliers, u32 K, u32 skip, u32* list, u32 lane) {
    const u32 words = (K + 31) / 32;
    u32 found = 0;
#pragma unroll 4
    for (u32 begin = 0; begin < words; begin += WARP) {
        u32 bits = begin + lane < words ? outliers[begin + lane] : 0;
        if (!__any_sync(ALL_LANES, bits != 0)) continue;
        u32 sum = __popc(bits);
        for (u32 i = 1; i < WARP; i *= 2) {
            const u32 before = __shfl_up_sync(ALL_LANES, sum, i);
            if (lane >= i) sum += before;
        }
        for (u32 at = found + sum - __popc(bits) - skip; bits != 0; bits &= bits - 1, ++at)
            if (at < WINDOW) list[at] = (begin + lane) * 32 + __ffs(bits) - 1;
        found += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    return found;
}

// d[16 × 8] += a[16 × 32] · b[8 × 32]ᵀ: lane (g, t) has of a bytes 4t … 4t + 3 of rows g and g + 8, then of bytes 16 on; of b those of
// row g.
DEVICE void mma_s8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};"
                : "+r"(d[2 * h]), "+r"(d[2 * h + 1])
                : "r"(a[2 * k + h]), "r"(b[k]));
#endif
}
