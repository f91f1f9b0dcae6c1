// What all kernels share: integer names, element types, conversions. No toolkit header is included, so that the PTX holds
// nothing but the kernels and NVRTC needs no include path.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// Addresses of shared memory are the 32-bit ones of its window.
DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Element types. Arithmetic is always fp32: these only say how 16 bits become a float and back.
struct Bf16 { u16 bits; };
struct F16 { u16 bits; };
struct F32 { float value; };

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

DEVICE float to_float(F32 x) { return x.value; }
DEVICE float to_float(Bf16 x) { return as_float(u32(x.bits) << 16); }
DEVICE float to_float(F16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Two 16-bit elements in a word, the first in the low half: from two floats (to nearest even, NaN stays NaN), and the larger
// and the smaller of each.
template <class T> struct Pack;
template <> struct Pack<Bf16> {
#if __CUDA_ARCH__ >= 800
    static DEVICE u32 larger(u32 a, u32 b) {
        u32 r;
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
    static DEVICE u32 smaller(u32 a, u32 b) {
        u32 r;
        asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
#endif
    static DEVICE u32 two(float low, float high) {
#if __CUDA_ARCH__ >= 800
        u32 r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
#else
        auto one = [](float x) {
            u32 b = as_bits(x);
            return x != x ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
        };
        return one(low) | one(high) << 16;
#endif
    }
};
template <> struct Pack<F16> {
#if __CUDA_ARCH__ >= 800
    static DEVICE u32 larger(u32 a, u32 b) {
        u32 r;
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
    static DEVICE u32 smaller(u32 a, u32 b) {
        u32 r;
        asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }
#endif
    static DEVICE u32 two(float low, float high) {
        u16 l, h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
        return u32(l) | u32(h) << 16;
    }
};

template <class T> DEVICE T from_float(float x) { return T{u16(Pack<T>::two(x, 0.f))}; }
template <> DEVICE F32 from_float<F32>(float x) { return F32{x}; }

// Eight consecutive elements as they lie in memory: 16 bytes, or 32 for fp32.
template <class T> struct Eight {
    uint4 raw;
    DEVICE void load(const T* p) { raw = __ldg(reinterpret_cast<const uint4*>(p)); }
    DEVICE void store(T* p) const { *reinterpret_cast<uint4*>(p) = raw; }
    DEVICE float get(int i) const {
        u32 word = i < 2 ? raw.x : i < 4 ? raw.y : i < 6 ? raw.z : raw.w;  // i is a constant after unrolling
        return to_float(T{u16(i & 1 ? word >> 16 : word)});
    }
    DEVICE void set(const float (&v)[8]) {
        raw = make_uint4(Pack<T>::two(v[0], v[1]), Pack<T>::two(v[2], v[3]), Pack<T>::two(v[4], v[5]), Pack<T>::two(v[6], v[7]));
    }
    // Moves four elements up, and four of the next eight in.
    DEVICE void shift(const Eight& next) { raw = make_uint4(raw.z, raw.w, next.raw.x, next.raw.y); }
};
template <> struct Eight<F32> {
    float4 low, high;
    DEVICE void load(const F32* p) {
        low = __ldg(reinterpret_cast<const float4*>(p));
        high = __ldg(reinterpret_cast<const float4*>(p) + 1);
    }
    DEVICE void store(F32* p) const {
        reinterpret_cast<float4*>(p)[0] = low;
        reinterpret_cast<float4*>(p)[1] = high;
    }
    DEVICE float get(int i) const {
        return i == 0 ? low.x : i == 1 ? low.y : i == 2 ? low.z : i == 3 ? low.w
             : i == 4 ? high.x : i == 5 ? high.y : i == 6 ? high.z : high.w;
    }
    DEVICE void set(const float (&v)[8]) {
        low = make_float4(v[0], v[1], v[2], v[3]);
        high = make_float4(v[4], v[5], v[6], v[7]);
    }
    DEVICE void shift(const Eight& next) { low = high, high = next.low; }
};

// The largest magnitude, on bit patterns: as integers the magnitudes of floats keep their order, and NaN is above infinity,
// so that a NaN in a block reaches its absmax on every architecture.
DEVICE u32 magnitude(float x) { return as_bits(x) & 0x7fffffffu; }

// The largest magnitude of 8·N elements, as fp32 bits.
template <class T, int N> DEVICE u32 magnitude(const Eight<T> (&x)[N]) {
#if __CUDA_ARCH__ >= 800
    constexpr bool PAIRS = sizeof(T) == 2;
#else
    constexpr bool PAIRS = false;
#endif
    u32 m = 0;
    if constexpr (PAIRS) {
        // Two at a time: the highest and the lowest. Both instructions pass NaN on.
        u32 high = x[0].raw.x, low = x[0].raw.x;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            high = Pack<T>::larger(Pack<T>::larger(high, x[i].raw.x), x[i].raw.y);
            high = Pack<T>::larger(Pack<T>::larger(high, x[i].raw.z), x[i].raw.w);
            low = Pack<T>::smaller(Pack<T>::smaller(low, x[i].raw.x), x[i].raw.y);
            low = Pack<T>::smaller(Pack<T>::smaller(low, x[i].raw.z), x[i].raw.w);
        }
        const u32 pair = Pack<T>::larger(high & 0x7fff7fffu, low & 0x7fff7fffu);
        m = max(as_bits(to_float(T{u16(pair)})), as_bits(to_float(T{u16(pair >> 16)})));
    } else {
#pragma unroll
        for (int i = 0; i < 8 * N; ++i) m = max(m, magnitude(x[i / 8].get(i % 8)));
    }
    return m;
}

// 1 / absmax, finite for 0, x̂ = x · inverse. The approximate reciprocal (an ulp at the most) is what bitsandbytes' CUDA code has,
// so that x̂ is the same to the bit.
DEVICE float inverse_of(float absmax) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(absmax, 0x1p-126f)));
    return r;
}

// Scales of a tensor's blocks. Plain: absmax[i], fp32. Nested (double quantization):
//   map[codes[i]] * nested[i >> nested_shift] + *offset       two roundings, as the format's other readers compute it
struct Scales {
    const void* absmax;   // fp32 [blocks], or u8 codes [blocks]
    const float* nested;  // fp32 [blocks >> nested_shift, rounded up]; null when plain
    const float* map;     // fp32 [256]
    const float* offset;  // fp32 [1]
    u32 nested_shift;
    DEVICE float get(u64 i) const {
        if (nested == nullptr) return __ldg(static_cast<const float*>(absmax) + i);
        u8 code = __ldg(static_cast<const u8*>(absmax) + i);
        return __fadd_rn(__fmul_rn(__ldg(map + code), __ldg(nested + (i >> nested_shift))), __ldg(offset));
    }
};
