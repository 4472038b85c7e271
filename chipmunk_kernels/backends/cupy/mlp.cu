// The sparse MLP delta with mma.sync and cp.async: any GPU since Ampere. Two kernels:
//
// sparse_mlp_up    packed[slot, token] = activation(w1[column] · x[token] + b1[column]), rounded, less the cached
//                  activation, which the new one replaces;
// sparse_mlp_down  output[token] += Σ over slots of packed[slot, token] · w2[column].
//
// Both gather their weights' rows by cp.async while the tensor cores work on earlier stages. Programs run in bands
// of token groups that share a weight block before the next one begins: column lists ascend, so the same slots of
// neighbouring groups lie near each other in the weights and meet in the L2 cache.
//
// Compile-time parameters (macros): KIND (see mma.cuh); for each kernel its tile, *_ROWS × *_COLUMNS of its product
// with *_DEPTH a stage, *_STAGES and *_WARPS (rows are neurons and columns tokens in up, tokens and output features
// in down); BAND; CACHE_BYTES and OUTPUT_BYTES that the caches' addresses are multiples of, 16 at most;
// OUTPUT_WORD_BYTES, 4 for a float32 output.

#include "mma.cuh"
#include "tile.cuh"

__device__ constexpr int warps_down(int rows, int columns, int warps) {
    int down = 1;
    while (down < warps && rows / down > columns * down / warps) down *= 2;
    return down;
}

// A product's tile and how the warps share it: in parts as near to squares as can be.
template <int ROWS_, int COLUMNS_, int DEPTH_, int STAGES_, int WARPS_>
struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_, STAGES = STAGES_;
    static constexpr int THREADS = WARPS_ * 32;
    static constexpr int WARPS_DOWN = warps_down(ROWS, COLUMNS, WARPS_), WARPS_ACROSS = WARPS_ / WARPS_DOWN;
    static constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 16 == 0, "a warp owns whole pairs of matrices");
    static constexpr int LEFT_BYTES = ROWS * DEPTH * 2, RIGHT_BYTES = COLUMNS * DEPTH * 2;
    static constexpr int STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
    // The epilogue's scratch, 16 rows of a warp at a time: padded, so that rows 8 banks apart hold neighbours.
    static constexpr int SCRATCH_FLOATS = WARP_COLUMNS + 8;
    using Sum = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];
};

using Up = Tile<UP_ROWS, UP_COLUMNS, UP_DEPTH, UP_STAGES, UP_WARPS>;
using Down = Tile<DOWN_ROWS, DOWN_COLUMNS, DOWN_DEPTH, DOWN_STAGES, DOWN_WARPS>;

// Where a warp and its lanes begin to read the two factors of a stage.
struct Lanes {
    unsigned left, right;
};

// Factors whose rows (V vectors) run along the depth: left is ROWS × DEPTH, right COLUMNS × DEPTH.
template <class T> struct AlongDepth {
    static constexpr int V = T::DEPTH / VECTOR_WORDS;

    static __device__ __forceinline__ Lanes lanes(int row, int column, int lane) {
        return {
            unsigned(swizzled<V>(row + lane % 16, lane / 16)),
            unsigned(T::LEFT_BYTES + swizzled<V>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2))
        };
    }
    static __device__ __forceinline__ void left(unsigned (&a)[4], unsigned address, int step, int m) {
        load_matrices(a, (address ^ (step * 32)) + m * 16 * V * VECTOR_BYTES);
    }
    static __device__ __forceinline__ void right(unsigned (&b)[4], unsigned address, int step, int n) {
        load_matrices(b, (address ^ (step * 32)) + n * 16 * V * VECTOR_BYTES);
    }
};

// Factors whose rows lie across the depth: left is DEPTH × ROWS, right DEPTH × COLUMNS.
template <class T> struct AcrossDepth {
    static constexpr int LEFT_V = T::ROWS / VECTOR_WORDS, RIGHT_V = T::COLUMNS / VECTOR_WORDS;

    static __device__ __forceinline__ Lanes lanes(int row, int column, int lane) {
        return {
            unsigned(swizzled<LEFT_V>(lane / 16 * 8 + lane % 8, row / VECTOR_WORDS + lane / 8 % 2)),
            unsigned(T::LEFT_BYTES + swizzled<RIGHT_V>(lane % 16, column / VECTOR_WORDS + lane / 16))
        };
    }
    static __device__ __forceinline__ void left(unsigned (&a)[4], unsigned address, int step, int m) {
        load_transposed(a, (address ^ (m * 32)) + step * 16 * LEFT_V * VECTOR_BYTES);
    }
    static __device__ __forceinline__ void right(unsigned (&b)[4], unsigned address, int step, int n) {
        load_transposed(b, (address ^ (n * 32)) + step * 16 * RIGHT_V * VECTOR_BYTES);
    }
};

// sum += left · right over `steps` stages that `fetch(step, shared address)` starts to copy.
template <class T, class Layout, class Fetch>
__device__ __forceinline__ void multiply(typename T::Sum& sum, int steps, Lanes lanes, Fetch&& fetch) {
    const unsigned shared = shared_address(shared_memory);
#pragma unroll
    for (int stage = 0; stage < T::STAGES - 1; ++stage) {
        if (stage < steps) fetch(stage, shared + stage * T::STAGE_BYTES);
        commit_copies();
    }
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<T::STAGES - 2>();
        __syncthreads();
        const int free = stage == 0 ? T::STAGES - 1 : stage - 1;
        if (step + T::STAGES - 1 < steps) fetch(step + T::STAGES - 1, shared + free * T::STAGE_BYTES);
        commit_copies();
        const unsigned here = shared + stage * T::STAGE_BYTES;
#pragma unroll
        for (int part = 0; part < T::DEPTH / 16; ++part) {
            unsigned a[T::WARP_ROWS / 16][4], b[T::WARP_COLUMNS / 16][4];
#pragma unroll
            for (int m = 0; m < T::WARP_ROWS / 16; ++m) Layout::left(a[m], here + lanes.left, part, m);
#pragma unroll
            for (int n = 0; n < T::WARP_COLUMNS / 16; ++n) Layout::right(b[n], here + lanes.right, part, n);
#pragma unroll
            for (int m = 0; m < T::WARP_ROWS / 16; ++m)
#pragma unroll
                for (int n = 0; n < T::WARP_COLUMNS / 16; ++n) {
                    multiply_add(sum[m][2 * n], a[m], b[n][0], b[n][1]);
                    multiply_add(sum[m][2 * n + 1], a[m], b[n][2], b[n][3]);
                }
        }
        stage = stage == T::STAGES - 1 ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    __syncthreads();
}

// Hand `take(row, column, eight sums)` every vector of this warp's part, neighbouring lanes neighbouring vectors.
template <class T, class Take>
__device__ __forceinline__ void for_each_vector(const typename T::Sum& sum, Take&& take) {
    constexpr int V = T::WARP_COLUMNS / VECTOR_WORDS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* scratch = reinterpret_cast<float*>(shared_memory) + warp * 16 * T::SCRATCH_FLOATS;
#pragma unroll
    for (int m = 0; m < T::WARP_ROWS / 16; ++m) {
#pragma unroll
        for (int n = 0; n < T::WARP_COLUMNS / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float2 pair;
                pair.x = sum[m][n][2 * half], pair.y = sum[m][n][2 * half + 1];
                float* to = scratch + (lane / 4 + half * 8) * T::SCRATCH_FLOATS + n * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = pair;
            }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 16 * V; i += 32) {
            float eight[VECTOR_WORDS];
            const float* from = scratch + i / V * T::SCRATCH_FLOATS + i % V * VECTOR_WORDS;
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const float4 four = *reinterpret_cast<const float4*>(from + part * 4);
                eight[part * 4] = four.x, eight[part * 4 + 1] = four.y;
                eight[part * 4 + 2] = four.z, eight[part * 4 + 3] = four.w;
            }
            take(m * 16 + i / V, i % V * VECTOR_WORDS, eight);
        }
        __syncwarp();
    }
}

template <int bytes> struct Unsigned;
template <> struct Unsigned<2> { using type = unsigned short; };
template <> struct Unsigned<4> { using type = unsigned int; };
template <> struct Unsigned<8> { using type = uint2; };
template <> struct Unsigned<16> { using type = uint4; };

// Eight elements at addresses that are multiples of BYTES; only the first `existing` are touched.
template <class Element, int BYTES> union Eight {
    using Pack = typename Unsigned<BYTES>::type;
    static constexpr int PACKS = VECTOR_WORDS * sizeof(Element) / BYTES;
    Element element[VECTOR_WORDS];
    Pack pack[PACKS];

    __device__ __forceinline__ void load(const Element* from, int existing) {
        if (existing == VECTOR_WORDS) {
#pragma unroll
            for (int i = 0; i < PACKS; ++i) pack[i] = reinterpret_cast<const Pack*>(from)[i];
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR_WORDS; ++i) element[i] = i < existing ? from[i] : Element(0);
        }
    }
    __device__ __forceinline__ void store(Element* to, int existing) const {
        if (existing == VECTOR_WORDS) {
#pragma unroll
            for (int i = 0; i < PACKS; ++i) reinterpret_cast<Pack*>(to)[i] = pack[i];
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR_WORDS; ++i)
                if (i < existing) to[i] = element[i];
        }
    }
};

// GELU's tanh form as x · sigmoid(2u): for negative x, 1 + tanh(u) would cancel every digit.
__device__ __forceinline__ float gelu_tanh(float x) {
    constexpr float MINUS_TWO_LOG2E = -2.0f * 1.44269504f;
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return __fdividef(x, 1.0f + power_of_two(MINUS_TWO_LOG2E * u));
}

// What a program does: in each band of groups the tile varies fastest, then the group, then the block.
struct Program {
    int block, group, tile, batch;

    __device__ __forceinline__ Program(int groups, int blocks, int tiles) {
        const int per_group = blocks * tiles;
        int program = blockIdx.x;
        batch = program / (per_group * groups);
        program -= batch * per_group * groups;
        const int first = program / (BAND * per_group) * BAND;
        const int wide = min(groups - first, BAND);
        program -= first * per_group;
        block = program / (wide * tiles);
        group = first + program / tiles % wide;
        tile = program % tiles;
    }
};

// `groups` groups from `first` on, of `all_groups`; `pitch` is group_size rounded up to whole vectors.
extern "C" __global__ void __launch_bounds__(Up::THREADS) sparse_mlp_up(
    const Word* x, const Word* w1, const Word* b1, const int* indices, const int* counts, Word* cache, Word* packed,
    index_t first, index_t groups, index_t all_groups, index_t capacity, index_t group_size, index_t pitch,
    index_t tokens, index_t width, index_t blocks, index_t tiles, index_t x_b, index_t x_m, index_t w1_f,
    index_t cache_b, index_t cache_f
) {
    constexpr int V = Up::DEPTH / VECTOR_WORDS;
    using Left = Share<Up::THREADS, Up::ROWS, V>;
    using Right = Share<Up::THREADS, Up::COLUMNS, V>;
    const Program program{int(groups), int(blocks), int(tiles)};
    const index_t list = program.batch * all_groups + first + program.group;
    const int first_slot = program.block * Up::ROWS, first_within = program.tile * Up::COLUMNS;
    const int begin = int(first + program.group) * int(group_size);  // the group's first token
    const int real = min(int(group_size), int(tokens) - begin);
    const int count = counts[list];
    if (first_slot >= count || first_within >= real) return;
    indices += list * capacity;
    x += program.batch * x_b + begin * x_m;

    // Slots and tokens past the last repeat it: their products are discarded.
    const int thread = threadIdx.x;
    const Word *neuron[Left::EACH], *token[Right::EACH];
#pragma unroll
    for (int i = 0; i < Left::EACH; ++i)
        neuron[i] = w1 + indices[min(first_slot + Left::row(thread, i), count - 1)] * w1_f +
                    Left::vector(thread) * VECTOR_WORDS;
#pragma unroll
    for (int i = 0; i < Right::EACH; ++i)
        token[i] = x + min(first_within + Right::row(thread, i), real - 1) * x_m + Right::vector(thread) * VECTOR_WORDS;

    const int warp = thread / 32;
    const int row = warp / Up::WARPS_ACROSS * Up::WARP_ROWS, column = warp % Up::WARPS_ACROSS * Up::WARP_COLUMNS;
    Up::Sum sum = {};
    multiply<Up, AlongDepth<Up>>(
        sum, (int(width) + Up::DEPTH - 1) / Up::DEPTH, AlongDepth<Up>::lanes(row, column, thread % 32),
        [&](int step, unsigned to) {
            const int start = step * Up::DEPTH;
            if (Left::copies(thread)) {
                const int bytes = existing_bytes(start + Left::vector(thread) * VECTOR_WORDS, int(width));
#pragma unroll
                for (int i = 0; i < Left::EACH; ++i)
                    copy_vector(to + Left::offset(thread, i), bytes ? neuron[i] + start : neuron[i], bytes);
            }
            if (Right::copies(thread)) {
                const int bytes = existing_bytes(start + Right::vector(thread) * VECTOR_WORDS, int(width));
#pragma unroll
                for (int i = 0; i < Right::EACH; ++i)
                    copy_vector(
                        to + Up::LEFT_BYTES + Right::offset(thread, i), bytes ? token[i] + start : token[i], bytes
                    );
            }
        }
    );

    packed += (program.batch * groups + program.group) * capacity * pitch;
    cache += program.batch * cache_b + begin;
    for_each_vector<Up>(sum, [&](int r, int c, const float(&eight)[VECTOR_WORDS]) {
        const int slot = first_slot + row + r, within = first_within + column + c;
        if (slot >= count || within >= pitch) return;
        const index_t neuron = indices[slot];
        const int existing = clamp(real - within, 0, VECTOR_WORDS);
        const float bias = b1 != nullptr ? widen(b1[neuron]) : 0.0f;
        Word* target = cache + neuron * cache_f + within;
        Eight<Word, CACHE_BYTES> value;
        value.load(target, existing);
        Eight<Word, VECTOR_BYTES> change;
        Eight<Word, CACHE_BYTES> fresh;
#pragma unroll
        for (int i = 0; i < VECTOR_WORDS; i += 2) {
            const unsigned both = pack(gelu_tanh(eight[i] + bias), gelu_tanh(eight[i + 1] + bias));
            fresh.element[i] = Word(both & 0xffffu), fresh.element[i + 1] = Word(both >> 16);
            const unsigned changed = pack(
                i < existing ? low_half(both) - widen(value.element[i]) : 0.0f,
                i + 1 < existing ? high_half(both) - widen(value.element[i + 1]) : 0.0f
            );
            change.element[i] = Word(changed & 0xffffu), change.element[i + 1] = Word(changed >> 16);
        }
        fresh.store(target, existing);
        change.store(packed + slot * pitch + within, VECTOR_WORDS);
    });
}

#if OUTPUT_WORD_BYTES == 4
using OutputWord = float;
__device__ __forceinline__ float output_value(float word) { return word; }
__device__ __forceinline__ float output_word(float value) { return value; }
#else
using OutputWord = Word;
__device__ __forceinline__ float output_value(Word word) { return widen(word); }
__device__ __forceinline__ Word output_word(float value) { return Word(pack(value, 0.0f) & 0xffffu); }
#endif

extern "C" __global__ void __launch_bounds__(Down::THREADS) sparse_mlp_down(
    const Word* packed, const Word* w2, const int* indices, const int* counts, OutputWord* output, index_t first,
    index_t groups, index_t all_groups, index_t capacity, index_t group_size, index_t pitch, index_t tokens,
    index_t width, index_t blocks, index_t tiles, index_t w2_f, index_t output_b, index_t output_m
) {
    using Left = Share<Down::THREADS, Down::DEPTH, Down::ROWS / VECTOR_WORDS>;
    using Right = Share<Down::THREADS, Down::DEPTH, Down::COLUMNS / VECTOR_WORDS>;
    constexpr int LISTS = 2 * Down::STAGES;  // so that none is overwritten while a slower warp still reads it
    const Program program{int(groups), int(blocks), int(tiles)};
    const index_t list = program.batch * all_groups + first + program.group;
    const int first_within = program.tile * Down::ROWS, first_column = program.block * Down::COLUMNS;
    const int begin = int(first + program.group) * int(group_size);
    const int real = min(int(group_size), int(tokens) - begin);
    const int count = counts[list];
    if (count == 0 || first_within >= real) return;
    indices += list * capacity;
    packed += (program.batch * groups + program.group) * capacity * pitch;

    const int thread = threadIdx.x, steps = (count + Down::DEPTH - 1) / Down::DEPTH;
    const int own_within = first_within + Left::vector(thread) * VECTOR_WORDS;
    const int own_column = first_column + Right::vector(thread) * VECTOR_WORDS;
    const int left_bytes = existing_bytes(own_within, int(pitch)), right_bytes = existing_bytes(own_column, int(width));
    const Word* change = packed + (left_bytes ? own_within : 0);
    const Word* weight = w2 + (right_bytes ? own_column : 0);
    int* lists = reinterpret_cast<int*>(shared_memory + Down::STAGES * Down::STAGE_BYTES);
    const unsigned ring = shared_address(lists);
    const auto fetch_list = [&](int step) {
        if (step >= steps) return;
#pragma unroll
        for (int at = 0; at < Down::DEPTH; at += Down::THREADS) {
            const int i = at + thread;
            const int slot = min(step * Down::DEPTH + Right::listed_row(i), count - 1);
            if (i < Down::DEPTH) copy_int(ring + (step % LISTS * Down::DEPTH + i) * 4, indices + slot);
        }
    };
#pragma unroll
    for (int step = 0; step < Down::STAGES - 1; ++step) fetch_list(step);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();

    const int warp = thread / 32;
    const int row = warp / Down::WARPS_ACROSS * Down::WARP_ROWS;
    const int column = warp % Down::WARPS_ACROSS * Down::WARP_COLUMNS;
    Down::Sum sum = {};
    multiply<Down, AcrossDepth<Down>>(
        sum, steps, AcrossDepth<Down>::lanes(row, column, thread % 32),
        [&](int step, unsigned to) {
            if (Left::copies(thread))
#pragma unroll
                for (int i = 0; i < Left::EACH; ++i) {
                    const int slot = step * Down::DEPTH + Left::row(thread, i);
                    const bool kept = slot < count;
                    copy_vector(
                        to + Left::offset(thread, i), change + (kept ? slot : 0) * pitch, kept ? left_bytes : 0
                    );
                }
            if (Right::copies(thread)) {
                int neuron[Right::EACH];
                Right::read_list(lists + step % LISTS * Down::DEPTH, thread, neuron);
#pragma unroll
                for (int i = 0; i < Right::EACH; ++i)
                    copy_vector(
                        to + Down::LEFT_BYTES + Right::offset(thread, i), weight + neuron[i] * w2_f, right_bytes
                    );
            }
            fetch_list(step + Down::STAGES - 1);
        }
    );

    output += program.batch * output_b + begin * output_m;
    for_each_vector<Down>(sum, [&](int r, int c, const float(&eight)[VECTOR_WORDS]) {
        const int within = first_within + row + r, n = first_column + column + c;
        const int existing = clamp(int(width) - n, 0, VECTOR_WORDS);
        if (within >= real || existing == 0) return;
        OutputWord* target = output + within * output_m + n;
        Eight<OutputWord, OUTPUT_BYTES> value;
        value.load(target, existing);
#pragma unroll
        for (int i = 0; i < VECTOR_WORDS; ++i)
            value.element[i] = output_word(output_value(value.element[i]) + eight[i]);
        value.store(target, existing);
    });
}
