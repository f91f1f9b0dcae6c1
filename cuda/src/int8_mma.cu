// out[m, n] = Σ_k q[m, k] · w[n, k], exact, times the scales of row m and of weight n, plus what outliers add and the bias: int8 on
// the tensor cores of any GPU from sm_75 on, for any K and any alignment.
//
// A block has TILE tokens × 128 weights and goes along K in steps of 64 bytes, which come by way of registers while the step before
// them is worked on. Rows are padded to 80 bytes in shared memory, so that fragments are read without conflicts.
//
// Outliers (int8.cuh): sums become floats, times s_m / 127, and each column of the bitmap adds (x − q · s / 127)[m, k] · w[n, k] in
// fp32, 16 columns at a time.
//
// Bytes: N·K for each tile of tokens, M·K for each tile of weights, of which the L2 gives most, + out.
#include "int8.cuh"

#if !defined(ELEMENT)
#error "compile with -DELEMENT=Bf16, F16, F32 or I32"
#endif

using Float = Types<ELEMENT>::Float;
constexpr bool SCALED = Types<ELEMENT>::SCALED;
constexpr u32 WIDTH = 128, STEP = 64, PADDED = STEP + 16, BLOCK = 256, CHUNK = 16;

// 16 bytes of a row from column k on, zeros beyond it. What is not `whole` is read byte by byte, in a loop: it would be long.
DEVICE u64 load_single_bytes(const u8* row, u32 k, u32 K) {
    u64 bytes = 0;
#pragma unroll 1
    for (u32 i = min(8, K - min(k, K)); i > 0; --i) bytes = bytes << 8 | row[k + i - 1];
    return bytes;
}
DEVICE uint4 load_bytes(const u8* row, u32 k, u32 K, bool whole) {
    if (whole) return k < K ? __ldg(reinterpret_cast<const uint4*>(row + k)) : make_uint4(0, 0, 0, 0);
    const u64 low = load_single_bytes(row, k, K), high = load_single_bytes(row, k + 8, K);
    return make_uint4(u32(low), u32(low >> 32), u32(high), u32(high >> 32));
}

template <u32 TILE>
DEVICE void product(const u8* q, const u8* w, u32 M, u32 N, u32 K, const float* row_stats, const float* column_stats,
                    const Float* bias, ELEMENT* out, const void* x, u32 x_type, const u32* outliers) {
    constexpr u32 DOWN = TILE == 128 ? 2 : 1, ACROSS = 8 / DOWN;                   // warps
    constexpr u32 ROWS = TILE / DOWN / 16, COLUMNS = WIDTH / ACROSS / 8;           // MMAs of a warp
    constexpr u32 BYTES = (TILE + WIDTH) * PADDED, LOADS = ((TILE + WIDTH) * (STEP / 16) + BLOCK - 1) / BLOCK;
    __shared__ __align__(16) u8 stages[2 * BYTES];
    __shared__ u32 list[WINDOW];
    __shared__ u32 outlier_count;
    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, g = lane / 4, t = lane % 4;
    const u32 m0 = blockIdx.y * TILE, n0 = blockIdx.x * WIDTH;
    const bool whole = K % 16 == 0 && (reinterpret_cast<u64>(q) | reinterpret_cast<u64>(w)) % 16 == 0;

    uint4 coming[LOADS];
    auto fetch = [&](u32 k) {
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            const u32 chunk = i * BLOCK + thread, row = chunk / (STEP / 16), at = k + chunk % (STEP / 16) * 16;
            coming[i] = make_uint4(0, 0, 0, 0);
            if (row < TILE) {
                if (m0 + row < M) coming[i] = load_bytes(q + u64(m0 + row) * K, at, K, whole);
            } else if (row < TILE + WIDTH && n0 + row - TILE < N) {
                coming[i] = load_bytes(w + u64(n0 + row - TILE) * K, at, K, whole);
            }
        }
    };
    auto keep = [&](u8* stage) {
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            const u32 chunk = i * BLOCK + thread, row = chunk / (STEP / 16);
            if (row < TILE + WIDTH) *reinterpret_cast<uint4*>(stage + row * PADDED + chunk % (STEP / 16) * 16) = coming[i];
        }
    };

    i32 sums[ROWS][COLUMNS][4] = {};
    const u32 row0 = warp / ACROSS * ROWS * 16, column0 = warp % ACROSS * COLUMNS * 8;
    fetch(0);
    keep(stages);
    __syncthreads();
    for (u32 k = 0, now = 0; k < K; k += STEP, now ^= 1) {
        const bool more = k + STEP < K;
        if (more) fetch(k + STEP);
        const u8* stage = stages + now * BYTES;
#pragma unroll
        for (u32 s = 0; s < STEP; s += 32) {
            auto word = [&](u32 row, u32 byte) { return *reinterpret_cast<const u32*>(stage + row * PADDED + s + byte + 4 * t); };
            u32 b[COLUMNS][2];
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c) b[c][0] = word(TILE + column0 + c * 8 + g, 0), b[c][1] = word(TILE + column0 + c * 8 + g, 16);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                const u32 row = row0 + r * 16 + g, a[4] = {word(row, 0), word(row + 8, 0), word(row, 16), word(row + 8, 16)};
#pragma unroll
                for (u32 c = 0; c < COLUMNS; ++c) mma_s8(sums[r][c], a, b[c]);
            }
        }
        if (more) keep(stages + (now ^ 1) * BYTES);
        __syncthreads();
    }

    // Element e of an MMA's sums is of row g + e / 2 · 8 and column 2t + e % 2.
    auto each = [&](auto work) {
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r)
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (u32 e = 0; e < 4; ++e) work(r, c, e, row0 + r * 16 + g + e / 2 * 8, column0 + c * 8 + 2 * t + e % 2);
    };
    if constexpr (!SCALED) {
        each([&](u32 r, u32 c, u32 e, u32 row, u32 column) {
            if (m0 + row < M && n0 + column < N) out[u64(m0 + row) * N + n0 + column] = ELEMENT{sums[r][c][e]};
        });
    } else {
        float f[ROWS][COLUMNS][4];
        each([&](u32 r, u32 c, u32 e, u32 row, u32) {
            f[r][c][e] = float(sums[r][c][e]) * (m0 + row < M ? __ldg(row_stats + m0 + row) * (1.f / 127.f) : 0.f);
        });
        if (outliers != nullptr) {
            float* const xs = reinterpret_cast<float*>(stages);   // [TILE][CHUNK + 1]
            float* const ws = xs + TILE * (CHUNK + 1);            // [WIDTH][CHUNK + 1]
            static_assert((TILE + WIDTH) * (CHUNK + 1) * 4 <= 2 * BYTES, "entries of a chunk fit");
            u32 count = 1;
            for (u32 begin = 0; begin < count; begin += CHUNK) {
                if (begin % WINDOW == 0) {
                    __syncthreads();
                    if (warp == 0) {
                        const u32 found = list_columns(outliers, K, begin, list, lane);
                        if (lane == 0) outlier_count = found;
                    }
                    __syncthreads();
                    count = outlier_count;
                }
                const u32 columns = min(CHUNK, count - min(begin, count));
                for (u32 i = thread; i < (TILE + WIDTH) * CHUNK; i += BLOCK) {
                    const u32 row = i / CHUNK, c = i % CHUNK;
                    float value = 0.f;
                    if (c < columns) {
                        const u32 k = list[begin % WINDOW + c];
                        if (row < TILE) {
                            const u64 at = u64(m0 + row) * K + k;
                            if (m0 + row < M) value = residual(load_any(x, at, x_type), byte_value(q[at], 0), row_stats[m0 + row]);
                        } else if (n0 + row - TILE < N) {
                            value = byte_value(w[u64(n0 + row - TILE) * K + k], 0);
                        }
                    }
                    xs[row * (CHUNK + 1) + c] = value;
                }
                __syncthreads();
#pragma unroll 1
                for (u32 c0 = 0; c0 < columns; ++c0)
                    each([&](u32 r, u32 c, u32 e, u32 row, u32 column) {
                        f[r][c][e] = fmaf(xs[row * (CHUNK + 1) + c0], ws[column * (CHUNK + 1) + c0], f[r][c][e]);
                    });
                __syncthreads();
            }
        }
        each([&](u32 r, u32 c, u32 e, u32 row, u32 column) {
            const u32 n = n0 + column;
            if (m0 + row >= M || n >= N) return;
            const float added = bias == nullptr ? 0.f : to_float(bias[n]);
            out[u64(m0 + row) * N + n] = from_float<ELEMENT>(fmaf(f[r][c][e], __ldg(column_stats + n) * (1.f / 127.f), added));
        });
    }
}

#define PRODUCT(tile)                                                                                                         \
    KERNEL __launch_bounds__(BLOCK, 1)                                                                                        \
        matmul_int8_##tile(const u8* q, const u8* w, u32 M, u32 N, u32 K, const float* row_stats, const float* column_stats,  \
                           const Float* bias, ELEMENT* out, const void* x, u32 x_type, const u32* outliers) {                 \
        product<tile>(q, w, M, N, K, row_stats, column_stats, bias, out, x, x_type, outliers);                                \
    }
PRODUCT(32)
PRODUCT(128)
