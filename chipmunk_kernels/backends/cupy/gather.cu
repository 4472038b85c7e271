// Packing the kept columns of each group, and writing them back.
//
// Compile-time parameters (macros): WORD_BYTES of an element; KIND of an element (0 float32, 1 float16, 2 bfloat16);
// WIDTH of a packed row in elements; VECTOR_BYTES moved at once (every address and WIDTH are multiples of it);
// BLOCK_COLUMNS a block moves; THREADS of a block; IN_FLIGHT loads that a thread issues before its first store.
//
// Elements are moved as raw words; only adding needs to know what they mean. No header is included, so that NVRTC
// needs no CUDA toolkit: float16 is converted by one PTX instruction, bfloat16 by its definition.

template <int bytes> struct Unsigned;
template <> struct Unsigned<2> { using type = unsigned short; };
template <> struct Unsigned<4> { using type = unsigned int; };
template <> struct Unsigned<8> { using type = uint2; };
template <> struct Unsigned<16> { using type = uint4; };

using Word = Unsigned<WORD_BYTES>::type;
using Pack = Unsigned<VECTOR_BYTES>::type;
using index_t = long long;

constexpr int WORDS = VECTOR_BYTES / WORD_BYTES;
constexpr int VECTORS = WIDTH / WORDS;
static_assert(WIDTH % WORDS == 0, "a packed row must be a whole number of vectors");

union Vector {
    Pack pack;
    Word word[WORDS];
};

__device__ __forceinline__ float widen(Word word) {
    if constexpr (KIND == 0) return __uint_as_float(word);
    if constexpr (KIND == 2) return __uint_as_float(static_cast<unsigned int>(word) << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(word)));
    return value;
}

__device__ __forceinline__ Word narrow(float value) {
    const unsigned int bits = __float_as_uint(value);
    if constexpr (KIND == 0) return bits;
    if constexpr (KIND == 2) {
        // To nearest, ties to even; adding to a NaN could carry into its exponent.
        return value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    }
    unsigned short word;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
}

// The part of the work that a block does: some slots of one row (b, h, g) of the column set.
struct Place {
    index_t row, b, h, g;
    int first, vectors, count;

    __device__ __forceinline__ Place(const int* counts, index_t heads, index_t groups, index_t capacity) {
        const index_t slot_blocks = (capacity + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
        row = blockIdx.x / slot_blocks;
        first = static_cast<int>(blockIdx.x % slot_blocks) * BLOCK_COLUMNS;
        g = row % groups;
        h = row / groups % heads;
        b = row / (groups * heads);
        vectors = min(BLOCK_COLUMNS, static_cast<int>(capacity) - first) * VECTORS;
        count = counts[row];
    }

    // Elements of the group's own part of a column's row that exist: fewer in the ragged last group.
    __device__ __forceinline__ int existing(index_t extent) const {
        const index_t left = extent - g * WIDTH;
        return left < WIDTH ? static_cast<int>(left) : WIDTH;
    }
};

// `existing` may end inside the vector at `offset`: then only the words before it are touched.
__device__ __forceinline__ Vector load(const Word* source, int offset, int existing) {
    Vector value;
    if (offset + WORDS <= existing) {
        value.pack = *reinterpret_cast<const Pack*>(source + offset);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) value.word[i] = offset + i < existing ? source[offset + i] : Word(0);
    }
    return value;
}

__device__ __forceinline__ void store(Word* target, int offset, int existing, const Vector& value) {
    if (offset + WORDS <= existing) {
        *reinterpret_cast<Pack*>(target + offset) = value.pack;
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            if (offset + i < existing) target[offset + i] = value.word[i];
    }
}

template <bool PER_GROUP>
__device__ __forceinline__ void gather(
    const Word* __restrict__ x, const int* __restrict__ indices, const int* __restrict__ counts,
    Word* __restrict__ packed, index_t heads, index_t groups, index_t capacity, index_t extent,
    index_t stride_b, index_t stride_h, index_t stride_n
) {
    const Place place(counts, heads, groups, capacity);
    const Word* source = x + place.b * stride_b + place.h * stride_h + (PER_GROUP ? place.g * WIDTH : 0);
    const int existing = PER_GROUP ? place.existing(extent) : WIDTH;
    indices += place.row * capacity;
    packed += place.row * capacity * WIDTH;
    for (int start = threadIdx.x; start < place.vectors; start += THREADS * IN_FLIGHT) {
        Vector value[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int item = start + i * THREADS;
            const int slot = place.first + item / VECTORS;
            const bool kept = item < place.vectors && slot < place.count;
            value[i] = load(
                source + (kept ? indices[slot] * stride_n : 0), item % VECTORS * WORDS, kept ? existing : 0
            );
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int item = start + i * THREADS;
            if (item >= place.vectors) break;
            const index_t slot = place.first + item / VECTORS;
            store(packed + slot * WIDTH, item % VECTORS * WORDS, WIDTH, value[i]);
        }
    }
}

// Columns of a group are distinct and groups own disjoint rows: no two threads touch one element of out.
template <bool ACCUMULATE>
__device__ __forceinline__ void scatter(
    const Word* __restrict__ packed, const int* __restrict__ indices, const int* __restrict__ counts,
    Word* __restrict__ out, index_t heads, index_t groups, index_t capacity, index_t extent,
    index_t stride_b, index_t stride_h, index_t stride_n
) {
    const Place place(counts, heads, groups, capacity);
    const int existing = place.existing(extent);
    out += place.b * stride_b + place.h * stride_h + place.g * WIDTH;
    indices += place.row * capacity;
    packed += place.row * capacity * WIDTH;
    for (int start = threadIdx.x; start < place.vectors; start += THREADS * IN_FLIGHT) {
        Vector value[IN_FLIGHT];
        Word* target[IN_FLIGHT];
        int here[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const int item = start + i * THREADS;
            const int slot = place.first + item / VECTORS;
            const int offset = item % VECTORS * WORDS;
            const bool kept = item < place.vectors && slot < place.count;
            here[i] = kept ? existing : 0;
            target[i] = out + (kept ? indices[slot] * stride_n : 0);
            value[i] = load(packed + (kept ? static_cast<index_t>(slot) * WIDTH : 0), offset, here[i]);
            if constexpr (ACCUMULATE) {
                const Vector old = load(target[i], offset, here[i]);
#pragma unroll
                for (int j = 0; j < WORDS; ++j)
                    value[i].word[j] = narrow(widen(old.word[j]) + widen(value[i].word[j]));
            }
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            store(target[i], (start + i * THREADS) % VECTORS * WORDS, here[i], value[i]);
    }
}

#define KERNEL(name, implementation)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) name(                                                 \
        const Word* from, const int* indices, const int* counts, Word* to, index_t heads, index_t groups,       \
        index_t capacity, index_t extent, index_t stride_b, index_t stride_h, index_t stride_n                  \
    ) {                                                                                                         \
        implementation(                                                                                         \
            from, indices, counts, to, heads, groups, capacity, extent, stride_b, stride_h, stride_n            \
        );                                                                                                      \
    }

KERNEL(gather_rows, gather<false>)
KERNEL(gather_groups, gather<true>)
KERNEL(scatter_assign, scatter<false>)
KERNEL(scatter_add, scatter<true>)
