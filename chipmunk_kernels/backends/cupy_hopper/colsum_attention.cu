// Dense attention, and dense attention that also sums each group's attention mass per column.
//
// Compile-time parameters (macros): BF16; WIDTH, the head dimension, 64 or 128; MASS, whether columns are summed;
// BLOCK_N columns taken in at a time, 64, 96 or 128; CONSUMERS, warpgroups of 64 query rows each; SPAN of them
// that work on one group; STAGES of key and value tiles in flight; OVERLAP, whether a warpgroup starts the next
// tile's logits before it waits for this tile's output; EVERY_LANE, whether all lanes arrive with a warp's sums,
// for racecheck, which does not see what orders them before one lane's arrival.
//
// A block is CONSUMERS warpgroups that multiply and one that helps: a warp of it has the tensor-map engine bring
// queries, keys and values into shared memory, two others add up the column sums of all consumer warps and write
// them. The last tile of columns, which may be ragged, comes first, so that the loop over the others masks
// nothing.
//
// Weights are taken against a fixed anchor for each row instead of its running maximum: log2 e · lse_prev, which
// makes a weight exp(s - lse_prev) itself, so that column sums are plain sums of weights; without mass, the
// largest logit of the first tile taken. That saves the search for the maximum and all rescaling. Numbers allow
// it: a bfloat16 weight has the exponents of a float. Where an anchor turns out too far off (the sum of a row's
// weights leaves [SMALLEST_SUM, LARGEST_SUM]), the block's groups are done again with running maxima, which is
// always safe.
//
// Column sums: an accumulator fragment has two rows of a column in a thread and the other rows in the 8 lanes of
// the same lane % 4. Lanes halve their columns and double their rows in three exchanges, so that 64 columns cost
// 14 shuffles a lane and not 48; each warp leaves BLOCK_N sums over its 16 rows in shared memory. This runs while
// the tensor cores multiply by the values. All sums are float32 in a fixed order.
//
// What it costs, at D = 128 and 192 rows: a tile of 128 columns takes the tensor cores 3072 cycles, and each
// scheduler 3 x 505 issue slots: 3 x 64 exponentials, which take half the cycles, and for the column sums 3 x 28
// shuffles, 3 x 60 additions and 3 x 56 selections. Shared memory passes 78 % of what it can in that time. So the
// sums fit beside the products, which alone set the floor.

#include "hopper.cuh"

typedef long long index_t;
typedef unsigned short Element;

constexpr int WG_ROWS = 64;
constexpr int WG_WARPS = 4;
constexpr int CONSUMER_WARPS = CONSUMERS * WG_WARPS;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int FIRST_REDUCER = BLOCK_N % 96 ? 64 : 32;  // so that each has the same number of columns
constexpr int REDUCERS = WARPGROUP - FIRST_REDUCER;
constexpr int BLOCK_GROUPS = CONSUMERS / SPAN;
constexpr int CHUNK_ROWS = SPAN * WG_ROWS;  // of one group, in a block at a time
constexpr int PARTIAL_SLOTS = 2;

// Multiples of 8 that add up to no more than the 65536 registers of a multiprocessor.
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
constexpr int HELPER_REGISTERS = CONSUMERS == 3 ? 32 : 40;

constexpr int WIDTH_TILES = WIDTH / TILE_WIDTH;
constexpr int QUERY_TILE_BYTES = CONSUMERS * WG_ROWS * ROW_BYTES;
constexpr int KEY_TILE_BYTES = BLOCK_N * ROW_BYTES;
constexpr int QUERY_BYTES = WIDTH_TILES * QUERY_TILE_BYTES;
constexpr int STAGE_BYTES = WIDTH_TILES * KEY_TILE_BYTES;  // of keys, and as many of values
constexpr int PARTIAL_BYTES = MASS ? CONSUMER_WARPS * BLOCK_N * 4 : 0;

constexpr int SCORES = BLOCK_N / 2;  // accumulators a thread has of a 64 x BLOCK_N tile
constexpr int OUTPUTS = WIDTH / 2;

// Weights are taken, packed and multiplied by values PART columns at a time, which keeps registers few.
constexpr int PART = OVERLAP && BLOCK_N % 64 == 0 ? 64 : 32;
constexpr int PARTS = BLOCK_N / PART;
constexpr int PART_SCORES = PART / 2;
constexpr int PART_WORDS = PART / 4;  // of packed weights
constexpr int SUMS = PART / 4;        // columns of a part of which a thread has (two) rows

[[maybe_unused]] constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
#define INFINITE __int_as_float(0x7f800000)
[[maybe_unused]] constexpr float LARGEST_SHARE = 112.0f;  // in base 2: 65536 rows of it add up to a finite float

// float16 has 30 binary exponents, so weights are moved to where there is room: up from 1/columns where they are
// taken against a normaliser, down from 1 where they are taken against a maximum that may still grow.
constexpr float LIFT = BF16 ? 0.0f : MASS ? 12.0f : -6.0f;
constexpr float UNLIFT = BF16 || !MASS ? 1.0f : 1.0f / 4096.0f;
constexpr float LARGEST_SUM = BF16 ? 18446744073709551616.0f : 65504.0f;
constexpr float SMALLEST_SUM = !MASS ? 0.0f : BF16 ? 1.0f / 18446744073709551616.0f : 16.0f;

static_assert(WIDTH == 64 || WIDTH == 128, "rows are one or two tiles wide");
static_assert(BLOCK_N % PART == 0 && BLOCK_N % REDUCERS == 0, "tiles are shared out evenly");
static_assert(CONSUMERS % SPAN == 0, "a block has whole groups");

// Where everything is in shared memory (addresses of the shared window).
struct Shared {
    unsigned queries, keys, values, partials, barriers;

    __device__ __forceinline__ explicit Shared(unsigned base) {
        queries = base;
        keys = queries + QUERY_BYTES;
        values = keys + STAGES * STAGE_BYTES;
        partials = values + STAGES * STAGE_BYTES;
        barriers = partials + PARTIAL_SLOTS * PARTIAL_BYTES;
    }

    __device__ __forceinline__ unsigned queries_full() const { return barriers; }
    __device__ __forceinline__ unsigned keys_full(int stage) const { return barriers + 8 * (1 + stage); }
    __device__ __forceinline__ unsigned keys_empty(int stage) const { return keys_full(stage + STAGES); }
    __device__ __forceinline__ unsigned values_full(int stage) const { return keys_full(stage + 2 * STAGES); }
    __device__ __forceinline__ unsigned values_empty(int stage) const { return keys_full(stage + 3 * STAGES); }
    __device__ __forceinline__ unsigned sums_full(int slot) const { return keys_full(slot + 4 * STAGES); }
    __device__ __forceinline__ unsigned sums_empty(int slot) const { return sums_full(slot + PARTIAL_SLOTS); }
    // A number: not 0 once some row's anchor has failed. Threads read it after a run; those who write it write 1.
    __device__ __forceinline__ unsigned failed() const { return sums_empty(PARTIAL_SLOTS); }
};

// Tiles are numbered through all that a block does; a number says which of LENGTH buffers holds the tile, and the
// parity of the phase in which that buffer is filled with it.
template <int LENGTH>
__device__ __forceinline__ int place_of(int number) {
    static_assert((LENGTH & (LENGTH - 1)) == 0, "numbers are split into bits");
    return number % LENGTH;
}

template <int LENGTH>
__device__ __forceinline__ int parity_of(int number) {
    return number / LENGTH % 2;
}

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// One parameter, laid out by the host: maps of (B, H, N, D) tensors, boxes of 64 of D; strides in elements.
struct Arguments {
    TensorMap q, k, v;
    const float* lse_prev;
    const int* key_lengths;
    Element* out;
    float *lse, *mass;
    index_t out_b, out_h, out_n;
    int heads, rows, keys, columns, groups, group_size;
    float scale_log2;
};
static_assert(sizeof(Arguments) == 512, "as the host packs them");

// What a block works on: some groups of one head. A group's rows are taken in chunks; a run is one chunk against all
// columns. Chunks are first run with anchors, and if need be all of them once more without.
struct Work {
    int pair, b, h, first_group, chunks, keys, tiles;

    // Each use computes its own: registers are too few to keep these numbers while tiles are multiplied.
    __device__ __forceinline__ explicit Work(const Arguments& a) {
        const int block = block_number();
        const int blocks_per_pair = (a.groups + BLOCK_GROUPS - 1) / BLOCK_GROUPS;
        pair = block / blocks_per_pair;
        b = pair / a.heads;
        h = pair % a.heads;
        first_group = block % blocks_per_pair * BLOCK_GROUPS;
        chunks = (a.group_size + CHUNK_ROWS - 1) / CHUNK_ROWS;
        keys = a.keys;
        if (a.key_lengths) keys = min(max(a.key_lengths[b], 0), keys);
        tiles = (keys + BLOCK_N - 1) / BLOCK_N;
    }

    // First column of the tile that is taken as number `turn`: the last tile comes first.
    __device__ __forceinline__ int first_column(int turn) const { return (turn ? turn - 1 : tiles - 1) * BLOCK_N; }

    __device__ __forceinline__ int chunk_of(int run) const { return run < chunks ? run : run - chunks; }

    __device__ __forceinline__ bool goes_on(int run, const Shared& shared) const {
        return run < chunks || (run < 2 * chunks && load_shared_float(shared.failed()) != 0.0f);
    }
};

// The rows of one warpgroup: `first` on, those before `end` exist.
struct RowRange {
    int first, end;

    __device__ __forceinline__ RowRange(const Arguments& a, const Work& work, int chunk, int warpgroup) {
        const int group = work.first_group + warpgroup / SPAN;
        const int top = group * a.group_size;
        first = top + chunk * CHUNK_ROWS + warpgroup % SPAN * WG_ROWS;
        end = group < a.groups ? min(top + a.group_size, a.rows) : 0;
    }

    // A thread of a consumer has accumulators of two rows.
    __device__ __forceinline__ int row_of_thread(int half) const {
        return first + threadIdx.x / WARP % WG_WARPS * 16 + half * 8 + threadIdx.x % WARP / 4;
    }
};

// All threads of the block have done their part of a run.
__device__ __forceinline__ void end_run() { named_sync(1, THREADS); }

// ---- The helper's first warp: copies -------------------------------------------------------------------------

// A box of a head's rows from `row` on, all WIDTH_TILES tiles of it; zeros past the tensor's last row.
__device__ __forceinline__ void load_rows(
    const TensorMap& map, const Work& work, unsigned target, int tile_bytes, int row, unsigned barrier) {
#pragma unroll
    for (int tile = 0; tile < WIDTH_TILES; ++tile)
        tensor_load_4d(target + tile * tile_bytes, &map, barrier, tile * TILE_WIDTH, row, work.h, work.b);
}

// The whole warp waits, so that it stays together; one lane copies.
__device__ __forceinline__ void load_all(const Arguments& a, const Shared& shared) {
    const Work work(a);
    const bool copies = threadIdx.x == 0;
    int number = 0;
#pragma unroll 1
    for (int run = 0; work.goes_on(run, shared); ++run) {
        if (copies) {
            barrier_arrive_expect(shared.queries_full(), QUERY_BYTES);
            for (int warpgroup = 0; warpgroup < CONSUMERS; ++warpgroup)
                load_rows(
                    a.q, work, shared.queries + warpgroup * WG_ROWS * ROW_BYTES, QUERY_TILE_BYTES,
                    RowRange(a, work, work.chunk_of(run), warpgroup).first, shared.queries_full());
        }
#pragma unroll 1
        for (int tile = 0; tile < work.tiles; ++tile, ++number) {
            const int row = work.first_column(tile), place = place_of<STAGES>(number);
            const int released = parity_of<STAGES>(number) ^ 1;
            barrier_wait(shared.keys_empty(place), released);
            if (copies) {
                barrier_arrive_expect(shared.keys_full(place), STAGE_BYTES);
                load_rows(a.k, work, shared.keys + place * STAGE_BYTES, KEY_TILE_BYTES, row, shared.keys_full(place));
            }
            barrier_wait(shared.values_empty(place), released);
            if (copies) {
                barrier_arrive_expect(shared.values_full(place), STAGE_BYTES);
                load_rows(
                    a.v, work, shared.values + place * STAGE_BYTES, KEY_TILE_BYTES, row, shared.values_full(place));
            }
            __syncwarp();
        }
        end_run();
    }
}

// ---- The helper's last two warps: column sums of the warps -> mass ------------------------------------------

// Adds the sums of all warps of each group and writes them; `add` to what the group's earlier rows have left there,
// written by the same thread. `number` is that of the first tile.
__device__ __forceinline__ void reduce_tiles(
    const Arguments& a, const Work& work, const Shared& shared, int thread, float unit, bool add, int number) {
    const int groups = min(BLOCK_GROUPS, a.groups - work.first_group);
#pragma unroll 1
    for (int tile = 0; tile < work.tiles; ++tile, ++number) {
        const int place = place_of<PARTIAL_SLOTS>(number), column = work.first_column(tile) + thread;
        float* mass = a.mass + (static_cast<index_t>(work.pair) * a.groups + work.first_group) * a.columns + column;
        barrier_wait(shared.sums_full(place), parity_of<PARTIAL_SLOTS>(number));
#pragma unroll 1
        for (int group = 0; group < groups; ++group, mass += a.columns) {
#pragma unroll
            for (int i = 0; i < BLOCK_N; i += REDUCERS) {
                const unsigned sums = shared.partials + place * PARTIAL_BYTES +
                                      (group * SPAN * WG_WARPS * BLOCK_N + thread + i) * 4;
                float sum = 0.0f;
#pragma unroll
                for (int warp = 0; warp < SPAN * WG_WARPS; ++warp)
                    sum += load_shared_float(sums + warp * BLOCK_N * 4);
                sum *= unit;
                if (column + i < a.columns) store_streaming(mass + i, add ? sum + mass[i] : sum);
            }
        }
        barrier_arrive(shared.sums_empty(place));
    }
}

// The columns past the last tile.
__device__ __forceinline__ void clear_mass(const Arguments& a, const Work& work, int thread) {
#pragma unroll 1
    for (int group = work.first_group; group < min(work.first_group + BLOCK_GROUPS, a.groups); ++group) {
        float* row = a.mass + (static_cast<index_t>(work.pair) * a.groups + group) * a.columns;
#pragma unroll 1
        for (int column = work.tiles * BLOCK_N + thread; column < a.columns; column += REDUCERS)
            row[column] = 0.0f;
    }
}

// ---- Consumers -----------------------------------------------------------------------------------------------

// What a thread knows of its two rows. Exponents are base 2; `neg_anchor` is minus what weights are taken against.
struct RowState {
    float neg_anchor[2], neg_prev[2], sum[2];
};

template <int COUNT>
__device__ __forceinline__ void start_logits(float (&s)[COUNT], unsigned queries, unsigned keys) {
    products_fence();
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
        const int tile = step / 4;
        multiply<0, 0>(
            s, k_major(queries + tile * QUERY_TILE_BYTES) + step % 4 * K_STEP,
            k_major(keys + tile * KEY_TILE_BYTES) + step % 4 * K_STEP, step > 0);
    }
    products_commit();
}

__device__ __forceinline__ void start_output(
    float (&o)[OUTPUTS], const unsigned (&p)[PART_WORDS], unsigned values) {
    products_fence();
#pragma unroll
    for (int step = 0; step < PART / 16; ++step)
        multiply<1>(
            o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
            mn_major(values, KEY_TILE_BYTES) + step * MN_STEP, 1);
    products_commit();
}

// Columns that are not there weigh nothing.
template <int COUNT>
__device__ __forceinline__ void mask(float (&s)[COUNT], int existing) {
    const int first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (i / 4 * 8 + i % 2 + first >= existing) s[i] = -INFINITE;
}

// Largest logit of each of the thread's two rows, over the four lanes that share them.
template <int COUNT>
__device__ __forceinline__ void row_maxima(const float (&s)[COUNT], float (&largest)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        largest[row] = s[2 * row];
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            largest[row] = fmaxf(largest[row], fmaxf(s[i + 2 * row], s[i + 2 * row + 1]));
        largest[row] = fmaxf(largest[row], __shfl_xor_sync(~0u, largest[row], 1));
        largest[row] = fmaxf(largest[row], __shfl_xor_sync(~0u, largest[row], 2));
    }
}

// Logits of a part -> weights against the anchors, in place; their sums are added to the rows'.
template <int COUNT>
__device__ __forceinline__ void take_weights(float (&s)[COUNT], int part, RowState& rows, float scale_log2) {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < PART_SCORES; ++i) {
        const int row = i / 2 % 2;
        float& weight = s[part * PART_SCORES + i];
        weight = exp2_fast(fmaf(weight, scale_log2, rows.neg_anchor[row]));
        sum[row] += weight;
    }
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
}

// Anchors become the running maxima; what was weighed against the old ones is rescaled.
__device__ __forceinline__ void move_anchors(
    const float (&s)[PART_SCORES], float (&o)[OUTPUTS], RowState& rows, float scale_log2) {
    float largest[2], rescale[2];
    row_maxima(s, largest);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float moved = fminf(rows.neg_anchor[row], -largest[row] * scale_log2);
        rescale[row] = exp2_fast(moved - rows.neg_anchor[row]);
        rows.neg_anchor[row] = moved;
        rows.sum[row] *= rescale[row];
    }
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) o[i] *= rescale[i / 2 % 2];
}

template <int COUNT>
__device__ __forceinline__ void pack_weights(const float (&s)[COUNT], int part, unsigned (&p)[PART_WORDS]) {
#pragma unroll
    for (int i = 0; i < PART_WORDS; ++i)
        p[i] = pack(s[part * PART_SCORES + 2 * i], s[part * PART_SCORES + 2 * i + 1]);
}

// Each column's two rows of this thread, as weights against lse_prev.
template <bool ANCHORED, int COUNT>
__device__ __forceinline__ void add_rows(
    const float (&s)[COUNT], int part, const RowState& rows, float (&sums)[SUMS]) {
    float share[2];
    if constexpr (!ANCHORED) {
#pragma unroll
        for (int row = 0; row < 2; ++row)
            share[row] = exp2_fast(fminf(rows.neg_prev[row] - rows.neg_anchor[row], LARGEST_SHARE));
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        const int top = part * PART_SCORES + i / 2 * 4 + i % 2, bottom = top + 2;
        if constexpr (ANCHORED)
            sums[i] = s[top] + s[bottom];
        else
            sums[i] = fmaf(s[bottom], share[1], s[top] * share[0]);
    }
}

// One exchange: of 2 * HALF sums, a lane keeps those of one half of the columns and adds what the lane that differs
// in BIT has of them.
template <int HALF, int BIT>
__device__ __forceinline__ void halve_sums(float (&sums)[SUMS], int lane) {
    const bool upper = lane & BIT;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float kept = upper ? sums[i + HALF] : sums[i];
        const float sent = upper ? sums[i] : sums[i + HALF];
        sums[i] = kept + __shfl_xor_sync(~0u, sent, BIT);
    }
}

__device__ __forceinline__ void arrive_once(unsigned barrier) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

// Sums of a part, over the warp's 16 rows, to where the helper takes them: two columns a lane.
__device__ __forceinline__ void hand_over_sums(
    float (&sums)[SUMS], int part, const Shared& shared, int number) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP - WG_WARPS;
    const int place = place_of<PARTIAL_SLOTS>(number);
    // Before the shuffles: the compiler does not move them past the loop of a wait, in between products.
    if (part == 0) barrier_wait(shared.sums_empty(place), parity_of<PARTIAL_SLOTS>(number) ^ 1);
    halve_sums<SUMS / 2, 16>(sums, lane);
    halve_sums<SUMS / 4, 8>(sums, lane);
    halve_sums<SUMS / 8, 4>(sums, lane);
    const unsigned target = shared.partials + place * PARTIAL_BYTES + (warp * BLOCK_N + part * PART) * 4;
    if constexpr (PART == 64)
        store_shared_floats(target + lane * 8, sums[0], sums[1]);
    else
        store_shared_float(target + (lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2) * 4, sums[0]);
    if (part == PARTS - 1) {
        if (EVERY_LANE)
            barrier_arrive(shared.sums_full(place));
        else
            arrive_once(shared.sums_full(place));
    }
}

// Zeros in the value rows past the last key, which may be NaN: they weigh 0. Every warpgroup clears the tile before
// it reads it; that another one clears it too, or reads it already, changes nothing.
__device__ __forceinline__ void clear_values(unsigned values, int existing) {
    constexpr int CHUNKS = ROW_BYTES / 16;
    for (int i = existing * CHUNKS + static_cast<int>(threadIdx.x % WARPGROUP); i < BLOCK_N * CHUNKS; i += WARPGROUP)
#pragma unroll
        for (int tile = 0; tile < WIDTH_TILES; ++tile)
            clear_shared_16(values + tile * KEY_TILE_BYTES + i * 16);
    fence_async_proxy();
    named_sync(2 + threadIdx.x / WARPGROUP, WARPGROUP);
}

// A consumer warpgroup's rows against all columns.
struct Consumer {
    const Shared& shared;
    const unsigned queries;
    const float scale_log2;
    RowState& rows;
    float (&o)[OUTPUTS];

    // Logits of the tile's columns from `first` on, as many as `s` has room for.
    template <int COUNT>
    __device__ __forceinline__ void multiply_keys(float (&s)[COUNT], int number, int first = 0) {
        const int place = place_of<STAGES>(number);
        if (first == 0) barrier_wait(shared.keys_full(place), parity_of<STAGES>(number));
        start_logits(s, queries, shared.keys + place * STAGE_BYTES + first * ROW_BYTES);
    }

    __device__ __forceinline__ void release_keys(int number) {
        arrive_once(shared.keys_empty(place_of<STAGES>(number)));
    }

    __device__ __forceinline__ void await_values(int number) {
        barrier_wait(shared.values_full(place_of<STAGES>(number)), parity_of<STAGES>(number));
    }

    __device__ __forceinline__ void multiply_values(const unsigned (&p)[PART_WORDS], int part, int number) {
        start_output(o, p, shared.values + place_of<STAGES>(number) * STAGE_BYTES + part * PART * ROW_BYTES);
    }

    __device__ __forceinline__ void release_values(int number) {
        arrive_once(shared.values_empty(place_of<STAGES>(number)));
    }

    __device__ __forceinline__ void clear_values_past(int existing, int number) {
        await_values(number);
        clear_values(shared.values + place_of<STAGES>(number) * STAGE_BYTES, existing);
    }

    __device__ __forceinline__ void hand_over(float (&sums)[SUMS], int part, int number) {
        if constexpr (MASS) hand_over_sums(sums, part, shared, number);
    }

    // Against anchors: what only the first tile needs. `existing` columns may be fewer; without mass, it sets the
    // anchors.
    __device__ __forceinline__ void begin(float (&s)[SCORES], int existing, int number) {
        if (existing < BLOCK_N) {
            mask(s, existing);
            clear_values_past(existing, number);
        }
        if constexpr (!MASS) {
            float largest[2];
            row_maxima(s, largest);
#pragma unroll
            for (int row = 0; row < 2; ++row) rows.neg_anchor[row] = LIFT - largest[row] * scale_log2;
        }
    }

    __device__ __forceinline__ void keep_weights(
        const float (&s)[SCORES], int part, unsigned (&p)[PART_WORDS], float (&sums)[SUMS]) {
        pack_weights(s, part, p);
        if constexpr (MASS) add_rows<true>(s, part, rows, sums);
    }

    // One tile from keys to output: other warpgroups keep the tensor cores busy while this one takes exponentials.
    template <bool FIRST>
    __device__ __forceinline__ void anchored_tile(int number, int existing) {
        float s[SCORES];
        unsigned p[PARTS][PART_WORDS];
        multiply_keys(s, number);
        products_wait<0>();
        pin(s);
        release_keys(number);
        if constexpr (FIRST) begin(s, existing, number);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float sums[SUMS];
            take_weights(s, part, rows, scale_log2);
            keep_weights(s, part, p[part], sums);
            if (part == 0) await_values(number);
            multiply_values(p[part], part, number);
            hand_over(sums, part, number);
        }
        products_wait<0>();
        pin_outputs(p);
        release_values(number);
    }

    __device__ __forceinline__ void in_turn(int number, int end, int existing) {
        anchored_tile<true>(number, existing);
#pragma unroll 1
        while (++number < end) anchored_tile<false>(number, BLOCK_N);
    }

    // The next tile's logits are under way together with this tile's output.
    __device__ __forceinline__ void overlapped(int number, int end, int existing) {
        unsigned p[PARTS][PART_WORDS];
        float sums[PARTS][SUMS];
        {
            float s[SCORES];
            multiply_keys(s, number);
            products_wait<0>();
            pin(s);
            release_keys(number);
            begin(s, existing, number);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                take_weights(s, part, rows, scale_log2);
                keep_weights(s, part, p[part], sums[part]);
            }
        }
        await_values(number);
#pragma unroll 1
        for (; number + 1 < end; ++number) {
            float s[SCORES];
            multiply_keys(s, number + 1);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) multiply_values(p[part], part, number);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) hand_over(sums[part], part, number);
            products_wait<PARTS>();
            pin(s);
            release_keys(number + 1);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) take_weights(s, part, rows, scale_log2);
            // Where the loop of this wait stands, the compiler does not move the exponentials behind the next one.
            await_values(number + 1);
            products_wait<0>();
            pin_outputs(p);
            release_values(number);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) keep_weights(s, part, p[part], sums[part]);
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            multiply_values(p[part], part, number);
            hand_over(sums[part], part, number);
        }
        products_wait<0>();
        pin_outputs(p);
        release_values(number);
    }

    // Against running maxima. Rarely used, so simple: part after part, nothing overlaps.
    __device__ __forceinline__ void rescaling(int number, int end, int existing) {
        if (existing < BLOCK_N) clear_values_past(existing, number);
#pragma unroll 1
        for (; number < end; ++number, existing = BLOCK_N) {
#pragma unroll 1
            for (int part = 0; part < PARTS; ++part) {
                float s[PART_SCORES], sums[SUMS];
                unsigned p[1][PART_WORDS];
                multiply_keys(s, number, part * PART);
                products_wait<0>();
                pin(s);
                mask(s, existing - part * PART);
                move_anchors(s, o, rows, scale_log2);
                take_weights(s, 0, rows, scale_log2);
                pack_weights(s, 0, p[0]);
                if constexpr (MASS) add_rows<false>(s, 0, rows, sums);
                if (part == 0) await_values(number);
                multiply_values(p[0], part, number);
                hand_over(sums, part, number);
                products_wait<0>();
                pin_outputs(p);
            }
            release_keys(number);
            release_values(number);
        }
    }

    // After products: nobody reads outputs, or writes weights, before.
    template <int COUNT>
    __device__ __forceinline__ void pin_outputs(unsigned (&p)[COUNT][PART_WORDS]) {
        pin(o);
#pragma unroll
        for (int part = 0; part < COUNT; ++part) pin(p[part]);
    }

    // Tiles `number` to `end`, the first of them with `existing` columns. A row's sum is of the thread's columns
    // until its four lanes add theirs.
    template <bool ANCHORED>
    __device__ __forceinline__ void attend(int number, int end, int existing) {
        if (number < end) {
            if constexpr (!ANCHORED)
                rescaling(number, end, existing);
            else if constexpr (OVERLAP)
                overlapped(number, end, existing);
            else
                in_turn(number, end, existing);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            rows.sum[row] += __shfl_xor_sync(~0u, rows.sum[row], 1);
            rows.sum[row] += __shfl_xor_sync(~0u, rows.sum[row], 2);
        }
    }
};

// Word i of lane l of four becomes word l of lane i.
__device__ __forceinline__ void transpose_four(unsigned (&words)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const unsigned received = __shfl_xor_sync(~0u, upper ? words[i] : words[i | bit], bit);
            words[i] = upper ? received : words[i];
            words[i | bit] = upper ? words[i | bit] : received;
        }
    }
}

// Output and normalisers of the warpgroup's rows, 16 bytes a lane.
__device__ __forceinline__ void write_rows(
    const Arguments& a, const Work& work, const RowRange& range, const RowState& rows, const float (&o)[OUTPUTS]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = range.row_of_thread(half);
        const bool exists = row < range.end;
        const float sum = rows.sum[half], inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        if (exists && lane % 4 == 0)
            a.lse[static_cast<index_t>(work.pair) * a.rows + row] =
                sum > 0.0f ? (log2f(sum) - rows.neg_anchor[half]) * LN2 : sum == 0.0f ? -INFINITE : sum;
        Element* out = a.out + work.b * a.out_b + work.h * a.out_h + row * a.out_n;
#pragma unroll
        for (int i = 0; i < WIDTH / 32; ++i) {
            unsigned words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int first = (4 * i + j) * 4 + 2 * half;
                words[j] = pack(o[first] * inverse, o[first + 1] * inverse);
            }
            transpose_four(words, lane);
            if (exists)
                *reinterpret_cast<uint4*>(out + (4 * i + lane % 4) * 8) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// What is known of the thread's rows before the first tile. Rows that are not there weigh exp(-inf) = 0.
template <bool ANCHORED>
__device__ __forceinline__ RowState initial_state(const Arguments& a, const Work& work, const RowRange& range) {
    RowState rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = range.row_of_thread(half);
        rows.sum[half] = 0.0f;
        rows.neg_anchor[half] = INFINITE;
        if constexpr (MASS) {
            const float* lse_prev = a.lse_prev + static_cast<index_t>(work.pair) * a.rows;
            rows.neg_prev[half] = row < range.end ? -lse_prev[row] * LOG2E : -INFINITE;
            if (ANCHORED) rows.neg_anchor[half] = rows.neg_prev[half] + LIFT;
        }
    }
    return rows;
}

// One warpgroup's part of a run.
template <bool ANCHORED>
__device__ __forceinline__ void consume(const Arguments& a, const Shared& shared, int run) {
    const int warpgroup = threadIdx.x / WARPGROUP - 1;
    RowState rows;
    float o[OUTPUTS];
    {
        const Work work(a);
        rows = initial_state<ANCHORED>(a, work, RowRange(a, work, work.chunk_of(run), warpgroup));
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) o[i] = 0.0f;
        barrier_wait(shared.queries_full(), parity_of<1>(run));
        Consumer consumer{shared, shared.queries + warpgroup * WG_ROWS * ROW_BYTES, a.scale_log2, rows, o};
        consumer.attend<ANCHORED>(run * work.tiles, (run + 1) * work.tiles, work.keys - work.first_column(0));
    }
    const Work work(a);
    const RowRange range(a, work, work.chunk_of(run), warpgroup);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool in_range = rows.sum[half] >= SMALLEST_SUM && rows.sum[half] <= LARGEST_SUM;
        if (ANCHORED && work.tiles && range.row_of_thread(half) < range.end && !in_range)
            store_shared_float(shared.failed(), 1.0f);
    }
    write_rows(a, work, range, rows, o);
}

__device__ __forceinline__ void consume_all(const Arguments& a, const Shared& shared) {
    const int chunks = (a.group_size + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int run = 0;
#pragma unroll 1
    for (; run < chunks; ++run) {
        consume<true>(a, shared, run);
        end_run();
    }
    if (load_shared_float(shared.failed()) == 0.0f) return;
#pragma unroll 1
    for (; run < 2 * chunks; ++run) {
        consume<false>(a, shared, run);
        end_run();
    }
}

__device__ __forceinline__ void reduce_all(const Arguments& a, const Shared& shared) {
    const Work work(a);
    const int thread = threadIdx.x - FIRST_REDUCER;
    if (MASS) clear_mass(a, work, thread);
#pragma unroll 1
    for (int run = 0; work.goes_on(run, shared); ++run) {
        if (MASS)
            reduce_tiles(
                a, work, shared, thread, run < work.chunks ? UNLIFT : 1.0f, work.chunk_of(run) > 0,
                run * work.tiles);
        end_run();
    }
}

// The warp without work is counted at the end of each run.
__device__ __forceinline__ void run_along(const Arguments& a, const Shared& shared) {
    const Work work(a);
#pragma unroll 1
    for (int run = 0; work.goes_on(run, shared); ++run) end_run();
}

__device__ __forceinline__ void init_barriers(const Shared& shared) {
    barrier_init(shared.queries_full(), 1);
    for (int stage = 0; stage < STAGES; ++stage) {
        barrier_init(shared.keys_full(stage), 1);
        barrier_init(shared.values_full(stage), 1);
        barrier_init(shared.keys_empty(stage), CONSUMER_WARPS);
        barrier_init(shared.values_empty(stage), CONSUMER_WARPS);
    }
    for (int slot = 0; slot < PARTIAL_SLOTS; ++slot) {
        barrier_init(shared.sums_full(slot), CONSUMER_WARPS * (EVERY_LANE ? WARP : 1));
        barrier_init(shared.sums_empty(slot), REDUCERS);
    }
    store_shared_float(shared.failed(), 0.0f);
    fence_barrier_init();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(ATOM_BYTES) unsigned char memory[];
    const Shared shared(shared_address(memory));
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        give_registers<HELPER_REGISTERS>();
        if (threadIdx.x < WARP)
            load_all(a, shared);
        else if (threadIdx.x >= FIRST_REDUCER)
            reduce_all(a, shared);
        else
            run_along(a, shared);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume_all(a, shared);
    }
}
