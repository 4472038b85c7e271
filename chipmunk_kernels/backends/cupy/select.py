"""Launching select.cu: exact selection by score, one block a row, one read of each row.

Scratch memory holds the always-kept columns as bits, a row of them for each group that has its own: 9 MiB at
HunyuanVideo's size with windows, 15 kB without.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, load, prepared
from chipmunk_kernels.backends.cupy.vectors import VECTOR_BYTES, vector_bytes
from chipmunk_kernels.backends.torch import select as peer
from chipmunk_kernels.layout import maker
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TILE = 1024
CLUSTER = 8
"""Neighbours sampled together, as in select.cu."""
SLACK_SHARE = 32
DEVIATIONS = 4.0
DEPENDENT = 4
"""Sampled columns that count as one: neighbours in a video resemble each other."""
LISTED_WHOLE = 8192
"""Rows up to this length are listed without a sample: 32 kB, which leave room for six blocks on sm_90."""
REGISTERS = 65536
"""Of a multiprocessor, from sm_80 on."""
FEWEST_REGISTERS = 64
"""Of a thread: 32 scores, and what decides about them."""
STATE_BYTES = (256 + 32 + 7) * 4
SHARED_BYTES = 99 * 1024
"""What a block may have on every GPU since Ampere."""


@dataclass(frozen=True)
class SelectSettings(LaunchSettings):
    """How blocks walk their rows.

    Attributes:
        threads: of a block, which decides one row.
        blocks: that must fit a multiprocessor's registers at once: one reads while others decide.
        sample: columns that estimate where the list of candidates begins. More make the list shorter, and
            cost reads: 8192 of HunyuanVideo's 119056 columns are 7 %.
        ahead: tiles of 1024 columns that each warp has fetched into L2 while it works on one.
    """

    threads: int = choice(512, 256, 384, 512)
    blocks: int = choice(2, 1, 2, 3, 4)
    sample: int = choice(8192, 2048, 4096, 8192)
    ahead: int = choice(1, 0, 1, 2)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        share = REGISTERS // (self.threads * self.blocks)
        if share < FEWEST_REGISTERS:
            return f"{self.blocks} blocks of {self.threads} threads leave {share} registers to a thread"
        if self.sample != SelectSettings().sample and self.sample > problem.columns // CLUSTER:
            return (
                f"samples are an eighth of {problem.columns} columns, also where {self.sample} are asked for"
            )
        return None


@dataclass(frozen=True)
class Plan:
    """What one block lists of its row.

    Attributes:
        room: scores that the list holds; 0 for no list, where every pass of the search reads the row.
        sample: columns sampled for the floor of the list; 0 where it holds the whole row.
        share: of a row's competing columns, the best that the list should take.
        lots_room: columns that the list of possible extras holds; 0 for none.
        bound: the least hash of those; its low 16 bits are 0.
        shared_bytes: of a block.
    """

    room: int
    sample: int
    share: float
    lots_room: int
    bound: int
    shared_bytes: int


def fixed_bytes(length: int) -> int:
    """Shared memory besides the lists: a bit a column, two sums a tile."""
    return STATE_BYTES + -(-length // TILE) * (TILE // 8 + 8)


def gathering_bytes(threads: int) -> int:
    """Where each warp gathers the columns of a tile; the list of scores lies there before."""
    return threads // 32 * TILE * 2


def make_plan(
    length: int, k: int, always: int, random: int, sample: int, threads: int, limit: int
) -> Plan | None:
    """Lists for the k best of `length` columns, `always` kept ones and `random` extras, with room for the
    sample's error to both sides, as far as `limit` bytes go; None if not even the marks fit."""
    free = limit - fixed_bytes(length)
    if free < gathering_bytes(threads):
        return None
    lots_room, bound = _draw(length, k, always, random)
    if 4 * lots_room > free - gathering_bytes(threads):
        lots_room = 0
    free -= 4 * lots_room
    room, sample, share = _shortlist(length, k, always, sample)
    if k == 0 or 4 * max(room, sample) > free:
        room, sample, share = 0, 0, 0.0
    listed = max(gathering_bytes(threads), 4 * room, 4 * sample)
    return Plan(room, sample, share, lots_room, bound, fixed_bytes(length) + 4 * lots_room + listed)


def _shortlist(length: int, k: int, always: int, sample: int) -> tuple[int, int, float]:
    """Room, sample and share of the list of scores."""
    competing = length - always
    sample = min(sample, length // CLUSTER) // CLUSTER * CLUSTER
    if length <= LISTED_WHOLE or k >= competing:
        return length, 0, 1.0
    effective = sample // DEPENDENT
    spread = 0
    for _ in range(3):  # it depends on where the floor is, and that on the spread
        part = min(0.5, (k + spread) / length + 1 / effective)
        spread = math.ceil(DEVIATIONS * length * math.sqrt(part * (1.0 - part) / effective))
    aim = k + spread
    room = aim + aim // SLACK_SHARE + spread
    return (length, 0, 1.0) if room >= length else (room, sample, min(1.0, aim / competing))


def _draw(length: int, k: int, always: int, random: int) -> tuple[int, int]:
    """Room and bound of the list of extras, which also takes columns that then are chosen by score."""
    rest = length - always - k
    margin = math.ceil(6.0 * math.sqrt(random)) + 8
    if random == 0 or 2 * (random + margin) > rest:
        return 0, 0
    bound = math.floor((1.0 - (random + margin) / rest) * 2**16) << 16
    listed = (length - always) * (1.0 - bound / 2**32)
    return math.ceil(listed + 6.0 * math.sqrt(listed)) + 8, bound


def topk_columns(
    scores: Tensor,
    k: int,
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    """Indices int32 `(B, H, G, capacity)` and counts of the always-kept, the k best others and `random` more.

    scores `(B, H, G, N)`, always bool `(G, N)` or None; columns from key_length on are not kept. Rows whose
    marks exceed shared memory (over 600 000 columns where a block has 99 KiB, over 1.5 million where it has
    227) are left to the torch backend.
    """
    if scores.stride(3) != 1:
        scores = scores.contiguous()
    mask_place = None
    if always is not None:
        if always.stride(1) != 1:
            always = always.contiguous()
        mask_place = (always.shape[0], always.stride(0))
    start = scores.data_ptr()
    calls = _calls(
        settings, scores.dtype, scores.device, scores.shape, scores.stride(), start % VECTOR_BYTES,
        mask_place, k, random, key_length, capacity,
    )  # fmt: skip
    if calls is None:
        fallback = peer.SelectSettings()
        return peer.topk_columns(scores, k, always, random, seed, key_length, capacity, fallback)
    indices, counts, barred = calls.new_indices(), calls.new_counts(), 0
    if always is not None:
        words = calls.new_words()
        barred = words.data_ptr()
        calls.pack(always.data_ptr(), barred)
    calls.select(start, barred, indices.data_ptr(), counts.data_ptr(), k, random, seed & 0xFFFFFFFF)
    return indices, counts


@dataclass(frozen=True)
class Calls:
    """What selection from tensors of one layout does: the makers of its results and scratch, its launches.

    Attributes:
        new_indices, new_counts: make the results.
        new_words: makes the always-kept columns as the words of select.cuh's tiles, int32 `(G, tiles * 32)`,
            of rows that are one row expanded only that.
        pack: fills them, from the addresses of the mask and of the words.
        select: from the addresses of scores, words (or 0), indices and counts, and k, random and seed.
    """

    new_indices: Callable[[], Tensor]
    new_counts: Callable[[], Tensor]
    new_words: Callable[[], Tensor]
    pack: Callable[..., None]
    select: Callable[..., None]


@functools.lru_cache(maxsize=1024)
def _calls(
    settings: SelectSettings,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    misalignment: int,
    mask_place: tuple[int, int] | None,
    k: int,
    random: int,
    length: int,
    capacity: int,
) -> Calls | None:
    """For scores that start `misalignment` bytes past a multiple of 16, and a mask's rows and their stride.

    None where a row's marks exceed shared memory.
    """
    limit = shared_limit(device)
    kept = max(0, capacity - k - random)
    plan = make_plan(length, k, kept, random, settings.sample, settings.threads, limit)
    if plan is None:
        return None
    _, heads, groups, _ = shape
    rows, stride = mask_place or (1, 0)
    if stride == 0:
        rows = 1
    tiles, blocks = -(-length // TILE), math.prod(shape[:3])
    code = source(dtype, vector_bytes(misalignment, dtype.itemsize, *strides[:3]), settings)
    # Whatever its plan, a launch may take all the shared memory there is.
    return Calls(
        new_indices=maker((*shape[:3], capacity), torch.int32, device),
        new_counts=maker(shape[:3], torch.int32, device),
        new_words=maker((rows, tiles * 32), torch.int32, device),
        pack=prepared(
            load(code, "pack_always", device), device,
            -(-rows * tiles // (settings.threads // 32)) if blocks else 0, settings.threads,
            length, tiles, rows, stride,
        ),
        select=prepared(
            load(code, "topk_columns", device, limit), device, blocks, settings.threads,
            heads, groups, length, capacity, *strides[:3], tiles * 32 if rows > 1 else 0,
            plan.room, plan.sample, plan.share, plan.lots_room, plan.bound,
            shared_bytes=plan.shared_bytes,
        ),
    )  # fmt: skip


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    if device.type != "cuda":
        return SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES))


def source(dtype: torch.dtype, vector_bytes: int, settings: SelectSettings) -> Source:
    """select.cu for rows that all begin at multiples of `vector_bytes`."""
    return Source(
        "select.cu",
        (
            ("KIND", KINDS[dtype]),
            ("VECTOR_BYTES", vector_bytes),
            ("THREADS", settings.threads),
            ("BLOCKS", settings.blocks),
            ("AHEAD", settings.ahead),
        ),
    )


KERNELS = (Kernel("topk_columns", "cupy", topk_columns, SelectSettings),)

SOURCES = (source(torch.float32, VECTOR_BYTES, SelectSettings()),)
