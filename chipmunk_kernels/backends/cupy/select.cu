// Exact selection of the best columns by score, one block a row, decided in shared memory.
//
// Compile-time parameters (macros): KIND of a score (0 float32, 1 float16, 2 bfloat16); VECTOR_BYTES of a load
// (every row begins at a multiple of it); THREADS of a block; BLOCKS that must fit a multiprocessor's registers;
// AHEAD: tiles that a warp has fetched into L2 while it works on one.
//
// A sample of the row gives a floor that somewhat more columns reach than are wanted. The row is read once: the
// scores that reach the floor are listed in shared memory, and a bit marks their columns; the list holds no
// column numbers, for a score's place in it follows from the marks before its own. The extras come from columns
// whose hash is large enough. A radix search finds the cut in each list. Where the sample misled, or no list is
// large enough, the same search reads the whole row in each of its at most four passes.
//
// What bounds it, on an H200 at HunyuanVideo's size: a row of 476 kB arrives at a multiprocessor in 15 us, some
// 27000 cycles of its four schedulers, and each instruction of a column takes 930 of them. By count of the
// instructions a row takes 29000: 16000 the list (7000 of it the hashes), 13000 the rest.

#include "mma.cuh"
#include "select.cuh"

constexpr float LARGEST = 3.4028235e38f;
constexpr int SLACK_SHARE = 32;  // of the wanted: how many more the estimate may take in for a pass less

// What a search goes through: the listed keys, the scores of a row, the hashes of listed columns, those of all
// columns without a mark.
struct Listed {
    const Row& row;
    int count;
    template <class See> __device__ __forceinline__ void operator()(See see) const {
        for (int i = row.thread; i < count; i += THREADS) see(row.keys[i]);
    }
};

struct InMemory {
    const Row& row;
    template <class See> __device__ __forceinline__ void operator()(See see) const {
        for (int tile = row.warp; tile < row.tiles; tile += WARPS) {
            float value[32];
            const unsigned open = row.open(tile);
            load_tile(row, tile, value);
#pragma unroll
            for (int j = 0; j < 32; ++j)
                if (open >> j & 1) see(order_key(value[j]));
        }
    }
};

struct Lots {
    const Row& row;
    int count;
    template <class See> __device__ __forceinline__ void operator()(See see) const {
        for (int i = row.thread; i < count; i += THREADS)
            if (row.lots[i] != GONE) see(mix(row.place ^ row.lots[i]));
    }
};

struct Unmarked {
    const Row& row;
    template <class See> __device__ __forceinline__ void operator()(See see) const {
        for (int at = row.thread; at < row.tiles * 32; at += THREADS)
            for (unsigned rest = ~row.words[at]; rest; rest &= rest - 1) {
                const int n = at * 32 + __popc((rest & -rest) - 1);
                if (n < row.length) see(mix(row.place ^ n), n);
            }
    }
};

// A score that about `share` of the competing columns reach, from clusters spread over the row.
__device__ __forceinline__ float estimate(const Row& row, int sample, float share) {
    const int clusters = sample / CLUSTER, stride = row.length / clusters;
    int competitors = 0;
#pragma unroll 2
    for (int c = row.thread; c < clusters; c += THREADS) {
        // Shaken, so that no period of the video's layout is met at one phase only.
        const int shaken = __umulhi(mix(c), stride - CLUSTER + 1);
        const int first = (c * stride + shaken) / CLUSTER * CLUSTER;
        const unsigned kept = row.kept_from(first);
        union {
            Pack pack[CLUSTER / PACKED];
            Element element[CLUSTER];
        } loaded;
#pragma unroll
        for (int i = 0; i < CLUSTER / PACKED; ++i)
            loaded.pack[i] = *reinterpret_cast<const Pack*>(row.line + first + i * PACKED);
#pragma unroll
        for (int e = 0; e < CLUSTER; ++e)
            row.keys[e * clusters + c] = kept >> e & 1 ? 0 : order_key(widened(loaded.element[e]));
        competitors += CLUSTER - __popc(kept);
    }
    competitors = block_sum(row, competitors);
    const int wanted = max(1, static_cast<int>(competitors * share));
    const Cut cut = search(row, Listed{row, sample}, sample, wanted, 0, ALL, wanted / SLACK_SHARE);
    const float floor = min(score_of(cut.threshold), LARGEST);
    return floor == 0.0f ? -0.0f : floor;
}

// Which of a lane's columns have a hash that reaches the bound, whose low 16 bits are 0: the hash's last step
// leaves its high 16 as they are. Columns of a load differ from its first in their lowest bits alone, so that
// one product serves them all.
__device__ __forceinline__ unsigned lucky(const Row& row, int tile, unsigned bound) {
    const unsigned fold = row.place ^ row.place >> 16 ^ tile * TILE >> 16;
    unsigned along[PACKED], bits = 0;
#pragma unroll
    for (int e = 0; e < PACKED; ++e) {
        // ((fold ^ e) - fold) * FIRST_FACTOR; as a product, the compiler would form one for each column again.
        along[e] = 0;
#pragma unroll
        for (int b = 0; 1 << b <= e; ++b)
            if (e >> b & 1) along[e] += (fold >> b & 1 ? -FIRST_FACTOR : FIRST_FACTOR) << b;
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const unsigned first = (row.column(tile, i * PACKED) ^ fold) * FIRST_FACTOR;
#pragma unroll
        for (int e = 0; e < PACKED; ++e) {
            const unsigned x = first + along[e];
            mark_reaching(bits, (x ^ x >> 15) * SECOND_FACTOR, bound, 1u << (i * PACKED + e));
        }
    }
    return bits;
}

// Which of a lane's scores are below the floor, by the signs of the differences: at most one operation of a
// column on the busiest unit. The floor is finite and, if zero, negative, so that neither zero is below it; NaN may
// be on either side.
__device__ __forceinline__ unsigned below(const float (&value)[32], float floor) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 31; j >= 0; --j) bits = __funnelshift_l(__float_as_uint(value[j] - floor), bits, 1);
    return bits;
}

// Room for what the lanes of a warp list: where this lane's scores and possible extras begin.
struct Room {
    int scores, lots, end;
    __device__ __forceinline__ Room(const Row& row, int tile, unsigned passed, unsigned drawn) {
        // Both counts in one number: a tile has at most 1024 of each.
        int total, start = 0;
        const int earlier = before(__popc(passed) | __popc(drawn) << 16, row.lane, total);
        if (row.lane < 2) start = atomicAdd(&row.state->asked[row.lane], row.lane ? total >> 16 : total & 0xffff);
        if (row.lane == 0) row.starts[tile] = start;
        scores = __shfl_sync(WHOLE_WARP, start, 0);
        end = scores + (total & 0xffff);
        scores += earlier & 0xffff;
        lots = __shfl_sync(WHOLE_WARP, start, 1) + (earlier >> 16);
    }
};

// Lists the columns of a row that may be taken: by score, from the floor on, and by hash.
__device__ __forceinline__ void list(
    const Row& row, bool by_score, bool by_hash, float floor, int room, unsigned bound, int lots_room
) {
    for (int tile = row.warp; tile < row.tiles; tile += WARPS) {
        const unsigned open = row.open(tile);
        unsigned passed = 0;
        float value[32];
        if (by_score) {
            load_tile(row, tile, value);
            if (AHEAD > 0) prefetch_tile(row, tile + AHEAD * WARPS);
            passed = floor == MINUS_INFINITY ? open : ~below(value, floor) & open;
        }
        unsigned drawn = by_hash ? lucky(row, tile, bound) & open : 0;
        const Room place(row, tile, passed, drawn);
        if (by_score && place.end <= room) {
            unsigned* to = row.keys + place.scores;
#pragma unroll
            for (int j = 0; j < 32; ++j)
                if (passed >> j & 1) *to++ = __float_as_uint(value[j]);
        }
        row.words[tile * 32 + row.lane] = passed;
        for (int slot = place.lots; drawn && slot < lots_room; ++slot, drawn &= drawn - 1)
            row.lots[slot] = row.column(tile, __popc((drawn & -drawn) - 1));
    }
}

// Where the scores are that the cut is searched among.
enum Source { NOWHERE, LISTED, MEMORY };

// The cut among the listed scores, which become keys; false where the list does not hold it.
__device__ __forceinline__ bool cut_listed(const Row& row, int room, float floor, int k, Cut& cut) {
    const int listed = row.state->asked[0];
    if (listed > room) return false;
    const unsigned low = floor == MINUS_INFINITY ? 0 : order_key(floor);
    int competitors = 0;
    unsigned high = low;
    for (int i = row.thread; i < listed; i += THREADS) {
        const unsigned key = order_key(__uint_as_float(row.keys[i]));
        row.keys[i] = key;
        competitors += key >= low;
        high = max(high, key);
    }
    competitors = block_sum(row, competitors);
    if (low != 0 && competitors < k) return false;
    high = block_max(row, high);
    cut = search(row, Listed{row, listed}, competitors, k, low, high);
    return true;
}

// Which of a lane's columns are above the threshold, and which equal it.
__device__ __forceinline__ void compare(
    const Row& row, int tile, Source source, unsigned threshold, unsigned& above, unsigned& equal
) {
    above = equal = 0;
    if (source == LISTED) {
        const unsigned word = row.words[tile * 32 + row.lane];
        int total;
        const unsigned* at = row.keys + row.starts[tile] + before(__popc(word), row.lane, total);
        for (unsigned rest = word; rest; rest &= rest - 1) {
            const unsigned key = *at++, bit = rest & -rest;
            if (key > threshold) above |= bit;
            if (key == threshold) equal |= bit;
        }
    } else if (source == MEMORY) {
        float value[32];
        load_tile(row, tile, value);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            const unsigned key = order_key(value[j]);
            above |= (key > threshold ? 1u : 0u) << j;
            equal |= (key == threshold ? 1u : 0u) << j;
        }
        const unsigned open = row.open(tile);
        above &= open;
        equal &= open;
    }
}

// The first `count` bits set in a warp's ordered words.
__device__ __forceinline__ unsigned first_bits(unsigned word, int lane, int count) {
    int total;
    unsigned kept = 0;
    for (int left = count - before(__popc(word), lane, total); left > 0 && word; --left) {
        kept |= word & -word;
        word &= word - 1;
    }
    return kept;
}

// Marks what is chosen by score and what is always kept; from here on words are in order.
__device__ __forceinline__ void mark(const Row& row, Source source, const Cut& cut) {
    unsigned above, equal;
    if (cut.divides()) {
        for (int tile = row.warp; tile < row.tiles; tile += WARPS) {
            compare(row, tile, source, cut.threshold, above, equal);
            const int ties = warp_sum(__popc(equal));
            if (row.lane == 0) row.sums[tile] = ties;
        }
        scan_sums(row);
    }
    for (int tile = row.warp; tile < row.tiles; tile += WARPS) {
        compare(row, tile, source, cut.threshold, above, equal);
        if (cut.divides()) {
            above = ordered(above | row.kept(tile), row.lane);
            above |= first_bits(ordered(equal, row.lane), row.lane, cut.take - row.sums[tile]);
        } else {
            above = ordered(above | equal | row.kept(tile), row.lane);
        }
        row.words[tile * 32 + row.lane] = above;
    }
    __syncthreads();
}

// Marks `random` more among the listed columns; false where the list holds too few.
__device__ __forceinline__ bool draw_listed(const Row& row, int room, int random, unsigned bound) {
    const int drawn = row.state->asked[1];
    if (drawn > room) return false;
    int left = 0;
    for (int i = row.thread; i < drawn; i += THREADS) {
        const unsigned n = row.lots[i];
        const bool taken = row.words[n / 32] >> n % 32 & 1;
        if (taken) row.lots[i] = GONE;
        left += !taken;
    }
    left = block_sum(row, left);
    if (left < random) return false;
    const Cut cut = search(row, Lots{row, drawn}, left, random, bound, ALL);
    for (int i = row.thread; i < drawn; i += THREADS) {
        const unsigned n = row.lots[i];
        if (n != GONE && mix(row.place ^ n) >= cut.threshold) atomicOr(&row.words[n / 32], 1u << n % 32);
    }
    __syncthreads();
    return true;
}

// The same among all columns that are left.
__device__ __forceinline__ void draw_any(const Row& row, int random) {
    const Unmarked unmarked{row};
    int left = 0;
    unmarked([&](unsigned, int) { ++left; });
    left = block_sum(row, left);
    const Cut cut = search(row, unmarked, left, random, 0, ALL);
    unmarked([&](unsigned hash, int n) {
        if (hash >= cut.threshold) row.words[n / 32] |= 1u << n % 32;
    });
    __syncthreads();
}

// The marked columns in ascending order, zeros behind them.
__device__ __forceinline__ void write(const Row& row, int* indices, int* count, int capacity) {
    for (int tile = row.warp; tile < row.tiles; tile += WARPS) {
        const int marked = warp_sum(__popc(row.words[tile * 32 + row.lane]));
        if (row.lane == 0) row.sums[tile] = marked;
    }
    const int all = min(scan_sums(row), capacity);
    // The list of scores has done its work: its memory gathers a tile's columns, to be stored side by side.
    unsigned short* gathered = reinterpret_cast<unsigned short*>(row.keys) + row.warp * TILE;
    for (int tile = row.warp; tile < row.tiles; tile += WARPS) {
        const unsigned word = row.words[tile * 32 + row.lane];
        int total;
        unsigned short* to = gathered + before(__popc(word), row.lane, total);
        for (unsigned rest = word; rest; rest &= rest - 1) *to++ = row.lane * 32 + __popc((rest & -rest) - 1);
        __syncwarp();
        const int start = row.sums[tile];
        for (int i = row.lane; i < min(total, capacity - start); i += 32)
            indices[start + i] = tile * TILE + gathered[i];
        __syncwarp();
    }
    for (int slot = all + row.thread; slot < capacity; slot += THREADS) indices[slot] = 0;
    if (row.thread == 0) *count = all;
}

// Row (b, h, g) = blockIdx.x of scores (B, H, G, N) → indices (B, H, G, capacity) and counts (B, H, G). `barred` is
// what `pack_always` makes, of a row for each group or, with a stride of 0, one for all. `room` and `lots_room`: of
// the lists, 0 for none. `sample`: columns that estimate the floor, 0 where the list holds a whole row.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) topk_columns(
    const Element* scores, const unsigned* barred, int* indices, int* counts, index_t k, index_t random,
    index_t seed, index_t heads, index_t groups, index_t length, index_t capacity, index_t stride_b,
    index_t stride_h, index_t stride_g, index_t stride_barred, index_t room, index_t sample, double share,
    index_t lots_room, index_t bound
) {
    const unsigned number = blockIdx.x;
    const unsigned g = number % unsigned(groups), h = number / unsigned(groups) % unsigned(heads);
    const unsigned b = number / unsigned(groups) / unsigned(heads);
    Row row;
    row.line = scores + b * stride_b + h * stride_h + g * stride_g;
    row.barred = barred ? barred + g * stride_barred : nullptr;
    row.length = length;
    row.tiles = (row.length + TILE - 1) / TILE;
    row.place = mix(mix(mix(unsigned(seed) ^ b) ^ h) ^ g);
    row.thread = threadIdx.x, row.lane = threadIdx.x % 32, row.warp = threadIdx.x / 32;
    row.state = reinterpret_cast<State*>(shared_memory);
    row.sums = reinterpret_cast<int*>(row.state + 1);
    row.starts = row.sums + row.tiles;
    row.words = reinterpret_cast<unsigned*>(row.starts + row.tiles);
    row.lots = row.words + row.tiles * 32;
    row.keys = row.lots + lots_room;
    const bool by_score = k > 0 && room > 0, by_hash = random > 0 && lots_room > 0;

    if (by_score)
        for (int tile = row.warp; tile < AHEAD * WARPS; tile += WARPS) prefetch_tile(row, tile);
    for (int i = row.thread; i < BINS; i += THREADS) row.state->bins[i] = 0;
    if (row.thread == 0) row.state->asked[0] = row.state->asked[1] = 0;
    __syncthreads();
    float floor = MINUS_INFINITY;
    if (by_score && sample > 0) floor = estimate(row, sample, share);
    if (by_score || by_hash) list(row, by_score, by_hash, floor, room, bound, lots_room);
    __syncthreads();

    Cut cut{ALL, 0, 0};
    Source source = k > 0 ? MEMORY : NOWHERE;
    if (by_score && cut_listed(row, room, floor, k, cut)) source = LISTED;
    if (source == MEMORY) {
        int competitors = 0;
        for (int tile = row.warp; tile < row.tiles; tile += WARPS) competitors += __popc(row.open(tile));
        competitors = block_sum(row, competitors);
        cut = search(row, InMemory{row}, competitors, k, 0, ALL);
    }
    mark(row, source, cut);
    if (random > 0 && !(by_hash && draw_listed(row, lots_room, random, bound))) draw_any(row, random);
    write(row, indices + index_t(number) * capacity, counts + number, capacity);
}

// Rows of a bool mask as the words of tiles, see select.cuh: one warp a tile, `tiles` of each row.
extern "C" __global__ void __launch_bounds__(THREADS) pack_always(
    const unsigned char* mask, unsigned* words, index_t length, index_t tiles, index_t rows, index_t stride
) {
    const index_t number = index_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (number >= tiles * rows) return;
    Row row;
    row.lane = threadIdx.x % 32;
    const int tile = number % tiles;
    const unsigned char* line = mask + number / tiles * stride;
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        const int n = row.column(tile, j);
        if (n < length && line[n]) bits |= 1u << j;
    }
    words[number * 32 + row.lane] = bits;
}
