// The sparse MLP delta in one persistent launch: up-projection with cache update, down-projection, overlapped.
//
// Compile-time parameters (macros): BF16 (elements are bfloat16, else float16); FLOAT_OUTPUT (the output cache is
// float32, else of the elements' type); ADD_IN_L2 (the output cache's entries are added to where they are, which
// rounds the product on its own, else fetched and put back); TOKEN_WARPGROUPS x 64 tokens times WIDTH_WARPGROUPS x
// WIDTH neurons or output features make a tile; STAGES of its pipeline; TIMELINE (record when each tile was at work:
// `Record`).
//
// Both products have tokens as rows: D[token, neuron] = X W1[kept]^T and D[token, feature] = delta W2[kept]. The
// 64 x WIDTH part of a warpgroup reads the least from shared memory that way, and the gathered operand, the one
// that no other tile shares, is read once for all the tokens of a group.
//
// A block has one producer warpgroup and consumer warpgroups. The producer's cp.async gather rows of weights into
// swizzled tiles; what all tiles of a group share, its tokens and its delta, comes by bulk copies, which cost no
// issue slots (6 % on an H200).
// Blocks claim tiles by a counter, in an order in which a down tile comes well after the up tiles it needs (see
// `Order`), so that waiting for them is rare, the tail of one product is filled by the other, and cache write-backs
// hide behind other blocks' products. Whatever a tile waits for was claimed before it by a running block, which
// itself waits only for tiles still earlier: no deadlock, however few blocks are resident.
//
// The packed delta stays in a ring of token groups that L2 can hold. It is written as the image of the shared tiles
// that the down product loads, 64 kept neurons wide and swizzled, its neurons in the order in which a thread holds
// them (`slot_of`): the order of a sum is free if both operands have the same.
#include "hopper.cuh"

typedef unsigned short Element;
typedef long long index_t;

constexpr int CONSUMERS = TOKEN_WARPGROUPS * WIDTH_WARPGROUPS;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int TOKENS = 64 * TOKEN_WARPGROUPS;
constexpr int WIDE = WIDTH * WIDTH_WARPGROUPS;
constexpr int DEPTH = TILE_WIDTH;
constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int CHUNK_ELEMENTS = 8;
constexpr int ROWS_AT_ONCE = WARPGROUP / CHUNKS;
constexpr int A_BYTES = TOKENS * ROW_BYTES;
constexpr int B_BYTES = WIDE * ROW_BYTES;
constexpr int B_TILE_BYTES = DEPTH * ROW_BYTES;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int ACCUMULATORS = WIDTH / 2;
// An epilogue pass covers 64 rows of 128 bytes of a cache, staged in shared memory in one of two buffers. A warp moves
// 16 whole rows to and from global memory.
constexpr int PASS_ROWS = 64;
constexpr int PASS_BYTES = PASS_ROWS * ROW_BYTES;
constexpr int PASS_LOADS = PASS_ROWS / ROWS_AT_ONCE;
constexpr int WARP_ROWS = 16;
constexpr int UP_PASSES = WIDTH / PASS_ROWS;
constexpr int OUTPUT_BYTES = FLOAT_OUTPUT ? 4 : 2;
constexpr int OUTPUT_PASS = ROW_BYTES / OUTPUT_BYTES;
constexpr int DOWN_PASSES = WIDTH / OUTPUT_PASS;
// Steps of a tile's product before its consumers ask for the cache entries that its epilogue changes: by then
// the indices that lead to them have arrived. Asking takes longer than a step's wgmmas: one warpgroup after the other,
// so that somebody multiplies (0.3 to 0.8 % on an H200).
constexpr int STEPS_BEFORE_PREFETCH = 2;
constexpr int STEPS_BETWEEN_PREFETCHES = 3;
// 65536 registers, shared among the warpgroups in eights.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 1 ? 104 : CONSUMERS == 2 ? 72 : CONSUMERS == 3 ? 56 : 64;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 1 ? 232 : CONSUMERS == 2 ? 216 : CONSUMERS == 3 ? 152 : 104;
constexpr int PRODUCERS_BARRIER = 1;
constexpr int FIRST_CONSUMER_BARRIER = 2;
// One for each of the next turns: a warpgroup may be two tiles ahead of another.
constexpr int FIRST_TURN_BARRIER = FIRST_CONSUMER_BARRIER + CONSUMERS, TURN_BARRIERS = 4;
constexpr int POLL_NS = 64;

static_assert(WIDTH % PASS_ROWS == 0 && WIDTH <= 256, "a warpgroup's part is whole passes and one wgmma wide");

enum Kind { UP, DOWN, END };

struct alignas(16) Tile {
    int kind;
    int row;         // batch entry x group
    int block;       // of WIDE slots (up) or output features (down)
    int part;        // of the group's tokens
    int count;       // kept neurons
    int batch;
    int first;       // token
    int tokens;      // that exist, of TOKENS
#if TIMELINE
    int number;      // in the order of claims
#endif
};

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

struct Problem {
    const TensorMap* x;
    const Element *w1, *b1, *w2;
    const int *indices, *counts;
    Element *cache;
    void *output;
    unsigned char *packed;
    int *state;
    int rows, groups, capacity, group_size, tokens, width, width_out;
    index_t w1_f, w2_f, cache_b, cache_f, output_b, output_m;
    bool cache_aligned, output_aligned;
    int band, lead, ring;

    // Blocks of slots, of output features, and of the tokens of a group.
    int up_blocks, down_blocks, parts, bands;

    // Claimed tiles, blocks that are done; then, for each part of each row, warpgroups that have written its
    // delta, and read it. All are nought before a launch and after it.
    __device__ __forceinline__ int counters() const { return 2 + 2 * rows * parts; }
    __device__ __forceinline__ int* claimed() const { return state; }
    __device__ __forceinline__ int* left() const { return state + 1; }
    __device__ __forceinline__ int* ready(int row, int part) const { return state + 2 + row * parts + part; }
    __device__ __forceinline__ int* drained(int row, int part) const { return ready(rows + row, part); }

    __device__ __forceinline__ int existing(int row, int part) const {
        const int within = part * TOKENS;
        return min(min(group_size - within, tokens - row % groups * group_size - within), TOKENS);
    }

    // Images of 64 kept neurons, of one part of the tokens of a row.
    __device__ __forceinline__ unsigned char* images(int row, int part) const {
        return packed + static_cast<index_t>(row % ring * parts + part) * (up_blocks * (WIDE / DEPTH)) * A_BYTES;
    }
};

// Which slot of 64 is in place `position` of an image: in each 32, a thread has four pairs of neighbours 8 apart.
__device__ __forceinline__ int slot_of(int position) {
    return (position & ~31) | (position >> 1 & 3) << 3 | (position >> 3 & 3) << 1 | (position & 1);
}

#if TIMELINE
// When a warpgroup began a tile, had its sums, and was done, in nanoseconds; written after the counters, by tile.
struct Record {
    index_t kind, began, summed, done;
};

__device__ __forceinline__ Record* record_of(const Problem& p, const Tile& tile) {
    return reinterpret_cast<Record*>(p.state + (p.counters() + 7) / 8 * 8) + tile.number;
}
#define MARK(field, value)                                                                  \
    if (part.thread == 0 && part.warpgroup == 0) record_of(p, tile)->field = value
#else
#define MARK(field, value)
#endif

// ---- Order ---------------------------------------------------------------------------------------------------

// Tile number `number`: `lead` bands of up tiles, then bands of up and down tiles by turns, then the down tiles left.
// In a band, rows change fastest: ascending lists make the same block of neighbouring rows meet in L2.
__device__ __forceinline__ Tile tile_of(const Problem& p, int number) {
    Tile tile;
    const int up = p.band * p.parts * p.up_blocks, down = p.band * p.parts * p.down_blocks;
    const int pairs = p.lead * up, tail = pairs + (p.bands - p.lead) * (up + down);
    int band;
    if (number < pairs) {
        tile.kind = UP;
        band = number / up;
        number -= band * up;
    } else if (number < tail) {
        band = (number - pairs) / (up + down);
        number = (number - pairs) % (up + down);
        tile.kind = number < up ? UP : DOWN;
        if (tile.kind == UP) band += p.lead;
        else number -= up;
    } else {
        tile.kind = DOWN;
        band = (number - tail) / down;
        number = (number - tail) % down;
        band += p.bands - p.lead;
    }
    tile.block = number / (p.band * p.parts);
    number -= tile.block * (p.band * p.parts);
    tile.row = band * p.band + number / p.parts;
    tile.part = number % p.parts;
    return tile;
}

__device__ __forceinline__ int claim(const Problem& p) { return atomicAdd(p.claimed(), 1); }

// The first tile from the claimed one on that has work, or one of kind END.
__device__ __forceinline__ Tile first_with_work(const Problem& p, int number) {
    const int all = p.bands * p.band * p.parts * (p.up_blocks + p.down_blocks);
    for (;; number = claim(p)) {
        Tile tile;
        tile.kind = END;
        if (number >= all) return tile;
        tile = tile_of(p, number);
        if (tile.row >= p.rows) continue;
        // A count past the capacity would have down tiles wait for up tiles that nobody claims.
        tile.count = min(p.counts[tile.row], p.capacity);
        tile.tokens = p.existing(tile.row, tile.part);
        const int least = tile.kind == UP ? tile.block * WIDE : 0;
        if (tile.count <= least || tile.tokens <= 0) continue;
        tile.batch = tile.row / p.groups;
        tile.first = tile.row % p.groups * p.group_size + tile.part * TOKENS;
#if TIMELINE
        tile.number = number;
#endif
        return tile;
    }
}

__device__ __forceinline__ void await(const int* counter, int least) {
    for (int tries = 0; load_acquire(counter) < least; ++tries) {
        __nanosleep(POLL_NS);
#ifdef WATCHDOG
        if (tries > WATCHDOG) asm volatile("trap;");
#endif
    }
}

// By one thread, after a barrier among those whose accesses it stands for.
__device__ __forceinline__ void announce(int* counter) {
    add_release(counter, 1);
}

// A down tile needs its delta; an up tile, that whatever had its place in the ring has been read: the delta of the
// last row before it there that has one, as that row's up tiles waited for the one before.
__device__ __forceinline__ void await_inputs(const Problem& p, const Tile& tile) {
    if (tile.kind == DOWN) {
        await(p.ready(tile.row, tile.part), (tile.count + WIDE - 1) / WIDE * CONSUMERS);
    } else {
        int before = tile.row - p.ring;
        while (before >= 0 && (p.counts[before] <= 0 || p.existing(before, tile.part) <= 0)) before -= p.ring;
        if (before >= 0) await(p.drained(before, tile.part), p.down_blocks * CONSUMERS);
    }
}

// ---- Pipeline ------------------------------------------------------------------------------------------------

struct Position {
    int stage = 0, phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// Shared memory: stages, staging, biases, the two tiles posted last, barriers.
constexpr int STAGING_AT = STAGES * STAGE_BYTES;
constexpr int BIAS_AT = STAGING_AT + CONSUMERS * 2 * PASS_BYTES;
constexpr int TILES_AT = BIAS_AT + CONSUMERS * WIDTH * sizeof(Element);
constexpr int FULL_AT = TILES_AT + 2 * sizeof(Tile);
constexpr int EMPTY_AT = FULL_AT + STAGES * 8;
constexpr int POSTED_AT = EMPTY_AT + STAGES * 8;
constexpr int TAKEN_AT = POSTED_AT + 2 * 8;

struct Shared {
    unsigned char* bytes;
    unsigned base;

    __device__ __forceinline__ explicit Shared(unsigned char* aligned)
        : bytes(aligned), base(shared_address(aligned)) {}
    __device__ __forceinline__ unsigned a(int stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ unsigned b(int stage) const { return a(stage) + A_BYTES; }
    __device__ __forceinline__ unsigned char* staging(int warpgroup) const {
        return bytes + STAGING_AT + warpgroup * 2 * PASS_BYTES;
    }
    __device__ __forceinline__ Element* bias(int warpgroup) const {
        return reinterpret_cast<Element*>(bytes + BIAS_AT) + warpgroup * WIDTH;
    }
    __device__ __forceinline__ Tile& tile(int turn) const {
        return reinterpret_cast<Tile*>(bytes + TILES_AT)[turn & 1];
    }
    __device__ __forceinline__ unsigned full(int stage) const { return base + FULL_AT + stage * 8; }
    __device__ __forceinline__ unsigned empty(int stage) const { return base + EMPTY_AT + stage * 8; }
    __device__ __forceinline__ unsigned posted(int turn) const { return base + POSTED_AT + (turn & 1) * 8; }
    __device__ __forceinline__ unsigned taken(int turn) const { return base + TAKEN_AT + (turn & 1) * 8; }
};

// Tile number `turn` of this block, from the thread that claims; everyone reads it once.
__device__ __forceinline__ void post(const Shared& shared, int turn, const Tile& tile) {
    shared.tile(turn) = tile;
    barrier_arrive(shared.posted(turn));
}

__device__ __forceinline__ Tile take(const Shared& shared, int turn) {
    barrier_wait(shared.posted(turn), turn >> 1 & 1);
    const Tile tile = shared.tile(turn);
    __syncwarp();
    if (threadIdx.x % WARP == 0) barrier_arrive(shared.taken(turn));
    return tile;
}

// ---- Producer ------------------------------------------------------------------------------------------------
// Between a tile's last copies and the next one's first lie a claim, what that tile waits for, and its indices: each
// takes an access to L2. So the claim is made some steps earlier, though not sooner: who claims a tile keeps it from
// others that may be idle. And indices come while one thread waits.
// A thread copies chunk `thread % 8` of the rows `thread / 8 + 16 i`: eight threads read 128 bytes of a row.

// Global offsets are in units of 16 bytes, so that 32 bits reach 64 GiB.
__device__ __forceinline__ const unsigned char* chunk_at(const void* base, unsigned chunks) {
    return static_cast<const unsigned char*>(base) + static_cast<unsigned long long>(chunks) * 16;
}

constexpr int STEPS_AFTER_CLAIM = 4;

// Where among `depth` features or neurons the next tile is claimed.
__device__ __forceinline__ int claim_step(int depth) {
    return max((depth - 1) / DEPTH - STEPS_AFTER_CLAIM, 0) * DEPTH;
}

__device__ __forceinline__ void load_up(
    const Problem& p, const Tile& tile, const Shared& shared, Position& at, int thread, int& claimed) {
    constexpr int B_ROWS = WIDE / ROWS_AT_ONCE;
    const int chunk = thread % CHUNKS, row = thread / CHUNKS;
    const int* indices = p.indices + static_cast<index_t>(tile.row) * p.capacity;
    unsigned neurons[B_ROWS];
#pragma unroll
    for (int i = 0; i < B_ROWS; ++i)
        // Past the last, again the last: what it adds to a product is discarded.
        neurons[i] = load_constant(indices + min(tile.block * WIDE + row + i * ROWS_AT_ONCE, tile.count - 1));
    named_sync(PRODUCERS_BARRIER, WARPGROUP);
#pragma unroll
    for (int i = 0; i < B_ROWS; ++i) neurons[i] *= static_cast<unsigned>(p.w1_f / CHUNK_ELEMENTS);
    const Element* w = p.w1 + chunk * CHUNK_ELEMENTS;
    const unsigned place = swizzled(row, chunk);
    const int claim_at = claim_step(p.width);
    for (int start = 0; start < p.width; start += DEPTH) {
        barrier_wait(shared.empty(at.stage), at.phase ^ 1);
        if (thread == 0) {
            barrier_arrive_expect(shared.full(at.stage), A_BYTES);
            // Tokens of the next group come along; nobody uses them.
            tensor_load_4d(shared.a(at.stage), p.x, shared.full(at.stage), start, tile.first, 0, tile.batch);
            if (start == claim_at) claimed = claim(p);
        }
        const unsigned b = shared.b(at.stage) + place;
        if (start + DEPTH <= p.width) {
#pragma unroll
            for (int i = 0; i < B_ROWS; ++i)
                copy_16(b + i * ROWS_AT_ONCE * ROW_BYTES, chunk_at(w + start, neurons[i]));
        } else {
            const int bytes = start + chunk * CHUNK_ELEMENTS < p.width ? 16 : 0;
#pragma unroll
            for (int i = 0; i < B_ROWS; ++i)
                copy_16_or_zeros(b + i * ROWS_AT_ONCE * ROW_BYTES, chunk_at(w + start, neurons[i]), bytes);
        }
        barrier_arrive_after_copies(shared.full(at.stage));
        at.advance();
    }
}

__device__ __forceinline__ void load_down(
    const Problem& p, const Tile& tile, const Shared& shared, Position& at, int thread, int& claimed) {
    constexpr int B_ROWS = DEPTH / ROWS_AT_ONCE, B_TILES = WIDE / TILE_WIDTH;
    const int chunk = thread % CHUNKS, row = thread / CHUNKS;
    const int* indices = p.indices + static_cast<index_t>(tile.row) * p.capacity;
    const unsigned char* delta = p.images(tile.row, tile.part);
    const int column = tile.block * WIDE + chunk * CHUNK_ELEMENTS;
    const Element* w = p.w2 + column;
    const bool whole = tile.block * WIDE + WIDE <= p.width_out;
    const unsigned place = swizzled(row, chunk), stride = static_cast<unsigned>(p.w2_f / CHUNK_ELEMENTS);
    int slots[B_ROWS];
    unsigned neurons[B_ROWS];
#pragma unroll
    for (int i = 0; i < B_ROWS; ++i) {
        slots[i] = slot_of(row + i * ROWS_AT_ONCE);
        neurons[i] = load_constant(indices + min(slots[i], tile.count - 1));
    }
    named_sync(PRODUCERS_BARRIER, WARPGROUP);
    const int claim_at = claim_step(tile.count);
    for (int start = 0; start < tile.count; start += DEPTH) {
        unsigned next[B_ROWS];
#pragma unroll
        for (int i = 0; i < B_ROWS; ++i)
            next[i] = __ldg(indices + min(start + DEPTH + slots[i], tile.count - 1));
        barrier_wait(shared.empty(at.stage), at.phase ^ 1);
        if (thread == 0) {
            barrier_arrive_expect(shared.full(at.stage), A_BYTES);
            bulk_load(shared.a(at.stage), delta, A_BYTES, shared.full(at.stage));
            if (start == claim_at) claimed = claim(p);
        }
        const unsigned b = shared.b(at.stage) + place;
        delta += A_BYTES;
        const bool all = whole && start + DEPTH <= tile.count;
#pragma unroll
        for (int i = 0; i < B_ROWS; ++i) {
            const unsigned char* source = chunk_at(w, neurons[i] * stride);
            const unsigned target = b + i * ROWS_AT_ONCE * ROW_BYTES;
            const bool kept = start + slots[i] < tile.count;
#pragma unroll
            for (int j = 0; j < B_TILES; ++j) {
                const bool inside = kept && column + j * TILE_WIDTH < p.width_out;
                if (all) copy_16(target + j * B_TILE_BYTES, source + j * ROW_BYTES);
                else copy_16_or_zeros(target + j * B_TILE_BYTES, source + j * ROW_BYTES, inside ? 16 : 0);
            }
        }
        barrier_arrive_after_copies(shared.full(at.stage));
        at.advance();
#pragma unroll
        for (int i = 0; i < B_ROWS; ++i) neurons[i] = next[i];
    }
}

__device__ __forceinline__ void produce(const Problem& p, const Shared& shared, int thread) {
    Position at;
    int claimed = thread == 0 ? claim(p) : 0;
    for (int turn = 0;; ++turn) {
        if (thread == 0) {
            barrier_wait(shared.taken(turn), (turn >> 1 & 1) ^ 1);
            const Tile next = first_with_work(p, claimed);
            post(shared, turn, next);
            if (next.kind != END) await_inputs(p, next);
            fence_async_proxy_global();
        }
        __syncwarp();
        const Tile tile = take(shared, turn);
        if (tile.kind == END) break;
        if (tile.kind == UP) load_up(p, tile, shared, at, thread, claimed);
        else load_down(p, tile, shared, at, thread, claimed);
    }
    copies_commit();
    copies_wait<0>();
}

// ---- Consumers -----------------------------------------------------------------------------------------------

// This warpgroup's part of a block's tile, and of this thread in it.
struct Part {
    int warpgroup, thread, warp, lane;
    int token, column;  // where the part begins in the tile
    int turn;

    __device__ __forceinline__ Part(int number, int turn)
        : warpgroup(number), thread(thread_number() % WARPGROUP), warp(thread / WARP), lane(thread % WARP),
          token(number % TOKEN_WARPGROUPS * 64), column(number / TOKEN_WARPGROUPS * WIDTH), turn(turn) {}
    __device__ __forceinline__ void sync() const { named_sync(FIRST_CONSUMER_BARRIER + warpgroup, WARPGROUP); }
    __device__ __forceinline__ int steps_before_prefetch() const {
        return STEPS_BEFORE_PREFETCH + STEPS_BETWEEN_PREFETCHES * warpgroup;
    }
    // Of two warpgroups the second begins an epilogue when the first has computed a pass: then one computes while the
    // other loads and stores (0.3 to 1 % on an H200).
    __device__ __forceinline__ void await_turn() const {
        if (CONSUMERS == 2 && warpgroup == 1) named_sync(FIRST_TURN_BARRIER + turn % TURN_BARRIERS, 2 * WARPGROUP);
    }
    __device__ __forceinline__ void give_turn() const {
        if (CONSUMERS == 2 && warpgroup == 0) named_arrive(FIRST_TURN_BARRIER + turn % TURN_BARRIERS, 2 * WARPGROUP);
    }
};

// Steps `first` to `last` - 1 of a tile's product. One step's wgmmas run while the next step's are issued.
template <int TRANSPOSED_B>
__device__ __forceinline__ void multiply_steps(
    float (&sum)[ACCUMULATORS], const Shared& shared, Position& at, const Part& part, int first, int last) {
    for (int step = first; step < last; ++step) {
        barrier_wait(shared.full(at.stage), at.phase);
        fence_async_proxy();
        const Descriptor a = k_major(shared.a(at.stage) + part.token * ROW_BYTES);
        const unsigned columns = shared.b(at.stage) + part.column * ROW_BYTES;
        const Descriptor b = TRANSPOSED_B ? mn_major(columns, B_TILE_BYTES) : k_major(columns);
        products_fence();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k)
            multiply<0, TRANSPOSED_B>(sum, a + k * K_STEP, b + k * (TRANSPOSED_B ? MN_STEP : K_STEP), step | k);
        products_commit();
        products_wait<1>();
        if (step > 0 && part.lane == 0)
            barrier_arrive(shared.empty(at.stage == 0 ? STAGES - 1 : at.stage - 1));
        at.advance();
    }
}

__device__ __forceinline__ void finish_steps(
    float (&sum)[ACCUMULATORS], const Shared& shared, const Position& at, const Part& part) {
    products_wait<0>();
    pin(sum);
    if (part.lane == 0) barrier_arrive(shared.empty(at.stage == 0 ? STAGES - 1 : at.stage - 1));
}

// A staged chunk: 16 bytes at once if all of them exist and may be, else one element after another.
template <typename Word>
__device__ __forceinline__ void stage_in(unsigned char* target, const Word* source, int existing, bool aligned) {
    constexpr int WORDS = 16 / sizeof(Word);
    if (existing >= WORDS && aligned) {
        copy_16(shared_address(target), source);
    } else {
        Word* words = reinterpret_cast<Word*>(target);
#pragma unroll 1
        for (int i = 0; i < WORDS && i < existing; ++i) words[i] = source[i];
    }
}

template <typename Word>
__device__ __forceinline__ void stage_out(
    Word* target, const unsigned char* source, int existing, bool aligned) {
    constexpr int WORDS = 16 / sizeof(Word);
    if (existing >= WORDS && aligned) {
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
#pragma unroll 1
        for (int i = 0; i < WORDS && i < existing; ++i) target[i] = reinterpret_cast<const Word*>(source)[i];
    }
}

// GELU's tanh form is x / (1 + exp(-2u)): for negative x, 1 + tanh(u) would cancel every digit. Here 1 + exp(-2u),
// kept below what would overflow when two are multiplied; from 2^60 on, x / (1 + exp(-2u)) is nothing beside a result.
__device__ __forceinline__ float gelu_divisor(float x) {
    constexpr float SCALE = -2.0f * 0.7978845608028654f * 1.4426950408889634f;
    return 1.0f + exp2_fast(fminf(x * (SCALE + SCALE * 0.044715f * x * x), 60.0f));
}

// Two at once share a reciprocal: of these epilogues, the special-function unit is what limits.
__device__ __forceinline__ unsigned pack_gelu_tanh(float low, float high) {
    const float divisor = gelu_divisor(low), other = gelu_divisor(high);
    const float reciprocal = reciprocal_fast(divisor * other);
    return pack(low * (reciprocal * other), high * (reciprocal * divisor));
}

// The activation cache's 64 rows (kept neurons) of a pass, this warpgroup's 64 tokens of each.
struct UpEpilogue {
    typedef int Neurons[UP_PASSES][PASS_LOADS];
    const Problem& p;
    const Tile& tile;
    const Part& part;
    unsigned char* staging;
    int first_slot;

    __device__ __forceinline__ UpEpilogue(const Problem& p, const Tile& tile, const Part& part, unsigned char* staging)
        : p(p), tile(tile), part(part), staging(staging), first_slot(tile.block * WIDE + part.column) {}

    __device__ __forceinline__ int chunk() const { return part.lane % CHUNKS; }
    __device__ __forceinline__ int row(int i) const {
        return part.warp * WARP_ROWS + part.lane / CHUNKS + i * (WARP / CHUNKS);
    }
    __device__ __forceinline__ int slot(int pass, int i) const { return first_slot + pass * PASS_ROWS + row(i); }
    // The neuron in a slot; past the last, again the last. Volatile: loads that the compiler moved ahead of a pass would
    // take the registers that the sums leave.
    __device__ __forceinline__ int neuron(int slot) const {
        return load_constant(p.indices + static_cast<index_t>(tile.row) * p.capacity + min(slot, tile.count - 1));
    }
    __device__ __forceinline__ bool kept(int pass, int i) const { return slot(pass, i) < tile.count; }
    // Whether all threads have only whole chunks.
    __device__ __forceinline__ bool whole() const { return p.cache_aligned && tile.tokens >= part.token + 64; }
    __device__ __forceinline__ int existing() const {
        return tile.tokens - part.token - chunk() * CHUNK_ELEMENTS;
    }
    __device__ __forceinline__ Element* entries(int neuron) const {
        return p.cache + tile.batch * p.cache_b + neuron * p.cache_f + tile.first + part.token +
               chunk() * CHUNK_ELEMENTS;
    }
    __device__ __forceinline__ unsigned char* staged(int pass, int i) const {
        return staging + pass % 2 * PASS_BYTES + swizzled(row(i), chunk());
    }
    // Whole chunks without a branch between them: of slots past the last, the last one's entries, which nobody uses.
    __device__ __forceinline__ void read_whole(int pass, const Neurons& neurons) const {
#pragma unroll
        for (int i = 0; i < PASS_LOADS; ++i)
            copy_16(shared_address(staged(pass, i)), entries(neurons[pass][i]));
    }
    __device__ __forceinline__ void write_whole(int pass, const Neurons& neurons) const {
        uint4 words[PASS_LOADS];
#pragma unroll
        for (int i = 0; i < PASS_LOADS; ++i) words[i] = *reinterpret_cast<const uint4*>(staged(pass, i));
#pragma unroll
        for (int i = 0; i < PASS_LOADS; ++i) store_16_if(kept(pass, i), entries(neurons[pass][i]), words[i]);
    }
    __device__ __forceinline__ void read_ragged(int pass, int i) const {
        if (kept(pass, i)) stage_in(staged(pass, i), entries(neuron(slot(pass, i))), existing(), p.cache_aligned);
    }
    __device__ __forceinline__ void write_ragged(int pass, int i) const {
        if (kept(pass, i)) stage_out(entries(neuron(slot(pass, i))), staged(pass, i), existing(), p.cache_aligned);
    }

    // Old entries of the first two passes are asked for.
    __device__ __forceinline__ void read_early(const Neurons& neurons) const {
        constexpr int PASSES = UP_PASSES < 2 ? UP_PASSES : 2;
        if (whole()) {
            read_whole(0, neurons);
            copies_commit();
            if (PASSES > 1) read_whole(PASSES - 1, neurons);
        } else {
#pragma unroll 1
            for (int i = 0; i < PASSES * PASS_LOADS; ++i) read_ragged(i / PASS_LOADS, i % PASS_LOADS);
            copies_commit();
        }
        copies_commit();
    }

    // New entries of a pass go to the cache, and in their place come old ones of the pass after the next.
    __device__ __forceinline__ void replace(int pass, const Neurons& neurons) const {
        if (whole()) {
            write_whole(pass, neurons);
            if (pass + 2 < UP_PASSES) read_whole(pass + 2, neurons);
        } else {
#pragma unroll 1
            for (int i = 0; i < PASS_LOADS; ++i) {
                write_ragged(pass, i);
                if (pass + 2 < UP_PASSES) read_ragged(pass + 2, i);
            }
        }
        copies_commit();
    }

    // A pass's new activations, as pairs of neighbouring neurons: of eights `2 i` and `2 i + 1`, two tokens each.
    __device__ __forceinline__ void activate(
        unsigned (&fresh)[PASS_ROWS / 16][4], const float (&sum)[ACCUMULATORS], const Element* bias, int pass) const {
        const unsigned* biases = reinterpret_cast<const unsigned*>(bias + pass * PASS_ROWS) + part.lane % 4;
#pragma unroll
        for (int eight = 0; eight < PASS_ROWS / 8; ++eight) {
            const unsigned offsets = biases[eight * 4];
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                const float* values = sum + pass * 32 + eight * 4 + token * 2;
                fresh[eight / 2][eight % 2 * 2 + token] =
                    pack_gelu_tanh(values[0] + low_float(offsets), values[1] + high_float(offsets));
            }
        }
    }

    // New activations into the staged rows, in place of the old; their difference into the packed delta.
    __device__ __forceinline__ void change(
        const unsigned (&fresh)[PASS_ROWS / 16][4], int pass, unsigned char* images) const {
        const int quarter = part.lane % 4, matrix = part.lane / 8, within = part.lane % 8;
        // Matrices: of 8 neurons and the next 8, the warp's first 8 tokens and its last.
        const unsigned rows = shared_address(staging) + pass % 2 * PASS_BYTES +
                              swizzled(matrix / 2 * 8 + within, part.warp * 2 + matrix % 2);
        const int left = tile.count - first_slot - pass * PASS_ROWS - 2 * quarter;
        unsigned char* image = images + static_cast<index_t>(first_slot / DEPTH + pass) * A_BYTES +
                               (part.token + part.warp * 16 + part.lane / 4) * ROW_BYTES;
        unsigned olds[PASS_ROWS / 16][4];
#pragma unroll
        for (int i = 0; i < PASS_ROWS / 16; ++i) load_matrix_4_transposed(rows + i * 2 * ATOM_BYTES, olds[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned delta[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int eight = half * 4 + i / 2;
                const unsigned kept = eight * 8 + 1 < left ? 0xffffffff : eight * 8 < left ? 0xffff : 0;
                delta[i % 2][i / 2] = subtract(fresh[half * 2 + i / 4][i % 4], olds[half * 2 + i / 4][i % 4]) & kept;
            }
            const int chunk = (half * 4 + quarter) ^ (part.lane / 4);
#pragma unroll
            for (int token = 0; token < 2; ++token)
                *reinterpret_cast<uint4*>(image + token * 8 * ROW_BYTES + chunk * 16) =
                    make_uint4(delta[token][0], delta[token][1], delta[token][2], delta[token][3]);
        }
#pragma unroll
        for (int i = 0; i < PASS_ROWS / 16; ++i)
            store_matrix_4_transposed(
                rows + i * 2 * ATOM_BYTES, fresh[i][0], fresh[i][1], fresh[i][2], fresh[i][3]);
    }

    __device__ __forceinline__ void run(
        const float (&sum)[ACCUMULATORS], const Element* bias, const Neurons& neurons) const {
        unsigned char* images = p.images(tile.row, tile.part);
        unsigned fresh[PASS_ROWS / 16][4];
        part.await_turn();
        activate(fresh, sum, bias, 0);
        part.give_turn();
        // In ragged tiles all that was asked for is in one group.
        if (UP_PASSES > 1 && whole()) copies_wait<1>();
        else copies_wait<0>();
        part.sync();
#pragma unroll
        for (int pass = 0; pass < UP_PASSES; ++pass) {
            if (pass > 0) activate(fresh, sum, bias, pass);
            change(fresh, pass, images);
            // One barrier for what was changed and for the old entries of the next pass.
            copies_wait<0>();
            part.sync();
            replace(pass, neurons);
        }
    }
};

__device__ __forceinline__ void add_16(void* target, uint4 words) {
    if (FLOAT_OUTPUT) add_floats_16(target, words);
    else add_elements_16(target, words);
}

// A chunk added to the output cache's.
template <typename Word>
__device__ __forceinline__ void add_out(Word* target, const unsigned char* source, int existing, bool aligned) {
    constexpr int WORDS = 16 / sizeof(Word);
    if (existing >= WORDS && aligned) {
        add_16(target, *reinterpret_cast<const uint4*>(source));
    } else {
        const Word* words = reinterpret_cast<const Word*>(source);
#pragma unroll 1
        for (int i = 0; i < WORDS && i < existing; ++i) {
#if FLOAT_OUTPUT
            target[i] += words[i];
#else
            target[i] = static_cast<Word>(pack(low_float(target[i]) + low_float(words[i]), 0.0f));
#endif
        }
    }
}

// The output cache's 64 rows (tokens), 128 bytes of each a pass; 16 rows are a warp's.
struct DownEpilogue {
#if FLOAT_OUTPUT
    typedef float Word;
#else
    typedef Element Word;
#endif
    static constexpr int WORDS = 16 / OUTPUT_BYTES;
    const Problem& p;
    const Tile& tile;
    const Part& part;
    unsigned char* staging;

    __device__ __forceinline__ int row(int i) const {
        return part.warp * WARP_ROWS + part.lane / CHUNKS + i * (WARP / CHUNKS);
    }
    __device__ __forceinline__ int column(int pass) const {
        return tile.block * WIDE + part.column + pass * OUTPUT_PASS + part.lane % CHUNKS * WORDS;
    }
    __device__ __forceinline__ int existing(int pass, int i) const {
        return part.token + row(i) < tile.tokens ? p.width_out - column(pass) : 0;
    }
    __device__ __forceinline__ Word* entries(int pass, int i) const {
        return static_cast<Word*>(p.output) + tile.batch * p.output_b +
               (tile.first + part.token + row(i)) * p.output_m + column(pass);
    }
    __device__ __forceinline__ unsigned char* staged(int pass, int i) const {
        return staging + pass % 2 * PASS_BYTES + swizzled(row(i), part.lane % CHUNKS);
    }
    // Whether all threads have only whole chunks.
    __device__ __forceinline__ bool whole() const {
        return p.output_aligned && tile.tokens >= part.token + 64 &&
               tile.block * WIDE + part.column + WIDTH <= p.width_out;
    }
    __device__ __forceinline__ void read(int pass) const {
        if (pass >= DOWN_PASSES) return;
        if (whole()) {
#pragma unroll
            for (int i = 0; i < PASS_LOADS; ++i) copy_16(shared_address(staged(pass, i)), entries(pass, i));
        } else {
#pragma unroll 1
            for (int i = 0; i < PASS_LOADS; ++i)
                stage_in(staged(pass, i), entries(pass, i), existing(pass, i), p.output_aligned);
        }
    }
    // The staged rows put to the output cache, or added there.
    __device__ __forceinline__ void write(int pass) const {
        if (whole()) {
            uint4 words[PASS_LOADS];
#pragma unroll
            for (int i = 0; i < PASS_LOADS; ++i) words[i] = *reinterpret_cast<const uint4*>(staged(pass, i));
#pragma unroll
            for (int i = 0; i < PASS_LOADS; ++i) {
                if (ADD_IN_L2) add_16(entries(pass, i), words[i]);
                else *reinterpret_cast<uint4*>(entries(pass, i)) = words[i];
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < PASS_LOADS; ++i) {
                if (ADD_IN_L2) add_out(entries(pass, i), staged(pass, i), existing(pass, i), p.output_aligned);
                else stage_out(entries(pass, i), staged(pass, i), existing(pass, i), p.output_aligned);
            }
        }
    }

    // The product added to the staged rows, or put there.
    __device__ __forceinline__ void change(const float (&sum)[ACCUMULATORS], int pass) const {
        unsigned char* buffer = staging + pass % 2 * PASS_BYTES;
#if FLOAT_OUTPUT
#pragma unroll
        for (int i = 0; i < OUTPUT_PASS / 4; ++i) {
            const int eight = i / 2, token = i % 2;
            const int chunk = eight * 2 + part.lane % 4 / 2;
            float2* word = reinterpret_cast<float2*>(
                buffer + swizzled(part.warp * 16 + token * 8 + part.lane / 4, chunk) + part.lane % 2 * 8);
            const float* values = sum + pass * (OUTPUT_PASS / 2) + eight * 4 + token * 2;
            const float2 old = ADD_IN_L2 ? make_float2(0.0f, 0.0f) : *word;
            *word = make_float2(old.x + values[0], old.y + values[1]);
        }
#else
        const int matrix = part.lane / 8, row = part.warp * 16 + matrix % 2 * 8 + part.lane % 8;
#pragma unroll
        for (int pair = 0; pair < 8; pair += 2) {
            const unsigned address = shared_address(buffer) + swizzled(row, pair + matrix / 2);
            unsigned words[4] = {0, 0, 0, 0};
            if (!ADD_IN_L2) load_matrix_4(address, words);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* values = sum + pass * 32 + (pair + i / 2) * 4 + i % 2 * 2;
                words[i] = pack(low_float(words[i]) + values[0], high_float(words[i]) + values[1]);
            }
            store_matrix_4(address, words[0], words[1], words[2], words[3]);
        }
#endif
    }

    __device__ __forceinline__ void run(const float (&sum)[ACCUMULATORS]) const {
#pragma unroll
        for (int pass = 0; pass < DOWN_PASSES; ++pass) {
            if (!ADD_IN_L2) copies_wait<1>();
            // Other lanes may still be reading what was staged there before, or bring what is now.
            __syncwarp();
            change(sum, pass);
            __syncwarp();
            write(pass);
            if (!ADD_IN_L2) {
                read(pass + 2);
                copies_commit();
            }
        }
    }
};

// Each thread stages the same chunks in and out, so that no barrier is needed between a write and the next read, nor
// between two tiles: other warps' are behind a pass's one barrier (up), or touch only their own rows (down).
__device__ __forceinline__ void consume_up(
    const Problem& p, const Tile& tile, const Shared& shared, Position& at, const Part& part) {
    constexpr int BIASES = (WIDTH + WARPGROUP - 1) / WARPGROUP;
    const UpEpilogue epilogue(p, tile, part, shared.staging(part.warpgroup));
    Element* bias = shared.bias(part.warpgroup);
    const int steps = (p.width + DEPTH - 1) / DEPTH;
    float sum[ACCUMULATORS];
    int neurons[UP_PASSES][PASS_LOADS], biased[BIASES];
    Element values[BIASES];
#pragma unroll
    for (int i = 0; i < UP_PASSES * PASS_LOADS; ++i)
        neurons[i / PASS_LOADS][i % PASS_LOADS] = epilogue.neuron(epilogue.slot(i / PASS_LOADS, i % PASS_LOADS));
#pragma unroll
    for (int i = 0; i < BIASES; ++i) biased[i] = epilogue.neuron(epilogue.first_slot + part.thread + i * WARPGROUP);

    const int early = min(part.steps_before_prefetch(), steps);
    multiply_steps<0>(sum, shared, at, part, 0, early);
#pragma unroll
    for (int i = 0; i < BIASES; ++i) values[i] = p.b1 ? __ldg(p.b1 + biased[i]) : 0;
    epilogue.read_early(neurons);
    multiply_steps<0>(sum, shared, at, part, early, steps);
    finish_steps(sum, shared, at, part);
    MARK(summed, nanoseconds());

#pragma unroll
    for (int i = 0; i < BIASES; ++i)
        if (part.thread + i * WARPGROUP < WIDTH) bias[part.thread + i * WARPGROUP] = values[i];
    part.sync();
    epilogue.run(sum, bias, neurons);
    // All of the delta is written, and bulk copies will read it.
    fence_async_proxy_global();
    part.sync();
    if (part.thread == 0) announce(p.ready(tile.row, tile.part));
}

__device__ __forceinline__ void consume_down(
    const Problem& p, const Tile& tile, const Shared& shared, Position& at, const Part& part) {
    const DownEpilogue epilogue{p, tile, part, shared.staging(part.warpgroup)};
    const int steps = (tile.count + DEPTH - 1) / DEPTH;
    float sum[ACCUMULATORS];
    const int early = ADD_IN_L2 ? 0 : min(part.steps_before_prefetch(), steps);
    if (!ADD_IN_L2) {
        multiply_steps<1>(sum, shared, at, part, 0, early);
#pragma unroll
        for (int pass = 0; pass < 2; ++pass) {
            epilogue.read(pass);
            copies_commit();
        }
    }
    multiply_steps<1>(sum, shared, at, part, early, steps);
    finish_steps(sum, shared, at, part);
    MARK(summed, nanoseconds());
    // Every step's delta has been seen in shared memory: its place in the ring is free for this warpgroup.
    if (part.thread == 0) announce(p.drained(tile.row, tile.part));
    epilogue.run(sum);
}

__device__ __forceinline__ void consume(const Problem& p, const Shared& shared, int number) {
    Position at;
    for (int turn = 0;; ++turn) {
        const Tile tile = take(shared, turn);
        if (tile.kind == END) return;
        // Made anew for each tile: what derives from it would else stay in registers that the sums need.
        const Part part(number, turn);
        MARK(kind, tile.kind | blockIdx.x << 1);
        MARK(began, nanoseconds());
        if (tile.kind == UP) consume_up(p, tile, shared, at, part);
        else consume_down(p, tile, shared, at, part);
        MARK(done, nanoseconds());
    }
}

// The last block to end leaves the counters as the next launch wants them, which saves it a launch that does.
__device__ __forceinline__ void clear_counters(const Problem& p) {
    __syncthreads();
    int last = 0;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(p.left(), 1) == static_cast<int>(gridDim.x) - 1;
    }
    if (__syncthreads_or(last))
        for (int i = threadIdx.x; i < p.counters(); i += THREADS) p.state[i] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sparse_mlp(
    const __grid_constant__ TensorMap x, const Element* w1, const Element* b1, const Element* w2,
    const int* indices, const int* counts, Element* cache, void* output, unsigned char* packed, int* state,
    index_t rows, index_t groups, index_t capacity, index_t group_size, index_t tokens, index_t width,
    index_t width_out, index_t w1_f, index_t w2_f, index_t cache_b, index_t cache_f, index_t output_b,
    index_t output_m, index_t cache_aligned, index_t output_aligned, index_t band, index_t lead, index_t ring
) {
    extern __shared__ unsigned char memory[];
    const Shared shared(memory + (ATOM_BYTES - shared_address(memory) % ATOM_BYTES) % ATOM_BYTES);
    Problem p{&x, w1, b1, w2, indices, counts, cache, output, packed, state,
              static_cast<int>(rows), static_cast<int>(groups), static_cast<int>(capacity),
              static_cast<int>(group_size), static_cast<int>(tokens), static_cast<int>(width),
              static_cast<int>(width_out), w1_f, w2_f, cache_b, cache_f, output_b, output_m,
              cache_aligned != 0, output_aligned != 0, static_cast<int>(band), static_cast<int>(lead),
              static_cast<int>(ring)};
    p.up_blocks = (p.capacity + WIDE - 1) / WIDE;
    p.down_blocks = (p.width_out + WIDE - 1) / WIDE;
    p.parts = (min(p.group_size, p.tokens) + TOKENS - 1) / TOKENS;
    p.bands = (p.rows + p.band - 1) / p.band;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared.full(i), WARPGROUP + 1);
            barrier_init(shared.empty(i), CONSUMER_WARPS);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared.posted(i), 1);
            barrier_init(shared.taken(i), CONSUMER_WARPS + WARPGROUP / WARP);
        }
        fence_barrier_init();
    }
    __syncthreads();
    // The same for all lanes, which the compiler cannot see in threadIdx: wgmma needs it.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == CONSUMERS) {
        give_registers<PRODUCER_REGISTERS>();
        produce(p, shared, threadIdx.x % WARPGROUP);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, shared, warpgroup);
    }
    clear_counters(p);
}
