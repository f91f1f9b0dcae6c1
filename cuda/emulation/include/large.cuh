// In place of cuda/include/large.cuh.
#pragma once
#include "shared.cuh"

template <class T> float2 values_of(u32 pair);
template <> inline float2 values_of<Bf16>(u32 pair) { return {machine::from_f16(u16(pair)), machine::from_f16(u16(pair >> 16))}; }
template <> inline float2 values_of<F16>(u32 pair) { return {float(pair & 0xffff) - 32768.f, float(pair >> 16) - 32768.f}; }
template <class T> u32 pack(float low, float high) { return Pack<T>::two(low, high); }
