// LLM.int8 beside rows and products: column statistics, codes by columns, outlier columns, and back to floats.
#include "int8.cuh"

// The largest magnitude of each column over a part of the rows, 256 columns a block; stats [K] hold 0 before.
template <class T> DEVICE void column_maxima(const T* x, u32 M, u32 K, u32 rows, float threshold, float* stats) {
    const u32 k = blockIdx.x * blockDim.x + threadIdx.x, begin = blockIdx.y * rows, end = min(begin + rows, M);
    if (k >= K) return;
    u32 largest = 0;
#pragma unroll 8
    for (u32 m = begin; m < end; ++m) {
        const float e = to_float(x[u64(m) * K + k]);
        largest = is_outlier(e, threshold) ? largest : max(largest, magnitude(e));
    }
    atomicMax(reinterpret_cast<u32*>(stats) + k, largest);
}

// q = round-half-even(x · 127 / s) by true division, x · 127 rounded to fp16 for such x unless that is infinite.
template <class T> DEVICE float times_127(T x) { return to_float(x) * 127.f; }
template <> DEVICE float times_127<F16>(F16 x) {
    const float product = to_float(x) * 127.f, rounded = to_float(from_float<F16>(product));
    return fabsf(rounded) <= 65504.f ? rounded : product;
}
template <class T> DEVICE void quantize_by_columns(const T* x, u32 M, u32 K, float threshold, const float* stats, u8* q) {
    const u32 k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= K) return;
    const float s = stats[k];
    const bool empty = !(s > 0.f) || !(s < as_float(0x7f800000u));
    for (u32 m = blockIdx.y; m < M; m += gridDim.y) {
        const T e = x[u64(m) * K + k];
        const float value = empty || is_outlier(to_float(e), threshold) ? 0.f : __fdiv_rn(times_127(e), s);
        q[u64(m) * K + k] = u8(as_bits(__fadd_rn(value, 12582912.f)));
    }
}

// out = q · s · (1 / 127). `eights`: 8 elements a thread, K % 8 = 0 and both at multiples of 16 bytes.
template <class T> DEVICE void dequantize(const u8* q, const float* stats, u64 M, u32 K, u32 eights, T* out) {
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    auto value = [](float code, float s) { return __fmul_rn(__fmul_rn(code, s), 1.f / 127.f); };
    if (eights) {
        const u64 n = M * (K / 8);
        if (i >= n) return;
        const float s = __ldg(stats + i / (K / 8));
        const uint2 codes = __ldg(reinterpret_cast<const uint2*>(q) + i);
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = value(byte_value(j < 4 ? codes.x : codes.y, j % 4), s);
        Eight<T> to;
        to.set(v);
        to.store(out + i * 8);
    } else if (i < M * K) {
        out[i] = from_float<T>(value(byte_value(q[i], 0), __ldg(stats + i / K)));
    }
}

// out = sum · s_m · s_n · (1 / 127²) + bias.
template <class T>
DEVICE void scale_sums(const i32* sums, const float* row_stats, const float* column_stats, const T* bias, u64 M, u32 N, T* out) {
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= M * N) return;
    const u64 m = i / N;
    const u32 n = u32(i - m * N);
    const float value = float(sums[i]) * __ldg(row_stats + m) * __ldg(column_stats + n) * (1.f / (127.f * 127.f));
    out[i] = from_float<T>(bias == nullptr ? value : value + to_float(bias[n]));
}

#define ALL(T, name)                                                                                                          \
    KERNEL column_stats_##name(const T* x, u32 M, u32 K, u32 rows, float threshold, float* stats) {                           \
        column_maxima<T>(x, M, K, rows, threshold, stats);                                                                    \
    }                                                                                                                         \
    KERNEL quantize_columns_##name(const T* x, u32 M, u32 K, float threshold, const float* stats, u8* q) {                    \
        quantize_by_columns<T>(x, M, K, threshold, stats, q);                                                                 \
    }                                                                                                                         \
    KERNEL dequantize_rows_##name(const u8* q, const float* stats, u64 M, u32 K, u32 eights, T* out) {                        \
        dequantize<T>(q, stats, M, K, eights, out);                                                                           \
    }                                                                                                                         \
    KERNEL mm_dequant_##name(const i32* sums, const float* row_stats, const float* column_stats, const T* bias, u64 M, u32 N, \
                             T* out) {                                                                                        \
        scale_sums<T>(sums, row_stats, column_stats, bias, M, N, out);                                                        \
    }
ALL(Bf16, bf16)
ALL(F16, f16)
ALL(F32, f32)

// Zeros in the columns of the bitmap: a thread for each 32 columns of a row.
KERNEL zero_columns(u8* q, u64 M, u32 K, const u32* outliers) {
    const u32 words = (K + 31) / 32;
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= M * words) return;
    const u64 m = i / words;
    const u32 word = u32(i - m * words);
    for (u32 bits = __ldg(outliers + word); bits != 0; bits &= bits - 1) q[m * K + word * 32 + __ffs(bits) - 1] = 0;
}

// The columns of the bitmap in rising order, and how many; one warp.
KERNEL list_columns(const u32* outliers, u32 K, u64* columns, u32* count) {
    const u32 lane = threadIdx.x, words = (K + 31) / 32;
    u32 found = 0;
    for (u32 begin = 0; begin < words; begin += WARP) {
        u32 bits = begin + lane < words ? outliers[begin + lane] : 0;
        u32 sum = __popc(bits);
        for (u32 i = 1; i < WARP; i *= 2) {
            const u32 before = __shfl_up_sync(ALL_LANES, sum, i);
            if (lane >= i) sum += before;
        }
        for (u32 at = found + sum - __popc(bits); bits != 0; bits &= bits - 1) columns[at++] = (begin + lane) * 32 + __ffs(bits) - 1;
        found += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (lane == 0) *count = found;
}

// The bitmap of given columns; one block. Columns that there are not are ignored.
KERNEL mark_columns(const u64* columns, u32 n, u32 K, u32* outliers) {
    for (u32 i = threadIdx.x; i < (K + 31) / 32; i += blockDim.x) outliers[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < n; i += blockDim.x)
        if (columns[i] < K) atomicOr(outliers + columns[i] / 32, 1u << columns[i] % 32);
}
