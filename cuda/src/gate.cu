// out[m, n] = act(a[m, n]) · a[m, N + n]: what follows a product with a gated weight that did not do it itself (gate.cuh).
//
//   a [M, 2·N], out [M, N] row by row; act is SiLU or GELU, computed in fp32 and rounded once
//
// A thread has eight neighbours of a row, or one where rows are no multiples of eight or do not begin at a multiple of 16 bytes.
// Grid: as many blocks of 256 threads as that takes; no table and no sum, so nothing is gained by fewer.
// Bytes: 3 · M·N · size.
//
// From sm_90 on by programmatic dependent launch, on both sides: blocks are there when the product ends, and what follows may be there when this
// does.
#include "gate.cuh"
#if __CUDA_ARCH__ >= 900
#include "hopper.cuh"
#endif

// Not by Eight's own load, which is for what no kernel writes: the one ahead may still do when this one begins.
template <class T> DEVICE Eight<T> read(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }
template <> DEVICE Eight<F32> read<F32>(const F32* p) {
    return {reinterpret_cast<const float4*>(p)[0], reinterpret_cast<const float4*>(p)[1]};
}

template <class T> DEVICE void gate_rows(const T* a, T* out, u64 count, u32 N, u32 eights, u32 gate) {
#if __CUDA_ARCH__ >= 900
    let_dependents_start();
    wait_for_predecessors();
#endif
    const u64 i = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * (eights ? 8 : 1);
    if (i >= count) return;
    const u64 at = i / N * N + i;  // rows before this one have N more each
    if (eights) {
        Eight<T> x = read(a + at);
        const Eight<T> up = read(a + at + N);
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = gated(gate, x.get(j), up.get(j));
        x.set(v);
        x.store(out + i);
    } else out[i] = from_float<T>(gated(gate, to_float(a[at]), to_float(a[at + N])));
}

// count = M·N; `eights`: N is a multiple of 8, and both tensors lie at one of 16 bytes.
#define GATE(NAME, T) \
    KERNEL gate_##NAME(const T* a, T* out, u64 count, u32 N, u32 eights, u32 gate) { gate_rows(a, out, count, N, eights, gate); }
GATE(bf16, Bf16)
GATE(f16, F16)
GATE(f32, F32)
