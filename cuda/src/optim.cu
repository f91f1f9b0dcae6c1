// A step of an optimizer over a whole group of parameters, compiled once for each RULE (optim_rules.cuh).
//
//   g = gradient · factors + l2 · p       states and update by the rule
//   δ = shrink · p + trust · update       p ← round(p − δ)
//
// A warp takes a block of 256 elements, 8 a lane: 16 bytes of a 16-bit parameter and of its gradient, 8 bytes of each 8-bit state.
// 8-bit states are decoded through the dynamic maps in shared memory (a copy for each bank, where there is room), and get their
// codes by one look-up and one addition (search_table.cuh), after one redux instruction for the block's largest magnitude.
//
// On Hopper, large 16-bit parameters with 8-bit states go through shared memory by tiles of TILE blocks (optim_tiles.cuh), which a
// warp of its own copies in and out in bulk, paged states by its lanes: every multiprocessor has DEPTH tiles there, and takes every
// gridDim.x-th.
// A multiprocessor's shared memory, for rules with one, two and three states, in bytes (a GPU that has less has no tiles):
//
//   what each warp works on, barriers, tables       19456   33280   32512
//   maps: [256] rows of 64 banks                    65536   65536   65536
//   DEPTH places for tiles                         123392  111360  108288     4 × 24 blocks, 3 × 24, 3 × 20
//
// Everything else has its blocks numbered through all parameters; warps stride over them, so that neighbours work on neighbours,
// and read and write global memory directly: smaller parameters and the ends of large ones, unaligned ones, other types, 32-bit
// states, extras, and all on GPUs before Hopper, which run the image for sm_75: each of their multiprocessors has less to keep up with.
// Bytes moved an element: parameter twice, gradient, states twice, 8/256 for each 8-bit state.
#include "optim_rules.cuh"
#include "optim_tiles.cuh"
#include "search_table.cuh"
#include "shared.cuh"

constexpr u32 STATES = RULE::STATES;
constexpr bool BOTH = RULE::SIGNED < STATES;  // maps

// As rust/halfbyte/src/optim/cuda.rs has it: registers for rules with three states cost warps.
#if __CUDA_ARCH__ >= 900
#define TILES
constexpr u32 TILE = STATES > 2 ? 20 : 24, DEPTH = STATES == 1 ? 4 : 3;
constexpr u32 WARPS = TILE + 1;  // one that copies
constexpr u32 COPIES = 32;
using Places = Tiles<STATES, TILE, DEPTH>;
using Spots = Places::Spots;
#else
constexpr u32 WARPS = STATES > 2 ? 20 : 24;
constexpr u32 COPIES = 8;
#endif

using SignedTable = SearchTable<6, true>;
using UnsignedTable = SearchTable<7, false>;

// How far a warp has come through the parameters with tiles.
struct Walk {
    u32 base, candidates;  // of the 32 parameters before `base` those that are still to come
    u32 numbered;          // tiles of all that it has come by, so that multiprocessors take turns through them all
    u32 tile, end;         // of the parameter that is open: its next one, and the last
    u32 turn, parity;      // the place of that one
    u32 reserved;
};
// What a warp works on, of a parameter: read once for all its blocks that come one after the other.
struct Slot {
    Scalars k;
    Parameter at;
    const u8* grad;
    float trust;
    Place place;  // of the block that it works on directly
#ifdef TILES
    Walk walk;
#endif
};
struct Shared {
    Slot slots[WARPS];
#ifdef TILES
    Places::Shared tiles;
#endif
    SignedTable first;
    UnsignedTable last;  // where there is a rule's need for it
};
// Behind it are copies of the maps, those of an entry of either in one row: rows of 256 bytes make an address of a code by one
// instruction. Then there are places for tiles.
constexpr u32 round_up(u32 bytes) { return (bytes + 127) / 128 * 128; }
constexpr u32 ROWS_AT = round_up(BOTH ? sizeof(Shared) : sizeof(Shared) - sizeof(UnsignedTable));
constexpr u32 ROW_BYTES = COPIES == 32 ? 256 : COPIES * 4 * (1 + BOTH);
constexpr u32 TILES_AT = ROWS_AT + 256 * ROW_BYTES;
#ifdef TILES
constexpr u32 SHARED_BYTES = TILES_AT + DEPTH * Places::PLACE_BYTES;
static_assert(SHARED_BYTES == (STATES == 1 ? 208384 : STATES == 2 ? 210176 : 206336), "as the host has it");
#else
static_assert(TILES_AT == (STATES == 1 ? 26496 : STATES == 2 ? 48512 : 47744), "as the host has it");
#endif

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

#ifdef TILES
    // A warp's blocks of every `stride`-th tile from `tile` up to `end`, of 16-bit types. Returns the first that is not done: one past
    // the end, or one that a Part does not do, and that is the next one of `tiles`.
    template <u32 TYPE> DEVICE u32 run(Places& tiles, u32 tile, const u32 stride, const u32 end, const u32 warp, const u32 lane) const {
        const Scalars k = numbers();
        for (; tile < end; tile += stride) {
            const Spots spots(tiles.place(), warp, lane);
            tiles.wait();
            Raw parameter, gradient;
            Part part;
            spots.load(parameter, gradient);
#pragma unroll
            for (u32 s = 0; s < STATES; ++s) part.codes[s] = load_uint2(spots.codes(s)), part.scales[s] = load_float(spots.scale(s));
            float p[8], g[8];
            parameter.get(TYPE, p);
            gradient.get(TYPE, g);
            if (!part.advance(maps, k, factor, p, g)) break;
            part.move(k, p);
            parameter.put(TYPE, p);
            spots.store(parameter);
#pragma unroll
            for (u32 s = 0; s < STATES; ++s) {
                store_codes(spots.codes(s), maps.encode<true>(s, part.states[s], part.scales[s]));
                if (lane == 0) store_float(spots.scale(s), part.scales[s]);
            }
            tiles.hand_over(lane);
        }
        return tile;
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
    if (request.group.has_codes()) fill(shared, rows);
    const u32 lane = threadIdx.x % WARP;
    const u32 together = blockDim.x / WARP, warps = gridDim.x * together;
    Slot& slot = shared.slots[threadIdx.x / WARP];
    if (lane == 0) slot.k = request.scalars, slot.trust = 1.f, slot.place = Place{};
#ifdef TILES
    if (lane == 0) slot.walk = Walk{};
#endif
    __syncwarp();
    const Maps maps{shared_address(rows), lane % COPIES * 4, shared.first.place(), BOTH ? shared.last.place() : 0};
    const Steps steps{slot, request, request.factors.all(), maps};
    // Has a warp know a parameter.
    auto open = [&](u32 which) {
        __syncwarp();
        auto copy = [&](void* to, const void* from, u32 words) {
            if (lane < words) static_cast<u32*>(to)[lane] = __ldg(static_cast<const u32*>(from) + lane);
        };
        copy(&slot.at, request.group.at(which), sizeof(Parameter) / 4);
        copy(&slot.grad, request.group.words + which, 2);
        if (request.each != nullptr) copy(&slot.k, request.each + which, sizeof(Scalars) / 4);
        __syncwarp();
        if (!SUMS && request.slices != nullptr) {
            const double2 part = request.slices[u64(which) * SLICES + lane];
            const double length = sqrt(warp_sum(part.x)), update = sqrt(warp_sum(part.y));
            const double most = double(slot.k.trust) * length + double(slot.k.trust_eps);
            if (lane == 0) slot.trust = slot.k.trust > 0.f && update > most ? float(most / update) : 1.f;
            __syncwarp();
        }
    };
#ifdef TILES
    const u32 warp = threadIdx.x / WARP, places = shared_address(memory) + TILES_AT;
    // The tiles of a parameter that are within the request: from the first up to the second.
    auto tiles_of = [&](u32 first, u32& begin, u32& end) {
        const u32 blocks = u32(slot.at.n / BLOCK), from = u32(request.from), to = u32(request.to);
        begin = from > first ? (from - first + TILE - 1) / TILE : 0;
        end = max(begin, to > first ? min(to - first, blocks) / TILE : 0);
    };
    // Goes through tiles up to a block that a Part does not do: true; or through all of them, and warp TILE copies them.
    auto next_in_tile = [&] {
        Walk w = slot.walk;
        Places tiles{places, shared.tiles, w.turn, w.parity};
        for (;;) {
            bool more = true;
            if (w.tile >= w.end) {  // another parameter
                while (w.candidates == 0 && w.base < request.group.count) {
                    const u32 at = w.base + lane;
                    w.candidates = __ballot_sync(ALL_LANES, at < request.group.count && request.group.at(at)->tiled());
                    w.base += WARP;
                }
                more = w.candidates != 0;
                if (more) {
                    const u32 which = w.base - WARP + __ffs(w.candidates) - 1;
                    w.candidates &= w.candidates - 1;
                    open(which);
                    if (slot.grad == nullptr) continue;
                    tiles_of(request.group.start(which), w.tile, w.end);
                    const u32 count = w.end - w.tile;
                    w.tile += (blockIdx.x + gridDim.x - w.numbered % gridDim.x) % gridDim.x;
                    w.numbered += count;
                }
            }
            if (warp == TILE) {
                const u32 lane = ask_lane();
                tiles.change(more ? slot.at.paged() : !tiles.paged, lane);  // in the end places are emptied
                for (; w.tile < w.end; w.tile += gridDim.x) {
                    if (lane != 0 && !tiles.paged) continue;
                    Places::Source from;
                    from.p = slot.at.p + u64(w.tile) * (TILE * 512);
#pragma unroll
                    for (u32 s = 0; s < STATES; ++s) {
                        from.states[s] = slot.at.states[s] + u64(w.tile) * (TILE * 256);
                        from.absmax[s] = reinterpret_cast<u8*>(slot.at.absmax[s] + u64(w.tile) * TILE);
                    }
                    tiles.ask(from, slot.grad + u64(w.tile) * (TILE * 512), lane);
                }
                if (more) continue;
            }
            if (!more) return false;
            w.tile = slot.at.type() == BF16_TYPE ? steps.template run<BF16_TYPE>(tiles, w.tile, gridDim.x, w.end, warp, lane)
                                                 : steps.template run<F16_TYPE>(tiles, w.tile, gridDim.x, w.end, warp, lane);
            if (w.tile < w.end) {
                w.turn = tiles.turn, w.parity = tiles.parity;
                if (lane == 0) slot.walk = w;
                __syncwarp();
                return true;
            }
        }
    };
    bool tiled = !EXTRAS && !SUMS && request.group.has_tiles();
    if (tiled) Places{places, shared.tiles}.start();
#else
    constexpr bool tiled = false;
#endif
    u32 round = 0;  // of all warps together, over blocks that are worked on directly
    for (;;) {
#ifdef TILES
        if (tiled) tiled = next_in_tile();
#endif
        u32 block = 0;
        if (!tiled) {
            block = u32(request.from) + blockIdx.x * together + threadIdx.x / WARP + round++ * warps;
            if (block >= u32(request.to)) return;
            Place place = slot.place;
            if (place.seek(request.group, block, lane)) {
                open(place.which);
                if (lane == 0) slot.place = place;
                __syncwarp();
            }
        }
        const u32 number = block - slot.place.first;
#ifdef TILES
        if (!EXTRAS && !SUMS && !tiled && request.group.has_tiles() && slot.at.tiled()) {
            u32 from, to;
            tiles_of(slot.place.first, from, to);
            if (number >= from * TILE && number < to * TILE) {
                round += (to * TILE - 1 - number) / warps;  // the last of them
                continue;
            }
        }
#endif
        if (slot.grad == nullptr) {
            if (SUMS && lane == 0) sums[block] = make_float2(0.f, 0.f);
            continue;
        }
        const bool whole = tiled || (slot.at.aligned() && number < u32(slot.at.n / BLOCK)), eight = slot.at.eight();
        const Spot spot{number, lane, whole, slot.at.n};
        const bool master = (EXTRAS || SUMS) && slot.at.master();
        if (!EXTRAS && !SUMS && !tiled && whole && eight && !request.skip_zeros && slot.at.type() == slot.at.grad_type()) {
            const u32 type = slot.at.type();
#ifdef TILES
            const bool done = steps.quick(type, spot);  // here it is for smaller parameters: one form is enough
#else
            const bool done = type == BF16_TYPE  ? steps.quick(BF16_TYPE, spot)
                              : type == F16_TYPE ? steps.quick(F16_TYPE, spot)
                                                 : steps.quick(F32_TYPE, spot);
#endif
            if (done) continue;
        }
        Work work(steps);
        Raw p, g;
#ifdef TILES
        const Spots spots(places + slot.walk.turn * Places::PLACE_BYTES, warp, lane);
        if (tiled) {
            p = g = Raw{};
            spots.load(p, g);
        } else
#endif
        {
            p.load(master ? slot.at.extra : slot.at.p, master ? u32(F32_TYPE) : slot.at.type(), spot);
            g.load(slot.grad, slot.at.grad_type(), spot);
        }
#pragma unroll
        for (u32 s = 0; s < STATES; ++s) {
            const u8* from = slot.at.states[s];
            if (!eight) {
                Raw raw;
                raw.load(from, F32_TYPE, spot);
                raw.get(F32_TYPE, work.states[s]);
                continue;
            }
            float stored;
            uint2 codes;
#ifdef TILES
            if (tiled) {
                stored = load_float(spots.scale(s));
                codes = load_uint2(spots.codes(s));
            } else
#endif
            if (whole) {
                stored = load_float(slot.at.absmax[s] + number);
                codes = load_two(from + spot.offset(1));
            } else {
                stored = load_float(slot.at.absmax[s] + number);
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
#ifdef TILES
            if (tiled) {
                // All lanes have read the scale: they have met for the largest magnitude.
                if (lane == 0) store_float(spots.scale(s), scale);
                store_codes(spots.codes(s), codes);
                continue;
            }
#endif
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
#ifdef TILES
        if (tiled) {
            spots.store(p);
            Places tiles{places, shared.tiles, slot.walk.turn, slot.walk.parity};
            tiles.hand_over(lane);
            if (lane == 0) slot.walk.tile += gridDim.x, slot.walk.turn = tiles.turn, slot.walk.parity = tiles.parity;
            __syncwarp();
            continue;
        }
#endif
        p.store(slot.at.p, slot.at.type(), spot);
    }
}

#define NAME2(a, b) a##b
#define NAME(a, b) NAME2(a, b)

// All kernels of a rule are in one image, unless it is told which.
#ifndef ONLY_EXTRAS
KERNEL __launch_bounds__(WARPS * WARP, 1) NAME(optim_, ENTRY)(const Request request) { step<false, false>(request, nullptr); }
#endif
#ifndef WITHOUT_EXTRAS
constexpr u32 EXTRAS_THREADS = 512;  // as the host has it: extras cost registers
KERNEL __launch_bounds__(EXTRAS_THREADS, 1) NAME(optim_extras_, ENTRY)(const Request request) { step<true, false>(request, nullptr); }
#endif
#ifdef LIMITED
// For rules whose updates are limited: [blocks] sums of squares of parameter and update.
KERNEL __launch_bounds__(WARPS * WARP, 1) NAME(optim_sums_, ENTRY)(const Request request, float2* sums) { step<false, true>(request, sums); }
#endif
