// A step of an optimizer over a whole group of parameters, compiled once for each RULE (optim_rules.cuh).
//
//   g = gradient · factors + l2 · p       states and update by the rule
//   δ = shrink · p + trust · update       p ← round(p − δ)
//
// A warp takes a block of 256 elements, 8 a lane: 16 bytes of a 16-bit parameter and of its gradient, 8 bytes of each 8-bit state.
// 8-bit states are decoded through the dynamic maps in shared memory (a copy for each bank, where there is room), and get their
// codes by one look-up and one addition (search_table.cuh), after one redux instruction for the block's largest magnitude.
// Blocks of all parameters are numbered together; warps stride over them, so that neighbours work on neighbours.
// Bytes moved an element: parameter twice, gradient, states twice, 8/256 for each 8-bit state.
// From sm_75 on. GPUs before Hopper run that image too: each of their multiprocessors has less to keep up with.
#include "optim_rules.cuh"
#include "search_table.cuh"

// As rust/halfbyte/src/optim/cuda.rs has it. Registers for rules with three states, and for the extras, cost warps.
constexpr u32 THREADS = RULE::STATES > 2 ? 640 : 768, EXTRAS_THREADS = 512;
constexpr u32 STATES = RULE::STATES;
constexpr bool BOTH = RULE::SIGNED < STATES;  // maps
#if __CUDA_ARCH__ >= 900
constexpr u32 COPIES = 32;
#else
constexpr u32 COPIES = 8;
#endif

using SignedTable = SearchTable<6, true>;
using UnsignedTable = SearchTable<7, false>;

template <class Table, bool SIGNED> struct Map {
    Table search;
    float values[256 * COPIES];
    DEVICE void fill() {
        // The place of the copies holds the map itself, and what the table is made from, until they are made.
        Midpoints& midpoints = *reinterpret_cast<Midpoints*>(values + 256);
        static_assert(sizeof(Midpoints) + 1024 <= sizeof(values), "room for both");
        const u32 mine = threadIdx.x % 256;
        const float value = dynamic_value(mine, SIGNED);
        values[mine] = value;
        __syncthreads();
        search.fill(values, midpoints);
        for (u32 c = threadIdx.x / 256; c < COPIES; c += blockDim.x / 256) values[mine * COPIES + (c + mine) % COPIES] = value;
        __syncthreads();
    }
};

// What a warp works on, of a parameter: read once for all its blocks that come one after the other.
struct Slot {
    Scalars k;
    Parameter at;
    const u8* grad;
    float trust;
    u32 reserved;
};
struct Shared {
    Slot slots[THREADS / 32];
    Map<SignedTable, true> first;
    Map<UnsignedTable, false> last;  // where there is a rule's need for it
};

// The value of byte `i` of two words; `place` is the shared address of a lane's copy of the map.
DEVICE float decode(u32 place, uint2 codes, u32 i) {
    const u32 code = __byte_perm(i < 4 ? codes.x : codes.y, 0, 0x4440 + i % 4);
    float v;
    asm("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(place + code * (COPIES * 4)));
    return v;
}

DEVICE u32 warp_max(u32 m) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(m));
    return r;
#else
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step >>= 1) m = max(m, __shfl_xor_sync(ALL_LANES, m, step));
    return m;
#endif
}

struct Request {
    Group group;
    Scalars scalars;        // of every parameter, unless
    const Scalars* each;    // there is one for each
    Factors factors;
    u64 seed;
    const double2* slices;  // sums of squares of parameters and updates, if updates are limited
    u64 from, to;           // blocks to work on
    u32 skip_zeros, by_chance;
};

// One block of a parameter.
struct Work {
    const Slot& slot;
    const Request& request;
    const float factor;
    // Shared addresses of the maps: values, and tables of codes.
    const u32 first_values, last_values, first_codes, last_codes;

    float p[8], g[8];
    uint2 codes[STATES];
    float scales[STATES], states[STATES][8], updates[8];
    u32 most[STATES];

    // Without scales.
    DEVICE float decoded(u32 s, u32 i) const { return decode(s < RULE::SIGNED ? first_values : last_values, codes[s], i); }

    // The largest magnitudes in the block.
    DEVICE void measure() {
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            u32 m = 0;
#pragma unroll
            for (u32 i = 0; i < 8; ++i) m = max(m, s < RULE::SIGNED ? magnitude(states[s][i]) : as_bits(states[s][i]));
            most[s] = warp_max(m);
        }
    }

    // QUICK: for scales whose inverse has a scaled form that is exact.
    template <bool QUICK> DEVICE void encode() {
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            const float scale = as_float(most[s]), inverse = inverse_of(scale);
            const float scaled = inverse * 0x1p-100f;
            u32 c[8];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const float v = s < RULE::SIGNED ? states[s][i] : fabsf(states[s][i]);
                const float x = QUICK ? v * scaled : v * inverse * 0x1p-100f;
                c[i] = s < RULE::SIGNED ? SignedTable::encode_at(first_codes, x) : UnsignedTable::encode_at(last_codes, x);
            }
            codes[s] = make_uint2(top_bytes(c[0], c[1], c[2], c[3]), top_bytes(c[4], c[5], c[6], c[7]));
            scales[s] = scale;
        }
    }

    // A whole block with 8-bit states, parameter and gradient of one type, which is known: what nearly all of the time goes to. False,
    // and nothing written, if an element is to be left as it is or a scale is out of the ordinary.
    template <u32 TYPE> DEVICE bool quick(const Spot& spot) {
        Raw parameter, gradient;
        parameter.load(slot.at.p, TYPE, spot);
        gradient.load(slot.grad, TYPE, spot);
        const u64 at = spot.offset(1);
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            codes[s] = load_two(slot.at.states[s] + at);
            scales[s] = load_float(slot.at.absmax[s] + spot.number);
        }
        Scalars k = slot.k;
#ifdef LIMITED
        k.rate *= slot.trust, k.rate2 *= slot.trust;
#endif
        parameter.get(TYPE, p);
        gradient.get(TYPE, g);
        RULE::fold(k, scales);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            float s[STATES];
#pragma unroll
            for (u32 j = 0; j < STATES; ++j) s[j] = decoded(j, i);
            updates[i] = RULE::update(s, __fmaf_rn(k.l2, p[i], g[i] * factor), k);
#pragma unroll
            for (u32 j = 0; j < STATES; ++j) states[j][i] = s[j];
        }
        measure();
        u32 all = most[0];
#pragma unroll
        for (u32 s = 1; s < STATES; ++s) all = max(all, most[s]);
        if (all >= as_bits(0x1p20f)) return false;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) p[i] -= __fmaf_rn(k.shrink, p[i], updates[i]);
        parameter.put(TYPE, p);
        parameter.store(slot.at.p, TYPE, spot);
        encode<true>();
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            store_two(slot.at.states[s] + at, codes[s]);
            if (spot.lane == 0) slot.at.absmax[s][spot.number] = scales[s];
        }
        return true;
    }

    // New states and updates; what is to be left as it is gets an update of NaN.
    DEVICE void update() {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            float s[STATES];
#pragma unroll
            for (u32 j = 0; j < STATES; ++j) s[j] = states[j][i];
            const float scaled = g[i] * factor;
            const float moved = RULE::update(s, __fmaf_rn(slot.k.l2, p[i], scaled), slot.k);
            const bool left = !(fabsf(s[STATES - 1]) < LIMIT) || (request.skip_zeros && scaled == 0.f);
            updates[i] = left ? as_float(0x7fffffffu) : moved;
#pragma unroll
            for (u32 j = 0; j < STATES; ++j) states[j][i] = left ? states[j][i] : s[j];
        }
    }
    DEVICE static bool is_left(float update) { return update != update; }

    // What is taken from an element.
    DEVICE float change(u32 i) const { return __fmaf_rn(slot.k.shrink, p[i], slot.trust * updates[i]); }

    DEVICE void move() {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const float moved = p[i] - change(i);
            p[i] = is_left(updates[i]) ? p[i] : moved;
        }
    }

    // The parameter is to be written after this.
    DEVICE void move_with_extras(u32 type, Spot spot) {
        Raw raw;
        if (slot.at.compensated()) {
            Raw lost, before;
            float kept[8], was[8];
            lost.load(slot.at.extra, type, spot);
            lost.get(type, kept);
            before.put(F32_TYPE, p);
            before.get(F32_TYPE, was);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                const bool left = is_left(updates[i]);
                const float d = kept[i] - change(i);
                p[i] = left ? p[i] : p[i] + d;
                kept[i] = left ? kept[i] : d;
            }
            float now[8];
            raw.put(type, p);
            raw.get(type, now);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) kept[i] = is_left(updates[i]) ? kept[i] : (was[i] - now[i]) + kept[i];
            lost.put(type, kept);
            lost.store(slot.at.extra, type, spot);
            return;
        }
        move();
        if (slot.at.master()) {
            raw.put(F32_TYPE, p);
            raw.store(slot.at.extra, F32_TYPE, spot);
        } else if (request.by_chance) {
            const u32 key = noise_key(request.seed, slot.k.step, slot.at.index());
#pragma unroll
            for (u32 i = 0; i < 8; ++i) p[i] = by_chance(type, p[i], noise(key, spot.first() + i));
        }
    }
};

// Goes over all blocks of a group. EXTRAS: master copies, compensation, rounding by chance. SUMS: nothing is written but each
// block's sums of squares of parameter and update.
template <bool EXTRAS, bool SUMS> DEVICE void step(const Request& request, float2* sums) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (request.factors.is_off()) return;
    shared.first.fill();
    if (BOTH) shared.last.fill();
    const u32 lane = threadIdx.x % WARP;
    const u32 together = blockDim.x / WARP, warps = gridDim.x * together;
    Slot& slot = shared.slots[threadIdx.x / WARP];
    if (lane == 0) slot.k = request.scalars, slot.trust = 1.f;
    __syncwarp();
    auto copy_of = [&](const float* values) { return shared_address(values) + lane % COPIES * 4; };
    Work work{slot, request, request.factors.all(), copy_of(shared.first.values), BOTH ? copy_of(shared.last.values) : 0,
              shared.first.search.place(), BOTH ? shared.last.search.place() : 0};
    Place place;
    for (u32 block = u32(request.from) + blockIdx.x * together + threadIdx.x / WARP; block < u32(request.to); block += warps) {
        if (place.seek(request.group, block, lane)) {
            __syncwarp();
            auto copy = [&](void* to, const void* from, u32 words) {
                if (lane < words) static_cast<u32*>(to)[lane] = __ldg(static_cast<const u32*>(from) + lane);
            };
            copy(&slot.at, request.group.at(place.which), sizeof(Parameter) / 4);
            copy(&slot.grad, request.group.words + place.which, 2);
            if (request.each != nullptr) copy(&slot.k, request.each + place.which, sizeof(Scalars) / 4);
            __syncwarp();
            if (!SUMS && request.slices != nullptr) {
                const double2 part = request.slices[u64(place.which) * SLICES + lane];
                const double length = sqrt(warp_sum(part.x)), update = sqrt(warp_sum(part.y));
                const double most = double(slot.k.trust) * length + double(slot.k.trust_eps);
                if (lane == 0) slot.trust = slot.k.trust > 0.f && update > most ? float(most / update) : 1.f;
                __syncwarp();
            }
        }
        if (slot.grad == nullptr) {
            if (SUMS && lane == 0) sums[block] = make_float2(0.f, 0.f);
            continue;
        }
        const u32 number = block - place.first;
        const bool whole = slot.at.aligned() && number < u32(slot.at.n / BLOCK), eight = slot.at.eight();
        const Spot spot{number, lane, whole, slot.at.n};
        const bool master = (EXTRAS || SUMS) && slot.at.master();
        if (!EXTRAS && !SUMS && whole && eight && !request.skip_zeros && slot.at.type() == slot.at.grad_type()) {
            const u32 type = slot.at.type();
            const bool done = type == BF16_TYPE  ? work.template quick<BF16_TYPE>(spot)
                              : type == F16_TYPE ? work.template quick<F16_TYPE>(spot)
                                                 : work.template quick<F32_TYPE>(spot);
            if (done) continue;
        }
        Raw p, g;
        p.load(master ? slot.at.extra : slot.at.p, master ? u32(F32_TYPE) : slot.at.type(), spot);
        g.load(slot.grad, slot.at.grad_type(), spot);
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            const u8* from = slot.at.states[s];
            if (!eight) {
                Raw raw;
                raw.load(from, F32_TYPE, spot);
                raw.get(F32_TYPE, work.states[s]);
                continue;
            }
            work.scales[s] = load_float(slot.at.absmax[s] + number);
            if (whole) {
                work.codes[s] = load_two(from + spot.offset(1));
            } else {
                const u64 first = spot.first(), n = spot.n;
                u32 words[2] = {};
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    const u32 zero = s < RULE::SIGNED ? 127 : 0;
                    words[i / 4] |= (first + i < n ? u32(from[first + i]) : zero) << (i % 4 * 8);
                }
                work.codes[s] = make_uint2(words[0], words[1]);
            }
        }
        p.get(master ? u32(F32_TYPE) : slot.at.type(), work.p);
        g.get(slot.at.grad_type(), work.g);
        if (eight) {
#pragma unroll
            for (u32 s = 0; s < STATES; ++s) {
                // A scale that is none of ours: the block begins anew.
                const float scale = fabsf(work.scales[s]) < LIMIT ? work.scales[s] : 0.f;
#pragma unroll
                for (u32 i = 0; i < 8; ++i) work.states[s][i] = work.decoded(s, i) * scale;
            }
        }
        if (SUMS) {
            work.update();
            float2 sum = make_float2(0.f, 0.f);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {  // past the end all is zero
                sum.x += work.p[i] * work.p[i];
                if (spot.first() + i < spot.n && !work.is_left(work.updates[i])) sum.y += work.updates[i] * work.updates[i];
            }
            sum = make_float2(warp_sum(sum.x), warp_sum(sum.y));
            if (lane == 0) sums[block] = sum;
            continue;
        }
        work.update();
        if (!EXTRAS) work.move();
        if (eight) {
            work.measure();
            work.template encode<false>();
        }
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            u8* to = slot.at.states[s];
            if (!eight) {
                Raw raw;
                raw.put(F32_TYPE, work.states[s]);
                raw.store(to, F32_TYPE, spot);
                continue;
            }
            if (lane == 0) slot.at.absmax[s][number] = work.scales[s];
            if (whole) {
                store_two(to + spot.offset(1), work.codes[s]);
            } else {
                const u64 first = spot.first(), n = spot.n;
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    if (first + i < n) to[first + i] = u8((i < 4 ? work.codes[s].x : work.codes[s].y) >> (i % 4 * 8));
            }
        }
        if (EXTRAS) work.move_with_extras(slot.at.type(), spot);
        p.put(slot.at.type(), work.p);
        p.store(slot.at.p, slot.at.type(), spot);
    }
}

#define NAME2(a, b) a##b
#define NAME(a, b) NAME2(a, b)

KERNEL __launch_bounds__(THREADS, 1) NAME(optim_, ENTRY)(const Request request) { step<false, false>(request, nullptr); }
KERNEL __launch_bounds__(EXTRAS_THREADS, 1) NAME(optim_extras_, ENTRY)(const Request request) { step<true, false>(request, nullptr); }
#ifdef LIMITED
// For rules whose updates are limited: [blocks] sums of squares of parameter and update.
KERNEL __launch_bounds__(THREADS, 1) NAME(optim_sums_, ENTRY)(const Request request, float2* sums) { step<false, true>(request, sums); }
#endif
