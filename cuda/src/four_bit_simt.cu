// out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n] from packed 4-bit weights, on the ordinary fp32 units: for fp32 activations (no
// TF32, no 16-bit rounding anywhere), for shapes that the tensor-core kernel does not take, and for GPUs that lack it.
//
//   x [M, K], w packed [N·K] with blocks of 2^log2_block across row borders, bias [N] or null, out [M, N]
//
// One warp a row n. A lane takes 8 weights (4 bytes) at k = 8·lane, + 256, …, decodes them once and uses them for ROWS rows of
// x; the block's scale multiplies the 8-term sum. More than ROWS rows: another pass over the weights, which the L2 then holds.
// Any K: where rows do not begin at a multiple of 8 weights, the lanes go weight by weight.
// Grid: 8 warps a block, N / 8 blocks. Bytes: N·K / 2 + scales, once a pass. From sm_75 and PTX 6.3 on.
#include "simt.cuh"

template <class T>
DEVICE void matmul(const T* x, const u8* packed, Scales scales, const T* bias, T* out, u32 M, u32 N, u32 K, u32 log2_block,
                   u32 kind, u32 vectors) {
    __shared__ float words[ValueTable::SIZE];
    ValueTable table{words};
    table.fill(kind);
    __syncthreads();
    u32 n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    if (M == 1) {
        rows<T, 1>(x, packed, scales, bias, out, 0, M, N, K, log2_block, vectors, n, n, lane, table);
    } else {
        for (u32 m = 0; m < M; m += 8)
            rows<T, 8>(x, packed, scales, bias, out, m, M, N, K, log2_block, vectors, n, n, lane, table);
    }
}

#define MATMUL(dtype, T)                                                                                                        \
    KERNEL __launch_bounds__(256) matmul_4bit_simt_##dtype(const T* x,           /* [M, K] */                                   \
                                                           const u8* packed,     /* [N·K / 2] */                                \
                                                           const void* absmax,   /* fp32, or u8 codes if nested */              \
                                                           const float* nested,  /* fp32; null when plain */                    \
                                                           const float* map,     /* fp32 [256] */                               \
                                                           const float* offset,  /* fp32 [1] */                                 \
                                                           u32 nested_shift,     /* log2 of codes to a nested scale */          \
                                                           const T* bias,        /* [N] or null */                              \
                                                           T* out,               /* [M, N] */                                   \
                                                           u32 M, u32 N, u32 K, u32 log2_block, u32 kind,                       \
                                                           u32 vectors) {        /* K % 8 = 0, x to 16 bytes, packed to 4 */    \
        matmul<T>(x, packed, Scales{absmax, nested, map, offset, nested_shift}, bias, out, M, N, K, log2_block, kind, vectors); \
    }
MATMUL(bf16, Bf16)
MATMUL(f16, F16)
MATMUL(f32, F32)
