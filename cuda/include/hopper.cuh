// What compute capability 9.0a adds: barriers in shared memory, tensor copies (TMA), clusters, warpgroup MMA.
// Addresses of shared memory are the 32-bit ones of its window. PTX 8.0.
#pragma once
#include "common.cuh"

// A CUtensorMap, encoded by the host: a kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap { u64 words[16]; };

// --- mbarriers -------------------------------------------------------------------------------------------------------------
// Eight bytes each. A phase ends when `count` threads have arrived and all bytes announced by expect_bytes have come. A waiter
// names the parity of the phase that it waits to end: 0, 1, 0, 1, …; parity 1 on a new barrier returns at once.

DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After all barrier_init: makes them visible to copies and, with a cluster barrier after it, to the cluster.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies bring to this phase.
DEVICE void barrier_expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at a barrier of another block of the cluster; the address is one of map_to_block.
DEVICE void barrier_arrive_cluster(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}
// The same where threads of other blocks of the cluster arrive.
DEVICE void barrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// --- copies ----------------------------------------------------------------------------------------------------------------

// Orders writes of this thread to shared memory before reads and writes of copies and of wgmma.
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// The box of a 2-D map at (column, row) to shared memory; elements outside the tensor come as zeros, and count as bytes.
DEVICE void copy_box(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same with a cache policy (below).
DEVICE void copy_box(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}
// The same to every block of the cluster whose bit is set in `blocks`, at the same place and barrier of each.
DEVICE void copy_box_multicast(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}
// A box into the L2 alone.
DEVICE void prefetch_box(const TensorMap& map, u32 column, u32 row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(column), "r"(row) : "memory");
}
// Bytes in a row, a multiple of 16, both sides aligned to 16.
DEVICE void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}
// What is read once should leave the L2 first; what every block reads should stay.
DEVICE u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE u64 evict_last() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// --- clusters --------------------------------------------------------------------------------------------------------------

DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Not `.aligned`: lanes may come one by one.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// Without ordering memory: a release costs a fence of the whole GPU's scope.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Where a shared address of this block lies in block `rank` of the cluster.
DEVICE u32 map_to_block(u32 address, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
DEVICE float4 load_cluster(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
DEVICE void store_cluster(u32 address, float4 v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// --- launches that overlap -------------------------------------------------------------------------------------------------

// Waits until the kernels before this one on the stream have ended and their writes are visible.
DEVICE void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- registers -------------------------------------------------------------------------------------------------------------

template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Barrier `id` (1 … 15) among `threads` threads of the block.
DEVICE void named_barrier(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// --- warpgroup MMA ---------------------------------------------------------------------------------------------------------

// Descriptor of an operand in shared memory as a TMA box of 64 16-bit columns with 128-byte swizzle lays it out: rows of 128 bytes,
// groups of 8 rows 1024 bytes apart, the tile at a multiple of 1024. K step j of 16 columns begins 32·j bytes further: add 2·j.
DEVICE u64 swizzled_tile(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d[64 × COLUMNS] (+)= a[64 × 16] · b[COLUMNS × 16]^T: `a` in registers (the m16n8k16 fragment of each warp's 16 rows) or, like b, a
// K-major swizzled tile; d as COLUMNS / 8 fragments of m16n8. `add` 0 overwrites d.
template <class T, int COLUMNS> struct Wgmma;

#define WGMMA_D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_D32 WGMMA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D64                                                                                                         \
    WGMMA_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                                          \
              ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_D128                                                                                                        \
    WGMMA_D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                                          \
              ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"                                          \
              ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"                              \
              ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_8(d, i)                                                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_O16(d, i) WGMMA_8(d, i), WGMMA_8(d, i + 8)
#define WGMMA_O32(d, i) WGMMA_O16(d, i), WGMMA_O16(d, i + 16)
#define WGMMA_O64(d, i) WGMMA_O32(d, i), WGMMA_O32(d, i + 32)
#define WGMMA_O128(d, i) WGMMA_O64(d, i), WGMMA_O64(d, i + 64)

// a0 … add: numbers of the operands after d.
#define WGMMA(T, type, columns, floats, a0, a1, a2, a3, a4, a5)                                                           \
    template <> struct Wgmma<T, columns> {                                                                                \
        static DEVICE void multiply(float (&d)[floats], const u32 (&a)[4], u64 b, u32 add) {                              \
            asm volatile(                                                                                                 \
                "{\n.reg .pred add;\nsetp.ne.b32 add, " a5 ", 0;\n"                                                       \
                "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" WGMMA_D##floats "}, {" a0 ","  \
                a1 "," a2 "," a3 "}, " a4 ", add, 1, 1, 0;\n}"                                                            \
                : WGMMA_O##floats(d, 0)                                                                                   \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                          \
        }                                                                                                                 \
        static DEVICE void multiply(float (&d)[floats], u64 a, u64 b, u32 add) {                                          \
            asm volatile(                                                                                                 \
                "{\n.reg .pred add;\nsetp.ne.b32 add, " a2 ", 0;\n"                                                       \
                "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" WGMMA_D##floats "}, " a0 ", "  \
                a1 ", add, 1, 1, 0, 0;\n}"                                                                                \
                : WGMMA_O##floats(d, 0)                                                                                   \
                : "l"(a), "l"(b), "r"(add));                                                                              \
        }                                                                                                                 \
    };
WGMMA(Bf16, "bf16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA(F16, "f16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA(Bf16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA(F16, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA(Bf16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA(F16, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA(Bf16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
WGMMA(F16, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
