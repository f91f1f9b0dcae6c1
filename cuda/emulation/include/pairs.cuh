// In place of cuda/include/pairs.cuh.
#pragma once
#include "common.cuh"

template <class T> u32 difference(u32 a, u32 b) {
    auto value = [](u32 pair, u32 shift) { return to_float(T{u16(pair >> shift)}); };
    return Pack<T>::two(value(a, 0) - value(b, 0), value(a, 16) - value(b, 16));
}
