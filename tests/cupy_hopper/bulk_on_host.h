// What mlp.cu needs besides hopper_on_host.h and colsum_on_host.h: bulk copies, additions in L2. As there, the last byte arrives.
static void bulk_load(unsigned target, const void* source, int bytes, unsigned barrier) {
    for (int i = 0; i < bytes; i += 16) copy_16(target + i, static_cast<const unsigned char*>(source) + i);
    int& left = expected[me->block][barrier];
    if ((left -= bytes) < 0) {
        std::fprintf(stderr, "more bytes than expected at %u\n", barrier);
        std::abort();
    }
    if (left == 0) barrier_arrive_after_copies(barrier);
}
static void fence_async_proxy_global() {}
static void add_elements_16(void* target, uint4 words) {
    unsigned* entries = static_cast<unsigned*>(target);
    const unsigned given[4] = {words.x, words.y, words.z, words.w};
    if (reinterpret_cast<unsigned long long>(target) % 16) std::abort();
    for (int i = 0; i < 4; ++i)
        entries[i] = pack(low_float(entries[i]) + low_float(given[i]), high_float(entries[i]) + high_float(given[i]));
}
static void add_floats_16(void* target, uint4 words) {
    float* entries = static_cast<float*>(target);
    const unsigned given[4] = {words.x, words.y, words.z, words.w};
    if (reinterpret_cast<unsigned long long>(target) % 16) std::abort();
    for (int i = 0; i < 4; ++i) entries[i] += __uint_as_float(given[i]);
}
