// Asynchronous copies from global to shared memory, for sm_80 and later.
#pragma once
#include "common.cuh"

// 16 bytes, zeros if not `valid`; past the L1, where an older value might lie. The L2 is asked for the whole line at once.
DEVICE void copy16(u32 to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same through the L1, for what shares a sector with what comes next.
DEVICE void copy16_near(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// `bytes` (0 … 4) bytes, and zeros up to 4.
DEVICE void copy4(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Asks the L2 for the line of 128 bytes at `at`, and goes on. Nothing happens where there is no memory.
DEVICE void fetch_into_l2(const u8* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N groups of this thread are under way.
template <int N> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
