// What select.cu is made of: keys that order as scores do, the hash of the extras, the words of a tile, the radix
// search. The macros are select.cu's.
//
// A tile is 1024 columns of a row, held by one warp, 32 columns a lane. A lane's bit i * PACKED + e stands for
// column i * 32 * PACKED + lane * PACKED + e of the tile: it belongs to load i, and the lanes of a load are
// neighbours. `ordered` exchanges a warp's words so that lane w has the tile's columns 32 w to 32 w + 31.

template <int kind> struct Stored { using type = Word; };
template <> struct Stored<0> { using type = float; };
template <int bytes> struct Unsigned;
template <> struct Unsigned<2> { using type = unsigned short; };
template <> struct Unsigned<4> { using type = unsigned int; };
template <> struct Unsigned<8> { using type = uint2; };
template <> struct Unsigned<16> { using type = uint4; };
using Element = Stored<KIND>::type;
using Pack = Unsigned<VECTOR_BYTES>::type;

constexpr int ELEMENT_BYTES = sizeof(Element);
constexpr int PACKED = VECTOR_BYTES / ELEMENT_BYTES;
constexpr int LOADS = 32 / PACKED;
constexpr int TILE = 1024;
constexpr int CLUSTER = 8;  // neighbours sampled together, a sector of 32 bytes
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 256;
constexpr unsigned ALL = 0xffffffffu;
constexpr unsigned GONE = 0x80000000u;

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(Word value) { return widen(value); }

// Orders as the float does: NaN lowest, then −∞; −0 equals +0.
__device__ __forceinline__ unsigned order_key(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return value != value ? 0 : bits ^ (bits >> 31 ? ALL : 0x80000000u);
}

// The float whose `order_key` this is, −∞ for keys that are below its.
__device__ __forceinline__ float score_of(unsigned key) {
    if (key <= 0x007fffffu) return MINUS_INFINITY;
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : ALL));
}

constexpr unsigned FIRST_FACTOR = 0x7feb352du, SECOND_FACTOR = 0x846ca68bu;

// The finaliser of the extras' hash. One to one: the hashes of a row's columns differ.
__device__ __forceinline__ unsigned mix(unsigned x) {
    x ^= x >> 16;
    x *= FIRST_FACTOR;
    x ^= x >> 15;
    x *= SECOND_FACTOR;
    return x ^ x >> 16;
}

struct State {
    unsigned bins[BINS];
    int parts[32];
    unsigned digit, highest;
    int left, inside;  // of a search
    int asked[2];  // columns that asked for room in the list of scores, and in that of possible extras
    int total;
};
static_assert(sizeof(State) == (BINS + 32 + 7) * 4, "select.py counts these bytes");

// A row, the block's memory for it, and which of its threads this is.
struct Row {
    const Element* line;
    const unsigned* barred;  // the always-kept columns as a tile's words, or null
    int length, tiles;
    unsigned place;  // its hash; `mix(place ^ n)` is column n's
    State* state;
    int *sums, *starts;              // one of each tile
    unsigned *words, *lots, *keys;  // the marks; the columns that may be extras; the scores that may be chosen
    int thread, lane, warp;

    __device__ __forceinline__ unsigned existing(int tile) const {
        if ((tile + 1) * TILE <= length) return ALL;
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < 32; ++j) bits |= (column(tile, j) < length ? 1u : 0u) << j;
        return bits;
    }
    __device__ __forceinline__ unsigned kept(int tile) const {
        return barred ? barred[tile * 32 + lane] : 0;
    }
    // Columns that compete.
    __device__ __forceinline__ unsigned open(int tile) const { return existing(tile) & ~kept(tile); }
    // Of this lane's bit j.
    __device__ __forceinline__ int column(int tile, int j) const {
        return tile * TILE + lane * PACKED + j / PACKED * (32 * PACKED) + j % PACKED;
    }
    // The always-kept ones among a cluster's columns, which share a load.
    __device__ __forceinline__ unsigned kept_from(int first) const {
        if (!barred) return 0;
        const unsigned* word = barred + first / TILE * 32 + first % (32 * PACKED) / PACKED;
        const int shift = first % TILE / (32 * PACKED) * PACKED;
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < CLUSTER / PACKED; ++i)
            bits |= (word[i] >> shift & ((1u << PACKED) - 1)) << (i * PACKED);
        return bits;
    }
};

// The scores of a lane's columns; of columns past the row's end anything but a read.
__device__ __forceinline__ void load_tile(const Row& row, int tile, float (&value)[32]) {
    if ((tile + 1) * TILE <= row.length) {
        union {
            Pack pack[LOADS];
            Element element[32];
        } loaded;
        const Element* first = row.line + row.column(tile, 0);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) loaded.pack[i] = __ldcs(reinterpret_cast<const Pack*>(first + i * 32 * PACKED));
#pragma unroll
        for (int j = 0; j < 32; ++j) value[j] = widened(loaded.element[j]);
    } else {
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            const int n = row.column(tile, j);
            value[j] = n < row.length ? widened(row.line[n]) : 0.0f;
        }
    }
}

// Has L2 fetch a tile that the warp loads later: that many bytes under way cost no registers.
__device__ __forceinline__ void prefetch_tile(const Row& row, int tile) {
#ifdef __CUDACC__
    constexpr int LINE = 128 / ELEMENT_BYTES;
    if ((tile + 1) * TILE <= row.length && row.lane < TILE / LINE)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(row.line + tile * TILE + row.lane * LINE));
#endif
}

// `bits |= bit` if x reaches the bound: a comparison and an addition under its predicate.
__device__ __forceinline__ void mark_reaching(unsigned& bits, unsigned x, unsigned bound, unsigned bit) {
#ifdef __CUDACC__
    asm("{ .reg .pred p; setp.ge.u32 p, %1, %2; @p or.b32 %0, %0, %3; }" : "+r"(bits) : "r"(x), "r"(bound), "r"(bit));
#else
    if (x >= bound) bits |= bit;
#endif
}

// A warp's words in the order of the columns: blocks of PACKED bits transposed among LOADS lanes, then the lanes
// sorted. `low` marks the bits of even blocks.
__device__ __forceinline__ unsigned ordered(unsigned word, int lane) {
#pragma unroll
    for (int bits = PACKED; bits < 32; bits *= 2) {
        const int distance = bits / PACKED;
        const unsigned low = ALL / ((1u << bits) + 1);
        const unsigned other = __shfl_xor_sync(WHOLE_WARP, word, distance);
        word = lane & distance ? (word & ~low) | (other >> bits & low) : (word & low) | (other & low) << bits;
    }
    return __shfl_sync(WHOLE_WARP, word, lane % PACKED * LOADS + lane / PACKED);
}

// What the lanes before this one have, and all of them.
__device__ __forceinline__ int before(int mine, int lane, int& total) {
    int sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(WHOLE_WARP, sum, step);
        if (lane >= step) sum += other;
    }
    total = __shfl_sync(WHOLE_WARP, sum, 31);
    return sum - mine;
}

__device__ __forceinline__ int warp_sum(int mine) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(WHOLE_WARP, mine, step);
    return mine;
}

__device__ __forceinline__ int block_sum(const Row& row, int mine) {
    mine = warp_sum(mine);
    if (row.lane == 0) row.state->parts[row.warp] = mine;
    __syncthreads();
    int total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += row.state->parts[warp];
    __syncthreads();
    return total;
}

__device__ __forceinline__ unsigned block_max(const Row& row, unsigned mine) {
    if (row.thread == 0) row.state->highest = 0;
    __syncthreads();
#pragma unroll
    for (int step = 16; step > 0; step /= 2) mine = max(mine, __shfl_xor_sync(WHOLE_WARP, mine, step));
    if (row.lane == 0) atomicMax(&row.state->highest, mine);
    __syncthreads();
    return row.state->highest;
}

// Turns the tiles' sums into what lies before each tile; their total.
__device__ __forceinline__ int scan_sums(const Row& row) {
    __syncthreads();
    if (row.warp == 0) {
        const int each = (row.tiles + 31) / 32;
        const int first = min(row.lane * each, row.tiles), end = min(first + each, row.tiles);
        int sum = 0, total;
        for (int tile = first; tile < end; ++tile) sum += row.sums[tile];
        int position = before(sum, row.lane, total);
        for (int tile = first; tile < end; ++tile) {
            const int here = row.sums[tile];
            row.sums[tile] = position;
            position += here;
        }
        if (row.lane == 0) row.state->total = total;
    }
    __syncthreads();
    return row.state->total;
}

// Taken are the keys above the threshold, and `take` of the `ties` that equal it.
struct Cut {
    unsigned threshold;
    int take, ties;
    // All that compete, or none: no key is that high.
    __device__ __forceinline__ bool divides() const { return take < ties; }
};

// Where the `wanted` largest of the keys end, eight bits a pass. `visit` shows what it is given each key of this
// thread; those outside low to high are passed over, the others number `competitors`. The search may stop
// where `slack` more than wanted are above the cut, which then is no key but a bound of keys.
template <class Visit>
__device__ __forceinline__ Cut search(
    const Row& row, Visit visit, int competitors, int wanted, unsigned low, unsigned high, int slack = 0
) {
    if (wanted <= 0) return {ALL, 0, 0};
    State& state = *row.state;
    unsigned span = high - low;
    int left = min(wanted, competitors), inside = competitors;
    while (span != 0 && inside - left > slack) {
        const int shift = max(0, 24 - __clz(span));
        visit([&](unsigned key, int = 0) {
            if (key - low <= span) atomicAdd(&state.bins[(key - low) >> shift], 1u);
        });
        __syncthreads();
        if (row.warp == 0) {
            constexpr int EACH = BINS / 32;
            const int top = BINS - 1 - EACH * row.lane;
            int own[EACH], sum = 0, total;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                own[i] = state.bins[top - i];
                state.bins[top - i] = 0;
                sum += own[i];
            }
            int above = before(sum, row.lane, total);
            if (above < left && left <= above + sum) {
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    if (above < left && left <= above + own[i]) {
                        state.digit = top - i;
                        state.left = left - above;
                        state.inside = own[i];
                    }
                    above += own[i];
                }
            }
        }
        __syncthreads();
        low += state.digit << shift;
        left = state.left, inside = state.inside;
        span = (1u << shift) - 1;
    }
    // With all that are left taken, the bound need not be a key: those above it are `ties` too.
    return {low, left, inside};
}
