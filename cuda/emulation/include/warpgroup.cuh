// In place of cuda/include/warpgroup.cuh.
#pragma once
#include "hopper.cuh"

// A matrix and its box, whose rows are 128 bytes.
struct TensorMap {
    const void* matrix;
    u64 columns, rows;
    u32 element_bytes, box_rows;
};
inline void prefetch_map(const TensorMap&) {}

// The 16 bytes of a row of 128 that lie elsewhere for it.
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row) {
    if (to % 1024) machine::fail("a box is misaligned");
    std::memset(machine::place(to, map.box_rows * 128), 0x7f, map.box_rows * 128);
    const TensorMap m = map;
    for (u32 begin = 0; begin < m.box_rows; begin += 32) {
        const u32 end = min(begin + 32, m.box_rows);
        machine::copy_box_part(barrier, (end - begin) * 128, [=](u8* window) {
            const u64 row_bytes = m.columns * m.element_bytes;
            for (u32 r = begin; r < end; ++r)
                for (u32 c = 0; c < 128; ++c) {
                    const u64 at = u64(column) * m.element_bytes + c;
                    const bool valid = row + r < m.rows && at < row_bytes;
                    window[swizzled((to & 0xffffff) + r * 128 + c)] = valid ? static_cast<const u8*>(m.matrix)[(row + r) * row_bytes + at] : 0;
                }
        });
    }
}
inline void fence_for_mma() { machine::fence(); }
template <int N> void more_registers() { machine::registers(N); }
template <int N> void fewer_registers() { machine::registers(N); }

inline void mma_fence() { machine::mma_fence(); }
inline void mma_commit() { machine::mma_commit(); }
template <int N> void mma_wait() { machine::mma_wait(N); }
template <class T, int N> void pin(T (&)[N]) {}
inline void keep(u32&) {}

inline void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
    const u32 lane = machine::thread() % 32, g = lane / 4, t = lane % 4, words[4] = {a, b, c, d};
    for (u32 i = 0; i < 4; ++i)
        for (u32 e = 0; e < 2; ++e) {
            const u32 row = machine::exchange(at, i * 8 + 2 * t + e);
            machine::store(row + g * 2, u16(words[i] >> 16 * e));
        }
    machine::sync_warp();
}

inline u64 swizzled_operand(u32 address) {
    if (address % 1024) machine::fail("an operand is misaligned");
    return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
inline u64 interleaved_operand(u32 address, u32 k_stride) {
    if (address % 16) machine::fail("an operand is misaligned");
    return u64(address >> 4 & 0x3fff) | u64(k_stride >> 4) << 16 | u64(128 >> 4) << 32;
}
// Where byte `byte` of a row of an operand is, found as the hardware finds it: a swizzle is of the whole address.
inline u32 operand_byte(u64 operand, u32 row, u32 byte, u32 rank) {
    const u32 start = u32(operand & 0x3fff) << 4, k_stride = u32(operand >> 16 & 0x3fff) << 4, eight_rows = u32(operand >> 32 & 0x3fff) << 4;
    const u32 rows = start + row / 8 * eight_rows;
    const u32 at = (operand >> 62 ? swizzled(rows + row % 8 * 128 + byte) : rows + byte / 16 * k_stride + row % 8 * 16 + byte % 16) | rank << 24;
    machine::must_be_fenced(at);
    return at;
}
template <class T> float operand_element(u64 operand, u32 row, u32 k, u32 rank) {
    return to_float(machine::peek<T>(operand_byte(operand, row, k * 2, rank)));
}

template <int N> void mma_s8(i32 (&d)[N / 2], u64 left, u64 right) {
    const u32 thread = machine::thread(), g = thread % 32 / 4, t = thread % 4, row = thread / 32 % 4 * 16 + g, rank = machine::rank();
    i32* const sums = d;
    machine::mma_issue([=] {
        auto byte = [&](u64 operand, u32 r, u32 k) { return i32(machine::peek<signed char>(operand_byte(operand, r, k, rank))); };
        for (u32 j = 0; j < N / 2; ++j)
            for (u32 k = 0; k < 32; ++k) sums[j] += byte(left, row + j / 2 % 2 * 8, k) * byte(right, j / 4 * 8 + 2 * t + j % 2, k);
    });
}
template <class T, int N> void mma_16(float (&d)[N / 2], u64 left, u64 right) {
    const u32 thread = machine::thread(), g = thread % 32 / 4, t = thread % 4, row = thread / 32 % 4 * 16 + g, rank = machine::rank();
    float* const sums = d;
    machine::mma_issue([=] {
        for (u32 j = 0; j < N / 2; ++j) {
            double sum = sums[j];
            for (u32 k = 0; k < 16; ++k)
                sum += double(operand_element<T>(left, row + j / 2 % 2 * 8, k, rank)) * operand_element<T>(right, j / 4 * 8 + 2 * t + j % 2, k, rank);
            sums[j] = float(sum);
        }
    });
}
