// hopper.cuh for a machine without a GPU: every thread of every block is a fiber, and what Hopper does
// asynchronously happens as late, and in as random an order, as it may. A wrong barrier phase shows as a deadlock or
// as wrong numbers, a wrong descriptor or swizzle as wrong numbers. Proxies, fences between threads and the weak
// ordering of memory are not modelled: host memory is one and ordered.
#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

// <algorithm> would take a sixth of the time that a kernel takes to compile.
template <typename T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
template <typename T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct Index {
    unsigned x;
} threadIdx, blockIdx, gridDim;
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static float2 make_float2(float x, float y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

typedef unsigned long long Descriptor;
constexpr int WARP = 32, WARPGROUP = 128;
constexpr int TILE_WIDTH = 64, ROW_BYTES = 128, ATOM_ROWS = 8, ATOM_BYTES = 1024;

// ---- Fibers --------------------------------------------------------------------------------------------------

struct Copy {
    enum { BYTES, ARRIVE, COMMIT } kind;
    unsigned target;
    const void* source;
    int bytes, size;
};
struct Product_ {
    float* sum;
    Descriptor a, b;
    int columns;
    bool transposed_a, transposed_b, accumulate, commit;
    bool in_registers = false;  // A is `rows`: this thread's row and the eighth after it, as they were at the issue
    float rows[2][16];
};
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    unsigned block, thread;
    bool begun = false, done = false;
    const volatile int* waits_for = nullptr;
    int while_equal = 0;
    std::deque<Copy> copies;
    std::deque<Product_> products;
};
struct Group {  // threads that meet: a named barrier or a warp
    int arrived = 0;
    volatile int generation = 0;
};
struct Block {
    std::vector<unsigned char> memory;
    unsigned char* shared;
    Group named[16];
    std::vector<Group> warps;
    std::vector<unsigned long long> exchanged;
    bool any = false;  // of __syncthreads_or
};

static std::vector<Fiber*> fibers;
static std::vector<Block> blocks;
static Fiber* me;
static jmp_buf scheduler;
static unsigned long long progress, random_state;
static unsigned block_threads;
constexpr unsigned SHARED_START = 1024;

static unsigned draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<unsigned>(random_state >> 11);
}
// By jumps: to swap contexts takes two system calls each time.
static void yield() {
    if (!_setjmp(me->at)) _longjmp(scheduler, 1);
}
static void resume(Fiber* fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber->begun) _longjmp(fiber->at, 1);
    fiber->begun = true;
    setcontext(&fiber->start);
}
static void wait_while(const volatile int* word, int value) {
    while (*word == value) {
        me->waits_for = word;
        me->while_equal = value;
        yield();
    }
    me->waits_for = nullptr;
}
static void meet(Group& group, int threads) {
    const int generation = group.generation;
    if (++group.arrived == threads) {
        group.arrived = 0;
        group.generation = generation + 1;
        ++progress;
    } else {
        wait_while(&group.generation, generation);
    }
}
static Block& here() { return blocks[me->block]; }
static void __syncthreads() { meet(here().named[0], block_threads); }
static int __syncthreads_or(int value) {
    Block& block = here();
    block.any |= value != 0;
    __syncthreads();
    const bool result = block.any;
    __syncthreads();
    block.any = false;
    return result;
}
static void named_sync(int barrier, int threads) { meet(here().named[barrier], threads); }
static void named_arrive(int barrier, int threads) {
    Group& group = here().named[barrier];
    if (++group.arrived == threads) {
        group.arrived = 0;
        group.generation = group.generation + 1;
    }
}
static void __syncwarp() { meet(here().warps[me->thread / WARP], WARP); }

// Every lane's word, to every lane.
static void exchange(unsigned long long word, unsigned long long (&all)[32]) {
    Block& block = here();
    block.exchanged[me->thread] = word;
    __syncwarp();
    for (int lane = 0; lane < 32; ++lane) all[lane] = block.exchanged[me->thread / WARP * WARP + lane];
    __syncwarp();
}
static int __shfl_sync(unsigned, int value, int lane) {
    unsigned long long all[32];
    exchange(static_cast<unsigned>(value), all);
    return static_cast<int>(all[lane]);
}
static int __shfl_sync(unsigned, int value, int lane, int width) {
    unsigned long long all[32];
    exchange(static_cast<unsigned>(value), all);
    return static_cast<int>(all[me->thread % WARP / width * width + lane]);
}
static unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
    unsigned long long all[32];
    exchange(value, all);
    return static_cast<unsigned>(all[(me->thread % WARP) ^ mask]);
}
static float __shfl_xor_sync(unsigned all, float value, int mask) {
    return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(value), mask));
}
static bool __any_sync(unsigned, bool value) {
    unsigned long long all[32];
    exchange(value, all);
    for (unsigned long long each : all)
        if (each) return true;
    return false;
}
static bool elected() { return me->thread % WARP == 0; }

// ---- Shared memory and barriers ------------------------------------------------------------------------------

static unsigned char* at(unsigned address) {
    if (address < SHARED_START || address >= SHARED_START + here().memory.size()) {
        std::fprintf(stderr, "shared address %u is outside\n", address);
        std::abort();
    }
    return here().shared + address;
}
static unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - here().shared);
}
static void* __cvta_shared_to_generic(unsigned address) { return at(address); }

struct Barrier {
    int phase;
    short pending, total;
};
static Barrier& barrier_at(unsigned address) { return *reinterpret_cast<Barrier*>(at(address)); }
static void barrier_init(unsigned barrier, int arrivals) {
    barrier_at(barrier) = {0, static_cast<short>(arrivals), static_cast<short>(arrivals)};
}
static void fence_barrier_init() {}
static void barrier_arrive(unsigned address) {
    Barrier& barrier = barrier_at(address);
    if (barrier.pending <= 0) {
        std::fprintf(stderr, "too many arrivals at %u\n", address);
        std::abort();
    }
    if (--barrier.pending == 0) {
        barrier.pending = barrier.total;
        ++barrier.phase;
        ++progress;
    }
}
static void barrier_wait(unsigned address, int parity) {
    Barrier& barrier = barrier_at(address);
    while ((barrier.phase & 1) == parity) wait_while(&barrier.phase, barrier.phase);
}
static void fence_async_proxy() {}
template <int>
static void take_registers() {}
template <int>
static void give_registers() {}

// ---- Global memory -------------------------------------------------------------------------------------------

static int load_acquire(const int* counter) {
    yield();
    return *counter;
}
static void add_release(int* counter, int value) {
    *counter += value;
    ++progress;
}
static int load_constant(const int* source) { return *source; }
static long long nanoseconds() { return static_cast<long long>(progress); }
static const char* row_at(const char* table, int row, int stride) {
    return table + static_cast<long long>(row) * stride;
}
static void trap() {
    std::fprintf(stderr, "trap\n");
    std::abort();
}
static int thread_number() { return me->thread; }
template <typename Word>
static Word __ldg(const Word* source) {
    return *source;
}
static int atomicAdd(int* counter, int value) {
    yield();
    ++progress;
    const int before = *counter;
    *counter += value;
    return before;
}
static void __threadfence() {}
static void __nanosleep(unsigned) { yield(); }
static void idle_for(int cycles) {
    for (; cycles > 0; cycles -= 1000) yield();
}

// ---- Copies --------------------------------------------------------------------------------------------------

static void one_copy(Fiber* owner) {
    const Copy copy = owner->copies.front();
    owner->copies.pop_front();
    Fiber* const caller = me;
    me = owner;
    if (copy.kind == Copy::ARRIVE) barrier_arrive(copy.target);
    if (copy.kind == Copy::BYTES) {
        std::memset(at(copy.target), 0, copy.size);
        std::memcpy(at(copy.target), copy.source, copy.bytes);
    }
    me = caller;
    ++progress;
}
static void copy_16_or_zeros(unsigned target, const void* source, int bytes) {
    if (target % 16 || (bytes && reinterpret_cast<unsigned long long>(source) % 16)) {
        std::fprintf(stderr, "misaligned copy\n");
        std::abort();
    }
    me->copies.push_back({Copy::BYTES, target, source, bytes, 16});
}
// Reads what the cache would fetch, so that a wrong address shows.
static void prefetch_sector(const void* source) { (void)*static_cast<const volatile char*>(source); }
constexpr int SECTOR_BYTES = 32;
static void store_16_if(bool wanted, void* target, uint4 words) {
    if (wanted) std::memcpy(target, &words, 16);
}
static void copy_16(unsigned target, const void* source) { copy_16_or_zeros(target, source, 16); }
static void copy_16_prefetch_128(unsigned target, const void* source) { copy_16(target, source); }
static void barrier_arrive_after_copies(unsigned barrier) { me->copies.push_back({Copy::ARRIVE, barrier}); }
static void copies_commit() { me->copies.push_back({Copy::COMMIT}); }
template <int PENDING>
static void copies_wait() {
    auto groups = [] {
        int open = 0;
        for (const Copy& copy : me->copies) open += copy.kind == Copy::COMMIT;
        return open;
    };
    while (groups() > PENDING) one_copy(me);
}

// ---- Elements ------------------------------------------------------------------------------------------------

#if BF16
static float widen(unsigned bits) { return __uint_as_float(bits << 16); }
static unsigned narrow(float value) {
    const unsigned bits = __float_as_uint(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
#else
static float widen(unsigned bits) {
    const unsigned short word = static_cast<unsigned short>(bits);
    _Float16 value;
    std::memcpy(&value, &word, 2);
    return static_cast<float>(value);
}
static unsigned narrow(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short word;
    std::memcpy(&word, &half, 2);
    return word;
}
#endif
static unsigned pack(float low, float high) { return narrow(low) | narrow(high) << 16; }
static float low_float(unsigned packed) { return widen(packed & 0xffff); }
static float high_float(unsigned packed) { return widen(packed >> 16); }
static unsigned subtract(unsigned pair, unsigned other) {
    return pack(low_float(pair) - low_float(other), high_float(pair) - high_float(other));
}
static float exp2_fast(float x) { return std::exp2(x); }
static float log2_fast(float x) { return std::log2(x); }
static float reciprocal_fast(float x) { return 1.0f / x; }

// ---- Matrices ------------------------------------------------------------------------------------------------

static int swizzled(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row % ATOM_ROWS)) << 4); }
static Descriptor descriptor(unsigned address, int leading_bytes, int stride_bytes) {
    return 1ull << 62 | static_cast<Descriptor>((address & 0x3ffff) >> 4) |
           static_cast<Descriptor>(leading_bytes >> 4) << 16 | static_cast<Descriptor>(stride_bytes >> 4) << 32;
}
static Descriptor k_major(unsigned address) { return descriptor(address, 16, ATOM_BYTES); }
static Descriptor mn_major(unsigned address, int tile_bytes) { return descriptor(address, tile_bytes, ATOM_BYTES); }
constexpr Descriptor K_STEP = 16 * 2 >> 4, MN_STEP = 16 * ROW_BYTES >> 4;
static Descriptor further(Descriptor from, int bytes) {
    return (from & 0xffffffff00000000ull) | (static_cast<unsigned>(from) + static_cast<unsigned>(bytes >> 4));
}
template <typename Value>
static Value once(Value value) {
    return value;
}

// What wgmma reads at (row or column, k) of an operand, by the PTX ISA's canonical layouts with 128-byte swizzle.
static float element(Descriptor d, bool transposed, int mn, int k) {
    const unsigned start = static_cast<unsigned>(d & 0x3fff) << 4;
    const unsigned leading = static_cast<unsigned>(d >> 16 & 0x3fff) << 4;
    const unsigned stride = static_cast<unsigned>(d >> 32 & 0x3fff) << 4;
    unsigned address = transposed ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                  : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    unsigned short bits;
    std::memcpy(&bits, at(address), 2);
    return widen(bits);
}
static void one_product() {
    const Product_ p = me->products.front();
    me->products.pop_front();
    if (p.commit) return;
    const int warp = me->thread % WARPGROUP / WARP, lane = me->thread % WARP;
    float a[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k)
            a[half][k] = p.in_registers
                             ? p.rows[half][k]
                             : element(p.a, p.transposed_a, warp * 16 + lane / 4 + 8 * half, k);
    for (int j = 0; j < p.columns / 8; ++j)
        for (int odd = 0; odd < 2; ++odd) {
            float b[16];
            for (int k = 0; k < 16; ++k) b[k] = element(p.b, p.transposed_b, 8 * j + 2 * (lane % 4) + odd, k);
            for (int half = 0; half < 2; ++half) {
                float& sum = p.sum[4 * j + 2 * half + odd];
                if (!p.accumulate) sum = 0;
                for (int k = 0; k < 16; ++k) sum += a[half][k] * b[k];
            }
        }
}
static void products_fence() {}
static void products_commit() { me->products.push_back({nullptr, 0, 0, 0, false, false, false, true}); }
template <int PENDING>
static void products_wait() {
    auto groups = [] {
        int open = 0;
        for (const Product_& product : me->products) open += product.commit;
        return open;
    };
    while (groups() > PENDING) one_product();
    __syncwarp();  // as the instruction does: what one lane announces after it, holds for the warp
}
template <typename Values>
static void pin(Values&) {}
template <int TRANSPOSED_A, int TRANSPOSED_B, int COUNT>
static void multiply(float (&d)[COUNT], Descriptor a, Descriptor b, int accumulate) {
    me->products.push_back({d, a, b, 2 * COUNT, TRANSPOSED_A != 0, TRANSPOSED_B != 0, accumulate != 0, false});
}
template <int TRANSPOSED_B, int COUNT>
static void multiply(
    float (&d)[COUNT], unsigned a0, unsigned a1, unsigned a2, unsigned a3, Descriptor b, int accumulate) {
    Product_ product{d, 0, b, 2 * COUNT, false, TRANSPOSED_B != 0, accumulate != 0, false, true};
    const unsigned words[4] = {a0, a1, a2, a3};
    for (int i = 0; i < 4; ++i) {
        unsigned long long all[32];
        exchange(words[i], all);
        for (int lane = 0; lane < 4; ++lane) {
            const unsigned word = static_cast<unsigned>(all[me->thread % WARP / 4 * 4 + lane]);
            product.rows[i % 2][8 * (i / 2) + 2 * lane] = low_float(word);
            product.rows[i % 2][8 * (i / 2) + 2 * lane + 1] = high_float(word);
        }
    }
    me->products.push_back(product);
}

static unsigned fragment(const unsigned long long (&rows)[32], int matrix, bool transposed) {
    const int lane = me->thread % WARP;
    unsigned short pair[2];
    for (int odd = 0; odd < 2; ++odd) {
        const int row = transposed ? 2 * (lane % 4) + odd : lane / 4;
        const int column = transposed ? lane / 4 : 2 * (lane % 4) + odd;
        std::memcpy(pair + odd, at(static_cast<unsigned>(rows[matrix * 8 + row])) + column * 2, 2);
    }
    return pair[0] | static_cast<unsigned>(pair[1]) << 16;
}
static void load_matrices(unsigned address, unsigned (&fragments)[4], bool transposed) {
    unsigned long long rows[32];
    exchange(address, rows);
    for (int matrix = 0; matrix < 4; ++matrix) fragments[matrix] = fragment(rows, matrix, transposed);
    __syncwarp();
}
static void load_matrix_4(unsigned address, unsigned (&fragments)[4]) { load_matrices(address, fragments, false); }
static void load_matrix_4_transposed(unsigned address, unsigned (&fragments)[4]) {
    load_matrices(address, fragments, true);
}
static void store_matrices(unsigned address, const unsigned (&fragments)[4], bool transposed) {
    unsigned long long rows[32];
    exchange(address, rows);
    const int lane = me->thread % WARP;
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int odd = 0; odd < 2; ++odd) {
            const int row = transposed ? 2 * (lane % 4) + odd : lane / 4;
            const int column = transposed ? lane / 4 : 2 * (lane % 4) + odd;
            const unsigned short word = static_cast<unsigned short>(fragments[matrix] >> (16 * odd));
            std::memcpy(at(static_cast<unsigned>(rows[matrix * 8 + row])) + column * 2, &word, 2);
        }
    __syncwarp();
}
static void store_matrix_4(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
    store_matrices(address, {a, b, c, d}, false);
}
static void store_matrix_4_transposed(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
    store_matrices(address, {a, b, c, d}, true);
}

// ---- Running a kernel ----------------------------------------------------------------------------------------

typedef void (*Body)();
static Body body;
static void enter() {
    body();
    me->done = true;
    ++progress;
    yield();
}

// 0, or 1 if nothing could go on any more. Fibers run in random order, and one in four rests each round.
static int run_blocks(Body kernel, int count, int threads, int shared_bytes, unsigned long long seed) {
    constexpr int STACK = 96 * 1024;
    constexpr unsigned long long PATIENCE = 20000;
    body = kernel;
    block_threads = threads;
    gridDim.x = count;
    random_state = seed * 2654435761u + 88172645463325252ull;
    blocks = std::vector<Block>(count);
    const std::unique_ptr<char[]> stacks(new char[static_cast<size_t>(count) * threads * STACK]);
    for (int b = 0; b < count; ++b) {
        blocks[b].memory.assign(shared_bytes, 0xff);  // NaNs
        blocks[b].shared = blocks[b].memory.data() - SHARED_START;
        blocks[b].warps = std::vector<Group>(threads / WARP);
        blocks[b].exchanged.resize(threads);
    }
    fibers.clear();
    for (int i = 0; i < count * threads; ++i) {
        Fiber* fiber = new Fiber;
        fiber->block = i / threads;
        fiber->thread = i % threads;
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = stacks.get() + static_cast<size_t>(i) * STACK;
        fiber->start.uc_stack.ss_size = STACK;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, enter, 0);
        fibers.push_back(fiber);
    }
    int left = count * threads, failed = 0;
    unsigned long long last = progress, idle = 0;
    while (left > 0 && !failed) {
        const unsigned start = draw() % fibers.size(), step = 2 * (draw() % 64) + 1;
        for (unsigned i = 0; i < fibers.size(); ++i) {
            Fiber* fiber = fibers[(start + i * step) % fibers.size()];
            if (!fiber->copies.empty() && draw() % 4 == 0)
                for (unsigned n = draw() % 32; n > 0 && !fiber->copies.empty(); --n) one_copy(fiber);
            if (fiber->done || (fiber->waits_for && *fiber->waits_for == fiber->while_equal) || draw() % 4 == 0)
                continue;
            me = fiber;
            blockIdx.x = fiber->block;
            threadIdx.x = fiber->thread;
            resume(fiber);
            if (fiber->done) --left;
        }
        idle = progress == last ? idle + 1 : 0;
        last = progress;
        failed = idle > PATIENCE;
    }
    for (Fiber* fiber : fibers) delete fiber;
    return failed;
}
