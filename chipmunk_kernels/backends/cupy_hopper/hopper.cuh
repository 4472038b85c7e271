// Hopper's instructions, as the kernels beside this file use them: barriers, asynchronous copies, wgmma.
//
// The macro BF16 says what the 16-bit elements are: 1 bfloat16, 0 float16. Shared addresses are 32-bit
// numbers of the shared window (`shared_address`). Sources: PTX ISA 8.x, "Asynchronous warpgroup level matrix
// instructions" and "mbarrier"; the layouts of matrices in shared memory are in the comments where
// descriptors are made.
//
// Two proxies reach shared memory. Ordinary loads and stores, stmatrix and cp.async (16 bytes a thread) use
// the generic one; wgmma and bulk copies the async one. What one proxy wrote, the other may read only after
// `fence_async_proxy` in the thread that wrote it (or in one that has synchronised with it).

#if BF16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

typedef unsigned long long Descriptor;

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Lets `cycles` of the multiprocessor's clock go by.
__device__ __forceinline__ void idle_for(int cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}

// ---- Barriers ----------------------------------------------------------------------
// An mbarrier's phase completes when all arrivals and all expected bytes are in. A barrier starts in phase 0;
// `wait(b, parity)` returns once the phase of that parity has completed, so waiting for parity 1 on a new
// barrier returns at once: producers start with 1 ("empty"), consumers with 0 ("full").

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the async proxy and to other blocks of the cluster; then
// __syncthreads.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` of bulk copies besides.
__device__ __forceinline__ void barrier_arrive_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(unsigned barrier, int parity) {
    int done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.s32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

// WATCHDOG is for trying out a new pipeline: a phase that never completes becomes an error, not a hung
// device.
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
#ifdef WATCHDOG
    for (int tries = 0; !barrier_try_wait(barrier, parity); ++tries)
        if (tries > WATCHDOG) asm volatile("trap;");
#else
    while (!barrier_try_wait(barrier, parity)) {
    }
#endif
}

// Named barriers (1 to 15; 0 is __syncthreads) between `threads` threads, a multiple of a warp.
// `named_arrive` counts the caller and goes on, `named_sync` counts it and waits.
__device__ __forceinline__ void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Generic-proxy writes so far, of this thread or observed by it, come before async-proxy accesses after this.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory: before bulk copies read what was written there.
__device__ __forceinline__ void fence_async_proxy_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Registers of each thread of this warpgroup: all its warps must execute it, and the kernel needs
// __launch_bounds__(threads, blocks per multiprocessor). A multiple of 8 in [24, 256].
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// One lane of a converged warp.
__device__ __forceinline__ bool elected() {
    int chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.s32 %0, 1, 0, p;\n}"
                 : "=r"(chosen)::"memory");
    return chosen;
}

// ---- Global memory ----------------------------------------------------------------------

// Between blocks: what came before an `add_release` of one block is visible after a `load_acquire` that sees
// it.
__device__ __forceinline__ int load_acquire(const int* counter) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

__device__ __forceinline__ void add_release(int* counter, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// target[i] += of 8 elements or 4 floats, in L2: nobody waits. Addresses are multiples of 16.
__device__ __forceinline__ void add_elements_16(void* target, uint4 words) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4." ELEMENT "x2 [%0], {%1, %2, %3, %4};" ::"l"(target),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

__device__ __forceinline__ void add_floats_16(void* target, uint4 words) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target),
                 "f"(__uint_as_float(words.x)), "f"(__uint_as_float(words.y)), "f"(__uint_as_float(words.z)),
                 "f"(__uint_as_float(words.w))
                 : "memory");
}

// Memory that no thread writes during the launch; unlike `__ldg`, the compiler leaves the load in its place.
__device__ __forceinline__ int load_constant(const int* source) {
    int value;
    asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(value) : "l"(source));
    return value;
}

// Since some moment, the same for all multiprocessors.
__device__ __forceinline__ long long nanoseconds() {
    long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// threadIdx.x, read anew: the compiler does not keep what it derives from this across loop iterations.
__device__ __forceinline__ int thread_number() {
    int number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

// Row `row` of a table whose rows are `stride` bytes apart: one instruction.
__device__ __forceinline__ const char* row_at(const char* table, int row, int stride) {
    const char* address;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(table));
    return address;
}

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// The block's number, asked for anew at each call: what is computed from it need not stay in registers.
__device__ __forceinline__ int block_number() {
    int number;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
    return number;
}

// ---- Plain loads and stores ----------------------------------------------------------------------

__device__ __forceinline__ float load_shared_float(unsigned address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared_float(unsigned address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ __forceinline__ void store_shared_floats(unsigned address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void clear_shared_16(unsigned address) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %1, %1, %1};" ::"r"(address), "f"(0.0f) : "memory");
}

// First to leave the caches: nobody reads it soon.
__device__ __forceinline__ void store_streaming(float* target, float value) {
    asm volatile("st.global.cs.f32 [%0], %1;" ::"l"(target), "f"(value) : "memory");
}

// Without a branch, which would keep the compiler from moving what is around it.
__device__ __forceinline__ void store_16_if(bool wanted, void* target, uint4 words) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                     static_cast<int>(wanted)),
                 "l"(target), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

// ---- Copies ----------------------------------------------------------------------

// 16 bytes, asynchronously, past L1. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(unsigned target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// The same, L2 fetching the 128 bytes around.
__device__ __forceinline__ void copy_16_prefetch_128(unsigned target, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// The first `bytes` (0 to 16) of 16, zeros after them.
__device__ __forceinline__ void copy_16_or_zeros(unsigned target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes)
                 : "memory");
}

// Has the L2 cache fetch the 32 bytes around this address, at least. (The bulk form takes one address a warp.)
__device__ __forceinline__ void prefetch_sector(const void* source) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source) : "memory");
}
constexpr int SECTOR_BYTES = 32;

// Arrives on the barrier once all earlier cp.async of this thread have landed. Counts as one of the arrivals
// that the barrier was initialised with. The copies are generic-proxy writes: see `fence_async_proxy`.
__device__ __forceinline__ void barrier_arrive_after_copies(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` committed groups of this thread's copies are on their way.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Bulk copies: one thread moves `bytes` (a multiple of 16, both addresses too) in the async proxy.
__device__ __forceinline__ void bulk_load(unsigned target, const void* source, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            target),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void bulk_store(void* target, unsigned source, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source),
                 "r"(bytes)
                 : "memory");
}

// target[i] += source[i], float32, in L2.
__device__ __forceinline__ void bulk_add_float(void* target, unsigned source, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
                 "r"(source), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` committed groups still read shared memory.
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Waits until at most `PENDING` committed groups are not yet written.
template <int PENDING>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Boxes of a tensor map (64-byte aligned, encoded by the host); coordinates fastest dimension first.
__device__ __forceinline__ void tensor_load_2d(
    unsigned target, const void* map, unsigned barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void tensor_load_3d(
    unsigned target, const void* map, unsigned barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
        "%5}], "
        "[%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void tensor_load_4d(
    unsigned target, const void* map, unsigned barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

__device__ __forceinline__ void tensor_store_4d(
    const void* map, unsigned source, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
        "r"(source), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- Matrices in shared memory ----------------------------------------------------------------------
// All tiles here are stacks of rows of 64 elements = 128 bytes, swizzled: the 16-byte chunk c of row r lies
// in the place of chunk c ^ (r % 8). Eight rows make an atom of 1024 bytes, to which every tile is aligned;
// wider matrices are several tiles side by side, each `rows * 128` bytes after the one before.

constexpr int TILE_WIDTH = 64;
constexpr int ROW_BYTES = 128;
constexpr int ATOM_ROWS = 8;
constexpr int ATOM_BYTES = ATOM_ROWS * ROW_BYTES;

// Byte offset of the 16-byte chunk `chunk` (0 to 7) of row `row` in such a tile.
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row % ATOM_ROWS)) << 4);
}

__device__ __forceinline__ Descriptor descriptor(unsigned address, int leading_bytes, int stride_bytes) {
    constexpr Descriptor SWIZZLE_128 = 1ull << 62;
    return SWIZZLE_128 | static_cast<Descriptor>((address & 0x3ffff) >> 4) |
           static_cast<Descriptor>(leading_bytes >> 4) << 16 |
           static_cast<Descriptor>(stride_bytes >> 4) << 32;
}

// Rows are the matrix's M or N, the 64 elements of a row its K. The next 16 of K are `K_STEP` further on
// within a tile; after four of those comes the next tile, `tile bytes >> 4` from the first.
__device__ __forceinline__ Descriptor k_major(unsigned address) {
    return descriptor(address, 16, ATOM_BYTES);
}
constexpr Descriptor K_STEP = 16 * 2 >> 4;

// Rows are the matrix's K, the 64 elements of a row its M or N (the transpose bit of wgmma says so); more
// than 64 of those continue in the next tile, `tile_bytes` away. The next 16 of K are `MN_STEP` further on.
__device__ __forceinline__ Descriptor mn_major(unsigned address, int tile_bytes) {
    return descriptor(address, tile_bytes, ATOM_BYTES);
}
constexpr Descriptor MN_STEP = 16 * ROW_BYTES >> 4;

// The descriptor of what lies `bytes` further on. Only its low word changes, so this is one 32-bit addition.
__device__ __forceinline__ Descriptor further(Descriptor from, int bytes) {
    unsigned low = static_cast<unsigned>(from) + (bytes >> 4);
    return (from & 0xffffffff00000000ull) | low;
}

// Four 8x8 matrices of 16-bit elements, one row address a lane, fragments as the accumulators of wgmma are
// spread.
__device__ __forceinline__ void store_matrix_4(
    unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void store_matrix_4_transposed(
    unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_4(unsigned address, unsigned (&fragments)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_4_transposed(unsigned address, unsigned (&fragments)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
}

// ---- Products ----------------------------------------------------------------------
// Accumulators of a warpgroup's 64 x N product: warp w of it has rows 16w to 16w + 15; in that, lane l has in
// d[4j + i] row l / 4 + 8 (i / 2), column 8j + 2 (l % 4) + i % 2. An A operand in registers is four words of
// two elements each, in the order of those i: accumulators d[8s .. 8s + 7], packed in pairs, are the A of
// step s.

// Before the first product that reads registers or accumulators which ordinary code wrote.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `PENDING` committed groups of products are unfinished.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of these registers across this point.
template <int COUNT>
__device__ __forceinline__ void pin(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void pin(unsigned (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// A value that the compiler may not compute again: keeps conversions and address arithmetic out of loops.
__device__ __forceinline__ float once(float value) {
    asm volatile("" : "+f"(value));
    return value;
}

__device__ __forceinline__ Descriptor once(Descriptor value) {
    asm volatile("" : "+l"(value));
    return value;
}

template <int N>
struct Product;

#define ACCUMULATORS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ACCUMULATORS_16 ACCUMULATORS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ACCUMULATORS_24 ACCUMULATORS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ACCUMULATORS_32 ACCUMULATORS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ACCUMULATORS_40 ACCUMULATORS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ACCUMULATORS_48 ACCUMULATORS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ACCUMULATORS_56 ACCUMULATORS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ACCUMULATORS_64 ACCUMULATORS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ACCUMULATORS_72 ACCUMULATORS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ACCUMULATORS_80 ACCUMULATORS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define ACCUMULATORS_88 ACCUMULATORS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ACCUMULATORS_96 ACCUMULATORS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define ACCUMULATORS_104 ACCUMULATORS_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define ACCUMULATORS_112 ACCUMULATORS_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define ACCUMULATORS_120 ACCUMULATORS_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define ACCUMULATORS_128 ACCUMULATORS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define EIGHT(d, i)                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define OPERANDS_8(d) EIGHT(d, 0)
#define OPERANDS_16(d) OPERANDS_8(d), EIGHT(d, 8)
#define OPERANDS_24(d) OPERANDS_16(d), EIGHT(d, 16)
#define OPERANDS_32(d) OPERANDS_24(d), EIGHT(d, 24)
#define OPERANDS_40(d) OPERANDS_32(d), EIGHT(d, 32)
#define OPERANDS_48(d) OPERANDS_40(d), EIGHT(d, 40)
#define OPERANDS_56(d) OPERANDS_48(d), EIGHT(d, 48)
#define OPERANDS_64(d) OPERANDS_56(d), EIGHT(d, 56)
#define OPERANDS_72(d) OPERANDS_64(d), EIGHT(d, 64)
#define OPERANDS_80(d) OPERANDS_72(d), EIGHT(d, 72)
#define OPERANDS_88(d) OPERANDS_80(d), EIGHT(d, 80)
#define OPERANDS_96(d) OPERANDS_88(d), EIGHT(d, 88)
#define OPERANDS_104(d) OPERANDS_96(d), EIGHT(d, 96)
#define OPERANDS_112(d) OPERANDS_104(d), EIGHT(d, 104)
#define OPERANDS_120(d) OPERANDS_112(d), EIGHT(d, 112)
#define OPERANDS_128(d) OPERANDS_120(d), EIGHT(d, 120)

// Operands are numbered through, so that those after the COUNT accumulators are I0 to I6.
#define WGMMA(WIDTH, COUNT, I0, I1, I2, I3, I4, I5, I6)                                                     \
    template <>                                                                                             \
    struct Product<WIDTH> {                                                                                 \
        template <int TRANSPOSED_A, int TRANSPOSED_B>                                                       \
        static __device__ __forceinline__ void shared(                                                      \
            float (&d)[COUNT], Descriptor a, Descriptor b, int accumulate) {                                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                           \
                         ", 0;\n"                                                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." ELEMENT "." ELEMENT          \
                         " {" ACCUMULATORS_##COUNT "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";\n}" \
                         : OPERANDS_##COUNT(d)                                                              \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B));          \
        }                                                                                                   \
        template <int TRANSPOSED_B>                                                                         \
        static __device__ __forceinline__ void registers(                                                   \
            float (&d)[COUNT], unsigned a0, unsigned a1, unsigned a2, unsigned a3, Descriptor b,            \
            int accumulate) {                                                                               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                           \
                         ", 0;\n"                                                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." ELEMENT "." ELEMENT          \
                         " {" ACCUMULATORS_##COUNT "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4     \
                                                   ", p, 1, 1, %" #I6 ";\n}"                                \
                         : OPERANDS_##COUNT(d)                                                              \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(TRANSPOSED_B)); \
        }                                                                                                   \
    };
WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

// d (64 x N) = A Bᵀ or, with `accumulate`, d += A Bᵀ, over 16 of K; A and B in shared memory. A transposed
// operand is `mn_major`, the other kind `k_major`.
template <int TRANSPOSED_A, int TRANSPOSED_B, int COUNT>
__device__ __forceinline__ void multiply(float (&d)[COUNT], Descriptor a, Descriptor b, int accumulate) {
    Product<2 * COUNT>::template shared<TRANSPOSED_A, TRANSPOSED_B>(d, a, b, accumulate);
}

// The same with A in registers.
template <int TRANSPOSED_B, int COUNT>
__device__ __forceinline__ void multiply(
    float (&d)[COUNT], unsigned a0, unsigned a1, unsigned a2, unsigned a3, Descriptor b, int accumulate) {
    Product<2 * COUNT>::template registers<TRANSPOSED_B>(d, a0, a1, a2, a3, b, accumulate);
}

// ---- Elements ----------------------------------------------------------------------

// Two floats as two elements, `low` at the lower address.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned packed;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_float(unsigned packed) {
#if BF16
    return __uint_as_float(packed << 16);
#else
    float value;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(value) : "r"(packed));
    return value;
#endif
}

__device__ __forceinline__ float high_float(unsigned packed) {
#if BF16
    return __uint_as_float(packed & 0xffff0000);
#else
    float value;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(value) : "r"(packed));
    return value;
#endif
}

// The difference of two pairs of elements, each rounded once.
__device__ __forceinline__ unsigned subtract(unsigned pair, unsigned other) {
    unsigned difference;
    asm("sub.rn." ELEMENT "x2 %0, %1, %2;" : "=r"(difference) : "r"(pair), "r"(other));
    return difference;
}

// 2^x, to 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float log2_fast(float x) {
    float value;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
