// In place of cuda/include/mma_sync.cuh.
#pragma once
#include "common.cuh"

template <class T> void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 lane = machine::thread() % 32, g = lane / 4, t = lane % 4;
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    auto* const all = machine::scratch();
    std::memcpy(all[lane], mine, sizeof mine);
    machine::sync_warp();
    auto element = [&](u32 from, u32 word, u32 k) { return double(to_float(T{u16(all[from][word] >> k % 2 * 16)})); };
    float sums[4];
    for (u32 i = 0; i < 4; ++i) {
        const u32 column = 2 * t + i % 2;
        double sum = d[i];
        for (u32 k = 0; k < 16; ++k)
            sum += element(g * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k) * element(column * 4 + k % 8 / 2, 4 + k / 8, k);
        sums[i] = float(sum);
    }
    machine::sync_warp();
    std::memcpy(d, sums, sizeof sums);
}
