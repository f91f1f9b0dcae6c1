// The rules, one element at a time: rust/halfbyte/src/optim/rules.rs.
#pragma once
#include "optim.cuh"

DEVICE float average(float old, float now, float decay, float rest) { return __fmaf_rn(rest, now, decay * old); }
// Of g², which does not overflow before its result does.
DEVICE float average_square(float old, float g, float decay, float rest) { return __fmaf_rn(rest * g, g, decay * old); }

// One over the root of a second moment plus eps: an ulp or two off, which is far less than what the parameter is rounded to.
DEVICE float over_root(float v, float eps) {
    float root, r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(root + eps));
    return r;
}

// STATES of a rule, how many of the first of them have the signed map, new states and update of an element, and the numbers for states
// that are still to be multiplied by these scales. The last state is
// too large, infinite or NaN if any is or if the gradient was.
struct Adam {
    static constexpr u32 STATES = 2, SIGNED = 1;
    static DEVICE float update(float (&s)[2], float g, const Scalars& k) {
        s[0] = average(s[0], g, k.beta1, k.rest1);
        s[1] = average_square(s[1], g, k.beta2, k.rest2);
        return k.rate * s[0] * over_root(s[1], k.eps);
    }
    static DEVICE void fold(Scalars& k, const float (&scales)[2]) { k.beta1 *= scales[0], k.beta2 *= scales[1]; }
};
struct AdEMAMix {
    static constexpr u32 STATES = 3, SIGNED = 2;
    static DEVICE float update(float (&s)[3], float g, const Scalars& k) {
        s[0] = average(s[0], g, k.beta1, k.rest1);
        s[1] = average(s[1], g, k.beta3, k.rest3);
        s[2] = average_square(s[2], g, k.beta2, k.rest2);
        return __fmaf_rn(k.rate, s[0], k.rate2 * s[1]) * over_root(s[2], k.eps);
    }
    static DEVICE void fold(Scalars& k, const float (&scales)[3]) {
        k.beta1 *= scales[0], k.beta3 *= scales[1], k.beta2 *= scales[2];
    }
};
struct Lion {
    static constexpr u32 STATES = 1, SIGNED = 1;
    static DEVICE float update(float (&s)[1], float g, const Scalars& k) {
        const float direction = average(s[0], g, k.beta1, k.rest1);
        s[0] = average(s[0], g, k.beta2, k.rest2);
        return direction == 0.f ? 0.f : copysignf(k.rate, direction);
    }
    static DEVICE void fold(Scalars& k, const float (&scales)[1]) { k.beta1 *= scales[0], k.beta2 *= scales[0]; }
};
struct Momentum {
    static constexpr u32 STATES = 1, SIGNED = 1;
    static DEVICE float update(float (&s)[1], float g, const Scalars& k) {
        s[0] = average(s[0], g, k.beta1, k.rest1);
        return __fmaf_rn(k.rate, s[0], k.rate2 * g);
    }
    static DEVICE void fold(Scalars& k, const float (&scales)[1]) { k.beta1 *= scales[0]; }
};
struct RmsProp {
    static constexpr u32 STATES = 1, SIGNED = 1;
    static DEVICE float update(float (&s)[1], float g, const Scalars& k) {
        s[0] = average_square(s[0], g, k.beta1, k.rest1);
        return k.rate * g * over_root(s[0], k.eps);
    }
    static DEVICE void fold(Scalars& k, const float (&scales)[1]) { k.beta1 *= scales[0]; }
};
struct Adagrad {
    static constexpr u32 STATES = 1, SIGNED = 1;
    static DEVICE float update(float (&s)[1], float g, const Scalars& k) {
        s[0] = __fmaf_rn(g, g, k.beta1 * s[0]);  // beta1 is 1
        return k.rate * g * over_root(s[0], k.eps);
    }
    static DEVICE void fold(Scalars& k, const float (&scales)[1]) { k.beta1 *= scales[0]; }
};
