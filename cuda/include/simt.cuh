// One row of packed 4-bit weights times rows of x on the ordinary fp32 units: what kernels of four_bit_simt.cu and
// four_bit_experts.cu have in common.
#pragma once
#include "codebook.cuh"

// out[m, n] for rows first_m … of x and row n of a matrix of weights, row `weight_row` of what is packed; bias is null or [N]. A lane takes 8 weights (4 bytes) at k = 8·lane, + 256, …, decodes them once and uses them for ROWS rows of x; the block's
// scale multiplies the 8-term sum. Where rows do not begin at a multiple of 8 weights, the lanes go weight by weight.
template <class T, int ROWS>
DEVICE void rows(const T* x, const u8* packed, Scales scales, const T* bias, T* out, u32 first_m, u32 M, u32 N, u32 K,
                 u32 log2_block, u32 vectors, u32 n, u64 weight_row, u32 lane, ValueTable table) {
    float sum[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m) sum[m] = 0.f;
    u64 start = weight_row * K;
    if (vectors) {
        for (u32 k = lane * 8; k < K; k += 256) {
            u32 word = __ldg(reinterpret_cast<const u32*>(packed + (start + k) / 2));
            float scale = scales.get((start + k) >> log2_block);
            float w[8];
            table.decode(word, lane, w);
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                if (first_m + m < M) {
                    Eight<T> v;
                    v.load(x + u64(first_m + m) * K + k);
                    float dot = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; ++i) dot = fmaf(w[i], v.get(i), dot);
                    sum[m] = fmaf(dot, scale, sum[m]);
                }
            }
        }
    } else {
        for (u32 k = lane; k < K; k += WARP) {
            u64 at = start + k;
            u32 byte = packed[at / 2];
            float w = table.words[(at % 2 ? byte & 15 : byte >> 4) * WARP + lane] * scales.get(at >> log2_block);
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
                if (first_m + m < M) sum[m] = fmaf(w, to_float(x[u64(first_m + m) * K + k]), sum[m]);
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
#pragma unroll
        for (u32 step = WARP / 2; step > 0; step >>= 1) sum[m] += __shfl_xor_sync(ALL_LANES, sum[m], step);
        if (lane == 0 && first_m + m < M)
            out[u64(first_m + m) * N + n] = from_float<T>(bias == nullptr ? sum[m] : sum[m] + to_float(bias[n]));
    }
}
