// What compute capability 9.0 adds and kernels here use: barriers in shared memory, clusters, launches that overlap.
// Addresses of shared memory are the 32-bit ones of its window. PTX 8.0.
#pragma once
#include "common.cuh"

// --- mbarriers -------------------------------------------------------------------------------------------------------------
// Eight bytes each. A phase ends when `count` threads have arrived. A waiter names the parity of the phase that it
// waits to end: 0, 1, 0, 1, …; parity 1 on a new barrier returns at once.

DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After all barrier_init: makes them visible to copies and, with a cluster barrier after it, to the cluster.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// An arrival at a barrier whose phase does not end before so many bytes have been copied in bulk.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Makes what this thread has written to shared memory visible to copies in bulk and to MMAs of a warpgroup.
DEVICE void fence_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Arrives when all asynchronous copies (cp.async) of this thread so far have landed.
DEVICE void barrier_arrive_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// --- clusters --------------------------------------------------------------------------------------------------------------

DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Not `.aligned`: lanes may come one by one.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Where a shared address of this block lies in block `rank` of the cluster.
DEVICE u32 map_to_block(u32 address, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
// At an address of map_to_block.
DEVICE float load_cluster_float(u32 address) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

// --- launches that overlap -------------------------------------------------------------------------------------------------

// Waits until the kernels before this one on the stream have ended and their writes are visible.
DEVICE void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Barrier `id` (1 … 15) among `threads` threads of the block; and an arrival there that does not wait.
DEVICE void named_barrier(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// --- between blocks --------------------------------------------------------------------------------------------------------
// Blocks in x; asked for anew each time, so that it and what is made of it are not kept in registers.
DEVICE u32 grid_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(size));
    return size;
}

// A flag in global memory. What a block has written before a barrier, after which one of its threads raises the flag, is visible to who has
// waited for it.
DEVICE void raise_flag(u64* flag, u64 raised) { asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(flag), "l"(raised) : "memory"); }
DEVICE void wait_for_flag(const u64* flag, u64 raised) {
    u64 seen;
    do asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
    while (seen != raised);
}
