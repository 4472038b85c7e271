// Column-sparse attention on Hopper: each group of queries attends to its own scattered columns only.
//
// One warpgroup fetches, CONSUMERS others compute. The fetching one gathers BLOCK_COLUMNS rows of k and of v
// at a time, 16 bytes a thread, into swizzled tiles that wgmma reads; each computing one owns 64 queries,
// whose logits, weights and output stay in its registers (the structure of FlashAttention-3, arXiv
// 2407.08608). TMA cannot gather rows on this architecture, and a bulk copy cannot swizzle them, so cp.async
// it is: one shuffle, one multiply-add and one copy for every 512 bytes.
//
// Blocks are persistent and walk the row tiles with heads outermost, so that those in flight share one head's
// keys and values in the L2 cache; the last few tiles, less than a round, are cut by warpgroups (`Place`). The
// fetching warpgroup runs ahead into the next row tile, as far as the stages go, so its first loads hide behind
// the last products and the epilogue of the one before. For that it must wait for nothing but stages: each
// computing warpgroup brings its own queries, and has the L2 cache fetch what its output is added to.
//
// Macros: BF16, WIDTH (64 or 128), CONSUMERS, BLOCK_COLUMNS (multiple of 16), STAGES, OVERLAP, PING_PONG,
// BLOCKS (that share a multiprocessor) and STAGGER (cycles between the warpgroups' first products).
#include "hopper.cuh"

constexpr int WARPGROUP_ROWS = 64;
constexpr int ROWS = WARPGROUP_ROWS * CONSUMERS;
constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int WARPS = 4;  // of a warpgroup
constexpr int HALVES = WIDTH / TILE_WIDTH;
constexpr int STEP = 16;  // of a product's inner dimension
constexpr int STEP_BYTES = STEP * 2;

// A thread of the fetching warpgroup moves the same 16-byte chunk of every row it takes part in.
constexpr int CHUNKS = WIDTH / 8;
constexpr int ROWS_AT_ONCE = WARPGROUP / CHUNKS;
constexpr int PASSES = BLOCK_COLUMNS / ROWS_AT_ONCE;
constexpr int AHEAD = 4;                                 // addresses made before their copies
constexpr int ENTRIES = (PASSES + CHUNKS - 1) / CHUNKS;  // of the list, read for its row's neighbours

constexpr int COLUMN_TILE_BYTES = BLOCK_COLUMNS * ROW_BYTES;
constexpr int STAGE_BYTES = HALVES * COLUMN_TILE_BYTES;
constexpr int QUERY_TILE_BYTES = WARPGROUP_ROWS * ROW_BYTES;
constexpr int QUERY_BYTES = CONSUMERS * HALVES * QUERY_TILE_BYTES;
constexpr int BARRIERS_OFFSET = QUERY_BYTES + 2 * STAGES * STAGE_BYTES;

// The register file, shared out: what fetching needs, and equal parts of the rest.
constexpr int LAUNCH_REGISTERS = 65536 / (THREADS * BLOCKS) / 8 * 8;
constexpr int FETCH_REGISTERS = LAUNCH_REGISTERS < 128 ? 24 : CONSUMERS == 3 ? 32 : 40;
constexpr int COMPUTE_REGISTERS_WANTED =
    (LAUNCH_REGISTERS * (CONSUMERS + 1) - FETCH_REGISTERS) / CONSUMERS / 8 * 8;
constexpr int COMPUTE_REGISTERS = COMPUTE_REGISTERS_WANTED > 240 ? 240 : COMPUTE_REGISTERS_WANTED;
constexpr bool SHARE_REGISTERS = COMPUTE_REGISTERS > LAUNCH_REGISTERS;

constexpr float LN2 = 0.6931471805599453f;
// The output is rescaled only when a row's maximum has grown by more than this, in powers of 2: the weights
// are relative to a maximum up to that much too small, which float32 sums and 16-bit weights bear without
// loss.
constexpr float SLACK = 8.0f;

struct Shape {
    int heads, rows, groups, group_size, tiles, pairs, whole, units;
    long long capacity;
};

// What a block does at a time. The first `whole` units are one row tile each, all CONSUMERS warpgroups at
// work; the row tiles left over, too few for a round of all blocks, are shared out by warpgroups, 64 rows a
// unit. The last tile of each (batch, head) pair, which may be ragged, comes after all others.
struct Place {
    int b, h, first, limit;  // limit: the row after the last that is in the unit, the group and the queries
    int list;                // which of the column lists

    __device__ __forceinline__ Place(const Shape& shape, int unit) {
        int tile = unit, part = 0, rows = ROWS;
        const int others = shape.groups * shape.tiles - 1;  // of each pair, but for the last
        if (unit >= shape.whole) {
            const int left = shape.pairs * (others + 1) - shape.whole;
            part = (unit - shape.whole) / left;
            tile = unit - part * left;
            rows = WARPGROUP_ROWS;
        }
        int pair = tile - shape.pairs * others, rest = others;
        if (pair < 0) {
            pair = tile / others;
            rest = tile - pair * others;
        }
        const int group = shape.tiles == 1 ? rest : rest / shape.tiles;
        b = shape.pairs == shape.heads ? 0 : pair / shape.heads;
        h = pair - b * shape.heads;
        list = pair * shape.groups + group;
        first = group * shape.group_size + (rest - group * shape.tiles) * ROWS + part * WARPGROUP_ROWS;
        limit = min(min((group + 1) * shape.group_size, shape.rows), first + rows);
    }

    // Of columns; a unit without rows needs none.
    __device__ __forceinline__ int count(const int* counts) const {
        return first < limit ? load_constant(counts + list) : 0;
    }
};

// The block's unit after this one. The first blocks of a launch are the slowest (by 1.5 us of 42 on an H200), so
// the units beyond the last whole round are dealt out from the last block on.
__device__ __forceinline__ int unit_after(const Shape& shape, int unit) {
    const int next = unit + gridDim.x;
    if (unit < shape.whole && next >= shape.whole) return shape.whole + gridDim.x - 1 - blockIdx.x;
    return next;
}

// A ring of stages: where it stands, and the parity of this round.
struct Ring {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Shared {
    unsigned queries, keys, values, barriers;

    __device__ __forceinline__ explicit Shared(unsigned start)
        : queries(start),
          keys(start + QUERY_BYTES),
          values(start + QUERY_BYTES + STAGES * STAGE_BYTES),
          barriers(start + BARRIERS_OFFSET) {}

    __device__ __forceinline__ unsigned barrier(int kind, int stage) const {
        return barriers + 8 * (kind * STAGES + stage);
    }
    __device__ __forceinline__ unsigned keys_full(int stage) const { return barrier(0, stage); }
    __device__ __forceinline__ unsigned keys_empty(int stage) const { return barrier(1, stage); }
    __device__ __forceinline__ unsigned values_full(int stage) const { return barrier(2, stage); }
    __device__ __forceinline__ unsigned values_empty(int stage) const { return barrier(3, stage); }

    __device__ __forceinline__ void initialise() const {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(keys_full(stage), WARPGROUP);
            barrier_init(values_full(stage), WARPGROUP);
            barrier_init(keys_empty(stage), CONSUMERS * WARPS);
            barrier_init(values_empty(stage), CONSUMERS * WARPS);
        }
        fence_barrier_init();
    }
};

// ---- Fetching ----------------------------------------------------------------------

// A list's columns in tiles: the first is the one that may be partly filled, so that all later ones need no
// mask.
struct Columns {
    const int* list;
    int count, tiles, head;  // head: columns of the first tile

    __device__ __forceinline__ Columns(const int* list, int count)
        : list(list),
          count(count),
          tiles((count + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS),
          head(count - (tiles - 1) * BLOCK_COLUMNS) {}

    // Entries of tile `tile` for the rows that this thread's neighbours fetch; a slot past the tile repeats
    // its last column, whose weight is masked.
    __device__ __forceinline__ void read(int (&column)[ENTRIES], int tile, int chunk, int row) const {
        int start = tile == 0 ? 0 : head + (tile - 1) * BLOCK_COLUMNS;
        int last = tile == 0 ? head - 1 : count - 1;
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
            int slot = start + (e * CHUNKS + chunk) * ROWS_AT_ONCE + row;
            column[e] = load_constant(list + min(slot, last));
        }
    }
};

// One tile of keys or values. `table` and `target` point at this thread's chunk of the first row. Addresses
// are made a few ahead of their copies, since each takes a shuffle's time.
__device__ __forceinline__ void gather(
    unsigned target, const char* table, int stride, const int (&column)[ENTRIES], unsigned barrier) {
#pragma unroll
    for (int start = 0; start < PASSES; start += AHEAD) {
        const char* address[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD && start + i < PASSES; ++i) {
            int pass = start + i;
            address[i] =
                row_at(table, __shfl_sync(0xffffffff, column[pass / CHUNKS], pass % CHUNKS, CHUNKS), stride);
        }
#pragma unroll
        for (int i = 0; i < AHEAD && start + i < PASSES; ++i)
            copy_16_prefetch_128(target + (start + i) * ROWS_AT_ONCE * ROW_BYTES, address[i]);
    }
    barrier_arrive_after_copies(barrier);
}

struct Inputs {
    const char *k, *v;
    const int *indices, *counts;
    long long k_b, k_h, v_b, v_h;
    int k_n, v_n;
};

// Brings a unit's list nearer, since each read of it is waited for one tile later, too soon for memory: its beginning
// to L1, by a load whose value nobody uses, the rest to L2.
__device__ __forceinline__ void prefetch_list(const Inputs& in, const Shape& shape, const Place& place) {
    constexpr int ENTRIES_AT_ONCE = SECTOR_BYTES / 4;
    const int* list = in.indices + place.list * shape.capacity;
    int slot = threadIdx.x * ENTRIES_AT_ONCE;
    if (slot < shape.capacity) load_constant(list + slot);
    while ((slot += WARPGROUP * ENTRIES_AT_ONCE) < shape.capacity) prefetch_sector(list + slot);
}

__device__ __forceinline__ Columns columns_of(const Inputs& in, const Shape& shape, const Place& place) {
    return Columns(in.indices + place.list * shape.capacity, place.count(in.counts));
}

// The first unit's, and its first entries. Nothing hides these loads, so the entries are read at the same time
// as the count, as if that were the capacity; where it is not, once more.
__device__ __forceinline__ Columns first_columns(
    const Inputs& in, const Shape& shape, const Place& place, int (&entries)[ENTRIES], int chunk, int row) {
    const int capacity = static_cast<int>(shape.capacity);
    Columns columns(in.indices + place.list * shape.capacity, capacity);
    const int count = place.count(in.counts);
    if (capacity > 0) columns.read(entries, 0, chunk, row);
    if (count != capacity) {
        columns = Columns(columns.list, count);
        if (count > 0) columns.read(entries, 0, chunk, row);
    }
    return columns;
}

__device__ __forceinline__ void fetch(const Inputs& in, const Shape& shape, const Shared& shared) {
    const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const unsigned target = chunk / 8 * COLUMN_TILE_BYTES + swizzled(row, chunk % 8);

    Ring keys, values;
    int upcoming[ENTRIES], current[ENTRIES], held[ENTRIES];
    int unit = blockIdx.x;
    prefetch_list(in, shape, Place(shape, unit));
    Columns columns = first_columns(in, shape, Place(shape, unit), upcoming, chunk, row);

    while (unit < shape.units) {
        const Place place(shape, unit);
        const int next = unit_after(shape, unit);
        const Place next_place(shape, min(next, shape.units - 1));
        const Columns following = columns_of(in, shape, next_place);
        prefetch_list(in, shape, next_place);
        const char* k = in.k + place.b * in.k_b + place.h * in.k_h + chunk * 16;
        const char* v = in.v + place.b * in.v_b + place.h * in.v_h + chunk * 16;

        // Keys run one tile ahead of values, as the products do; list entries one ahead of the keys.
        for (int t = 0; t <= columns.tiles; ++t) {
#pragma unroll
            for (int e = 0; e < ENTRIES; ++e) {
                held[e] = current[e];
                current[e] = upcoming[e];
            }
            if (t + 1 < columns.tiles)
                columns.read(upcoming, t + 1, chunk, row);
            else if ((t + 1 == columns.tiles || columns.tiles == 0) && following.count > 0)
                following.read(upcoming, 0, chunk, row);
            if (t < columns.tiles) {
                barrier_wait(shared.keys_empty(keys.stage), keys.parity ^ 1);
                gather(
                    shared.keys + keys.stage * STAGE_BYTES + target, k, in.k_n, current,
                    shared.keys_full(keys.stage));
                keys.advance();
            }
            if (t > 0) {
                barrier_wait(shared.values_empty(values.stage), values.parity ^ 1);
                gather(
                    shared.values + values.stage * STAGE_BYTES + target, v, in.v_n, held,
                    shared.values_full(values.stage));
                values.advance();
            }
        }
        columns = following;
        unit = next;
    }
    copies_commit();
    copies_wait<0>();  // the block's shared memory outlives the copies into it
}

// ---- Computing ----------------------------------------------------------------------

typedef float Logits[BLOCK_COLUMNS / 2];
typedef unsigned Weights[BLOCK_COLUMNS / 4];
typedef float Output[WIDTH / 2];

// The softmax state of a thread's two rows; `total` counts its own columns only.
struct Softmax {
    float maximum[2], total[2], rescale[2];
    bool moved;  // whether what was accumulated so far is to be multiplied by `rescale`
};

__device__ __forceinline__ float over_columns(float x, bool maximum) {
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
        float other = __shfl_xor_sync(0xffffffff, x, lane);
        x = maximum ? fmaxf(x, other) : x + other;
    }
    return x;
}

// Logits become weights. FIRST: there was no tile before, and only the first `live` columns of this one
// count; the others repeat the last of those, so that they leave the maximum as it is.
template <bool FIRST>
__device__ __forceinline__ void weigh(Logits& s, Softmax& state, float scale, int live) {
    float maximum[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        maximum[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
        for (int i = 4; i < BLOCK_COLUMNS / 2; i += 4)
            maximum[r] = fmaxf(maximum[r], fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
        maximum[r] = over_columns(maximum[r], true);
    }
    if (FIRST) {
        state.maximum[0] = maximum[0];
        state.maximum[1] = maximum[1];
        state.total[0] = state.total[1] = 0.0f;
    } else {
        const float growth = fmaxf(maximum[0] - state.maximum[0], maximum[1] - state.maximum[1]);
        state.moved = __any_sync(0xffffffff, growth * scale > SLACK);
        if (state.moved) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float raised = fmaxf(state.maximum[r], maximum[r]);
                state.rescale[r] = exp2_fast((state.maximum[r] - raised) * scale);
                state.maximum[r] = raised;
                state.total[r] *= state.rescale[r];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) offset[r] = state.maximum[r] * scale;
#pragma unroll
    for (int i = 0; i < BLOCK_COLUMNS / 2; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -offset[i / 2 % 2]));
    if (FIRST && live < BLOCK_COLUMNS) {
        const int column = 2 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < BLOCK_COLUMNS / 2; ++i)
            if (i / 4 * 8 + column + i % 2 >= live) s[i] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
        for (int i = 4; i < BLOCK_COLUMNS / 2; i += 4) {
            even += s[i + 2 * r];
            odd += s[i + 2 * r + 1];
        }
        state.total[r] += even + odd;
    }
}

__device__ __forceinline__ void pack_weights(Weights& p, const Logits& s) {
#pragma unroll
    for (int i = 0; i < BLOCK_COLUMNS / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
    pin(p);  // all packed before the products begin, not between them
}

// The branch also keeps the assembler from moving the wait that follows it up before the softmax, which is to
// run beside the values' product.
__device__ __forceinline__ void rescale_output(Output& o, const Softmax& state) {
    if (state.moved) {
        products_wait<0>();
        pin(o);
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) o[i] *= state.rescale[i / 2 % 2];
    }
}

// s = Q Kᵀ
__device__ __forceinline__ void multiply_keys(Logits& s, Descriptor queries, Descriptor keys) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int k = 0; k < TILE_WIDTH / STEP; ++k)
            multiply<0, 0>(
                s, further(queries, half * QUERY_TILE_BYTES + k * STEP_BYTES),
                further(keys, half * COLUMN_TILE_BYTES + k * STEP_BYTES), half + k > 0);
    products_commit();
}

// o += P V
__device__ __forceinline__ void multiply_values(Output& o, const Weights& p, Descriptor values) {
#pragma unroll
    for (int k = 0; k < BLOCK_COLUMNS / STEP; ++k)
        multiply<1>(
            o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], further(values, k * STEP * ROW_BYTES), 1);
    products_commit();
}

struct Queries {
    const char* q;
    long long q_b, q_h;
    int q_n;
};

// A warpgroup's rows of a unit, on their way to its part of the shared memory; those past the limit repeat the
// last, their results are not stored.
__device__ __forceinline__ void fetch_queries(
    const Queries& from, const Place& place, const Shared& shared, int consumer) {
    const int thread = thread_number() % WARPGROUP, chunk = thread % CHUNKS, row = thread / CHUNKS;
    const char* q = from.q + place.b * from.q_b + place.h * from.q_h + chunk * 16;
    const int first = place.first + consumer * WARPGROUP_ROWS + row, last = place.limit - 1;
    const unsigned target = shared.queries + (consumer * HALVES + chunk / 8) * QUERY_TILE_BYTES +
                            swizzled(row, chunk % 8);
#pragma unroll 4
    for (int at = 0; at < WARPGROUP_ROWS; at += ROWS_AT_ONCE)
        copy_16(target + at * ROW_BYTES, row_at(q, min(first + at, last), from.q_n));
    copies_commit();
}

struct Outputs {
    const char* base;
    char* out;
    float* lse;
    long long base_b, base_h, base_n, out_b, out_h, out_n;
    float scale_log2, sign;
};

// Four lanes share a row of accumulators, each with 4 bytes of every 16. Turning squares of four words about
// makes that 16 bytes of every 64: a quarter of the loads and stores, each 8 of which take a cycle of the
// cache by itself.
constexpr int SQUARES = WIDTH / 32;

__device__ __forceinline__ void exchange(unsigned& first, unsigned& second, int lanes, bool upper) {
    const unsigned got = __shfl_xor_sync(0xffffffff, upper ? first : second, lanes);
    (upper ? first : second) = got;
}

__device__ __forceinline__ void transpose_square(uint4& words, int lane) {
    exchange(words.x, words.y, 1, lane & 1);
    exchange(words.z, words.w, 1, lane & 1);
    exchange(words.x, words.z, 2, lane & 2);
    exchange(words.y, words.w, 2, lane & 2);
}

// What the output is added to, for this thread's two rows.
struct Onto {
    uint4 squares[2][SQUARES];

    // Has the L2 cache fetch it: the epilogue waits for it with nothing else to do.
    __device__ __forceinline__ static void prefetch(const Outputs& to, const Place& place, int row) {
        if (!to.base) return;
        constexpr int SHARE = WIDTH * 2 / 4;  // of a row, for each of the four lanes that have accumulators of it
        const char* base = to.base + place.b * to.base_b + place.h * to.base_h + threadIdx.x % 4 * SHARE;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = place.first + row + 8 * r;
#pragma unroll
            for (int sector = 0; sector < SHARE; sector += SECTOR_BYTES)
                if (at < place.limit) prefetch_sector(base + at * to.base_n + sector);
        }
    }

    __device__ __forceinline__ void load(const Outputs& to, const Place& place, int row) {
        const char* base = to.base + place.b * to.base_b + place.h * to.base_h + threadIdx.x % 4 * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = place.first + row + 8 * r;
#pragma unroll
            for (int g = 0; g < SQUARES; ++g) {
                squares[r][g] = make_uint4(0, 0, 0, 0);
                if (to.base && at < place.limit)
                    squares[r][g] = *reinterpret_cast<const uint4*>(base + at * to.base_n + 64 * g);
            }
        }
    }
};

__device__ __forceinline__ unsigned add_pair(unsigned onto, const float* o, float factor) {
    return pack(fmaf(o[0], factor, low_float(onto)), fmaf(o[1], factor, high_float(onto)));
}

// out = base + sign · o / total for this thread's two rows, and their log-sum-exp.
__device__ __forceinline__ void store(
    const Output& o, const Softmax& state, Onto& onto, const Outputs& to, const Shape& shape,
    const Place& place, int row) {
    const int lane = threadIdx.x % 4;
    char* out = to.out + place.b * to.out_b + place.h * to.out_h + lane * 16;
    float* lse = to.lse + (static_cast<long long>(place.b) * shape.heads + place.h) * shape.rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int at = place.first + row + 8 * r;
        const float total = over_columns(state.total[r], false);
        const float factor = total > 0.0f ? to.sign / total : 0.0f;
#pragma unroll
        for (int g = 0; g < SQUARES; ++g) {
            uint4& words = onto.squares[r][g];
            const float* pairs = o + 16 * g + 2 * r;
            transpose_square(words, lane);
            words.x = add_pair(words.x, pairs, factor);
            words.y = add_pair(words.y, pairs + 4, factor);
            words.z = add_pair(words.z, pairs + 8, factor);
            words.w = add_pair(words.w, pairs + 12, factor);
            transpose_square(words, lane);
            if (at < place.limit) *reinterpret_cast<uint4*>(out + at * to.out_n + 64 * g) = words;
        }
        if (lane == 0 && at < place.limit)
            lse[at] = total > 0.0f ? (state.maximum[r] * to.scale_log2 + log2_fast(total)) * LN2
                                   : __uint_as_float(0xff800000);
    }
}

__device__ __forceinline__ void release(unsigned barrier, int lane) {
    if (lane == 0) barrier_arrive(barrier);
}

// PING_PONG: the warpgroups issue their products in turns, so that one's softmax meets the others' products.
constexpr int FIRST_TURN = 1;

__device__ __forceinline__ void await_turn(int consumer) {
    if (PING_PONG) named_sync(FIRST_TURN + consumer, 2 * WARPGROUP);
}

__device__ __forceinline__ void pass_turn(int consumer) {
    if (PING_PONG) named_arrive(FIRST_TURN + (consumer + 1) % CONSUMERS, 2 * WARPGROUP);
}

// What cp.async wrote, the generic proxy wrote: each thread that is about to read it through wgmma, the async
// proxy, puts a fence between the barrier, by which it knows of those writes, and its products. The other
// direction needs none: a stage is released only after its products have finished, and written only after
// that.
__device__ __forceinline__ void await_tile(unsigned barrier, int parity) {
    barrier_wait(barrier, parity);
    fence_async_proxy();
}

// A warpgroup without a row in this unit: its arrivals count all the same. No product gathers its warps between
// waits, so each release does: the barrier must not go on two phases before every lane has seen the first.
__device__ __forceinline__ void release_together(unsigned barrier, int lane) {
    __syncwarp();
    release(barrier, lane);
}

__device__ __forceinline__ void pass_by(
    const Shared& shared, Ring& keys, Ring& values, int tiles, int consumer, int lane) {
    for (int t = 0; t < tiles; ++t) {
        barrier_wait(shared.keys_full(keys.stage), keys.parity);
        release_together(shared.keys_empty(keys.stage), lane);
        keys.advance();
        if (t > 0) {
            await_turn(consumer);
            pass_turn(consumer);
        }
        barrier_wait(shared.values_full(values.stage), values.parity);
        release_together(shared.values_empty(values.stage), lane);
        values.advance();
    }
}

constexpr int FIRST_OWN = FIRST_TURN + CONSUMERS;  // barriers of one warpgroup

// Turns to the block's next unit: its number of columns, and its queries on their way. The warpgroup's products
// with those before are finished. Several divisions and loads: called while other products run.
__device__ __forceinline__ void turn_to(
    int unit, int& count, const Queries& from, const int* counts, const Shape& shape, const Shared& shared,
    int consumer) {
    if (unit >= shape.units) return;
    const Place place(shape, unit);
    count = place.count(counts);
    named_sync(FIRST_OWN + consumer, WARPGROUP);
    fetch_queries(from, place, shared, consumer);
}

__device__ __forceinline__ void await_queries(int consumer) {
    copies_wait<0>();
    fence_async_proxy();
    named_sync(FIRST_OWN + consumer, WARPGROUP);
}

__device__ __forceinline__ void compute(
    const int* counts, const Queries& from, const Outputs& to, const Shape& shape, const Shared& shared,
    int consumer) {
    const int lane = threadIdx.x % WARP;
    const int row = consumer * WARPGROUP_ROWS + threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
    const Descriptor queries = once(k_major(shared.queries + consumer * HALVES * QUERY_TILE_BYTES));
    const Descriptor all_keys = once(k_major(shared.keys));
    const Descriptor all_values = once(mn_major(shared.values, COLUMN_TILE_BYTES));
    const float scale = once(to.scale_log2);

    Ring keys, values;
    int count = 0;
    turn_to(blockIdx.x, count, from, counts, shape, shared, consumer);
    if (PING_PONG && consumer == 0) named_arrive(FIRST_TURN, 2 * WARPGROUP);

    for (int unit = blockIdx.x; unit < shape.units; unit = unit_after(shape, unit)) {
        const int tiles = (count + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
        const int head = count - (tiles - 1) * BLOCK_COLUMNS;
        const Place place(shape, unit);
        if (place.first + consumer * WARPGROUP_ROWS >= place.limit) {
            pass_by(shared, keys, values, tiles, consumer, lane);
            await_queries(consumer);
            turn_to(unit_after(shape, unit), count, from, counts, shape, shared, consumer);
            continue;
        }
        Output o;
        Onto onto;
        Softmax state;
        state.total[0] = state.total[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) o[i] = 0.0f;
        pin(o);

        if (tiles > 0) {
            Logits s;
            Weights p;
            await_queries(consumer);
            await_tile(shared.keys_full(keys.stage), keys.parity);
            // Warpgroups that begin together stay together: all in their epilogues, and nobody multiplies.
            if (STAGGER && unit == blockIdx.x) idle_for(consumer * STAGGER);
            products_fence();
            multiply_keys(s, queries, further(all_keys, keys.stage * STAGE_BYTES));
            Onto::prefetch(to, place, row);
            products_wait<0>();
            pin(s);
            release(shared.keys_empty(keys.stage), lane);
            keys.advance();
            weigh<true>(s, state, scale, head);
            pack_weights(p, s);

            for (int t = 1; t < tiles; ++t) {
                barrier_wait(shared.keys_full(keys.stage), keys.parity);
                await_tile(shared.values_full(values.stage), values.parity);
                await_turn(consumer);
                products_fence();
                if (OVERLAP) {
                    multiply_keys(s, queries, further(all_keys, keys.stage * STAGE_BYTES));
                    products_fence();
                }
                multiply_values(o, p, further(all_values, values.stage * STAGE_BYTES));
                if (!OVERLAP) {
                    // The logits take the place of the weights.
                    products_wait<0>();
                    pin(o);
                    pin(p);
                    release(shared.values_empty(values.stage), lane);
                    values.advance();
                    products_fence();
                    multiply_keys(s, queries, further(all_keys, keys.stage * STAGE_BYTES));
                }
                pass_turn(consumer);
                products_wait<OVERLAP ? 1 : 0>();
                pin(s);
                release(shared.keys_empty(keys.stage), lane);
                keys.advance();
                weigh<false>(s, state, scale, BLOCK_COLUMNS);
                pin(s);
                rescale_output(o, state);
                if (OVERLAP) {
                    products_wait<0>();
                    pin(o);
                    pin(p);
                    release(shared.values_empty(values.stage), lane);
                    values.advance();
                }
                pack_weights(p, s);
            }
            await_tile(shared.values_full(values.stage), values.parity);
            products_fence();
            multiply_values(o, p, further(all_values, values.stage * STAGE_BYTES));
            onto.load(to, place, row);
            turn_to(unit_after(shape, unit), count, from, counts, shape, shared, consumer);
            products_wait<0>();
            pin(o);
            release(shared.values_empty(values.stage), lane);
            values.advance();
        } else {
            await_queries(consumer);
            turn_to(unit_after(shape, unit), count, from, counts, shape, shared, consumer);
            onto.load(to, place, row);
        }
        store(o, state, onto, to, shape, place, row);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sparse_attention(
    const char* q, const char* k, const char* v, const int* indices, const int* counts, const char* base,
    char* out, float* lse, long long q_b, long long q_h, long long q_n, long long k_b, long long k_h,
    long long k_n, long long v_b, long long v_h, long long v_n, long long base_b, long long base_h,
    long long base_n, long long out_b, long long out_h, long long out_n, long long heads, long long rows,
    long long groups, long long capacity, long long group_size, long long tiles, long long pairs,
    long long whole, long long units, double scale_log2, double sign) {
    extern __shared__ unsigned char memory[];
    const Shared shared(shared_address(memory));
    const Shape shape{
        static_cast<int>(heads),
        static_cast<int>(rows),
        static_cast<int>(groups),
        static_cast<int>(group_size),
        static_cast<int>(tiles),
        static_cast<int>(pairs),
        static_cast<int>(whole),
        static_cast<int>(units),
        capacity};
    if (threadIdx.x == 0) {
        if (shared.queries % ATOM_BYTES) trap();  // swizzling goes by the address
        shared.initialise();
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        if constexpr (SHARE_REGISTERS) give_registers<FETCH_REGISTERS>();
        const Inputs in{
            k, v, indices, counts, k_b, k_h, v_b, v_h, static_cast<int>(k_n), static_cast<int>(v_n)};
        fetch(in, shape, shared);
    } else {
        if constexpr (SHARE_REGISTERS) take_registers<COMPUTE_REGISTERS>();
        const Queries from{q, q_b, q_h, static_cast<int>(q_n)};
        const Outputs to{
            base,
            out,
            lse,
            base_b,
            base_h,
            base_n,
            out_b,
            out_h,
            out_n,
            static_cast<float>(scale_log2),
            static_cast<float>(sign)};
        compute(counts, from, to, shape, shared, __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0) - 1);
    }
}
