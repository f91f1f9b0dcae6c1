// In place of cuda/include/bulk.cuh: what comes in. Bytes land in parts.
#pragma once
#include <vector>

#include "hopper.cuh"

inline void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (to % 16 || u64(from) % 16 || bytes % 16 || bytes == 0) machine::fail("a copy in bulk is misaligned");
    std::memset(machine::place(to, bytes), 0xff, bytes);  // NaN until it has landed
    constexpr u32 MOST = 256;
    for (u32 at = 0; at < bytes; at += MOST) {
        const u32 part = min(bytes - at, MOST), offset = (to & 0xffffff) + at;
        const u8* const begin = static_cast<const u8*>(from) + at;
        const std::vector<u8> data(begin, begin + part);
        machine::copy_box_part(barrier, part, [=](u8* window) { std::memcpy(window + offset, data.data(), data.size()); });
    }
}
