// In place of cuda/include/hopper.cuh.
#pragma once
#include "common.cuh"

inline void barrier_init(u32 barrier, u32 count) { machine::barrier_init(barrier, count); }
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) { machine::barrier_arrive(barrier); }
inline void barrier_expect(u32 barrier, u32 bytes) { machine::barrier_expect(barrier, bytes); }
inline void fence_for_async() { machine::fence(); }
inline void barrier_arrive_copies(u32 barrier) { machine::arrive_after_copies(barrier); }
inline void barrier_wait(u32 barrier, u32 parity) { machine::barrier_wait(barrier, parity); }

inline u32 cluster_rank() { return machine::rank(); }
inline u32 cluster_size() { return machine::ranks(); }
inline void cluster_arrive() { machine::cluster_arrive(); }
inline void cluster_wait() { machine::cluster_wait(); }
inline u32 map_to_block(u32 address, u32 rank) { return (address & 0xffffff) | rank << 24; }
inline float load_cluster_float(u32 address) { return machine::load<float>(address); }

inline void wait_for_predecessors() {}
inline void let_dependents_start() {}

inline void named_barrier(u32 id, u32 threads) { machine::named_barrier(id, threads, true); }
inline void named_barrier_arrive(u32 id, u32 threads) { machine::named_barrier(id, threads, false); }

inline u32 grid_size() { return machine::blocks_x(); }
inline void raise_flag(u64* flag, u64 raised) { machine::maybe_yield(), *flag = raised; }
inline void wait_for_flag(const u64* flag, u64 raised) {
    for (u32 turns = 0; *static_cast<const volatile u64*>(flag) != raised; machine::wait_a_turn())
        if (++turns > 1000000) machine::fail("a flag is not raised");
}
