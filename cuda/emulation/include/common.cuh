// In place of cuda/include/common.cuh.
#pragma once
#include "machine.h"

#define DEVICE inline
#define KERNEL extern "C" void

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

inline u32 shared_address(const void* p) { return machine::address_of(p); }

struct Bf16 { u16 bits; };
struct F16 { u16 bits; };
struct F32 { float value; };

inline float as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u32 as_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float to_float(Bf16 x) { return machine::from_bf16(x.bits); }
inline float to_float(F16 x) { return machine::from_f16(x.bits); }

template <class T> struct Pack;
template <> struct Pack<Bf16> {
    static u32 two(float low, float high) { return machine::to_bf16(low) | u32(machine::to_bf16(high)) << 16; }
};
template <> struct Pack<F16> {
    static u32 two(float low, float high) { return machine::to_f16(low) | u32(machine::to_f16(high)) << 16; }
};
template <class T> T from_float(float x) { return T{u16(Pack<T>::two(x, 0.f))}; }

template <class T> struct Eight { uint4 raw; };
template <> struct Eight<F32> { float4 low, high; };

struct Scales {
    const void* absmax;
    const float *nested, *map, *offset;
    u32 nested_shift;
    float get(u64 i) const {
        if (nested == nullptr) return static_cast<const float*>(absmax)[i];
        return map[static_cast<const u8*>(absmax)[i]] * nested[i >> nested_shift] + *offset;
    }
};
