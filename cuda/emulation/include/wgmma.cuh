// In place of cuda/include/wgmma.cuh.
#pragma once
#include "warpgroup.cuh"

// The left operand is in registers, of which the MMA reads those of a lane's quad when it happens.
template <class T, int N> struct Wgmma {
    static void add(float (&d)[N / 2], const u32 (&a)[4], u64 right, bool fresh) {
        const u32 lane = machine::thread() % 32, rank = machine::rank();
        struct Quad { const u32* registers[4]; } quad;
        for (u32 t = 0; t < 4; ++t) {
            const u64 mine = reinterpret_cast<u64>(static_cast<const u32*>(a));
            const u64 low = machine::exchange(u32(mine), (lane & ~3u) | t), high = machine::exchange(u32(mine >> 32), (lane & ~3u) | t);
            quad.registers[t] = reinterpret_cast<const u32*>(high << 32 | low);
        }
        float* const sums = d;
        machine::mma_issue([=] {
            for (u32 j = 0; j < N / 2; ++j) {
                double sum = fresh ? 0.0 : double(sums[j]);
                for (u32 k = 0; k < 16; ++k) {
                    const u32 pair = quad.registers[k % 8 / 2][j / 2 % 2 + k / 8 * 2];
                    const T weight{u16(pair >> k % 2 * 16)};
                    sum += double(to_float(weight)) * operand_element<T>(right, j / 4 * 8 + lane % 4 * 2 + j % 2, k, rank);
                }
                sums[j] = float(sum);
            }
        });
    }
};
