// What mlp.cu needs besides hopper_on_host.h and colsum_on_host.h: bulk copies. As there, the last byte arrives.
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
