// The tensor copy engine of compute capability 9.0: boxes of a matrix to shared memory, what lies outside of it as zeros.
#pragma once
#include "hopper.cuh"

// A map that the host encoded (cuTensorMapEncodeTiled), by value as a kernel's parameter.
struct __align__(64) TensorMap { u64 words[16]; };

// The box whose first element is (column, row) to `to`; its bytes count towards the barrier's phase.
DEVICE void copy_box(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
// The same box into the L2, where a late write to it would still be seen.
DEVICE void prefetch_box(const TensorMap& map, u32 column, u32 row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(column), "r"(row) : "memory");
}
DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// Arrives, and says how many bytes of copies the phase is to wait for.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
