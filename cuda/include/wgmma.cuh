// The MMA of a warpgroup (warpgroup.cuh) with its left operand in registers: D [64, N] += A [64, 16] · B [N, 16]ᵀ, B in shared memory,
// fp32 sums. Warp w has rows 16w … 16w+15, lane (g = lane / 4, t = lane % 4) of it
//
//   A  a0: row g, k = 2t, 2t+1    a1: row g + 8, the same    a2: row g, k = 2t+8, 2t+9    a3: row g + 8, those
//   D  d[4j + e], e = 0, 1: row g, column 8j + 2t + e        e = 2, 3: row g + 8
//
// Measured on an H200: 32.4 cycles for N = 64 and 64.3 for N = 128 where two warpgroups or more take turns, which is the tensor
// cores' rate; 56 and 91 where one waits for each.
#pragma once
#include "warpgroup.cuh"

#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(i) WGMMA_4(i), WGMMA_4(i + 4), WGMMA_4(i + 8), WGMMA_4(i + 12)
#define WGMMA_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define WGMMA_D16 WGMMA_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_D32 WGMMA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D64                                                                                                        \
    WGMMA_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
              "%58,%59,%60,%61,%62,%63"
#define WGMMA_D128                                                                                                        \
    WGMMA_D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
              "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112," \
              "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// The first MMA of a sum takes zero for it (`fresh`).
template <class T, int N> struct Wgmma;
#define WGMMA(T, type, N, OUT, A, B, P, ...)                                                                                   \
    template <> struct Wgmma<T, N> {                                                                                           \
        static DEVICE void add(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool fresh) {                                      \
            asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, " P ", 0;\n"                                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" OUT "}, {" A "}, " B             \
                         ", p, 1, 1, 0;\n}"                                                                                    \
                         : __VA_ARGS__                                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(u32(fresh)));                               \
        }                                                                                                                      \
    };
#define WGMMA_BOTH(N, OUT, A, B, P, ...)                \
    WGMMA(Bf16, "bf16", N, OUT, A, B, P, __VA_ARGS__) \
    WGMMA(F16, "f16", N, OUT, A, B, P, __VA_ARGS__)
WGMMA_BOTH(16, WGMMA_D8, "%8,%9,%10,%11", "%12", "%13", WGMMA_4(0), WGMMA_4(4))
WGMMA_BOTH(32, WGMMA_D16, "%16,%17,%18,%19", "%20", "%21", WGMMA_16(0))
WGMMA_BOTH(64, WGMMA_D32, "%32,%33,%34,%35", "%36", "%37", WGMMA_16(0), WGMMA_16(16))
WGMMA_BOTH(128, WGMMA_D64, "%64,%65,%66,%67", "%68", "%69", WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48))
WGMMA_BOTH(256, WGMMA_D128, "%128,%129,%130,%131", "%132", "%133", WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48),
           WGMMA_16(64), WGMMA_16(80), WGMMA_16(96), WGMMA_16(112))
