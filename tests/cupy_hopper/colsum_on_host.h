// What colsum_attention.cu needs besides hopper_on_host.h: tensor maps, plain loads and stores.
#define __grid_constant__
#define __align__(bytes)

using std::fmaf;
using std::fmaxf;
using std::fminf;
using std::log2f;

static float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
static int block_number() { return me->block; }

static float load_shared_float(unsigned address) {
    float value;
    std::memcpy(&value, at(address), 4);
    return value;
}
static void store_shared_float(unsigned address, float x) { std::memcpy(at(address), &x, 4); }
static void store_shared_floats(unsigned address, float x, float y) {
    std::memcpy(at(address), &x, 4);
    std::memcpy(at(address + 4), &y, 4);
}
static void clear_shared_16(unsigned address) { std::memset(at(address), 0, 16); }
static void store_streaming(float* target, float value) { *target = value; }

// A barrier's bytes are counted as the copies that bring them are ordered; the last of them arrives. What is ordered
// before it is expected, or beyond it, stops the test.
static std::vector<std::vector<int>> expected;
static void barrier_arrive_expect(unsigned barrier, int bytes) {
    expected.resize(blocks.size());
    expected[me->block].resize(SHARED_START + here().memory.size());
    expected[me->block][barrier] += bytes;
}

// As the test encodes it.
struct HostMap {
    const unsigned char* address;
    unsigned long long sizes[4], strides[3];
    unsigned box_rows;
};
static void tensor_load_4d(unsigned target, const void* encoded, unsigned barrier, int x, int y, int z, int w) {
    const HostMap& map = *static_cast<const HostMap*>(encoded);
    const int bytes = map.box_rows * ROW_BYTES;
    for (unsigned row = 0; row < map.box_rows; ++row) {
        const unsigned char* source =
            map.address + (y + row) * map.strides[0] + z * map.strides[1] + w * map.strides[2] + x * 2;
        for (int chunk = 0; chunk < 8; ++chunk) {
            const bool inside = y + row < map.sizes[1] && x + chunk * 8 < map.sizes[0];
            copy_16_or_zeros(
                target + swizzled(row, chunk), inside ? source + chunk * 16 : map.address, inside ? 16 : 0);
        }
    }
    int& left = expected[me->block][barrier];
    if ((left -= bytes) < 0) {
        std::fprintf(stderr, "more bytes than expected at %u\n", barrier);
        std::abort();
    }
    if (left == 0) barrier_arrive_after_copies(barrier);
}
