// Tiles of 16-bit elements in shared memory: where their 16-byte vectors lie, and how a block copies them there.
//
// A row of V vectors is stored with its vectors exchanged by an exclusive or with the row's number, so that the
// eight rows of an 8 × 8 matrix (one vector each, a row apart) lie in different banks, as do eight neighbours of
// one row: neither ldmatrix nor cp.async meets a bank conflict.

constexpr int VECTOR_BYTES = 16;
constexpr int VECTOR_WORDS = 8;

// Byte offset of a vector in a tile whose rows are V vectors (a power of two, 4 or more).
// Rows 8 apart differ by 8 rows' bytes alone, and an exclusive or with 16 v turns vector i into vector i ^ v.
template <int V>
__device__ __forceinline__ int swizzled(int row, int vector) {
    static_assert(V >= 4 && (V & (V - 1)) == 0, "rows are 4, 8, 16 ... vectors");
    const int turn = V == 4 ? (row >> 1) & 3 : row & 7;
    return (row * V + (vector ^ turn)) * VECTOR_BYTES;
}

__device__ constexpr int power_of_two_within(int limit) {
    int found = 1;
    while (found * 2 <= limit) found *= 2;
    return found;
}

// How the threads of a block share the copying of a tile of ROWS rows of V vectors: a thread owns one place in the
// row, for every AT_ONCE-th row. Threads past a power of two copy nothing.
template <int THREADS, int ROWS, int V>
struct Share {
    static constexpr int COPYING = power_of_two_within(THREADS < ROWS * V ? THREADS : ROWS * V);
    static constexpr int AT_ONCE = COPYING / V;
    static constexpr int EACH = ROWS / AT_ONCE;
    static_assert(COPYING >= V && ROWS % AT_ONCE == 0, "the tile is too small for its threads");

    static __device__ __forceinline__ bool copies(int thread) { return THREADS == COPYING || thread < COPYING; }
    static __device__ __forceinline__ int vector(int thread) { return thread % V; }
    static __device__ __forceinline__ int row(int thread, int i) { return thread / V + i * AT_ONCE; }
    static __device__ __forceinline__ int offset(int thread, int i) {
        return swizzled<V>(row(thread, i), vector(thread));
    }

    // A list of one number for each row is kept in such an order that a thread's rows are neighbours.
    static __device__ __forceinline__ int listed_row(int position) {
        return position / EACH + position % EACH * AT_ONCE;
    }
    static __device__ __forceinline__ void read_list(const int* list, int thread, int (&own)[EACH]) {
        list += thread / V * EACH;
        if constexpr (EACH % 4 == 0) {
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                const int4 four = *reinterpret_cast<const int4*>(list + i);
                own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < EACH; ++i) own[i] = list[i];
        }
    }
};

__device__ __forceinline__ int clamp(int value, int low, int high) { return min(max(value, low), high); }

// Bytes of a vector of 16-bit elements that begins at `start` of a row of `extent`.
__device__ __forceinline__ int existing_bytes(int start, int extent) {
    return clamp((extent - start) * 2, 0, VECTOR_BYTES);
}
