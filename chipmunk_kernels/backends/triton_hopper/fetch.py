"""What the Hopper attention kernel moves: column lists, gathered keys and values, queries, the output's base.

A unit of work is one row tile of 64·CONSUMERS queries. Programs are persistent: each takes every
`num_programs`-th unit, heads outermost, and reads ahead into its next one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier


@gluon.jit
def place(unit, shape, CONSUMERS: gl.constexpr):
    """A unit's batch, head and column list, its first row, and the row after the last of its group."""
    heads, rows, groups, group_size, tiles = shape
    pair = unit // (groups * tiles)
    rest = unit % (groups * tiles)
    group = rest // tiles
    which = pair.to(gl.int64) * groups + group
    first = group * group_size + (rest % tiles) * (64 * CONSUMERS)
    limit = gl.minimum((group + 1) * group_size, rows)
    return pair // heads, pair % heads, which, first, limit


@gluon.jit
def unit_after(unit, units):
    """The program's next unit; where it has none the last of all, for what is then read ahead in vain."""
    return gl.minimum(unit + gl.num_programs(0), units - 1)


@gluon.jit
def advance(stage, parity, STAGES: gl.constexpr):
    """The next stage of a ring, and the parity of the round that it is in."""
    stage += 1
    if stage == STAGES:
        stage = 0
        parity ^= 1
    return stage, parity


@gluon.jit
def fetch(
    k, v, indices, counts, k_b, k_h, v_b, v_h, capacity, shape, units, ring,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    K_N: gl.constexpr, V_N: gl.constexpr,
):  # fmt: skip
    """The fetching partition: every tile of every unit, 16 bytes a thread and copy.

    A list's first tile is the one that may be partly filled, so that all later ones need no mask; its slots
    past the list repeat the tile's last column, whose weight is masked. Entries are read one tile early.
    """
    keys, values, keys_full, keys_empty, values_full, values_empty = ring
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    slots = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    stage = 0
    parity = 1
    b, h, which, _, _ = place(gl.program_id(0), shape, CONSUMERS)
    kept = gl.load(counts + which)
    columns = indices + which * capacity
    ahead = gl.load(columns + gl.minimum(slots, (kept - 1) % BLOCK_N), mask=kept > 0, other=0)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        k_head = k + b.to(gl.int64) * k_b + h.to(gl.int64) * k_h
        v_head = v + b.to(gl.int64) * v_b + h.to(gl.int64) * v_h
        b, h, which, _, _ = place(unit_after(unit, units), shape, CONSUMERS)
        next_kept = gl.load(counts + which)
        next_columns = indices + which * capacity
        next_slots = gl.minimum(slots, (next_kept - 1) % BLOCK_N)
        steps = (kept + BLOCK_N - 1) // BLOCK_N
        start = kept - (steps - 1) * BLOCK_N  # of the tile after this one
        for step in range(steps):
            column = ahead.to(gl.int64)
            last = step + 1 == steps
            of_list = gl.where(last, next_columns, columns)
            at = gl.where(last, next_slots, start + slots)
            ahead = gl.load(of_list + at, mask=gl.where(last, next_kept, 1) > 0, other=0)
            start += BLOCK_N
            rows_of_k = k_head + (column * K_N)[:, None] + d[None, :]
            mbarrier.wait(keys_empty.index(stage), parity)
            async_copy.async_copy_global_to_shared(keys.index(stage), rows_of_k)
            async_copy.mbarrier_arrive(keys_full.index(stage), increment_count=False)
            rows_of_v = v_head + (column * V_N)[:, None] + d[None, :]
            mbarrier.wait(values_empty.index(stage), parity)
            async_copy.async_copy_global_to_shared(values.index(stage), rows_of_v)
            async_copy.mbarrier_arrive(values_full.index(stage), increment_count=False)
            stage, parity = advance(stage, parity, STAGES)
        if steps == 0:
            ahead = gl.load(next_columns + next_slots, mask=next_kept > 0, other=0)
        kept = next_kept
        columns = next_columns
    async_copy.commit_group()
    async_copy.wait_group(0)  # the program's shared memory outlives the copies into it


@gluon.jit
def fetch_queries(target, q, strides, b, h, first, limit, WIDTH: gl.constexpr):
    """64 rows from `first` on, on their way; rows past the limit repeat the last, and nobody stores what they
    give."""
    q_b, q_h, q_n = strides
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = gl.minimum(first + gl.arange(0, 64, gl.SliceLayout(1, layout)), limit - 1).to(gl.int64)
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    head = q + b.to(gl.int64) * q_b + h.to(gl.int64) * q_h
    async_copy.async_copy_global_to_shared(target, head + (row * q_n)[:, None] + d[None, :])
    async_copy.commit_group()


@gluon.jit
def read_base(
    base, strides, b, h, first, limit, half: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr
):
    """What the output is added to, or zeros where there is none."""
    if base is None:
        return gl.zeros((64, WIDTH), half, layout)
    else:
        base_b, base_h, base_n = strides
        row = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
        d = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        head = base + b.to(gl.int64) * base_b + h.to(gl.int64) * base_h
        rows_of_base = head + (row.to(gl.int64) * base_n)[:, None] + d[None, :]
        return gl.load(rows_of_base, mask=(row < limit)[:, None], other=0.0)
