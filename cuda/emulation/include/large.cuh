// In place of cuda/include/large.cuh.
#pragma once
#include "shared.cuh"

template <class T> float2 values_of(u32 pair);
template <> inline float2 values_of<Bf16>(u32 pair) { return {machine::from_f16(u16(pair)), machine::from_f16(u16(pair >> 16))}; }
template <> inline float2 values_of<F16>(u32 pair) { return {float(pair & 0xffff) - 32768.f, float(pair >> 16) - 32768.f}; }
template <class T> u32 pack(float low, float high) { return Pack<T>::two(low, high); }

inline void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
    const u32 lane = machine::thread() % 32, g = lane / 4, t = lane % 4, words[4] = {a, b, c, d};
    for (u32 i = 0; i < 4; ++i)
        for (u32 e = 0; e < 2; ++e) {
            const u32 row = machine::exchange(at, i * 8 + 2 * t + e);
            machine::store(row + g * 2, u16(words[i] >> 16 * e));
        }
    machine::sync_warp();
}
