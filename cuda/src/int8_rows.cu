// LLM.int8: rows of activations or weights to int8.
//
// x is read once: a block has a row in registers, 8 · V elements a thread. Bytes: M·K · (size of an element + 1) + 4·M.
#include "int8.cuh"
#if __CUDA_ARCH__ >= 900
#include "hopper.cuh"
#else
DEVICE void wait_for_predecessors() {}
DEVICE void let_dependents_start() {}
#endif

DEVICE u32 warp_max(u32 value) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(value));
    return r;
#else
    for (u32 i = WARP / 2; i > 0; i /= 2) value = max(value, __shfl_xor_sync(ALL_LANES, value, i));
    return value;
#endif
}

// The largest of all threads of a block.
DEVICE u32 block_max(u32 value) {
    __shared__ u32 scratch[WARP];
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_max(threadIdx.x % WARP < blockDim.x / WARP ? scratch[threadIdx.x % WARP] : 0);
}

// Marks columns 32 · word + bits, and counts those that were not. Mostly they are marked already.
DEVICE void mark(u32* outliers, u32* count, u32 word, u32 bits) {
    if ((*static_cast<volatile u32*>(outliers + word) & bits) == bits) return;
    const u32 fresh = bits & ~atomicOr(outliers + word, bits);
    if (count != nullptr && fresh != 0) atomicAdd(count, __popc(fresh));
}

// A row a block. The row is at a multiple of 16 bytes, K % 8 = 0, K ≤ 8 · V · threads. `threshold` is NaN for none. `count` gets the
// number of marked columns, where it is not null.
template <class T, int V>
DEVICE void quantize_row(const T* x, u32 K, float threshold, u8* q, float* stats, u32* outliers, u32* count) {
    let_dependents_start();
    wait_for_predecessors();
    const u64 row = blockIdx.x;
    const T* from = x + row * K;
    Eight<T> v[V];
    u32 largest;
    u32 left_out[V];  // bits of outliers
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const u32 at = (i * blockDim.x + threadIdx.x) * 8;
        const float none[8] = {};
        if (at < K) load_written(v[i], from + at);
        else v[i].set(none);
        left_out[i] = 0;
    }
    if (outliers == nullptr) {
        largest = magnitude<T, V>(v);
    } else {
        largest = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float e = v[i].get(j);
                const bool out = is_outlier(e, threshold);
                left_out[i] |= out ? 1u << j : 0u;
                largest = max(largest, out ? 0u : magnitude(e));
            }
            const u32 at = (i * blockDim.x + threadIdx.x) * 8;
            if (left_out[i] != 0) mark(outliers, count, at / 32, left_out[i] << at % 32);
        }
    }
    largest = block_max(largest);
    const RowScale scale(as_float(largest));
    if (threadIdx.x == 0) stats[row] = as_float(largest);
    u8* to = q + row * K;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const u32 at = (i * blockDim.x + threadIdx.x) * 8;
        if (at >= K) break;
        auto code = [&](int j) {
            const float e = v[i].get(j);
            return scale.quantize(left_out[i] >> j & 1 ? 0.f : e);
        };
        uint2 packed = make_uint2(pack_bytes(code(0), code(1), code(2), code(3)), pack_bytes(code(4), code(5), code(6), code(7)));
        if (scale.empty()) packed = make_uint2(0, 0);
        *reinterpret_cast<uint2*>(to + at) = packed;
    }
}

// Any row, which is read twice.
template <class T> DEVICE void quantize_any_row(const T* x, u32 K, float threshold, u8* q, float* stats, u32* outliers, u32* count) {
    let_dependents_start();
    wait_for_predecessors();
    const u64 row = blockIdx.x;
    const T* from = x + row * K;
    u32 largest = 0;
    for (u32 k = threadIdx.x; k < K; k += blockDim.x) {
        const float e = to_float(from[k]);
        if (!is_outlier(e, threshold)) largest = max(largest, magnitude(e));
        else if (outliers != nullptr) mark(outliers, count, k / 32, 1u << k % 32);
    }
    largest = block_max(largest);
    const RowScale scale(as_float(largest));
    if (threadIdx.x == 0) stats[row] = as_float(largest);
    for (u32 k = threadIdx.x; k < K; k += blockDim.x) {
        const float e = to_float(from[k]);
        q[row * K + k] = scale.empty() || is_outlier(e, threshold) ? 0 : u8(scale.quantize(e));
    }
}

#define QUANTIZE(T, name, V)                                                                                                  \
    KERNEL __launch_bounds__(1024)                                                                                            \
        quantize_rows_##name##_##V(const T* x, u32 K, float threshold, u8* q, float* stats, u32* outliers, u32* count) {      \
        quantize_row<T, V>(x, K, threshold, q, stats, outliers, count);                                                       \
    }
#define ALL(T, name)                                                                                                          \
    QUANTIZE(T, name, 1) QUANTIZE(T, name, 2) QUANTIZE(T, name, 4)                                                            \
    KERNEL quantize_rows_any_##name(const T* x, u32 K, float threshold, u8* q, float* stats, u32* outliers, u32* count) {     \
        quantize_any_row<T>(x, K, threshold, q, stats, outliers, count);                                                      \
    }
ALL(Bf16, bf16)
ALL(F16, f16)
ALL(F32, f32)

// Zeros, by one block.
KERNEL clear_words(u32* words, u32 n) {
    let_dependents_start();
    wait_for_predecessors();
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) words[i] = 0;
}
