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
#include "async_copy.cuh"
#include "optim_rules.cuh"
#include "search_table.cuh"
#include "shared.cuh"

constexpr u32 STATES = RULE::STATES;
constexpr bool BOTH = RULE::SIGNED < STATES;  // maps

// As rust/halfbyte/src/optim/cuda.rs has it: registers for rules with three states, and for the extras, cost warps.
#if __CUDA_ARCH__ >= 900
constexpr u32 WARPS = STATES > 2 ? 16 : 24;
constexpr u32 DEPTH = STATES == 2 ? 3 : 4;
constexpr u32 COPIES = 32;
#define RINGS
#else
constexpr u32 WARPS = STATES > 2 ? 20 : 24;
constexpr u32 DEPTH = 0;
constexpr u32 COPIES = 8;
#endif
constexpr u32 THREADS = WARPS * 32, EXTRAS_THREADS = 512;

using SignedTable = SearchTable<6, true>;
using UnsignedTable = SearchTable<7, false>;

// What a warp works on, of a parameter: read once for all its blocks that come one after the other.
struct Slot {
    Scalars k;
    Parameter at;
    const u8* grad;
    float trust;
    u32 reserved;
};
struct Shared {
    Slot slots[WARPS];
    SignedTable first;
    UnsignedTable last;  // where there is a rule's need for it
};
// Behind it are copies of the maps, those of an entry of either in one row: rows of 256 bytes make an address of a code by one
// instruction. Then each warp has a ring of DEPTH places for blocks of 16-bit parameters that it has asked for: parameter, gradient,
// codes. Copies are by 16 bytes, which is what both the places and the offsets in them are multiples of.
constexpr u32 round_up(u32 bytes) { return (bytes + 127) / 128 * 128; }
constexpr u32 ROWS_AT = round_up(BOTH ? sizeof(Shared) : sizeof(Shared) - sizeof(UnsignedTable));
constexpr u32 ROW_BYTES = COPIES == 32 ? 256 : COPIES * 4 * (1 + BOTH);
constexpr u32 RINGS_AT = ROWS_AT + 256 * ROW_BYTES;
constexpr u32 PLACE_BYTES = 1024 + STATES * 256;
constexpr u32 SHARED_BYTES = RINGS_AT + WARPS * DEPTH * PLACE_BYTES;
static_assert(sizeof(Slot) == 176 && PLACE_BYTES % 16 == 0 && SHARED_BYTES <= 232448, "as the host has it");

// What makes tables and the copies of maps. The place of the copies holds a map itself, and what its table is made from, before.
DEVICE void fill(Shared& shared, u8* rows) {
    float* const map = reinterpret_cast<float*>(rows);
    Midpoints& midpoints = *reinterpret_cast<Midpoints*>(rows + 1024);
    static_assert(sizeof(Midpoints) + 1024 <= 256 * ROW_BYTES, "room for both");
    const u32 mine = threadIdx.x % 256;
    float values[1 + BOTH];
#pragma unroll
    for (u32 m = 0; m < 1 + BOTH; ++m) {
        map[mine] = values[m] = dynamic_value(mine, m == 0);
        __syncthreads();
        if (m == 0) shared.first.fill(map, midpoints);
        else shared.last.fill(map, midpoints);
    }
#pragma unroll
    for (u32 m = 0; m < 1 + BOTH; ++m)
        for (u32 c = threadIdx.x / 256; c < COPIES; c += blockDim.x / 256)
            reinterpret_cast<float*>(rows + mine * ROW_BYTES)[m * COPIES + (c + mine) % COPIES] = values[m];
    __syncthreads();
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

// Tables and maps, as a lane finds them.
struct Maps {
    u32 rows, copy;  // shared address, and place in a row, in bytes
    u32 first, last;  // tables
    // The value of byte `i` of two words, without a scale.
    DEVICE float decode(u32 s, uint2 codes, u32 i) const {
        const u32 word = i < 4 ? codes.x : codes.y, map = s < RULE::SIGNED ? 0 : COPIES * 4;
        if (ROW_BYTES == 256) return as_float(look_up(rows + __byte_perm(word, copy, 0x5504 + i % 4 * 16) + map));
        return as_float(look_up(rows + copy + __byte_perm(word, 0, 0x4440 + i % 4) * ROW_BYTES + map));
    }
    // Codes of states of a block whose largest magnitude is `scale`. QUICK: for scales whose inverse has a scaled form that is exact.
    template <bool QUICK> DEVICE uint2 encode(u32 s, const float (&states)[8], float scale) const {
        const float inverse = inverse_of(scale), scaled = inverse * 0x1p-100f;
        u32 c[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const float v = s < RULE::SIGNED ? states[i] : fabsf(states[i]);
            const float x = QUICK ? v * scaled : v * inverse * 0x1p-100f;
            c[i] = s < RULE::SIGNED ? SignedTable::encode_at(first, x) : UnsignedTable::encode_at(last, x);
        }
        return make_uint2(top_bytes(c[0], c[1], c[2], c[3]), top_bytes(c[4], c[5], c[6], c[7]));
    }
};

// The largest magnitude in the block, as bits: above those of any number if there is a NaN.
DEVICE u32 largest(u32 s, const float (&states)[8]) {
    u32 m = 0;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) m = max(m, s < RULE::SIGNED ? magnitude(states[i]) : as_bits(states[i]));
    return warp_max(m);
}

// A lane's part of a whole block with 8-bit states, parameter and gradient of one type: of what nearly all of the time goes to.
struct Part {
    uint2 codes[STATES];
    float scales[STATES], states[STATES][8], updates[8];

    // New states, their scales, updates. False if an element is to be left as it is or a scale is out of the ordinary.
    DEVICE bool advance(const Maps& maps, Scalars k, float factor, const float (&p)[8], const float (&g)[8]) {
        RULE::fold(k, scales);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            float s[STATES];
#pragma unroll
            for (u32 j = 0; j < STATES; ++j) s[j] = maps.decode(j, codes[j], i);
            updates[i] = RULE::update(s, __fmaf_rn(k.l2, p[i], g[i] * factor), k);
#pragma unroll
            for (u32 j = 0; j < STATES; ++j) states[j][i] = s[j];
        }
        u32 all = 0;
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            const u32 m = largest(s, states[s]);
            scales[s] = as_float(m);
            all = max(all, m);
        }
        return all < as_bits(0x1p20f);
    }
    DEVICE void move(const Scalars& k, float (&p)[8]) const {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) p[i] -= __fmaf_rn(k.shrink, p[i], updates[i]);
    }
    // The state is written where it was read.
    DEVICE void store(const Maps& maps, u32 s, u8* to, float* scale, bool is_first) const {
        store_two(to, maps.encode<true>(s, states[s], scales[s]));
        if (is_first) store_float(scale, scales[s]);
    }
};

// What whole blocks with 8-bit states need, and what they go through.
struct Steps {
    const Slot& slot;
    const Request& request;
    const float factor;
    const Maps maps;
    const u32 ring;  // that of this warp

    // The numbers for whole blocks with 8-bit states.
    DEVICE Scalars numbers() const {
        Scalars k = slot.k;
#ifdef LIMITED
        k.rate *= slot.trust, k.rate2 *= slot.trust;
#endif
        return k;
    }

    // A whole block with 8-bit states, parameter and gradient of one type. False, and nothing written, if it is
    // not one that a Part does.
    DEVICE bool quick(u32 type, const Spot& spot) const {
        Raw parameter, gradient;
        Part part;
        parameter.load(slot.at.p, type, spot);
        gradient.load(slot.grad, type, spot);
        const u64 at = spot.offset(1);
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            part.codes[s] = load_two(slot.at.states[s] + at);
            part.scales[s] = load_float(slot.at.absmax[s] + spot.number);
        }
        const Scalars k = numbers();
        float p[8], g[8];
        parameter.get(type, p);
        gradient.get(type, g);
        if (!part.advance(maps, k, factor, p, g)) return false;
        part.move(k, p);
        parameter.put(type, p);
        parameter.store(slot.at.p, type, spot);
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) part.store(maps, s, slot.at.states[s] + at, slot.at.absmax[s] + spot.number, spot.lane == 0);
        return true;
    }

#ifdef RINGS
    // Whether states can be had by 16 bytes, and there are rings: GPUs that have less shared memory, as those of capability 12.0, are
    // asked for what comes before these alone.
    DEVICE bool copyable() const {
        u32 bytes;
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
        u64 all = 0;
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) all |= u64(slot.at.states[s]);
        return all % 16 == 0 && bytes >= SHARED_BYTES;
    }

    // The same for every `stride`-th block from `number` up to `end`, of 16-bit types. DEPTH blocks are under way while one is worked
    // on. Returns the first block that is not done: one past the end, or one that a Part does not do.
    template <u32 TYPE> DEVICE u32 run(u32 number, const u32 stride, const u32 end, const u32 lane) const {
        constexpr u32 PAIRS = (STATES + 1) / 2;  // of states, each copied by half of a warp
        const Scalars k = numbers();
        u8* const parameter_at = slot.at.p + lane * 16;
        const u8* const gradient_at = slot.grad + lane * 16;
        const u8* pairs_at[PAIRS];
#pragma unroll
        for (u32 j = 0; j < PAIRS; ++j) pairs_at[j] = slot.at.states[min(2 * j + lane / 16, STATES - 1)] + lane % 16 * 16;
        u8* states_at[STATES];
        float* scales_at[STATES];
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) states_at[s] = slot.at.states[s] + lane * 8, scales_at[s] = slot.at.absmax[s];
        const u32 wide = ring + lane * 16, narrow = ring + 1024 + lane * 8;
        auto ask = [&](u32 place, u32 block) {
            if (block < end) {
                copy16(wide + place, parameter_at + u64(block) * 512);
                copy16(wide + place + 512, gradient_at + u64(block) * 512);
#pragma unroll
                for (u32 j = 0; j < PAIRS; ++j)
                    if (2 * j + 1 < STATES || lane < 16) copy16(wide + place + 1024 + j * 512, pairs_at[j] + u64(block) * 256);
            }
            commit();
        };
        float next[STATES];
        auto ask_scales = [&](u32 block) {
#pragma unroll
            for (u32 s = 0; s < STATES; ++s) next[s] = block < end ? load_float(scales_at[s] + block) : 0.f;
        };
        u32 ahead = number;  // fewer than 2^31 blocks in all, so that this does not overflow
#pragma unroll
        for (u32 d = 0; d < DEPTH; ++d, ahead += stride) ask(d * PLACE_BYTES, ahead);
        ask_scales(number);
        u32 place = 0;
        for (; number < end; number += stride, ahead += stride) {
            wait_for_copies<DEPTH - 1>();
            __syncwarp();  // what other lanes have copied
            Raw parameter, gradient;
            Part part;
            const uint4 a = load_uint4(wide + place), b = load_uint4(wide + place + 512);
            parameter.words[0] = a.x, parameter.words[1] = a.y, parameter.words[2] = a.z, parameter.words[3] = a.w;
            gradient.words[0] = b.x, gradient.words[1] = b.y, gradient.words[2] = b.z, gradient.words[3] = b.w;
#pragma unroll
            for (u32 s = 0; s < STATES; ++s) part.codes[s] = load_uint2(narrow + place + s * 256), part.scales[s] = next[s];
            __syncwarp();  // before others copy to where this lane has read
            ask(place, ahead);
            ask_scales(number + stride);
            place = place == (DEPTH - 1) * PLACE_BYTES ? 0 : place + PLACE_BYTES;
            float p[8], g[8];
            parameter.get(TYPE, p);
            gradient.get(TYPE, g);
            if (!part.advance(maps, k, factor, p, g)) break;
            part.move(k, p);
            parameter.put(TYPE, p);
            store_four(parameter_at + u64(number) * 512, parameter.words[0], parameter.words[1], parameter.words[2], parameter.words[3]);
#pragma unroll
            for (u32 s = 0; s < STATES; ++s) part.store(maps, s, states_at[s] + u64(number) * 256, scales_at[s] + number, lane == 0);
        }
        wait_for_copies<0>();
        __syncwarp();
        return number;
    }
#endif
};

// Any block of a parameter.
struct Work {
    const Slot& slot;
    const Request& request;
    const float factor;

    float p[8], g[8], states[STATES][8], updates[8];

    // Nothing is known of what is in it.
    DEVICE explicit Work(const Steps& steps) : slot(steps.slot), request(steps.request), factor(steps.factor) {}

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
    u8* const rows = memory + ROWS_AT;
    if (request.group.reserved == 0) fill(shared, rows);  // there are 8-bit states, and room for their maps
    const u32 lane = threadIdx.x % WARP;
    const u32 together = blockDim.x / WARP, warps = gridDim.x * together;
    Slot& slot = shared.slots[threadIdx.x / WARP];
    if (lane == 0) slot.k = request.scalars, slot.trust = 1.f;
    __syncwarp();
    const Maps maps{shared_address(rows), lane % COPIES * 4, shared.first.place(), BOTH ? shared.last.place() : 0};
    const u32 ring = shared_address(memory) + RINGS_AT + threadIdx.x / WARP * (DEPTH * PLACE_BYTES);
    Steps steps{slot, request, request.factors.all(), maps, ring};
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
#ifdef RINGS
            if (type != F32_TYPE && steps.copyable()) {
                const u32 end = min(u32(slot.at.n / BLOCK), u32(request.to) - place.first);
                const u32 left = type == BF16_TYPE ? steps.template run<BF16_TYPE>(number, warps, end, lane)
                                                   : steps.template run<F16_TYPE>(number, warps, end, lane);
                if (left != number) {
                    block = place.first + left - warps;  // the loop goes on from there
                    continue;
                }
            }
            const bool done = steps.quick(type, spot);  // here it is for what has no ring: one form is enough
#else
            const bool done = type == BF16_TYPE  ? steps.quick(BF16_TYPE, spot)
                              : type == F16_TYPE ? steps.quick(F16_TYPE, spot)
                                                 : steps.quick(F32_TYPE, spot);
#endif
            if (done) continue;
        }
        Work work(steps);
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
            const float stored = load_float(slot.at.absmax[s] + number);
            uint2 codes;
            if (whole) {
                codes = load_two(from + spot.offset(1));
            } else {
                const u8* at = from + spot.offset(1);
                const u32 count = spot.count();
                u32 words[2] = {};
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    const u32 zero = s < RULE::SIGNED ? 127 : 0;
                    words[i / 4] |= (i < count ? u32(at[i]) : zero) << (i % 4 * 8);
                }
                codes = make_uint2(words[0], words[1]);
            }
            // A scale that is none of ours: the block begins anew.
            const float scale = fabsf(stored) < LIMIT ? stored : 0.f;
#pragma unroll
            for (u32 i = 0; i < 8; ++i) work.states[s][i] = maps.decode(s, codes, i) * scale;
        }
        p.get(master ? u32(F32_TYPE) : slot.at.type(), work.p);
        g.get(slot.at.grad_type(), work.g);
        if (SUMS) {
            work.update();
            float2 sum = make_float2(0.f, 0.f);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {  // past the end all is zero
                sum.x += work.p[i] * work.p[i];
                if (i < spot.count() && !work.is_left(work.updates[i])) sum.y += work.updates[i] * work.updates[i];
            }
            sum = make_float2(warp_sum(sum.x), warp_sum(sum.y));
            if (lane == 0) sums[block] = sum;
            continue;
        }
        work.update();
        if (!EXTRAS) work.move();
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            u8* to = slot.at.states[s];
            if (!eight) {
                Raw raw;
                raw.put(F32_TYPE, work.states[s]);
                raw.store(to, F32_TYPE, spot);
                continue;
            }
            const float scale = as_float(largest(s, work.states[s]));
            const uint2 codes = maps.encode<false>(s, work.states[s], scale);
            if (lane == 0) slot.at.absmax[s][number] = scale;
            if (whole) {
                store_two(to + spot.offset(1), codes);
            } else {
                u8* at = to + spot.offset(1);
                const u32 count = spot.count();
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    if (i < count) at[i] = u8((i < 4 ? codes.x : codes.y) >> (i % 4 * 8));
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
