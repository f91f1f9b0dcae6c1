// A CPU in place of a GPU, for kernels whose threads wait for each other, for copies and for MMAs: what is hardware to them (the
// headers of cuda/include that hold assembly) is replaced by `include/`, the rest is compiled as it is.
//
// It is unkind where the hardware may be: warps run in random order and at random speed, copies land late and in parts and their places
// hold NaN until then, MMAs read their operands at any time until they are waited for. And it refuses what the hardware would do
// something undefined with: addresses outside of shared memory or misaligned, an arrival too many at a barrier, bytes that nobody
// expects, an operand in shared memory that was written and not fenced, shared memory of a block that has left, more registers than
// there are, a wait that nothing ends.
// Lanes of a warp go together only where they meet.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace machine {

struct Launch {
    u32 threads, cluster, blocks_x, blocks_y;
    u32 registers;  // of a thread, at the start
    u32 shared;     // dynamic shared memory, in bytes
};
struct Weather {
    u32 seed;
    u32 lateness;  // of copies, in rounds of the scheduler
};
// Runs all blocks, a cluster at a time. Ends the process where a rule is broken.
void run(const Launch& launch, const Weather& weather, const std::function<void()>& kernel);

[[noreturn]] void fail(const char* why);
inline std::vector<const u8*> fetched;  // what the L2 was asked for
void maybe_yield();  // somebody else's turn
void wait_a_turn();
u32 thread();
u32 threads();
u32 block_x();
u32 block_y();
u32 blocks_x();
u32 rank();
u32 ranks();

// --- shared memory: an address is an offset into the window of a block, its rank in the cluster in bits 24 and up ------------------

u8* place(u32 address, u32 bytes);
u32 address_of(const void* shared);
// The array of declaration `index`, `bytes` long; dynamic shared memory, which begins behind all of these.
void* static_array(u32 index, u32 bytes, u32 alignment);
u8* dynamic_array(u32 alignment);
// Threads' writes are no operands of MMAs until the thread has fenced them.
void wrote(u32 address, u32 bytes);
void fence();
void must_be_fenced(u32 address);

// What the hardware reads; a thread's load comes at a time of its own.
template <class T> T peek(u32 address) {
    if (address % sizeof(T)) fail("a load is misaligned");
    T value;
    std::memcpy(&value, place(address, sizeof value), sizeof value);
    return value;
}
template <class T> T load(u32 address) {
    maybe_yield();
    return peek<T>(address);
}
template <class T> void store(u32 address, T value) {
    if (address % sizeof(T)) fail("a store is misaligned");
    std::memcpy(place(address, sizeof value), &value, sizeof value);
    wrote(address, sizeof value);
}

// --- meeting -----------------------------------------------------------------------------------------------------------------

void sync_warp();
u32 exchange(u32 value, u32 lane);  // the value of a lane
u32 (*scratch())[8];                // of the warp: eight words a lane
void named_barrier(u32 id, u32 count, bool wait);
void cluster_arrive();
void cluster_wait();

void barrier_init(u32 barrier, u32 count);
void barrier_arrive(u32 barrier);
void barrier_expect(u32 barrier, u32 bytes);  // and arrive
void barrier_wait(u32 barrier, u32 parity);

// --- what happens later --------------------------------------------------------------------------------------------------------

// Copies of a thread, in groups.
void copy(u32 to, const void* from, u32 bytes, u32 valid);
void commit_copies();
void wait_for_copies(u32 groups);
void arrive_after_copies(u32 barrier);
// A part of a box: its bytes are counted on the barrier when `land` has put them there.
void copy_box_part(u32 barrier, u32 bytes, std::function<void(u8* window)> land);

// A lane's part of an MMA of its warpgroup.
void mma_fence();
void mma_issue(std::function<void()> lane_part);
void mma_commit();
void mma_wait(u32 groups);

void registers(u32 count);

float from_bf16(u16 bits);
u16 to_bf16(float value);
float from_f16(u16 bits);
u16 to_f16(float value);

}  // namespace machine

struct ThreadIndex {
    struct { operator u32() const { return machine::thread(); } } x;
};
struct BlockDim {
    struct { operator u32() const { return machine::threads(); } } x;
};
struct BlockIndex {
    struct { operator u32() const { return machine::block_x(); } } x;
    struct { operator u32() const { return machine::block_y(); } } y;
};
struct GridDim {
    struct { operator u32() const { return machine::blocks_x(); } } x;
};
static const ThreadIndex threadIdx;
static const BlockDim blockDim;
static const BlockIndex blockIdx;
static const GridDim gridDim;

#define __grid_constant__
#define __launch_bounds__(...)
inline u32 __shfl_sync(u32, u32 value, u32 lane) { return machine::exchange(value, lane); }
inline u32 __shfl_up_sync(u32, u32 value, u32 by) {
    const u32 lane = machine::thread() % 32;
    return machine::exchange(value, lane < by ? lane : lane - by);
}
inline u32 __shfl_xor_sync(u32, u32 value, u32 bits) { return machine::exchange(value, machine::thread() % 32 ^ bits); }
inline bool __any_sync(u32, bool value) {
    bool any = false;
    for (u32 lane = 0; lane < 32; ++lane) any |= machine::exchange(value, lane) != 0;
    return any;
}
inline u32 __popc(u32 bits) { return u32(__builtin_popcount(bits)); }
inline u32 __ffs(u32 bits) { return u32(__builtin_ffs(i32(bits))); }
inline void __syncwarp() { machine::sync_warp(); }
inline void __syncthreads() { machine::named_barrier(0, machine::threads(), true); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T value) { *p = value; }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) result |= u32(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
inline u32 min(i32 a, u32 b) { return min(u32(a), b); }
