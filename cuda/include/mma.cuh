// Pieces of kernels that decode 4-bit weights into operands of mma.sync: the pair table, the 16-bit MMA, asynchronous copies.
// From sm_80 on.
#pragma once
#include "common.cuh"

// The 16 values of a code as 16-bit numbers, four a word; they come as kernel arguments, which need no load.
struct Values {
    u64 words[4];
    DEVICE u32 get(u32 code) const {
        const u64 low = code & 4 ? words[1] : words[0], high = code & 4 ? words[3] : words[2];
        return u32((code & 8 ? high : low) >> (code % 4 * 16)) & 0xffff;
    }
};

template <class T> DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
#define MMA(T, type)                                                                                                          \
    template <> DEVICE void mma<T>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {                           \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                  \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                          \
    }
MMA(Bf16, "bf16")
MMA(F16, "f16")
#undef MMA

// 16 bytes from global to shared memory, zeros if not `valid`. Weights are read once: past the L1, with the whole line asked of
// the L2 at once.
DEVICE void copy16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
}
// The same through the L1, for what shares a sector with what comes next.
DEVICE void copy16_near(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
}
// `bytes` (0 … 4) bytes, and zeros up to 4.
DEVICE void copy4(u32 shared, const void* global, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes));
}
DEVICE void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// The pair table: byte → two 16-bit values, one copy a bank, so that lookups never collide. 32 KB.
constexpr u32 PAIR_TABLE_WORDS = 256 * WARP;
DEVICE void fill_pair_table(u32* table, const Values& values) {
    for (u32 i = threadIdx.x; i < PAIR_TABLE_WORDS / 4; i += blockDim.x) {
        const u32 byte = i / 8, pair = values.get(byte / 16) | values.get(byte % 16) << 16;
        reinterpret_cast<uint4*>(table)[i] = make_uint4(pair, pair, pair, pair);
    }
}
// Byte J of `word` as two values in the order of the MMA: the high nibble, which is the earlier weight, in the low half.
template <int J> DEVICE u32 decode(u32 word, const u32* table, u32 lane4) {
    const u32 at = J == 0 ? word << 7 : word >> (8 * J - 7);
    return *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + ((at & 0x7f80u) | lane4));
}
