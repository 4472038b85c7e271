// Warps on the host: every thread of a block is a fiber, and those that meet in a warp-wide instruction or at a
// barrier wait for each other. Stands in for mma.cuh, function by function.
//
// What a GPU leaves open is pushed to its extremes. `eager` copies land when they are started (as if memory were
// infinitely fast: an overwritten buffer that someone still reads shows), others only when waited for (a missing
// wait shows). `backwards` runs the last warp as far as it gets before the others, otherwise the first.

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define MINUS_INFINITY (-INFINITY)

// <algorithm> and <functional> would take a quarter of the time that a kernel takes to compile.
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
using Word = unsigned short;
using index_t = long long;

struct Index { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

static Index blockIdx, threadIdx;
constexpr int MOST_SHARED_BYTES = 232448;
constexpr int STACK_BYTES = 256 << 10;
alignas(1024) static unsigned char shared_memory[MOST_SHARED_BYTES];
constexpr unsigned WHOLE_WARP = 0xffffffffu;

namespace host {

struct Copy { unsigned to; const void* from; int existing, bytes; };
struct Meeting { int arrived = 0; unsigned long turn = 0; };
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun = false, done = false;
    const Meeting* meeting = nullptr;
    unsigned long turn = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};
struct Warp { Meeting meeting; void* lane[32]; };

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Meeting block;
static jmp_buf scheduler;
static ucontext_t unused;
static void (*body)();
static bool eager, backwards;
static int threads, shared_bytes;
static std::vector<std::pair<const char*, const char*>> tensors;
static std::string trouble;
static long conflicts, streamed;

static Fiber& self() { return fibers[threadIdx.x]; }

static void complain(const std::string& what) {
    if (trouble.empty())
        trouble = what + ", block " + std::to_string(blockIdx.x) + " thread " + std::to_string(threadIdx.x);
}

static void wait(Meeting& meeting) {
    Fiber& me = self();
    me.meeting = &meeting;
    me.turn = meeting.turn;
    if (!_setjmp(me.at)) _longjmp(scheduler, 1);
}

template <class Action> static void meet(Meeting& meeting, int members, Action action) {
    if (++meeting.arrived < members) return wait(meeting);
    action();
    meeting.arrived = 0;
    ++meeting.turn;
}

// `action` sees what each lane of the warp brought, once all 32 are here.
template <class T, class Action> static void together(T& mine, Action action) {
    Warp& warp = warps[threadIdx.x / 32];
    warp.lane[threadIdx.x % 32] = &mine;
    meet(warp.meeting, 32, [&] { action([&](int lane) -> T& { return *static_cast<T*>(warp.lane[lane]); }); });
}

static void check_shared(unsigned address, int bytes, int alignment) {
    if (address % alignment || address + bytes > unsigned(shared_bytes))
        complain("shared address " + std::to_string(address));
}

static void perform(const Copy& copy) {
    std::memset(shared_memory + copy.to, 0, copy.bytes);
    std::memcpy(shared_memory + copy.to, copy.from, copy.existing);
}

static void start_copy(Copy copy) {
    check_shared(copy.to, copy.bytes, copy.bytes);
    const char* from = static_cast<const char*>(copy.from);
    bool inside = copy.existing == 0;
    for (auto& [begin, end] : tensors) inside |= begin <= from && from + copy.existing <= end;
    const bool aligned = reinterpret_cast<std::uintptr_t>(from) % copy.bytes == 0;
    if (!inside || !aligned || copy.existing < 0 || copy.existing > copy.bytes)
        return complain("global address of a copy");
    if (eager) perform(copy);
    else self().open.push_back(copy);
}

static void enter() {
    body();
    self().done = true;
    if (!self().open.empty() || !self().groups.empty()) complain("copies under way at the end");
    _longjmp(scheduler, 1);
}

static bool may_run(const Fiber& fiber) {
    return !fiber.done && (fiber.meeting == nullptr || fiber.meeting->turn != fiber.turn);
}

static void run_block() {
    std::memset(shared_memory, 0xff, sizeof shared_memory);
    warps.assign(threads / 32, Warp());
    block = Meeting();
    for (Fiber& fiber : fibers) {
        fiber.begun = fiber.done = false;
        fiber.meeting = nullptr;
        fiber.open.clear();
        fiber.groups.clear();
    }
    volatile int next = 0;
    _setjmp(scheduler);
    for (next = 0; next < threads; next = next + 1) {
        const int thread = backwards ? threads - 1 - next : next;
        Fiber& fiber = fibers[thread];
        if (!may_run(fiber)) continue;
        threadIdx.x = thread;
        fiber.meeting = nullptr;
        if (fiber.begun) _longjmp(fiber.at, 1);
        fiber.begun = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
        setcontext(&fiber.start);
    }
    for (Fiber& fiber : fibers)
        if (!fiber.done) complain("deadlock");
}

template <class T> T argument(long long bits) {
    T value;
    static_assert(sizeof(T) == 8, "kernels take pointers, long long and double");
    std::memcpy(&value, &bits, 8);
    return value;
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), const long long* arguments, std::index_sequence<I...>) {
    kernel(argument<A>(arguments[I])...);
}

struct Launch {
    long long blocks, threads, shared_bytes, eager, backwards, tensors;
    const char* const* ranges;
    char* trouble;
    long long conflicts, streamed;
};

template <class... A>
void run(void (*kernel)(A...), const long long* arguments, Launch* launch) {
    eager = launch->eager, backwards = launch->backwards;
    shared_bytes = launch->shared_bytes, threads = launch->threads;
    trouble.clear(), conflicts = streamed = 0, tensors.clear();
    for (int i = 0; i < launch->tensors; ++i) tensors.emplace_back(launch->ranges[2 * i], launch->ranges[2 * i + 1]);
    fibers = std::vector<Fiber>(threads);
    static void (*chosen)(A...);
    static const long long* words;
    chosen = kernel, words = arguments;
    body = [] { call(chosen, words, std::index_sequence_for<A...>()); };
    for (long long i = 0; i < launch->blocks && trouble.empty(); ++i) {
        blockIdx.x = i;
        run_block();
    }
    std::snprintf(launch->trouble, 200, "%s", trouble.c_str());
    launch->conflicts = conflicts, launch->streamed = streamed;
}

static float from_word(Word word) {
    if (KIND == 2) {
        const std::uint32_t bits = std::uint32_t(word) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    _Float16 value;
    std::memcpy(&value, &word, 2);
    return value;
}

static Word to_word(float value) {
    if (KIND == 2) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    const _Float16 half = value;
    Word word;
    std::memcpy(&word, &half, 2);
    return word;
}

static float element(unsigned both, int i) { return from_word(i ? both >> 16 : both & 0xffff); }

struct Matrices { unsigned* to; unsigned address; };

template <bool TRANSPOSED> static void load(unsigned (&to)[4], unsigned address) {
    check_shared(address, 16, 16);
    Matrices mine{to, address};
    together(mine, [](auto lane) {
        for (int i = 0; i < 4; ++i) {
            Word matrix[8][8];
            unsigned banks = 0;
            for (int row = 0; row < 8; ++row) {
                const unsigned from = lane(8 * i + row).address;
                std::memcpy(matrix[row], shared_memory + from, 16);
                banks |= 1u << (from / 16 % 8);
            }
            conflicts += banks != 0xff;
            for (int l = 0; l < 32; ++l) {
                const int row = l / 4, column = l % 4 * 2;
                const Word low = TRANSPOSED ? matrix[column][row] : matrix[row][column];
                const Word high = TRANSPOSED ? matrix[column + 1][row] : matrix[row][column + 1];
                lane(l).to[i] = unsigned(high) << 16 | low;
            }
        }
    });
}

struct Product { float* c; const unsigned* a; unsigned b[2]; };

}  // namespace host

static float __int_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
static float __fdividef(float a, float b) { return a / b; }

static void __syncthreads() { host::meet(host::block, host::threads, [] {}); }
static void __syncwarp() { int nothing = 0; host::together(nothing, [](auto) {}); }

static bool __any_sync(unsigned, bool mine) {
    host::together(mine, [](auto lane) {
        bool any = false;
        for (int l = 0; l < 32; ++l) any |= lane(l);
        for (int l = 0; l < 32; ++l) lane(l) = any;
    });
    return mine;
}

// What the lane that `from` names for each lane has brought.
template <class T, class From> static T exchanged(T mine, From from) {
    host::together(mine, [from](auto lane) {
        T all[32];
        for (int l = 0; l < 32; ++l) all[l] = lane(l);
        for (int l = 0; l < 32; ++l) lane(l) = all[from(l)];
    });
    return mine;
}

template <class T> static T __shfl_xor_sync(unsigned, T mine, int with) {
    return exchanged(mine, [with](int lane) { return lane ^ with; });
}

template <class T> static T __shfl_up_sync(unsigned, T mine, int by) {
    return exchanged(mine, [by](int lane) { return lane < by ? lane : lane - by; });
}

template <class T> static T __shfl_sync(unsigned, T mine, int from) {
    struct { T value; int from; } both{mine, from};
    host::together(both, [](auto lane) {
        T all[32];
        for (int l = 0; l < 32; ++l) all[l] = lane(l).value;
        for (int l = 0; l < 32; ++l) lane(l).value = all[lane(l).from % 32];
    });
    return both.value;
}

// Threads take turns, so plain arithmetic is atomic.
template <class T> static T atomicAdd(T* at, T more) { return std::exchange(*at, *at + more); }
template <class T> static T atomicMax(T* at, T other) { return std::exchange(*at, max(*at, other)); }
template <class T> static T atomicOr(T* at, T bits) { return std::exchange(*at, *at | bits); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
static unsigned __funnelshift_l(unsigned low, unsigned high, int by) { return high << by | low >> (32 - by); }
static unsigned __umulhi(unsigned a, unsigned b) { return (static_cast<unsigned long long>(a) * b) >> 32; }
template <class T> static T __ldcs(const T* from) { return host::streamed += sizeof(T), *from; }

static unsigned shared_address(const void* pointer) {
    return static_cast<const unsigned char*>(pointer) - shared_memory;
}

static void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    host::Product mine{c, a, {b0, b1}};
    host::together(mine, [](auto lane) {
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; ++l)
            for (int e = 0; e < 2; ++e) {
                const int row = l / 4, column = l % 4 * 2 + e;
                for (int part = 0; part < 4; ++part)
                    a[row + part % 2 * 8][column + part / 2 * 8] = host::element(lane(l).a[part], e);
                for (int part = 0; part < 2; ++part) b[column + part * 8][row] = host::element(lane(l).b[part], e);
            }
        for (int l = 0; l < 32; ++l)
            for (int e = 0; e < 4; ++e) {
                const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
                float sum = lane(l).c[e];
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
                lane(l).c[e] = sum;
            }
    });
}

static void load_matrices(unsigned (&to)[4], unsigned address) { host::load<false>(to, address); }
static void load_transposed(unsigned (&to)[4], unsigned address) { host::load<true>(to, address); }

static void copy_vector(unsigned to, const void* from, int existing = 16) {
    host::start_copy({to, from, existing, 16});
}
static void copy_int(unsigned to, const int* from) { host::start_copy({to, from, 4, 4}); }
static void commit_copies() { host::self().groups.push_back(std::move(host::self().open)), host::self().open.clear(); }

template <int pending> static void wait_for_copies() {
    auto& groups = host::self().groups;
    for (; groups.size() > pending; groups.pop_front())
        for (const auto& copy : groups.front()) host::perform(copy);
}

static unsigned pack(float low, float high) { return unsigned(host::to_word(high)) << 16 | host::to_word(low); }
static float widen(Word word) { return host::from_word(word); }
static float low_half(unsigned both) { return host::element(both, 0); }
static float high_half(unsigned both) { return host::element(both, 1); }
static float power_of_two(float x) { return exp2f(x); }
static float log_two(float x) { return log2f(x); }
