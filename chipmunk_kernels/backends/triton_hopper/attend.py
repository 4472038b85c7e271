"""The computing partitions of the Hopper attention kernel: 64 queries of every unit each.

Logits, weights and output of a warpgroup stay in its registers. A tile's product with its values and the next
tile's logits are in flight together (as in FlashAttention-3, arXiv 2407.08608). Wherever the wait for the
former stands, ptxas puts it before the exponentials; with it after them videos took 6 to 9 % longer.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from chipmunk_kernels.backends.triton_hopper.fetch import (
    advance,
    fetch_queries,
    place,
    read_base,
    unit_after,
)

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def rounded(x, half: gl.constexpr):
    """float32 to a half, two by one instruction; Triton's own cast makes three of it."""
    if half == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def sums_by_lane(weights):
    """A row's sums over every eighth column, as far as a lane gets by itself.

    With whole rows in every tile HunyuanVideo by groups of 128 took 34.7 instead of 33.4 million cycles.
    """
    return gl.sum(weights.reshape((weights.shape[0], weights.shape[1] // 8, 8)), 1)


@gluon.jit
def weigh(s, m, l, scale_log2):
    """A tile's logits become weights relative to the running maximum; `rescale` is for all summed before."""
    raised = gl.maximum(m, gl.max(s, 1))
    rescale = gl.exp2((m - raised) * scale_log2)
    weights = gl.exp2(s * scale_log2 - (raised * scale_log2)[:, None])
    l *= gl.convert_layout(rescale, gl.SliceLayout(1, l.type.layout))[:, None]
    return weights, raised, l + sums_by_lane(weights), rescale


@gluon.jit
def attend(
    q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A computing partition: 64 rows of every unit.

    Rows past the limit are computed like the others, so that barriers see as many arrivals of everybody.
    """
    q_strides, base_strides, out_strides = strides
    keys, values, keys_full, keys_empty, values_full, values_empty = ring
    half: gl.constexpr = q.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    # As o_layout, but that the four lanes of a row have 16 bytes each of every 64, not 4 of every 16: a
    # quarter of the loads and stores.
    further: gl.constexpr = [[0, 32], [0, 64], [8, 0]] if WIDTH == 128 else [[0, 32], [8, 0]]
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]] + further,  # noqa: RUF005 (Triton unpacks no lists)
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, WIDTH],
    )  # fmt: skip
    slots = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    nothing = gl.zeros((64, BLOCK_N), gl.float32, s_layout)
    mine = queries.index(CONSUMER)
    stage = 0
    parity = 0
    b, h, which, first, limit = place(gl.program_id(0), shape, CONSUMERS)
    first += CONSUMER * 64
    fetch_queries(mine, q, q_strides, b, h, first, limit, WIDTH)
    kept = gl.load(counts + which)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        steps = (kept + BLOCK_N - 1) // BLOCK_N
        head = kept - (steps - 1) * BLOCK_N  # columns of the first tile
        next_b, next_h, which, next_first, next_limit = place(unit_after(unit, units), shape, CONSUMERS)
        next_first += CONSUMER * 64
        kept = gl.load(counts + which)
        acc = gl.zeros((64, WIDTH), gl.float32, o_layout)
        m = gl.full((64,), float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        l = sums_by_lane(nothing)
        async_copy.wait_group(0)
        if IN_REGISTERS:
            # The next ones can come at once: 63 instead of 67 us for FLUX at 93 %.
            left = mine.load(gl.DotOperandLayout(0, s_layout, 2))
            fetch_queries(mine, q, q_strides, next_b, next_h, next_first, next_limit, WIDTH)
        else:
            left = mine
        if steps > 0:
            # Copies are written by the generic proxy: who is about to read them through wgmma, the
            # asynchronous one, puts a fence between the barrier, by which it knows of them, and its products.
            mbarrier.wait(keys_full.index(stage), parity)
            fence_async_shared()
            transposed = keys.index(stage).permute((1, 0))
            s = warpgroup_mma(left, transposed, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(keys_empty.index(stage), count=1)
            weights, m, l, _ = weigh(gl.where((slots < head)[None, :], s, float("-inf")), m, l, scale_log2)
            p = gl.convert_layout(rounded(weights, half), p_layout)
            for _ in range(1, steps):
                before = stage
                parity_before = parity
                stage, parity = advance(stage, parity, STAGES)
                mbarrier.wait(keys_full.index(stage), parity)
                mbarrier.wait(values_full.index(before), parity_before)
                fence_async_shared()
                transposed = keys.index(stage).permute((1, 0))
                s = warpgroup_mma(left, transposed, nothing, use_acc=False, is_async=True)
                acc = warpgroup_mma(p, values.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(keys_empty.index(stage), count=1)
                weights, m, l, rescale = weigh(s, m, l, scale_log2)
                acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                mbarrier.arrive(values_empty.index(before), count=1)
                acc *= gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
                p = gl.convert_layout(rounded(weights, half), p_layout)
            mbarrier.wait(values_full.index(stage), parity)
            fence_async_shared()
            product = warpgroup_mma(p, values.index(stage), acc, is_async=True)
            onto = read_base(base, base_strides, b, h, first, limit, half, WIDTH, wide)
            if not IN_REGISTERS:
                fetch_queries(mine, q, q_strides, next_b, next_h, next_first, next_limit, WIDTH)
            acc, p = warpgroup_mma_wait(0, deps=(product, p))
            mbarrier.arrive(values_empty.index(stage), count=1)
            stage, parity = advance(stage, parity, STAGES)
        else:
            onto = read_base(base, base_strides, b, h, first, limit, half, WIDTH, wide)
            if not IN_REGISTERS:
                fetch_queries(mine, q, q_strides, next_b, next_h, next_first, next_limit, WIDTH)

        l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, s_layout))
        total = gl.convert_layout(gl.where(l > 0, l, 1.0), gl.SliceLayout(1, o_layout))
        result = acc * (sign / total)[:, None] + gl.convert_layout(onto, o_layout).to(gl.float32)
        out_b, out_h, out_n = out_strides
        row = first + gl.arange(0, 64, gl.SliceLayout(1, wide))
        d = gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
        head_of_out = out + b.to(gl.int64) * out_b + h.to(gl.int64) * out_h
        rows_of_out = head_of_out + (row.to(gl.int64) * out_n)[:, None] + d[None, :]
        gl.store(rows_of_out, gl.convert_layout(rounded(result, half), wide), mask=(row < limit)[:, None])
        row = first + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        natural = gl.where(l > 0, (m * scale_log2 + gl.log2(l)) * LN2, float("-inf"))
        gl.store(lse + (b * shape[0] + h).to(gl.int64) * shape[1] + row, natural, mask=row < limit)
        b = next_b
        h = next_h
        first = next_first
        limit = next_limit
    async_copy.wait_group(0)  # the program's shared memory outlives the copies into it
