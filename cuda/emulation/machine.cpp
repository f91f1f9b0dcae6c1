#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace machine {
namespace {

constexpr u32 WINDOW = 228 * 1024, RESERVED = 1024, STACK = 128 * 1024;
constexpr u32 NAN_WORD = 0x7fff7fff;  // NaN as fp32, bf16 and fp16

struct Barrier {
    bool live = false;
    u32 count = 0, pending = 0, phase = 0;
    long bytes = 0;
    void settle() {
        if (pending == 0 && bytes == 0) ++phase, pending = count;
    }
};

struct Block {
    u32 rank = 0, x = 0, y = 0, here = 0;  // threads that have not ended
    std::vector<u8> window;
    std::vector<u32> unfenced;  // by 16 bytes: thread + 1
    std::map<u32, Barrier> barriers;
    struct { u32 count = 0, turn = 0; } named[16];
    u32 arrays_end = RESERVED;
    std::map<u32, u32> arrays;
};

struct Warp {
    u32 count = 0, turn = 0, values[32], scratch[32][8];
};

// An arrival that waits for copies.
struct Arrival { u32 left; Block* block; u32 barrier; };
struct Copy {
    u32 group;
    bool landed = false;
    std::vector<std::shared_ptr<Arrival>> arrivals;
};

struct Fiber {
    void* sp = nullptr;
    ucontext_t context;
    u32 thread = 0;
    Block* block = nullptr;
    Warp* warp = nullptr;
    bool ended = false, fenced = false;
    std::vector<std::shared_ptr<Copy>> copies;
    u32 copy_group = 0;
    std::deque<std::pair<u32, std::function<void()>>> mmas;
    u32 mma_group = 0;
    std::vector<u32> written;
    u32 cluster_phase = 0, registers = 0;
};

Launch launch;
std::function<void()> body;
std::mt19937 generator;
u32 lateness;
u64 now_round, last_change;  // a change: somebody met, arrived or ended, or something came
std::vector<Block> blocks;
std::vector<Warp> warps;
std::vector<Fiber> fibers;
Fiber* now;
u32 cluster_count, cluster_turn, until_yield = 1;
struct Event { u64 due; std::function<void()> happen; };
std::vector<Event> events;

u32 chance(u32 n) { return generator() % n; }

// --- fibers ------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
void* scheduler;
extern "C" void machine_switch(void** from, void* to);
asm(R"(
.text
.globl machine_switch
machine_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
void enter(Fiber& fiber) { machine_switch(&scheduler, fiber.sp); }
void leave() { machine_switch(&now->sp, scheduler); }
void prepare(Fiber& fiber, u8* stack, void (*start)()) {
    void** sp = reinterpret_cast<void**>(stack + STACK - 64);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(start);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;  // registers
    fiber.sp = sp;
}
#else
ucontext_t scheduler;
void enter(Fiber& fiber) { swapcontext(&scheduler, &fiber.context); }
void leave() { swapcontext(&now->context, &scheduler); }
void prepare(Fiber& fiber, u8* stack, void (*start)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, start, 0);
}
#endif

void start() {
    body();
    now->ended = true;
    leave();
    abort();
}

// --- what happens later ------------------------------------------------------------------------------------------------------

void later(std::function<void()> happen) {
    const u32 delay = chance(4) == 0 ? 0 : chance(lateness + 1);
    events.push_back({now_round + delay, std::move(happen)});
}

void let_happen() {
    for (size_t i = 0; i < events.size();) {
        if (events[i].due > now_round) {
            ++i;
            continue;
        }
        const auto happen = std::move(events[i].happen);
        events[i] = std::move(events.back());
        events.pop_back();
        last_change = now_round;
        happen();
    }
}

Block& block_of(u32 address) {
    if (address >> 24 >= launch.cluster) fail("an address is of a block that there is not");
    return blocks[address >> 24];
}
Barrier& barrier_at(Block& block, u32 address) {
    const auto found = block.barriers.find(address & 0xffffff);
    if (found == block.barriers.end() || !found->second.live) fail("there is no barrier at an address");
    return found->second;
}
void arrive(Block& block, u32 address) {
    Barrier& barrier = barrier_at(block, address);
    if (barrier.pending == 0) fail("an arrival too many at a barrier");
    --barrier.pending, last_change = now_round;
    barrier.settle();
}

void do_mma(Fiber& fiber) {
    const auto part = std::move(fiber.mmas.front().second);
    fiber.mmas.pop_front();
    last_change = now_round;
    part();
}

// MMAs of a warp happen for all its lanes together, where all have issued as many.
void maybe_mma(u32 warp) {
    Fiber* const lanes = &fibers[warp * 32];
    for (u32 n = chance(16) == 0 ? 1 + chance(2) : 0; n > 0; --n) {
        for (u32 lane = 0; lane < 32; ++lane)
            if (lanes[lane].mmas.empty() || lanes[lane].mmas.size() != lanes[0].mmas.size()) return;
        for (u32 lane = 0; lane < 32; ++lane) now = &lanes[lane], do_mma(lanes[lane]);
    }
}

void check_registers() {
    for (const Block& block : blocks) {
        u64 sum = 0;
        for (const Fiber& fiber : fibers)
            if (fiber.block == &block) sum += fiber.registers ? fiber.registers : launch.registers;
        if (sum > u64(launch.registers) * launch.threads) fail("more registers are asked for than the block has");
        for (const auto& [address, barrier] : block.barriers)
            if (barrier.bytes != 0) fail("bytes that a barrier expects have not come");
    }
}

void run_cluster(u32 first, u32 y, u8* stacks) {
    const u32 all = launch.threads * launch.cluster;
    blocks = std::vector<Block>(launch.cluster);
    warps = std::vector<Warp>(all / 32);
    fibers = std::vector<Fiber>(all);
    events.clear();
    now_round = last_change = 0, cluster_count = cluster_turn = 0;
    for (u32 r = 0; r < launch.cluster; ++r) {
        blocks[r].rank = r, blocks[r].x = first + r, blocks[r].y = y, blocks[r].here = launch.threads;
        blocks[r].window.resize(WINDOW);
        for (u32 i = 0; i < WINDOW; i += 4) std::memcpy(&blocks[r].window[i], &NAN_WORD, 4);
        blocks[r].unfenced.resize(WINDOW / 16);
    }
    for (u32 i = 0; i < all; ++i) {
        fibers[i].thread = i % launch.threads;
        fibers[i].block = &blocks[i / launch.threads];
        fibers[i].warp = &warps[i / 32];
        prepare(fibers[i], stacks + u64(STACK) * i, start);
    }
    std::vector<u32> order(all / 32), slowness(all / 32, 1);
    for (u32 i = 0; i < order.size(); ++i) order[i] = i;
    for (u32 left = all; left > 0;) {
        if (++now_round > last_change + lateness + 1000) fail("nobody gets on");
        if (now_round % 64 == 0) {
            std::shuffle(order.begin(), order.end(), generator);
            for (u32& s : slowness) s = chance(3) == 0 ? 1 + chance(6) : 1;
        }
        for (const u32 warp : order) {
            if (slowness[warp] > 1 && chance(slowness[warp]) != 0) continue;
            const u32 first_lane = chance(32);
            for (u32 i = 0; i < 32; ++i) {
                Fiber& fiber = fibers[warp * 32 + (first_lane + i) % 32];
                if (fiber.ended) continue;
                now = &fiber;
                enter(fiber);
                if (!fiber.ended) continue;
                --left, --fiber.block->here, last_change = now_round;
                if (!fiber.mmas.empty()) fail("a thread has ended with MMAs under way");
            }
            maybe_mma(warp);
        }
        let_happen();
    }
    if (!events.empty()) fail("copies land after the end");
    check_registers();
}

}  // namespace

void fail(const char* why) {
    std::printf("FAIL: %s", why);
    if (now != nullptr) std::printf(" (block %u, %u, rank %u, thread %u)", now->block->x, now->block->y, now->block->rank, now->thread);
    std::printf("\n");
    std::fflush(stdout);
    std::_Exit(1);
}

void run(const Launch& as, const Weather& weather, const std::function<void()>& kernel) {
    launch = as, body = kernel, lateness = weather.lateness;
    generator.seed(weather.seed);
    const u64 bytes = u64(STACK) * launch.threads * launch.cluster;
    void* const stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stacks == MAP_FAILED) fail("no memory for stacks");
    for (u32 y = 0; y < launch.blocks_y; ++y)
        for (u32 first = 0; first < launch.blocks_x; first += launch.cluster) run_cluster(first, y, static_cast<u8*>(stacks));
    munmap(stacks, bytes);
    now = nullptr;
}

void maybe_yield() {
    if (--until_yield != 0) return;
    until_yield = 1 + chance(150);
    leave();
}
void wait_a_turn() { leave(); }
u32 thread() { return now->thread; }
u32 threads() { return launch.threads; }
u32 block_x() { return now->block->x; }
u32 block_y() { return now->block->y; }
u32 blocks_x() { return launch.blocks_x; }
u32 rank() { return now->block->rank; }
u32 ranks() { return launch.cluster; }

// --- shared memory -----------------------------------------------------------------------------------------------------------

u8* place(u32 address, u32 bytes) {
    const u32 offset = address & 0xffffff;
    const u32 end = std::min(WINDOW, blocks[0].arrays_end + launch.shared);
    if (offset < RESERVED || offset + bytes > end) fail("an address is outside of shared memory");
    Block& block = block_of(address);
    if (block.here == 0) fail("an address is of a block that has left");
    return &block.window[offset];
}
u32 address_of(const void* shared) {
    return u32(static_cast<const u8*>(shared) - now->block->window.data()) | now->block->rank << 24;
}
void* static_array(u32 index, u32 bytes, u32 alignment) {
    Block& block = *now->block;
    const auto [found, is_new] = block.arrays.try_emplace(index, 0);
    if (is_new) {
        found->second = (block.arrays_end + alignment - 1) / alignment * alignment;
        block.arrays_end = found->second + bytes;
    }
    return &block.window[found->second];
}
u8* dynamic_array(u32 alignment) {
    Block& block = *now->block;
    block.arrays_end = (block.arrays_end + alignment - 1) / alignment * alignment;
    return &block.window[block.arrays_end];
}

void wrote(u32 address, u32 bytes) {
    for (u32 i = (address & 0xffffff) / 16; i <= ((address & 0xffffff) + bytes - 1) / 16; ++i) {
        block_of(address).unfenced[i] = now->thread + 1;
        now->written.push_back(i);
    }
}
void fence() {
    for (const u32 i : now->written)
        if (now->block->unfenced[i] == now->thread + 1) now->block->unfenced[i] = 0;
    now->written.clear();
}
void must_be_fenced(u32 address) {
    if (block_of(address).unfenced[(address & 0xffffff) / 16] != 0) fail("an MMA reads what was written and not fenced");
}

// --- meeting -----------------------------------------------------------------------------------------------------------------

void sync_warp() {
    Warp& warp = *now->warp;
    const u32 turn = warp.turn;
    if (++warp.count == 32) warp.count = 0, ++warp.turn, last_change = now_round;
    else while (warp.turn == turn) leave();
}
u32 exchange(u32 value, u32 lane) {
    now->warp->values[now->thread % 32] = value;
    sync_warp();
    const u32 result = now->warp->values[lane % 32];
    sync_warp();
    return result;
}
u32 (*scratch())[8] { return now->warp->scratch; }

void named_barrier(u32 id, u32 count, bool wait) {
    auto& barrier = now->block->named[id];
    const u32 turn = barrier.turn;
    if (++barrier.count == count) barrier.count = 0, ++barrier.turn, last_change = now_round;
    else while (wait && barrier.turn == turn) leave();
}
void cluster_arrive() {
    if (now->cluster_phase++ % 2 != 0) fail("two arrivals at the cluster's barrier");
    if (++cluster_count == fibers.size()) cluster_count = 0, ++cluster_turn, last_change = now_round;
}
void cluster_wait() {
    if (now->cluster_phase++ % 2 != 1) fail("a wait at the cluster's barrier without an arrival");
    while (cluster_turn < now->cluster_phase / 2) leave();
}

void barrier_init(u32 barrier, u32 count) {
    place(barrier, 8);
    Barrier fresh;
    fresh.live = true, fresh.count = fresh.pending = count;
    now->block->barriers[barrier & 0xffffff] = fresh;
}
void barrier_arrive(u32 barrier) {
    leave();
    arrive(block_of(barrier), barrier);
}
void barrier_expect(u32 barrier, u32 bytes) {
    barrier_at(block_of(barrier), barrier).bytes += bytes;
    arrive(block_of(barrier), barrier);
}
void barrier_wait(u32 barrier, u32 parity) {
    const Barrier& at = barrier_at(block_of(barrier), barrier);
    do leave();
    while ((at.phase & 1) == parity);
}

// --- what happens later ------------------------------------------------------------------------------------------------------

void copy(u32 to, const void* from, u32 bytes, u32 valid) {
    if (to % bytes || reinterpret_cast<uintptr_t>(from) % bytes) fail("a copy is misaligned");
    const auto copied = std::make_shared<Copy>();
    copied->group = now->copy_group;
    now->copies.push_back(copied);
    u8* const target = place(to, bytes);
    std::memset(target, 0x7f, bytes);
    std::vector<u8> data(bytes, 0);
    std::memcpy(data.data(), from, valid);
    later([=] {
        std::memcpy(target, data.data(), bytes);
        copied->landed = true;
        for (const auto& arrival : copied->arrivals)
            if (--arrival->left == 0) arrive(*arrival->block, arrival->barrier);
    });
}
void commit_copies() { ++now->copy_group; }
void wait_for_copies(u32 groups) {
    Fiber& fiber = *now;
    for (const auto& copied : fiber.copies)
        while (copied->group + groups < fiber.copy_group && !copied->landed) leave();
    std::erase_if(fiber.copies, [](const auto& copied) { return copied->landed; });
}
void arrive_after_copies(u32 barrier) {
    const auto arrival = std::make_shared<Arrival>(Arrival{1, now->block, barrier});
    std::erase_if(now->copies, [](const auto& copied) { return copied->landed; });
    for (const auto& copied : now->copies) copied->arrivals.push_back(arrival), ++arrival->left;
    if (--arrival->left == 0) arrive(*now->block, barrier);
}
void copy_box_part(u32 barrier, u32 bytes, std::function<void(u8* window)> land) {
    Block* const block = now->block;
    later([=] {
        land(block->window.data());
        Barrier& at = barrier_at(*block, barrier);
        at.bytes -= bytes;
        at.settle();
    });
}

void mma_fence() {
    sync_warp();
    now->fenced = true;
}
void mma_issue(std::function<void()> lane_part) {
    if (!now->fenced) fail("an MMA without a fence before it");
    sync_warp();
    now->mmas.emplace_back(now->mma_group, std::move(lane_part));
    if (chance(8) == 0) leave();
}
void mma_commit() {
    sync_warp();
    ++now->mma_group;
    now->fenced = false;
}
void mma_wait(u32 groups) {
    sync_warp();
    while (!now->mmas.empty() && now->mmas.front().first + groups < now->mma_group) do_mma(*now);
    sync_warp();
}

void registers(u32 count) { now->registers = count; }

float from_bf16(u16 bits) {
    const u32 word = u32(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
u16 to_bf16(float value) {
    u32 word;
    std::memcpy(&word, &value, 4);
    return value != value ? 0x7fff : u16((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
float from_f16(u16 bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}
u16 to_f16(float value) {
    const _Float16 half = _Float16(value);
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

}  // namespace machine
