// In place of cuda/include/shared.cuh.
#pragma once
#include "common.cuh"

inline u32 load_word(u32 at) { return machine::load<u32>(at); }
inline u32 load_two_bytes(u32 at) { return machine::load<u16>(at); }
inline uint2 load_uint2(u32 at) { return machine::load<uint2>(at); }
inline uint4 load_uint4(u32 at) { return machine::load<uint4>(at); }
inline float load_float(u32 at) { return machine::load<float>(at); }
inline float2 load_float2(u32 at) { return machine::load<float2>(at); }
inline float4 load_float4(u32 at) { return machine::load<float4>(at); }
inline u32 look_up(u32 at) { return machine::load<u32>(at); }
inline void store_words(u32 at, u32 a, u32 b, u32 c, u32 d) { machine::store(at, uint4{a, b, c, d}); }
inline void store_float(u32 at, float v) { machine::store(at, v); }
inline void store_float4(u32 at, float4 v) { machine::store(at, v); }
