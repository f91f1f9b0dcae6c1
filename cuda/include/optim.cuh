// What the optimizer kernels share: the table of parameters, elements of any type, the dynamic maps.
#pragma once
#include "common.cuh"

// The numbers of a step: `Scalars` in rust/halfbyte/src/optim/hyper.rs.
struct Scalars {
    float beta1, rest1, beta2, rest2, beta3, rest3, rate, rate2, eps, shrink, l2, trust, trust_eps;
    u32 step;
    float lr;
    u32 reserved;
};

constexpr u32 BLOCK = 256;  // elements that share a scale, and that a warp takes at a time
constexpr float LIMIT = 0x1p120f;  // no state reaches it

// What a group is, in device memory: pointers of gradients (null: left out of the step), then the parameters, then for each
// parameter the number of blocks before it, and in the end the number of all.
struct Parameter {
    u8* p;
    u8* states[3];
    float* absmax[3];
    u8* extra;
    u64 n;
    u64 about;  // see below
    float* step;
    float* update_squares;
    DEVICE u32 type() const { return u32(about) & 3; }
    DEVICE u32 grad_type() const { return u32(about) >> 2 & 3; }
    DEVICE bool eight() const { return about & 16; }
    DEVICE bool aligned() const { return about & 32; }
    DEVICE bool master() const { return about & 64; }
    DEVICE bool compensated() const { return about & 128; }
    DEVICE bool tiled() const { return about & 256; }
    DEVICE bool paged() const { return about & 512; }  // tiles have states in memory that may leave the device
    DEVICE u32 index() const { return u32(about >> 32); }
};
static_assert(sizeof(Parameter) == 96, "as rust/halfbyte/src/optim/cuda.rs has it");

struct Group {
    const u64* words;
    u32 count;
    u32 about;
    // There are 8-bit states, and there is room for their maps.
    DEVICE bool has_codes() const { return about & 1; }
    // There are parameters to be worked on by tiles.
    DEVICE bool has_tiles() const { return about & 2; }
    DEVICE const u8* grad(u32 i) const { return reinterpret_cast<const u8*>(__ldg(words + i)); }
    DEVICE const Parameter* at(u32 i) const { return reinterpret_cast<const Parameter*>(words + count) + i; }
    DEVICE const u64* starts() const { return words + count * 13ull; }
    DEVICE u32 start(u32 i) const { return u32(__ldg(starts() + i)); }  // fewer than 2^32 blocks: the host sees to it
};

// The parameter that a block belongs to, found by a warp together: it looks at 32 places at a time.
struct Place {
    u32 which = 0, first = 0, end = 0;
    // Whether it is another one than before.
    DEVICE bool seek(const Group& group, u32 block, u32 lane) {
        if (block < end) return false;
        u32 low = which, high = group.count;
        while (high - low > 1) {
            const u32 step = (high - low + WARP - 1) / WARP, at = low + step * lane;
            const u32 votes = __ballot_sync(ALL_LANES, at < high && group.start(min(at, group.count)) <= block);
            low += step * (31 - __clz(votes));
            high = min(high, low + step);
        }
        which = low;
        first = group.start(low);
        end = group.start(low + 1);
        return true;
    }
};

enum Type : u32 { BF16_TYPE, F16_TYPE, F32_TYPE };

// Loads and stores of what is used once: pointers that come from a table are not known to be global, and L1 has no use for the data.
DEVICE uint4 load_four(const u8* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
DEVICE uint2 load_two(const u8* from) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
DEVICE float load_float(const float* from) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}
DEVICE void store_four(u8* to, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
DEVICE void store_float(float* to, float v) { asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory"); }
DEVICE void store_two(u8* to, uint2 v) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory"); }

// The eight elements of a parameter that a lane has: of block `number`.
struct Spot {
    u32 number, lane;
    bool whole;  // the whole block is there, and lies so that it can be had by 16 bytes
    u64 n;       // elements of the parameter
    DEVICE u64 first() const { return u64(number) * BLOCK + lane * 8; }
    // How many of the eight there are.
    DEVICE u32 count() const { return u32(first() < n ? min(n - first(), 8ull) : 0); }
    DEVICE u64 offset(u32 size) const { return u64(number) * (BLOCK * size) + lane * (8 * size); }
};

// Eight neighbouring elements of a type that is known at run time, as they lie in memory: whole, or those before the end. They are
// asked for, and turned into floats later, so that other loads can be under way meanwhile.
struct Raw {
    u32 words[8];
    DEVICE void load(const u8* from, u32 type, Spot spot) {
        if (spot.whole) {
            const u8* at = from + spot.offset(type == F32_TYPE ? 4 : 2);
            set(0, load_four(at));
            // Zeros, for otherwise compilers keep whatever was there before.
            set(4, type == F32_TYPE ? load_four(at + 16) : make_uint4(0, 0, 0, 0));
            return;
        }
        const u32 count = spot.count();
        const u8* at = from + spot.offset(type == F32_TYPE ? 4 : 2);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) words[i] = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            if (i >= count) continue;
            if (type == F32_TYPE) words[i] = reinterpret_cast<const u32*>(at)[i];
            else words[i / 2] |= u32(reinterpret_cast<const u16*>(at)[i]) << (i % 2 * 16);
        }
    }
    DEVICE void store(u8* to, u32 type, Spot spot) const {
        if (spot.whole) {
            u8* at = to + spot.offset(type == F32_TYPE ? 4 : 2);
            store_four(at, words[0], words[1], words[2], words[3]);
            if (type == F32_TYPE) store_four(at + 16, words[4], words[5], words[6], words[7]);
            return;
        }
        const u32 count = spot.count();
        u8* at = to + spot.offset(type == F32_TYPE ? 4 : 2);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            if (i >= count) continue;
            if (type == F32_TYPE) reinterpret_cast<u32*>(at)[i] = words[i];
            else reinterpret_cast<u16*>(at)[i] = u16(words[i / 2] >> (i % 2 * 16));
        }
    }
    DEVICE void get(u32 type, float (&v)[8]) const {
        if (type == BF16_TYPE) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[2 * i] = as_float(words[i] << 16), v[2 * i + 1] = as_float(words[i] & 0xffff0000u);
        } else if (type == F16_TYPE) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[2 * i] = to_float(F16{u16(words[i])}), v[2 * i + 1] = to_float(F16{u16(words[i] >> 16)});
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = as_float(words[i]);
        }
    }
    // Rounds to nearest even.
    DEVICE void put(u32 type, const float (&v)[8]) {
        if (type == BF16_TYPE) {
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = Pack<Bf16>::two(v[2 * i], v[2 * i + 1]);
        } else if (type == F16_TYPE) {
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = Pack<F16>::two(v[2 * i], v[2 * i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) words[i] = as_bits(v[i]);
        }
    }

private:
    DEVICE void set(int i, uint4 v) { words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w; }
};

// An entry of a dynamic map, computed as rust/halfbyte/src/codebook.rs does, to the bit.
DEVICE float dynamic_value(u32 code, bool is_signed) {
    if (code == 255) return 1.f;
    const i32 from_zero = is_signed ? i32(code) - 127 : i32(code);
    if (from_zero == 0) return 0.f;
    const u32 k = is_signed ? u32(abs(from_zero)) : code + 1, octave = 31 - __clz(k), j = k - (1u << octave);
    const u32 decade = is_signed ? octave : octave - 1, intervals = 1u << octave;
    const float step = __fdiv_rn(__fadd_rn(1.f, -0.1f), float(intervals));
    auto grid = [&](u32 i) {
        return i < (intervals + 1) / 2 ? __fmaf_rn(step, float(i), 0.1f) : __fmaf_rn(-step, float(intervals - i), 1.f);
    };
    const float scales[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
    float scale = 0.f;
#pragma unroll
    for (u32 i = 0; i < 7; ++i)
        if (i == decade) scale = scales[i];
    const float value = __fmul_rn(scale, __fmul_rn(__fadd_rn(grid(j), grid(j + 1)), 0.5f));
    return from_zero < 0 ? -value : value;
}

// Random bits: rust/halfbyte/src/optim/hyper.rs.
DEVICE u32 mix(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}
DEVICE u32 noise_key(u64 seed, u32 step, u32 index) { return mix(mix(mix(mix(u32(seed)) + u32(seed >> 32)) + step) + index); }
DEVICE u32 noise(u32 key, u64 element) { return mix(u32(element) ^ mix(key + u32(element >> 32))); }

// One of the two neighbours of a value in a type, the nearer the likelier.
DEVICE float by_chance(u32 type, float v, u32 random) {
    const u32 bits = as_bits(v);
    if (type == F32_TYPE || !(fabsf(v) < as_float(0x7f800000u))) return v;
    if (type == BF16_TYPE) return as_float((bits + (random & 0xffff)) & 0xffff0000u);
    if (fabsf(v) >= 0x1p-14f) return as_float((bits + (random & 0x1fff)) & ~0x1fffu);
    const float steps = fabsf(v) * 0x1p24f + float(random & 0xffff) * 0x1p-16f;
    return copysignf(floorf(steps) * 0x1p-24f, v);
}

// The sum of a number of each lane, in every lane, in the same order always.
template <class T> DEVICE T warp_sum(T v) {
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step >>= 1) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

// Factors of a step that are on the device, each absent if null.
struct Factors {
    float scale;            // of gradients
    float max_norm;
    const float* divisor;   // of gradients
    const float* norm;      // of all gradients: they are shortened to max_norm
    const float* found_inf; // not zero: nothing is to change
    DEVICE bool is_off() const { return found_inf != nullptr && *found_inf != 0.f; }
    DEVICE float all() const {
        float v = scale;
        if (divisor != nullptr) v = __fdiv_rn(v, *divisor);
        if (norm != nullptr) v *= fminf(1.f, __fdiv_rn(max_norm, *norm + 1e-6f));
        return v;
    }
};

// Sums of squares of a parameter, in parts that are added in their order.
constexpr u32 SLICES = 32;
