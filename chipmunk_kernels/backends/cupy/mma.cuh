// The instructions of Ampere and later that the portable kernels are made of, one function each.
//
// Compile-time parameter (macro): KIND of an element (1 float16, 2 bfloat16). Two neighbouring elements share a
// 32-bit register, the first in its low half. Shared memory is addressed by 32-bit byte addresses.
//
// Fragments of mma.m16n8k16, for lane l of the warp: A (16 × 16) holds rows l / 4 and l / 4 + 8, B (16 × 8) column
// l / 4, C (16 × 8) rows l / 4 and l / 4 + 8 with columns 2 (l % 4) and the next.

using Word = unsigned short;
using index_t = long long;

#define MINUS_INFINITY __int_as_float(0xff800000)
constexpr unsigned WHOLE_WARP = 0xffffffffu;

extern __shared__ __align__(1024) unsigned char shared_memory[];

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// c += a · b in float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (KIND == 1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Four 8 × 8 matrices, the rows of matrix i at the addresses of lanes 8 i to 8 i + 7.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(unsigned (&to)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes to shared memory, past the registers and L1: the first `existing` of them copied, the rest zero.
__device__ __forceinline__ void copy_vector(unsigned to, const void* from, int existing) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from)), "r"(existing)
                 : "memory");
}

__device__ __forceinline__ void copy_vector(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from))
                 : "memory");
}

__device__ __forceinline__ void copy_int(unsigned to, const int* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from))
                 : "memory");
}

// The copies that this thread started since the last call become one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's newest groups are under way. Others see the data after a barrier.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
    if constexpr (KIND == 1) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float widen(Word word) {
    if constexpr (KIND == 2) return __uint_as_float(static_cast<unsigned>(word) << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
    return value;
}

__device__ __forceinline__ float low_half(unsigned both) { return widen(static_cast<Word>(both & 0xffffu)); }

__device__ __forceinline__ float high_half(unsigned both) {
    if constexpr (KIND == 2) return __uint_as_float(both & 0xffff0000u);
    return widen(static_cast<Word>(both >> 16));
}

// 2 to the power x in one instruction, with a relative error of 2⁻²²; 0 for −∞.
__device__ __forceinline__ float power_of_two(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float log_two(float x) {
    float value;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
