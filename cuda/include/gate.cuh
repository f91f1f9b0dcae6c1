// Gated linear units (Shazeer 2020, arXiv:2002.05202): what becomes of a sum of the first half and one of the second.
#pragma once
#include "common.cuh"

enum Gate : u32 { NOT_GATED, SILU, GELU_TANH };
DEVICE float gated(u32 gate, float a, float up) {
    // a · σ(a), and GELU's approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415), which is a · σ(2 √(2/π) (a + 0.044715 a³)).
    const float z = gate == SILU ? a : 1.5957691216f * (a + 0.044715f * a * a * a);
    return a / (1.f + expf(-z)) * up;
}
