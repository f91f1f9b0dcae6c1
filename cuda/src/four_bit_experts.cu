// Experts on any GPU: who has which rows, and the product on the ordinary fp32 units.
//
// route: index [S] of rows' experts → offsets [E + 1], order [S], inverse [S]. A stable sort by counting: one warp an expert, which
// reads all S indices twice: it counts those below its own, which is where its rows begin, and then gives the rows of its own
// their places. Indices outside 0 … E − 1 are nobody's; theirs are the places after all others.
//   order[place] = row, inverse[row] = place, offsets[e] = first place of expert e
// Grid: 8 warps a block, (E + 1) / 8 blocks. Bytes: 2·S·8 a warp, from the L2; meant for few rows.
//
// matmul_4bit_experts_simt: as four_bit_experts_mma.cu, for what that does not take (fp32 without TF32, any K and block size, GPUs
// without its instructions). One warp a row of weights and expert; experts that have no rows of x are left at once.
// Grid: 8 rows of weights a block in x, experts in y. Bytes: the packed weights of the experts in use, once for 8 rows of x.
//
// From sm_75 and PTX 6.3 on.
#include "simt.cuh"

// The place where rows of index `i` go: its expert, or E for nobody's.
template <class I> DEVICE u32 bucket(I i, u32 E) { return i >= 0 && i < I(E) ? u32(i) : E; }

template <class I> DEVICE void route(const I* index, u32 S, u32 E, int* offsets, int* order, int* inverse) {
    constexpr u32 AT_ONCE = 4;  // loads under way
    const u32 mine = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (mine > E) return;
    u32 below = 0;
    for (u32 i = lane; i < S; i += WARP * AT_ONCE)
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j)
            if (i + j * WARP < S) below += bucket(__ldg(index + i + j * WARP), E) < mine;
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step >>= 1) below += __shfl_xor_sync(ALL_LANES, below, step);
    if (lane == 0) offsets[mine] = int(below);
    u32 place = below;
    for (u32 i0 = 0; i0 < S; i0 += WARP * AT_ONCE) {
        bool is_mine[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            const u32 i = i0 + j * WARP + lane;
            is_mine[j] = i < S && bucket(__ldg(index + i), E) == mine;
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; ++j) {
            const u32 among = __ballot_sync(ALL_LANES, is_mine[j]);
            if (is_mine[j]) {
                const u32 i = i0 + j * WARP + lane, at = place + __popc(among & ((1u << lane) - 1));
                order[at] = int(i), inverse[i] = int(at);
            }
            place += __popc(among);
        }
    }
}

KERNEL __launch_bounds__(256) experts_route_i64(const long long* index, u32 S, u32 E, int* offsets, int* order, int* inverse) {
    route(index, S, E, offsets, order, inverse);
}
KERNEL __launch_bounds__(256) experts_route_i32(const int* index, u32 S, u32 E, int* offsets, int* order, int* inverse) {
    route(index, S, E, offsets, order, inverse);
}

template <class T>
DEVICE void experts(const T* x, const int* offsets, const u8* packed, Scales scales, const T* bias, T* out, u32 S, u32 E, u32 N,
                    u32 K, u32 log2_block, u32 kind, u32 vectors) {
    __shared__ float words[ValueTable::SIZE];
    ValueTable table{words};
    table.fill(kind);
    __syncthreads();
    const u32 n = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (n >= N) return;
    // Within bounds whatever the offsets say.
    auto offset = [&](u32 e, u32 least) { return u32(min(max(__ldg(offsets + e), int(least)), int(S))); };
    for (u32 e = blockIdx.y; e < E; e += gridDim.y) {
        const u32 begin = offset(e, 0), end = offset(e + 1, begin);
        const u64 row = u64(e) * N + n;
        const T* its_bias = bias == nullptr ? nullptr : bias + u64(e) * N;
        if (end - begin == 1) {
            rows<T, 1>(x, packed, scales, its_bias, out, begin, end, N, K, log2_block, vectors, n, row, lane, table);
        } else {
            for (u32 m = begin; m < end; m += 8)
                rows<T, 8>(x, packed, scales, its_bias, out, m, end, N, K, log2_block, vectors, n, row, lane, table);
        }
    }
    // Rows of nobody get zeros.
    if (blockIdx.y > 0) return;
    const u32 begin = offset(0, 0), end = offset(E, begin);
    for (u32 m = lane; m < begin; m += WARP) out[u64(m) * N + n] = from_float<T>(0.f);
    for (u64 m = u64(end) + lane; m < S; m += WARP) out[m * N + n] = from_float<T>(0.f);
}

#define EXPERTS(dtype, T)                                                                                                    \
    KERNEL __launch_bounds__(256) matmul_4bit_experts_simt_##dtype(const T* x,          /* [S, K], sorted by expert */       \
                                                                   const int* offsets,  /* [E + 1], rising */                \
                                                                   const u8* packed,    /* [E·N·K / 2, up] */                \
                                                                   const void* absmax,  /* fp32, or u8 codes if nested */    \
                                                                   const float* nested, /* fp32; null when plain */          \
                                                                   const float* map,    /* fp32 [256] */                     \
                                                                   const float* offset, /* fp32 [1] */                       \
                                                                   u32 nested_shift,    /* log2 of codes a nested scale */   \
                                                                   const T* bias,       /* [E, N] or null */                 \
                                                                   T* out,              /* [S, N] */                         \
                                                                   u32 S, u32 E, u32 N, u32 K, u32 log2_block, u32 kind,     \
                                                                   u32 vectors) {       /* K % 8 = 0, x to 16 bytes, packed  \
                                                                                           to 4 */                           \
        experts<T>(x, offsets, packed, Scales{absmax, nested, map, offset, nested_shift}, bias, out, S, E, N, K, log2_block, \
                   kind, vectors);                                                                                           \
    }
EXPERTS(bf16, Bf16)
EXPERTS(f16, F16)
EXPERTS(f32, F32)

// Rows of nobody in a product that another kernel made: zeros.
template <class W> DEVICE void clear(const int* offsets, W* out, u32 S, u32 E, u64 N) {
    const u64 begin = u64(min(max(__ldg(offsets), 0), int(S))) * N;
    const u64 end = max(u64(min(max(__ldg(offsets + E), 0), int(S))) * N, begin), all = S * N;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < begin + all - end; i += u64(gridDim.x) * blockDim.x)
        out[i < begin ? i : i - begin + end] = 0;
}
KERNEL __launch_bounds__(256) experts_clear_16(const int* offsets, u16* out, u32 S, u32 E, u64 N) { clear(offsets, out, S, E, N); }
