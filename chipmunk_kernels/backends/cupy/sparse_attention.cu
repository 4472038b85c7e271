// Column-sparse attention with mma.sync and cp.async: any GPU since Ampere.
//
// A block takes up to BLOCK_M rows of one group. It gathers the group's rows of k and v by cp.async, BLOCK_N columns
// a stage and STAGES stages in flight, each stage's column list one ring ahead of its rows; a warp owns WARP_ROWS
// rows from the queries to the output (FlashAttention-2, arXiv 2307.08691). Of 32 rows a warp reads keys and values
// from shared memory half as often as of 16: on Hopper, 16 rows need that memory longer than the tensor cores.
//
// Compile-time parameters (macros): KIND (see mma.cuh), WIDTH of a head, BLOCK_M, BLOCK_N, WARP_ROWS, STAGES,
// BLOCKS that registers must leave room for on a multiprocessor.

#include "mma.cuh"
#include "tile.cuh"

constexpr int WARPS = BLOCK_M / WARP_ROWS;
constexpr int THREADS = WARPS * 32;
constexpr int ROW_VECTORS = WIDTH / VECTOR_WORDS;
constexpr int ROW_BYTES = WIDTH * 2;
constexpr int QUERY_BYTES = BLOCK_M * ROW_BYTES;
constexpr int TILE_BYTES = BLOCK_N * ROW_BYTES;
constexpr int STAGE_BYTES = 2 * TILE_BYTES;  // keys, then values
constexpr int LISTS = 2 * STAGES;            // so that none is overwritten while a slower warp still reads it
constexpr int ROW_TILES = WARP_ROWS / 16;
constexpr int COLUMN_TILES = BLOCK_N / 8;
constexpr int WIDTH_TILES = WIDTH / 8;
constexpr int DEPTH_STEPS = WIDTH / 16;
constexpr int REGISTERS = 65536 / (BLOCKS * THREADS) < 255 ? 65536 / (BLOCKS * THREADS) : 255;
// Beside what accumulates, addresses and fragments of keys and values take about 56 registers.
constexpr bool QUERIES_IN_REGISTERS = 4 * ROW_TILES * (WIDTH_TILES + COLUMN_TILES + DEPTH_STEPS) + 56 <= REGISTERS;
// A row's reference is raised only when a logit exceeds it by this much, a factor of 2⁸ in its weights, which
// float16 holds: most tiles then neither rescale the output nor exchange maxima between lanes.
constexpr float SLACK = 8.0f;
constexpr float LN2 = 0.69314718f;

using Gather = Share<THREADS, BLOCK_N, ROW_VECTORS>;
using Scores = float[ROW_TILES][COLUMN_TILES][4];
using Output = float[ROW_TILES][WIDTH_TILES][4];
using Queries = unsigned[QUERIES_IN_REGISTERS ? DEPTH_STEPS : 1][ROW_TILES][4];

// What a warp knows of its rows: two for each row tile, `lane / 4` and 8 below. `reference` is in powers of two.
struct Rows {
    float reference[ROW_TILES][2];
    float total[ROW_TILES][2];  // of this lane's weights alone
};

struct Columns {
    const int* list;
    int kept;
    unsigned ring;  // of lists in shared memory

    __device__ __forceinline__ int tiles() const { return (kept + BLOCK_N - 1) / BLOCK_N; }
    __device__ __forceinline__ const int* in_ring(int tile) const {
        const unsigned char* lists = shared_memory + QUERY_BYTES + STAGES * STAGE_BYTES;
        return reinterpret_cast<const int*>(lists) + tile % LISTS * BLOCK_N;
    }
    // Slots past the last repeat it, so that every address exists and no maximum changes.
    __device__ __forceinline__ void fetch(int tile) const {
        if (tile >= tiles()) return;
#pragma unroll
        for (int first = 0; first < BLOCK_N; first += THREADS) {
            const int i = first + threadIdx.x;
            const int slot = min(tile * BLOCK_N + Gather::listed_row(i), kept - 1);
            if (i < BLOCK_N) copy_int(ring + (tile % LISTS * BLOCK_N + i) * 4, list + slot);
        }
    }
};

// Start copying a tile's keys and values, and the list of the tile that comes STAGES − 1 later.
__device__ __forceinline__ void fetch_tile(
    const Columns& columns, int tile, const unsigned char* k, const unsigned char* v, unsigned k_row, unsigned v_row,
    unsigned to
) {
    if (tile >= columns.tiles()) return;
    const int thread = threadIdx.x;
    if (Gather::copies(thread)) {
        int column[Gather::EACH];
        Gather::read_list(columns.in_ring(tile), thread, column);
#pragma unroll
        for (int i = 0; i < Gather::EACH; ++i)
            copy_vector(
                to + Gather::offset(thread, i), k + static_cast<unsigned long long>(unsigned(column[i])) * k_row
            );
#pragma unroll
        for (int i = 0; i < Gather::EACH; ++i)
            copy_vector(
                to + TILE_BYTES + Gather::offset(thread, i),
                v + static_cast<unsigned long long>(unsigned(column[i])) * v_row
            );
    }
    columns.fetch(tile + STAGES - 1);
}

__device__ __forceinline__ void load_queries(unsigned (&a)[ROW_TILES][4], unsigned address, int step) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) load_matrices(a[m], (address ^ (step * 32)) + m * 16 * ROW_BYTES);
}

// scores = queries · keysᵀ
__device__ __forceinline__ void multiply_keys(
    Scores& scores, Queries& queries, unsigned queries_address, unsigned keys_address
) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
#pragma unroll
    for (int step = 0; step < DEPTH_STEPS; ++step) {
        unsigned(&a)[ROW_TILES][4] = queries[QUERIES_IN_REGISTERS ? step : 0];
        if constexpr (!QUERIES_IN_REGISTERS) load_queries(a, queries_address, step);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n += 2) {
            unsigned b[4];
            load_matrices(b, (keys_address ^ (step * 32)) + n * 8 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                multiply_add(scores[m][n], a[m], b[0], b[1]);
                multiply_add(scores[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// The slots from `kept` on weigh nothing.
__device__ __forceinline__ void mask(Scores& scores, int first_slot, int kept) {
    const int own = first_slot + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (own + n * 8 + e % 2 >= kept)
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) scores[m][n][e] = MINUS_INFINITY;
}

// Where a row's logits have grown too far above its reference, make the largest the reference.
__device__ __forceinline__ void raise_references(Rows& rows, Output& output, const Scores& scores, float scale) {
    float top[ROW_TILES][2];
    bool exceeded = false;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[m][r] = fmaxf(scores[m][0][2 * r], scores[m][0][2 * r + 1]);
#pragma unroll
            for (int n = 1; n < COLUMN_TILES; ++n)
                top[m][r] = fmaxf(top[m][r], fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
            exceeded |= top[m][r] * scale > rows.reference[m][r] + SLACK;
        }
    if (!__any_sync(WHOLE_WARP, exceeded)) return;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = fmaxf(top[m][r], __shfl_xor_sync(WHOLE_WARP, top[m][r], 1));
            highest = fmaxf(highest, __shfl_xor_sync(WHOLE_WARP, highest, 2));
            const float raised = fmaxf(rows.reference[m][r], highest * scale);
            const float factor = power_of_two(rows.reference[m][r] - raised);
            rows.reference[m][r] = raised;
            rows.total[m][r] *= factor;
#pragma unroll
            for (int d = 0; d < WIDTH_TILES; ++d) {
                output[m][d][2 * r] *= factor;
                output[m][d][2 * r + 1] *= factor;
            }
        }
}

// output += weights · values, the weights made from the scores 16 columns before they are needed.
__device__ __forceinline__ void multiply_values(
    Output& output, Rows& rows, const Scores& scores, float scale, unsigned values_address
) {
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step) {
        unsigned a[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const int r = part % 2;
                const float(&pair)[4] = scores[m][2 * step + part / 2];
                const float low = power_of_two(fmaf(pair[2 * r], scale, -rows.reference[m][r]));
                const float high = power_of_two(fmaf(pair[2 * r + 1], scale, -rows.reference[m][r]));
                rows.total[m][r] += low + high;
                a[m][part] = pack(low, high);
            }
#pragma unroll
        for (int d = 0; d < WIDTH_TILES; d += 2) {
            unsigned b[4];
            load_transposed(b, (values_address ^ (d * 16)) + step * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                multiply_add(output[m][d], a[m], b[0], b[1]);
                multiply_add(output[m][d + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Copy this warp's rows of a table to where its queries were; rows past `existing` become zero.
__device__ __forceinline__ void fetch_own_rows(
    const Word* from, index_t stride, int existing, unsigned to, int first_row, int lane
) {
    const int vector = lane % ROW_VECTORS;
#pragma unroll 1
    for (int eight = first_row; eight < first_row + WARP_ROWS; eight += 8)
#pragma unroll
        for (int i = 0; i < 8; i += 32 / ROW_VECTORS) {
            const int row = eight + i + lane / ROW_VECTORS;
            const bool exists = row < existing;
            copy_vector(
                to + swizzled<ROW_VECTORS>(row, vector),
                from + (exists ? row : 0) * stride + vector * VECTOR_WORDS, exists ? VECTOR_BYTES : 0
            );
        }
}

// Base + sign · output / total, through this warp's rows of shared memory so that global stores are whole vectors.
__device__ __forceinline__ void write_rows(
    const Output& output, const Rows& rows, const Word* base, index_t base_stride, Word* out, index_t out_stride,
    float* lse, float sign, int existing, int first_row, int lane
) {
    const unsigned tile = shared_address(shared_memory);
    if (base != nullptr) fetch_own_rows(base, base_stride, existing, tile, first_row, lane);
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + m * 16 + r * 8 + lane / 4;
            float total = rows.total[m][r];
            total += __shfl_xor_sync(WHOLE_WARP, total, 1);
            total += __shfl_xor_sync(WHOLE_WARP, total, 2);
            const float factor = total > 0.0f ? __fdividef(sign, total) : 0.0f;
            if (lane % 4 == 0 && row < existing)
                lse[row] = total > 0.0f ? (rows.reference[m][r] + log_two(total)) * LN2 : MINUS_INFINITY;
#pragma unroll
            for (int d = 0; d < WIDTH_TILES; ++d) {
                unsigned* own =
                    reinterpret_cast<unsigned*>(shared_memory + swizzled<ROW_VECTORS>(row, d)) + lane % 4;
                const unsigned old = base != nullptr ? *own : 0u;
                *own = pack(
                    fmaf(output[m][d][2 * r], factor, low_half(old)),
                    fmaf(output[m][d][2 * r + 1], factor, high_half(old))
                );
            }
        }
    __syncwarp();
    const int vector = lane % ROW_VECTORS;
#pragma unroll 1
    for (int eight = first_row; eight < first_row + WARP_ROWS; eight += 8)
#pragma unroll
        for (int i = 0; i < 8; i += 32 / ROW_VECTORS) {
            const int row = eight + i + lane / ROW_VECTORS;
            if (row < existing)
                *reinterpret_cast<uint4*>(out + row * out_stride + vector * VECTOR_WORDS) =
                    *reinterpret_cast<const uint4*>(shared_memory + swizzled<ROW_VECTORS>(row, vector));
        }
}

// One row tile of one group; `tiles` of them make a group. Heads are outermost, so that blocks in flight share one
// head's keys and values in the L2 cache. Strides are in elements; k_n and v_n below 2³¹.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sparse_attention(
    const Word* q, const Word* k, const Word* v, const int* indices, const int* counts, const Word* base, Word* out,
    float* lse, index_t heads, index_t rows_in_all, index_t groups, index_t capacity, index_t group_size,
    index_t tiles, index_t q_b, index_t q_h, index_t q_n, index_t k_b, index_t k_h, index_t k_n, index_t v_b,
    index_t v_h, index_t v_n, index_t base_b, index_t base_h, index_t base_n, index_t out_b, index_t out_h,
    index_t out_n, double scale_log2, double sign
) {
    const int thread = threadIdx.x, lane = thread % 32, own_row = thread / 32 * WARP_ROWS;
    const int which = blockIdx.x / static_cast<int>(tiles);
    const int pair = which / static_cast<int>(groups), group = which % static_cast<int>(groups);
    const int b = pair / static_cast<int>(heads), h = pair % static_cast<int>(heads);
    const int begin = group * static_cast<int>(group_size) + blockIdx.x % static_cast<int>(tiles) * BLOCK_M;
    const int end = min((group + 1) * static_cast<int>(group_size), static_cast<int>(rows_in_all));
    if (begin >= end) return;  // of a ragged last group
    const float scale = static_cast<float>(scale_log2);

    const unsigned shared = shared_address(shared_memory), stages = shared + QUERY_BYTES;
    const Columns columns{indices + which * capacity, counts[which], stages + STAGES * STAGE_BYTES};
    const int place = Gather::vector(thread) * VECTOR_BYTES;
    const unsigned char* keys = reinterpret_cast<const unsigned char*>(k + b * k_b + h * k_h) + place;
    const unsigned char* values = reinterpret_cast<const unsigned char*>(v + b * v_b + h * v_h) + place;
    const unsigned key_row = static_cast<unsigned>(k_n * 2), value_row = static_cast<unsigned>(v_n * 2);

#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) columns.fetch(tile);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    fetch_own_rows(q + b * q_b + h * q_h + begin * q_n, q_n, end - begin, shared, own_row, lane);
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; ++tile) {
        fetch_tile(columns, tile, keys, values, key_row, value_row, stages + tile * STAGE_BYTES);
        commit_copies();
    }

    const unsigned query_lane = shared + swizzled<ROW_VECTORS>(own_row + lane % 16, lane / 16);
    const unsigned key_lane = swizzled<ROW_VECTORS>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const unsigned value_lane = TILE_BYTES + swizzled<ROW_VECTORS>(lane % 16, lane / 16);
    Queries queries;
    if constexpr (QUERIES_IN_REGISTERS) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();
#pragma unroll
        for (int step = 0; step < DEPTH_STEPS; ++step) load_queries(queries[step], query_lane, step);
    }
    Rows rows;
    Output output;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) rows.reference[m][r] = MINUS_INFINITY, rows.total[m][r] = 0.0f;
#pragma unroll
        for (int d = 0; d < WIDTH_TILES; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) output[m][d][e] = 0.0f;
    }

    int stage = 0;
    for (int tile = 0; tile < columns.tiles(); ++tile) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        const int free = stage == 0 ? STAGES - 1 : stage - 1;
        fetch_tile(columns, tile + STAGES - 1, keys, values, key_row, value_row, stages + free * STAGE_BYTES);
        commit_copies();
        const unsigned here = stages + stage * STAGE_BYTES;
        Scores scores;
        multiply_keys(scores, queries, query_lane, here + key_lane);
        if ((tile + 1) * BLOCK_N > columns.kept) mask(scores, tile * BLOCK_N, columns.kept);
        raise_references(rows, output, scores, scale);
        multiply_values(output, rows, scores, scale, here + value_lane);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    __syncwarp();
    write_rows(
        output, rows, base == nullptr ? nullptr : base + b * base_b + h * base_h + begin * base_n, base_n,
        out + b * out_b + h * out_h + begin * out_n, out_n, lse + pair * rows_in_all + begin,
        static_cast<float>(sign), end - begin, own_row, lane
    );
}
