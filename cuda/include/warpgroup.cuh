// What compute capability 9.0a adds for products: tiles by the tensor memory accelerator, and the MMA of a warpgroup. PTX 8.0.
//
// Operands are in shared memory, K along rows. Two layouts are used:
//   swizzled     rows of 128 bytes, as a tensor map with a 128-byte swizzle writes them; 8 rows are 1024 bytes, at a multiple of that
//   interleaved  16 bytes of 8 rows are 128 contiguous bytes ("core matrix"); the next 8 rows follow, then the next 16 bytes of K
#pragma once
#include "hopper.cuh"

struct __align__(64) TensorMap { u64 words[16]; };

// --- copies ----------------------------------------------------------------------------------------------------------------

// A box at (column, row) of a matrix; its bytes, those beyond the matrix as zeros, are counted on `barrier`.
DEVICE void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 column, u32 row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}
DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Makes this thread's writes to shared memory visible to MMAs.
DEVICE void fence_for_mma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// --- MMA -------------------------------------------------------------------------------------------------------------------

DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups of MMAs are under way.
template <int N> DEVICE void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Sums that MMAs are writing: not to be touched by what the compiler might move across this.
template <int N> DEVICE void pin(i32 (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int N> DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// A register that MMAs read: theirs until here.
DEVICE void keep(u32& r) { asm volatile("" : "+r"(r)); }

// Four 8 × 8 tiles of 16-bit elements, of which a lane (g, t) has columns 2t, 2t + 1 of row g, transposed: lanes 8i … 8i + 7 name
// where the rows of tile i go.
DEVICE void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// An operand at a shared address; the next 32 bytes along K are 2 further.
DEVICE u64 swizzled_operand(u32 address) { return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62; }
// `k_stride`: bytes from 16 bytes of K to the next.
DEVICE u64 interleaved_operand(u32 address, u32 k_stride) {
    return u64(address >> 4 & 0x3fff) | u64(k_stride >> 4) << 16 | u64(128 >> 4) << 32;
}

// d[64 × N] += a[64 × 32 bytes] · b[N × 32 bytes]ᵀ. Of the rows of a, warp w of the warpgroup has 16w … 16w + 15, of them lane (g, t)
// rows g and g + 8, and of those columns 8j + 2t and 8j + 2t + 1:  d[4j], d[4j + 1] of row g, d[4j + 2], d[4j + 3] of row g + 8.
template <int N> DEVICE void mma_s8(i32 (&d)[N / 2], u64 a, u64 b);
template <class T, int N> DEVICE void mma_16(float (&d)[N / 2], u64 a, u64 b);

#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define D10(c, t) c(d[t##0]), c(d[t##1]), c(d[t##2]), c(d[t##3]), c(d[t##4]), c(d[t##5]), c(d[t##6]), c(d[t##7]), c(d[t##8]), c(d[t##9])
#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 TEN() ",%10,%11,%12,%13,%14,%15"
#define NAMES_32 TEN() "," TEN(1) "," TEN(2) ",%30,%31"
#define NAMES_64 TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) ",%60,%61,%62,%63"
#define NAMES_128                                                                                                            \
    TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) "," TEN(6) "," TEN(7) "," TEN(8) "," TEN(9) "," TEN(10) ","  \
    TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define SUMS_8(c) c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7])
#define SUMS_16(c) D10(c, ), c(d[10]), c(d[11]), c(d[12]), c(d[13]), c(d[14]), c(d[15])
#define SUMS_32(c) D10(c, ), D10(c, 1), D10(c, 2), c(d[30]), c(d[31])
#define SUMS_64(c) D10(c, ), D10(c, 1), D10(c, 2), D10(c, 3), D10(c, 4), D10(c, 5), c(d[60]), c(d[61]), c(d[62]), c(d[63])
#define SUMS_128(c)                                                                                                          \
    D10(c, ), D10(c, 1), D10(c, 2), D10(c, 3), D10(c, 4), D10(c, 5), D10(c, 6), D10(c, 7), D10(c, 8), D10(c, 9), D10(c, 10), \
        D10(c, 11), c(d[120]), c(d[121]), c(d[122]), c(d[123]), c(d[124]), c(d[125]), c(d[126]), c(d[127])
#define INT_SUM(x) "+r"(x)
#define FLOAT_SUM(x) "+f"(x)

#define MMA_SHAPE(n, sums, a, b)                                                                                             \
    template <> DEVICE void mma_s8<n>(i32 (&d)[n / 2], u64 left, u64 right) {                                                \
        asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n                      \
                     "k32.s32.s8.s8 {" NAMES_##sums "}, %" #a ", %" #b ", add;\n}"                                           \
                     : SUMS_##sums(INT_SUM)                                                                                  \
                     : "l"(left), "l"(right));                                                                               \
    }                                                                                                                        \
    template <> DEVICE void mma_16<Bf16, n>(float (&d)[n / 2], u64 left, u64 right) {                                        \
        asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n                      \
                     "k16.f32.bf16.bf16 {" NAMES_##sums "}, %" #a ", %" #b ", add, 1, 1, 0, 0;\n}"                           \
                     : SUMS_##sums(FLOAT_SUM)                                                                                \
                     : "l"(left), "l"(right));                                                                               \
    }                                                                                                                        \
    template <> DEVICE void mma_16<F16, n>(float (&d)[n / 2], u64 left, u64 right) {                                         \
        asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n                      \
                     "k16.f32.f16.f16 {" NAMES_##sums "}, %" #a ", %" #b ", add, 1, 1, 0, 0;\n}"                             \
                     : SUMS_##sums(FLOAT_SUM)                                                                                \
                     : "l"(left), "l"(right));                                                                               \
    }
MMA_SHAPE(16, 8, 8, 9)
MMA_SHAPE(32, 16, 16, 17)
MMA_SHAPE(64, 32, 32, 33)
MMA_SHAPE(128, 64, 64, 65)
MMA_SHAPE(256, 128, 128, 129)
